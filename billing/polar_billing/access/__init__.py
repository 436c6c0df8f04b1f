"""Access to a server: API keys, and replies to repeated requests."""
