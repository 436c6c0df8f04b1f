"""Price books: read, dated, in force; rating and quotes. Knows no stored usage."""
