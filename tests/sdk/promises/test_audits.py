"""Audits of real answers: what is judged, who pays, what is never audited, and that tenants notice nothing of it."""

from __future__ import annotations

import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import pytest

from polar_sdk.engine.pack import Question
from polar_sdk.engine.scoring import score_programs
from polar_sdk.errors import BudgetExceededError, RequestTimeoutError
from polar_sdk.promises.audit import PromiseStanding
from polar_sdk.promises.losses import ANSWER_TOKENS, is_lost, tokens_kept
from polar_sdk.promises.monitor import State
from polar_sdk.promises.novelty import Usual
from polar_sdk.request.options import Audits
from polar_sdk.router.certificate import Counts, TierPromise, tier_promise
from polar_sdk.testing import tiny_model
from polar_sdk.usage import AUDIT_TAG, FALLBACK_TAG, ListSink, Outcome
from tests.sdk.router import conftest as router_conftest

if TYPE_CHECKING:
    from collections.abc import Callable

    from polar_sdk.model import PolarModel
    from polar_sdk.router.menu import MenuRouter
    from polar_sdk.usage import UsageBound, UsageRecord

model, router, certified = router_conftest.model, router_conftest.router, router_conftest.certified
PROMPTS = [f"question {number} about {'x' * number}" for number in range(12)]


def audited_model(router: MenuRouter, **settings: Any) -> tuple[PolarModel, ListSink]:
    sink = settings.pop("sink", None) or ListSink()
    return tiny_model(router=router, sink=sink, **{"audit_share": 1.0, **settings}), sink


def until(done: Callable[[], bool], seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.01)


def of_tenants(sink: ListSink) -> list[UsageRecord]:
    return [record for record in sink.records if record.tenant != "polar.audit"]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_what_is_judged_is_what_calibration_counts(certified: MenuRouter, temperature: float) -> None:
    engine, sink = audited_model(certified)
    for number, prompt in enumerate(PROMPTS):
        engine.generate(
            prompt, compute="economy", max_tokens=60, temperature=temperature, request_id=f"r{number}", tenant="acme"
        )
    until(lambda: len(sink.audits) == len(PROMPTS))
    answers = dict(zip(PROMPTS, engine.greedy_answers(PROMPTS, max_tokens=ANSWER_TOKENS), strict=True))
    audits = {audit.request_id: audit for audit in sink.audits}
    for number, prompt in enumerate(PROMPTS):
        record = next(record for record in of_tenants(sink) if record.request_id == f"r{number}")
        question = Question(tuple(engine.prompt_tokens(prompt)), (answers[prompt],))
        program, full = router_conftest.MENU[2], router_conftest.MENU[0]
        assert record.program == program.text
        scores = score_programs(engine.decoder, [question], [program, full])
        kept = tokens_kept(scores[program][0].greedy[0], scores[full][0].greedy[0])
        audit = audits[f"r{number}"]
        assert (audit.compared, audit.kept) == (len(answers[prompt]), kept)
        assert audit.lost == is_lost(kept / audit.compared, "differs")
        assert (audit.tenant, audit.tier, audit.alpha, audit.delta) == ("acme", "economy", 0.3, 0.1)
    assert certified.certificate is not None
    (terms,) = certified.certificate.audited["economy"]
    assert {audit.promise for audit in sink.audits} == {terms.digest}


def test_the_provider_pays_and_the_tenant_does_not(certified: MenuRouter) -> None:
    engine, sink = audited_model(certified)
    plain, without = audited_model(certified, audit_share=0.0)
    for number, prompt in enumerate(PROMPTS):
        for each in (engine, plain):
            each.generate(prompt, compute="economy", max_tokens=8, request_id=f"r{number}", tenant="acme")
    until(lambda: len(sink.audits) == len(PROMPTS))

    def bill(records: list[UsageRecord]) -> list[tuple[Any, ...]]:
        return [(r.request_id, r.tenant, r.tokens, r.flops, r.visits, r.tags, r.program) for r in records]

    assert bill(of_tenants(sink)) == bill(of_tenants(without))
    assert not without.audits
    own = [record for record in sink.records if record.tenant == "polar.audit"]
    for audit in sink.audits:
        paid = [record for record in own if record.tags == {AUDIT_TAG: audit.request_id}]
        assert {record.request_id for record in paid} in (
            {audit.audit_request_id},
            {audit.audit_request_id, f"{audit.audit_request_id}.tier"},
        )
        assert audit.flops == sum(record.flops.executed for record in paid) > 0
        assert all(record.outcome is Outcome.COMPLETED for record in paid)
        assert paid[0].router == "identity"


