"""Common parts of the model classes of frameworks: settings, costs, tools and schemas. Knows no framework."""
