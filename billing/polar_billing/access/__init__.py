"""Who may ask a server, in whose name, and what it has answered already: API keys and replies to repeated requests."""
