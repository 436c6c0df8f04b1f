"""`PolarModel`: the local LLM class. Routes a prompt, runs its program, records what was executed.

A thin object over shared weights: it adds a policy, a router, a sink and defaults, all of which two objects over
the same weights may have different. It knows no framework and no money.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal, Self, Unpack, overload

import torch

from polar_sdk.engine.scoring import Question, score_programs, states_after
from polar_sdk.errors import ContextWindowError, InvalidRequestError, ProgramDepthError
from polar_sdk.models.adopt import adopt
from polar_sdk.models.export import export
from polar_sdk.models.load import load_pretrained
from polar_sdk.programs.program import Program
from polar_sdk.request.generation import Chunk, Generation, answer, stream
from polar_sdk.request.maker import RequestMaker
from polar_sdk.request.prompts import PromptEncoder
from polar_sdk.request.threads import iterate_in_thread, run_in_thread
from polar_sdk.router.base import fixed_router
from polar_sdk.router.bridge_set import BridgeSet
from polar_sdk.router.store import find_policy, find_router
from polar_sdk.sinks import AUTO_LEDGER, find_sink
from polar_sdk.usage import NullSink

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Generator, Mapping, Sequence
    from pathlib import Path

    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from polar_sdk.engine.decoder import Decoder
    from polar_sdk.models.compilation import Compile
    from polar_sdk.models.placement import DeviceMap
    from polar_sdk.programs.policy import Policy
    from polar_sdk.request.options import Prompt, RequestOptions
    from polar_sdk.request.prompts import Template
    from polar_sdk.router.base import Router
    from polar_sdk.serving.loaded import LoadedModel
    from polar_sdk.serving.request import Cancel, Request
    from polar_sdk.serving.scheduler import Scheduler
    from polar_sdk.usage import FlopUsage, UsageSink


Pool = Literal["mean", "last", "none"]
"""What becomes of the states of a prompt's tokens: their mean, the last one, or all of them."""


