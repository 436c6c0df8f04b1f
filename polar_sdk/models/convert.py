"""Configuration, tokenizer and chat template of a GGUF file, written to a folder as `from_pretrained` reads them.

transformers does the work, and is kept quiet meanwhile: its progress bars, log lines and warnings are for people who
call it themselves. Its settings belong to the process, so callers hold `LOADING_LOCK`. Does not know where the file
came from or where the folder will be stored.
"""

from __future__ import annotations

import errno
import json
import logging
import threading
import warnings
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from polar_sdk.errors import PolarError, UnsupportedArchitectureError
from polar_sdk.locks import renewed_in_child
from polar_sdk.models.gguf import GgufFile, damaged
from polar_sdk.reading import parse_object, read_bytes

if TYPE_CHECKING:
    from collections.abc import Iterator


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silence transformers while the block runs, and restore its settings afterwards."""
    from transformers.utils import logging as output

    level, bars = output.get_verbosity(), output.is_progress_bar_enabled()
    output.set_verbosity(logging.CRITICAL)
    output.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        output.set_verbosity(level)
        if bars:
            output.enable_progress_bar()  # type: ignore[no-untyped-call]


CONVERSION: Final = 3
"""Version of what is written. Raise it when the same file yields another tokenizer or configuration."""

LOADING_LOCK: Final = renewed_in_child(threading.RLock())
"""Held around every call of `from_pretrained`, which sets the process-wide default dtype while it runs."""


class _Reader:
    """The `gguf` package's reader, as far as transformers asks it for values."""

    def __init__(self, path: str) -> None:
        file = GgufFile(Path(path))
        self.fields, self.tensors = file.fields, list(file.tensors.values())


@contextmanager
def _quick_reader() -> Iterator[None]:
    """Let transformers read headers with `GgufFile`, in a tenth of the time."""
    import gguf

    own = gguf.GGUFReader
    vars(gguf)["GGUFReader"] = _Reader
    try:
        yield
    finally:
        vars(gguf)["GGUFReader"] = own


def convert(gguf: Path, into: Path) -> None:
    """Write configuration, tokenizer and chat template of a file to a folder.

    Raises:
        ModelDamagedError: The file is not a whole GGUF file.
        UnsupportedArchitectureError: transformers does not read this architecture from GGUF.
    """
    from transformers import AutoConfig, AutoTokenizer, GenerationConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    GgufFile(gguf)
    with LOADING_LOCK, quiet_transformers(), _quick_reader():
        try:
            config: Any = AutoConfig.from_pretrained(gguf.parent, gguf_file=gguf.name)
            tokenizer: Any = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        except (MemoryError, PolarError):
            raise
        except Exception as error:  # the readers of a malformed file raise anything, a bare Exception included
            if "architecture" in str(error):
                raise UnsupportedArchitectureError(f"{str(gguf)!r} cannot be converted: {error}") from error
            raise damaged(gguf, str(error)) from error
        name = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type)  # the class itself would be imported for it
        config.architectures = None if name is None else [name]
        config.save_pretrained(into)
        GenerationConfig.from_model_config(config).save_pretrained(into)
        _save(tokenizer, into)
        tokenizer = AutoTokenizer.from_pretrained(into, local_files_only=True)
        _save(tokenizer, into)  # as its class has it, which splits texts otherwise than the reader of files, say
        _add_settings(tokenizer, into / "tokenizer_config.json")


def _save(tokenizer: Any, into: Path) -> None:
    try:
        tokenizer.save_pretrained(into)
    except OSError:
        raise
    except Exception as error:  # the tokenizers library raises bare Exceptions; it gives no errno, only text
        raise OSError(errno.ENOSPC if "space" in str(error) else errno.EIO, str(error)) from error


def _add_settings(tokenizer: Any, path: Path) -> None:
    """Name the added tokens in the settings too: without them, transformers parses all tokens again to find these."""
    added = {str(place): token.__getstate__() for place, token in tokenizer.added_tokens_decoder.items()}
    settings = parse_object(read_bytes(path)) | {"added_tokens_decoder": added}
    path.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