def test_a_request_that_ran_all_layers_loses_nothing_and_runs_nothing(certified: MenuRouter) -> None:
    engine, sink = audited_model(_careful(certified))
    engine.generate("some text", compute="economy", max_tokens=4)
    until(lambda: len(sink.audits) == 1)
    (audit,) = sink.audits
    assert (audit.lost, audit.flops, audit.audit_request_id) == (False, 0, None)
    assert len(sink.records) == 1


def _careful(certified: MenuRouter) -> MenuRouter:
    """The same, as it chooses for prompts unlike all that it knows: always identity."""
    import copy

    class Careful(type(certified)):  # type: ignore[misc]
        def choose_all(self, outputs: Any, theta: float, lengths: Any = None) -> list[Any]:
            return [self.programs[0]] * len(outputs)

    other = copy.copy(certified)
    other.__class__ = Careful
    return other


def test_what_did_not_end_by_itself_is_not_audited(certified: MenuRouter) -> None:
    engine, sink = audited_model(certified)
    stop = threading.Event()

    def stopping(tokens: Any, logits: Any) -> Any:
        if len(tokens) == 2:
            stop.set()
        return logits

    def failing(tokens: Any, logits: Any) -> Any:
        raise ZeroDivisionError

    engine.generate("one", compute="economy", cancel=stop, logits_hook=stopping, max_tokens=20)
    with pytest.raises(ZeroDivisionError):
        engine.generate("two", compute="economy", logits_hook=failing)
    with pytest.raises(RequestTimeoutError):
        engine.generate("three", compute="economy", timeout=1e-6)
    stream = engine.stream("four", compute="economy", max_tokens=40)
    next(stream)
    stream.close()
    engine.generate("five", compute="exact", max_tokens=3)
    engine.generate("six", program="0-3 5", max_tokens=3)
    engine.generate("seven", compute=0.3, max_tokens=3)
    engine.generate("eight", compute="economy", max_tokens=3, request_id="the only one")
    until(lambda: len(sink.audits) == 1 and not len(engine.auditor or ()))
    time.sleep(0.2)
    assert [audit.request_id for audit in sink.audits] == ["the only one"]


def test_streams_and_batches_are_audited(certified: MenuRouter) -> None:
    engine, sink = audited_model(certified)
    list(engine.stream("one", compute="economy", max_tokens=5, request_id="a"))
    each: Any = [{"request_id": "b"}, {"request_id": "c"}]
    engine.generate_batch(["two", "three"], each=each, compute="standard", max_tokens=5)
    until(lambda: {audit.request_id for audit in sink.audits} == {"a", "b", "c"})


def test_answers_and_shared_starts_are_the_same_beside_audits(certified: MenuRouter) -> None:
    """Tenants that ask at the same time, in an engine that audits everything between their requests."""

    def served(share: float) -> tuple[list[tuple[int, ...]], list[int]]:
        engine, sink = audited_model(certified, audit_share=share)
        start = "the same beginning of all prompts, long enough for a block of sixty-four tokens to be kept: "
        answers: list[tuple[int, ...]] = []
        cached: list[int] = []
        for number in range(4):
            prompts = [f"{start}{number} {part}" for part in ("one", "two", "three")]
            with ThreadPoolExecutor(3) as pool:
                done = pool.map(
                    lambda prompt: engine.generate(prompt, compute="economy", max_tokens=24, tenant=prompt[-3:]),
                    prompts,
                )
                answers += [each.token_ids for each in done]
            time.sleep(0.15)  # so that an audit begins, and has to give way to the next round
        if share:
            until(lambda: len(sink.audits) == 12)
        cached = [record.tokens.cached for record in of_tenants(sink)]
        return answers, sorted(cached)

    assert served(1.0) == served(0.0)


def test_an_audit_waits_while_anybody_has_something_to_run(certified: MenuRouter) -> None:
    engine, sink = audited_model(certified)
    stream = engine.stream("a reader who takes a pause", compute="exact", max_tokens=40)
    next(stream)
    engine.generate("short", compute="economy", max_tokens=2)
    time.sleep(0.3)
    assert not sink.audits and engine.auditor is not None
    for _ in stream:
        pass
    until(lambda: len(sink.audits) == 1)
    assert len(engine.scheduler) == engine.scheduler.waiting == 0


