"""Structured extraction: ten messages become ten objects of a class, in one batch.

Run it with `python examples/langchain_extraction.py`. The grammar makes every answer an object of the class; whether
its values are right is up to the model. The default one of 135 million parameters gets 29 of these 30 right.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, Field

from bill import ledger_of_this_run
from langchain_polar import ChatPolar

Day = Literal["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]


class Booking(BaseModel):
    """A booking of a table."""

    name: str = Field(description="who books")
    guests: int = Field(description="number of guests")
    day: Day


MESSAGES: tuple[tuple[str, str, int, Day], ...] = (
    ("This is Anna Weber. A table for four on Friday, please.", "Anna Weber", 4, "Friday"),
    ("Hello, Ben Okafor here. We are two and would like to come on Monday.", "Ben Okafor", 2, "Monday"),
    ("Could you keep a table for 6 people on Sunday? My name is Chiara Rossi.", "Chiara Rossi", 6, "Sunday"),
    ("Table for three, Tuesday evening. Thanks, Daniel Novak", "Daniel Novak", 3, "Tuesday"),
    ("Eva Lind would like to book for 8 guests on Saturday.", "Eva Lind", 8, "Saturday"),
    ("Hi! We will be five on Thursday. The name is Felix Braun.", "Felix Braun", 5, "Thursday"),
    ("Grace Hall, 2 guests, Wednesday.", "Grace Hall", 2, "Wednesday"),
    ("Please reserve for ten people on Saturday under the name Hugo Martin.", "Hugo Martin", 10, "Saturday"),
    ("My name is Ines Silva, and I need a table for 7 on Friday.", "Ines Silva", 7, "Friday"),
    ("A table for one on Monday, please. Jonas Berg", "Jonas Berg", 1, "Monday"),
)
"""Each with what it says."""


def main(ledger: str) -> None:
    chat = ChatPolar(compute="exact", max_tokens=40, tenant="acme", ledger=ledger)
    bookings = chat.with_structured_output(Booking).batch([text for text, *_ in MESSAGES])
    right = 0
    for (text, *expected), booking in zip(MESSAGES, bookings, strict=True):
        print(text)
        print(f"  {booking!r}")
        right += sum(a == b for a, b in zip(expected, booking.model_dump().values(), strict=True))
    print(f"\n{right} of {3 * len(MESSAGES)} values are right; all {len(bookings)} answers are bookings")


if __name__ == "__main__":
    with ledger_of_this_run() as ledger:
        main(ledger)
