"""Trains routers on measured rewards."""
