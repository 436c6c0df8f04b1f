"""From a model's name to weights in memory: find, fetch, check, load. Knows no router and no request."""
