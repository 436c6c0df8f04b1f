"""Keep transformers from talking while it loads: progress bars, log lines and warnings.

What it says there is for people who call transformers themselves. Everything is put back afterwards. The
settings belong to the process, so callers hold one lock around this.
"""

from __future__ import annotations

import functools
import logging
import warnings
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["quiet_transformers"]


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silence transformers while the block runs."""
    from transformers.utils import logging as voice

    level, bars = voice.get_verbosity(), voice.is_progress_bar_enabled()
    voice.set_verbosity(logging.CRITICAL)
    voice.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        with warnings.catch_warnings(), _quiet_gguf():
            warnings.simplefilter("ignore")
            yield
    finally:
        voice.set_verbosity(level)
        if bars:
            voice.enable_progress_bar()  # type: ignore[no-untyped-call]


@contextmanager
def _quiet_gguf() -> Iterator[None]:
    """The GGUF reader draws its bar with tqdm itself, past transformers' own switch."""
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
