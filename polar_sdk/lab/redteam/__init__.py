"""Attacks on routers: prompts that look easy to one and need depth, and what defences are worth against them."""
