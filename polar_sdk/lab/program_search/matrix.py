"""The reward matrix: what every program of a menu does on every prompt. Measured once, read by training and evaluation.

P prompts × M programs; column 0 is identity. One safetensors file, no pickle: tensors as named below, everything else
as JSON in the file's metadata. A matrix knows no model: token ids, programs as text, and numbers; `measured_matrix`
makes one from a model, which runs what the cache does not hold.

What the numbers mean, by kind of prompt (`kinds`):

===========  ===================================  ==================================================================
             `choice`                             `prompt` (bare) and `answer` (with the right text)
===========  ===================================  ==================================================================
`agree`      the same choice as identity          along identity's own greedy answer the program would choose
                                                  three quarters of the tokens as identity does (`SAME_ANSWER`)
`share`      1.0 or 0.0, as `agree`               share of those tokens
`margin`     score of identity's choice less the  mean over those tokens of the log-likelihood under the program less
             best other score, per character;     that under identity; identity has 0, worse programs are negative
             negative where they disagree
`right`      the choice is the right one          `answer`: the generated text is the answer; `prompt`: False
`labelled`   True                                 `answer`: True; `prompt`: False
`flops`      packed scoring of all choices        a request of that prompt with the answer's length
===========  ===================================  ==================================================================

Unit of `margin`: nats per character for choices, nats per token otherwise.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from polar_sdk.engine.hashes import hash_maps, hash_texts
from polar_sdk.errors import DataError
from polar_sdk.programs.program import Program
from polar_sdk.reading import parse_object

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from torch import Tensor

    from polar_sdk.lab.items import PromptKind, Split
    from polar_sdk.lab.rewards.measure import Measurer
    from polar_sdk.lab.rewards.tasks import Task
    from polar_sdk.router.certificate import AnswerForm


_FORMAT: Final = "polar-rewards-1"
_PER_ROW: Final = ("ids", "kinds", "splits", "tokens", "classes")
_TENSORS: Final = ("agree", "share", "margin", "right", "labelled", "flops")
_PER_PROGRAM: Final = ("agree", "share", "margin", "right", "flops")
_TEXTS: Final = ("ids", "kinds", "splits", "classes", "forms", "model", "fingerprint", "dtype", "bridges", "data")


@dataclass(frozen=True, eq=False)
class RewardMatrix:
    """Rewards of M programs on P prompts. Column 0 is identity.

    Attributes:
        ids: Hash of each prompt's normalised text, P; the same over runs and files.
        kinds: What each prompt is, P.
        splits: `train`, `dev`, `calibration` or `test`, P.
        classes: The class that each prompt's item names, P; empty if it names none.
        tokens: Token ids of each prompt as a router reads it, P tuples.
        programs: The menu, M.
        agree: (P, M) bool.
        share: (P, M) float32.
        margin: (P, M) float32.
        right: (P, M) bool; False where `labelled` is False.
        labelled: (P,) bool.
        flops: (P, M) int64, without the router's own. Unit: FLOPs.
        model: Name of the base model.
        fingerprint: Of the base model.
        dtype: Of the weights: `bfloat16`, `int8`, …
        bridges: Hash of the bridges and fills that the programs use; empty if they use none.
        data: Hash of all prompts.
        forms: The form of answers that each program was measured on, M; None = of all. On prompts of another form it
            counts as losing everything and saving nothing. Empty: all programs were measured on all prompts.
    """

    ids: tuple[str, ...]
    kinds: tuple[PromptKind, ...]
    splits: tuple[Split, ...]
    tokens: tuple[tuple[int, ...], ...]
    programs: tuple[Program, ...]
    agree: Tensor
    share: Tensor
    margin: Tensor
    right: Tensor
    labelled: Tensor
    flops: Tensor
    model: str
    fingerprint: str
    dtype: str
    bridges: str
    data: str
    classes: tuple[str, ...] = ()
    forms: tuple[AnswerForm | None, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "classes", tuple(self.classes) or ("",) * len(self.ids))
        shape = (len(self.ids), len(self.programs))
        for name in _PER_PROGRAM:
            if tuple(getattr(self, name).shape) != shape:
                raise DataError(f"reward matrix: {name} has shape {tuple(getattr(self, name).shape)}, not {shape}.")

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def saved(self) -> Tensor:
        """(P, M) share of identity's FLOPs that each program saves; negative where it costs more."""
        return 1 - self.flops / self.flops[:, :1]

    def rows(self, keep: Tensor | Sequence[int]) -> RewardMatrix:
        """The same matrix with these rows only, in this order.

        Args:
            keep: Row indices, or a boolean mask (P,).
        """
        index = torch.as_tensor(keep)
        index = index.nonzero()[:, 0] if index.dtype == torch.bool else index.long()
        kept = index.tolist()
        per_row = {name: tuple(getattr(self, name)[row] for row in kept) for name in _PER_ROW}
        tensors = {name: getattr(self, name)[index] for name in _TENSORS}
        rest = {field.name: getattr(self, field.name) for field in fields(self)}
        return RewardMatrix(**{**rest, **per_row, **tensors})

    def only(self, columns: Sequence[int]) -> RewardMatrix:
        """The same matrix with these programs only; identity must be the first."""
        rest = {field.name: getattr(self, field.name) for field in fields(self)}
        tensors = {name: getattr(self, name)[:, list(columns)] for name in _PER_PROGRAM}
        programs = tuple(self.programs[column] for column in columns)
        forms = tuple(self.forms[column] for column in columns) if self.forms else ()
        return RewardMatrix(**{**rest, **tensors, "programs": programs, "forms": forms})

    def measured_on(self, forms: Collection[AnswerForm]) -> list[int]:
        """Columns of the programs that were measured on prompts that are answered in one of these forms."""
        columns = range(len(self.programs))
        return [column for column in columns if not self.forms or self.forms[column] in (None, *forms)]

    def beside(self, other: RewardMatrix, data: str) -> RewardMatrix:
        """Prompts that are answered in text, and another matrix's questions with choices; each has its own programs.

        Args:
            other: On the same model; both begin with identity.
            data: Hash of the prompts of both.
        """
        programs = tuple(dict.fromkeys((*self.programs, *other.programs)))
        tensors = {"labelled": torch.cat((self.labelled, other.labelled))}
        for name in _PER_PROGRAM:
            blocks = []
            for part in (self, other):
                known: Tensor = getattr(part, name)
                block = known.new_zeros(len(part), len(programs))
                if name == "flops":
                    block += known[:, :1]
                block[:, [programs.index(program) for program in part.programs]] = known
                blocks.append(block)
            tensors[name] = torch.cat(blocks)

        def form(program: Program) -> AnswerForm | None:
            of_texts, of_choices = program in self.programs, program in other.programs
            return None if of_texts and of_choices else "text" if of_texts else "choice"

        per_row = {name: getattr(self, name) + getattr(other, name) for name in _PER_ROW}
        rest = {field.name: getattr(self, field.name) for field in fields(self)}
        return RewardMatrix(
            **{
                **{**rest, **per_row, **tensors},
                "programs": programs,
                "forms": tuple(map(form, programs)),
                "bridges": hash_texts((self.bridges, other.bridges)),
                "data": data,
            }
        )

    def of(self, *splits: Split, kinds: Collection[PromptKind] = ("choice", "prompt", "answer")) -> RewardMatrix:
        """The rows of these splits (and kinds).

        Raises:
            DataError: There is none.
        """
        kept = [row for row, split in enumerate(self.splits) if split in splits and self.kinds[row] in kinds]
        if not kept:
            raise DataError(
                f"the reward matrix has no prompt in {', '.join(splits)} (it has {len(self)} in all); "
                "search again with more prompts."
            )
        return self.rows(kept)

    def save(self, path: str | Path) -> None:
        """Write the matrix as one safetensors file; its folder is made if need be."""
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        tensors = {name: getattr(self, name).contiguous() for name in _TENSORS}
        tensors["token_ids"] = torch.tensor([token for row in self.tokens for token in row], dtype=torch.int32)
        tensors["token_counts"] = torch.tensor([len(row) for row in self.tokens], dtype=torch.int32)
        texts = {name: getattr(self, name) for name in _TEXTS} | {
            "programs": [program.text for program in self.programs]
        }
        save_file(tensors, target, {"format": _FORMAT, "facts": json.dumps(texts)})

    @classmethod
    def load(cls, path: str | Path) -> RewardMatrix:
        """Read a matrix back.

        Raises:
            DataError: The file is missing, damaged or not a reward matrix.
        """
        hint = "Make it with `polar lab search`."
        try:
            with safe_open(str(path), framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a mapping)
        except (OSError, SafetensorError) as error:
            raise DataError(f"reward matrix {str(path)!r} cannot be read ({error}).", hint=hint) from error
        if metadata.get("format") != _FORMAT:
            raise DataError(
                f"{str(path)!r} is not a reward matrix: its format is {metadata.get('format')!r}, not {_FORMAT!r}.",
                hint=hint,
            )
        try:
            return cls(**_facts(parse_object(metadata["facts"], max_bytes=2**30), tensors))
        except (KeyError, ValueError, TypeError, RuntimeError) as error:
            raise DataError(f"reward matrix {str(path)!r} is damaged ({error}).", hint=hint) from error


