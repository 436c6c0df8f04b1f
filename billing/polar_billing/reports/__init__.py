"""Usage, reports, statements, price books and budgets, for people and for other programs."""
