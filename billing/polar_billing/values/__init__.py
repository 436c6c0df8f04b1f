"""Values of billing: money, periods, canonical JSON, cached values. Knows no store and no price."""
