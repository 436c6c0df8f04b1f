"""Matrices in panels: the order in which the native library reads them, which takes no more memory.

A panel holds some outputs for all inputs, so that a product reads it from memory in order, once. Without the library, a
matrix is unpacked for each product. Sides that do not fit are padded with zeros.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import accumulate
from typing import TYPE_CHECKING, Final, NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812

from polar_sdk.engine import native

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

    from polar_sdk.engine.large_pages import LargePages


GROUP: Final = 32
"""Number of inputs of an integer panel whose products are summed exactly, and which share a scale in int4."""
_OUTPUTS: Final = 32
"""Number of outputs in a panel of bfloat16."""
INTEGER_OUTPUTS: Final = 16
"""Number of outputs in a panel of integers."""
_FEW: Final = 32
"""Number of rows up to which the library looks them up: in one thread, and sooner than by an index."""
_WORD: Final = 4
"""Number of inputs whose integers for an output lie side by side."""


class Packed(NamedTuple):
    """A matrix (N, K) of bfloat16 in panels of 32 outputs, with its bias (N,).

    Panels are (N / 32, K / 2, 32); an entry is an int32 of two weights, for inputs 2k and 2k + 1.
    """

    panels: Tensor
    bias: Tensor

    @classmethod
    def of(cls, weight: Tensor, bias: Tensor | None) -> Packed:
        """Pack a matrix (N, K); no bias is one of zeros."""
        pairs = _padded(weight, _OUTPUTS, 2).contiguous().view(torch.int32)
        panels = pairs.view(-1, _OUTPUTS, pairs.shape[1]).transpose(1, 2).contiguous()
        return cls(panels, _bias(bias, weight, weight.shape[0]))

    def matrix(self, inputs: int) -> native.Matrix:
        """The same as the library reads it."""
        return native.Matrix("numbers", *self, inputs)

    def outputs_from(self, first: int) -> Packed | None:
        """The outputs from that one on, over the same memory; None if a panel holds some before it too."""
        return None if first % _OUTPUTS else Packed(self.panels[first // _OUTPUTS :], self.bias[first:])

    def unpack(self, inputs: int) -> Tensor:
        """The matrix (N, K), where K is `inputs`."""
        pairs = self.panels.transpose(1, 2).clone(memory_format=torch.contiguous_format)
        return pairs.flatten(0, 1).view(self.bias.dtype)[: self.bias.shape[0], :inputs]

    def look_up(self, outputs: Tensor) -> Tensor:
        """The rows (M, K) of some outputs (M,); K is even.

        Raises:
            IndexError: An output is not in the matrix.
        """
        if outputs.shape[0] <= _FEW and native.is_used(self.bias.dtype, self.panels.device):
            return native.look_up(outputs, self.matrix(2 * self.panels.shape[1]))
        # One index for each pair of inputs: torch's indexing by three wakes its threads for a single row.
        pairs = self.panels.shape[1]
        first = outputs // _OUTPUTS * (pairs * _OUTPUTS) + outputs % _OUTPUTS
        places = first[:, None] + _offsets(pairs, outputs.device)
        return self.panels.view(-1).index_select(0, places.view(-1)).view(-1, pairs).view(self.bias.dtype)


class PackedInt8(NamedTuple):
    """A matrix (N, K) of 8-bit integers in panels of 16 outputs, with its scales and its bias (N,).

    Panels are (N / 16, K / 32, 8, 16, 4): words of four inputs, outputs, inputs of the word. An entry is a byte, the
    integer plus 128.
    """

    panels: Tensor
    scale: Tensor
    bias: Tensor

    @classmethod
    def of(cls, weight: Tensor, scale: Tensor, bias: Tensor | None) -> PackedInt8:
        """Pack integers (N, K) with scales (N,); no bias is one of zeros."""
        whole = _padded(weight, INTEGER_OUTPUTS, GROUP)
        words = whole.view(-1, INTEGER_OUTPUTS, whole.shape[1] // GROUP, GROUP // _WORD, _WORD)
        panels = words.permute(0, 2, 3, 1, 4).contiguous().view(torch.uint8).bitwise_xor(128)  # adds 128
        return cls(panels, scale, _bias(bias, scale, weight.shape[0]))

    def matrix(self, inputs: int) -> native.Matrix:
        """The same as the library reads it."""
        return native.Matrix("bytes", self.panels, self.bias, inputs, scale=self.scale)

    def outputs_from(self, first: int) -> PackedInt8 | None:
        """The outputs from that one on, over the same memory; None if a panel holds some before it too."""
        if first % INTEGER_OUTPUTS:
            return None
        return PackedInt8(self.panels[first // INTEGER_OUTPUTS :], self.scale[first:], self.bias[first:])

    def unpack(self, inputs: int) -> Tensor:
        """The matrix (N, K), where K is `inputs`, with its scales."""
        words = self.panels.bitwise_xor(128).view(torch.int8).permute(0, 3, 1, 2, 4)
        weight = words.flatten(2).flatten(0, 1)[: self.bias.shape[0], :inputs]
        return (weight * self.scale.float()[:, None]).to(self.bias.dtype)


class PackedInt4(NamedTuple):
    """A matrix (N, K) of 4-bit codes in panels of 16 outputs, with its bias (N,).

    Panels are bytes, (N / 16, K / 32, 320), one row for each group of inputs. The first 256 bytes are (4, 16, 4): pairs
    of words, outputs, inputs of a word. Low halves of bytes are codes of the first word of a pair, high halves those of
    the second. The other bytes are scale and zero of each output, (16, 2), in the dtype of the bias.
    """

    panels: Tensor
    bias: Tensor

    @classmethod
    def of(cls, codes: Tensor, scales_zeros: Tensor, bias: Tensor | None) -> PackedInt4:
        """Pack codes (N, K) with scales and zeros (K / 32, N, 2); no bias is one of zeros."""
        groups, outputs, _ = scales_zeros.shape
        words = codes.view(-1, INTEGER_OUTPUTS, groups, GROUP // (2 * _WORD), 2, _WORD)
        pairs = (words[..., 0, :] | words[..., 1, :] << 4).permute(0, 2, 3, 1, 4)
        numbers = scales_zeros.view(groups, -1, INTEGER_OUTPUTS, 2).transpose(0, 1).contiguous().view(torch.uint8)
        panels = torch.cat((pairs.flatten(2), numbers.flatten(2)), dim=-1)
        return cls(panels, _bias(bias, scales_zeros, outputs))

    def matrix(self, inputs: int) -> native.Matrix:
        """The same as the library reads it."""
        return native.Matrix("nibbles", *self, inputs)

    def outputs_from(self, first: int) -> PackedInt4 | None:
        """The outputs from that one on, over the same memory; None if a panel holds some before it too."""
        if first % INTEGER_OUTPUTS:
            return None
        return PackedInt4(self.panels[first // INTEGER_OUTPUTS :], self.bias[first:])

    def unpack(self, inputs: int) -> Tensor:
        """The matrix (N, K), where K is `inputs`, with its scales and zeros."""
        count, groups, _ = self.panels.shape
        size = INTEGER_OUTPUTS * GROUP // 2
        pairs = self.panels[..., :size].reshape(count, groups, -1, INTEGER_OUTPUTS, _WORD)
        words = torch.stack((pairs & 15, pairs >> 4), dim=3)  # (N / 16, K / 32, 4, 2, 16, 4)
        codes = words.permute(0, 4, 1, 2, 3, 5).flatten(3)  # (N / 16, 16, K / 32, 32)
        numbers = self.panels[..., size:].contiguous().view(self.bias.dtype).view(count, groups, INTEGER_OUTPUTS, 2)
        scales, zeros = numbers.float().transpose(1, 2)[..., None, :].unbind(-1)
        weight = ((codes.float() - 8) * scales + zeros).to(self.bias.dtype)
        return weight.flatten(2).flatten(0, 1)[:, :inputs]


@dataclass(frozen=True)
class StoredMatrix:
    """A matrix (N, K) of a GGUF file that is not in memory yet.

    Attributes:
        form: Its type in the file, one of `native.FORMS`.
        inputs: K.
        outputs: N.
        fill: Writes its panels to memory of their size.
        memory: Where its panels go.
    """

    form: str
    inputs: int
    outputs: int
    fill: Callable[[Tensor], None]
    memory: LargePages

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K), as a tensor says it."""
        return self.outputs, self.inputs

    @cached_property
    def alone(self) -> Blocks:
        """The matrix by itself, without a bias: embedding and head may be the same one."""
        return Blocks.of([self], None)


