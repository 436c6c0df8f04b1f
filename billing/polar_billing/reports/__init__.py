"""Usage, reports, statements, price books and budgets, for people and for other programs."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Part(BaseModel):
    """A frozen part of a report or an explanation."""

    model_config = ConfigDict(frozen=True)
