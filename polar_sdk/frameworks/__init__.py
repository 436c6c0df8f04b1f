"""What the model classes of frameworks share: settings, costs, tools and schemas. Knows no framework."""
