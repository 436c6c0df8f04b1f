"""Tables that decide whether a request may run: API keys, replies, the use of keys' limits, budgets, holds.

* `polar_api_key`   what was decided of a key, append-only; its last row is in force. Its secret is stored as a hash
* `polar_reply`     one row per repeated request (`Idempotency-Key`) of a tenant: claimed while it is answered, then
                    with the answer, until it expires and is deleted. A copy of what was sent, so it is in no chain
* `polar_rate`      one row per key with a limit per minute: when what it used is full again
* `polar_running`   one row per key and replica that answers it: how many answers run there, until it expires
* `polar_budget`    what was decided, append-only; the last row of a key is in force
* `polar_hold`      one row per request of a tenant with budgets: what it may use at most, how it was resolved,
                    and what it used; while it is held, only `expires_at` changes, and then it changes once, to
                    one of the three ends
* `polar_clock`     on SQLite, the clock that says when a hold expires: one row, see `polar_billing.ledger.clock`
* `polar_budget_counter`  spent and held per budget and window: a projection of the other tables and of the usage, which
                    can be dropped and is then rebuilt; its checks are the last line of defence

Amounts of a hold count 10^-12 of a currency or of a compute unit (a FLOP). A budget and its counters count
10^-`decimals`, so few that the limit fits a column a few times over. Knows no connection.
"""

from __future__ import annotations

from typing import Final

from sqlalchemy import CheckConstraint, Column, Index, Integer, LargeBinary, String, Table, Text, UniqueConstraint, text

from polar_billing.ledger.schema.base import (
    SERIAL,
    ScaledDecimal,
    TextMap,
    UtcMicroseconds,
    append_only,
    count,
    metadata,
    on_create,
)

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

budget_table: Final = Table(
    "polar_budget",
    metadata,
    Column("seq", SERIAL, primary_key=True),
    Column("tenant", String(200), nullable=False),
    Column("level", String(10), nullable=False),
    Column("name", String(200), nullable=False),  # of the project, user or key; empty on the tenant's own level
    Column("unit", String(3), nullable=False),  # a currency's code, or CU
    Column("time_window", String(10), nullable=False),
    count("limit_count"),
    Column("decimals", Integer, nullable=False),
    Column("zone", String(100), nullable=False),
    Column("over_budget", String(10), nullable=False),
    Column("closed", Integer, nullable=False),  # 1 = from here on no such budget
    Column("set_at", UtcMicroseconds, nullable=False),
    Index("polar_budget_by_scope", "tenant", "level", "name"),
    sqlite_autoincrement=True,
)

hold_table: Final = Table(
    "polar_hold",
    metadata,
    Column("seq", SERIAL, primary_key=True),
    Column("tenant", String(200), nullable=False),
    Column("source", String(200), nullable=False),
    Column("request_id", String(200), nullable=False),
    Column("attempt", Integer, nullable=False),  # 1, 2, … of the same request; only the last may be held
    Column("project", Text),
    Column("user_name", Text),
    Column("key_name", Text),
    Column("at", UtcMicroseconds, nullable=False),  # service time: which windows it counts in
    Column("fingerprint", String(64), nullable=False),  # of the bound, to tell a repeated call from another request
    Column("offer", Integer, nullable=False),
    Column("currency", String(3), nullable=False),
    Column("cost_bound", ScaledDecimal(), nullable=False),
    count("flops_bound"),
    Column("held_at", UtcMicroseconds, nullable=False),
    Column("expires_at", UtcMicroseconds, nullable=False),
    Column("state", String(10), nullable=False),  # held, settled, released, expired
    Column("resolved_at", UtcMicroseconds),
    Column("cost", ScaledDecimal()),  # what a settled one used
    Column("flops", SERIAL),
    UniqueConstraint("tenant", "source", "request_id", "attempt", name="polar_hold_once"),
    Index("polar_hold_by_tenant", "tenant", "at"),
    Index(
        "polar_hold_open",
        "tenant",
        "expires_at",
        sqlite_where=text("state = 'held'"),
        postgresql_where=text("state = 'held'"),
    ),
    CheckConstraint("state IN ('held', 'settled', 'released', 'expired')", name="polar_hold_state"),
    CheckConstraint("(state = 'held') = (resolved_at IS NULL)", name="polar_hold_resolved"),
    sqlite_autoincrement=True,
)

counter_table: Final = Table(
    "polar_budget_counter",
    metadata,
    Column("seq", SERIAL, primary_key=True),
    Column("tenant", String(200), nullable=False),
    Column("level", String(10), nullable=False),
    Column("name", String(200), nullable=False),
    Column("unit", String(3), nullable=False),
    Column("time_window", String(10), nullable=False),
    Column("starts", UtcMicroseconds, nullable=False),
    Column("ends", UtcMicroseconds, nullable=False),
    Column("decimals", Integer, nullable=False),
    count("spent"),
    count("held"),
    UniqueConstraint("tenant", "level", "name", "unit", "time_window", "starts", name="polar_budget_counter_once"),
    CheckConstraint("spent >= 0 AND held >= 0", name="polar_budget_counter_not_negative"),
)

clock_table: Final = Table(
    "polar_clock",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("boot", String(200), nullable=False),  # which boot of the machine
    count("ahead"),  # microseconds from the machine's clock since that boot to this clock
    CheckConstraint("id = 1", name="polar_clock_is_one"),
)

append_only(api_key_table, same_row="seq = NEW.seq")
append_only(budget_table, same_row="seq = NEW.seq")

_KEPT: Final = [column.name for column in hold_table.c if column.name != "expires_at"]


def _renew_then_resolve_once(dialect: str, same: str, when: str, refuse: str) -> None:
    """Attach the triggers of holds: a hold is renewed while it is held, resolved once, and then kept."""
    renewed = " AND ".join(f"NEW.{name} {same} OLD.{name}" for name in _KEPT)
    changed = f"NEW.cost_bound <> OLD.cost_bound OR (NEW.state = 'held' AND NOT ({renewed}))"
    rules = {"update": f"OLD.state <> 'held' OR {changed}", "delete": "OLD.state = 'held'"}
    for verb, rule in rules.items():
        trigger = f"CREATE TRIGGER polar_hold_once_{verb} BEFORE {verb.upper()} ON polar_hold"
        on_create(hold_table, dialect, f"{trigger} {when.format(rule)} {refuse}")


_renew_then_resolve_once("sqlite", "IS", "WHEN {}", "BEGIN SELECT RAISE(ABORT, 'polar_hold is resolved once'); END")
_renew_then_resolve_once(
    "postgresql", "IS NOT DISTINCT FROM", "FOR EACH ROW WHEN ({})", "EXECUTE FUNCTION polar_refuse_change()"
)
