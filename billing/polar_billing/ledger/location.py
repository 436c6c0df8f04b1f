"""The ledger's location, and the errors of its database.

The ledger is named by the argument, else by `POLAR_LEDGER`, else it is a SQLite file in the user's data folder; what
the user writes (a URL or a plain path) becomes a URL that this package supports. A failure of the database becomes a
`StoreError` that names the ledger, the cause and the fix, chosen by the error's code, never by its wording. Opens
nothing; looks at the file system only to explain a failure that already happened.
"""

from __future__ import annotations

import os
import sqlite3
from pathlib import Path
from typing import TYPE_CHECKING, Final

from platformdirs import user_data_path
from sqlalchemy import URL, make_url
from sqlalchemy.exc import ArgumentError

from polar_billing.errors import (
    LedgerUrlError,
    RecordRefusedError,
    StoreDamagedError,
    StoreError,
    StoreFullError,
    StoreLockedError,
    StoreNotFoundError,
    StoreReadOnlyError,
    StoreUnavailableError,
)

if TYPE_CHECKING:
    from collections.abc import Callable

LEDGER_VARIABLE: Final = "POLAR_LEDGER"
_DRIVERS: Final = {
    "sqlite": "sqlite+pysqlite",
    "postgresql": "postgresql+psycopg",
    "postgres": "postgresql+psycopg",
}

_ELSEWHERE: Final = "Set POLAR_LEDGER to a ledger that can be written, or pass ledger=None to run unmetered."

_CONTENT: Final = "Check the record's texts; nothing of it was stored."

_SQLITE: Final[dict[int, tuple[type[StoreError], str, str]]] = {
    sqlite3.SQLITE_READONLY: (StoreReadOnlyError, "cannot be written: it is read-only.", _ELSEWHERE),
    sqlite3.SQLITE_PERM: (StoreReadOnlyError, "cannot be opened: permission denied.", _ELSEWHERE),
    sqlite3.SQLITE_FULL: (
        StoreFullError,
        "cannot take another record: the disk or the database is full.",
        "Free some space; what is stored is unharmed.",
    ),
    sqlite3.SQLITE_BUSY: (
        StoreLockedError,
        "has been locked by another process for too long.",
        "Try again, or end the process that locks it.",
    ),
    sqlite3.SQLITE_LOCKED: (StoreLockedError, "is locked by another connection.", "Try again."),
    sqlite3.SQLITE_NOTADB: (
        StoreDamagedError,
        "is not a SQLite database.",
        "Name another file with POLAR_LEDGER or --ledger.",
    ),
    sqlite3.SQLITE_CORRUPT: (
        StoreDamagedError,
        "is damaged.",
        "Restore it from a backup, or save what `sqlite3 FILE .recover` reads.",
    ),
    sqlite3.SQLITE_CONSTRAINT: (RecordRefusedError, "does not accept this content.", _CONTENT),
    sqlite3.SQLITE_TOOBIG: (RecordRefusedError, "does not accept content this large.", _CONTENT),
    sqlite3.SQLITE_IOERR: (StoreError, "cannot be read or written: input/output error.", "Check the disk."),
}

# SQLSTATE, the longest prefix wins: https://www.postgresql.org/docs/current/errcodes-appendix.html
_POSTGRES: Final[dict[str, tuple[type[StoreError], str, str]]] = {
    "22": (RecordRefusedError, "does not accept this content.", _CONTENT),
    "23": (RecordRefusedError, "does not accept this content.", _CONTENT),
    "25006": (StoreReadOnlyError, "cannot be written: the server is read-only.", _ELSEWHERE),
    "42501": (
        StoreReadOnlyError,
        "cannot be written by this role.",
        "Grant INSERT and SELECT on its tables.",
    ),
    "53100": (StoreFullError, "cannot take another record: the server's disk is full.", "Free some space."),
    "55P03": (StoreLockedError, "has been locked by another session for too long.", "Try again."),
    "40": (StoreLockedError, "gave way to another transaction.", "Try again."),
    "3D000": (StoreNotFoundError, "does not exist on the server.", "Create it with `createdb`."),
    "28": (StoreUnavailableError, "refuses the login.", "Check user and password."),
    "08": (StoreUnavailableError, "does not answer.", "Check that the server runs and can be reached."),
    "57": (StoreUnavailableError, "is shutting down or starting.", "Try again."),
    "XX": (StoreDamagedError, "reports damaged data.", "Look at the server's log."),
}


