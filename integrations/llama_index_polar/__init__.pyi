# The public names, each once: `__init__.py` loads them from here on first use.
from .callbacks import CallCosts as CallCosts
from .callbacks import CostTotals as CostTotals
from .callbacks import PolarCall as PolarCall
from .callbacks import get_polar_cost_callback as get_polar_cost_callback
from .llm import PolarLLM as PolarLLM

__all__: list[str]
