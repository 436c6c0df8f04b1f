"""`PolarModel`: the local LLM class. Routes a prompt, runs its program, records what was executed.

A thin object over shared weights: it adds a policy, a router, a sink and defaults, which may differ between objects
over the same weights. Knows no framework and no money.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final, Literal, Self, Unpack, overload

from polar_sdk.models.export import export
from polar_sdk.models.load import adopt, load_pretrained
from polar_sdk.programs.policy import Policy
from polar_sdk.programs.program import Program
from polar_sdk.request.admission import bound_of
from polar_sdk.request.auditor import Auditor
from polar_sdk.request.encoder import PromptEncoder
from polar_sdk.request.floors import FloorRules
from polar_sdk.request.generation import Chunk, Generation, answer, stream
from polar_sdk.request.kept import KeptPrompts, kept_path
from polar_sdk.request.maker import RequestMaker, never
from polar_sdk.request.options import Audits, check_speculate, ending_on, split_loading
from polar_sdk.request.scores import hidden_states, loglikelihoods
from polar_sdk.request.selection import Selection, find_key, shares_of
from polar_sdk.request.standings import standings_of
from polar_sdk.router.base import fixed_router
from polar_sdk.router.learned import LearnedRouter
from polar_sdk.router.map_set import MapSet
from polar_sdk.router.store import find_policy, find_router
from polar_sdk.serving.threads import iterate_in_thread, run_in_thread
from polar_sdk.sinks import AUTO_LEDGER, find_sink
from polar_sdk.usage import NullSink

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Generator, Iterable, Mapping, Sequence
    from pathlib import Path

    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from polar_sdk.engine.decoder import Decoder
    from polar_sdk.programs.floors import Floor
    from polar_sdk.request.call_format import CallFormat
    from polar_sdk.request.options import ModelOptions, Prompt, RequestOptions, Template
    from polar_sdk.request.scores import Pool
    from polar_sdk.router.base import Router
    from polar_sdk.serving.drafts import Speculate
    from polar_sdk.serving.job import Job
    from polar_sdk.serving.loaded import LoadedModel
    from polar_sdk.serving.request import Request
    from polar_sdk.serving.scheduler import Scheduler
    from polar_sdk.usage import FlopUsage, UsageBound, UsageSink


_QUEUED: Final = 128
"""Number of greedy answers that are queued at once."""


class PolarModel:
    """A frozen open-weights model that runs a program of layers per prompt.

    Make one with `from_pretrained` (alias, hub id, folder or `.gguf`) or `from_hf` (a transformers model in memory).
    Safe to use from several threads: requests share the weights and nothing else.

    Attributes:
        policy: Limits of programs, and the programs of the tiers.
        router: Chooses programs for requests that name none; a learned router also serves the tiers. None = the
            policy's tiers.
        sink: Where usage records go.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        *,
        policy: Policy | str | Path | None = None,
        router: Router | str | Path | None = None,
        maps: str | Path | Sequence[str | Path] = (),
        ledger: str | None = AUTO_LEDGER,
        sink: UsageSink | None = None,
        tenant: str = "default",
        tags: Mapping[str, str] | None = None,
        audit_share: float | Mapping[str, float] | None = None,
        audits: Audits | None = None,
        speculate: Speculate | None = None,
    ) -> None:
        self._loaded = loaded
        for each in MapSet.load_all(maps):  # first, since a tier's program may use them
            each.place_on(loaded)
        named = None if policy is None else Policy.of(policy)
        self.policy = find_policy(named, loaded.fingerprint)
        self.policy.bind(loaded.fingerprint, loaded.decoder.cost)
        self.sink = find_sink(ledger, sink)
        self._encoder = PromptEncoder(loaded.tokenizer)
        self._maker = RequestMaker(
            encoder=self._encoder,
            grammars=lambda: loaded.grammars,
            end_tokens=lambda: loaded.end_tokens,
            policy=self.policy,
            cost=loaded.decoder.cost,
            context_window=loaded.decoder.context_window,
            router=None,
            tenant=tenant,
            tags=dict(tags or {}),
            speculate=check_speculate(speculate),
            drafts_are_exact=lambda: loaded.decoder.kernels.independent,
            at_risk=never,
            floors=FloorRules((), self._encoder),
        )
        # A policy named by the caller says what the tiers are; then no router is looked for.
        self.router = find_router(router, self, look=named is None or named.only_adds)
        floors = FloorRules.made(self.policy.floors, self.tiers, self._encoder, loaded.decoder)
        self._maker = replace(self._maker, router=self.router, floors=floors)
        self.auditor = self._begin_audits(audit_share, audits or Audits())
        """Audits answers of certified tiers; None if none are audited."""

    @classmethod
    def from_pretrained(cls, model: str | Path | None = None, **options: Unpack[ModelOptions]) -> Self:
        """Load a model; weights already in this process are shared, not loaded again.

        Args:
            model: Alias, hub id, folder or `.gguf` file; None = `POLAR_MODEL`, otherwise the default model.
            **options: See `ModelOptions`.

        Raises:
            ModelError: Or a subclass: it cannot be found, fetched, read or placed on the devices.
            PolicyError: The policy belongs to another model.
        """
        loading, own = split_loading(options)
        own["sink"] = find_sink(own.pop("ledger", AUTO_LEDGER), own.get("sink"))  # one that cannot be takes no time
        return cls(load_pretrained(model, **loading), **own)

    @classmethod
    def from_hf(
        cls, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, **options: Unpack[ModelOptions]
    ) -> Self:
        """Use a transformers model and tokenizer that are already in memory; the model is not changed.

        Args:
            model: On its device, or with whole layers on several, in its dtype.
            tokenizer: The model's own.
            **options: See `ModelOptions`; of the loading options only `kv_memory` and `precision`, which may be `int8`
                or `int4` to hold the matrices in integers; by default they are unchanged.

        Raises:
            UnsupportedArchitectureError: The engine has no family for it.
            DeviceError: A layer is on several devices, or a device has no kernel for this precision.
            ModelDamagedError: A weight is NaN or infinite.
        """
        loading, own = split_loading(options)
        return cls(adopt(model, tokenizer, **loading), **own)

    def _begin_audits(self, share: float | Mapping[str, float] | None, audits: Audits) -> Auditor | None:
        """The auditor of answers, if a promise can be tested; from now on requests respect its findings."""
        router, loaded = self.router, self._loaded
        if not isinstance(router, LearnedRouter) or router.certificate is None or not router.audited:
            return None
        standings = None if isinstance(self.sink, NullSink) else standings_of(self.sink)
        shares = shares_of(share, router.audited, self.sink, kept=standings is not None)
        auditor = None
        if standings is not None and any(shares.values()):
            kept = KeptPrompts(kept_path(loaded.fingerprint), self.decode, frozenset(audits.keep), audits.keep_days)
            usual = router.certificate.usual
            auditor = Auditor(
                loaded,
                self.sink,
                self.policy.loop_guard,
                shares,
                Selection(find_key(audits.key)),
                audits.tenant,
                standings.doubtful,
                kept if audits.keep else None,
                next((usual[kind] for kind in ("prompt", "answer") if kind in usual), None),
            )
        watching = auditor if audits.unusual == "exact" else None
        if standings is not None:
            self._maker = replace(
                self._maker,
                at_risk=lambda promise: (watching is not None and watching.unusual) or standings.at_risk(promise),
            )
        return auditor

    @property
    def _on_answer(self) -> Callable[[Job], None] | None:
        return None if self.auditor is None else self.auditor.answered

    @property
    def name(self) -> str:
        """The name under which the model was loaded."""
        return self._loaded.name

    @property
    def fingerprint(self) -> str:
        """SHA-256 over configuration and weights."""
        return self._loaded.fingerprint

    @property
    def tenant(self) -> str:
        """Tenant of requests that name none."""
        return self._maker.tenant

    @property
    def tags(self) -> Mapping[str, str]:
        """Tags of every request; a request may add more."""
        return self._maker.tags

    @property
    def tiers(self) -> tuple[str, ...]:
        """The tiers that a request may name: those certified for the router, otherwise the policy's; always `exact`."""
        named: Iterable[str] = self.policy.tiers
        if isinstance(self.router, LearnedRouter):
            named = () if self.router.certificate is None else self.router.certificate.tiers
        return tuple(dict.fromkeys([*named, "exact"]))

    @property
    def depth(self) -> int:
        """Number of layers, D."""
        return self._loaded.decoder.cost.depth

    @property
    def context_window(self) -> int:
        """Maximum number of tokens of prompt and answer together."""
        return self._loaded.decoder.context_window

    @property
    def device(self) -> str:
        """Torch device of the weights; with a device map, all devices: `cuda:0+cuda:1`."""
        return str(self._loaded.decoder.placement)

    @property
    def dtype(self) -> str:
        """How the weights are held: `bfloat16`, `float16`, `float32`, `int8` or `int4`."""
        return self._loaded.decoder.dtype_name

    @property
    def scheduler(self) -> Scheduler:
        """Runs the requests of all objects over these weights; set its `limits` to bound them."""
        return self._loaded.scheduler

    @property
    def decoder(self) -> Decoder:
        """The weights, ready to run layer by layer; shared."""
        return self._loaded.decoder

    @property
    def loaded(self) -> LoadedModel:
        """The shared weights and tokenizer."""
        return self._loaded

    @property
    def call_format(self) -> CallFormat | None:
        """How the model's chat template writes tool calls; None if it does not support tools."""
        return self._encoder.calls

    def encode(self, text: str) -> list[int]:
        """Token ids of a plain text, without template and special tokens."""
        return self._encoder.plain(text)

    def count_tokens(self, prompt: Prompt, tools: Sequence[Mapping[str, Any]] | None = None) -> int:
        """Input tokens that a prompt would be billed for, chat template included; tools as in `RequestOptions`."""
        return len(self._encoder.encode(prompt, tools=tools))

    def more_tokens_than(self, prompt: Prompt, window: int) -> int | None:
        """Lower bound of the tokens of a prompt that is far longer than a window; None for any other prompt."""
        return self._encoder.more_than(prompt, window)

    def prompt_tokens(
        self, prompt: Prompt, template: Template = "auto", tools: Sequence[Mapping[str, Any]] | None = None
    ) -> list[int]:
        """Token ids of a prompt as a request runs them, chat template included; see `RequestOptions`."""
        return self._encoder.encode(prompt, template, tools)

    @property
    def template_separators(self) -> tuple[int, ...]:
        """Ids of the tokens that the chat template puts around messages."""
        return self._encoder.separators

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of token ids, special tokens left out."""
        return str(self._loaded.tokenizer.decode(list(tokens), skip_special_tokens=True))

    def cost(self, program: Program | str | None = None, *, prompt: int, output: int) -> FlopUsage:
        """FLOPs of a program for given numbers of prompt and output tokens; None = identity."""
        chosen = Program.identity(self.depth) if program is None else Program.of(program)
        chosen.check_depth(self.depth)
        return self._loaded.decoder.cost.request(chosen, prompt, output)

    def request(self, prompt: Prompt, **options: Unpack[RequestOptions]) -> Request:
        """A checked prompt with its options, as the engine would run them; only the router runs.

        Raises:
            InvalidRequestError: Or a subclass.
            ProgramError: The program may not run.
        """
        return self._maker.make(prompt, options)

    def floor_of(self, prompt: Prompt, **options: Unpack[RequestOptions]) -> Floor | None:
        """The floor of the policy that applies to a request; None if none does.

        Raises:
            InvalidRequestError: Or a subclass.
        """
        return self._maker.floor_of(prompt, options)

    def bound(self, prompt: Prompt, **options: Unpack[RequestOptions]) -> UsageBound:
        """The maximum that `generate` would use, without running it: only the router does.

        Returns:
            First what the options ask for, then each tier of the policy that costs less.

        Raises:
            InvalidRequestError: Or a subclass.
            ProgramError: The program may not run.
        """
        return bound_of(self.request(prompt, **options), self._loaded.decoder.cost)

    def generate(self, prompt: Prompt, **options: Unpack[RequestOptions]) -> Generation:
        """Answer one prompt; see `RequestOptions` for the options.

        Raises:
            InvalidRequestError: Or a subclass, before any compute.
            ProgramError: The program may not run.
            RequestTimeoutError: The answer took longer than `timeout`.
            BudgetExceededError: A budget has no room for it; before any compute.
            SinkError: Usage cannot be recorded; before any compute.
        """
        request = self._maker.make(prompt, options)
        return answer(self._loaded, [request], self.sink, self.policy.loop_guard, self._on_answer)[0]

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
            each: Options of each prompt, such as tenant, tags or compute; they override the shared ones.
            **options: Shared options. `timeout`, `cancel` and an error in a `logits_hook` end the batch; rows that have
                finished by then are recorded as completed.
        """
        requests = self._maker.make_batch(prompts, each, options)
        return answer(self._loaded, requests, self.sink, self.policy.loop_guard, self._on_answer)

    def stream(self, prompt: Prompt, **options: Unpack[RequestOptions]) -> Generator[Chunk, None, None]:
        """Answer one prompt token by token; closing the generator stops compute and records what ran.

        The request is checked immediately, not at the first `next()`. At most two tokens are computed ahead of the
        reader.
        """
        request = self._maker.make(prompt, options)
        return stream(self._loaded, request, self.sink, self.policy.loop_guard, self._on_answer)

    async def agenerate(self, prompt: Prompt, **options: Unpack[RequestOptions]) -> Generation:
        """`generate` without blocking the event loop; cancelling the task stops compute within one pass."""
        return await run_in_thread(
            lambda cancel: self.generate(prompt, **ending_on(cancel, options)), options.get("cancel")
        )

    async def agenerate_batch(
        self,
        prompts: Sequence[Prompt],
        *,
        each: Sequence[RequestOptions] | None = None,
        **options: Unpack[RequestOptions],
    ) -> list[Generation]:
        """`generate_batch` without blocking the event loop; cancelling the task stops all rows within one pass."""
        return await run_in_thread(
            lambda cancel: self.generate_batch(prompts, each=each, **ending_on(cancel, options)), options.get("cancel")
        )

    def astream(self, prompt: Prompt, **options: Unpack[RequestOptions]) -> AsyncIterator[Chunk]:
        """`stream` without blocking the event loop; leaving the iteration stops compute within one pass."""
        return iterate_in_thread(
            lambda cancel: self.stream(prompt, **ending_on(cancel, options)), options.get("cancel")
        )

    def score(
        self, prompt: str, continuations: Sequence[str], *, program: Program | str | None = None
    ) -> tuple[float, ...]:
        """Like `score_batch`, for one prompt and one program; many at once are faster."""
        return self.score_batch([(prompt, continuations)], [program])[0][0]

    def score_batch(
        self, questions: Sequence[tuple[str, Sequence[str]]], programs: Sequence[Program | str | None] = (None,)
    ) -> list[list[tuple[float, ...]]]:
        """Log-likelihoods of continuations of many prompts under many programs, in nats, summed over tokens.

        A diagnostic for choosing programs: not metered, no tiers. Questions run packed; a prompt runs once for all its
        continuations, and visits that programs share at their start run once.

        Args:
            questions: (prompt, continuations) pairs of plain texts, no template applied; each continuation has at
                least one token.
            programs: The programs to run; None = identity.

        Returns:
            For each program and each question, one log-likelihood per continuation, in the given order.

        Raises:
            InvalidRequestError: Or a subclass: a prompt or continuation is empty, or together they are too long.
            ProgramError: A program cannot or may not run.
        """
        chosen = [self._program(program) for program in programs]
        return loglikelihoods(self._loaded.decoder, self._encoder, questions, chosen)

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
        """Hidden states of prompts after the first layers, before any final norm. Only these layers run. Not metered.

        Args:
            prompts: Texts or message lists, B of them.
            layer: Number of the program's steps to run, 0 to D under identity; 0 = the embeddings of the input.
            pool: `mean` over the tokens of a prompt, its `last` token, or `none`.
            program: The program whose steps run; None = identity.
            template: See `RequestOptions`.

        Returns:
            Float32 on the model's first device: (B, E) pooled, or with `none` one tensor (T, E) per prompt of T tokens.

        Raises:
            InvalidRequestError: Or a subclass: an empty prompt, one longer than the context window, an unknown pool.
            ProgramError: No such layer, or the program cannot or may not run.
        """
        decoder, chosen = self._loaded.decoder, self._program(program)
        return hidden_states(decoder, self._encoder, prompts, layer, pool, chosen, template)

    def greedy_answers(
        self,
        prompts: Sequence[Prompt],
        *,
        max_tokens: int,
        program: Program | None = None,
        router: Router | None = None,
        stop: Sequence[str] = (),
        tenant: str | None = None,
    ) -> list[tuple[int, ...]]:
        """Token ids of greedy answers, for calibration, with `router`, `program` or identity. Not metered.

        Any number of prompts; they are queued in groups. Texts in `stop` end an answer, and are part of its ids. Only
        prompts of one `tenant`, the model's own by default, share what they begin with.
        """
        depth = self._loaded.decoder.depth
        chosen = router or fixed_router(program or Program.identity(depth), depth)
        # What is measured is what was named, whatever audits and floors say.
        maker = replace(self._maker, router=chosen, at_risk=never, floors=FloorRules((), self._encoder))
        options: RequestOptions = {"max_tokens": max_tokens, "stop": stop, "tenant": tenant or self.tenant}
        requests = [maker.make(prompt, options) for prompt in prompts]
        parts = (requests[start : start + _QUEUED] for start in range(0, len(requests), _QUEUED))
        return [done.token_ids for part in parts for done in answer(self._loaded, part, NullSink())]

    def use_maps(self, maps: MapSet | str | Path) -> MapSet:
        """Add bridges or fills, or those in a folder that `polar lab heal` wrote, to those of the weights.

        They belong to the weights, which all objects of one model in this process share: add them before requests run.

        Raises:
            MapModelError: They were fitted for another model.
            MapDamagedError: A file is missing, altered or malformed.
        """
        chosen = MapSet.of(maps)
        chosen.place_on(self._loaded)
        self._maker = replace(self._maker, cost=self._loaded.decoder.cost)
        return chosen

    def export(self, program: Program | str, folder: str | Path, *, force: bool = False) -> Path:
        """Write a program as a separate model, a Hugging Face folder for other servers; return the folder.

        Args:
            program: Visits each layer at most once, without bridges or damping.
            folder: Folder to write; it appears complete or not at all.
            force: Replace a model that is already stored there.

        Raises:
            ProgramError: The program may not run, or no plain model can compute it (`ExportError`).
            FolderError: The folder cannot be written, or already contains something (`FolderExistsError`).
        """
        chosen = Program.of(program)
        self.policy.check(chosen, self._loaded.decoder.cost)
        return export(self._loaded, chosen, folder, force=force)

    def _program(self, program: Program | str | None) -> Program:
        """A program that may run; None = identity."""
        decoder = self._loaded.decoder
        chosen = Program.identity(decoder.depth) if program is None else Program.of(program)
        self.policy.check(chosen, decoder.cost)
        return chosen
