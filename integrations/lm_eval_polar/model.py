"""`PolarLM`: what lm-evaluation-harness asks of a model, answered by a program of layers.

Texts become tokens as in the harness's own Hugging Face class, so that full depth has its scores. A context is routed
like the prompt of a request, and its program runs everything that follows. Nothing is metered; FLOPs are counted by the
formula, and `get_model_info` puts them into the harness's results.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import torch
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from polar_sdk.engine.pack import Question, packs
from polar_sdk.engine.scoring import score_questions
from polar_sdk.errors import InvalidRequestError, did_you_mean
from polar_sdk.model import PolarModel
from polar_sdk.programs.program import Program

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lm_eval.api.instance import Instance

    from polar_sdk.request.options import RequestOptions

Ids = tuple[int, ...]
Answer = tuple[float, bool]
"""Log-likelihood in nats, and whether it is what greedy decoding would give."""

_TOGETHER: Final = 128
"""Requests that wait for the engine at once."""
_LENGTHS: Final = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
"""Names that tasks give the maximum length of an answer; the first that is there counts."""
_SETTINGS: Final = (*_LENGTHS, "until", "do_sample", "temperature", "top_p", "top_k")


class _Pair(NamedTuple):
    """A context and what follows it."""

    context: Ids
    continuation: Ids


@register_model("polar")
class PolarLM(TemplateLM):  # type: ignore[misc]  # the harness has no types
    """A PoLar model, for `lm_eval --model polar --model_args pretrained=…,compute=standard`.

    Args:
        pretrained: Alias, hub id, folder, `.gguf` file, or a `PolarModel`; None = the default model.
        compute: Tier or tolerance; `exact` = full depth; None = the model's default tier.
        program: A program by hand instead.
        router: Folder of a router for the model.
        policy: Policy file for the model.
        maps: Folder of bridges or fills that the program uses.
        precision: As in `PolarModel.from_pretrained`.
        device: As there; None = automatic.
        max_length: Maximum tokens of context and what follows; None = the model's context window.
        max_gen_toks: Maximum tokens of an answer if the task does not set it.
        add_bos_token: Whether texts start with the beginning-of-text token; None = the tokenizer's default.
        batch_size: Ignored, as is `max_batch_size`: the engine packs by number of tokens.
        max_batch_size: Ignored.
    """

    def __init__(
        self,
        pretrained: str | PolarModel | None = None,
        *,
        compute: str | float | None = None,
        program: str | None = None,
        router: str | None = None,
        policy: str | None = None,
        maps: str | None = None,
        precision: str = "auto",
        device: str | None = None,
        max_length: int | None = None,
        max_gen_toks: int = 256,
        add_bos_token: bool | None = None,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
    ) -> None:
        super().__init__()
        if isinstance(pretrained, PolarModel):
            self._model = pretrained
        else:
            self._model = PolarModel.from_pretrained(
                pretrained,
                router=router,
                policy=policy,
                maps=maps or (),
                precision=precision,
                device=device or "auto",
                ledger=None,
            )
        self.tokenizer = self._model.loaded.tokenizer
        self.max_length = min(max_length or self._model.context_window, self._model.context_window)
        self._most = self.max_length + int(_turns(self._model))
        """Maximum tokens of a pair. The last one is predicted and does not run, so that it may exceed the window."""
        self.max_gen_toks = max_gen_toks
        self._add_bos_token = add_bos_token
        self._how: RequestOptions = {"compute": compute} if program is None else {"program": str(program)}
        self._spent = self._full = 0
        self._programs: Counter[Program] = Counter()
        self._model.request([self.prefix_token_id], **self._how)  # a tier or program that cannot be fails now

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """The token before a text without a context."""
        first = self.tokenizer.bos_token_id
        return self.eot_token_id if first is None else int(first)

    @property
    def tokenizer_name(self) -> str:
        """Names the chat template in the harness's caches."""
        return str(self.tokenizer.name_or_path or self._model.name).replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Token ids of a text, special tokens in it recognised."""
        if add_special_tokens is None and string.startswith(str(self.tokenizer.decode([self.prefix_token_id]))):
            add_special_tokens = False
        if add_special_tokens is None:
            add_special_tokens = self._add_bos_token
        chosen = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        return list(self.tokenizer.encode(string, **chosen))

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Messages as a text; with no generation prompt, the last one is to be continued."""
        return str(
            self.tokenizer.apply_chat_template(
                chat_history,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
            )
        )

    def get_model_info(self) -> dict[str, Any]:
        """Model and tier, for the results' `config`."""
        named = {program.text: count for program, count in self._programs.most_common()}
        return {
            "polar": {
                "model": self._model.name,
                "fingerprint": self._model.fingerprint,
                "dtype": self._model.dtype,
                "device": self._model.device,
                "programs": named,
                "flops": self._spent,
                "flops_at_full_depth": self._full,
                "compute_saved": 1 - self._spent / self._full if self._full else 0.0,
            }
        }

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of whole texts, in windows that are as long as the model allows.

        The router reads the window. As every token is scored, no program fills any.
        """
        windows = [self._windows(request.args[0]) for request in requests]
        found = self._scores([pair for own in windows for pair in own], whole=True, quiet=disable_tqdm)
        sums = [sum(found[pair][0] for pair in own) for own in windows]
        for request, total in zip(requests, sums, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return sums

    def _windows(self, text: str) -> list[_Pair]:
        found = get_rolling_token_windows(self.tok_encode(text), self.prefix_token_id, self._most - 1, 1)
        return [_Pair(*map(tuple, make_disjoint_window(window))) for window in found]

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], disable_tqdm: bool = False, **others: Any
    ) -> list[Answer]:
        pairs = [self._fitted(context, continuation) for _, context, continuation in requests]
        found = self._scores(pairs, quiet=disable_tqdm)
        for (texts, _, _), pair in zip(requests, pairs, strict=True):
            self.cache_hook.add_partial("loglikelihood", texts, found[pair])
        return [found[pair] for pair in pairs]

    def _fitted(self, context: Sequence[int], continuation: Sequence[int]) -> _Pair:
        """The pair without the first tokens of a context that is too long."""
        if not 0 < len(continuation) < self._most:
            raise InvalidRequestError(
                f"a continuation has {len(continuation)} tokens; the model's window allows 1 to {self._most - 1}."
            )
        return _Pair(tuple(context[len(continuation) - self._most :]), tuple(continuation))

    def _scores(self, pairs: Sequence[_Pair], *, whole: bool = False, quiet: bool = False) -> dict[_Pair, Answer]:
        """Scores of pairs; what follows one context is scored together. `whole`: the router reads all of a pair."""
        followers: dict[tuple[Ids, Program], dict[Ids, None]] = defaultdict(dict)
        router_flops: Counter[tuple[Ids, Program]] = Counter()
        for context, continuation in dict.fromkeys(pairs):
            read = context + continuation if whole else context
            request = self._model.request(read[-(self._model.context_window - 1) :], **self._how)
            followers[context, request.program][continuation] = None
            router_flops[context, request.program] = request.router_flops
        questions: dict[Program, list[Question]] = defaultdict(list)
        for (context, program), some in followers.items():
            questions[program].append(Question(context, tuple(some)))
            self._count(program, len(context), list(map(len, some)), router_flops[context, program])
        found: dict[_Pair, Answer] = {}
        with tqdm(total=len(set(pairs)), disable=quiet, desc="Scoring") as bar:
            for program, own in questions.items():
                for pack in packs(sorted(own, key=lambda question: question.tokens)):
                    for question, score in zip(pack, score_questions(self._model.decoder, pack, program), strict=True):
                        for place, tail in enumerate(question.continuations):
                            is_greedy = score.greedy[place] == tail
                            found[_Pair(question.prompt, tail)] = (score.loglikelihoods[place], is_greedy)
                        bar.update(len(question.continuations))
        return found

    def _count(self, program: Program, prompt: int, tails: list[int], router: int) -> None:
        cost = self._model.decoder.cost
        self._programs[program] += len(tails)
        self._spent += cost.scoring(program, prompt, tails) + router
        self._full += cost.scoring(Program.identity(cost.depth), prompt, tails)

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Answers to contexts, each until one of its stops."""
        prepared = [self._prepared(*request.args) for request in requests]
        texts: list[str] = []
        with tqdm(total=len(requests), disable=disable_tqdm, desc="Writing") as bar:
            for start in range(0, len(prepared), _TOGETHER):
                part = prepared[start : start + _TOGETHER]
                done = self._model.generate_batch([ids for ids, _ in part], each=[own for _, own in part], **self._how)
                for request, generation in zip(requests[start:], done, strict=False):
                    usage = generation.usage
                    self._programs[Program.parse(usage.program)] += 1
                    self._spent += usage.flops.total
                    self._full += usage.identity_flops
                    texts.append(generation.text)
                    self.cache_hook.add_partial("generate_until", request.args, generation.text)
                bar.update(len(part))
        return texts

    def _prepared(self, context: str, settings: dict[str, Any]) -> tuple[list[int], RequestOptions]:
        """Token ids of a context, and the options of its request."""
        for name in settings:
            if name not in _SETTINGS:
                raise InvalidRequestError(f"generation setting {name!r} is unknown; {did_you_mean(name, _SETTINGS)}")
        lengths = [settings[name] for name in _LENGTHS if settings.get(name) is not None]
        max_tokens = int(lengths[0]) if lengths else self.max_gen_toks
        if not 0 < max_tokens < self.max_length:
            raise InvalidRequestError(
                f"an answer of {max_tokens} tokens leaves no room for its context; use 1 to {self.max_length - 1}."
            )
        until = settings.get("until") or []
        stops = [until] if isinstance(until, str) else list(until)
        options: RequestOptions = {
            "max_tokens": max_tokens,
            "stop": [stop for stop in stops if stop],
            "template": "raw",
        }
        temperature = float(settings.get("temperature") or 0)
        if temperature and settings.get("do_sample") is not False:
            options |= {"temperature": temperature}
            options |= {"top_p": float(settings.get("top_p", 1)), "top_k": int(settings.get("top_k", 0))}
        return self.tok_encode(context)[max_tokens - self.max_length :], options


def _turns(model: PolarModel) -> bool:
    """Whether positions turn keys, and are not looked up in a table that ends with the window."""
    decoder = model.decoder
    tables = decoder.rotary(torch.zeros(1, dtype=torch.long, device=decoder.placement.first), 1)
    return any(cosine.numel() for cosine, _ in tables)
