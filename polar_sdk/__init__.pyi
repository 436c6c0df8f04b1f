# The public names, each once: `__init__.py` loads them from here on first use.
from .engine.sampling import TokenLogprobs as TokenLogprobs
from .errors import PolarError as PolarError
from .model import PolarModel as PolarModel
from .programs.policy import Policy as Policy
from .programs.policy import Tier as Tier
from .programs.program import Program as Program
from .request.generation import Chunk as Chunk
from .request.generation import Generation as Generation
from .request.options import Audits as Audits
from .router.base import IdentityRouter as IdentityRouter
from .router.base import Router as Router
from .router.base import StaticRouter as StaticRouter
from .router.layerwise import LayerwiseRouter as LayerwiseRouter
from .router.menu import MenuRouter as MenuRouter
from .sinks import JsonlSink as JsonlSink
from .usage import ListSink as ListSink
from .usage import NullSink as NullSink
from .usage import UsageRecord as UsageRecord
from .usage import UsageSink as UsageSink

__all__: list[str]
__version__: str
