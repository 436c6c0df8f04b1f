"""From a model to its own certified router in one run: plan, prompts, fills, menu, promises, page."""
