"""A promise at risk is not served: not by any object that shares the sink, and not where nobody can say."""

from __future__ import annotations

import time
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from polar_sdk.errors import SinkError
from polar_sdk.promises.audit import Audit
from polar_sdk.request import standings
from polar_sdk.router.certificate import Certificate, Counts
from polar_sdk.testing import tiny_model
from polar_sdk.usage import FALLBACK_TAG, ListSink, NullSink, new_request_id
from tests.sdk.router import conftest as router_conftest

if TYPE_CHECKING:
    from collections.abc import Mapping

    import pytest

    from polar_sdk.model import PolarModel
    from polar_sdk.promises.audit import PromiseStanding
    from polar_sdk.router.certificate import Loss
    from polar_sdk.router.menu import MenuRouter
    from polar_sdk.usage import UsageSink

model, router, certified = router_conftest.model, router_conftest.router, router_conftest.certified
LIMIT_SECONDS = 2.0


def put_at_risk(sink: UsageSink, certified: MenuRouter, tier: str, times: int = 60) -> None:
    """Audits in which every answer of a tier was lost."""
    assert certified.certificate is not None
    for promise in certified.certificate.audited[tier]:
        for _ in range(times):
            sink.audited(
                Audit(
                    audit_id=new_request_id(),
                    request_id=new_request_id(),
                    tenant="acme",
                    tier=tier,
                    promise=promise.digest,
                    loss=promise.loss,
                    alpha=promise.alpha,
                    delta=promise.delta,
                    lost=True,
                    compared=48,
                    kept=0,
                    prompt_tokens=9,
                    flops=1,
                    audit_request_id="a",
                    at=datetime.now(UTC),
                )
            )


def served(engine: PolarModel, **options: Any) -> tuple[str | None, str, str | None]:
    usage = engine.generate("some text", max_tokens=2, **options).usage
    return usage.tier, usage.program, usage.tags.get(FALLBACK_TAG)


def until_fallback(engines: list[PolarModel], **options: Any) -> float:
    """Seconds until all of them serve by something else."""
    began = time.monotonic()
    for engine in engines:
        while served(engine, **options)[2] is None:
            assert time.monotonic() - began < 30, "a replica never fell back"
            time.sleep(0.02)
    return time.monotonic() - began


def test_all_objects_of_a_sink_fall_back_to_the_next_safer_tier(certified: MenuRouter) -> None:
    sink = ListSink()
    engines = [tiny_model(router=certified, sink=sink) for _ in range(4)]
    for engine in engines:
        assert served(engine, compute="economy") == ("economy", "0-1 4-5", None)
    put_at_risk(sink, certified, "economy")
    assert until_fallback(engines, compute="economy") <= LIMIT_SECONDS
    for engine in engines:
        assert served(engine, compute="economy") == ("standard", "0-1 3-5", "economy")
        assert served(engine, compute="standard") == ("standard", "0-1 3-5", None)
        assert served(engine) == ("standard", "0-1 3-5", None)
        # A tolerance stands at the θ of no tier: at or above one at risk, nothing is known to hold.
        assert served(engine, compute=0.3) == ("standard", "0-1 3-5", "0.3")
        assert served(engine, compute=0.05) == (None, "0-1 3-5", None)
    put_at_risk(sink, certified, "standard")
    assert until_fallback(engines) <= LIMIT_SECONDS
    for engine in engines:
        assert served(engine, compute="economy") == ("exact", "0-5", "economy")
        assert served(engine) == ("exact", "0-5", "standard")
        assert served(engine, compute="exact") == ("exact", "0-5", None)
        assert served(engine, program="0-3 5") == (None, "0-3 5", None)


def test_streams_say_it_too(certified: MenuRouter) -> None:
    sink = ListSink()
    engine = tiny_model(router=certified, sink=sink)
    put_at_risk(sink, certified, "economy")
    *_, last = engine.stream("some text", compute="economy", max_tokens=2)
    assert last.generation is not None
    assert last.generation.usage.tags == {FALLBACK_TAG: "economy"}


def test_a_safer_tier_at_risk_is_passed_over(certified: MenuRouter) -> None:
    sink = ListSink()
    engine = tiny_model(router=certified, sink=sink)
    for tier in ("economy", "standard"):
        put_at_risk(sink, certified, tier)
    assert served(engine, compute="economy") == ("exact", "0-5", "economy")


def test_a_new_certificate_begins_anew(certified: MenuRouter) -> None:
    sink = ListSink()
    put_at_risk(sink, certified, "economy")
    assert certified.certificate is not None
    fresh = certified.with_certificate(certified.certificate.model_copy(update={"data": "others"}))
    assert served(tiny_model(router=fresh, sink=sink), compute="economy") == ("economy", "0-1 4-5", None)


