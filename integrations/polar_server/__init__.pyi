# The public names, each once: `__init__.py` loads them from here on first use.
from .app import build as build
from .errors import ApiError as ApiError
from .settings import Settings as Settings

__all__: list[str]
