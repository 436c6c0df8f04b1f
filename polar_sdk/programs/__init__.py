"""Programs of layers: the program as a value, what it costs in FLOPs, and what bounds it. Knows no weights."""
