"""Turn a GGUF file into a folder that `from_pretrained` reads fast: safetensors, tokenizer, chat template.

transformers does the work, and is kept quiet meanwhile: its progress bars, log lines and warnings are for people who
call it themselves. Its settings belong to the process, so callers hold `LOADING_LOCK`. Does not know where the file
came from or where the folder will be stored.
"""

from __future__ import annotations

import errno
import functools
import logging
import threading
import warnings
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final

from polar_sdk.errors import ModelDamagedError, UnsupportedArchitectureError
from polar_sdk.locks import renewed_in_child
from polar_sdk.models.network import first_not_finite

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from transformers import PreTrainedModel


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silence transformers while the block runs, and restore its settings afterwards."""
    from transformers.utils import logging as output

    level, bars = output.get_verbosity(), output.is_progress_bar_enabled()
    output.set_verbosity(logging.CRITICAL)
    output.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        with warnings.catch_warnings(), _quiet_gguf():
            warnings.simplefilter("ignore")
            yield
    finally:
        output.set_verbosity(level)
        if bars:
            output.enable_progress_bar()  # type: ignore[no-untyped-call]


@contextmanager
def _quiet_gguf() -> Iterator[None]:
    """Silence the GGUF reader, which draws its bar with tqdm itself, regardless of transformers' own switch."""
    from transformers import modeling_gguf_pytorch_utils as reader

    bar = getattr(reader, "tqdm", None)
    if bar is None:
        yield
        return
    vars(reader)["tqdm"] = functools.partial(bar, disable=True)
    try:
        yield
    finally:
        vars(reader)["tqdm"] = bar


CONVERSION: Final = 1
"""Version of the conversion. Raise it when the same file yields other weights; fingerprints change with it."""

LOADING_LOCK: Final = renewed_in_child(threading.RLock())
"""Held around every call of `from_pretrained`, which sets the process-wide default dtype while it runs."""

_ALL_F32, _MOSTLY_F16 = 0, 1
"""Values of `general.file_type` in the GGUF format."""


def stored_dtype(gguf: Path) -> str:
    """The dtype to store a conversion in: that of an unquantized file, bfloat16 for a quantized one.

    bfloat16 keeps 8 significant bits. A 4-bit block has 16 steps, so that the rounding is far below the error
    already in the file; most weights were bfloat16 before they were quantized, and run in it again.
    """
    import gguf as reader

    try:
        field = reader.GGUFReader(str(gguf)).get_field("general.file_type")
    except Exception as error:  # a malformed file breaks the reader anywhere
        raise _unreadable(gguf, error) from error
    kind = -1 if field is None else int(field.contents())
    return {_ALL_F32: "float32", _MOSTLY_F16: "float16"}.get(kind, "bfloat16")


def convert(gguf: Path, into: Path, dtype: str = "bfloat16") -> None:
    """Unpack the weights of `gguf` and save them with the tokenizer as a model folder.

    Args:
        gguf: The file.
        into: The folder to create.
        dtype: What to store the weights in.

    Raises:
        ModelDamagedError: The file is not a whole GGUF file, or a weight in it is not finite.
        UnsupportedArchitectureError: transformers does not read this architecture from GGUF.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    with LOADING_LOCK, quiet_transformers():
        try:
            model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
                gguf.parent,
                gguf_file=gguf.name,
                dtype=getattr(torch, dtype),
                quantization_config=GgufConfig(dequantize=True),  # otherwise the weights stay in 4-bit blocks
            )
            tokenizer: Any = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        except MemoryError:
            raise
        except Exception as error:  # the readers of a malformed file raise anything, a bare Exception included
            if "architecture" in str(error):
                raise UnsupportedArchitectureError(f"{str(gguf)!r} cannot be converted: {error}") from error
            raise _unreadable(gguf, error) from error
        _check_finite(gguf, model)
        _save(model, tokenizer, into)


def _save(model: PreTrainedModel, tokenizer: Any, into: Path) -> None:
    from safetensors import SafetensorError

    try:
        model.save_pretrained(into)
        tokenizer.save_pretrained(into)
    except SafetensorError as error:  # its only cause here is the disk; it gives no errno, only text
        raise OSError(errno.ENOSPC if "space" in str(error) else errno.EIO, str(error)) from error


def _check_finite(gguf: Path, model: PreTrainedModel) -> None:
    if (weight := first_not_finite(model)) is not None:
        raise ModelDamagedError(
            f"{str(gguf)!r} is damaged: weight {weight} is not finite.", hint="Copy or fetch the file again."
        )


def _unreadable(gguf: Path, error: Exception) -> ModelDamagedError:
    return ModelDamagedError(
        f"{str(gguf)!r} is not a readable GGUF file ({error}).", hint="Copy or fetch the file again."
    )