def _facts(texts: dict[str, Any], tensors: dict[str, Tensor]) -> dict[str, Any]:
    rows = torch.split(tensors["token_ids"], tensors["token_counts"].tolist())
    return {
        **{name: tuple(value) if isinstance(value, list) else value for name, value in texts.items()},
        **{name: tensors[name] for name in _TENSORS},
        "programs": tuple(map(Program.parse, texts["programs"])),
        "tokens": tuple(tuple(row.tolist()) for row in rows),
    }


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
    """Measure every program, identity first, on every task, each of which is in a split.

    Answers of at most `write_tokens` are compared with the right text. Every program must write them for that, which is
    slow; None compares choices only.
    """
    model = measurer.model
    rewards = measurer.rewards(tasks, programs, stage)
    judged = ("choice",) if write_tokens is None else ("choice", "answer")
    labelled = torch.tensor([task.kind in judged for task in tasks])
    known = [task for task, judge in zip(tasks, labelled.tolist(), strict=True) if judge]
    right = [torch.zeros(len(tasks), dtype=torch.bool) for _ in programs]
    for program, values in zip(programs, right, strict=True):
        values[labelled] = measurer.right(known, program, write_tokens or 1)
    return RewardMatrix(
        ids=tuple(task.id for task in tasks),
        kinds=tuple(task.kind for task in tasks),
        splits=tuple(splits),
        classes=tuple(task.item.task or "" for task in tasks),
        tokens=tuple(task.question.prompt for task in tasks),
        programs=tuple(programs),
        agree=torch.stack([rewards[program].agree for program in programs], 1),
        share=torch.stack([rewards[program].share for program in programs], 1),
        margin=torch.stack([rewards[program].margin for program in programs], 1),
        right=torch.stack(right, 1),
        labelled=labelled,
        flops=torch.stack([rewards[program].flops for program in programs], 1),
        model=model.name,
        fingerprint=model.fingerprint,
        dtype=model.dtype,
        bridges=hash_maps(model.loaded.decoder, programs),
        data=data,
    )
