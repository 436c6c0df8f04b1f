"""Write the tables of `docs/proof.md` from the declarations beside the schema: `python docs/generate_proof.py`.

`tests/docs` compares the two.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Final

from polar_billing.ledger.schema.proved import PROVED, ROWS_OUTSIDE, Declared, Proof

if TYPE_CHECKING:
    from collections.abc import Iterator

PAGE = Path(__file__).with_name("proof.md")
_BEGIN: Final = "<!-- begin: written by docs/generate_proof.py -->\n"
_END: Final = "<!-- end -->\n"


def page() -> str:
    """The whole page, as Markdown, with the tables of the declarations."""
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(_BEGIN)
    return before + _BEGIN + "\n" + "\n".join(_tables()) + "\n" + _END + rest.partition(_END)[2]


def _tables() -> Iterator[str]:
    yield "| table | columns | proved by |"
    yield "|---|---|---|"
    for table, declared in PROVED.items():
        for one in declared:
            yield f"| `{table}` | {', '.join(f'`{name}`' for name in one.columns)} | {_how(one)} |"
    yield ""
    yield "| table | why a deleted or added row need not be found |"
    yield "|---|---|"
    for table, why in ROWS_OUTSIDE.items():
        yield f"| `{table}` | {why} |"
    yield ""


def _how(declared: Declared) -> str:
    if declared.proof is Proof.CHAINED:
        return "the hash chain"
    if declared.proof is Proof.RECOMPUTED:
        return f"recomputed: {declared.why}"
    return f"outside the proof: {declared.why}"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
