"""Certificates: exact counts, the walk that stops at the first failure, and how often promises break."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from pydantic import ValidationError

from polar_sdk.errors import CalibrationSizeError, CertificateError, ToleranceError
from polar_sdk.router.certificate import Certificate, Setting, Subject, form_of
from polar_sdk.router.menu import cheapest, menu_dial

if TYPE_CHECKING:
    from polar_sdk.router.menu import MenuRouter

SUBJECT = Subject(model="m", menu="n", router="r", bridges="", dtype="float32", engine="1")


def certificate_of(
    n: int = 500,
    lost: dict[str, Any] | None = None,
    gained: tuple[int, ...] = (),
    others: dict[str, Any] | None = None,
    **changes: Any,
) -> Certificate:
    facts: dict[str, Any] = {
        "subject": SUBJECT,
        "data": "d",
        "delta": 0.1,
        "thetas": (0.0, 0.1, 0.2, 0.3),
        "kinds": {"choice": {"n": n, "lost": lost or {"differs": (0, 5, 18, 19)}, "gained": gained}, **(others or {})},
        "saved": {form_of(kind): (0.0, 0.1, 0.2, 0.3) for kind in ("choice", *(others or {}))},
    }
    return Certificate.model_validate(facts | changes)


def test_the_last_accepted_theta_is_promised() -> None:
    assert certificate_of().promise(0.05).setting.choice == 0.2  # 18 of 500 is the most at 5 %
    assert certificate_of().promise(0.02).setting.choice == 0.1  # 5 of 500 is the most at 2 %
    assert certificate_of().promise(0.02).k == {"choice": 5}


def test_the_walk_stops_at_the_first_failure() -> None:
    assert certificate_of(lost={"differs": (0, 30, 5, 5)}).promise(0.02).setting.choice == 0.0


def test_a_theta_that_saves_less_is_not_taken() -> None:
    assert certificate_of(saved={"choice": (0.0, -0.1, -0.05, 0.3)}).promise(0.05).setting.choice == 0.0


def texts(strict: tuple[int, ...]) -> dict[str, Any]:
    return {"prompt": {"n": 200, "lost": {"differs": (0, 2, 4, 6), "strict": strict}}}


def test_a_strict_promise_holds_beside_the_other_one() -> None:
    made = certificate_of(others=texts((0, 10, 30, 60)))
    assert made.promise(0.1).setting.text == 0.3
    both = made.promise(0.1, strict=0.2)  # at θ = 0.3 the 60 of 200 texts that change more are too many
    assert (both.setting.text, both.strict and both.strict.k) == (0.2, {"prompt": 30})
    assert "at most 0.2 of texts change more than 5 % of their tokens (prompt: 30 of 200)" in both.text
    assert made.promise(*both.asked) == both
    again = Certificate.model_validate({**made.model_dump(), "tiers": {"economy": both}})
    assert Certificate.model_validate_json(again.model_dump_json()) == again
    with pytest.raises(CertificateError, match="answered in text"):
        certificate_of().promise(0.1, strict=0.2)
    few = made.promise(0.1, strict=0.005)  # which takes 460 texts
    assert few.setting == Setting(choice=0.3) and "prompt: always identity" in few.text
    with pytest.raises(CalibrationSizeError, match=r"'choice'.*'prompt'"):
        made.promise(0.004, strict=0.005)


def test_a_class_may_not_lose_more_than_is_promised_on_average() -> None:
    classes = {
        "easy": {"n": 170, "lost": {"differs": (0, 0, 0, 0), "strict": (0, 0, 0, 0)}},
        "hard": {"n": 30, "lost": {"differs": (0, 2, 4, 6), "strict": (0, 4, 9, 20)}},
    }
    made = certificate_of(others=texts((0, 4, 9, 20)), classes=classes)
    assert made.promise(0.1).setting.text == 0.1  # 3 of 30 would be allowed, 4 are lost at θ = 0.2
    assert made.promise(0.1, strict=0.13).setting.text == 0.1
    assert made.promise(0.2).setting.text == 0.3
    worst = made.promise(0.2).worst
    assert worst is not None
    assert (worst.name, worst.k, worst.n) == ("hard", 6, 30)
    assert "worst class hard: 6 of 30" in made.promise(0.2).text
    assert made.promise(0.2, strict=0.5).setting.text == 0.2  # 20 of the 30 hard ones change more


def test_a_tolerance_below_the_smallest_certifiable_is_an_error() -> None:
    with pytest.raises(ToleranceError, match=r"tolerance 0\.004 is below 0\.0046, the smallest that 500"):
        certificate_of().at_tolerance(0.004)
    for bad in (0.0, -0.1, 1.0, float("nan")):
        with pytest.raises(ToleranceError):
            certificate_of().at_tolerance(bad)


def test_texts_of_both_kinds_must_keep_a_promise() -> None:
    bare, answered = ({"n": 150, "lost": {"differs": lost}} for lost in ((0, 0, 0, 0), (0, 0, 20, 20)))
    made = certificate_of(others={"prompt": bare, "answer": answered})
    assert made.promise(0.05).setting == Setting(text=0.1, choice=0.2)


def test_promises_loosen_with_the_tolerance() -> None:
    thetas = [certificate_of().at_tolerance(alpha).setting.choice for alpha in (0.005, 0.02, 0.05, 0.06, 0.5)]
    assert thetas == sorted(thetas)
    assert thetas[0] == 0.0 and thetas[-1] == 0.3


def test_a_promise_that_does_not_follow_from_the_counts_is_refused() -> None:
    forged = certificate_of().promise(0.05).model_copy(update={"setting": Setting.to(0.3)})
    with pytest.raises(ValidationError, match="does not follow from the counts"):
        certificate_of(tiers={"standard": forged.model_dump()})


@pytest.mark.parametrize("field", list(Subject.model_fields))
def test_any_other_hash_voids_the_promise(field: str) -> None:
    with pytest.raises(CertificateError, match=f"{field} .* would run"):
        certificate_of().check(SUBJECT.model_copy(update={field: "other"}))
    certificate_of().check(SUBJECT)


def drops(lost: tuple[int, ...], gained: tuple[int, ...], **changes: Any) -> Certificate:
    counts = {"differs": tuple(a + b for a, b in zip(lost, gained, strict=True)), "drops": lost}
    return certificate_of(1300, counts, gained, **changes)


def test_what_is_gained_makes_good_what_is_lost() -> None:
    certificate = drops((0, 150, 150, 200), (0, 160, 110, 110))
    promise = certificate.promise(0.02, "drops")
    assert (promise.setting.choice, promise.k, promise.gained) == (0.1, {"choice": 150}, {"choice": 160})
    assert "drops by at most 0.02" in promise.text and "choice: 150 of 1300 lost, 160 gained" in promise.text
    assert certificate.promise(0.02).setting.choice == 0.0  # almost a quarter of the answers are other answers
    assert certificate.promise(0.06, "drops").setting.choice == 0.2


def test_gains_must_be_counted_with_drops() -> None:
    with pytest.raises(ValidationError, match="gained needs one count"):
        certificate_of(lost={"differs": (0, 1, 2, 3), "drops": (0, 1, 2, 3)}, gained=(1, 2))
    with pytest.raises(CalibrationSizeError, match="α = 2 % needs at least 228"):
        certificate_of(200, lost={"differs": (0, 0, 0, 0), "drops": (0, 0, 0, 0)}, gained=(0, 0, 0, 0)).promise(
            0.02, "drops"
        )


def test_texts_and_choices_are_walked_apart() -> None:
    texts = {"n": 150, "lost": {"differs": (0, 0, 20, 20)}}
    mixed = certificate_of(others={"prompt": texts})
    promise = mixed.promise(0.05)  # 20 of 150 texts are too many, 18 of 500 choices are not
    assert promise.setting == Setting(text=0.1, choice=0.2)
    assert (promise.n, promise.k) == ({"choice": 500, "prompt": 150}, {"choice": 18, "prompt": 0})
    assert mixed.promise(0.2).setting == Setting.to(0.3)
    assert mixed.at_tolerance(0.006).setting == Setting(choice=0.0) == mixed.promise(0.006).setting
    # Where no right answer is known, a drop is an answer that differs.
    counts = {"differs": (0, 300, 300, 400), "drops": (0, 150, 150, 200)}
    certificate = certificate_of(1300, counts, (0, 160, 110, 110), {"prompt": texts})
    assert certificate.promise(0.06, "drops").setting == Setting(text=0.1, choice=0.2)
    with pytest.raises(CertificateError, match="'harms' was not counted"):
        certificate.promise(0.1, "harms")
    assert mixed.promise(0.01).setting == Setting()  # too few texts, and choices of which 5 of 500 are too many
    with pytest.raises(CalibrationSizeError, match=r"at least 575 .* 500 .*at least 575 calibration .* 150 of kind"):
        mixed.promise(0.004)
    with pytest.raises(ToleranceError, match="the smallest that 500 calibration prompts"):
        mixed.at_tolerance(0.004)


@pytest.mark.parametrize("alpha", [0.05, 0.1])
def test_of_100_splits_at_most_10_break_the_promise(alpha: float) -> None:
    """Prompts of known difficulty; calibrated on 400 drawn at random, the promise is checked on the other 19,600."""
    generator = torch.Generator().manual_seed(7)
    prompts = 20_000
    chance = torch.rand((prompts, 2), generator=generator) ** 2 * torch.tensor([0.6, 1.0])
    lost = torch.cat((torch.zeros(prompts, 1), (torch.rand((prompts, 2), generator=generator) < chance).float()), 1)
    needed = torch.cat((torch.zeros(prompts, 1), chance + 0.05 * torch.rand((prompts, 2), generator=generator)), 1)
    order = [2, 1]
    thetas = menu_dial(needed[:1000], order)
    costs = torch.tensor([1.0, 0.8, 0.6])
    choice = cheapest(needed.double(), costs, torch.tensor(thetas, dtype=torch.float64).view(-1, 1, 1))
    outcome = lost.expand(len(thetas), -1, -1).gather(2, choice.unsqueeze(2)).squeeze(2)  # (K, P)
    broken, loosened = 0, 0
    for _ in range(100):
        dealt = torch.randperm(prompts, generator=generator)
        counts = outcome[:, dealt[:400]].sum(1).long().tolist()
        saved = {"choice": [0.001 * at for at in range(len(thetas))]}
        certificate = certificate_of(n=400, thetas=thetas, lost={"differs": counts}, saved=saved)
        at = thetas.index(certificate.promise(alpha).setting.choice)
        broken += float(outcome[at, dealt[400:]].mean()) > alpha
        loosened += at > 0
    assert broken <= 10
    assert loosened == 100  # a certificate that always says identity would keep every promise


def test_the_certificate_of_a_router_holds_for_it(certified: MenuRouter) -> None:
    assert certified.certified
    assert not certified.with_certificate(None).certified
