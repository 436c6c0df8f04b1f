"""Tables on consoles of any width: no digit is lost, and texts take what the figures leave."""

from __future__ import annotations

from io import StringIO

import pytest
from rich.console import Console, Group

from polar_sdk.show.tables import add_numbers, add_row, new_table, show

NAME = "a-company-with-a-long-name"
FIGURES = ("123,456", "0.000123456789")


def printed(width: int) -> list[str]:
    table = new_table("Usage", ["tenant", "tier"])
    add_numbers(table, "requests", "cost\nUSD")
    table.add_column("not completed", overflow="fold", min_width=13)
    add_numbers(table, "saved")
    add_row(table, NAME, "standard", *FIGURES, "10 cancelled, 16 error", "+46.1 %")
    file = StringIO()
    show(Group(Group(table)), Console(file=file, width=width))
    return [line.rstrip() for line in file.getvalue().splitlines()]


@pytest.mark.parametrize("width", [20, 60, 74, 80, 120, 200])
def test_no_width_loses_a_digit_or_a_heading(width: int) -> None:
    text = "\n".join(printed(width))
    for expected in (*FIGURES, "+46.1 %", "tenant", "requests", "not completed"):
        assert expected in text
    letters = "".join(line[: line.find("standard")] if "standard" in line else line[:26] for line in printed(width)[4:])
    assert NAME in letters.replace(" ", "")


def test_texts_fold_to_the_width_and_no_further() -> None:
    assert max(map(len, printed(74))) <= 74
    assert any(NAME in line for line in printed(120))
    assert len(printed(120)) == 5  # title, two lines of headings, a rule, one row
