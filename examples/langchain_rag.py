"""Questions about a handbook: a LangChain retrieval chain over a vector store, with the answers charged by tenant.

Run it with `python examples/langchain_rag.py`. The text is `handbook.md` beside this file; `minilm.py` turns its
paragraphs into vectors. A model of 135 million parameters may misread even the right paragraph.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from langchain_core.embeddings import Embeddings
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.runnables import RunnablePassthrough
from langchain_core.vectorstores import InMemoryVectorStore

from bill import ledger_of_this_run
from langchain_polar import ChatPolar
from minilm import embed

if TYPE_CHECKING:
    from langchain_core.documents import Document

HANDBOOK = Path(__file__).with_name("handbook.md")
PROMPT = ChatPromptTemplate.from_template(
    "Answer from this page of a handbook, in one short sentence.\n\n{pages}\n\n{question}"
)
QUESTIONS = (
    ("acme", "How many items may a member borrow at a time?"),
    ("globex", "What does it cost to print a page in colour?"),
    ("acme", "How often does the library boat visit the islands?"),
)


class MiniLM(Embeddings):
    """Vectors for a vector store of LangChain."""

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        return embed(texts)

    def embed_query(self, text: str) -> list[float]:
        return embed([text])[0]


def text_of(documents: list[Document]) -> str:
    return "\n\n".join(document.page_content for document in documents)


def main(ledger: str) -> None:
    paragraphs = HANDBOOK.read_text(encoding="utf-8").split("\n\n")
    store = InMemoryVectorStore.from_texts(paragraphs, MiniLM())
    print(f"{len(paragraphs)} paragraphs in the store\n")

    retriever = store.as_retriever(search_kwargs={"k": 1})
    chat = ChatPolar(compute="exact", max_tokens=40, ledger=ledger)
    find = {"pages": retriever | text_of, "question": RunnablePassthrough()}
    chain = RunnablePassthrough.assign(answer=PROMPT | chat | StrOutputParser())

    # The questions are searched for and answered together, each on the bill of its own tenant.
    configs: list[Any] = [{"metadata": {"tenant": tenant}} for tenant, _ in QUESTIONS]
    for found in (find | chain).batch([question for _, question in QUESTIONS], configs):
        print(found["question"])
        print(f"  {found['answer'].strip()}")
        print(f"  from: {found['pages'].partition('.')[0]}\n")


if __name__ == "__main__":
    with ledger_of_this_run() as ledger:
        main(ledger)
