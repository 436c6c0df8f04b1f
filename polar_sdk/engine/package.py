"""A package: one piece of code through torch's ahead-of-time compiler, in a file named by all that it depends on.

So a package that exists is right, and the next process loads it in a few hundredths of a second. Most of the time of
compiling one goes into what torch puts around our code, not into the code, and most settings here are to shorten that.
Knows no layers.
"""

from __future__ import annotations

import hashlib
import inspect
import io
import os
import warnings
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch
import torch._inductor.config
import torch._inductor.cpu_vec_isa
from torch import Tensor, nn

import polar_sdk.engine.attention
import polar_sdk.engine.family
import polar_sdk.engine.native
import polar_sdk.engine.panels
import polar_sdk.engine.parts
import polar_sdk.engine.products
import polar_sdk.engine.types
from polar_sdk.errors import CompileError
from polar_sdk.writing import is_disk_full, replacing

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from polar_sdk.engine.types import Weights


MAX_SIZE: Final = 1 << 20
"""Upper bound of every size that may change."""
MIN_SHARE: Final = 2048
"""Minimum number of values that are worth a second thread, as the compiler sees it in the example: waking it takes as
long as the norm of a few rows."""
_RUNTIME: Final = Path(polar_sdk.engine.native.__file__).parent / "runtime"
"""Headers for torch's runtime in a package."""
_SOURCES: Final = (
    polar_sdk.engine.attention,
    polar_sdk.engine.family,
    polar_sdk.engine.native,
    polar_sdk.engine.panels,
    polar_sdk.engine.parts,
    polar_sdk.engine.products,
    polar_sdk.engine.types,
)


def flat(weights: Weights) -> list[Tensor]:
    """The tensors of a layer's weights in a fixed order."""
    tensors: list[Tensor] = []
    for name in sorted(weights):
        value = weights[name]
        tensors += [value] if isinstance(value, Tensor) else [part for part in value or () if part is not None]
    return tensors


def _rebuild(template: Weights, tensors: Iterator[Tensor]) -> Weights:
    """Weights like `template`, of these tensors."""
    weights: Weights = {}
    for name in sorted(template):
        value = template[name]
        if value is None or isinstance(value, Tensor):
            weights[name] = None if value is None else next(tensors)
        else:
            weights[name] = type(value)(*(None if part is None else next(tensors) for part in value))
    return weights


def signature(weights: Weights) -> str:
    """What compiled code assumes of the weights: names, kinds, shapes and dtypes."""
    texts = []
    for name in sorted(weights):
        value = weights[name]
        tensors = [value] if value is None or isinstance(value, Tensor) else list(value)
        kinds = ",".join("-" if tensor is None else f"{tuple(tensor.shape)}{tensor.dtype}" for tensor in tensors)
        texts.append(f"{name}:{type(value).__name__}({kinds})")
    return ";".join(texts)


class _Part(nn.Module):
    """A function of activations and weights as a module, which is what can be exported."""

    def __init__(self, run: Callable[..., Any], template: Weights, inputs: int) -> None:
        super().__init__()
        self._run, self._template, self._inputs = run, template, inputs

    def forward(self, *arguments: Tensor) -> Any:
        weights = _rebuild(self._template, iter(arguments[self._inputs :]))
        return self._run(*arguments[: self._inputs], weights)


