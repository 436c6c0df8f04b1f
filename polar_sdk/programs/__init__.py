"""Programs of layers: the program as a value, what it costs, and what bounds it. Knows no weights."""
