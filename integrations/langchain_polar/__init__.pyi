# The public names, each once: `__init__.py` loads them from here on first use.
from .callbacks import CostTotals as CostTotals
from .callbacks import PolarCall as PolarCall
from .callbacks import PolarCostCallbackHandler as PolarCostCallbackHandler
from .callbacks import PolarTracer as PolarTracer
from .callbacks import get_polar_cost_callback as get_polar_cost_callback
from .chat_models import ChatPolar as ChatPolar
from .chat_models import register as register
from .llms import PolarLLM as PolarLLM

__all__: list[str]
