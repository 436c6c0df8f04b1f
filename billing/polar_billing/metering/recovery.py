"""Store what processes that have ended left in the spool, exactly once, and say what still waits.

The ledger knows every request it holds, so a file that was stored in part, or twice at once, adds nothing twice. Knows
no threads.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Final

from polar_billing.errors import BillingError, RecordRefusedError, StoreError
from polar_billing.metering.spool import Spool, spool_folder

if TYPE_CHECKING:
    from polar_billing.ledger.contract import Entry, StoredUsage
    from polar_billing.ledger.ledger import Ledger
    from polar_billing.metering.spool import Unfinished


_log: Final = logging.getLogger("polar_billing")
_AT_ONCE: Final = 1_000


def store(ledger: Ledger, spool: Spool | None, entries: list[Entry]) -> list[StoredUsage | BillingError]:
    """Store records; what the ledger refuses for its content is kept aside and keeps no other out.

    Raises:
        StoreError: The ledger cannot take records now.
    """
    try:
        answers: list[StoredUsage | BillingError] = list(ledger.append_many(entries))
    except RecordRefusedError:  # of one of them; the others are to be stored
        answers = [_store_one(ledger, entry) for entry in entries]
    pairs = zip(entries, answers, strict=True)
    refused = [entry for entry, answer in pairs if isinstance(answer, BillingError)]
    for entry in refused:
        _log.error("the ledger refused request %r of tenant %r", entry.record.request_id, entry.record.tenant)
    if spool is not None and refused:
        spool.reject(refused)
    return answers


def _store_one(ledger: Ledger, entry: Entry) -> StoredUsage | BillingError:
    try:
        return ledger.append_many([entry])[0]
    except RecordRefusedError as error:
        return error


def store_file(ledger: Ledger, spool: Spool, file: Unfinished) -> None:
    """Store a file of the spool and delete it.

    Raises:
        StoreError: The ledger cannot take records now; the file stays.
    """
    entries = file.entries()
    for start in range(0, len(entries), _AT_ONCE):
        store(ledger, spool, entries[start : start + _AT_ONCE])
    file.remove()


def recover_abandoned(ledger: Ledger) -> None:
    """Store what processes that have ended left; where the ledger cannot take it now, it stays."""
    folder = spool_folder(ledger.url)
    if folder is None or not folder.is_dir():
        return
    spool = Spool(folder)
    try:
        for file in spool.abandoned():
            store_file(ledger, spool, file)
        spool.close()  # removes the folder where nothing is left in it
    except (StoreError, OSError) as error:
        _log.warning("what waits in the spool %s cannot be stored now (%s)", folder, error)


def warning_of(ledger: Ledger) -> str | None:
    """What a reader of this ledger should know about its spool; None where nothing waits."""
    folder = spool_folder(ledger.url)
    if folder is None or not folder.is_dir():
        return None
    status = Spool(folder).status()
    told = [f"{status.waiting:,} request(s) wait to be stored"] if status.waiting else []
    told += [f"{status.rejected:,} were refused as conflicts"] if status.rejected else []
    told += [f"{status.damaged:,} line(s) are damaged"] if status.damaged else []
    return f"spool {str(folder)!r}: {', '.join(told)}." if told else None
