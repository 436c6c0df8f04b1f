"""The process that compiles in the background: `python -m polar_sdk.models.compiler`, an `Order` on standard input.

It builds the model without its weights, of each kind of layer one, and writes the packages that `load_kernels` looks
for. Whoever started it may end: this goes on, in time that nobody else wants, and ends by itself. What was written
when it is killed stays, and the next one goes on from there. Started by `compilation.py`, not by people.
"""

from __future__ import annotations

import errno
import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from filelock import Timeout

from polar_sdk.models.compilation import (
    BUSY,
    DISK_FULL,
    FAILED,
    LOCK_SECONDS,
    NOT_WRITABLE,
    REASONS,
    Order,
    lock_of,
    packages_folder,
    write_status,
)
from polar_sdk.writing import is_disk_full

if TYPE_CHECKING:
    from torch import nn

    from polar_sdk.engine.decoder import Decoder


CPU_SECONDS: Final = 3600
"""Processor time after which the process gives up: a compiler that hangs must not stay for ever."""
NICE: Final = 3
"""Half of the weight of a process at 0: where two cores are wanted by two others, it slows each down by a fifth."""


def main() -> int:
    """Compile what the order says; returns the exit code."""
    order = Order.model_validate_json(sys.stdin.buffer.read())
    yield_to_others(idle=order.idle)
    limit_time()
    try:
        with lock_of(order.key).acquire(timeout=LOCK_SECONDS):
            return _compile(order)
    except Timeout:
        return BUSY


def yield_to_others(*, idle: bool) -> None:
    """Use only time that nobody else wants, or half of what others get; be the first to go where memory is short."""
    with suppress(OSError, AttributeError):
        os.nice(19 if idle else NICE)
    if idle and hasattr(os, "SCHED_IDLE"):
        with suppress(OSError):
            os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
    with suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")


def limit_time() -> None:
    """Let the system end this process, and each compiler that it starts, after `CPU_SECONDS`."""
    with suppress(ImportError, OSError, ValueError):
        import resource

        resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS))


def _compile(order: Order) -> int:
    folder = packages_folder()
    _remove_drafts(folder)
    done = [0, 0]

    def note(_: str, number: int, count: int) -> None:
        done[:] = number - 1, count
        write_status(order.key, order.status("compiling", done=number - 1, total=count))

    write_status(order.key, order.status("compiling"))
    try:
        from polar_sdk.engine.compiled import load_kernels

        load_kernels(template(order), folder, build=True, progress=note)
    except Exception as error:  # torch raises errors of any class
        code, reason = _classify(error)
        write_status(order.key, order.status("failed", done=done[0], total=done[1], reason=reason))
        return code
    write_status(order.key, order.status("compiled", done=done[1], total=done[1]))
    return 0


def _classify(error: Exception) -> tuple[int, str]:
    """Exit code, and what to say."""
    cause: BaseException | None = error
    while cause is not None:
        if is_disk_full(cause):
            return DISK_FULL, REASONS[DISK_FULL]
        if isinstance(cause, PermissionError) or (isinstance(cause, OSError) and cause.errno == errno.EROFS):
            return NOT_WRITABLE, REASONS[NOT_WRITABLE]
        cause = cause.__cause__
    return FAILED, " ".join(str(error).split())[:300]


def _remove_drafts(folder: Path) -> None:
    """Remove what killed processes have left half written: drafts bear the number of their process, see `replacing`."""
    import psutil

    for draft in folder.glob("*.*.pt2"):
        number = draft.name.split(".")[-2]
        if number.isdigit() and not psutil.pid_exists(int(number)):
            with suppress(OSError):
                draft.unlink()


def template(order: Order) -> Decoder:
    """A decoder like the one of the order, whose weights are zero, and whose layers of one kind are one.

    So a model of any size is compiled in the memory of one of its layers, its embedding and its head.
    """
    import torch
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig

    from polar_sdk.engine.decoder import Decoder
    from polar_sdk.engine.families import find_family
    from polar_sdk.engine.placement import Placement

    class Template(Decoder):
        """Takes the first of the layers that look alike in the place of all of them."""

        def _take_layers(self, modules: Any, bring: Any) -> Any:
            taken: dict[object, Any] = {}
            for index, (module, kind) in enumerate(zip(modules, self.family.kinds, strict=True)):
                look = (kind, *((name, weight.shape) for name, weight in module.named_parameters()))
                if look not in taken:
                    _fill(module, recurse=True)
                    taken[look] = self._take_layer(index, module)
                yield taken[look]

    torch.set_num_threads(order.threads)
    dtype = getattr(torch, order.dtype)
    config = AutoConfig.for_model(**order.config)
    network_class: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    with torch.device("meta"):  # shapes only
        network = network_class(config).to(dtype).requires_grad_(False).eval()
    family = find_family(config)
    inside = {id(part) for layer in family.layer_modules(network) for part in layer.modules()}
    for part in network.modules():
        if id(part) not in inside:
            _fill(part, recurse=False)
    placement = Placement.whole(torch.device("cpu"), family.depth)
    return Template(network, family, precision=order.precision, placement=placement)


def _fill(module: nn.Module, *, recurse: bool) -> None:
    """Give a module that has shapes only tensors of zeros."""
    module.to_empty(device="cpu", recurse=recurse)
    for tensor in (*module.parameters(recurse), *module.buffers(recurse)):
        tensor.data.zero_()


if __name__ == "__main__":
    sys.exit(main())
