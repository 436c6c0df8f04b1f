"""Programs that fill layers inside vLLM, per request in one batch: a plugin for one minor version of it."""
