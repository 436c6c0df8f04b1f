"""From tasks and programs to a reward matrix, by measuring what the cache does not know."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from polar_sdk.engine.hashes import hash_bridges
from polar_sdk.lab.program_search.matrix import RewardMatrix

if TYPE_CHECKING:
    from collections.abc import Sequence

    from polar_sdk.lab.items import Split
    from polar_sdk.lab.rewards.measure import Measurer
    from polar_sdk.lab.rewards.tasks import Task
    from polar_sdk.programs.program import Program


def measured_matrix(
    measurer: Measurer,
    tasks: Sequence[Task],
    programs: Sequence[Program],
    *,
    splits: Sequence[Split],
    data: str,
    write_tokens: int | None = 64,
    stage: str = "programs",
) -> RewardMatrix:
    """What every program does on every task.

    Args:
        measurer: Of the model.
        tasks: At least one.
        programs: Identity first.
        splits: Of each task.
        data: Hash of the prompts.
        write_tokens: Most tokens of answers that are compared with the right text; None looks at no right answer, since
            answers in text must be written for that, which is slow.
        stage: For progress.
    """
    model = measurer.model
    rewards = measurer.rewards(tasks, programs, stage)
    known = write_tokens is not None
    nothing = torch.zeros(len(tasks), dtype=torch.bool)
    right = [nothing if write_tokens is None else measurer.right(tasks, one, write_tokens) for one in programs]
    return RewardMatrix(
        ids=tuple(task.id for task in tasks),
        kinds=tuple(task.kind for task in tasks),
        splits=tuple(splits),
        tokens=tuple(task.question.prompt for task in tasks),
        programs=tuple(programs),
        agree=torch.stack([rewards[program].agree for program in programs], 1),
        share=torch.stack([rewards[program].share for program in programs], 1),
        margin=torch.stack([rewards[program].margin for program in programs], 1),
        right=torch.stack(right, 1),
        labelled=torch.tensor([known and task.kind != "prompt" for task in tasks]),
        flops=torch.stack([rewards[program].flops for program in programs], 1),
        model=model.name,
        fingerprint=model.fingerprint,
        dtype=model.dtype,
        bridges=hash_bridges(model.loaded.decoder, programs),
        data=data,
    )
