"""From a model to a certified router of its own in one run: plan, prompts, fills, menu, promises, page."""
