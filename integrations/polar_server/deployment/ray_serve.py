"""Replicas on Ray Serve: one deployment whose replicas are each the whole server, and the file that describes it.

A replica runs the same app as uvicorn does, so tokens pass through no second process of ours. Ray defaults that do not
fit are set here: the number of calls at a time per replica (5), how long it may finish them (20 s), and which replica
gets a call. Ray's router sees headers but no bodies: a call goes to the replica that had the caller's last one, which
keeps the prefix of its prompts, unless another one is less busy by a few calls. Knows the options of a server, and no
model.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import pickle
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final

from ray import serve
from ray.serve.context import _get_global_client
from ray.serve.experimental.consistent_hash_router import ConsistentHashRouter

from polar_sdk.errors import InvalidRequestError
from polar_server.app import build
from polar_server.deployment.launch import Launch, log_as_json
from polar_server.settings import LOOPBACK

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping

    from ray.serve import Application
    from ray.serve.context import ReplicaContext
    from ray.serve.request_router import PendingRequest, RunningReplica
    from starlette.applications import Starlette

    from polar_server.server import Server

APPLICATION: Final = "polar"
DEPLOYMENT: Final = "Polar"
ROWS: Final = 32
"""Rows of an engine that run together (`polar_sdk.serving.places`)."""
WAITING: Final = 96
"""Calls that may wait in a replica beside them: the engine is fair among tenants, Ray's queue is not."""
QUEUED: Final = 256
"""Calls that may wait in a proxy; more are refused with 503."""
SLACK: Final = 4
"""How many calls more than the idlest replica one may have, and still be given its callers' next ones."""
IDLE_CONNECTION_S: Final = 75
"""Longer than what balancers in front keep a connection, so that they close it first."""
_STARTS: Final = 4
_LOOK_S: Final = 1.0
"""How often a replica asks whether Ray ends it. Unit: seconds."""
_log: Final = logging.getLogger("polar_server")
_LAST_WORDS_S: Final = 10.0
"""Time of a replica, after its answers, to store records and close."""
_AFFINE_HEADERS: Final = (b"authorization", b"x-session-id")


@dataclass(frozen=True, kw_only=True)
class Replicas:
    """The number of replicas, and the needs of each.

    Attributes:
        least: Replicas that always run.
        most: Replicas under load.
        cpus: Cores of one.
        gpus: GPUs of one.
    """

    least: int = 1
    most: int = 1
    cpus: float = 1.0
    gpus: float = 0.0

    @classmethod
    def of(cls, text: str, *, cpus: float, gpus: float) -> Replicas:
        """From `2` or `1-4`.

        Raises:
            InvalidRequestError: It is neither.
        """
        least, _, most = text.partition("-")
        numbers = [part for part in (least, most or least) if part.isascii() and part.isdigit() and len(part) < 5]
        if len(numbers) < 2 or not 1 <= int(numbers[0]) <= int(numbers[1]):
            raise InvalidRequestError(f"--ray {text!r} is not a number of replicas, such as 2, or a range such as 1-4.")
        return cls(least=int(numbers[0]), most=int(numbers[1]), cpus=cpus, gpus=gpus)


class AffinityRouter(ConsistentHashRouter):  # type: ignore[misc]  # of an untyped package
    """Gives a caller's calls to one replica, by its API key and `x-session-id`, unless others are much less busy."""

    def _routing_key(self, pending_request: PendingRequest | None) -> str | None:
        if pending_request is None:
            return None
        key = affinity_of(_headers(pending_request))
        return key or super()._routing_key(pending_request)

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """The caller's replica first; where it is too busy, or has no room, the others, the idlest of two at random."""
        ranks: list[list[RunningReplica]] = await super().choose_replicas(candidate_replicas, pending_request)
        if pending_request is None or not ranks:
            return ranks
        busy = {one.replica_id: self.replica_queue_len_cache.get(one.replica_id) or 0 for one in candidate_replicas}
        (first,) = ranks[0]
        others = sorted(candidate_replicas, key=lambda one: busy[one.replica_id])
        if busy[first.replica_id] - busy[others[0].replica_id] > SLACK:
            return [others[:2], others]
        return [[first], others]


def affinity_of(headers: Mapping[bytes, bytes]) -> str | None:
    """The common mark of calls that belong together; None if they have none."""
    said = [headers[name] for name in _AFFINE_HEADERS if name in headers]
    return hashlib.sha256(b"\0".join(said)).hexdigest() if said else None


def _headers(pending_request: PendingRequest) -> Mapping[bytes, bytes]:
    """The headers of a call, as the proxy wrote them down; none where it is no HTTP call."""
    (packed, *_) = pending_request.args or (None,)
    request = pickle.loads(packed) if isinstance(packed, bytes) else packed
    scope = getattr(request, "asgi_scope", None) or {}
    return {name.lower(): value for name, value in scope.get("headers", ())}


