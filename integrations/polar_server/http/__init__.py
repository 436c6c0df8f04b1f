"""HTTP without the API: exchanges, what every call passes, and the operations page."""
