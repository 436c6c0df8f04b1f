"""A model of sentence-transformers in a local folder: vectors of texts, and the FLOPs of each.

Texts of one length run together, so that none is padded and each costs the same as alone. The FLOPs of N tokens are a
polynomial of the second degree, fitted to counted passes when the model is loaded, so that a call's FLOPs are known
before it runs. Knows no HTTP and no sink.
"""

from __future__ import annotations

import hashlib
import threading
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from polar_sdk.errors import InvalidRequestError, MissingExtraError

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    from numpy.typing import NDArray

    Vectors = NDArray[np.float32]

_ROWS: Final = 32
"""Texts of one pass at most."""
_COUNTED: Final = (8, 16, 32)
"""Numbers of tokens of the passes that are counted."""


class Embedder:
    """A model of sentence-transformers; one call runs at a time.

    Args:
        folder: Where it is.

    Raises:
        MissingExtraError: sentence-transformers is not installed.
        InvalidRequestError: There is no such model, or one that embeds no texts.
    """

    def __init__(self, folder: str | Path) -> None:
        try:
            from sentence_transformers import SentenceTransformer
        except ImportError as error:
            raise MissingExtraError(
                'sentence-transformers is not installed; run: pip install "polar-llm[embeddings]"'
            ) from error
        path = Path(folder)
        if not path.is_dir():
            raise InvalidRequestError(f"--embeddings {str(folder)!r} is not a folder; name one with a model.")
        self.name, self.created = path.resolve().name, int(datetime.now(UTC).timestamp())
        try:
            # Attention in steps: fused kernels are not counted on every device.
            self._model: Any = SentenceTransformer(
                str(path), local_files_only=True, model_kwargs={"attn_implementation": "eager"}
            )
        except Exception as error:  # of a library, which reads files of others
            reason = " ".join(str(error).split())[:300]
            raise InvalidRequestError(
                f"--embeddings {str(folder)!r} holds no model that can be loaded: {reason}"
            ) from error
        self._model.eval()
        files = sorted(path.rglob("*.safetensors")) + sorted(path.rglob("*.json"))
        digest = hashlib.sha256()
        for file in files:
            digest.update(file.read_bytes())
        self.fingerprint = digest.hexdigest()
        config = self._model[0].auto_model.config
        self.depth = int(getattr(config, "num_hidden_layers", 1))
        self.window = int(self._model.max_seq_length or config.max_position_embeddings)
        self.width = int(self._run([[1]]).shape[1])
        self._lock = threading.Lock()
        self._per_length = self._polynomial()

    @property
    def entry(self) -> dict[str, Any]:
        """The model as `GET /v1/models/ID` shows it."""
        about = {"dimensions": self.width, "context_window": self.window}
        return {"id": self.name, "object": "model", "created": self.created, "owned_by": "polar", "polar": about}

    def may_be_named(self, models: Sequence[str]) -> bool:
        """Whether a caller that is bound to some models may name this one; empty = any."""
        return not models or self.name in models

    @property
    def vocabulary(self) -> int:
        """Number of token ids."""
        return len(self._model.tokenizer)

    def tokens(self, text: str) -> list[int]:
        """Token ids of a text, with those that the model wants around it."""
        ids: list[int] = self._model.tokenizer(text, add_special_tokens=True, truncation=False)["input_ids"]
        return ids

    def flops(self, length: int) -> int:
        """FLOPs of one text of N tokens."""
        square, each, fixed = self._per_length
        return square * length**2 + each * length + fixed

    def embed(self, texts: Sequence[Sequence[int]]) -> Vectors:
        """One vector of length 1 per list of token ids, (N, width)."""
        import numpy as np

        vectors = np.empty((len(texts), self.width), dtype=np.float32)
        by_length: dict[int, list[int]] = {}
        for place, ids in enumerate(texts):
            by_length.setdefault(len(ids), []).append(place)
        for places in by_length.values():
            for start in range(0, len(places), _ROWS):
                some = places[start : start + _ROWS]
                with self._lock:
                    vectors[some] = self._run([texts[place] for place in some])
        return of_length_1(vectors)

    def _run(self, rows: Sequence[Sequence[int]]) -> Any:
        import torch

        ids = torch.tensor([list(row) for row in rows], device=self._model.device)
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        with torch.inference_mode():
            return self._model(batch)["sentence_embedding"].float().cpu().numpy()

    def _polynomial(self) -> tuple[int, int, int]:
        """FLOPs by the number of tokens: factors of its square, of itself, and of none."""
        from torch.utils.flop_counter import FlopCounterMode

        def counted(length: int) -> int:
            with FlopCounterMode(display=False) as counter:
                self._run([[1] * length])
            return int(counter.get_total_flops())

        (a, b, c), (x, y, z) = _COUNTED, map(counted, _COUNTED)
        square = ((z - x) * (b - a) - (y - x) * (c - a)) // ((b - a) * (c - a) * (c - b))
        each = (y - x) // (b - a) - square * (a + b)
        return square, each, x - square * a * a - each * a


def of_length_1(vectors: Vectors) -> Vectors:
    """Vectors (N, E), each brought to length 1."""
    import numpy as np

    scaled: Vectors = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    return scaled
