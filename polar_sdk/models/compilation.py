"""Compiled layers of a model: found on disk, or made there. Knows the cache folder and the decoder, no requests."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Literal

from polar_sdk.errors import CompileError
from polar_sdk.models.paths import cache_folder
from polar_sdk.show.progress import say

if TYPE_CHECKING:
    from polar_sdk.engine.decoder import Decoder


Compile = bool | Literal["auto"]
"""True compiles layers that are not compiled yet; `auto` uses compiled ones if they are on disk; False never does."""
_log = logging.getLogger(__name__)


def check_compile(value: object) -> None:
    """Refuse what is no value of `compile`.

    Raises:
        CompileError: It is none.
    """
    if not isinstance(value, bool) and value != "auto":
        raise CompileError(f"compile={value!r} is unknown; use True, False or 'auto'.")


def use_compiled(decoder: Decoder, compile: Compile) -> bool:
    """Let a decoder run compiled layers, as far as `compile` allows; tells whether it does.

    Raises:
        CompileError: `compile` is True and there is no compiler, or it failed, or layers lie on several devices.
    """
    from polar_sdk.engine.compiled import load_kernels

    if len(decoder.placement.devices) > 1:
        if compile is True:
            raise CompileError(
                f"layers on several devices ({decoder.placement}) run uncompiled; use compile='auto' or False."
            )
        return False
    if compile is False or decoder.kernels.has_paged_decode:
        return decoder.kernels.has_paged_decode
    kernels = load_kernels(decoder, cache_folder() / "compiled", build=compile is True, progress=_progress)
    if kernels is None:
        _log.info("layers run uncompiled; `polar models compile` makes them faster, once for all processes")
        return False
    decoder.kernels = kernels
    return True


def _progress(part: str, number: int, count: int) -> None:
    say(f"compiling {part.split(' Attention', maxsplit=1)[0]} ({number} of {count}) …")
