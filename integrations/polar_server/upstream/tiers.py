"""Requests of tiers that have an upstream go there; all others run in the engine of this process.

A tier with upstreams has one program, the policy's, with which they were exported; no promise of a router holds for it.
If a URL follows `programs+`, it is a vLLM with `polar_vllm`, to which the program of each request is sent; the router
chooses it here, as for a tier of this process. Knows settings and options; `remote` relays, `client` speaks HTTP.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final

from polar_sdk import Program, __version__
from polar_sdk.engine.hashes import hash_fills
from polar_sdk.errors import GrammarError, InvalidRequestError
from polar_sdk.models.export import plain_layers
from polar_sdk.request.admission import bound_of
from polar_server.errors import ApiError
from polar_server.upstream import remote
from polar_server.upstream.backends import Backend, place_of
from polar_server.upstream.client import Client

if TYPE_CHECKING:
    from collections.abc import Generator, Mapping, Sequence

    from polar_sdk import Chunk, PolarModel
    from polar_sdk.request.options import Prompt, RequestOptions
    from polar_sdk.serving.request import Request
    from polar_sdk.usage import UsageBound

PROGRAMS: Final = "programs+"
"""Stands before the URL of an upstream that is sent the program of each request."""
_FORMS: Final = ("schema", "regex", "choice", "grammar")
_SCORES: Final = ("logprobs", "prompt_logprobs")
"""Options that an upstream cannot serve so that the answer is the engine's."""


class Tiers:
    """The engine, or an upstream in its place, by the tier of a request.

    Args:
        engine: What computes all other tiers, reads prompts and knows FLOPs.
        backends: URLs by tier; a URL may end in `#` and the id of a model there.
        key: API key for upstreams.
        default_tier: The tier of a request that names none.

    Raises:
        InvalidRequestError: A tier or a URL cannot be.
        ExportError: No plain model runs the program of a tier.
    """

    def __init__(
        self, engine: PolarModel, backends: Mapping[str, Sequence[str]], key: str | None, default_tier: str | None
    ) -> None:
        self.engine, self._default = engine, default_tier
        self._client = Client(key)
        self.backends = {tier: self._backend(tier, urls) for tier, urls in backends.items()}

    def _backend(self, tier: str, urls: Sequence[str]) -> Backend:
        if tier not in self.engine.policy.tiers:
            known = ", ".join(self.engine.policy.tiers) or "none"
            raise InvalidRequestError(f"--backend {tier}=…: the policy has no tier {tier!r}; it has: {known}.")
        bare = [url.removeprefix(PROGRAMS) for url in urls]
        sends = {url != each for url, each in zip(urls, bare, strict=True)}
        if len(sends) > 1:
            raise InvalidRequestError(
                f"--backend {tier}=…: some URLs start with {PROGRAMS!r} and some do not; a tier's upstreams must "
                "be of one kind."
            )
        program, digests = None, None
        if True in sends:
            fills = hash_fills(self.engine.decoder.fills)
            digests = {"model": self.engine.fingerprint, "fills": fills, "version": __version__}
        else:
            _, program = self.engine.policy.program_for(tier, self.engine.depth)
            plain_layers(program)
        longest = max(map(len, self.engine.loaded.tokenizer.get_vocab()))
        places = tuple(place_of(url, self._client, digests) for url in bare)
        return Backend(tier, program, places, self._client, longest)

    def check(self) -> None:
        """Look at the upstreams that are sent programs, before the first request.

        Raises:
            UpstreamError: One of them runs other files than this server, or none of a tier can be reached.
        """
        for backend in self.backends.values():
            backend.check()

    def programs(self) -> dict[str, Program]:
        """Programs of the tiers whose upstreams run one alone."""
        return {tier: backend.program for tier, backend in self.backends.items() if backend.program is not None}

    def stream(self, prompt: Prompt, **options: Any) -> Generator[Chunk, None, None]:
        """Answer a prompt, as `PolarModel.stream` does."""
        backend = self._of(prompt, options)
        if backend is None:
            return self.engine.stream(prompt, **options)
        return remote.stream(self.engine, self.backends, self._request(backend, prompt, options))

    def bound(self, prompt: Prompt, **options: Any) -> UsageBound:
        """The maximum that a request can use, as `PolarModel.bound` says."""
        backend = self._of(prompt, options)
        if backend is None:
            return self.engine.bound(prompt, **options)
        return bound_of(self._request(backend, prompt, options), self.engine.decoder.cost)

    def close(self) -> None:
        """Close the connections to upstreams."""
        self._client.close()

    def _of(self, prompt: Prompt, options: Mapping[str, Any]) -> Backend | None:
        tier = options.get("compute")
        backend = self.backends.get(self._default if tier is None else tier)  # type: ignore[arg-type]
        if backend is None or options.get("program") is not None:
            return None
        own: Any = {name: value for name, value in options.items() if name in ("tenant", "tags", "template", "tools")}
        floor = self.engine.floor_of(prompt, **own)
        return backend if floor is None or floor.allows(backend.tier) else None  # the engine raises it

    def _request(self, backend: Backend, prompt: Prompt, options: RequestOptions | Mapping[str, Any]) -> Request:
        """Check a request for an upstream; a budget may choose cheaper tiers among those that have one."""
        asked: dict[str, Any] = dict(options)
        if backend.program is not None:
            asked |= {"compute": None, "program": backend.program}
        why = f"another server computes the tier {backend.tier}, which cannot do this; use another tier."
        if any(asked.get(name) is not None for name in _FORMS):
            raise GrammarError(why)
        if any(asked.get(name) is not None for name in _SCORES):
            raise ApiError(f"logprobs: {why}", code="unsupported_value", param="logprobs")
        if asked.get("stop_repeats") is not None:  # which no other server knows, and some would drop it
            raise ApiError(f"stop_repeats: {why}", code="unsupported_value", param="stop_repeats")
        request = self.engine.request(prompt, **asked)
        # Those of the request are not below its floor.
        tiers = {tier: program for tier, program in self.programs().items() if tier in request.tiers}
        if backend.program is None:
            cheaper = request.tiers
            tiers |= {
                tier: cheaper[tier]
                for tier, other in self.backends.items()
                if other.program is None and tier in cheaper and self._runs_there(cheaper[tier])
            }
            if not self._runs_there(request.program):  # a bridge: full depth keeps what the router promised
                request = replace(request, program=Program.identity(self.engine.depth))
        return replace(request, tier=backend.tier, tiers=tiers)

    def _runs_there(self, program: Program) -> bool:
        """Whether a vLLM can be sent a program."""
        in_order = tuple(step.first for step in program) == tuple(range(self.engine.depth))
        return in_order and all(step.plain for step in program)
