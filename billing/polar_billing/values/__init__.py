"""Values of billing: money, periods, canonical JSON, values that are remembered. Knows no store and no price."""
