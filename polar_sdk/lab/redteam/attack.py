"""Red-teaming a model's router: attempts to make a tier break its promise, and defences.

An attempt takes a real prompt that needs depth and searches for a version of it that looks easy to the router. The same
number of attempts is made by an attacker with the router's weights on a router without defences, and by one who also
knows the defences, but not the key. An attempt breaks a tier's promise if its answer is lost in the terms of the
promise.

Measurements are kept in the cache of rewards, and every attempt has its own random numbers: the same command resumes
where it stopped.
"""

from __future__ import annotations

import hashlib
import random
from collections import Counter, defaultdict
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Final

from pydantic import BaseModel

from polar_sdk.errors import DataError, RouterError
from polar_sdk.lab.items import ChoiceItem, PromptItem, builtin_items
from polar_sdk.lab.redteam.search import METHODS, Surface, mutants, suffixes
from polar_sdk.lab.rewards.cache import RewardCache, cache_path
from polar_sdk.lab.rewards.measure import Measurer
from polar_sdk.lab.rewards.tasks import make_tasks
from polar_sdk.programs.program import Program
from polar_sdk.promises.losses import SAME_ANSWER, STRICT_ANSWER
from polar_sdk.promises.monitor import Monitor, State
from polar_sdk.request.auditor import RAISED
from polar_sdk.request.selection import DEFAULT_SHARE
from polar_sdk.router.exact_tests import Interval, wilson
from polar_sdk.router.learned import LearnedRouter, Margin
from polar_sdk.show.progress import Progress, silent

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from polar_sdk.lab.items import Item
    from polar_sdk.lab.rewards.tasks import Task
    from polar_sdk.model import PolarModel
    from polar_sdk.router.certificate import Promise

DEFENCES: Final = ("unlikeness", "kinds", "margin", "floors", "audits")
_LONGEST: Final = 400
"""Tokens of a prompt that is attacked."""
_BATCH: Final = 24
"""Attempts that are measured together."""
_DEEPEST: Final = 3
"""Number of the cheapest programs for texts that attacks aim at, in turn."""
_DELTA: Final = 0.05
"""Error budget of the monitor."""


class Sent(BaseModel, frozen=True):
    """The prompt of one attempt, and what each tier makes of it."""

    method: str
    prompt: str
    programs: dict[str, str]
    """Tier → program that the attacked router chooses."""
    kept: dict[str, float]
    """Tier → share of the tokens of full depth's answer that it keeps."""


class TierAttack(BaseModel, frozen=True):
    """Outcome of the attempts on one tier: numbers of those that broke its promise."""

    tier: str
    alpha: float
    """Share of ordinary prompts that the promise allows."""
    ordinary: Interval
    """Share of the real prompts, as they are, that break it."""
    without: int
    """On the router without defences."""
    alone: dict[str, int]
    """Defence → with it alone."""
    defended: int
    """With all of them."""
    strict_without: int
    """Attempts that changed more than 5 % of an answer, without defences."""
    strict_defended: int
    by_method: dict[str, int]
    """Method → attempts that broke it without defences."""

    @property
    def fewer(self) -> float | None:
        """Share of the breaks that the defences prevent; None if there is none to prevent."""
        return 1 - self.defended / self.without if self.without else None


class RedTeam(BaseModel, frozen=True):
    """All tiers under attack."""

    model: str
    fingerprint: str
    dtype: str
    reads_prompts: bool
    """Whether the router chooses by the prompt; else an attack is on what the one program of a tier is bad at."""
    attempts: int
    """On each of the two routers."""
    seeds: int
    """Real prompts that were attacked."""
    defences: tuple[str, ...]
    """Those that there are."""
    audit_share: float
    tiers: tuple[TierAttack, ...]
    sent: dict[str, tuple[Sent, ...]]
    """Prompts that were sent: `without` and `defended`."""


@dataclass(frozen=True)
class RedTeamPlan:
    """The plan of a run.

    Attributes:
        attempts: On each router.
        tries: Versions of a prompt that an attempt compares.
        seeds: Real prompts that are attacked.
        prompts: Real prompts that they are chosen from.
        tiers: Which are attacked.
        defences: Those that there are.
        reads_prompts: As in the result.
    """

    attempts: int
    tries: int
    seeds: int
    prompts: int
    tiers: Sequence[str]
    defences: Sequence[str]
    reads_prompts: bool

    @property
    def lines(self) -> list[str]:
        """The plan, in sentences."""
        how = f"{', '.join(METHODS)}, in turn" if self.reads_prompts else "mutation, as the router reads no prompts"
        return [
            f"{self.attempts} attempts ({how}; {self.tries} versions each) on the {self.seeds} of {self.prompts} "
            f"prompts that need most depth, against {', '.join(self.tiers)} without defences.",
            f"The same number by an attacker who knows the defences: {', '.join(self.defences)}.",
        ]


