"""The command `polar serve`. Heavy imports wait until it runs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, cast

import typer

from polar_sdk.cli import options as opt
from polar_sdk.errors import InvalidRequestError, MissingExtraError
from polar_sdk.show.lines import print_line

if TYPE_CHECKING:
    from polar_sdk.serving.drafts import Speculate
    from polar_server.access import Access, KeyStore


def register(app: typer.Typer) -> None:
    """Add `polar serve`."""
    app.command(epilog="Example: polar serve --port 8000")(serve)


def serve(
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65_535, help="Port to listen on; 0 = any that is free.")] = 8000,
    name: Annotated[str | None, typer.Option(help="Id of the model at /v1/models; default: its name.")] = None,
    drain: Annotated[float, typer.Option(min=0, help="Seconds that answers have to finish after SIGTERM.")] = 30.0,
    timeout: Annotated[float | None, typer.Option(min=0.001, help="Max seconds of one answer.")] = None,
    max_body: Annotated[int, typer.Option(min=1, help="Max bytes of a request body.")] = 4 * 2**20,
    usage_always: Annotated[bool, typer.Option("--usage-always", help="End every stream with its usage.")] = False,
    require_keys: Annotated[
        bool | None,
        typer.Option(
            "--require-keys/--no-require-keys",
            help="Ask for API keys (`polar key create`); always where --host is not this machine.",
            show_default=False,
        ),
    ] = None,
    strict: Annotated[bool, typer.Option("--strict", help="Refuse unknown fields rather than count them.")] = False,
    tenant: opt.Tenant = "default",
    tag: opt.Tags = None,
    model: opt.Model = None,
    device: opt.Device = "auto",
    device_map: opt.DeviceMap = None,
    precision: opt.Precision = "auto",
    speculate: opt.SpeculateMode = "off",
    policy: opt.PolicyFile = None,
    router: opt.RouterFolder = None,
    ledger: opt.Ledger = None,
    no_ledger: opt.NoLedger = False,
) -> None:
    """Serve a model through an OpenAI-compatible API; SIGTERM lets answers finish, a second one does not."""
    try:
        from polar_server.app import build
        from polar_server.log import log_as_json
        from polar_server.settings import Settings
        from polar_server.uvicorn_server import UvicornServer
    except ModuleNotFoundError as error:
        raise MissingExtraError(
            f"`polar serve` needs {error.name!r}.",
            hint="Install the extra server of polar-llm, in a clone: `pip install '.[server]'`.",
        ) from error
    keys, access = _access(host, ledger, no_ledger=no_ledger, require_keys=require_keys)
    engine = opt.load_model(
        model,
        tenant=tenant,
        tag=tag,
        device=device,
        device_map=device_map,
        precision=precision,
        speculate=cast("Speculate", speculate),
        policy=policy,
        router=router,
        ledger=ledger,
        no_ledger=no_ledger,
    )
    app = build(
        Settings(
            engine=engine,
            name=name,
            max_body=max_body,
            timeout=timeout,
            usage_always=usage_always,
            strict=strict,
            drain=drain,
            keys=keys,
            replies=None if access is None else access.replies,
            rates=None if access is None else access.rates,
            accounts=None if access is None else access.accounts,
        )
    )
    log_as_json()
    server = UvicornServer(app, host=host, port=port)
    server.on_start = lambda where: print_line(f"Serving {app.state.server.catalog.name} on {where}/v1", err=True)
    server.run()


def _access(
    host: str, ledger: str | None, *, no_ledger: bool, require_keys: bool | None
) -> tuple[KeyStore | None, Access | None]:
    """The stores of the ledger, and that of keys unless nobody but this machine can reach the server.

    Raises:
        InvalidRequestError: The server would be open to the network.
    """
    from polar_server.access import find_access
    from polar_server.settings import LOOPBACK

    local = host in LOOPBACK
    if require_keys is False and not local:
        raise InvalidRequestError(
            f"--host {host} would let anyone on the network use this model; leave out --no-require-keys, or use "
            f"{LOOPBACK[0]}."
        )
    if no_ledger:
        if require_keys or not local:
            raise InvalidRequestError("API keys are kept in the ledger; leave out --no-ledger.")
        return None, None
    access = find_access(ledger)
    if local and not require_keys:
        return None, access
    if not access.keys.any_active():
        raise InvalidRequestError("there is no API key, so nobody could use this server; see `polar key create`.")
    return access.keys, access
