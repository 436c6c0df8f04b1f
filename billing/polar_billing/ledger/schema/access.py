"""API keys, replies, and what keys have used of their limits.

* `polar_api_key`   what was decided of a key, append-only; its last row is in force. Its secret is stored as a hash
* `polar_reply`     one row per repeated request (`Idempotency-Key`) of a tenant: claimed while it is answered, then
                    with the answer, until it expires and is deleted. A copy of what was sent, so it is in no chain
* `polar_rate`      one row per key with a limit per minute: when what it used is full again
* `polar_running`   one row per key and replica that answers it: how many answers run there, until it expires

Knows no connection.
"""

from __future__ import annotations

from typing import Final

from sqlalchemy import CheckConstraint, Column, Index, Integer, LargeBinary, String, Table, Text, UniqueConstraint

from polar_billing.ledger.schema.base import SERIAL, TextMap, UtcMicroseconds, append_only, count, metadata

api_key_table: Final = Table(
    "polar_api_key",
    metadata,
    Column("seq", SERIAL, primary_key=True),
    Column("tenant", String(200), nullable=False),
    Column("key_id", String(16), nullable=False),
    Column("name", String(200), nullable=False),
    Column("secret_hash", String(64), nullable=False),  # SHA-256 of the secret, hexadecimal
    Column("tags", TextMap(), nullable=False),
    Column("scopes", Text, nullable=False),  # lists: names with a blank between them
    Column("models", Text, nullable=False),  # empty = any
    Column("tiers", Text, nullable=False),  # empty = any
    Column("max_tokens", Integer),
    Column("requests_per_minute", Integer),
    Column("tokens_per_minute", Integer),
    Column("parallel", Integer),
    Column("not_before", UtcMicroseconds, nullable=False),
    Column("expires_at", UtcMicroseconds),
    Column("rotated_from", String(16)),
    Column("revoked", Integer, nullable=False),  # 1 = from here on it opens nothing
    Column("set_at", UtcMicroseconds, nullable=False),
    Index("polar_api_key_by_id", "key_id", "seq"),
    sqlite_autoincrement=True,
)

reply_table: Final = Table(
    "polar_reply",
    metadata,
    Column("seq", SERIAL, primary_key=True),
    Column("tenant", String(200), nullable=False),
    Column("key_hash", String(64), nullable=False),  # SHA-256 of source and key, hexadecimal
    Column("fingerprint", String(64), nullable=False),  # of the request, to tell a repeated one from another
    Column("state", String(10), nullable=False),  # running, done
    Column("answer", LargeBinary),
    Column("claimed_at", UtcMicroseconds, nullable=False),
    Column("expires_at", UtcMicroseconds, nullable=False),
    UniqueConstraint("tenant", "key_hash", name="polar_reply_once"),
    Index("polar_reply_by_expiry", "expires_at"),
    CheckConstraint("(state = 'running') = (answer IS NULL)", name="polar_reply_state"),
    sqlite_autoincrement=True,
)

rate_table: Final = Table(
    "polar_rate",
    metadata,
    Column("key_id", String(16), primary_key=True),
    count("requests_full_at"),  # nanoseconds since 1970 when the minute's requests are all there again
    count("tokens_full_at"),
)

running_table: Final = Table(
    "polar_running",
    metadata,
    Column("key_id", String(16), primary_key=True),
    Column("replica", String(40), primary_key=True),
    count("answers"),
    Column("expires_at", UtcMicroseconds, nullable=False),
    Index("polar_running_by_expiry", "expires_at"),
)

append_only(api_key_table, same_row="seq = NEW.seq")
