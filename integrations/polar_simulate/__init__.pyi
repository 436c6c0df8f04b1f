# The public names, each once: `__init__.py` loads them from here on first use.
from .capacity import Speed as Speed
from .capacity import measure_capacity as measure_capacity
from .comparison import Comparison as Comparison
from .comparison import compare as compare
from .day import Arrival as Arrival
from .day import Day as Day
from .prompt_file import read_prompts as read_prompts
from .soak import Soaked as Soaked
from .soak import soak as soak
from .trial import Trial as Trial

__all__: list[str]
