"""From a model's name to weights in memory: find, fetch, check, convert, load.

It knows no router, no request and no money.

`import polar_sdk.loading` imports neither torch nor transformers; loading does.
"""

from polar_sdk.loading.aliases import ALIASES, DEFAULT_ALIAS, MODEL_VARIABLE, Alias, resolve
from polar_sdk.loading.fingerprint import fingerprint_of
from polar_sdk.loading.load import LoadedModel, clear_cache, load_pretrained
from polar_sdk.loading.paths import CACHE_VARIABLE, cache_folder
from polar_sdk.loading.place import choose_device, choose_precision

__all__ = [
    "ALIASES",
    "CACHE_VARIABLE",
    "DEFAULT_ALIAS",
    "MODEL_VARIABLE",
    "Alias",
    "LoadedModel",
    "cache_folder",
    "choose_device",
    "choose_precision",
    "clear_cache",
    "fingerprint_of",
    "load_pretrained",
    "resolve",
]
