"""Budgets and holds.

* `polar_budget`          what was decided, append-only; the last row of a key is in force
* `polar_hold`            one row per request of a tenant with budgets: what it may use at most, how it was resolved,
                          and what it used; while it is held, only `expires_at` changes, and then it changes once, to
                          one of the three ends
* `polar_clock`           on SQLite, the clock that says when a hold expires: one row, see `polar_billing.ledger.clock`
* `polar_budget_counter`  spent and held per budget and window: a projection of the other tables and of the usage, which
                          can be dropped and is then rebuilt; its checks are the last line of defence

Amounts of a hold count 10^-12 of a currency or of a compute unit (a FLOP). A budget and its counters count
10^-`decimals`, so few that the limit fits a column a few times over. Knows no connection.
"""

from __future__ import annotations

from typing import Final

from sqlalchemy import CheckConstraint, Column, Index, Integer, String, Table, Text, UniqueConstraint, text

from polar_billing.ledger.schema.base import (
    SERIAL,
    ScaledDecimal,
    UtcMicroseconds,
    append_only,
    count,
    metadata,
    on_create,
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
