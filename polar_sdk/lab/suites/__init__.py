"""Suites: known sets of problems with right answers, and how every tier does on them."""
