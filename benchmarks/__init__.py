"""Measurements and how to repeat them; the figures are in `results`, the lessons in `LOG.md`."""
