"""Training a draft head on a model's own answers.

The model writes its own questions: what it writes after the start of a user message resembles the questions it was
trained on (Xu et al. 2024, "Magpie", arXiv:2406.08464), so a head needs no data. Questions may be given as well, or
instead. The model's own questions are sampled with seeds, and answers are greedy, at full depth. Both are kept in the
cache of rewards, and the head in checkpoints, so that an interrupted run resumes where it stopped. The loss is the
cross-entropy of the tokens that the model said, one guess after another, each from the state that the one before it
left.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812
from pydantic import BaseModel, Field, ValidationError

from polar_sdk.engine.draft_head import MAX_GUESSES, DraftHead
from polar_sdk.engine.scoring import states_after
from polar_sdk.errors import DataError, DraftHeadError
from polar_sdk.lab.checkpoint import Checkpoint, Descent, run_key
from polar_sdk.lab.items import ChoiceItem, PromptItem, data_hash
from polar_sdk.lab.rewards.cache import RewardCache
from polar_sdk.lab.rewards.tasks import make_tasks
from polar_sdk.models.draft_heads import DraftHeadFacts, DraftHeadFile, saved_head_path
from polar_sdk.programs.program import Program
from polar_sdk.reading import first_flaw
from polar_sdk.request.encoder import PromptEncoder
from polar_sdk.show.progress import Progress, silent

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from torch import Tensor

    from polar_sdk.engine.decoder import Decoder
    from polar_sdk.engine.pack import Question
    from polar_sdk.lab.items import Item
    from polar_sdk.model import PolarModel

_ASKED: Final = 2000
"""Questions that the model asks itself where none are given."""
_QUESTION_TOKENS: Final = 96
_TOP_P: Final = 0.95
"""`top_p` of sampled questions: without the least likely tokens, of which a small model makes nonsense."""
_HELD_OUT: Final = 10
"""One answer in N is held out to see how often the head is right."""
_GUESSES: Final = 4
"""Guesses one after another that the loss takes, …"""
_LATER: Final = 0.7
"""… each of so much less weight than the one before it."""
_BATCH: Final = 512
"""Places of answers in a step."""
_RATE: Final = 1e-3
_WARM_UP: Final = 100
_PACK: Final = 64
"""Answers whose states are computed together."""
_CHECKPOINT_EVERY: Final = 200
"""Unit: steps."""
_STEP: Final = "draft-head"


class DraftOptions(BaseModel, frozen=True, extra="forbid"):
    """How a draft head is trained."""

    questions: int | None = Field(default=None, ge=0)
    """That the model asks itself; None = 2,000 where no items are given, else none."""
    answer_tokens: int = Field(default=96, ge=4)
    """Maximum tokens of an answer."""
    vocabulary: int = Field(default=8192, ge=1)
    """Number of tokens that it can guess: those most frequent in the answers."""
    units: int = Field(default=1024, ge=8)
    """Hidden units."""
    epochs: int = Field(default=6, ge=1)
    """How often it sees each answer."""
    seed: int = Field(default=0, ge=0)
    """Seed of the questions, and of training."""


def train_draft_head(
    model: PolarModel,
    items: Sequence[Item] | None = None,
    *,
    out: str | Path | None = None,
    cache: RewardCache | None = None,
    checkpoints: Path | None = None,
    on_progress: Progress = silent,
    **options: int | None,
) -> DraftHeadFile:
    """Train a draft head on a model's own answers, and store it.

    Models that are loaded from then on use it.

    Args:
        model: The model.
        items: Prompts to answer; None = the model asks itself. Choice questions are left out.
        out: File to write; None = your own head for this model.
        cache: Where questions and answers are kept; None = in memory.
        checkpoints: Folder of the checkpoint of training; None keeps none.
        on_progress: Called with (stage, steps done, steps in all).
        **options: Fields of `DraftOptions`.

    Raises:
        DraftHeadError: An option is out of range, or the file cannot be written.
        DataError: The items hold no prompt, or the model has no chat template to ask itself by.
    """
    try:
        chosen = DraftOptions.model_validate(options)
    except ValidationError as error:
        raise DraftHeadError(f"option {first_flaw(error)}.") from error
    target = Path(out or saved_head_path(model.fingerprint))
    _check_writable(target)  # before minutes are spent on answers
    head = _Maker(model, chosen, cache or RewardCache(), checkpoints, on_progress).make(items)
    head.save(target)
    return head


@dataclass(frozen=True)
class _Maker:
    model: PolarModel
    options: DraftOptions
    cache: RewardCache
    checkpoints: Path | None
    on_progress: Progress

    def make(self, items: Sequence[Item] | None) -> DraftHeadFile:
        prompts = [] if items is None else _prompts(items)
        wanted = self.options.questions
        asked = (0 if prompts else _ASKED) if wanted is None else wanted
        prompts = list(dict.fromkeys([*prompts, *(self._asked(asked) if asked or not prompts else [])]))
        questions = [PromptItem(prompt=prompt) for prompt in prompts]
        count = self.options.answer_tokens
        tasks = make_tasks(self.model, questions, self.cache, answer_tokens=count, on_progress=self.on_progress)
        if not tasks:
            raise DataError(
                f"no prompt leaves room for an answer of {count} tokens in the {self.model.context_window:,} tokens of "
                "the model's context window.",
                hint="Use shorter prompts, or fewer answer tokens.",
            )
        answers = [task.question for task in tasks]
        held_out = answers[_HELD_OUT - 1 :: _HELD_OUT]
        others = [answer for place, answer in enumerate(answers, start=1) if place % _HELD_OUT]
        data = data_hash(questions)
        checkpoint = Checkpoint(self.checkpoints, run_key(self.model.fingerprint, data, self.options.model_dump_json()))
        places = self._places(others, "states")
        training = _Training(
            self.model.loaded.decoder, self.options, _frequent(others, self.options.vocabulary), places, checkpoint
        )
        training.descent.run(training.gradients, lambda done, total: self.on_progress("training", done, total))
        checkpoint.clear([_STEP])
        tensors = training.tensors
        right, guessed = self._judge(tensors, held_out)
        facts = DraftHeadFacts(
            model=self.model.name,
            fingerprint=self.model.fingerprint,
            answers=len(others),
            tokens=sum(len(answer.continuations[0]) for answer in others),
            data=data,
            options={name: value for name, value in self.options.model_dump().items() if value is not None},
            right=right,
            guessed=guessed,
        )
        # Numbers are stored in half of float32's precision, which is that of what reads them.
        kept = {
            name: each.to(torch.bfloat16 if each.is_floating_point() else torch.int32) for name, each in tensors.items()
        }
        return DraftHeadFile(kept, facts)

    def _judge(self, tensors: dict[str, Tensor], answers: Sequence[Question]) -> tuple[float | None, float | None]:
        """Share of first guesses that are right, and mean number of guesses before the first mistake."""
        if not answers:
            return None, None
        places = self._places(answers, "held-out states")
        head = DraftHead.of(tensors, self.model.loaded.decoder.head_rows(tensors["tokens"]).float())
        batches = torch.split(torch.arange(len(places)), _BATCH)  # logits of all places at once would take gigabytes
        runs = torch.cat([self._right_guesses(head, places.some(batch)) for batch in batches])
        return float((runs > 0).float().mean()), float(runs.mean())

    @torch.inference_mode()
    def _right_guesses(self, head: DraftHead, places: _Places) -> Tensor:
        """Number of guesses before the first mistake at each place, (N,)."""
        decoder = self.model.loaded.decoder
        device = decoder.placement.last
        following, states = places.following.to(device), places.states.to(device, torch.float32)
        paths, runs, tokens = torch.ones(len(places), dtype=torch.bool, device=device), [], following[:, 0]
        for guess in range(MAX_GUESSES):
            states, guesses = head.likeliest(states, decoder.embeddings(tokens).float())
            tokens = torch.tensor([each.token for each in guesses], device=device)
            paths = paths & (tokens == following[:, 1 + guess])
            runs.append(paths)
        return torch.stack(runs).sum(0).float()

    def _places(self, answers: Sequence[Question], stage: str) -> _Places:
        """Each place of the answers after which a token is to be guessed, of which one is known."""
        decoder = self.model.loaded.decoder
        steps = Program.identity(self.model.depth).steps
        states: list[Tensor] = []
        following: list[Tensor] = []
        for first in range(0, len(answers), _PACK):
            pack = answers[first : first + _PACK]
            texts = [(*each.prompt, *each.continuations[0]) for each in pack]
            for answer, text, own in zip(pack, texts, states_after(decoder, texts, steps), strict=True):
                start, end = len(answer.prompt) - 1, len(text) - 2
                if start < end:
                    padded = torch.tensor([*text, *[_NONE] * MAX_GUESSES])
                    states.append(own[start:end].cpu().clone())  # a clone: the other tokens' states are let go
                    following.append(padded.unfold(0, MAX_GUESSES + 1, 1)[start + 1 : end + 1])
            self.on_progress(stage, min(first + _PACK, len(answers)), len(answers))
        if not states:
            raise DataError("every answer is shorter than three tokens; there is nothing to train a draft head on.")
        return _Places(torch.cat(states), torch.cat(following))

    def _asked(self, count: int) -> list[str]:
        """Questions that the model asks itself, each once."""
        start = PromptEncoder(self.model.loaded.tokenizer).message_start()
        if not start:
            raise DataError(
                f"model {self.model.name} has no chat template, so it cannot write questions for itself.",
                hint="Give it prompts: a JSONL file, or items.",
            )

        def ask(seeds: Sequence[str]) -> list[str]:
            asked = self.model.generate_batch(
                [start] * len(seeds),
                each=[{"seed": int(seed)} for seed in seeds],
                temperature=1.0,
                top_p=_TOP_P,
                max_tokens=_QUESTION_TOKENS,
                template="raw",
                program=Program.identity(self.model.depth),
            )
            # One that was cut off is no whole question.
            return [each.text.strip() if each.finish_reason == "stop" else "" for each in asked]

        seeds = [str(self.options.seed + number) for number in range(count)]
        known = self.cache.complete(
            seeds,
            f"asked {_QUESTION_TOKENS} {_TOP_P}",
            ask,
            lambda done, total: self.on_progress("questions", done, total),
        )
        questions = [text for text in dict.fromkeys(known[seed] for seed in seeds) if text]
        if not questions:
            raise DataError(
                f"of {count} questions that the model wrote, none was complete within {_QUESTION_TOKENS} tokens.",
                hint="Give it prompts: a JSONL file, or items.",
            )
        return questions


_NONE: Final = -1
"""Stands for the token after the last one."""


class _Places(NamedTuple):
    """Places of answers, after which tokens are guessed."""

    states: Tensor
    """State of the token at each place, (N, E)."""
    following: Tensor
    """The token after it, which is known, and those after that, (N, 1 + guesses); where the answer has ended, -1."""

    def __len__(self) -> int:
        return len(self.states)

    def some(self, which: Tensor) -> _Places:
        return _Places(self.states[which], self.following[which])


class _Training:
    """Trains a head on some places at a time, each once in an epoch."""

    def __init__(
        self, decoder: Decoder, options: DraftOptions, tokens: Tensor, places: _Places, checkpoint: Checkpoint
    ) -> None:
        self._decoder, self._places, self._seed = decoder, places, options.seed
        self._batches = -(-len(places) // _BATCH)
        self._device = decoder.placement.last
        self._tokens = tokens.to(self._device)
        width = decoder.family.hidden
        self._values = {name: value.to(self._device) for name, value in _fresh(width, options).items()}
        self._rows = decoder.head_rows(self._tokens).float()
        self._numbers = torch.full((decoder.vocab + 1,), len(tokens), device=self._device)
        """Place of each token among those that can be guessed, or after the last of them."""
        self._numbers[self._tokens] = torch.arange(len(tokens), device=self._device)
        self._numbers[_NONE] = _IGNORED
        for value in self._values.values():
            value.requires_grad_()
        steps = options.epochs * self._batches
        self.descent = Descent(
            self._values,
            torch.optim.AdamW(self._values.values(), betas=(0.9, 0.95), weight_decay=0.01),
            checkpoint,
            _STEP,
            steps=steps,
            rate=_RATE,
            warm_up=min(_WARM_UP, steps),
            floor=0.02,
            every=_CHECKPOINT_EVERY,
        )

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The head's, by name."""
        return {"tokens": self._tokens, **{name: value.detach() for name, value in self._values.items()}}

    def gradients(self, step: int) -> float:
        """Add the gradients of a step; returns its loss."""
        loss = self._loss(self._places.some(self._batch(step)))
        loss.backward()  # type: ignore[no-untyped-call]
        return float(loss.detach())

    def _loss(self, places: _Places) -> Tensor:
        head, device = DraftHead.of({"tokens": self._tokens, **self._values}, self._rows), self._device
        following, states = places.following.to(device), places.states.to(device, torch.float32)
        total = states.new_zeros(())
        with torch.autocast(device.type, torch.bfloat16):
            for guess in range(_GUESSES):
                known = following[:, guess].clamp(min=0)
                states = head.step(states, self._decoder.embeddings(known).float())
                wanted = self._numbers[following[:, guess + 1]]
                if bool((wanted != _IGNORED).any()):
                    loss = F.cross_entropy(head.logits(states), wanted, ignore_index=_IGNORED)
                    total = total + loss * _LATER**guess
        return total

    def _batch(self, step: int) -> Tensor:
        """The places of a step: each once in an epoch, in an order of the epoch's own."""
        epoch, place = divmod(step, self._batches)
        dice = torch.Generator().manual_seed(1_000_003 * self._seed + epoch)
        return torch.randperm(len(self._places), generator=dice)[place * _BATCH : (place + 1) * _BATCH]


