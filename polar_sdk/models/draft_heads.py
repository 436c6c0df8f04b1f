"""Draft heads as files: which one a model has, and for which model it was made.

One head serves all requests to a model. It is trained once, on answers to invented questions
(`polar_sdk.lab.drafting`), and stored as one safetensors file with the fingerprint of the model. What it guesses is
only a guess: a wrong head costs time and never changes an answer.
"""

from __future__ import annotations

import logging
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from polar_sdk.errors import DraftHeadDamagedError, DraftHeadError
from polar_sdk.models.paths import cache_folder
from polar_sdk.reading import Unreadable, parse_json
from polar_sdk.writing import replacing

if TYPE_CHECKING:
    from torch import Tensor

    from polar_sdk.engine.decoder import Decoder


_FORMAT: Final = "polar-drafts-2"
_TABLE: Final = "polar-drafts-1"
_HINT: Final = "Make it again with `polar lab drafts`."
_SUFFIX: Final = ".safetensors"
_log = logging.getLogger(__name__)


class DraftHeadFacts(BaseModel):
    """Facts about a draft head."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: str = _FORMAT
    model: str
    fingerprint: str
    answers: int
    """Number of answers that it was trained on."""
    tokens: int
    """Tokens of these answers, in all."""
    data: str
    """Hash of the questions."""
    options: dict[str, int | float] = {}
    """How it was trained."""
    right: float | None = None
    """Share of the tokens of held-out answers that it guesses, the one before them known; None without such answers."""
    guessed: float | None = None
    """Number of further tokens that it guesses before its first mistake, on average over the places of these."""


class DraftHeadFile(NamedTuple):
    """A draft head that can be stored: its tensors by name, see `engine.draft_head.DraftHead.of`."""

    tensors: dict[str, Tensor]
    facts: DraftHeadFacts

    @property
    def parameters(self) -> int:
        """Number of trained numbers."""
        return sum(tensor.numel() for name, tensor in self.tensors.items() if name != "tokens")

    def save(self, path: str | Path) -> Path:
        """Write the head in one step; the folder is created if needed. Returns the path."""
        target = Path(path)
        flat = {name: tensor.detach().cpu().contiguous() for name, tensor in self.tensors.items()}
        data = save(flat, metadata={"facts": self.facts.model_dump_json()})
        with replacing(target) as draft:
            draft.write_bytes(data)
        return target

    @classmethod
    def load(cls, path: str | Path) -> DraftHeadFile:
        """Read a head.

        Raises:
            DraftHeadDamagedError: The file is missing, cut short or malformed.
        """
        source = Path(path)
        facts = read_facts(source)
        try:
            with safe_open(source, framework="pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise _damaged(source, str(error)) from error
        if not _form_a_head(tensors):
            raise _damaged(source, "its tensors do not form a head")
        return cls(tensors, facts)

    def check_model(self, fingerprint: str, decoder: Decoder) -> None:
        """Refuse a model for whose states it was not made.

        Args:
            fingerprint: Of the model.
            decoder: The model.

        Raises:
            DraftHeadError: The fingerprints differ, or sizes or tokens are not the model's.
        """
        facts = self.facts
        if facts.fingerprint != fingerprint:
            raise DraftHeadError(
                f"the draft head was made for model {facts.model} ({facts.fingerprint[:12]}…), but this model is "
                f"{fingerprint[:12]}….",
                hint="Train one for it with `polar lab drafts`.",
            )
        if self.tensors["scale"].shape[0] != decoder.family.hidden:
            raise DraftHeadError(
                f"the draft head reads states of {self.tensors['scale'].shape[0]} numbers, but those of this model "
                f"have {decoder.family.hidden}.",
                hint=_HINT,
            )
        tokens = self.tensors["tokens"]
        if int(tokens.min()) < 0 or int(tokens.max()) >= decoder.vocab:
            raise DraftHeadError(
                f"the draft head guesses token {int(tokens.max())}, but ids of this model are 0 to "
                f"{decoder.vocab - 1}.",
                hint=_HINT,
            )


def saved_head_path(fingerprint: str) -> Path:
    """The file in which `polar lab drafts` keeps the user's draft head for a model."""
    return cache_folder() / "drafts" / f"{fingerprint}{_SUFFIX}"


def find_draft_head(fingerprint: str, decoder: Decoder) -> DraftHeadFile | None:
    """The draft head of a model: the user's own, else a shipped one, else None.

    One that cannot be used is passed over with a warning: without it answers are the same, and come more slowly.

    Args:
        fingerprint: The model's.
        decoder: The model.
    """
    saved, shipped = saved_head_path(fingerprint), resources.files("polar_sdk") / "shipped" / "drafts"
    paths = [saved] if saved.is_file() else []
    paths += [path for path in shipped.iterdir() if isinstance(path, Path) and path.suffix == _SUFFIX]
    for path in paths:
        try:
            if path == saved or read_facts(path).fingerprint == fingerprint:
                head = DraftHeadFile.load(path)
                head.check_model(fingerprint, decoder)
                return head
        except DraftHeadError as error:
            _log.warning("%s", error)
    return None


def read_facts(path: Path) -> DraftHeadFacts:
    """Read the facts about the head in a file, without its tensors.

    Raises:
        DraftHeadDamagedError: The file is missing, cut short or malformed, or of another format.
        DraftHeadError: It is a draft table, as earlier versions made.
    """
    try:
        with safe_open(path, framework="pt") as file:
            known: Any = parse_json((file.metadata() or {}).get("facts", ""))
    except (SafetensorError, OSError, Unreadable) as error:
        raise _damaged(path, str(error)) from error
    if isinstance(known, dict) and known.get("format") == _TABLE:
        raise DraftHeadError(
            f"{str(path)!r} is a draft table of an earlier version, which is no longer supported.",
            hint="Train a draft head instead with `polar lab drafts`, or remove it to use the shipped one.",
        )
    if isinstance(known, dict) and known.get("format") != _FORMAT:
        raise _damaged(path, f"its format is {known.get('format')!r}, not {_FORMAT!r}")
    try:
        return DraftHeadFacts.model_validate(known)
    except ValidationError as error:
        first = error.errors()[0]
        raise _damaged(path, f"facts: {'.'.join(map(str, first['loc']))}: {first['msg']}") from error


def _form_a_head(tensors: dict[str, Tensor]) -> bool:
    names = {"tokens", "scale", "enter", "gated", "down", "other"}
    if tensors.keys() != names or tensors["scale"].dim() != 1 or tensors["down"].dim() != 2:
        return False
    width, units = tensors["scale"].shape[0], tensors["down"].shape[1]
    shapes = {"scale": (width,), "enter": (width, 2 * width), "gated": (2 * units, width), "down": (width, units)}
    shapes["other"] = (width,)
    tokens = tensors["tokens"]
    return (
        all(tensors[name].shape == shape and tensors[name].is_floating_point() for name, shape in shapes.items())
        and all(bool(tensors[name].isfinite().all()) for name in shapes)
        and (tokens.dim(), tokens.numel() > 0, tokens.is_floating_point()) == (1, True, False)
    )


def _damaged(path: Path, what: str) -> DraftHeadDamagedError:
    return DraftHeadDamagedError(f"draft head {str(path)!r} is damaged: {what}.", hint=_HINT)
