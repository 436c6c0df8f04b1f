"""A simulated day of a messaging service: full depth beside routed, or a soak; run `python -m benchmarks.day`."""