@dataclass(frozen=True)
class Part:
    """One piece of code to compile: what it is called, what it runs, and an example of its arguments."""

    name: str
    run: Callable[..., Any]
    template: Weights
    inputs: tuple[Tensor, ...]
    dynamic: tuple[dict[int, str], ...]
    """For each input, which of its sizes may change; sizes of the same name are equal."""
    assumptions: str
    """Everything the code depends on besides this package's source and the machine."""
    stage: int
    """Parts of lower stages are compiled, and used, before this one."""
    min_tokens: int = 2
    """Minimum number of tokens for which the code is used, where their number may change.

    The compiler is told of 2 at least: it would take 1 for a number that does not change.
    """
    shared: bool = True
    """Whether the compiler shares work among threads; off where the native library does all that is worth it."""
    whole: bool = False
    """Whether it is a layer that the native library runs, see `native.Layers`."""

    def open(self, path: Path) -> Any:
        """The compiled code, which runs tensors; errors as `open_package`."""
        return polar_sdk.engine.native.open_layer(path) if self.whole else open_package(path)

    @property
    def key(self) -> str:
        """Name of the compiled code on disk."""
        text = f"{self.name}|{self.assumptions}|{environment(shared=self.shared)}"
        return hashlib.sha256(text.encode()).hexdigest()[:32]

    def compile(self, path: Path) -> None:
        """Compile to a package file, which appears whole or not at all.

        Raises:
            CompileError: The compiler is missing or failed, or the disk is full.
        """
        module = _Part(self.run, self.template, len(self.inputs))
        arguments = (*self.inputs, *flat(self.template))
        minimums = {"batch": 2, "rows": 2, "tokens": max(2, self.min_tokens), "blocks": 1, "pages": 1}
        sizes = {name: torch.export.Dim(name, min=minimum, max=MAX_SIZE) for name, minimum in minimums.items()}
        shapes = [{axis: sizes[name] for axis, name in dynamic.items()} for dynamic in self.dynamic]
        shapes += [{} for _ in flat(self.template)]
        try:
            sharing = polar_sdk.engine.native.shared_by(team=not self.shared)
            with replacing(path) as draft, torch.no_grad(), warnings.catch_warnings(), sharing:
                warnings.simplefilter("ignore")
                exported = torch.export.export(module, arguments, dynamic_shapes={"arguments": tuple(shapes)})
                try:
                    self._build(exported, draft, trusting=True)
                except Exception as error:  # the compiler raises errors of any class
                    if is_disk_full(error):
                        raise
                    self._build(exported, draft, trusting=False)
        except Exception as error:  # the compiler raises errors of any class
            if is_disk_full(error):
                raise CompileError(
                    f"there is no space left for compiled layers in {str(path.parent)!r} or the folder for temporary "
                    "files.",
                    hint="Free some, or set POLAR_CACHE or TMPDIR to another folder.",
                ) from error
            raise CompileError(
                f"layers cannot be compiled here ({type(error).__name__}: {' '.join(str(error).split())[:200]}).",
                hint="Install a C++ compiler such as g++, or load the model with compile=False.",
            ) from error

    def _build(self, exported: Any, path: Path, *, trusting: bool) -> None:
        """Compile to a package file, and see that it can be opened."""
        package = io.BytesIO()  # torch's own writer of files ends the process where the disk is full
        with compiler_options(trusting=trusting, runtime=trusting, shared=self.shared):
            torch._inductor.aoti_compile_and_package(exported, package_path=package)
        path.write_bytes(package.getvalue())
        open_package(path)


def open_package(path: Path) -> Any:
    """The code in a package file, which runs tensors; raises errors of any class where it cannot be opened.

    `torch._inductor.aoti_load_package` comes to the same object, but asks the C++ compiler for instruction sets on its
    way: where there is none, it warns of an outdated file and opens it like this.
    """
    return torch._C._aoti.AOTIModelPackageLoader(str(path), "model", False, 1, -1)


@contextmanager
def compiler_options(*, trusting: bool = True, runtime: bool = False, shared: bool = True) -> Iterator[None]:
    """How everything is compiled; nothing here changes what the code computes.

    Headers are not compiled in advance: that takes as long as it saves, and 280 MB of the folder for temporary files.

    Args:
        trusting: Whether to trust the processor's word on its instruction sets, and the compiler to know them. Else
            torch compiles a program for each, which takes seven seconds.
        runtime: Whether to use our headers for torch's runtime.
        shared: Whether several threads may run the code.
    """
    options: dict[str, Any] = {
        "aot_inductor.precompile_headers": False,
        "aot_inductor.enable_line_tables": False,
        "aot_inductor.custom_ops_to_c_shims": polar_sdk.engine.native.direct_calls(),
        "cpp.min_chunk_size": MIN_SHARE,
        "cpp.threads": -1 if shared else 1,
    }
    with ExitStack() as after:
        after.enter_context(torch._inductor.config.patch({**options, "cpp.vec_isa_ok": True if trusting else None}))
        # torch keeps the list of instruction sets, and may not keep one that was not tried.
        torch._inductor.cpu_vec_isa.valid_vec_isa_list.cache_clear()
        after.callback(torch._inductor.cpu_vec_isa.valid_vec_isa_list.cache_clear)
        if runtime:
            after.enter_context(_searched_first(_RUNTIME))
        yield


@contextmanager
def _searched_first(folder: Path) -> Iterator[None]:
    """Let the compiler look for standard headers in a folder first."""
    before = os.environ.get("CPLUS_INCLUDE_PATH")
    os.environ["CPLUS_INCLUDE_PATH"] = os.pathsep.join(filter(None, (str(folder), before)))
    try:
        yield
    finally:
        if before is None:
            del os.environ["CPLUS_INCLUDE_PATH"]
        else:
            os.environ["CPLUS_INCLUDE_PATH"] = before


def environment(*, shared: bool) -> str:
    """What else compiled code depends on: our own source, torch and the machine, with its threads if they share it."""
    digest = hashlib.sha256()
    for module in _SOURCES:
        digest.update(inspect.getsource(module).encode())
    cuda = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    machine = f"{torch.backends.cpu.get_cpu_capability()}|{polar_sdk.engine.native.processor()}|{cuda}"
    threads = torch.get_num_threads() if shared else 1
    return f"{digest.hexdigest()}|{torch.__version__}|{threads}|{machine}"
