"""A LangChain chain with an output parser over a local, metered model: invoke, stream, batch, and the bill.

Run it with `python examples/langchain_chain.py`.
"""

from __future__ import annotations

from langchain_core.output_parsers import NumberedListOutputParser, StrOutputParser
from langchain_core.prompts import ChatPromptTemplate, PromptTemplate

from bill import ledger_of_this_run
from langchain_polar import ChatPolar, PolarLLM, get_polar_cost_callback


def main(ledger: str) -> None:
    chat = ChatPolar(compute="standard", max_tokens=24, usage_tags={"app": "example"}, ledger=ledger)
    prompt = ChatPromptTemplate.from_messages([("system", "Answer in one short sentence."), ("human", "{question}")])
    chain = prompt | chat | StrOutputParser()

    with get_polar_cost_callback() as costs:
        print("invoke, for tenant acme")
        print(" ", chain.invoke({"question": "Why is the sky blue?"}, config={"metadata": {"tenant": "acme"}}))

        print("\nstream, for tenant globex")
        print("  ", end="")
        for piece in chain.stream({"question": "What is the moon?"}, config={"metadata": {"tenant": "globex"}}):
            print(piece, end="", flush=True)

        print("\n\na parser that returns a list")
        items = ChatPromptTemplate.from_template("Name three {things}, as a numbered list.")
        listing = items | chat | NumberedListOutputParser()
        print(" ", listing.invoke({"things": "colours"}, config={"metadata": {"tenant": "acme"}}))

        print("\nbatch: rows decode together, on the economy tier")
        llm = PolarLLM(compute="economy", max_tokens=10, tenant="globex", ledger=ledger)
        capitals = PromptTemplate.from_template("What is the capital of {country}?") | llm
        for answer in capitals.batch([{"country": name} for name in ("France", "Italy", "Japan")]):
            print(" ", answer.strip())

        print("\nwhat one message says about itself")
        message = (prompt | chat).invoke({"question": "What is a ledger?"})
        about = message.response_metadata
        print("  usage_metadata", message.usage_metadata)
        print("  cost", about["cost_details"]["amount"], about["cost_details"]["currency"])
        print("  polar", {key: about["polar"][key] for key in ("tier", "program", "flops", "identity_flops")})

    print("\nwhat the block cost, by its callback")
    for name, total in costs.by_tag.items():
        print(f"  {name}: {total.requests} requests, {total.compute_units} CU")
    print("  everything:", ", ".join(f"{amount:f} {currency}" for currency, amount in costs.total.cost.items()))


if __name__ == "__main__":
    with ledger_of_this_run() as ledger:
        main(ledger)