_IGNORED: Final = -100
"""Stands for no token in a loss."""


def _fresh(width: int, options: DraftOptions) -> dict[str, Tensor]:
    """The start of training: the state before, moved a little."""
    dice = torch.Generator().manual_seed(options.seed)

    def drawn(*shape: int, spread: float = 0.02) -> Tensor:
        return torch.empty(shape).normal_(0, spread, generator=dice)

    enter = drawn(width, 2 * width)
    enter[:, :width] += torch.eye(width)
    return {
        "scale": torch.ones(width),
        "enter": enter,
        "gated": drawn(2 * options.units, width, spread=width**-0.5),
        "down": drawn(width, options.units, spread=0.005),
        "other": torch.zeros(width),
    }


def _frequent(answers: Iterable[Question], count: int) -> Tensor:
    """The N most frequent tokens in answers, in rising order."""
    said = Counter(token for answer in answers for token in answer.continuations[0])
    return torch.tensor(sorted(token for token, _ in said.most_common(count)))


def _check_writable(path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path.parent).close()
    except OSError as error:
        raise DraftHeadError(f"draft head {str(path)!r} cannot be written: {error.strerror}.") from error
    if path.is_dir():
        raise DraftHeadError(f"draft head {str(path)!r} cannot be written: it is a folder; name a file.")


def _prompts(items: Sequence[Item]) -> list[str]:
    prompts = list(dict.fromkeys(item.prompt for item in items if not isinstance(item, ChoiceItem)))
    if not prompts:
        raise DataError("the data has only choice questions; a draft head is trained on answers in text.")
    return prompts
