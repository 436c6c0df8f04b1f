"""Run programs on tasks, compare each with identity, and judge answers by the right ones.

Cached measurements are not repeated. Programs are scored together, so that the visits they share at their start run
once (`engine.scoring`). Results are stored pack by pack: an interruption loses one pack at most.
"""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import torch

from polar_sdk.engine.hashes import hash_maps
from polar_sdk.engine.pack import packs
from polar_sdk.engine.scoring import Score, score_programs
from polar_sdk.lab.items import AnswerItem, ChoiceItem, normalised
from polar_sdk.programs.program import Program
from polar_sdk.promises.losses import is_lost, tokens_kept
from polar_sdk.show.progress import Progress, silent

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from torch import Tensor

    from polar_sdk.engine.pack import Question
    from polar_sdk.lab.rewards.cache import RewardCache
    from polar_sdk.lab.rewards.tasks import Task
    from polar_sdk.model import PolarModel
    from polar_sdk.programs.cost import CostModel

_NUMBER: Final = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


class Reward(NamedTuple):
    """How one program compares with identity on P tasks; the terms are those of `polar_sdk.lab.program_search.matrix`.

    Tensors (P,): bool, float32, float32 and int64.
    """

    agree: Tensor
    share: Tensor
    margin: Tensor
    flops: Tensor


@dataclass
class Measurer:
    """Measures programs on one model, which has the maps that they use; the cache holds what was measured already."""

    model: PolarModel
    cache: RewardCache
    on_progress: Progress = silent

    def scores(
        self, tasks: Sequence[Task], programs: Iterable[Program], stage: str = "programs", *, again: bool = False
    ) -> dict[Program, list[Score]]:
        """Score of every task under every program, in the order of the tasks.

        `again` measures them a second time, in the packs that result from this order.
        """
        names = {program: self._name(program) + (" again" if again else "") for program in programs}
        known = {program: self.cache.get((task.key for task in tasks), name) for program, name in names.items()}
        self._fill(tasks, names, known, stage)
        return {program: [_read(values[task.key]) for task in tasks] for program, values in known.items()}

    def rewards(
        self, tasks: Sequence[Task], programs: Iterable[Program], stage: str = "programs"
    ) -> dict[Program, Reward]:
        """Rewards of every program on the tasks."""
        distinct = list(dict.fromkeys(programs))
        identity = Program.identity(self.model.depth)
        scores = self.scores(tasks, [identity, *distinct], stage)
        cost = self.model.loaded.decoder.cost
        return {program: rewards_of(tasks, scores[identity], scores[program], program, cost) for program in distinct}

    def right(self, tasks: Sequence[Task], program: Program, max_tokens: int = 64) -> Tensor:
        """(P,) bool: whether the program's answer is right; False if the right one is not known.

        Choices are compared by their scores; prompts with an answer are answered greedily, and the text is compared. A
        program that would choose every token of identity's whole answer writes that answer, and so need not write it.
        """
        known = [task for task in tasks if isinstance(task.item, ChoiceItem | AnswerItem)]
        scores = dict(zip((task.key for task in known), self.scores(known, [program])[program], strict=True))
        texts: dict[str, str] = {}
        others: list[Task] = []
        for task in known:
            if isinstance(task.item, ChoiceItem):
                continue
            if self._writes_the_same(task, scores[task.key]):
                texts[task.key] = self.model.decode(task.question.continuations[0])
            else:
                others.append(task)
        texts |= self._generated(others, program, max_tokens)
        right = []
        for task in tasks:
            if isinstance(task.item, ChoiceItem):
                right.append(preferred_choice(scores[task.key], task.characters) == task.item.answer)
            else:
                right.append(isinstance(task.item, AnswerItem) and is_right(texts[task.key], task.item.answer))
        return torch.tensor(right, dtype=torch.bool)

    def _writes_the_same(self, task: Task, score: Score) -> bool:
        """Whether a program of this score writes identity's answer, to its end."""
        (answer,) = task.question.continuations
        return answer[-1] in self.model.loaded.end_tokens and score.greedy[0] == answer

    def _generated(self, tasks: Sequence[Task], program: Program, max_tokens: int) -> dict[str, str]:
        prompts = {task.key: task.item.prompt for task in tasks if isinstance(task.item, AnswerItem)}

        def write(keys: Sequence[str]) -> list[str]:
            asked = [prompts[key] for key in keys]
            answers = self.model.greedy_answers(asked, max_tokens=max_tokens, program=program)
            return [self.model.decode(answer) for answer in answers]

        return self.cache.complete(
            list(prompts),
            f"{self._name(program)} writes {max_tokens}",
            write,
            lambda done, total: self.on_progress(f"writing under {program.text}", done, total),
        )

    def _name(self, program: Program) -> str:
        return f"{program.text} {hash_maps(self.model.loaded.decoder, [program])[:24]}".strip()

    def _fill(
        self, tasks: Sequence[Task], names: dict[Program, str], known: dict[Program, dict[str, Any]], stage: str
    ) -> None:
        """Score what is missing, pack by pack; tasks that lack the same programs go together."""
        groups: dict[tuple[Program, ...], dict[str, Question]] = defaultdict(dict)
        for task in tasks:
            missing = tuple(program for program, values in known.items() if task.key not in values)
            groups[missing][task.key] = task.question
        groups.pop((), None)
        total = sum(len(programs) * len(list(packs(list(group.values())))) for programs, group in groups.items())
        done = 0

        def step() -> None:
            nonlocal done
            done += 1
            self.on_progress(stage, done, total)

        for programs, group in groups.items():
            keys = iter(group)
            for pack in packs(list(group.values())):
                scores = score_programs(self.model.loaded.decoder, pack, programs, step)
                pack_keys = [next(keys) for _ in pack]
                for program in programs:
                    fresh = dict(zip(pack_keys, map(_stored, scores[program]), strict=True))
                    self.cache.put(names[program], fresh)
                    known[program] |= fresh


