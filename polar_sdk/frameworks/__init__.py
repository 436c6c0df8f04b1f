"""What the model classes of frameworks share. Knows no framework."""
