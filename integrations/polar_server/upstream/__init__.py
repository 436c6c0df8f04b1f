"""Tiers that another server computes: a vLLM, or any other with OpenAI's API, that runs an exported program."""
