"""One table of the options of a request: what each is called on every surface, and the names that others give it.

The server and the frameworks' model classes read the names of others here; `docs/options.md` is written by it, and a
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
        name: As the engine has it.
        meaning: One line.
        spelt: Surface → its name there, where that is another.
        absent: Surface → why it is not there.
        http: Names of other servers, which work over HTTP.
        classes: Names of other model classes, which work in ours.
    """

    name: str
    meaning: str
    spelt: Mapping[str, str] = field(default_factory=dict)
    absent: Mapping[str, str] = field(default_factory=dict)
    http: tuple[str, ...] = ()
    classes: tuple[str, ...] = ()

    def on(self, surface: str) -> str | None:
        """Its name on a surface; None where it is not there."""
        return None if surface in self.absent else self.spelt.get(surface, self.name)


def _everywhere(surfaces: tuple[str, ...], name: str) -> dict[str, str]:
    return dict.fromkeys(surfaces, name)


_BY_KEY: Final = _everywhere(_HTTP, "the API key says it")
_BY_HAND: Final = {"command": "for programs: write one"}
_CHAT_ONLY: Final = _everywhere(("llm", "completions", "command", "engine"), "a chat's: it describes an answer's form")
_ONE_ANSWER: Final = {"llama_index": "its responses hold one answer", "engine": "generate_batch"}
_NO_FIGURES: Final = {"command": "for programs: write one"}

