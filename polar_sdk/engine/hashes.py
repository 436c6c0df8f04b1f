"""Hashes of what a certificate is issued for: programs, weights, bridges and fills. Knows no files."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from torch import Tensor

    from polar_sdk.engine.decoder import Decoder
    from polar_sdk.engine.maps import Fill
    from polar_sdk.programs.cost import Segment
    from polar_sdk.programs.program import Program


def hash_texts(texts: Iterable[str]) -> str:
    """SHA-256 of a sequence of texts, in order."""
    return hashlib.sha256(json.dumps(list(texts), ensure_ascii=True).encode()).hexdigest()


def hash_programs(programs: Sequence[Program]) -> str:
    """SHA-256 of programs, in order."""
    return hash_texts(program.text for program in programs)


def hash_tensors(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of named tensors, as float32, which holds every narrower value exactly."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tuple(tensor.shape)} ".encode())
        digest.update(tensor.detach().to("cpu", torch.float32).contiguous().numpy().tobytes())
    return digest.hexdigest()


def hash_maps(decoder: Decoder, programs: Iterable[Program]) -> str:
    """SHA-256 of the bridges and fills that programs use, as the model has them; empty if they use none.

    Raises:
        MissingMapError: The model does not have one of them.
    """
    chosen = list(programs)
    steps = sorted({step for program in chosen for step in program if step.bridge})
    segments = sorted({segment for program in chosen for segment in program.fills})
    texts = [f"{step.first}-{step.last} {decoder.bridge(step).digest}" for step in steps]
    texts += [f"({first}-{last}) {decoder.fill((first, last)).digest}" for first, last in segments]
    return hash_texts(texts) if texts else ""


def hash_fills(fills: Mapping[Segment, Fill]) -> str:
    """SHA-256 of fills, rounded to bfloat16: the same for the maps of a float32 and of a bfloat16 model."""
    rounded = {segment: fills[segment].to(torch.bfloat16, torch.device("cpu")) for segment in sorted(fills)}
    return hash_texts(f"({first}-{last}) {fill.digest}" for (first, last), fill in rounded.items())
