"""Suites: known sets of problems with right answers, and what every tier makes of them."""
