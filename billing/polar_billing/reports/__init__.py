"""What people and other programs read: usage, reports, statements, price books, budgets."""