def rewards_of(
    tasks: Sequence[Task], identity: Sequence[Score], ours: Sequence[Score], program: Program, cost: CostModel
) -> Reward:
    """Compare a program's scores with identity's, task by task."""
    rows = [_compare(task, full, score) for task, full, score in zip(tasks, identity, ours, strict=True)]
    return Reward(
        agree=torch.tensor([row[0] for row in rows], dtype=torch.bool),
        share=torch.tensor([row[1] for row in rows], dtype=torch.float32),
        margin=torch.tensor([row[2] for row in rows], dtype=torch.float32),
        flops=torch.tensor([_flops(task, program, cost) for task in tasks], dtype=torch.int64),
    )


def _compare(task: Task, full: Score, ours: Score) -> tuple[bool, float, float]:
    """(agree, share, margin) of one task."""
    if isinstance(task.item, ChoiceItem):
        preferred, scores = preferred_choice(full, task.characters), _per_character(ours, task.characters)
        rivals = [score for choice, score in enumerate(scores) if choice != preferred]
        agrees = preferred_choice(ours, task.characters) == preferred
        return agrees, float(agrees), scores[preferred] - max(rivals)
    # Identity's answer was written one token at a time; scored in one pass, identity itself may choose otherwise where
    # two tokens are almost as likely. So the choices of both in one pass are compared.
    share = tokens_kept(ours.greedy[0], full.greedy[0]) / len(full.greedy[0])
    return not is_lost(share, "differs"), share, (ours.loglikelihoods[0] - full.loglikelihoods[0]) / len(full.greedy[0])


def preferred_choice(score: Score, characters: Sequence[int]) -> int:
    """Index of the choice with the highest log-likelihood per character, so that short choices have no advantage.

    Args:
        score: Of all choices of a question.
        characters: Length of each choice.
    """
    scores = _per_character(score, characters)
    return max(range(len(scores)), key=scores.__getitem__)


def _per_character(score: Score, characters: Sequence[int]) -> list[float]:
    return [value / size for value, size in zip(score.loglikelihoods, characters, strict=True)]


def _flops(task: Task, program: Program, cost: CostModel) -> int:
    """FLOPs of packed scoring of the choices after their prompt, or of a request that gives the answer."""
    prompt = len(task.question.prompt)
    if not isinstance(task.item, ChoiceItem):
        return cost.request(program, prompt, len(task.question.continuations[0])).total
    return cost.scoring(program, prompt, map(len, task.question.continuations))


def is_right(written: str, answer: str) -> bool:
    """Whether a written text is the answer.

    It must hold the answer's words one after another; case, punctuation and spacing do not count. Where the answer is a
    number, the last number in the text counts, so that working may come before it.
    """
    if _NUMBER.fullmatch(answer.strip()):
        numbers = _NUMBER.findall(written)
        return bool(numbers) and _value(numbers[-1]) == _value(answer.strip())
    return f" {normalised(answer)} " in f" {normalised(written)} "


def _value(number: str) -> float:
    return float(number.replace(",", ""))


def _stored(score: Score) -> Any:
    return [score.loglikelihoods, score.greedy]


def _read(value: Any) -> Score:
    loglikelihoods, greedy = value
    return Score(tuple(loglikelihoods), tuple(map(tuple, greedy)))
