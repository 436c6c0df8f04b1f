"""Keys of the prefix cache: no program reads keys and values that it would not have written itself.

The first block of a prompt is hashed with its program, and so all later ones are as well; the maps do not change while
the cache exists. A block with a token that the program runs rather than fills, because it belongs to the prompt's end
or to the answer, is hashed with the prompt's length: in a longer prompt, such as a chat's next turn, the same token is
filled.
"""

from __future__ import annotations

from typing import Any

from polar_sdk.programs.program import Program
from polar_vllm.settings import KEY


def program_keys(text: str, prompt: int, start: int, end: int) -> list[tuple[str, str]]:
    """The keys that a block of tokens from `start` to `end` is hashed with.

    Args:
        text: The program of its request; identity needs no keys, since it writes what others write.
        prompt: Length of the prompt. Unit: tokens.
        start: Position of the first token.
        end: Position after the last one.
    """
    program = Program.parse(text)
    if not program.tail:
        return []
    keys = [(KEY, program.text)] if start == 0 else []
    return [*keys, (KEY, str(prompt))] if end > prompt - program.tail else keys


def install() -> None:
    """Add the keys to those of vLLM, in this process, once.

    Raises:
        RuntimeError: vLLM does not hash with them: this is not the version that this package is made for.
    """
    from vllm.v1.core import block_pool, kv_cache_utils

    stock = kv_cache_utils.generate_block_hash_extra_keys
    if hasattr(stock, KEY):
        return

    def extra_keys(request: Any, start: int, end: int, first_media: int) -> Any:
        keys, media = stock(request, start, end, first_media)
        params = request.sampling_params
        text = (params.extra_args or {}).get(KEY) if params is not None else None
        if text is None:
            return keys, media
        ours = program_keys(text, request.num_prompt_tokens, start, end)
        return (*(keys or ()), *ours) or None, media

    setattr(extra_keys, KEY, True)
    kv_cache_utils.generate_block_hash_extra_keys = block_pool.generate_block_hash_extra_keys = extra_keys
    _test_itself(kv_cache_utils)


def _test_itself(utils: Any) -> None:
    """Refuse a vLLM that hashes blocks by another function than the one that was wrapped."""
    from types import SimpleNamespace

    def second_block(**extra: str) -> Any:
        request = SimpleNamespace(
            block_hashes=[b"0"], num_tokens=8, num_prompt_tokens=8, all_token_ids=list(range(8)), mm_features=[],
            lora_request=None, cache_salt=None, prompt_embeds=None, prompt_is_token_ids=None,
            sampling_params=SimpleNamespace(extra_args=extra),
        )  # fmt: skip
        return utils.get_request_block_hasher(4, lambda value: repr(value).encode())(request)

    if second_block() == second_block(**{KEY: "0 (1:2)"}):
        raise RuntimeError(
            "vLLM's prefix cache would mix programs: this version is not one that polar_vllm is made for."
        )
