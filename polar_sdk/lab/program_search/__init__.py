"""Searches programs for several budgets and picks the menu a router chooses from."""