def test_a_tier_with_two_promises_falls_back_where_one_is_at_risk(certified: MenuRouter) -> None:
    assert certified.certificate is not None
    counts = Counts(n=500, lost={"differs": (0, 5, 18, 120), "strict": (0, 20, 90, 200)})
    both = certified.certificate.model_copy(update={"kinds": {"prompt": counts}, "tiers": {}})
    tiers = {"economy": both.promise(0.3, strict=0.5), "standard": both.promise(0.05, strict=0.3)}
    two = certified.with_certificate(Certificate.model_validate({**both.model_dump(), "tiers": tiers}))
    assert two.certificate is not None
    differs, strict = two.certificate.audited["economy"]
    assert (differs.loss, differs.alpha, strict.loss, strict.alpha) == ("differs", 0.3, "strict", 0.5)
    assert len({each.digest for each in [differs, strict, *two.certificate.audited["standard"]]}) == 4

    def serves(at_risk: str) -> str | None:
        return two.serving("economy", lambda promise: promise == at_risk).tier

    assert (serves(differs.digest), serves(strict.digest), serves("other")) == ("standard", "standard", "economy")


def test_a_tier_that_takes_the_place_of_one_is_stricter_where_audits_looked(certified: MenuRouter) -> None:
    """Tiers that differ only in what they allow of texts, or only of choices; audits see right choices as lost."""
    assert certified.certificate is not None
    none, few, more = (0, 0, 0, 0), (0, 5, 18, 120), (0, 5, 60, 120)

    def beside(
        texts: tuple[int, ...], choices: tuple[int, ...], loss: Loss, compute: str | float = "economy"
    ) -> str | None:
        kinds = {
            "prompt": Counts(n=500, lost={"differs": texts}),
            "choice": Counts(n=500, lost={"differs": choices, "drops": choices}, gained=none),
        }
        saved = dict.fromkeys(("text", "choice"), (0.0, 0.01, 0.1, 0.3))
        bare = certified.certificate.model_copy(update={"kinds": kinds, "saved": saved, "tiers": {}})  # type: ignore[union-attr]
        tiers = {"economy": bare.promise(0.2, loss), "standard": bare.promise(0.05, loss)}
        made = certified.with_certificate(Certificate.model_validate({**bare.model_dump(), "tiers": tiers}))
        lost = {term.digest for term in made.audited["economy"]}
        return made.serving(compute, lost.__contains__).tier

    assert beside(more, none, "drops") == "standard", "choices alike, of which audits know nothing"
    assert beside(more, none, "differs") == "exact", "the same choices may be what was lost"
    assert beside(none, few, "drops") == "exact", "the same texts were lost"
    assert beside(more, few, "drops", 0.2) == "standard", "a tolerance serves as much as was lost of texts"
    assert beside(more, few, "drops", 0.05) is None, "it serves less"


class Silent(ListSink):
    """A sink that stops answering where promises stand."""

    answers = True
    asked = 0

    def standings(self) -> Mapping[str, PromiseStanding]:
        self.asked += 1
        if not self.answers:
            raise SinkError("the ledger is away")
        return super().standings()


def test_without_an_answer_the_last_one_holds_for_a_while_and_then_nothing(
    certified: MenuRouter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(standings, "TRUST_SECONDS", 2.0)
    sink = Silent()
    engine = tiny_model(router=certified, sink=sink)
    assert served(engine, compute="economy")[0] == "economy"
    sink.answers = False
    asked = sink.asked
    while sink.asked == asked:
        time.sleep(0.01)
    assert served(engine, compute="economy")[0] == "economy"
    assert 0.5 <= until_fallback([engine], compute="economy") <= 5.0
    assert served(engine, compute="economy") == ("exact", "0-5", "economy")
    sink.answers = True
    began = time.monotonic()
    while served(engine, compute="economy")[0] != "economy":
        assert time.monotonic() - began < 10
        time.sleep(0.05)


def test_a_sink_that_hangs_delays_the_first_request_only_and_not_for_long(certified: MenuRouter) -> None:
    class Hanging(ListSink):
        def standings(self) -> Mapping[str, PromiseStanding]:
            time.sleep(3)
            return super().standings()

    engine = tiny_model(router=certified, sink=Hanging())
    served(engine, compute="exact")  # what runs first takes longer
    times = []
    for _ in range(4):
        began = time.monotonic()
        assert engine.request("some text", compute="economy").tier == "economy"
        times.append(time.monotonic() - began)
    assert max(times[1:]) < 0.15 < times[0] < 1.5


def test_the_path_of_a_request_reads_no_ledger(certified: MenuRouter) -> None:
    sink = Silent()
    engine = tiny_model(router=certified, sink=sink)
    engine.request("some text", compute="economy")
    before = sink.asked
    for _ in range(100):
        engine.request("some text", compute="economy")
    assert sink.asked - before <= 3, "about two reads a second, by another thread"


def test_calibration_is_not_turned_aside(certified: MenuRouter) -> None:
    """What the laboratory measures of a router is that router, whatever audits said of its promises."""
    sink = ListSink()
    engine = tiny_model(router=certified, sink=sink)
    put_at_risk(sink, certified, "standard")
    assert served(engine)[0] == "exact"
    answers = engine.greedy_answers(["some text"], max_tokens=20, router=certified)
    assert answers == engine.greedy_answers(["some text"], max_tokens=20, program=router_conftest.MENU[1])


def test_without_metering_there_is_nothing_to_heed(certified: MenuRouter) -> None:
    assert served(tiny_model(router=certified, sink=NullSink()), compute="economy")[0] == "economy"