@pytest.mark.parametrize("kept_share", [0.0, 0.25])
def test_an_audit_gives_its_pages_up_and_goes_on_later(certified: MenuRouter, kept_share: float) -> None:
    """The pool holds one long request: an audit that has begun loses its pages to it, and ends after it.

    An audit that begins while the start of its prompt is still kept reads that instead of running it, and costs less.
    """
    from polar_sdk.model import PolarModel
    from polar_sdk.testing import tiny_llama, tiny_policy, tiny_tokenizer

    sink = ListSink()
    page = tiny_model().decoder.pool.page_bytes
    engine = PolarModel.from_hf(
        tiny_llama(), tiny_tokenizer(), policy=tiny_policy(6), router=certified, sink=sink, audit_share=1.0,
        kv_memory=page * 6 * 8,
    )  # fmt: skip
    engine.scheduler.limits = replace(engine.scheduler.limits, prefix_share=kept_share)
    for number in range(6):
        engine.generate("x" * 120, compute="economy", max_tokens=60, request_id=f"r{number}")
        time.sleep(0.06 + 0.01 * number)  # the audit is on its way
        engine.generate("y" * 400, compute="exact", max_tokens=100)
    until(lambda: len(sink.audits) == 6)
    read = Counter[str]()
    for record in sink.records:
        read[record.tags.get(AUDIT_TAG, "")] += record.tokens.cached
    found = {(read[audit.request_id], audit.kept, audit.flops) for audit in sink.audits}
    assert len(found) == len({cached for cached, _, _ in found}), "what gave way was metered as what did not"
    assert len({kept for _, kept, _ in found}) == 1, "what gave way was judged as what did not"
    assert kept_share or not any(cached for cached, _, _ in found)
    pool = engine.decoder.pool
    until(lambda: pool.free + sum(engine.scheduler.prefixes.kept_pages) == sum(pool.sizes))


def test_choices_are_compared_whole(certified: MenuRouter) -> None:
    engine, sink = audited_model(router_conftest.certified_router(certified, "choice"))
    for number in range(6):
        options: Any = {"compute": "economy", "choice": ["yes", "no", "maybe"], "request_id": f"r{number}"}
        engine.generate(f"question {number}", temperature=number % 2, seed=1, **options)
    until(lambda: len(sink.audits) == 6)
    for audit in sink.audits:
        asked = f"question {audit.request_id[1:]}"
        texts = [
            engine.generate(asked, compute=tier, choice=["yes", "no", "maybe"]).text for tier in ("economy", "exact")
        ]
        assert (audit.compared, audit.lost) == (1, texts[0] != texts[1])


def test_a_promise_on_right_answers_is_not_tested_on_choices(certified: MenuRouter) -> None:
    """No audit knows the right one of them."""
    found = router_conftest.certified_router(certified, "choice").certificate
    assert found is not None
    lost = (0, 5, 18, 120)
    counted = {
        "choice": Counts(n=500, lost={"differs": lost, "drops": lost}, gained=(0, 0, 0, 0)),
        "prompt": Counts(n=500, lost={"differs": lost, "strict": lost}),
    }
    saved = dict.fromkeys(("text", "choice"), found.saved["choice"])
    certificate = found.model_copy(update={"kinds": counted, "saved": saved, "tiers": {}})
    for loss, choices in (("drops", [False, False]), ("differs", [True, False])):
        promised = tier_promise(certificate, "economy", TierPromise(0.3, loss, 0.3))  # type: ignore[arg-type]
        assert [term.choices for term in promised.audited["economy"]] == choices
        engine, sink = audited_model(certified.with_certificate(promised))
        for number in range(3):
            engine.generate(f"question {number}", compute="economy", choice=["yes", "no", "maybe"])
        engine.generate("a text", compute="economy", max_tokens=4, request_id="last")
        until(lambda sink=sink: any(audit.request_id == "last" for audit in sink.audits))  # type: ignore[misc]
        until(lambda engine=engine: not len(engine.auditor) and not engine.auditor.judging)  # type: ignore[misc]
        assert sum(audit.request_id != "last" for audit in sink.audits) == (3 if choices[0] else 0)
        assert {audit.loss for audit in sink.audits if audit.request_id == "last"} == {"differs", "strict"}


