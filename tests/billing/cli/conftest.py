"""The command `polar` with the commands of billing, run in this process."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import typer
from typer.testing import CliRunner, Result

from polar_billing.cli import register

if TYPE_CHECKING:
    from collections.abc import Callable


@pytest.fixture
def polar() -> Callable[..., Result]:
    """Run `polar` with arguments; `answer` is typed to its questions."""

    def run(*arguments: str, answer: str | None = None) -> Result:
        app = typer.Typer()
        register(app)
        return CliRunner().invoke(app, list(arguments), input=answer)

    return run


@pytest.fixture
def ok(polar: Callable[..., Result]) -> Callable[..., str]:
    """Run `polar` with arguments that must succeed; what it prints."""

    def run(*arguments: str) -> str:
        result = polar(*arguments)
        assert result.exit_code == 0, result.output
        return result.stdout

    return run
