"""From prompts to matrices: which prompts a router may be judged on, and what programs do on them.

Connects the pure parts of training and evaluation with a model; measurements are kept in the cache of rewards.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from polar_sdk.engine.scoring import Score
from polar_sdk.errors import DataError
from polar_sdk.lab.items import ChoiceItem, check_labels, data_hash, distinct_items, item_id, split_of
from polar_sdk.lab.program_search.matrix import measured_matrix
from polar_sdk.lab.rewards.cache import RewardCache, cache_path
from polar_sdk.lab.rewards.measure import Measurer, preferred_choice, rewards_of
from polar_sdk.lab.rewards.tasks import make_tasks
from polar_sdk.lab.training.outcomes import Outcomes, PromptOutcome
from polar_sdk.programs.program import Program
from polar_sdk.show.progress import Progress, silent

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from polar_sdk.lab.items import Item, Split
    from polar_sdk.lab.program_search.matrix import RewardMatrix
    from polar_sdk.lab.rewards.tasks import Task
    from polar_sdk.model import PolarModel


_MARK: Final = 8
"""Hexadecimal digits of a prompt's id that a router remembers; two prompts share them 1 time in 4 billion."""


def marks(ids: Iterable[str]) -> str:
    """What a router remembers of the prompts with these ids, so that it is not judged on them."""
    return "".join(sorted(item_id[:_MARK] for item_id in ids))


def _marked(training: dict[str, Any], *names: str) -> set[str]:
    texts = [str(training.get(name, "")) for name in names]
    return {text[start : start + _MARK] for text in texts for start in range(0, len(text), _MARK)}


def unseen(items: Sequence[Item], training: dict[str, Any], *, calibrating: bool) -> list[Item]:
    """The items that a router may be calibrated or evaluated on, without duplicates.

    What it was trained on is left out, and for evaluation also what it was calibrated on. If the data includes what it
    was trained on, calibration takes the calibration split only, so that the test split is left for evaluation.

    Raises:
        DataError: None is left.
    """
    distinct = distinct_items(items)
    check_labels(distinct)
    trained = _marked(training, "seen")
    if calibrating:
        left = [item for item in distinct if item_id(item)[:_MARK] not in trained]
        if len(left) < len(distinct):
            left = [item for item in left if split_of(item_id(item)) == "calibration"]
    else:
        used = trained | _marked(training, "calibrated")
        left = [item for item in distinct if item_id(item)[:_MARK] not in used]
    if not left:
        raise DataError(f"all {len(distinct)} prompts were used to train or calibrate this router; pass unseen ones.")
    return left


@dataclass
class Bench:
    """Measures programs on items of one model.

    Attributes:
        model: The model.
        on_progress: Called with (stage, steps done, steps in all).
        cache: What has been measured already; None = the file on disk.
    """

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

    def matrix(
        self, tasks: Sequence[Task], programs: Sequence[Program], *, labels: bool = True, split: Split = "test"
    ) -> RewardMatrix:
        """What every one of the programs, identity first, does on every task.

        Args:
            tasks: At least one.
            programs: Any; identity is put first.
            labels: Whether answers in text are compared with the right ones; every program must write them for that,
                which is slow.
            split: Name of the split in the matrix.
        """
        distinct = list(dict.fromkeys([Program.identity(self.model.depth), *programs]))
        return self._matrix(tasks, distinct, labels=labels, split=split)

    def outcomes(self, tasks: Sequence[Task], programs: Sequence[Program], *, labels: bool = True) -> Outcomes:
        """Outcomes on the tasks: of these programs now, of others when they are needed."""

        def block(rows: Sequence[int], others: Sequence[Program]) -> RewardMatrix:
            return self._matrix([tasks[row] for row in rows], list(others), labels=labels, split="test")

        return Outcomes(self.matrix(tasks, programs, labels=labels), block)

    def again(self, tasks: Sequence[Task]) -> list[PromptOutcome]:
        """Identity a second time, in other company: the noise floor.

        Choices are scored again in another order and other packs. Answers in text were written token by token when they
        became the reference; scoring them in one pass is their second time.
        """
        identity = Program.identity(self.model.depth)
        choices = [task for task in tasks if isinstance(task.item, ChoiceItem)]
        known = self._measurer.scores(tasks, [identity])[identity]
        fresh = dict(zip((task.key for task in reversed(choices)), self._again(choices), strict=True))
        afresh = [
            fresh[task.key] if isinstance(task.item, ChoiceItem) else Score(score.loglikelihoods, (written(task),))
            for task, score in zip(tasks, known, strict=True)
        ]
        reward = rewards_of(tasks, known, afresh, identity, self.model.decoder.cost)
        right = [_chosen_right(task, score) for task, score in zip(tasks, afresh, strict=True)]
        return [
            PromptOutcome(agree, share, bool(chosen), flops)
            for agree, share, chosen, flops in zip(
                reward.agree.tolist(), reward.share.tolist(), right, reward.flops.tolist(), strict=True
            )
        ]

    def _again(self, choices: Sequence[Task]) -> list[Score]:
        return self._measurer.repeated(list(reversed(choices))) if choices else []

    def _matrix(self, tasks: Sequence[Task], programs: list[Program], *, labels: bool, split: Split) -> RewardMatrix:
        if not tasks:
            raise DataError("no prompt fits the model's context window; give shorter ones.")
        return measured_matrix(
            self._measurer,
            tasks,
            programs,
            splits=[split] * len(tasks),
            data=data_hash(task.item for task in tasks),
            write_tokens=64 if labels else None,
        )


def written(task: Task) -> tuple[int, ...]:
    """Identity's answer to a prompt, token by token."""
    return task.question.continuations[0]


def _chosen_right(task: Task, score: Score) -> bool | None:
    """Whether the preferred choice is the right one; None for prompts that are answered in text."""
    if not isinstance(task.item, ChoiceItem):
        return None
    return preferred_choice(score, task.characters) == task.item.answer
