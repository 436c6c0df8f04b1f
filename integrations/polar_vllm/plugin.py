"""The plugin that vLLM calls in each of its processes, by the entry point `vllm.general_plugins`.

Requests that name no program are left as they are, and without a setting none can name one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from polar_vllm import cache_keys
from polar_vllm.settings import Settings, check_version

if TYPE_CHECKING:
    from collections.abc import Callable


def register() -> None:
    """Let requests name programs, in this process."""
    import vllm
    from vllm.v1.engine.input_processor import InputProcessor

    if not check_version(vllm.__version__) or hasattr(InputProcessor, "polar"):
        return
    cache_keys.install()
    stock = InputProcessor._build_logits_processors_params_validator

    def validator(processor: Any) -> Callable[[Any], None]:
        check, settings = stock(processor), Settings.of(processor.vllm_config)
        depth = processor.model_config.get_total_num_hidden_layers()

        def checked(params: Any) -> None:
            check(params)
            settings.check_request(params, depth)

        return checked

    InputProcessor._build_logits_processors_params_validator = validator
    InputProcessor.polar = True
