"""A model in memory: the weights, the scheduler that runs them, the tokenizer, and what identifies them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from polar_sdk.errors import ModelDamagedError
from polar_sdk.reading import shown

if TYPE_CHECKING:
    from pathlib import Path
    from weakref import ReferenceType

    import torch
    from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from polar_sdk.engine.decoder import Decoder
    from polar_sdk.engine.grammar import GrammarCompiler
    from polar_sdk.serving.scheduler import Scheduler


@dataclass(frozen=True)
class LoadedModel:
    """A model in memory, shared by all callers that load it. Nothing in it may be changed."""

    name: str
    """The name it was requested by: alias, hub id or path."""
    path: Path
    """The folder it was loaded from."""
    fingerprint: str
    """SHA-256 of configuration and weights, hexadecimal."""
    decoder: Decoder
    scheduler: Scheduler
    """Runs the requests of all callers that share these weights."""
    tokenizer: PreTrainedTokenizerBase
    config: PreTrainedConfig
    generation_config: GenerationConfig
    device: torch.device
    """Device of the embedding; `decoder.placement` has the other devices of a device map."""
    dtype: torch.dtype
    text_files: tuple[tuple[str, int, int], ...] = ()
    """Name, size and time of last change of the files that tokenizer and chat template were read from."""
    adopted: ReferenceType[PreTrainedModel] | None = None
    """The transformers model that gave the weights, as long as its owner keeps it; None where `path` was read."""
    weights: tuple[Path, ...] = ()
    """The files of weights that were read: of the folder `path`, or a GGUF file, which may be elsewhere."""

    @cached_property
    def grammars(self) -> GrammarCompiler:
        """Compiles what answers must match."""
        from polar_sdk.engine.grammar import GrammarCompiler

        return GrammarCompiler(self.tokenizer, self.decoder.vocab, self.end_tokens)

    @cached_property
    def end_tokens(self) -> frozenset[int]:
        """Ids that end an answer: those of the generation settings, and the tokenizer's end of text."""
        return frozenset(token for token in [*self.listed_ends(), self.tokenizer.eos_token_id] if token is not None)

    def listed_ends(self) -> list[int | None]:
        """The end tokens that the generation settings list.

        Raises:
            ModelDamagedError: They are no token ids.
        """
        ids: Any = self.generation_config.eos_token_id
        listed = ids if isinstance(ids, list) else [ids]
        if not all(token is None or type(token) is int for token in listed):
            raise ModelDamagedError(
                f"the generation settings of model {self.name!r} are wrong: eos_token_id = {shown(ids)}; it must be a "
                "token id or a list of them.",
                hint="Correct generation_config.json, or config.json where there is none.",
            )
        return listed