class PolarModel:
    """A frozen open-weights model that runs a program of layers per prompt.

    Make one with `from_pretrained` (alias, hub id, folder or `.gguf`) or `from_hf` (a transformers model at hand).
    Safe to use from several threads: requests share the weights and nothing else.

    Attributes:
        policy: Bounds of programs, and the programs of the tiers.
        router: Chooses programs for requests that name no program; a learned one serves the tiers too. None = the
            policy's tiers.
        sink: Where usage records go.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        *,
        policy: Policy | str | Path | None = None,
        router: Router | str | Path | None = None,
        bridges: str | Path | None = None,
        ledger: str | None = AUTO_LEDGER,
        sink: UsageSink | None = None,
        tenant: str = "default",
        tags: Mapping[str, str] | None = None,
    ) -> None:
        self._loaded = loaded
        if bridges is not None:  # first, since a tier's program may use them
            self._place(bridges)
        self.policy = find_policy(policy, loaded.fingerprint)
        self.policy.bind(loaded.fingerprint, loaded.decoder.cost)
        self.sink = find_sink(ledger, sink)
        self._encoder = PromptEncoder(loaded.tokenizer)
        self._maker = RequestMaker(
            encoder=self._encoder,
            policy=self.policy,
            cost=loaded.decoder.cost,
            context_window=loaded.decoder.context_window,
            router=None,
            tenant=tenant,
            tags=dict(tags or {}),
        )
        # A policy that was named says what the tiers are; then no router is looked for.
        self.router = find_router(router, self, look=policy is None)
        self._maker = replace(self._maker, router=self.router)

    @classmethod
    def from_pretrained(
        cls,
        model: str | Path | None = None,
        *,
        revision: str | None = None,
        device: str = "auto",
        device_map: DeviceMap | None = None,
        precision: str = "auto",
        compile: Compile = "auto",
        kv_memory: int | None = None,
        **settings: Any,
    ) -> Self:
        """Load a model; weights already in this process are shared, not loaded again.

        Args:
            model: Alias, hub id, folder or `.gguf` file; None = `POLAR_MODEL`, or else the default model.
            revision: Branch, tag or commit of a hub id.
            device: `auto`, or a torch device such as `cpu` or `cuda:1`.
            device_map: Whole layers on several devices, in the place of `device`: `auto` by the memory that is free;
                by range, `{"0-14": "cuda:0", "15-29": "cuda:1"}`; or by module, as Hugging Face has it. They run
                uncompiled.
            precision: `auto`, `bf16`, `fp16`, `fp32`, `int8` or `int4`.
            compile: True compiles layers that are not compiled yet (half a minute or so, once for all processes);
                `auto` runs compiled ones where they are on disk; False never does.
            kv_memory: Most bytes for keys and values of all requests together; None = half of the memory that is free.
            **settings: `policy`, `router`, `bridges`, `ledger`, `sink`, `tenant` and `tags`, as the constructor takes
                them.

        Raises:
            ModelError: Or one of its kinds: not found, not fetched, damaged, unsupported, no such device, a device map
                that does not fit.
            PolicyError: The policy belongs to another model.
        """
        loaded = load_pretrained(
            model,
            revision=revision,
            device=device,
            device_map=device_map,
            precision=precision,
            compile=compile,
            kv_memory=kv_memory,
        )
        return cls(loaded, **settings)

    @classmethod
    def from_hf(
        cls,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        precision: str | None = None,
        compile: Compile = "auto",
        kv_memory: int | None = None,
        **settings: Any,
    ) -> Self:
        """Take a transformers model and tokenizer that are already in memory; the model is not changed.

        Args:
            model: On its device, or whole layers on several, in its dtype.
            tokenizer: The model's own.
            precision: `int8` or `int4` to hold the matrices in integers; None = as they are.
            compile: As in `from_pretrained`.
            kv_memory: As in `from_pretrained`.
            **settings: `policy`, `router`, `bridges`, `ledger`, `sink`, `tenant` and `tags`, as the constructor takes
                them.

        Raises:
            UnsupportedArchitectureError: The engine has no family for it.
            DeviceError: A layer lies on several devices, or a device has no kernel for this precision.
            ModelDamagedError: A weight is nan or infinite.
        """
        return cls(adopt(model, tokenizer, precision=precision, compile=compile, kv_memory=kv_memory), **settings)

    @property
    def name(self) -> str:
        """The name the model was asked for by."""
        return self._loaded.name

    @property
    def fingerprint(self) -> str:
        """SHA-256 over configuration and weights."""
        return self._loaded.fingerprint

    @property
    def tenant(self) -> str:
        """Who is billed for requests that name no tenant."""
        return self._maker.tenant

    @property
    def tags(self) -> Mapping[str, str]:
        """Tags of every request, to which a request may add."""
        return self._maker.tags

    @property
    def depth(self) -> int:
        """Number of layers, D."""
        return self._loaded.decoder.cost.depth

    @property
    def context_window(self) -> int:
        """Most tokens of prompt and answer together."""
        return self._loaded.decoder.context_window

    @property
    def device(self) -> str:
        """Torch device of the weights; with a device map all of them, such as `cuda:0+cuda:1`."""
        return str(self._loaded.decoder.placement)

    @property
    def dtype(self) -> str:
        """How the weights are held: `bfloat16`, `float16`, `float32`, `int8` or `int4`."""
        return self._loaded.decoder.dtype_name

    @property
    def compiled(self) -> bool:
        """Whether layers run compiled."""
        return self._loaded.decoder.kernels.has_paged_decode

    @property
    def scheduler(self) -> Scheduler:
        """Runs the requests of all who share the weights; set its `limits` to bound what it takes on."""
        return self._loaded.scheduler

    @property
    def decoder(self) -> Decoder:
        """The weights, ready to run layer by layer; shared."""
        return self._loaded.decoder

    @property
    def loaded(self) -> LoadedModel:
        """The shared weights and tokenizer."""
        return self._loaded

    def encode(self, text: str) -> list[int]:
        """Token ids of a plain text, no template, no special tokens."""
        return list(self._loaded.tokenizer.encode(text, add_special_tokens=False))

    def count_tokens(self, prompt: Prompt) -> int:
        """Input tokens that a prompt would be billed for, chat template included."""
        return len(self._encoder.encode(prompt))

    def prompt_tokens(self, prompt: Prompt) -> list[int]:
        """Token ids of a prompt as a request has them, chat template included."""
        return self._encoder.encode(prompt)

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of token ids, special tokens left out."""
        return str(self._loaded.tokenizer.decode(list(tokens), skip_special_tokens=True))

    def cost(self, program: Program | str | None = None, *, prompt: int, output: int) -> FlopUsage:
        """FLOPs of a program for given numbers of prompt and output tokens; None = identity."""
        chosen = Program.identity(self.depth) if program is None else Program.of(program)
        chosen.check_depth(self.depth)
        return self._loaded.decoder.cost.request(chosen, prompt, output)

    def generate(self, prompt: Prompt, **options: Unpack[RequestOptions]) -> Generation:
        """Answer one prompt; see `RequestOptions` for the options.

        Raises:
            InvalidRequestError: Or one of its kinds, before any compute.
            ProgramError: The program may not run.
            RequestTimeoutError: The answer took longer than `timeout`.
            BudgetExceededError: A budget has no room for it; raised before any compute.
            SinkError: Usage cannot be recorded; raised before any compute.
        """
        return self._all([self._maker.make(prompt, options)])[0]

    def generate_batch(
        self,
        prompts: Sequence[Prompt],
        *,
        each: Sequence[RequestOptions] | None = None,
        **options: Unpack[RequestOptions],
    ) -> list[Generation]:
        """Answer several prompts; their rows decode together.

        Args:
            prompts: Texts or message lists.
            each: Options of each prompt alone, such as tenant, tags, request_id or compute; laid over those of all.
            **options: Options of all. `timeout`, `cancel` and an error in a `logits_hook` end the batch; rows finished
                by then are recorded as such.
        """
        return self._all(self._maker.make_batch(prompts, each, options))

    def stream(self, prompt: Prompt, **options: Unpack[RequestOptions]) -> Generator[Chunk, None, None]:
        """Answer one prompt token by token; closing the generator stops compute and records what ran.

        The request is checked at once, not at the first `next()`. At most two tokens are computed ahead of the reader.
        """
        return stream(self._loaded, self._maker.make(prompt, options), self.sink, self.policy.loop_guard)

    async def agenerate(self, prompt: Prompt, **options: Unpack[RequestOptions]) -> Generation:
        """`generate` without blocking the event loop; cancelling the task stops compute within one token."""

        def call(cancel: Cancel) -> Generation:
            own: RequestOptions = {**options, "cancel": cancel}
            return self.generate(prompt, **own)

        return await run_in_thread(call, options.get("cancel"))

    async def agenerate_batch(
        self,
        prompts: Sequence[Prompt],
        *,
        each: Sequence[RequestOptions] | None = None,
        **options: Unpack[RequestOptions],
    ) -> list[Generation]:
        """`generate_batch` without blocking the event loop; cancelling the task stops all rows within one token."""

        def call(cancel: Cancel) -> list[Generation]:
            own: RequestOptions = {**options, "cancel": cancel}
            return self.generate_batch(prompts, each=each, **own)

        return await run_in_thread(call, options.get("cancel"))

    def astream(self, prompt: Prompt, **options: Unpack[RequestOptions]) -> AsyncIterator[Chunk]:
        """`stream` without blocking the event loop; leaving the iteration stops compute within one token."""

        def start(cancel: Cancel) -> Generator[Chunk, None, None]:
            own: RequestOptions = {**options, "cancel": cancel}
            return self.stream(prompt, **own)

        return iterate_in_thread(start, options.get("cancel"))

    def score(
        self, prompt: str, continuations: Sequence[str], *, program: Program | str | None = None
    ) -> tuple[float, ...]:
        """Log-likelihood of each continuation after a plain-text prompt, in nats, summed over its tokens.

        A diagnostic for choosing programs: it is not metered and takes no tier. Many at once are faster: `score_batch`.

        Args:
            prompt: Text before the continuations, no template applied.
            continuations: Texts to compare, each at least one token.
            program: What runs; None = identity.

        Raises:
            As `score_batch`.
        """
        return self.score_batch([(prompt, continuations)], [program])[0][0]

    def score_batch(
        self,
        questions: Sequence[tuple[str, Sequence[str]]],
        programs: Sequence[Program | str | None] = (None,),
    ) -> list[list[tuple[float, ...]]]:
        """Log-likelihoods of continuations of many prompts under many programs, in nats, summed over tokens.

        Questions run packed; a prompt runs once however many continuations it has, and visits that programs share at
        their start run once. Not metered.

        Args:
            questions: (prompt, continuations) pairs of plain texts, no template applied; each continuation has at
                least one token.
            programs: What runs; None = identity.

        Returns:
            For each program, for each question, one log-likelihood per continuation, in the orders given.

        Raises:
            InvalidRequestError: A continuation without a token.
            EmptyPromptError: A prompt without text.
            ContextWindowError: A prompt and a continuation do not fit the model.
            ProgramError: A program cannot or may not run.
        """
        chosen = [self._chosen(program) for program in programs]
        asked = [self._question(prompt, continuations) for prompt, continuations in questions]
        scores = score_programs(self._loaded.decoder, asked, chosen)
        return [[score.loglikelihoods for score in scores[program]] for program in chosen]

    @overload
    def hidden_states(
        self,
        prompts: Sequence[Prompt],
        layer: int,
        pool: Literal["mean", "last"] = "mean",
        program: Program | str | None = None,
        *,
        template: Template = "auto",
    ) -> Tensor: ...

    @overload
    def hidden_states(
        self,
        prompts: Sequence[Prompt],
        layer: int,
        pool: Literal["none"],
        program: Program | str | None = None,
        *,
        template: Template = "auto",
    ) -> list[Tensor]: ...

    def hidden_states(
        self,
        prompts: Sequence[Prompt],
        layer: int,
        pool: Pool = "mean",
        program: Program | str | None = None,
        *,
        template: Template = "auto",
    ) -> Tensor | list[Tensor]:
        """Hidden states of prompts after the first layers, before any final norm; for example what a router reads.

        Only those layers run. Not metered.

        Args:
            prompts: Texts or message lists, B of them.
            layer: Layers that run, 0 to D; 0 = the embeddings of the input. Under a program, that many of its steps.
            pool: `mean` over the tokens of a prompt, its `last` token, or `none`.
            program: Whose steps run; None = identity.
            template: As in `RequestOptions`.

        Returns:
            Float32 on the model's first device: (B, E) pooled, or with `none` one tensor (T, E) per prompt of T tokens.

        Raises:
            InvalidRequestError: Or one of its kinds: an empty prompt, one longer than the context window, no such pool.
            ProgramError: No such layer, or the program cannot or may not run.
        """
        if pool not in ("mean", "last", "none"):
            raise InvalidRequestError(f"pool={pool!r} is unknown; use 'mean', 'last' or 'none'.")
        steps = self._chosen(program).steps
        if not 0 <= layer <= len(steps):
            raise ProgramDepthError(f"layer={layer} is out of range; the program has {len(steps)} steps: use 0 to it.")
        asked = [tuple(self._encoder.encode(prompt, template)) for prompt in prompts]
        self._check_window(asked)
        decoder = self._loaded.decoder
        states = [state.to(decoder.device) for state in states_after(decoder, asked, steps[:layer])]
        if pool == "none":
            return [tokens.float() for tokens in states]
        pooled = [tokens.float().mean(0) if pool == "mean" else tokens[-1].float() for tokens in states]
        return torch.stack(pooled) if pooled else torch.empty((0, decoder.family.hidden), device=decoder.device)

    def greedy_answers(
        self,
        prompts: Sequence[Prompt],
        *,
        max_tokens: int,
        program: Program | None = None,
        router: Router | None = None,
    ) -> list[tuple[int, ...]]:
        """Token ids of greedy answers, for calibration; not metered.

        Args:
            prompts: What to answer.
            max_tokens: Most tokens of each answer.
            program: What runs; None = identity.
            router: What chooses, in the place of `program`.
        """
        depth = self._loaded.decoder.depth
        maker = replace(self._maker, router=router or fixed_router(program or Program.identity(depth), depth))
        requests = [maker.make(prompt, {"max_tokens": max_tokens}) for prompt in prompts]
        return [one.token_ids for one in answer(self._loaded, requests, NullSink())] if requests else []

    def use_bridges(self, bridges: BridgeSet | str | Path) -> BridgeSet:
        """Use bridges, or those in a folder that `polar heal` wrote, beside those that the weights have already.

        Bridges belong to the weights, which all objects of one model in this process share. Load them before requests
        run: a request that crosses a segment while its bridge is replaced mixes the two.

        Raises:
            BridgeModelError: They were fitted for another model.
            BridgeDamagedError: A file is missing, altered or malformed.
        """
        placed = self._place(bridges)
        self._maker = replace(self._maker, cost=self._loaded.decoder.cost)
        return placed

    def export(self, program: Program | str, folder: str | Path, *, force: bool = False) -> Path:
        """Write a program as a model of its own: a Hugging Face folder with the layers it visits, for other servers.

        Args:
            program: Visits each layer at most once, without bridges or damping.
            folder: Where to; it appears whole or not at all.
            force: Whether a model that lies there already is replaced.

        Returns:
            The folder.

        Raises:
            ProgramError: The program may not run, or no plain model computes what it does (`ExportError`).
            FolderError: The folder cannot be written, or something lies there already (`FolderExistsError`).
        """
        chosen = Program.of(program)
        self.policy.check(chosen, self._loaded.decoder.cost)
        return export(self._loaded, chosen, folder, force=force)

    def _place(self, bridges: BridgeSet | str | Path) -> BridgeSet:
        chosen = bridges if isinstance(bridges, BridgeSet) else BridgeSet.load(bridges)
        chosen.check_model(self._loaded.name, self._loaded.fingerprint)
        decoder = self._loaded.decoder
        placed = {segment: bridge.to(decoder.dtype, decoder.device) for segment, bridge in chosen.bridges.items()}
        decoder.set_bridges({**decoder.bridges, **placed})
        return chosen

    def _chosen(self, program: Program | str | None) -> Program:
        """A program that may run; None = identity."""
        decoder = self._loaded.decoder
        chosen = Program.identity(decoder.depth) if program is None else Program.of(program)
        self.policy.check(chosen, decoder.cost)
        return chosen

    def _question(self, prompt: str, continuations: Sequence[str]) -> Question:
        encode = self._loaded.tokenizer.encode
        tails = tuple(tuple(encode(text, add_special_tokens=False)) for text in continuations)
        if not all(tails):
            raise InvalidRequestError("a continuation is empty; give each at least one token of text.")
        question = Question(tuple(self._encoder.encode(prompt, "raw")), tails)
        longest = len(question.prompt) + max(map(len, tails), default=0)
        if longest > (window := self._loaded.decoder.context_window):
            raise ContextWindowError(
                f"the prompt and its longest continuation have {longest} tokens; the context window is {window}: "
                "shorten them."
            )
        return question

    def _check_window(self, prompts: Sequence[Sequence[int]]) -> None:
        window = self._loaded.decoder.context_window
        if (longest := max(map(len, prompts), default=0)) > window:
            raise ContextWindowError(f"a prompt has {longest} tokens; the context window is {window}: shorten it.")

    def _all(self, requests: Sequence[Request]) -> list[Generation]:
        return answer(self._loaded, requests, self.sink, self.policy.loop_guard) if requests else []