def is_absent(url: URL) -> bool:
    """True if the file of a ledger does not exist yet; if its folder is missing too, opening it raises."""
    file = sqlite_file(url)
    return file is not None and not _is(file.exists) and (_is(file.parent.is_dir) or file == default_file())


def _is(question: Callable[[], bool]) -> bool:
    """The answer about a path, False for one that no file can have, such as one that is too long."""
    try:
        return question()
    except (OSError, ValueError):
        return False


def default_file() -> Path:
    """The ledger of a user who does not name one."""
    return _true_path(user_data_path("polar", appauthor=False) / "ledger.sqlite3")


def _true_path(file: Path) -> Path:
    """The one path of a file, whatever name it is opened by.

    Absolute, so that a later change of the working directory does not move the ledger; without symbolic links, so that
    its spool is always the same.
    """
    return file.expanduser().resolve()


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
    if "\0" in text or any("\ud800" <= character <= "\udfff" for character in text):
        raise LedgerUrlError(
            f"ledger {text[:60]!r} is not a path or URL in UTF-8.", hint="Use a name that is valid UTF-8."
        )
    if "://" not in text:
        return URL.create("sqlite+pysqlite", database=str(_true_path(Path(text))))
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
    file = sqlite_file(url)
    return url if file is None else url.set(database=str(_true_path(file)))


def sqlite_file(url: URL) -> Path | None:
    """The file of a SQLite URL; None for a database in memory, a `file:` URI or a server."""
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


def is_overflow(error: BaseException | None) -> bool:
    """True for a sum of SQLite's that 64 bits do not hold, which has no code of its own."""
    return isinstance(error, sqlite3.OperationalError) and str(error) == "integer overflow"


def translate(error: BaseException | None, url: URL) -> StoreError:
    """Turn a driver's error into the store error that says what to do; `error` is the driver's own."""
    name = repr(describe(url))
    code = getattr(error, "sqlite_errorcode", None)
    if isinstance(code, int):
        primary = code & 0xFF  # the extended codes keep the primary one in the low byte
        if primary == sqlite3.SQLITE_CANTOPEN:
            return _cannot_open(url)
        if is_overflow(error):
            return StoreDamagedError(
                f"ledger {name} holds numbers that add up to more than 64 bits.", hint="See what `polar verify` finds."
            )
        known = _SQLITE.get(primary)
    elif url.get_backend_name() == "postgresql":
        state = getattr(error, "sqlstate", None) or ("22" if type(error).__name__ == "DataError" else None)
        if state is None:  # no connection was made, and the driver keeps the server's reason as text alone
            return StoreUnavailableError(
                f"ledger {name} cannot be reached ({_first_line(error)}).",
                hint="Check that the server runs, and the names of host, database and user.",
            )
        known = next((_POSTGRES[state[:n]] for n in (5, 2) if state[:n] in _POSTGRES), None)
    else:
        known = None
    if known is None:
        return StoreError(f"ledger {name} failed ({_first_line(error)}).", hint="Nothing was stored partially.")
    kind, what, hint = known
    return kind(f"ledger {name} {what}", hint=hint)


def _first_line(error: object) -> str:
    return " ".join(str(error).strip().partition("\n")[0].split())


def disk_full(url: URL, free: int, needed: int) -> StoreFullError:
    """The error for a disk with too little room, before anything was tried. Unit: bytes."""
    return StoreFullError(
        f"ledger {describe(url)!r} cannot take another record: {free:,} bytes free, {needed:,} needed.",
        hint="Free some space on that disk.",
    )


def _cannot_open(url: URL) -> StoreError:
    name = repr(describe(url))
    file = sqlite_file(url)
    if file is None:
        return StoreNotFoundError(f"ledger {name} cannot be opened.", hint="Check that the file exists.")
    if _is(file.is_dir):
        return StoreNotFoundError(f"ledger {name} is a folder, not a file.", hint="Name a file in it.")
    folder = file.parent
    if not _is(folder.is_dir):
        return StoreNotFoundError(
            f"ledger {name} cannot be created: folder {str(folder)!r} does not exist.",
            hint=f"Create it with `mkdir -p {folder}`.",
        )
    return StoreReadOnlyError(
        f"ledger {name} cannot be opened: permission denied in folder {str(folder)!r}.", hint=_ELSEWHERE
    )
