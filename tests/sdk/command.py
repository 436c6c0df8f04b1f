"""The command `polar`, run in this process."""

from __future__ import annotations

from typing import TYPE_CHECKING

from typer.testing import CliRunner

from polar_sdk.cli.main import app

if TYPE_CHECKING:
    from typer.testing import Result


def polar(*words: object, typed: str | bytes | None = None) -> Result:
    """Run it with these arguments; whatever happens, it shows no traceback."""
    result = CliRunner().invoke(app, [*map(str, words)], input=typed, env={"COLUMNS": "200", "NO_COLOR": "1"})
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    assert "Traceback" not in result.output
    return result
