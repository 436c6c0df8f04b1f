"""A LangChain chain over a local, metered model: invoke, batch, stream, and what it cost by tenant and tier.

Run it with `python examples/langchain_chain.py`, then `polar usage`: every call below is in the ledger.
"""

from __future__ import annotations

from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate, PromptTemplate

from langchain_polar import ChatPolar, PolarLLM, get_polar_cost_callback


def main() -> None:
    chat = ChatPolar(compute="standard", max_tokens=20, usage_tags={"app": "example"})
    prompt = ChatPromptTemplate.from_messages([("system", "Answer in one short sentence."), ("human", "{question}")])
    chain = prompt | chat | StrOutputParser()

    with get_polar_cost_callback() as costs:
        print("invoke, for tenant acme")
        print(" ", chain.invoke({"question": "Why is the sky blue?"}, config={"metadata": {"tenant": "acme"}}))

        print("\nstream, for tenant globex")
        print("  ", end="")
        for piece in chain.stream({"question": "What is the moon?"}, config={"metadata": {"tenant": "globex"}}):
            print(piece, end="", flush=True)

        print("\n\nbatch: rows decode together, on the economy tier")
        llm = PolarLLM(compute="economy", max_tokens=10, tenant="globex")
        capitals = PromptTemplate.from_template("What is the capital of {country}?") | llm
        for answer in capitals.batch([{"country": name} for name in ("France", "Italy", "Japan")]):
            print(" ", answer.strip())

        print("\nwhat one message says about itself")
        message = (prompt | chat).invoke({"question": "What is a ledger?"})
        about = message.response_metadata
        print("  usage_metadata", message.usage_metadata)
        print("  cost", about["cost_details"]["amount"], about["cost_details"]["currency"])
        print("  polar", {key: about["polar"][key] for key in ("tier", "program", "flops", "identity_flops")})

    print("\nwhat it all cost")
    for title, sums in (("tenant", costs.by_tenant), ("tier", costs.by_tier), ("tag", costs.by_tag)):
        for name, total in sums.items():
            money = ", ".join(f"{amount:f} {currency}" for currency, amount in total.cost.items()) or "no price"
            print(f"  {title:<6} {name:<12} {total.requests} requests  {total.compute_units:.6f} CU  {money}")


if __name__ == "__main__":
    main()