def test_a_budget_of_the_provider_bounds_audits(certified: MenuRouter) -> None:
    class Poor(ListSink):
        def reserve(self, bound: UsageBound) -> int:
            if bound.tenant == "polar.audit":
                raise BudgetExceededError("the provider has nothing left")
            return 0

    engine, sink = audited_model(certified, sink=Poor())
    for number in range(3):
        engine.generate(f"{number}", compute="economy", max_tokens=3)
    until(lambda: not len(engine.auditor or ()))
    time.sleep(0.2)
    assert not sink.audits and len(sink.records) == 3


def test_more_than_can_wait_are_dropped_and_counted(certified: MenuRouter, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("polar_sdk.request.auditor.QUEUE", 3)
    engine, sink = audited_model(certified)
    auditor = engine.auditor
    assert auditor is not None
    stream = engine.stream("keeps the engine busy", compute="exact", max_tokens=40)
    next(stream)
    for number in range(8):
        engine.generate(f"{number}", compute="economy", max_tokens=2)
    stream.close()
    until(lambda: len(sink.audits) + auditor.dropped == 8)
    assert 3 <= len(sink.audits) <= 4


def test_an_audit_is_offered_again_to_a_sink_that_fails(certified: MenuRouter) -> None:
    from polar_sdk.errors import SinkError

    class Failing(ListSink):
        times = 0

        def audited(self, audit: Any) -> None:
            self.times += 1
            if self.times < 3:
                raise SinkError("not now")
            super().audited(audit)

    engine, sink = audited_model(certified, sink=Failing())
    engine.generate("some text", compute="economy", max_tokens=3)
    until(lambda: len(sink.audits) == 1)


def test_the_record_of_an_audit_that_cannot_be_stored_harms_no_tenant(certified: MenuRouter) -> None:
    class Full(ListSink):
        def emit(self, record: UsageRecord) -> None:
            if record.tenant == "polar.audit":
                raise OSError("no space")
            super().emit(record)

    engine, sink = audited_model(certified, sink=Full())
    first = engine.generate("some text", compute="economy", max_tokens=3).text
    time.sleep(0.3)
    assert engine.generate("some text", compute="economy", max_tokens=3).text == first
    assert not sink.audits


def test_an_audit_of_a_prompt_that_leaves_no_room_is_not_made(certified: MenuRouter) -> None:
    engine, sink = audited_model(certified)
    window = engine.context_window
    engine.generate([65] * (window - 10), compute="economy", max_tokens=5)
    engine.generate([65] * (window - ANSWER_TOKENS), compute="economy", max_tokens=5, request_id="fits")
    until(lambda: [audit.request_id for audit in sink.audits] == ["fits"])


def test_nothing_is_audited_by_default_where_audits_are_not_kept(certified: MenuRouter) -> None:
    assert tiny_model(router=certified, sink=ListSink()).auditor is None
    assert tiny_model(router=certified).auditor is None
    assert tiny_model(sink=ListSink(), audit_share=1.0).auditor is None, "tiers of a policy promise nothing"


def watching(certified: MenuRouter) -> MenuRouter:
    """The router with a certificate that says where its prompts fell: short ones, near its centre."""
    assert certified.certificate is not None
    known = certified.likeness(
        certified.reader.stack([[65 + number % 20] * (20 + number % 7) for number in range(200)])
    )
    usual = {"prompt": Usual.of(known, certified.centres)}
    return certified.with_certificate(certified.certificate.model_copy(update={"usual": usual}))


def ask(engine: PolarModel, length: int, times: int) -> list[str | None]:
    return [
        engine.generate([65 + number % 20] * (length + number % 7), compute="economy", max_tokens=1).usage.tier
        for number in range(times)
    ]


def test_a_closed_auditor_has_no_thread_that_the_end_of_the_process_could_stop_in_torch(certified: MenuRouter) -> None:
    engine, _ = audited_model(certified)
    assert set(ask(engine, 300, 20)) == {"economy"}
    assert engine.auditor is not None
    assert len(engine.auditor) > 0
    before = {thread for thread in threading.enumerate() if thread.name == "polar-audit"}
    engine.auditor.close()
    assert len(before & {*threading.enumerate()}) < len(before)
    assert not engine.auditor.judging


def test_unusual_prompts_fall_back_at_once_and_are_usual_again(
    certified: MenuRouter, caplog: pytest.LogCaptureFixture
) -> None:
    engine, sink = audited_model(watching(certified), audit_share={"economy": 0.05})
    assert engine.auditor is not None
    assert set(ask(engine, 20, 60)) == {"economy"}
    flood = ask(engine, 400, 60)
    assert engine.auditor.unusual
    assert flood[0] == "economy" and flood[-1] == "exact", "one prompt says nothing, a flood does"
    last = of_tenants(sink)[-1]
    assert (last.tags, last.program) == ({FALLBACK_TAG: "economy"}, "0-5")
    assert len(caplog.records) == 1
    assert ask(engine, 20, 200)[-1] == "economy"
    assert len(caplog.records) == 2, "the log says so once, and once that it is over"


def asked_in_turn(engine: PolarModel, length: int, times: int) -> None:
    """Requests that are far enough from each other for an audit to run in between."""
    assert engine.auditor is not None
    for _ in range(times):
        ask(engine, length, 1)
        until(lambda: not len(engine.auditor or ()) and engine.auditor is not None and not engine.auditor.judging)


def test_suspect_prompts_are_audited_more_and_weigh_less(certified: MenuRouter) -> None:
    class Patient(ListSink):
        def standings(self) -> dict[str, PromiseStanding]:
            return {}  # else what audits find would soon end the tier

    unusual, share = Audits(unusual="audit"), {"economy": 0.1}
    engine, sink = audited_model(watching(certified), audit_share=share, audits=unusual, sink=Patient())
    assert set(ask(engine, 400, 60)) == {"economy"}, "as asked for, audits alone decide"
    asked_in_turn(engine, 400, 30)
    weights = Counter(audit.weight for audit in sink.audits)
    assert set(weights) <= {0.2, 1.0}
    assert weights[0.2] > 5


def test_more_is_audited_while_audits_speak_against_a_promise_one_after_another(certified: MenuRouter) -> None:
    assert certified.certificate is not None
    (terms,) = certified.certificate.audited["economy"]

    class Doubting(ListSink):
        doubtful = True

        def standings(self) -> dict[str, PromiseStanding]:
            facts: Any = {"audits": 3, "losses": 1, "since": datetime.now(UTC), "reason": "", "state": State.IN_FORCE}
            return {
                terms.digest: PromiseStanding(promise=terms.digest, tier="economy", doubtful=self.doubtful, **facts)
            }

    sink = Doubting()
    engine, _ = audited_model(certified, audit_share=0.01, sink=sink)
    asked_in_turn(engine, 20, 30)
    raised = len(sink.audits)
    assert raised > 5
    assert {audit.weight for audit in sink.audits} <= {0.02, 1.0}
    ask(engine, 20, 40)  # at once: one is audited, and the others wait for what it finds
    until(lambda: not len(engine.auditor or ()) and engine.auditor is not None and not engine.auditor.judging)
    assert len(sink.audits) - raised <= 5
    sink.doubtful = False
    time.sleep(1.5)  # until the standing is read again
    raised = len(sink.audits)
    asked_in_turn(engine, 20, 30)
    assert len(sink.audits) - raised <= 5


@pytest.mark.parametrize("length", [70, 200])
def test_the_tiers_own_run_reads_the_start_that_the_request_has_left(certified: MenuRouter, length: int) -> None:
    engine, sink = audited_model(certified)
    prompt = "".join(chr(65 + place * 7 % 26) for place in range(length))
    engine.generate(prompt, compute="economy", max_tokens=4, temperature=1.0, seed=1, request_id="r", tenant="acme")
    until(lambda: len(sink.audits) == 1)
    (audit,) = sink.audits
    records = {record.request_id: record for record in sink.records}
    full, tier = records[f"{audit.audit_request_id}"], records[f"{audit.audit_request_id}.tier"]
    assert full.tokens.cached == 0, "nobody has run all layers of it"
    assert tier.tokens.cached >= 64
    assert audit.flops == full.flops.executed + tier.flops.executed
    question = Question(
        tuple(engine.prompt_tokens(prompt)), (engine.greedy_answers([prompt], max_tokens=ANSWER_TOKENS)[0],)
    )
    scores = score_programs(engine.decoder, [question], list(router_conftest.MENU))
    kept = tokens_kept(*(scores[router_conftest.MENU[place]][0].greedy[0] for place in (2, 0)))
    assert (audit.compared, audit.kept) == (len(question.continuations[0]), kept)
