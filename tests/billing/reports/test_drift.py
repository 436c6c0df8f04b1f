"""What tiers saved by kind and length is what their records say, on each database."""

from __future__ import annotations

import random
from collections import defaultdict
from decimal import Decimal
from typing import TYPE_CHECKING, Any

from polar_billing.ledger.records import ALL_TENANTS, Selection
from polar_billing.metering.meter import Meter
from polar_billing.reports.drift import saved_by
from polar_billing.testing import usage_record

if TYPE_CHECKING:
    from polar_billing.ledger.ledger import Ledger

LENGTHS = (128, 512, 2_048)


def test_savings_are_those_of_the_records(store: Ledger) -> None:
    chance = random.Random(3)
    paths = {"economy": (0, 1, 5), "standard": (0, 1, 2, 4, 5), "exact": (0, 1, 2, 3, 4, 5)}
    sums: defaultdict[tuple[Any, ...], list[int]] = defaultdict(lambda: [0, 0, 0])
    records = []
    for _ in range(60):
        tier, kind = chance.choice(list(paths)), chance.choice(("code", 'a "quoted" kind', None))
        prompt = chance.choice((1, 128, 129, 512, 3_000))
        tags = {} if kind is None else {"team kind": kind}
        record = usage_record(tier=tier, path=paths[tier], prompt=prompt, tags=tags)
        key = (tier, kind, next((most for most in LENGTHS if prompt <= most), None))
        for place, value in enumerate((1, record.flops.total, record.identity_flops)):
            sums[key][place] += value
        records.append(record)
    Meter(store).emit_many([*records, usage_record(tier=None)])
    certified = {"economy": Decimal("0.4"), "standard": Decimal("0.1"), "other": Decimal("0.2")}
    with store.snapshot() as connection:
        found = saved_by(connection, Selection(ALL_TENANTS), "team kind", certified)
    said = {(one.tier, one.kind, one.tokens_max): [one.requests, one.flops, one.identity_flops] for one in found}
    assert said == dict(sums)
    beyond = {one.tier: (one.next_tier, one.next_saved) for one in found}
    assert beyond == {"economy": (None, None), "standard": ("other", Decimal("0.2")), "exact": (None, None)}
    assert all(abs(float(one.saved) - (1 - one.flops / one.identity_flops)) < 1e-6 for one in found)
