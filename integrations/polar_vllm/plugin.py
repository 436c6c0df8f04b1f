"""The plugin that vLLM calls in each of its processes, by the entry point `vllm.general_plugins`.

Requests without a program are not changed, and without a setting none can have one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from polar_vllm import cache_keys
from polar_vllm.counts import End
from polar_vllm.settings import KEY, VERSION, Settings

if TYPE_CHECKING:
    from collections.abc import Callable

ENDS: Final = "polar_ends"
"""What the scheduler tells the workers with a pass: which requests have ended since the last one, and how."""


def register() -> None:
    """Let requests name programs, in this process."""
    import vllm
    from vllm.v1.engine.input_processor import InputProcessor

    if not vllm.__version__.startswith(VERSION) or hasattr(InputProcessor, KEY):
        return
    cache_keys.install()
    _tell_ends()
    stock = InputProcessor._build_logits_processors_params_validator

    def validator(processor: Any) -> Callable[[Any], None]:
        check, settings = stock(processor), Settings.of(processor.vllm_config)
        depth = processor.model_config.get_total_num_hidden_layers()

        def checked(params: Any) -> None:
            check(params)
            settings.check_request(params, depth)

        return checked

    InputProcessor._build_logits_processors_params_validator = validator
    setattr(InputProcessor, KEY, True)


def check_registered() -> None:
    """Refuse to run programs where the plugin is not registered in this process.

    Raises:
        ValueError: This is another version of vLLM, or its setting leaves the plugin out.
    """
    import vllm
    from vllm.v1.engine.input_processor import InputProcessor

    if not vllm.__version__.startswith(VERSION):
        raise ValueError(f"polar_vllm is made for vLLM {VERSION}*, and this is {vllm.__version__}; install that one.")
    if not hasattr(InputProcessor, KEY):
        raise ValueError(f"VLLM_PLUGINS leaves {KEY!r} out, which checks and caches requests; name it there.")


def _tell_ends() -> None:
    """Have the scheduler say with each pass which requests have ended."""
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.request import RequestStatus

    free, schedule = Scheduler._free_request, Scheduler.schedule

    def freed(scheduler: Any, request: Any, *args: Any, **options: Any) -> Any:
        ended = End(request.num_output_tokens, request.status == RequestStatus.FINISHED_ABORTED)
        vars(scheduler).setdefault(ENDS, {})[request.request_id] = ended
        return free(scheduler, request, *args, **options)

    def scheduled(scheduler: Any, *args: Any, **options: Any) -> Any:
        output = schedule(scheduler, *args, **options)
        setattr(output, ENDS, vars(scheduler).pop(ENDS, {}))
        return output

    Scheduler._free_request, Scheduler.schedule = freed, scheduled