@dataclass(frozen=True)
class Blocks:
    """A matrix (N, K) in the formats of a GGUF file, with its bias (N,), which is bfloat16.

    Attributes:
        parts: Form and panels of its outputs, those of one format after another; numbers are in one too.
        ends: Where the outputs of each part end.
        inputs: K.
        bias: Zeros where there is none.
        fine: Whether results near a row's greatest meet the row in 16 bits instead of 8.
    """

    parts: tuple[tuple[str, Tensor], ...]
    ends: tuple[int, ...]
    inputs: int
    bias: Tensor
    fine: bool = False

    @classmethod
    def of(cls, weights: Sequence[StoredMatrix | Tensor], bias: Tensor | None) -> Blocks:
        """Read and pack matrices of the same inputs, of which some may be numbers; their outputs follow one another."""
        ends, inputs = tuple(accumulate(each.shape[0] for each in weights)), weights[0].shape[1]
        own = torch.zeros(ends[-1], dtype=torch.bfloat16) if bias is None else bias
        return cls(tuple(map(_pack, weights)), ends, inputs, own)

    @property
    def dtype(self) -> torch.dtype:
        """That of looked up rows."""
        return self.bias.dtype

    def matrix(self, inputs: int) -> native.Matrix:
        """The same as the library reads it; it is there as long as these blocks are."""
        assert inputs == self.inputs
        return self._whole

    def outputs_from(self, first: int) -> Blocks | None:
        """The outputs from that one on, over the same memory; None if a panel holds some before it too."""
        part = next(index for index, end in enumerate(self.ends) if first < end)
        (form, panels), skipped = self.parts[part], first - (0, *self.ends)[part]
        per_panel = _OUTPUTS if form == "numbers" else INTEGER_OUTPUTS
        if skipped % per_panel:
            return None
        at = skipped // per_panel if form == "numbers" else native.packed_size(form, self.inputs, skipped)
        parts = ((form, panels[at:]), *self.parts[part + 1 :])
        return Blocks(parts, tuple(end - first for end in self.ends[part:]), self.inputs, self.bias[first:], self.fine)

    def unpack(self, inputs: int) -> Tensor:
        """The matrix (N, K), where K is `inputs`."""
        return self.look_up(torch.arange(self.bias.shape[0]))[:, :inputs]

    def look_up(self, outputs: Tensor) -> Tensor:
        """The rows (M, K) of some outputs (M,).

        Raises:
            IndexError: An output is not in the matrix.
        """
        return native.look_up(outputs, self._whole)

    @cached_property
    def _whole(self) -> native.Matrix:
        following, starts = None, (0, *self.ends)
        for (form, panels), start, end in reversed(list(zip(self.parts, starts, self.ends, strict=False))):
            own = self.bias[start:end]
            following = native.Matrix(form, panels, own, self.inputs, following=following, fine=self.fine)
        assert following is not None
        return following


def _pack(stored: StoredMatrix | Tensor) -> tuple[str, Tensor]:
    """The form and the panels of a matrix of a file, or of one of numbers."""
    if not isinstance(stored, StoredMatrix):
        return "numbers", Packed.of(stored, None).panels
    panels = stored.memory.empty(native.packed_size(stored.form, stored.inputs, stored.outputs))
    stored.fill(panels)
    return stored.form, panels


@lru_cache(maxsize=64)
def _offsets(pairs: int, device: torch.device) -> Tensor:
    """Offsets of the pairs of inputs of an output; made once and not for every token."""
    return torch.arange(0, pairs * _OUTPUTS, _OUTPUTS, device=device)


def _bias(bias: Tensor | None, like: Tensor, outputs: int) -> Tensor:
    return like.new_zeros(outputs) if bias is None else bias


def _padded(weight: Tensor, outputs: int, inputs: int) -> Tensor:
    """A matrix with zeros after it, so that its sides are multiples of these."""
    missing = -weight.shape[0] % outputs, -weight.shape[1] % inputs
    return F.pad(weight, (0, missing[1], 0, missing[0])) if any(missing) else weight
