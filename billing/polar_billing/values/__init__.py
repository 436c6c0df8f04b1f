"""Values of billing: money, periods, canonical JSON, tiers. Knows no store and no price."""
