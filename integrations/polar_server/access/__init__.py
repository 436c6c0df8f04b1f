"""API keys, their rate limits, and replies to repeated requests."""