def redteam(
    model: PolarModel,
    items: Sequence[Item] | None = None,
    *,
    attempts: int = 500,
    tries: int = 2,
    seeds: int = 100,
    audit_share: float = DEFAULT_SHARE,
    margin: float | None = None,
    seed: int = 0,
    cache: RewardCache | None = None,
    on_plan: Callable[[RedTeamPlan], None] = lambda _: None,
    on_progress: Progress = silent,
) -> RedTeam:
    """Attack every certified tier of a model's router, without and with defences.

    Args:
        model: The model, with its router and the floors of its policy.
        items: Real prompts; None = those that come with the package. Questions with choices are left out.
        attempts: On each of the two routers.
        tries: Versions of a prompt whose answers an attempt compares before it sends one.
        seeds: Real prompts that are measured; the half that needs most depth is attacked.
        audit_share: Share of the requests that are audited while nothing speaks against the promise.
        margin: Largest share by which θ is lowered at random; None = that of the policy, or 0.25 where it has none.
        seed: Of all dice.
        cache: Of measurements; None = the model's, on disk.
        on_plan: Called with the plan before anything is measured.
        on_progress: Called with (stage, steps done, steps in all).

    Raises:
        RouterError: The model has no certified router.
        DataError: There are too few prompts.
    """
    router = model.router
    if not isinstance(router, LearnedRouter) or router.certificate is None or not router.certificate.tiers:
        raise RouterError(
            f"model {model.name!r} has no certified router, so there is no promise to attack.",
            hint="Make one with `polar fit`.",
        )
    store = cache or RewardCache(cache_path(model.fingerprint, model.dtype))
    siege = _Siege(model, router, store, margin or model.policy.margin or 0.25, audit_share, seed)
    texts = [item.prompt for item in items or builtin_items() if not isinstance(item, ChoiceItem)]
    dice = random.Random(seed)
    prompts = [text for text in dice.sample(texts, len(texts)) if len(model.prompt_tokens(text)) <= _LONGEST][:seeds]
    if len(prompts) < 4:
        raise DataError(f"{len(prompts)} prompts of at most {_LONGEST} tokens are too few to attack; pass at least 4.")
    defences = siege.defences
    on_plan(
        RedTeamPlan(attempts, tries, len(prompts) // 2, len(prompts), tuple(siege.tiers), defences, siege.reads_prompts)
    )
    hardest, ordinary = siege.hardest(prompts, on_progress)
    sent = {
        name: siege.attempts(hardest, prompts, attempts, tries, guarded=guarded, on_progress=on_progress)
        for name, guarded in (("without", False), ("defended", True))
    }
    return RedTeam(
        model=model.name,
        fingerprint=model.fingerprint,
        dtype=model.dtype,
        reads_prompts=siege.reads_prompts,
        attempts=attempts,
        seeds=len(hardest),
        defences=defences,
        audit_share=audit_share,
        tiers=tuple(siege.tier(name, sent, ordinary[name], defences) for name in siege.tiers),
        sent={name: tuple(each.said(siege.tiers) for each in own) for name, own in sent.items()},
    )


@dataclass(frozen=True)
class _Attempt:
    """A prompt that was sent: the programs that it can get, and what it keeps of full depth's answer under each."""

    method: str
    prompt: str
    programs: Mapping[str, Program]
    """Tier → program of the router that was attacked."""
    guarded: Mapping[str, Program]
    """Tier → program of the router with its limits."""
    drawn: Mapping[str, Program]
    """Tier → program of the router that was attacked, with θ lowered at random."""
    of_kind: Mapping[str, Program]
    """Tier → program of the router that was attacked, none of which is for choices alone."""
    kept: Mapping[Program, float]

    def lost(self, programs: Mapping[str, Program], tier: str, least: float = SAME_ANSWER) -> bool:
        return self.kept[programs[tier]] < least

    def said(self, tiers: Iterable[str]) -> Sent:
        """The same as plain values."""
        return Sent(
            method=self.method,
            prompt=self.prompt,
            programs={tier: self.programs[tier].text for tier in tiers},
            kept={tier: self.kept[self.programs[tier]] for tier in tiers},
        )


class _Siege:
    """A run against one model."""

    def __init__(
        self, model: PolarModel, router: LearnedRouter, cache: RewardCache, margin: float, share: float, seed: int
    ) -> None:
        assert router.certificate is not None
        self.model, self.router, self.cache, self.share, self.seed = model, router, cache, share, seed
        self.tiers: Mapping[str, Promise] = router.certificate.tiers
        self.margin = Margin(margin, hashlib.sha256(f"margin {seed}".encode()).digest(), router.certificate.thetas)
        self._identity = Program.identity(model.depth)
        self._measurer = Measurer(model, cache)
        network = router.network.without_limits()
        features = router.reader.stack([[1, 2, 3], [40, 50, 60], [7] * 90]).cpu()
        self.reads_prompts = bool(network(features).std(0).max() > 0)
        texts = [program for program in router.programs_for("text")[1:] if program.fills]
        costs = {program: model.decoder.cost.ratio(program) for program in texts or router.programs[1:]}
        self._targets = sorted(costs, key=costs.__getitem__)[:_DEEPEST]

    @property
    def defences(self) -> tuple[str, ...]:
        """Those that this model has."""
        familiar, floors = self.router.network.familiar is not None, bool(self.model.policy.floors)
        apart = "choice" in self.router.facts.forms
        there = (familiar, apart and self.reads_prompts, self.reads_prompts, floors, True)
        return tuple(name for name, is_there in zip(DEFENCES, there, strict=True) if is_there)

    def hardest(self, prompts: Sequence[str], on_progress: Progress) -> tuple[list[str], dict[str, Interval]]:
        """The half of some prompts that keeps least under the cheapest program; how many of all each tier loses."""
        programs = self._programs(prompts, guarded=True, of_kind=True)
        cheapest = self._targets[0]
        kept = self._kept({p: {cheapest, *own.values()} for p, own in zip(prompts, programs, strict=True)}, on_progress)
        known = [(prompt, own) for prompt, own in zip(prompts, programs, strict=True) if prompt in kept]
        ranked = sorted((prompt for prompt, _ in known), key=lambda prompt: kept[prompt][cheapest])
        lost = {tier: sum(kept[prompt][own[tier]] < SAME_ANSWER for prompt, own in known) for tier in self.tiers}
        return ranked[: len(ranked) // 2], {tier: wilson(count, len(known)) for tier, count in lost.items()}

    def attempts(
        self,
        seeds: Sequence[str],
        others: Sequence[str],
        count: int,
        tries: int,
        *,
        guarded: bool,
        on_progress: Progress,
    ) -> list[_Attempt]:
        """Make attempts on the router with or without its limits."""
        surface, made = Surface(self.model, self.router, guarded), list[_Attempt]()
        stage = "attempts on the defended router" if guarded else "attempts"
        for start in range(0, count, _BATCH):
            batch = [
                (place, method, text)
                for place in range(start, min(start + _BATCH, count))
                for method, text in self._versions(surface, seeds, others, place, tries)
            ]
            texts = list(dict.fromkeys(text for _, _, text in batch))
            attacked = self._programs(texts, guarded=guarded, of_kind=guarded)
            limited = self._programs(texts, guarded=True, of_kind=False)
            drawn = self._programs(texts, guarded=guarded, of_kind=guarded, margin=True)
            of_kind = self._programs(texts, guarded=guarded, of_kind=True)
            ways = dict(zip(texts, zip(attacked, limited, drawn, of_kind, strict=True), strict=True))
            kept = self._kept({text: {p for way in ways[text] for p in way.values()} for text in texts})
            best: dict[int, _Attempt] = {}
            for place, method, text in batch:
                if text in kept:
                    version = _Attempt(method, text, *ways[text], kept[text])
                    best[place] = min(best.get(place, version), version, key=self._harm)
            made += [best[place] for place in sorted(best)]
            on_progress(stage, min(start + _BATCH, count), count)
        return made

    def _harm(self, attempt: _Attempt) -> tuple[int, float]:
        """How much of its answers an attempt keeps: first by the tiers that lose it, then by shares."""
        kept = [attempt.kept[attempt.programs[tier]] for tier in self.tiers]
        return -sum(share < SAME_ANSWER for share in kept), sum(kept)

    def _versions(
        self, surface: Surface, seeds: Sequence[str], others: Sequence[str], place: int, tries: int
    ) -> list[tuple[str, str]]:
        dice = random.Random(f"{self.seed} {place} {surface.guarded}")
        method = METHODS[place % len(METHODS)] if self.reads_prompts else "mutation"
        prompt = seeds[place // len(METHODS) % len(seeds)]
        target = self.router.programs.index(self._targets[place % len(self._targets)])
        found = (
            mutants(surface, prompt, target, others, dice)
            if method == "mutation"
            else suffixes(surface, prompt, target, method, dice)
        )
        return [(method, text.strip()) for text in islice(found, tries)]  # as an item has it

    def _programs(
        self, prompts: Sequence[str], *, guarded: bool, of_kind: bool, margin: bool = False
    ) -> list[dict[str, Program]]:
        """Tier → program of each prompt."""
        rows = [self.model.prompt_tokens(prompt) for prompt in prompts]
        network = self.router.network if guarded else self.router.network.without_limits()
        outputs = network(self.router.reader.stack(rows).cpu())
        outputs = self.router.allowed(outputs, "text") if of_kind else outputs
        found: list[dict[str, Program]] = []
        for row, output in zip(rows, outputs, strict=True):
            thetas = {tier: promise.setting.text for tier, promise in self.tiers.items()}
            if margin:
                thetas = {tier: self.margin.lowered(theta, row) for tier, theta in thetas.items()}
            found.append(
                {tier: self.router.choose_all(output.unsqueeze(0), t, [len(row)])[0] for tier, t in thetas.items()}
            )
        return found

    def _kept(
        self, wanted: Mapping[str, Iterable[Program]], on_progress: Progress = silent
    ) -> dict[str, dict[Program, float]]:
        """Share of full depth's answer that each prompt keeps under some programs; nothing of one that does not fit."""
        found = {prompt: {self._identity: 1.0} for prompt in wanted}
        asked = {prompt: own for prompt, programs in wanted.items() if (own := set(programs) - {self._identity})}
        tasks = make_tasks(self.model, [PromptItem(prompt=prompt) for prompt in asked], self.cache)
        by_program: dict[Program, list[tuple[str, Task]]] = defaultdict(list)
        left = set(asked)
        for task in tasks:
            assert isinstance(task.item, PromptItem)
            left.discard(task.item.prompt)
            for program in asked[task.item.prompt]:
                by_program[program].append((task.item.prompt, task))
        for done, (program, rows) in enumerate(by_program.items(), 1):
            rewards = self._measurer.rewards([task for _, task in rows], [program])
            for (prompt, _), share in zip(rows, rewards[program].share.tolist(), strict=True):
                found[prompt][program] = share
            on_progress("programs", done, len(by_program))
        return {prompt: shares for prompt, shares in found.items() if prompt not in left}

    def tier(
        self, name: str, sent: Mapping[str, Sequence[_Attempt]], ordinary: Interval, defences: Sequence[str]
    ) -> TierAttack:
        """Count the attempts that broke one tier's promise."""
        free, held = sent["without"], sent["defended"]
        without = [each.lost(each.programs, name) for each in free]
        alone = {
            "unlikeness": [each.lost(each.guarded, name) for each in held],
            "kinds": [each.lost(each.of_kind, name) for each in free],
            "margin": [each.lost(each.drawn, name) for each in free],
            "floors": self._above_floors(free, [each.programs for each in free], name, SAME_ANSWER),
            "audits": self._audited(without, name),
        }
        last = [each.drawn for each in held]
        defended = self._audited(self._above_floors(held, last, name, SAME_ANSWER), name)
        return TierAttack(
            tier=name,
            alpha=self.tiers[name].alpha,
            ordinary=ordinary,
            without=sum(without),
            alone={defence: sum(alone[defence]) for defence in defences},
            defended=sum(defended),
            strict_without=sum(each.lost(each.programs, name, STRICT_ANSWER) for each in free),
            strict_defended=sum(self._above_floors(held, last, name, STRICT_ANSWER)),
            by_method=dict(Counter(each.method for each, lost in zip(free, without, strict=True) if lost)),
        )

    def _above_floors(
        self, attempts: Sequence[_Attempt], programs: Sequence[Mapping[str, Program]], tier: str, least: float
    ) -> list[bool]:
        """Which attempts are lost where floors apply."""
        lost = []
        for attempt, own in zip(attempts, programs, strict=True):
            floor = self.model.floor_of(attempt.prompt)
            served = tier if floor is None or floor.allows(tier) else floor.floor
            lost.append(served in own and attempt.lost(own, served, least))
        return lost

    def _audited(self, lost: Sequence[bool], tier: str) -> list[bool]:
        """Which attempts are lost where some are audited, and the tier runs full depth once it is at risk."""
        dice = random.Random(f"audits {self.seed} {tier}")
        monitor, left = Monitor(self.tiers[tier].alpha, _DELTA), list[bool]()
        for each in lost:
            left.append(each and monitor.state is State.IN_FORCE)
            if dice.random() < (RAISED if monitor.doubtful else self.share):
                monitor = monitor.observe(left[-1])
        return left
