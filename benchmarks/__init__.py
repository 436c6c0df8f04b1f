"""Measurements and how to repeat them; the figures are in `results`, the decisions in `LOG.md`."""
