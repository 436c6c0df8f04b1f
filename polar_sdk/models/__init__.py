"""From a model's name to weights in memory: find, fetch, check, convert, load. Knows no router and no request."""
