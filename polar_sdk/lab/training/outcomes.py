"""Outcomes of programs on prompts, from a reward matrix or measured on a model; and which prompts may be judged.

Measurements are kept in the cache of rewards.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from polar_sdk.engine.scoring import Score
from polar_sdk.errors import DataError
from polar_sdk.lab.items import ChoiceItem, check_labels, data_hash, distinct_items, item_id, split_of
from polar_sdk.lab.program_search.matrix import measured_matrix
from polar_sdk.lab.rewards.cache import RewardCache, cache_path
from polar_sdk.lab.rewards.measure import Measurer, preferred_choice, rewards_of
from polar_sdk.lab.rewards.tasks import make_tasks
from polar_sdk.programs.program import Program
from polar_sdk.promises.losses import is_lost
from polar_sdk.show.progress import Progress, silent

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from polar_sdk.lab.items import Item
    from polar_sdk.lab.program_search.matrix import RewardMatrix
    from polar_sdk.lab.rewards.tasks import Task
    from polar_sdk.model import PolarModel
    from polar_sdk.router.certificate import Loss


class PromptOutcome(NamedTuple):
    """Outcome of one program on one prompt."""

    agree: bool
    share: float
    """Share of identity's answer that is kept; see `RewardMatrix`."""
    right: bool
    flops: int
    """Without the router's."""


@dataclass
class Outcomes:
    """Outcomes on the rows of a matrix.

    Attributes:
        matrix: Known outcomes; column 0 is identity.
        block: Measures what is not known, as a matrix of the given rows and programs; None = nothing can be measured.
    """

    matrix: RewardMatrix
    block: Callable[[Sequence[int], Sequence[Program]], RewardMatrix] | None = None

    def __post_init__(self) -> None:
        self._known: dict[tuple[int, Program], PromptOutcome] = {}
        self._keep(range(len(self)), self.matrix)

    def __len__(self) -> int:
        return len(self.matrix)

    def rows(self, keep: Sequence[int]) -> Outcomes:
        """The same for some of the rows."""
        block = self.block
        measure = None if block is None else lambda rows, programs: block([keep[row] for row in rows], programs)
        part = Outcomes(self.matrix.rows(keep), measure)
        place = {row: index for index, row in enumerate(keep)}
        part._known = {
            (place[row], program): outcome for (row, program), outcome in self._known.items() if row in place
        }
        return part

    def of(self, rows: Sequence[int], programs: Sequence[Program]) -> list[PromptOutcome]:
        """Outcomes of pairs of a row and a program.

        Raises:
            DataError: A program is not in the matrix and cannot be measured.
        """
        pairs = list(zip(rows, programs, strict=True))
        self._measure([pair for pair in dict.fromkeys(pairs) if pair not in self._known])
        return [self._known[pair] for pair in pairs]

    def all(self, programs: Sequence[Program]) -> list[PromptOutcome]:
        """Outcomes of one program per row."""
        return self.of(range(len(self)), programs)

    def losses(self, rows: Sequence[int], programs: Sequence[Program], loss: Loss) -> list[int]:
        """Whether each pair is lost (1) or gained (−1) against identity; see `Loss`."""
        outcomes = self.of(rows, programs)
        if loss == "differs":
            return [int(not outcome.agree) for outcome in outcomes]
        if loss == "strict":  # of a choice, the share is 0 or 1
            return [int(is_lost(outcome.share, "strict")) for outcome in outcomes]
        labelled, identity = self.matrix.labelled.tolist(), self.matrix.programs[0]
        values = []
        for row, outcome in zip(rows, outcomes, strict=True):
            differs = int(not outcome.agree)
            drop = int(self._known[row, identity].right) - int(outcome.right) if labelled[row] else differs
            values.append(max(0, drop) if loss == "harms" else drop)
        return values

    def _measure(self, pairs: Sequence[tuple[int, Program]]) -> None:
        """Measure pairs in blocks: by program where there are fewer programs than rows, by row otherwise."""
        if not pairs:
            return
        if self.block is None:
            raise DataError(f"program {pairs[0][1].text!r} is not in the reward matrix; search again with it.")
        by_program = len({program for _, program in pairs}) <= len({row for row, _ in pairs})
        blocks: dict[object, list[tuple[int, Program]]] = {}
        for pair in pairs:
            blocks.setdefault(pair[1] if by_program else pair[0], []).append(pair)
        for block in blocks.values():
            rows = list(dict.fromkeys(row for row, _ in block))
            programs = list(dict.fromkeys(program for _, program in block))
            self._keep(rows, self.block(rows, programs))

    def _keep(self, rows: Sequence[int], measured: RewardMatrix) -> None:
        parts = [each.tolist() for each in (measured.agree, measured.share, measured.right, measured.flops.long())]
        for place, row in enumerate(rows):
            for column, program in enumerate(measured.programs):
                self._known[row, program] = PromptOutcome(*(each[place][column] for each in parts))


def grouped(rows: Iterable[int], name_of: Callable[[int], str | None]) -> dict[str, list[int]]:
    """Rows by name, in the order of their first; those without a name are left out."""
    groups: dict[str, list[int]] = {}
    for row in rows:
        if name := name_of(row):
            groups.setdefault(name, []).append(row)
    return groups


MIN_CLASS: Final = 20
"""Prompts from which a class is looked at on its own."""


def classes_of(name: str) -> list[str]:
    """The classes of an item by the name of its own, the widest first: `letters, chemistry` is in `letters` as well."""
    return [each for each in dict.fromkeys((name.split(",", maxsplit=1)[0], name)) if each]


