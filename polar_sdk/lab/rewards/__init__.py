"""Rewards: the effect of a program on a prompt, measured once and kept."""