OPTIONS: Final[tuple[Option, ...]] = (
    Option(name="compute", meaning="tier, or tolerance"),
    Option(name="program", meaning="a program by hand"),
    Option(
        name="max_tokens",
        meaning="longest answer",
        spelt={"responses": "max_output_tokens"},
        http=("n_predict", "num_predict", "max_new_tokens"),
        classes=("num_predict", "max_completion_tokens", "max_new_tokens"),
    ),
    Option(name="temperature", meaning="0 = greedy"),
    Option(name="top_p", meaning="the likeliest tokens that together reach it"),
    Option(name="top_k", meaning="so many of the likeliest tokens"),
    Option(name="min_p", meaning="tokens at least so likely beside the likeliest"),
    Option(name="seed", meaning="makes sampling repeatable"),
    Option(name="stop", meaning="texts that end an answer", classes=("stop_sequences",)),
    Option(name="presence_penalty", meaning="off the logits of tokens that are in the answer"),
    Option(name="frequency_penalty", meaning="the same for each time that they are"),
    Option(
        name="repetition_penalty",
        meaning="divides the logits of tokens of prompt and answer",
        http=("repeat_penalty",),
        classes=("repeat_penalty",),
    ),
    Option(name="logit_bias", meaning="added to the logits of tokens", absent=_BY_HAND),
    Option(name="stop_repeats", meaning="ends an answer that repeats itself so many times"),
    Option(name="ignore_eos", meaning="the model cannot end its answer"),
    Option(
        name="schema",
        meaning="JSON schema that the answer matches",
        spelt={**_everywhere((*_CLASSES, *_HTTP), "json_schema")},
        http=("guided_json", "structured_outputs.json"),
    ),
    Option(
        name="regex",
        meaning="regular expression that it matches",
        http=("guided_regex", "structured_outputs.regex"),
    ),
    Option(name="choice", meaning="it is one of these texts", http=("guided_choice", "structured_outputs.choice")),
    Option(
        name="grammar",
        meaning="Lark or GBNF that it matches",
        absent=_BY_HAND,
        http=("guided_grammar", "structured_outputs.grammar"),
    ),
    Option(name="fit_max_tokens", meaning="it is steered to an end within `max_tokens`", absent=_BY_HAND),
    Option(name="speculate", meaning="tokens are drafted"),
    Option(
        name="logprobs",
        meaning="log-probabilities of its tokens, with so many alternatives",
        spelt={"responses": "include"},
        absent=_NO_FIGURES,
        classes=("top_logprobs",),
    ),
    Option(
        name="prompt_logprobs",
        meaning="the same of the prompt",
        absent={**_everywhere(_CLASSES, "frameworks have no place for it"), "responses": "the API has no place for it"}
        | _NO_FIGURES,
    ),
    Option(
        name="n",
        meaning="so many answers",
        absent={**_ONE_ANSWER, "responses": "the API has one answer", "command": "run it again"},
    ),
    Option(
        name="tools",
        meaning="functions that may be called; of the engine, that the prompt shows",
        absent={surface: why for surface, why in _CHAT_ONLY.items() if surface != "engine"},
    ),
    Option(name="tool_choice", meaning="whether and which", absent=_CHAT_ONLY),
    Option(name="parallel_tool_calls", meaning="several calls in one answer", absent=_CHAT_ONLY),
    Option(
        name="response_format",
        meaning="JSON, in OpenAI's words",
        spelt={"responses": "text"},
        absent=_CHAT_ONLY,
    ),
    Option(
        name="template",
        meaning="whether the chat template is used",
        spelt={"llama_index": "formatted", "command": "raw"},
        absent={"chat": "messages always are", **_everywhere(_HTTP, "the endpoint says it")},
    ),
    Option(
        name="timeout",
        meaning="longest time of an answer",
        absent={**_everywhere(_HTTP, "`polar serve --timeout 60`"), "command": "Ctrl-C ends it"},
        classes=("request_timeout",),
    ),
    Option(
        name="logits_hook",
        meaning="a function of logits",
        absent=_everywhere(
            (*_CLASSES, *_HTTP, "command"), "code: on a `PolarModel`, which is `engine=` of the classes"
        ),
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
"""Fields of other servers → ours."""
CLASS_NAMES: Final[Mapping[str, str]] = {
    **{alias: option.name for option in OPTIONS for alias in option.classes},
    "model_name": "model",
    "model_id": "model",
}
"""Settings of other model classes → ours."""

INSTEAD: Final[Mapping[str, str]] = {
    "num_ctx": "the context window is the model's; bound the memory of keys and values by kv_memory=",
    "keep_alive": "weights stay loaded as long as the process; leave it out",
    "num_gpu": "say where the weights go by device= or device_map=",
    "num_thread": "set OMP_NUM_THREADS before the process starts",
    "base_url": "the model runs in this process; for a server, use ChatOpenAI(base_url=…)",
    "openai_api_base": "the model runs in this process; for a server, use ChatOpenAI(base_url=…)",
    "format": "use with_structured_output, json_schema= or response_format",
    "mirostat": "it is not implemented; use top_p= or min_p=",
    "tfs_z": "it is not implemented; use top_p= or min_p=",
    "typical_p": "it is not implemented; use top_p= or min_p=",
    "reasoning_effort": "this engine does not reason apart from its answer; leave it out",
    "reasoning": "this engine does not reason apart from its answer; leave it out",
    "service_tier": "name a tier by compute=",
    "model_kwargs": "pass its entries as settings of their own",
    "extra_body": "pass its entries as settings of their own",
    "best_of": "answers are not compared; use n=",
}
"""Settings of other model classes that ours lacks, and what to use."""

_SAMPLED: Final = "sampling has temperature, top_p, top_k and min_p"
_SHOWN: Final = "special tokens are not shown"
_TEMPLATE: Final = "the model's own chat template is used"
NEUTRAL: Final[Mapping[str, tuple[tuple[Any, ...], str]]] = {
    "use_beam_search": ((False,), "this engine samples, or chooses the likeliest token."),
    "length_penalty": ((1, 1.0), "it is of a beam search, which there is not."),
    "early_stopping": ((False,), "it is of a beam search, which there is not."),
    "min_tokens": ((0,), "an answer may end at any token; see ignore_eos."),
    "stop_token_ids": (([],), "an answer ends by its text: use stop."),
    "bad_words": (([],), "forbid tokens by logit_bias."),
    "allowed_token_ids": (([],), "restrict an answer by choice, regex or grammar."),
    "skip_special_tokens": ((True,), f"{_SHOWN}."),
    "spaces_between_special_tokens": ((True, False), f"{_SHOWN}."),
    "include_stop_str_in_output": ((False,), "a stop string is not a part of an answer."),
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
    "disable_additional_properties": ((False,), "say it in the schema."),
    "kv_transfer_params": ((), "keys and values stay in this process."),
    "vllm_xargs": (({},), "there are none here."),
    "cache_prompt": ((True, False), "starts of prompts are shared within a tenant."),
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
"""Fields of other servers that the engine lacks: values that say nothing, and why there is no other."""
