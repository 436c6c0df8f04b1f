"""Certifies and evaluates routers."""
