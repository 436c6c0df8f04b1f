"""Where the ledger is: argument, else `POLAR_LEDGER`, else a SQLite file in the user's data folder.

Turns what a person writes (a URL or a plain path) into a URL this package supports. Opens nothing.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

from platformdirs import user_data_path
from sqlalchemy import URL, make_url
from sqlalchemy.exc import ArgumentError

from polar_billing.errors import LedgerUrlError

LEDGER_VARIABLE: Final = "POLAR_LEDGER"
_DRIVERS: Final = {
    "sqlite": "sqlite+pysqlite",
    "postgresql": "postgresql+psycopg",
    "postgres": "postgresql+psycopg",
}


def is_unmade(url: URL) -> bool:
    """True if the file of a ledger is not there yet; where its folder is missing too, the database is to complain."""
    file = sqlite_file(url)
    return file is not None and not file.exists() and (file.parent.is_dir() or file == default_file())


def default_file() -> Path:
    """The ledger of a user who names none."""
    return user_data_path("polar", appauthor=False) / "ledger.sqlite3"


def resolve(ledger: str | None = None) -> URL:
    """Find the ledger's URL.

    Args:
        ledger: A SQLAlchemy URL or the path of a SQLite file; None for `POLAR_LEDGER` or the default file.

    Raises:
        LedgerUrlError: It is neither, or names a database that is not supported.
    """
    text = ledger or os.environ.get(LEDGER_VARIABLE) or None
    if text is None:
        return URL.create("sqlite+pysqlite", database=str(default_file()))
    if "://" not in text:
        return URL.create("sqlite+pysqlite", database=str(Path(text).expanduser().absolute()))
    try:
        url = make_url(text)
    except (ArgumentError, ValueError) as error:
        raise LedgerUrlError(
            "ledger URL cannot be parsed.", hint="Write sqlite:///FILE or postgresql://USER@HOST/DATABASE."
        ) from error
    backend = url.get_backend_name()
    if backend not in _DRIVERS:
        raise LedgerUrlError(
            f"ledger {url.render_as_string()!r} is on {backend!r}, which is not supported.",
            hint="Use sqlite:///FILE or postgresql://USER@HOST/DATABASE.",
        )
    url = url.set(drivername=_DRIVERS[backend])
    file = sqlite_file(url)  # made absolute, so that a later change of the working directory does not move the ledger
    return url if file is None else url.set(database=str(file.expanduser().absolute()))


def sqlite_file(url: URL) -> Path | None:
    """The file behind a SQLite URL; None for a database in memory, a `file:` URI or a server."""
    if url.get_backend_name() != "sqlite" or "uri" in url.query:
        return None
    if url.database in {None, "", ":memory:"}:
        return None
    return Path(str(url.database))


def is_sqlite_memory(url: URL) -> bool:
    """True for a SQLite database that lives in this process alone."""
    return url.get_backend_name() == "sqlite" and url.database in {None, "", ":memory:"}


def describe(url: URL) -> str:
    """The ledger for messages: the path of a file, or the URL without its password."""
    file = sqlite_file(url)
    return url.set(drivername=url.get_backend_name()).render_as_string() if file is None else str(file)
