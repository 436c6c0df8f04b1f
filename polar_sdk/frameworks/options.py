"""One table of the options of a request: the name of each on every surface, and its names in other libraries.

The server and the frameworks' model classes read the other names here; `docs/options.md` is generated from it, and a
test compares it with every surface. Knows no framework.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Mapping

SURFACES: Final[Mapping[str, str]] = {
    "engine": "PolarModel",
    "chat": "ChatPolar",
    "llm": "PolarLLM (LangChain)",
    "llama_index": "PolarLLM (LlamaIndex)",
    "completions_chat": "chat completions",
    "completions": "completions",
    "responses": "responses",
    "command": "polar run",
}
_HTTP: Final = ("completions_chat", "completions", "responses")
_CLASSES: Final = ("chat", "llm", "llama_index")


@dataclass(frozen=True, kw_only=True)
class Option:
    """One option.

    Attributes:
        name: Its name in the engine.
        meaning: One line.
        spelt: Surface → its name there, if different.
        absent: Surface → why it is missing there.
        http: Names in other servers, which work over HTTP.
        classes: Names in other model classes, which work in ours.
    """

    name: str
    meaning: str
    spelt: Mapping[str, str] = field(default_factory=dict)
    absent: Mapping[str, str] = field(default_factory=dict)
    http: tuple[str, ...] = ()
    classes: tuple[str, ...] = ()

    def on(self, surface: str) -> str | None:
        """Its name on a surface; None if it is missing there."""
        return None if surface in self.absent else self.spelt.get(surface, self.name)


def _everywhere(surfaces: tuple[str, ...], name: str) -> dict[str, str]:
    return dict.fromkeys(surfaces, name)


_BY_KEY: Final = _everywhere(_HTTP, "the API key determines it")
_BY_HAND: Final = {"command": "only from Python"}
_CHAT_ONLY: Final = _everywhere(("llm", "completions", "command", "engine"), "only for chats")
_ONE_ANSWER: Final = {"llama_index": "its responses hold one answer", "engine": "use `generate_batch`"}
_NO_FIGURES: Final = {"command": "only from Python"}

OPTIONS: Final[tuple[Option, ...]] = (
    Option(name="compute", meaning="tier or tolerance"),
    Option(name="program", meaning="a program by hand"),
    Option(
        name="max_tokens",
        meaning="maximum number of answer tokens",
        spelt={"responses": "max_output_tokens"},
        http=("n_predict", "num_predict", "max_new_tokens"),
        classes=("num_predict", "max_completion_tokens", "max_new_tokens"),
    ),
    Option(name="temperature", meaning="sampling temperature; 0 is greedy"),
    Option(name="top_p", meaning="samples from the likeliest tokens with this total probability"),
    Option(name="top_k", meaning="samples from the N likeliest tokens"),
    Option(name="min_p", meaning="minimum probability of a token, relative to the likeliest"),
    Option(name="seed", meaning="makes sampling repeatable"),
    Option(name="stop", meaning="texts that end an answer", classes=("stop_sequences",)),
    Option(name="presence_penalty", meaning="subtracted from the logits of tokens in the answer"),
    Option(name="frequency_penalty", meaning="the same, once per occurrence"),
    Option(
        name="repetition_penalty",
        meaning="divides the logits of tokens in prompt and answer",
        http=("repeat_penalty",),
        classes=("repeat_penalty",),
    ),
    Option(name="logit_bias", meaning="added to the logits of tokens", absent=_BY_HAND),
    Option(name="stop_repeats", meaning="ends an answer that repeats itself N times"),
    Option(name="ignore_eos", meaning="keeps the model from ending its answer"),
    Option(
        name="schema",
        meaning="JSON schema that the answer must match",
        spelt={**_everywhere((*_CLASSES, *_HTTP), "json_schema")},
        http=("guided_json", "structured_outputs.json"),
    ),
    Option(
        name="regex",
        meaning="regular expression that the answer must match",
        http=("guided_regex", "structured_outputs.regex"),
    ),
    Option(
        name="choice",
        meaning="texts of which the answer must be one",
        http=("guided_choice", "structured_outputs.choice"),
    ),
    Option(
        name="grammar",
        meaning="Lark or GBNF grammar that the answer must match",
        absent=_BY_HAND,
        http=("guided_grammar", "structured_outputs.grammar"),
    ),
    Option(name="fit_max_tokens", meaning="steers the answer to end within `max_tokens`", absent=_BY_HAND),
    Option(name="speculate", meaning="whether tokens are drafted"),
    Option(
        name="logprobs",
        meaning="log-probabilities of the answer's tokens, with N alternatives",
        spelt={"responses": "include"},
        absent=_NO_FIGURES,
        classes=("top_logprobs",),
    ),
    Option(
        name="prompt_logprobs",
        meaning="the same for the prompt",
        absent={**_everywhere(_CLASSES, "frameworks have no field for it"), "responses": "the API has no field for it"}
        | _NO_FIGURES,
    ),
    Option(
        name="n",
        meaning="number of answers",
        absent={**_ONE_ANSWER, "responses": "the API returns one answer", "command": "run it again"},
    ),
    Option(
        name="tools",
        meaning="functions that may be called; in PolarModel, functions that the prompt shows",
        absent={surface: why for surface, why in _CHAT_ONLY.items() if surface != "engine"},
    ),
    Option(name="tool_choice", meaning="whether a function is called, and which", absent=_CHAT_ONLY),
    Option(name="parallel_tool_calls", meaning="allows several calls in one answer", absent=_CHAT_ONLY),
    Option(
        name="response_format",
        meaning="JSON or a JSON schema, in OpenAI's format",
        spelt={"responses": "text"},
        absent=_CHAT_ONLY,
    ),
    Option(
        name="template",
        meaning="whether the chat template is used",
        spelt={"llama_index": "formatted", "command": "raw"},
        absent={"chat": "always used for messages", **_everywhere(_HTTP, "the endpoint determines it")},
    ),
    Option(
        name="timeout",
        meaning="maximum time of an answer",
        absent={**_everywhere(_HTTP, "`polar serve --timeout 60`"), "command": "Ctrl-C ends it"},
        classes=("request_timeout",),
    ),
    Option(
        name="logits_hook",
        meaning="a function that changes the logits",
        absent=_everywhere((*_CLASSES, *_HTTP, "command"), "use a `PolarModel`, which model classes take as `engine=`"),
    ),
    Option(name="tenant", meaning="who is billed", absent=_BY_KEY),
    Option(
        name="tags",
        meaning="labels on the usage record",
        spelt={**_everywhere(_CLASSES, "usage_tags"), "command": "tag"},
    ),
    Option(
        name="request_id",
        meaning="idempotency key of the record",
        absent=_everywhere(_HTTP, "the header `Idempotency-Key`"),
    ),
    Option(
        name="cancel",
        meaning="ends the request",
        absent={
            **_everywhere(_CLASSES, "close the stream, or cancel the task"),
            **_everywhere(_HTTP, "close the connection"),
            "command": "Ctrl-C ends it",
        },
    ),
)

HTTP_NAMES: Final[Mapping[str, str]] = {
    alias: option.on("completions_chat") or option.name
    for option in OPTIONS
    for alias in option.http
    if "." not in alias
}
"""Field of another server → ours."""
CLASS_NAMES: Final[Mapping[str, str]] = {
    **{alias: option.name for option in OPTIONS for alias in option.classes},
    "model_name": "model",
    "model_id": "model",
}
"""Setting of another model class → ours."""

INSTEAD: Final[Mapping[str, str]] = {
    "num_ctx": "the context window is the model's; limit the memory of keys and values with kv_memory=",
    "keep_alive": "weights stay loaded as long as the process; leave it out",
    "num_gpu": "place the weights with device= or device_map=",
    "num_thread": "set OMP_NUM_THREADS before the process starts",
    "base_url": "the model runs in this process; for a server, use ChatOpenAI(base_url=…)",
    "openai_api_base": "the model runs in this process; for a server, use ChatOpenAI(base_url=…)",
    "format": "use with_structured_output, json_schema= or response_format",
    "mirostat": "it is not implemented; use top_p= or min_p=",
    "tfs_z": "it is not implemented; use top_p= or min_p=",
    "typical_p": "it is not implemented; use top_p= or min_p=",
    "reasoning_effort": "this engine has no reasoning separate from the answer; leave it out",
    "reasoning": "this engine has no reasoning separate from the answer; leave it out",
    "service_tier": "name a tier with compute=",
    "model_kwargs": "pass its entries as separate settings",
    "extra_body": "pass its entries as separate settings",
    "best_of": "answers are not compared; use n=",
}
"""Settings of other model classes that ours lacks, and what to use."""

_SAMPLED: Final = "sampling has temperature, top_p, top_k and min_p"
_SHOWN: Final = "special tokens are not shown"
_TEMPLATE: Final = "the model's own chat template is used"
NEUTRAL: Final[Mapping[str, tuple[tuple[Any, ...], str]]] = {
    "use_beam_search": ((False,), "this engine samples, or chooses the likeliest token."),
    "length_penalty": ((1, 1.0), "there is no beam search."),
    "early_stopping": ((False,), "there is no beam search."),
    "min_tokens": ((0,), "an answer may end at any token; see ignore_eos."),
    "stop_token_ids": (([],), "texts end an answer, not tokens: use stop."),
    "bad_words": (([],), "forbid tokens with logit_bias."),
    "allowed_token_ids": (([],), "restrict an answer with choice, regex or grammar."),
    "skip_special_tokens": ((True,), f"{_SHOWN}."),
    "spaces_between_special_tokens": ((True, False), f"{_SHOWN}."),
    "include_stop_str_in_output": ((False,), "a stop string is not part of an answer."),
    "add_generation_prompt": ((True,), f"{_TEMPLATE}, for an answer."),
    "continue_final_message": ((False,), "an answer is a new message; use /v1/completions."),
    "add_special_tokens": ((False,), f"{_TEMPLATE}."),
    "chat_template": ((), f"{_TEMPLATE}."),
    "chat_template_kwargs": (({},), f"{_TEMPLATE}."),
    "documents": (([],), f"{_TEMPLATE}; put them into a message."),
    "mm_processor_kwargs": (({},), "this engine reads text only."),
    "truncate_prompt_tokens": ((), "a prompt that is too long is refused; shorten it."),
    "priority": ((0,), "tenants share the engine evenly."),
    "return_token_ids": ((False,), "ask for logprobs."),
    "return_tokens_as_token_ids": ((False,), "tokens are shown as text."),
    "disable_any_whitespace": ((True, False), "JSON is written on one line."),
    "disable_additional_properties": ((False,), "set it in the schema."),
    "kv_transfer_params": ((), "keys and values stay in this process."),
    "vllm_xargs": (({},), "there are none here."),
    "cache_prompt": ((True, False), "prompt prefixes are shared within a tenant."),
    "id_slot": ((-1,), "rows have no slots."),
    "typical_p": ((1, 1.0), f"{_SAMPLED}."),
    "tfs_z": ((1, 1.0), f"{_SAMPLED}."),
    "mirostat": ((0,), f"{_SAMPLED}."),
    "dynatemp_range": ((0, 0.0), f"{_SAMPLED}."),
    "xtc_probability": ((0, 0.0), f"{_SAMPLED}."),
    "dry_multiplier": ((0, 0.0), "use repetition_penalty or stop_repeats."),
    "n_probs": ((0,), "use logprobs."),
    "n_keep": ((0,), "a prompt that is too long is refused; shorten it."),
}
"""Fields of other servers that the engine lacks: values that change nothing, and why others are refused."""
