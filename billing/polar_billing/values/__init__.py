"""Values of billing: money, periods, canonical JSON, what is remembered. Knows no store and no price."""
