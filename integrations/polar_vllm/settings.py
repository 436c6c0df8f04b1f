"""Settings of a server that runs programs: `--additional-config '{"polar": {"fills": ["FOLDER", …]}}'`."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from polar_sdk.errors import MapError, PolarError
from polar_sdk.models.fingerprint import source_fingerprint
from polar_vllm.fills import Fills
from polar_vllm.plan import program_of

if TYPE_CHECKING:
    from polar_sdk.programs.program import Program

KEY: Final = "polar"
"""In `--additional-config`; and in the `vllm_xargs` of a request, where it is the text of its program."""
DIGEST_KEY: Final = "polar_fills"
"""In `vllm_xargs`, the digest of the fills that the program is meant with; optional."""
WORKER: Final = "polar_vllm.worker.Worker"
EXAMPLE: Final = f"""'{{"{KEY}": {{"fills": ["FOLDER"]}}}}'"""
VERSION: Final = "0.32."
"""Beginning of the versions of vLLM that this package is made for."""
ARCHITECTURES: Final = frozenset({"LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"})


@dataclass(frozen=True)
class Settings:
    """The settings that a server runs programs with.

    Attributes:
        fills: Its maps; None if it runs no programs.
    """

    fills: Fills | None

    @classmethod
    def of(cls, config: Any) -> Settings:
        """Those of a configuration of vLLM.

        Raises:
            ValueError: They are no settings, or cannot be read.
        """
        given = config.additional_config.get(KEY) if isinstance(config.additional_config, dict) else None
        if given is None or config.parallel_config.worker_cls != WORKER:
            return cls(None)
        folders = given.get("fills") if isinstance(given, dict) else None
        if not isinstance(folders, list) or not folders or not all(isinstance(each, str) for each in folders):
            raise ValueError(
                f"--additional-config: {KEY!r} is {given!r}; write {EXAMPLE}, with folders that `polar lab heal` wrote."
            )
        return cls(_read(tuple(folders)))

    def program(self, text: Any, depth: int) -> Program:
        """The program that a request names.

        Raises:
            ValueError: It cannot run here.
        """
        if self.fills is None:
            raise ValueError(
                f"vllm_xargs names a program ({KEY}), but this server runs none: start it with --worker-cls {WORKER} "
                f"and --additional-config {EXAMPLE}."
            )
        if not isinstance(text, str):
            raise ValueError(f"vllm_xargs: {KEY} is {text!r}, not the text of a program, such as '0-22 (23-29:16)'.")
        try:
            return program_of(text, depth, self.fills.maps.keys())
        except PolarError as error:
            raise ValueError(str(error)) from error

    def check_request(self, params: Any, depth: int) -> None:
        """Refuse a request that cannot be answered under its program.

        Raises:
            ValueError: It says why.
        """
        extra = params.extra_args or {}
        if KEY not in extra:
            return
        program = self.program(extra[KEY], depth)
        assert self.fills is not None, "or no program had been read"
        if (digest := extra.get(DIGEST_KEY, self.fills.digest)) != self.fills.digest:
            raise ValueError(
                f"vllm_xargs: {DIGEST_KEY} is {digest!r}, but this server fills by {self.fills.digest[:12]}…; request "
                "its digests again."
            )
        if program.tail and params.prompt_logprobs is not None:
            raise ValueError(
                f"prompt_logprobs need the states of all prompt tokens, of which program {program.text!r} fills some; "
                "leave prompt_logprobs out, or the program."
            )

    def check_server(self, config: Any) -> dict[str, str]:
        """Refuse a server that cannot run programs.

        Returns:
            The fingerprint of its `model`, and the digest of its `fills`.

        Raises:
            ValueError: It says which option is in the way, or that the maps are another model's.
        """
        if self.fills is None:
            raise ValueError(f"--worker-cls {WORKER} needs fills: --additional-config {EXAMPLE}.")
        parallel, speculative = config.parallel_config, config.speculative_config
        obstacles = {
            f"architecture {' '.join(config.model_config.architectures)}": not ARCHITECTURES.issuperset(
                config.model_config.architectures
            ),
            "--pipeline-parallel-size": parallel.pipeline_parallel_size > 1,
            "--data-parallel-size": parallel.data_parallel_size > 1,
            "--decode-context-parallel-size": parallel.decode_context_parallel_size > 1,
            "--enable-dbo": parallel.use_ubatching,
            "--enable-lora": config.lora_config is not None,
            "--kv-transfer-config": config.kv_transfer_config is not None,
            "--enable-prompt-embeds": config.model_config.enable_prompt_embeds,
            "--kv-sharing-fast-prefill": config.cache_config.kv_sharing_fast_prefill,
            "speculation other than ngram": speculative is not None and not speculative.use_ngram(),
            "the V2 model runner; set VLLM_USE_V2_MODEL_RUNNER=0": config.use_v2_model_runner,
        }
        if found := [name for name, is_there in obstacles.items() if is_there]:
            raise ValueError(f"polar_vllm does not run with {found[0]}; leave it out, or --worker-cls {WORKER}.")
        model = source_fingerprint(Path(config.model_config.model))
        if self.fills.fingerprint != model:
            raise ValueError(
                f"the fills were fitted on model {self.fills.fingerprint[:12]}…, not on the one in "
                f"{config.model_config.model} ({model[:12]}…); make its folder by `polar export`, or fit fills for it."
            )
        return {"model": model, "fills": self.fills.digest}


@lru_cache(maxsize=2)
def _read(folders: tuple[str, ...]) -> Fills:
    try:
        return Fills.read(folders)
    except MapError as error:
        raise ValueError(str(error)) from error
