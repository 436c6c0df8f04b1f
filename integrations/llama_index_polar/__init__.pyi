# The public name: `__init__.py` loads it from here on first use.
from .llm import PolarLLM as PolarLLM

__all__: list[str]
