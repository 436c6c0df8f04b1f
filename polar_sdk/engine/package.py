"""A package: one piece of code through torch's ahead-of-time compiler, in a file named by all that it depends on.

So a package that exists is right, and the next process loads it in a few hundredths of a second. Knows no layers.
"""

from __future__ import annotations

import hashlib
import inspect
import os
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor, nn

import polar_sdk.engine.attention
import polar_sdk.engine.family
import polar_sdk.engine.native
import polar_sdk.engine.parts
import polar_sdk.engine.products
import polar_sdk.engine.types
from polar_sdk.errors import CompileError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from polar_sdk.engine.types import Weights


MAX_SIZE: Final = 1 << 20
"""Upper bound of every size that may change."""
_SOURCES: Final = (
    polar_sdk.engine.attention,
    polar_sdk.engine.family,
    polar_sdk.engine.native,
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
    min_tokens: int = 2
    """Minimum number of tokens that the code may be used for, where their number may change."""

    @property
    def key(self) -> str:
        """Name of the compiled code on disk."""
        return hashlib.sha256(f"{self.name}|{self.assumptions}|{environment()}".encode()).hexdigest()[:32]

    def compile(self, path: Path) -> None:
        """Compile to a package file, which appears whole or not at all.

        Raises:
            CompileError: The compiler is missing or failed.
        """
        module = _Part(self.run, self.template, len(self.inputs))
        arguments = (*self.inputs, *flat(self.template))
        minimums = {"batch": 2, "rows": 2, "tokens": self.min_tokens, "blocks": 1, "pages": 1}
        sizes = {name: torch.export.Dim(name, min=minimum, max=MAX_SIZE) for name, minimum in minimums.items()}
        shapes = [{axis: sizes[name] for axis, name in dynamic.items()} for dynamic in self.dynamic]
        shapes += [{} for _ in flat(self.template)]
        draft = path.with_suffix(f".{os.getpid()}.pt2")
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with torch.no_grad(), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                exported = torch.export.export(module, arguments, dynamic_shapes={"arguments": tuple(shapes)})
                torch._inductor.aoti_compile_and_package(exported, package_path=str(draft))
            draft.replace(path)
        except Exception as error:  # the compiler raises errors of any class
            raise CompileError(
                f"layers cannot be compiled here ({type(error).__name__}: {' '.join(str(error).split())[:200]}).",
                hint="Install a C++ compiler such as g++, or load the model with compile=False.",
            ) from error
        finally:
            draft.unlink(missing_ok=True)


def environment() -> str:
    """What else compiled code depends on: our own source, torch and the machine."""
    digest = hashlib.sha256()
    for module in _SOURCES:
        digest.update(inspect.getsource(module).encode())
    cuda = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    cpu = torch.backends.cpu.get_cpu_capability()
    return f"{digest.hexdigest()}|{torch.__version__}|{cpu}|{torch.get_num_threads()}|{cuda}"
