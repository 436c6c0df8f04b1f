"""Biases and penalties on logits, as OpenAI defines them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Final

from pydantic import PlainValidator, WithJsonSchema

from polar_sdk.reading import shown
from polar_server.openai.fields import wrong

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

_MAX_BIASES: Final = 1_000
_MAX_BIAS: Final = 100


class Steering:
    """A hook on logits.

    A token's logit gets its bias, less `frequency` for each time it was sampled, less `presence` if it ever was.
    """

    def __init__(self, bias: Mapping[int, float], presence: float, frequency: float) -> None:
        self._bias, self._presence, self._frequency = bias, presence, frequency

    def fields(self) -> dict[str, Any]:
        """The fields of a body that say the same."""
        biases = {str(token): bias for token, bias in self._bias.items()}
        penalties = {"presence_penalty": self._presence, "frequency_penalty": self._frequency}
        return {**({"logit_bias": biases} if biases else {}), **{name: by for name, by in penalties.items() if by}}

    def __call__(self, tokens: Sequence[int], logits: Tensor) -> Tensor:
        """Change logits (V,) after `tokens`."""
        import torch

        for token, bias in self._bias.items():
            if token < len(logits):
                logits[token] += bias
        if tokens and (self._presence or self._frequency):
            sampled = torch.tensor(tokens, device=logits.device)
            counts = torch.zeros_like(logits).index_add_(0, sampled, torch.ones_like(sampled, dtype=logits.dtype))
            logits -= self._frequency * counts + self._presence * (counts > 0)
        return logits


def _read_biases(value: Any) -> dict[int, float]:
    if not isinstance(value, dict) or len(value) > _MAX_BIASES:
        raise wrong(f"it must be an object of at most {_MAX_BIASES:,} token ids and numbers.")
    biases = {}
    for name, amount in value.items():
        if not name.isascii() or not name.isdigit() or len(name) > 9:
            raise wrong(f"{shown(name)} is not a token id.")
        if isinstance(amount, bool) or not isinstance(amount, int | float) or not abs(amount) <= _MAX_BIAS:
            raise wrong(f"{shown(amount)} is not a number of -{_MAX_BIAS} to {_MAX_BIAS}.")
        biases[int(name)] = float(amount)
    return biases


Biases = Annotated[
    dict[int, float],
    PlainValidator(_read_biases),
    WithJsonSchema(
        {
            "type": "object",
            "maxProperties": _MAX_BIASES,
            "additionalProperties": {"type": "number", "minimum": -_MAX_BIAS, "maximum": _MAX_BIAS},
        }
    ),
]
"""`logit_bias`: what is added to the logits of tokens, by their ids."""
