"""Programs of layers: the program as a value, what it costs in FLOPs, and its limits. Knows no weights."""
