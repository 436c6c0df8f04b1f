"""Attacks on routers: prompts that look easy to one but need depth, and how much defences help against them."""
