"""Evaluation on a suite: every tier against full depth, on problems with right answers."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from polar_sdk.errors import DataError, InvalidRequestError, did_you_mean
from polar_sdk.lab.rewards.cache import RewardCache, cache_path
from polar_sdk.lab.suites.answers import Answers
from polar_sdk.lab.suites.asking import Asker, Prepared, through_chat
from polar_sdk.lab.suites.gsm8k import Gsm8k
from polar_sdk.lab.suites.humaneval import HumanEval
from polar_sdk.lab.suites.instructions import Decisions, Formats, Refusals
from polar_sdk.lab.suites.letters import Arc, Mmlu
from polar_sdk.lab.suites.results import Request, SuiteEvaluation, tier_result
from polar_sdk.lab.suites.sandbox import require_sandbox
from polar_sdk.lab.suites.suite import check_shots
from polar_sdk.lab.training.outcomes import used
from polar_sdk.programs.program import Program
from polar_sdk.router.base import IdentityRouter, Router, StaticRouter, fixed_router
from polar_sdk.router.certificate import Setting
from polar_sdk.router.learned import AtSetting, LearnedRouter
from polar_sdk.router.store import find_router
from polar_sdk.show.progress import Progress, silent

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from polar_sdk.lab.suites.suite import Suite
    from polar_sdk.model import PolarModel
    from polar_sdk.request.options import Template
    from polar_sdk.router.certificate import AnswerForm

SUITES: Final[Mapping[str, type[Suite[Any]]]] = {
    suite.name: suite for suite in (Mmlu, HumanEval, Gsm8k, Arc, Formats, Refusals, Decisions)
}
FULL: Final = "exact"
"""Name of full depth, with which every tier is compared."""


def evaluate_suite(
    model: PolarModel,
    suite: str,
    data: str | Path | None = None,
    *,
    router: Router | str | Path | None = None,
    compute: Iterable[str | float] = (),
    thetas: Iterable[float] = (),
    programs: Iterable[Program | str] = (),
    shots: int = 0,
    shots_from: str | Path | None = None,
    template: Template = "auto",
    limit: int | None = None,
    run_code: bool = False,
    cache: RewardCache | None = None,
    on_progress: Progress = silent,
) -> SuiteEvaluation:
    """Compare tiers with full depth on a suite of problems with right answers.

    Args:
        model: The model.
        suite: `mmlu`, `arc`, `gsm8k`, `humaneval`, `formats`, `refusals` or `decisions`.
        data: JSONL with the original data set's own fields; None = the package's own problems, of the last three.
        router: A trained router or its folder; None = this model's.
        compute: Tiers or tolerances; with no `thetas` and `programs` either, all tiers of the router or the policy.
        thetas: Settings of a learned router's dial, without a promise.
        programs: Programs by hand, each for all problems.
        shots: Solved problems that stand before each one, where there is room.
        shots_from: File of them.
        template: Whether a model with a chat template is asked through it; see `RequestOptions`.
        limit: Use only the first N problems; None = all.
        run_code: Run code that the model writes, confined; `humaneval` needs it.
        cache: Of answers; None = the model's, on disk.
        on_progress: Called with (stage, steps done, steps in all).

    Raises:
        DataError: A file or one of its lines cannot be used, or no problem is left.
        InvalidRequestError: An unknown suite, or options that it does not take.
        SandboxError: Code cannot be run safely here.
        PolarError: A router, tier or program cannot be used.
    """
    chosen = find_suite(suite, run_code=run_code)
    check_shots(chosen, shots, None if shots_from is None else Path(shots_from))
    chat = through_chat(model, template)
    problems = chosen.problems(data, limit)
    solved = chosen.read(Path(shots_from)) if shots_from is not None and shots else []
    served = find_router(router, model, look=False) or model.router
    tiers = _tiers(model, served, list(compute), list(thetas), list(programs))
    training = served.facts.training if isinstance(served, LearnedRouter) else {}
    known = used([problem.item for problem in problems], training)
    asker = Asker(chosen, model, chat, solved, shots)
    asked = [asker.prepare(problem) for problem, seen in zip(problems, known, strict=True) if not seen]
    prepared = [each for each in asked if each is not None]
    if not prepared:
        raise DataError(
            f"none of the {len(problems)} problems is left: {sum(known)} were used to train or calibrate this router, "
            f"and {len(asked)} exceed the context window of {model.context_window} tokens."
        )
    store = cache or RewardCache(cache_path(model.fingerprint, model.dtype))
    requests = _requests(Answers(model, chosen, prepared, store, on_progress), tiers)
    groups = [each.problem.group for each in prepared]
    return SuiteEvaluation(
        suite=chosen.name,
        shots=shots,
        chat=chat,
        model=model.name,
        fingerprint=model.fingerprint,
        dtype=model.dtype,
        device=model.device,
        depth=model.depth,
        data=_hash(prepared),
        problems=len(prepared),
        does_not_fit=len(asked) - len(prepared),
        used_before=sum(known),
        prompt_tokens=sum(len(each.tokens) for each in prepared) / len(prepared),
        template_tokens=asker.template_tokens,
        tiers=tuple(
            tier_result(name, ours, requests[FULL], groups, model.decoder.cost) for name, ours in requests.items()
        ),
        flaws={name: tuple(request.flaw for request in ours) for name, ours in requests.items()},
    )


def find_suite(name: str, *, run_code: bool) -> Suite[Any]:
    """The suite of that name, if what it takes is allowed and can be had.

    Raises:
        InvalidRequestError: There is none, or it runs code and may not.
        SandboxError: Code cannot be run safely here.
    """
    if name not in SUITES:
        raise InvalidRequestError(f"suite {name!r} is unknown; {did_you_mean(name, SUITES)}")
    suite = SUITES[name]()
    if suite.runs_code:
        if not run_code:
            raise InvalidRequestError(
                f"suite {name} runs code that the model writes; allow it with --run-code, after reading in "
                "docs/router.md what confines the code and what does not."
            )
        require_sandbox()
    return suite


def _tiers(
    model: PolarModel,
    served: Router | None,
    compute: Sequence[str | float],
    thetas: Sequence[float],
    programs: Sequence[Program | str],
) -> dict[str, Router]:
    """The systems that are compared, by name: full depth, and what was named, or else all tiers there are."""
    tiers: dict[str, Router] = {FULL: IdentityRouter(model.depth)}
    if not (compute or thetas or programs):
        tiers |= _all_tiers(model, served)
    for name in compute:
        if isinstance(served, LearnedRouter):
            tiers[str(name)] = served.serving(name).router
        elif isinstance(name, str):
            tiers[name] = fixed_router(model.policy.program_for(name, model.depth)[1], model.depth)
        else:
            raise InvalidRequestError(
                f"{name:g} is a tolerance, but no certified router is loaded that could promise it; name a tier."
            )
    for theta in thetas:
        if not isinstance(served, LearnedRouter):
            raise InvalidRequestError(f"θ = {theta:g} sets the dial of a learned router, but none is loaded.")
        tiers[f"θ = {theta:g}"] = served.at(Setting.to(theta))
    for text in programs:
        program = Program.of(text)
        model.policy.check(program, model.decoder.cost)
        tiers[program.text] = StaticRouter(program)
    return tiers


def _all_tiers(model: PolarModel, served: Router | None) -> dict[str, Router]:
    if isinstance(served, LearnedRouter):
        if served.certificate is None:
            return {"uncalibrated": served.at(Setting.to(served.facts.default_theta))}
        return {name: served.at(tier.setting) for name, tier in served.certificate.tiers.items()}
    if served is not None:
        return {served.kind: served}
    own = {name: tier.program for name, tier in model.policy.tiers.items() if name != FULL}
    return {name: StaticRouter(program) for name, program in own.items()}


def _requests(answers: Answers[Any], tiers: Mapping[str, Router]) -> dict[str, list[Request]]:
    """Every problem as every tier answers it."""
    prepared = answers.prepared
    named = answers.suite.names_choices
    routes = {
        name: [
            _as_asked(router, "choice" if named and each.choices else "text").route(each.tokens) for each in prepared
        ]
        for name, router in tiers.items()
    }
    found = answers.of((row, route.program) for own in routes.values() for row, route in enumerate(own))
    return {
        name: [
            Request(
                program=route.program,
                prompt=len(prepared[row].tokens),
                output=found[row, route.program].tokens,
                flaw=found[row, route.program].flaw,
                router_flops=route.flops,
            )
            for row, route in enumerate(own)
        ]
        for name, own in routes.items()
    }


def _as_asked(router: Router, form: AnswerForm) -> Router:
    """The router as a request for such an answer gets it."""
    return router.answering(form) if isinstance(router, AtSetting) else router


def _hash(prepared: Sequence[Prepared[Any]]) -> str:
    lines = sorted(each.problem.model_dump_json() for each in prepared)
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()
