"""Upstreams and the tiers that they compute: which of them to ask, and what to send."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import urlsplit

from polar_sdk.errors import InvalidRequestError
from polar_server.upstream.client import UpstreamError

if TYPE_CHECKING:
    from polar_sdk import Program
    from polar_sdk.serving.request import Request
    from polar_server.upstream.client import Client, Served

_log: Final = logging.getLogger("polar_server")
_DOWN_S: Final = 2.0
"""How long an upstream that cannot be reached is asked last. Unit: seconds."""


Digests = Mapping[str, str]
"""Fingerprint of a `model`, digest of its `fills`, `version` of this package."""


@dataclass(eq=False)
class Place:
    """One upstream of a tier."""

    base: str
    """URL up to `/v1`."""
    model: str | None
    client: Client
    digests: Digests | None = None
    """The digests that it must have where it is sent each request's program; None = it runs one that was exported."""
    running: int = 0
    """Requests of this process that it works on."""
    down_until: float = 0.0
    found: Served | None = field(default=None, init=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, init=False)

    def add(self, requests: int) -> None:
        """Count requests that begin, or end where negative."""
        with self._lock:
            self.running += requests

    def served(self) -> Served:
        """The model to ask for; looked up once.

        Raises:
            UpstreamError: It cannot be reached, has no such model, or runs other weights, maps or another version than
                this server.
        """
        if (found := self.found) is None:
            found = self.client.served(self.base, self.model)
            if self.digests is not None:
                found = replace(found, worker=self._check(self.digests))
            self.found = found
        return found

    def _check(self, wanted: Digests) -> str:
        """The id of the worker there."""
        there = self.client.digests(self.base)
        for name, own in wanted.items():
            if (other := there.get(name)) != own:
                what = f"runs {name} {str(other)[:12]}…" if other else "runs no programs"
                raise UpstreamError(
                    f"{self.base} {what}, not {name} {own[:12]}… like this server; start it with the same files, as "
                    "described in docs/serving.md."
                )
        return str(there.get("worker"))


@dataclass(frozen=True)
class Backend:
    """The upstreams of a tier.

    Attributes:
        tier: Its name.
        program: What runs there; None = the program of each request, by the router or the policy of this server.
        places: The upstreams, all of which run it.
        client: Connections to them.
        longest_token: Characters of the longest token of their vocabulary.
    """

    tier: str
    program: Program | None
    places: tuple[Place, ...]
    client: Client
    longest_token: int

    def by_load(self) -> list[Place]:
        """The upstreams in the order in which to ask them: those that answer, and of these the idlest first."""
        now = time.monotonic()
        return sorted(self.places, key=lambda place: (place.down_until > now, place.running))

    def is_gone(self, place: Place, error: UpstreamError) -> bool:
        """Whether another upstream may be asked instead; notes that this one is gone, or must be looked at again."""
        if error.code not in {"upstream_unavailable", "upstream_restarted"}:
            return False
        place.found = None
        if error.code == "upstream_unavailable":
            place.down_until = time.monotonic() + _DOWN_S
        return True

    def check(self) -> None:
        """Compare what upstreams that are sent programs run with what this server has.

        Raises:
            UpstreamError: One runs something else, or none can be reached.
        """
        failures = []
        for place in self.places if self.program is None else ():
            try:
                place.served()
            except UpstreamError as error:
                if not self.is_gone(place, error):
                    raise UpstreamError(f"--backend {self.tier}=…: {error}") from error
                _log.warning("--backend %s=…: %s", self.tier, error)
                failures.append(place.base)
                if len(failures) == len(self.places):
                    raise UpstreamError(
                        f"--backend {self.tier}=…: nothing answers at {', '.join(failures)}; start it before this "
                        "server, or check the URL."
                    ) from error

    def body(self, request: Request, served: Served) -> dict[str, Any]:
        """The request as the upstream takes it."""
        sampling = request.sampling
        body: dict[str, Any] = {
            "model": served.model,
            "prompt": list(request.tokens),
            "max_tokens": request.max_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if served.counts_each:
            body["stream_options"]["continuous_usage_stats"] = True
        if sampling.seed is not None:
            body["seed"] = sampling.seed
        if request.stops:
            body["stop"] = list(request.stops)
        if self.program is None:
            digests = self.places[0].digests or {}
            body["vllm_xargs"] = {"polar": request.program.text, "polar_fills": digests.get("fills", "")}
        return body | _beyond(request)


def _beyond(request: Request) -> dict[str, Any]:
    """Options beyond the common ones, as vLLM and PoLar servers name them; only those that say something."""
    sampling, steering = request.sampling, request.steering
    asked: dict[str, Any] = {"top_k": sampling.top_k, "min_p": sampling.min_p}
    if steering is not None:
        asked |= {
            "logit_bias": {str(token): bias for token, bias in steering.bias.items()},
            "presence_penalty": steering.presence,
            "frequency_penalty": steering.frequency,
            "repetition_penalty": 0 if steering.repetition == 1 else steering.repetition,
            "ignore_eos": bool(steering.forbidden),
        }
    return {name: value for name, value in asked.items() if value}


def place_of(url: str, client: Client, digests: Digests | None = None) -> Place:
    """The upstream that `--backend` names, without what stands before its URL.

    Raises:
        InvalidRequestError: That is not the URL of a server.
    """
    parts = urlsplit(url)
    if parts.scheme not in {"http", "https"} or not parts.hostname or parts.query or parts.username:
        raise InvalidRequestError(
            f"--backend …={url}: this is not the URL of a server; write for example http://10.0.0.5:8000."
        )
    path = parts.path.rstrip("/")
    base = f"{parts.scheme}://{parts.netloc}{path if path.endswith('/v1') else f'{path}/v1'}"
    return Place(base, parts.fragment or None, client, digests)