class Replica:
    """One server; its app is made on the machine where it runs."""

    def __init__(self, launch: Mapping[str, Any]) -> None:
        self._launch = Launch.of(launch)

    def __serve_build_asgi_app__(self) -> Starlette:  # Ray's name
        log_as_json()
        app = build(self._launch.settings())
        within, server = app.router.lifespan_context, app.state.server

        @asynccontextmanager
        async def lifespan(app: Starlette) -> AsyncIterator[Any]:
            watching = asyncio.create_task(_drain_when_stopped(server))
            try:
                async with within(app) as state:
                    yield state
            finally:
                watching.cancel()

        app.router.lifespan_context = lifespan
        return app


async def _drain_when_stopped(server: Server) -> None:
    """Begin the drain when Ray ends this replica.

    Ray tells an app of its end only when the last call has ended, and kills the replica where that takes longer than
    `graceful_shutdown_timeout_s`: an answer that ran until then would be lost, and billed up to its last mark.
    """
    own = serve.get_replica_context()
    while not await asyncio.to_thread(_is_stopping, own):
        await asyncio.sleep(_LOOK_S)
    await server.answers.drain(server.settings.drain)


def _is_stopping(own: ReplicaContext) -> bool:
    """Whether Ray ends this replica; False if its controller cannot say."""
    try:
        applications = _get_global_client().get_serve_details()["applications"]
        replicas = applications[own.app_name]["deployments"][own.deployment]["replicas"]
    except Exception as error:  # the controller is away, or starts again; Ray's errors have no common class
        _log.warning("Ray's controller does not say whether this replica ends (%s)", error)
        return False
    return any(one["replica_id"] == own.replica_tag and one["state"] == "STOPPING" for one in replicas)


def deployment_options(launch: Launch, replicas: Replicas) -> dict[str, Any]:
    """The options of the deployment, as Ray's configuration files have them."""
    options: dict[str, Any] = {
        "max_ongoing_requests": ROWS + WAITING,
        "max_queued_requests": QUEUED,
        "graceful_shutdown_wait_loop_s": 0.5,
        "graceful_shutdown_timeout_s": launch.drain + _LAST_WORDS_S,
        "health_check_period_s": 5.0,
        "health_check_timeout_s": 30.0,
        "ray_actor_options": {"num_cpus": replicas.cpus, "num_gpus": replicas.gpus},
        "request_router_config": {"request_router_class": "polar_server.deployment.ray_serve:AffinityRouter"},
    }
    if replicas.least == replicas.most:
        return {**options, "num_replicas": replicas.least}
    return {
        **options,
        "autoscaling_config": {
            "min_replicas": replicas.least,
            "max_replicas": replicas.most,
            "target_ongoing_requests": ROWS // 2,
            "upscale_delay_s": 10.0,
            "downscale_delay_s": 300.0,
        },
    }


def app(arguments: Mapping[str, Any]) -> Application:
    """Ray's application, from the `args` of a configuration file: the options of a server, under `launch`."""
    return _bound(Launch.of(arguments.get("launch", {})), Replicas())


def _bound(launch: Launch, replicas: Replicas) -> Application:
    made = serve.deployment(serve.ingress()(Replica), name=DEPLOYMENT)
    return made.options(**deployment_options(launch, replicas)).bind(launch.values())


def config(launch: Launch, replicas: Replicas, *, port: int) -> dict[str, Any]:
    """The configuration for `serve deploy` and for a RayService's `serveConfigV2`.

    Proxies there listen on every node, so every caller comes from the network, and replicas ask for keys.

    Raises:
        InvalidRequestError: The server would be open to the network.
    """
    host = "0.0.0.0" if launch.host in LOOPBACK else launch.host
    if launch.require_keys is False or launch.no_ledger:
        raise InvalidRequestError(
            "proxies of a Ray cluster listen on every node, and anyone on the network could use this model; leave out "
            "--no-require-keys and --no-ledger."
        )
    return {
        "proxy_location": "EveryNode",
        "http_options": {"host": host, "port": port, "keep_alive_timeout_s": IDLE_CONNECTION_S},
        "applications": [
            {
                "name": APPLICATION,
                "route_prefix": "/",
                "import_path": "polar_server.deployment.ray_serve:app",
                "args": {"launch": replace(launch, host=host).values()},
                "deployments": [{"name": DEPLOYMENT, **deployment_options(launch, replicas)}],
            }
        ],
    }


def run(launch: Launch, replicas: Replicas, *, port: int) -> None:
    """Serve on Ray until the process is told to end: on the cluster that `RAY_ADDRESS` names, or on this machine."""
    import ray

    ray.init()
    start(launch.host, port)
    serve.run(_bound(launch, replicas), name=APPLICATION, route_prefix="/", blocking=True)


def start(host: str, port: int) -> None:
    """Start Ray Serve, which waits a minute for its proxy, however busy the machine: a few times, if it must be."""
    options = {"host": host, "port": port, "keep_alive_timeout_s": IDLE_CONNECTION_S}
    for attempt in range(_STARTS):
        try:
            serve.start(http_options=options)
        except TimeoutError:
            if attempt + 1 == _STARTS:
                raise
        else:
            return
