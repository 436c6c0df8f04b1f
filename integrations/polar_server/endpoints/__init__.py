"""The endpoints that answer: completions and responses, quotes, usage and receipts."""
