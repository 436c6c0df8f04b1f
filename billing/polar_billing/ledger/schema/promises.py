"""Audits of answers, the state of each promise that they test, and which alerts were sent.

* `polar_audit`    one row per audited answer and promise: a fact, in the chain of the tenant whose request it was
* `polar_standing` one row each time that the state of a promise changed, with the audit that changed it. It follows
                   from the audits in the order of their numbers, which `verify` computes again
* `polar_monitor`  one row per promise: its monitor after the last audit, so that no start has to read them all.
                   It follows from the audits too
* `polar_alert`    one row per change sent to a webhook: when it is due next, and how that went

Audits are numbered while the chain of no tenant is locked, so that a higher number is never seen before a lower one.
Knows no connection.
"""

from __future__ import annotations

from typing import Final

from sqlalchemy import BigInteger, CheckConstraint, Column, ForeignKey, Index, Integer, String, Table, Text
from sqlalchemy import UniqueConstraint as Unique

from polar_billing.ledger.schema.base import SERIAL, UtcMicroseconds, append_only, count, metadata

audit_table: Final = Table(
    "polar_audit",
    metadata,
    Column("seq", SERIAL, primary_key=True),
    Column("tenant", String(200), nullable=False),  # whose request it was; not who paid for the audit
    Column("audit_id", String(36), nullable=False),  # the idempotency key
    Column("source", String(200), nullable=False),
    Column("request_id", String(200), nullable=False),
    Column("tier", String(200), nullable=False),
    Column("promise", String(64), nullable=False),
    Column("loss", String(20), nullable=False),  # what counts as lost
    Column("alpha", Text, nullable=False),  # shares as the shortest decimal that reads back as the same float
    Column("delta", Text, nullable=False),
    Column("lost", Integer, nullable=False),  # 1 = lost
    count("compared"),
    count("kept"),
    count("weight"),  # 10^-12
    count("prompt_tokens"),
    count("flops"),
    Column("audit_request_id", String(200)),  # the usage record that paid for it; null where nothing ran
    Column("at", UtcMicroseconds, nullable=False),
    Column("stored_at", UtcMicroseconds, nullable=False),
    Unique("audit_id", name="polar_audit_once"),
    Unique("tenant", "source", "request_id", "promise", name="polar_audit_of_request"),
    Index("polar_audit_by_promise", "promise", "seq"),
    Index("polar_audit_by_tier", "tenant", "tier", "at"),
    CheckConstraint("lost IN (0, 1)", name="polar_audit_lost"),
    sqlite_autoincrement=True,
)

standing_table: Final = Table(
    "polar_standing",
    metadata,
    Column("seq", SERIAL, primary_key=True),
    Column("promise", String(64), nullable=False),
    Column("tier", String(200), nullable=False),
    Column("state", String(20), nullable=False),
    count("audits"),  # of the promise, when the state began
    count("losses"),
    Column("audit_seq", BigInteger, nullable=False),  # the audit that changed it
    Column("since", UtcMicroseconds, nullable=False),
    Column("reason", Text, nullable=False),
    Unique("audit_seq", name="polar_standing_once"),
    Index("polar_standing_by_promise", "promise", "seq"),
    sqlite_autoincrement=True,
)

monitor_table: Final = Table(
    "polar_monitor",
    metadata,
    Column("promise", String(64), primary_key=True),
    Column("audit_seq", BigInteger, nullable=False),  # the last audit that it has read
    Column("monitor", Text, nullable=False),  # as `Monitor.text` writes it
)

alert_table: Final = Table(
    "polar_alert",
    metadata,
    Column("standing_seq", SERIAL, ForeignKey("polar_standing.seq"), primary_key=True, autoincrement=False),
    Column("sent", Integer, nullable=False),  # 1 = the webhook has taken it
    Column("attempts", Integer, nullable=False),
    Column("due_at", UtcMicroseconds, nullable=False),  # when it is tried next, unless it was sent
    Column("answer", Text),  # how the last attempt went, in words
)

append_only(
    audit_table,
    same_row="seq = NEW.seq OR audit_id = NEW.audit_id OR (tenant = NEW.tenant AND source = NEW.source AND "
    "request_id = NEW.request_id AND promise = NEW.promise)",
)
append_only(standing_table, same_row="seq = NEW.seq OR audit_seq = NEW.audit_seq")