def by_class(rows: Iterable[int], classes: Sequence[str]) -> dict[str, list[int]]:
    """Rows by the classes that they are in; see `classes_of`."""
    groups: dict[str, list[int]] = {}
    for row in rows:
        for name in classes_of(classes[row]):
            groups.setdefault(name, []).append(row)
    return dict(sorted(groups.items()))


_ID_DIGITS: Final = 8
"""Hexadecimal digits of a prompt's id that a router remembers; two prompts share them 1 time in 4 billion."""


def id_prefixes(ids: Iterable[str]) -> str:
    """Starts of these ids, by which a router remembers prompts so that it is not judged on them."""
    return "".join(sorted(item_id[:_ID_DIGITS] for item_id in ids))


def _remembered(training: dict[str, Any], *names: str) -> set[str]:
    texts = [str(training.get(name, "")) for name in names]
    return {text[start : start + _ID_DIGITS] for text in texts for start in range(0, len(text), _ID_DIGITS)}


def used(items: Sequence[Item], training: dict[str, Any]) -> list[bool]:
    """For each item, whether a router was trained or calibrated on it, by its training record."""
    remembered = _remembered(training, "seen", "calibrated")
    return [item_id(item)[:_ID_DIGITS] in remembered for item in items]


def unseen(items: Sequence[Item], training: dict[str, Any], *, calibrating: bool) -> list[Item]:
    """The items that a router may be calibrated or evaluated on, without duplicates.

    What it was trained on is left out, and for evaluation also what it was calibrated on. If the data includes what it
    was trained on, calibration takes the calibration split only, so that the test split is left for evaluation.

    Raises:
        DataError: None is left.
    """
    distinct = distinct_items(items)
    check_labels(distinct)
    trained = _remembered(training, "seen")
    if calibrating:
        left = [item for item in distinct if item_id(item)[:_ID_DIGITS] not in trained]
        if len(left) < len(distinct):
            left = [item for item in left if split_of(item_id(item)) == "calibration"]
    else:
        used = trained | _remembered(training, "calibrated")
        left = [item for item in distinct if item_id(item)[:_ID_DIGITS] not in used]
    if not left:
        raise DataError(f"all {len(distinct)} prompts were used to train or calibrate this router; pass unseen ones.")
    return left


@dataclass
class Bench:
    """Measures programs on items of one model; what was measured is in the cache, or else in the file on disk."""

    model: PolarModel
    on_progress: Progress = silent
    cache: RewardCache | None = None

    def __post_init__(self) -> None:
        store = self.cache or RewardCache(cache_path(self.model.fingerprint, self.model.dtype))
        self._measurer = Measurer(self.model, store, self.on_progress)
        self._store = store

    def tasks(self, items: Sequence[Item]) -> list[Task]:
        """Items as tasks; those that do not fit the context window are left out."""
        return make_tasks(self.model, items, self._store, on_progress=self.on_progress)

    def matrix(self, tasks: Sequence[Task], programs: Sequence[Program], *, labels: bool = True) -> RewardMatrix:
        """Measure each of the programs, identity first, on every task.

        With `labels`, answers in text are compared with the right ones; every program must write them for that, which
        is slow.
        """
        distinct = list(dict.fromkeys([Program.identity(self.model.depth), *programs]))
        return self._matrix(tasks, distinct, labels=labels)

    def outcomes(self, tasks: Sequence[Task], programs: Sequence[Program], *, labels: bool = True) -> Outcomes:
        """Outcomes on the tasks: of these programs now, of others when they are needed."""

        def block(rows: Sequence[int], others: Sequence[Program]) -> RewardMatrix:
            return self._matrix([tasks[row] for row in rows], others, labels=labels)

        return Outcomes(self.matrix(tasks, programs, labels=labels), block)

    def again(self, tasks: Sequence[Task]) -> list[PromptOutcome]:
        """Identity a second time, in other company: the noise floor.

        Choices are scored again in another order and other packs. Answers in text were written token by token when they
        became the reference; scoring them in one pass is their second time.
        """
        identity = Program.identity(self.model.depth)
        choices = [task for task in tasks if isinstance(task.item, ChoiceItem)]
        known = self._measurer.scores(tasks, [identity])[identity]
        turned = choices[::-1]
        scores = self._measurer.scores(turned, [identity], "identity again", again=True)[identity]
        fresh = dict(zip((task.key for task in turned), scores, strict=True))
        afresh = [
            fresh[task.key]
            if isinstance(task.item, ChoiceItem)
            else Score(score.loglikelihoods, task.question.continuations)
            for task, score in zip(tasks, known, strict=True)
        ]
        reward = rewards_of(tasks, known, afresh, identity, self.model.decoder.cost)
        right = [
            isinstance(task.item, ChoiceItem) and preferred_choice(score, task.characters) == task.item.answer
            for task, score in zip(tasks, afresh, strict=True)
        ]
        return [
            PromptOutcome(agree, share, chosen, flops)
            for agree, share, chosen, flops in zip(
                reward.agree.tolist(), reward.share.tolist(), right, reward.flops.tolist(), strict=True
            )
        ]

    def _matrix(self, tasks: Sequence[Task], programs: Sequence[Program], *, labels: bool) -> RewardMatrix:
        if not tasks:
            raise DataError("no prompt fits the model's context window; give shorter ones.")
        return measured_matrix(
            self._measurer,
            tasks,
            programs,
            splits=["test"] * len(tasks),
            data=data_hash(task.item for task in tasks),
            write_tokens=64 if labels else None,
        )
