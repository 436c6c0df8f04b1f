"""An HTTP endpoint over a LangChain chain: it streams the answer and charges the caller whom the API key names.

Run it with `python examples/fastapi_app.py [PORT]` and end it with Ctrl-C; the bill follows. Ask it with:

    curl -N http://127.0.0.1:8000/ask -H 'X-API-Key: key-of-acme' -H 'Content-Type: application/json' \
        -d '{"question": "Why is the sky blue?"}'
    curl http://127.0.0.1:8000/bill -H 'X-API-Key: key-of-acme'

When a client leaves, its answer stops, and what had run by then is on its bill. For an API in front of a model instead
of a chain, there is `polar serve`.
"""

from __future__ import annotations

import sys
from typing import Annotated

import uvicorn
from fastapi import Depends, FastAPI, HTTPException, Security
from fastapi.responses import StreamingResponse
from fastapi.security import APIKeyHeader
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate
from pydantic import BaseModel, Field

from bill import ledger_of_this_run
from langchain_polar import ChatPolar
from polar_billing import Ledger, Selection, UsageRow, usage_rows

TENANTS = {"key-of-acme": "acme", "key-of-globex": "globex"}  # look yours up in a database
PROMPT = ChatPromptTemplate.from_messages([("system", "Answer in two sentences."), ("human", "{question}")])


class Question(BaseModel):
    """The body of a call."""

    question: str = Field(min_length=1, max_length=2_000)


def tenant_of(key: Annotated[str, Security(APIKeyHeader(name="X-API-Key"))]) -> str:
    """The tenant of a call, which is charged."""
    if key not in TENANTS:
        raise HTTPException(401, "This API key is unknown.")
    return TENANTS[key]


Tenant = Annotated[str, Depends(tenant_of)]


def build_app(chat: ChatPolar, ledger: Ledger) -> FastAPI:
    """The app over a model whose usage goes to a ledger."""
    app = FastAPI(title="Ask a metered chain")
    chain = PROMPT | chat | StrOutputParser()

    @app.post("/ask")
    async def ask(body: Question, tenant: Tenant) -> StreamingResponse:
        """The answer as it is written."""
        pieces = chain.astream({"question": body.question}, config={"metadata": {"tenant": tenant}})
        return StreamingResponse(pieces, media_type="text/plain")

    @app.get("/bill")
    def bill(tenant: Tenant) -> list[UsageRow]:
        """The caller's own usage so far."""
        return usage_rows(ledger, Selection(tenant))

    return app


def main(ledger: str, port: int) -> None:
    chat = ChatPolar(compute="standard", max_tokens=128, stop_repeats=4, ledger=ledger)
    uvicorn.run(build_app(chat, Ledger(ledger)), host="127.0.0.1", port=port)


if __name__ == "__main__":
    with ledger_of_this_run() as ledger:
        main(ledger, int(sys.argv[1]) if len(sys.argv) > 1 else 8000)
