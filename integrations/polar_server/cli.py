"""The commands `polar serve` and `polar dashboard`. Heavy imports wait until one runs."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from polar_sdk.cli import options as opt
from polar_sdk.errors import InvalidRequestError, MissingExtraError
from polar_sdk.show.lines import print_line

if TYPE_CHECKING:
    from polar_server.access.keys import KeyRule
    from polar_server.deployment.launch import Launch

_SERVER, _RAY, _AUDITS = "Server", "Ray", "Audits"
Host = Annotated[str, typer.Option(help="Address to listen on.", rich_help_panel=_SERVER)]
Port = Annotated[
    int, typer.Option(min=0, max=65_535, help="Port to listen on; 0 = any free port.", rich_help_panel=_SERVER)
]


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.command(epilog="Example: polar serve --port 8000")(serve)
    app.command(epilog="Example: polar dashboard --zone Europe/Berlin")(dashboard)


def serve(
    host: Host = "127.0.0.1",
    port: Port = 8000,
    name: Annotated[
        list[str] | None,
        typer.Option(help="Id of the model at /v1/models; repeatable; default: its name.", rich_help_panel=_SERVER),
    ] = None,
    lenient: Annotated[
        bool,
        typer.Option(
            "--lenient", help="Ignore unknown fields of a body instead of refusing them.", rich_help_panel=_SERVER
        ),
    ] = False,
    drain: Annotated[
        float,
        typer.Option(min=0, help="Seconds that answers may take to finish after SIGTERM.", rich_help_panel=_SERVER),
    ] = 30.0,
    timeout: Annotated[
        float | None, typer.Option(min=0.001, help="Maximum seconds of one answer.", rich_help_panel=_SERVER)
    ] = None,
    require_keys: Annotated[
        bool | None,
        typer.Option(
            "--require-keys/--no-require-keys",
            help="Whether every call needs an API key (`polar key create`), or none; always if --host is not this "
            "machine. Default: calls that do not come directly from this machine need one.",
            show_default=False,
            rich_help_panel=_SERVER,
        ),
    ] = None,
    otel: Annotated[
        bool,
        typer.Option(
            "--otel",
            help="Emit OpenTelemetry spans and metrics; start the server with `opentelemetry-instrument`.",
            rich_help_panel=_SERVER,
        ),
    ] = False,
    backend: Annotated[
        list[str] | None,
        typer.Option(
            help="TIER=URL: another server with OpenAI's API runs this tier's program (`polar export`). Repeatable; "
            "several of one tier share its requests. URL#MODEL names the model there, POLAR_BACKEND_KEY the API key. "
            "TIER=programs+URL: a vLLM with polar_vllm, to which each request's program is sent.",
            rich_help_panel=_SERVER,
        ),
    ] = None,
    embeddings: Annotated[
        str | None,
        typer.Option(
            help="Folder of a sentence-transformers model for /v1/embeddings; needs the extra `embeddings`.",
            metavar="FOLDER",
            rich_help_panel=_SERVER,
        ),
    ] = None,
    alert_url: Annotated[
        str | None,
        typer.Option(
            help="Webhook (https, or on this machine) that is notified when a tier's promise is at risk.",
            metavar="URL",
            rich_help_panel=_SERVER,
        ),
    ] = None,
    alert_secret: Annotated[
        str | None,
        typer.Option(help="File with the secret that signs alerts.", metavar="FILE", rich_help_panel=_SERVER),
    ] = None,
    ray: Annotated[
        str | None,
        typer.Option(
            help="Serve on Ray, on the cluster that RAY_ADDRESS names or on this machine, with N replicas, such as 2, "
            "or 1-4 to scale with the load.",
            metavar="N",
            rich_help_panel=_RAY,
        ),
    ] = None,
    cpus: Annotated[float, typer.Option(min=0, help="Cores of one replica.", rich_help_panel=_RAY)] = 1.0,
    gpus: Annotated[float, typer.Option(min=0, help="GPUs of one replica.", rich_help_panel=_RAY)] = 0.0,
    write_config: Annotated[
        Path | None,
        typer.Option(
            help="Write the JSON configuration for `serve deploy` and serveConfigV2; '-' prints it.",
            rich_help_panel=_RAY,
        ),
    ] = None,
    tenant: opt.Tenant = "default",
    model: opt.Model = None,
    device: opt.Device = "auto",
    device_map: opt.DeviceMap = None,
    precision: opt.Precision = "auto",
    speculate: opt.SpeculateMode = None,
    policy: opt.PolicyFile = None,
    router: opt.RouterFolder = None,
    ledger: opt.Ledger = None,
    no_ledger: opt.NoLedger = False,
    audit_share: Annotated[
        list[str] | None,
        typer.Option(
            help="Share of certified tiers' answers to audit at full depth in idle time, at your own cost, such as "
            "0.02, or TIER=SHARE, repeatable; default: 0.005 with a ledger.",
            rich_help_panel=_AUDITS,
        ),
    ] = None,
    audit_key: Annotated[
        Path | None,
        typer.Option(
            help="File with the key that selects audits, the same on all replicas; default: audit.key in the data "
            "folder.",
            rich_help_panel=_AUDITS,
        ),
    ] = None,
    audit_keep: Annotated[
        list[str] | None,
        typer.Option(
            help="Tenant whose audited prompts are kept on this machine, unencrypted, for `polar recalibrate`; "
            "repeatable; '*' = all; default: none.",
            rich_help_panel=_AUDITS,
        ),
    ] = None,
    audit_keep_days: Annotated[
        float, typer.Option(min=0.01, help="How many days prompts are kept.", rich_help_panel=_AUDITS)
    ] = 30.0,
) -> None:
    """Serve a model through an OpenAI-compatible API; SIGTERM lets answers finish, a second SIGTERM does not."""
    key = None if audit_key is None else str(audit_key)
    lists = {"backend": backend, "name": name, "audit_share": audit_share, "audit_keep": audit_keep}
    asked = {**locals(), "audit_key": key, **{option: given or () for option, given in lists.items()}}
    try:
        from polar_server.deployment.launch import Launch
    except ModuleNotFoundError as error:
        raise _missing(error, "server") from error
    if ray is None and write_config is not None:
        raise InvalidRequestError("--write-config needs --ray; add it, with the number of replicas.")
    launch = Launch(**{option: asked[option] for option in Launch.options()})
    if ray is None:
        _serve_here(launch, port)
    else:
        _serve_on_ray(launch, ray, cpus, gpus, port, write_config)


def _serve_here(launch: Launch, port: int) -> None:
    try:
        from polar_server.app import build
        from polar_server.deployment.launch import log_as_json
        from polar_server.deployment.uvicorn_server import UvicornServer, listening
    except ModuleNotFoundError as error:
        raise _missing(error, "server") from error
    log_as_json()
    listening(launch.host, port).close()  # before the model is loaded
    settings = launch.settings()
    server = UvicornServer(build(settings), host=launch.host, port=port)
    server.on_start = lambda where: _announce(f"Serving {settings.model_id} on {where}/v1", settings.key_rule)
    server.run()


def _announce(started: str, rule: KeyRule) -> None:
    """Say that a server listens, and what is not enforced there."""
    from polar_server.settings import NOT_ENFORCED

    for line in (started, NOT_ENFORCED.get(rule)):
        if line is not None:
            print_line(line, err=True)


def _serve_on_ray(
    launch: Launch, replicas: str, cpus: float, gpus: float, port: int, write_config: Path | None
) -> None:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S", "60")
    os.environ.setdefault("RAY_worker_niceness", "0")  # 15 by default: beside any other work, replicas starve
    try:
        from polar_server.deployment import ray_serve
    except ModuleNotFoundError as error:
        raise _missing(error, "ray") from error
    wanted = ray_serve.Replicas.of(replicas, cpus=cpus, gpus=gpus)
    if write_config is None:
        stores = launch.stores()  # here, since an error of a replica is hard to find
        _announce(f"Serving on Ray at http://{launch.host}:{port}/v1", stores["require_keys"])
        ray_serve.run(launch, wanted, port=port)
        return
    text = json.dumps(ray_serve.config(launch, wanted, port=port), indent=2)
    if str(write_config) == "-":
        typer.echo(text)
        return
    try:
        write_config.write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        raise InvalidRequestError(
            f"--write-config {str(write_config)!r} cannot be written ({error.strerror})."
        ) from error


def dashboard(
    host: Host = "127.0.0.1",
    port: Port = 8001,
    require_keys: Annotated[
        bool | None,
        typer.Option(
            "--require-keys/--no-require-keys",
            help="Whether every visit needs an API key with the scope dashboard, or none; always if --host is not this "
            "machine. Default: visits that do not come directly from this machine need one.",
            show_default=False,
        ),
    ] = None,
    zone: Annotated[str, typer.Option(help="IANA time zone of the page's dates and times.", metavar="ZONE")] = "UTC",
    ledger: opt.Ledger = None,
) -> None:
    """Show the operations page of a ledger in the browser; needs no server and no model, and changes nothing."""
    try:
        from polar_server.access.keys import KeyGuard
        from polar_server.access.stores import find_access
        from polar_server.deployment.uvicorn_server import PlainServer
        from polar_server.http.pages import build_pages, find_pages
        from polar_server.settings import key_rule
    except ModuleNotFoundError as error:
        raise _missing(error, "server", "polar dashboard") from error
    rule, keys = key_rule(host, require_keys, "see this page"), find_access(ledger).keys
    if rule == "always" and not keys.any_active("dashboard"):
        raise InvalidRequestError(
            "there is no API key with the scope dashboard, so nobody could see this page; create one with "
            "`polar key create` and --scope dashboard."
        )
    pages = find_pages(ledger, zone)
    pages.check()
    server = PlainServer(build_pages(pages, KeyGuard(keys, rule)), host=host, port=port)
    server.on_start = lambda where: _announce(f"Operations page on {where}/polar/; Ctrl-C ends it.", rule)
    server.run()


def _missing(error: ModuleNotFoundError, extra: str, command: str = "polar serve") -> MissingExtraError:
    return MissingExtraError(
        f"`{command}` needs {error.name!r}.",
        hint=f"Install the extra {extra} of polar-llm, in a clone: `pip install '.[{extra}]'`.",
    )
