"""Questions about a handbook: LlamaIndex finds the paragraph, a local and metered model answers from it.

Run it with `python examples/llama_index_rag.py`. A query engine answers single questions, a chat engine remembers what
was said. The text is `handbook.md` beside this file; `minilm.py` turns its paragraphs into vectors. Each question is
charged to its own tenant, although the engines in between know nothing of tenants.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llama_index.core import Settings, VectorStoreIndex
from llama_index.core.base.embeddings.base import BaseEmbedding
from llama_index.core.chat_engine.types import ChatMode
from llama_index.core.schema import TextNode
from llama_index_instrumentation.dispatcher import instrument_tags

from bill import ledger_of_this_run
from llama_index_polar import PolarLLM
from minilm import embed

HANDBOOK = Path(__file__).with_name("handbook.md")
QUESTIONS = (
    ("acme", "How many items may a member borrow at a time?"),
    ("globex", "What does it cost to print a page in colour?"),
    ("acme", "Until when is the library open on Thursday?"),
)
CONVERSATION = ("For how long are books lent?", "And films?")


class MiniLM(BaseEmbedding):
    """Vectors for an index of LlamaIndex."""

    def _get_text_embeddings(self, texts: list[str]) -> list[list[float]]:
        return embed(texts)

    def _get_text_embedding(self, text: str) -> list[float]:
        return embed([text])[0]

    def _get_query_embedding(self, query: str) -> list[float]:
        return embed([query])[0]

    async def _aget_query_embedding(self, query: str) -> list[float]:
        return embed([query])[0]


def main(ledger: str) -> None:
    llm = PolarLLM(compute="premium", max_tokens=32, ledger=ledger)
    Settings.tokenizer = llm.get_token_ids  # LlamaIndex fills the context window by this model's own count
    paragraphs = [TextNode(text=text) for text in HANDBOOK.read_text(encoding="utf-8").split("\n\n")]
    index = VectorStoreIndex(paragraphs, embed_model=MiniLM(model_name="all-MiniLM-L6-v2"))
    print(f"{len(paragraphs)} paragraphs indexed\n")

    engine = index.as_query_engine(llm=llm, similarity_top_k=1)
    for tenant, question in QUESTIONS:
        with instrument_tags({"tenant": tenant, "app": "handbook"}):
            response: Any = engine.query(question)
        source = response.source_nodes[0]
        print(question)
        print(f"  {str(response).strip()}")
        print(f"  from: {source.text.partition('.')[0]} (similarity {source.score:.2f})\n")

    print("A conversation")
    chat = index.as_chat_engine(ChatMode.CONTEXT, llm=llm, similarity_top_k=1)
    for question in CONVERSATION:
        print(f"  {question}\n    ", end="")
        with instrument_tags({"tenant": "globex", "app": "conversation"}):
            for piece in chat.stream_chat(question).response_gen:
                print(piece, end="", flush=True)
        print()


if __name__ == "__main__":
    with ledger_of_this_run() as ledger:
        main(ledger)
