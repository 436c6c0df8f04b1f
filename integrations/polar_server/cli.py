"""The commands `polar serve` and `polar dashboard`. Heavy imports wait until one runs."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated

import typer

from polar_sdk.cli import options as opt
from polar_sdk.errors import InvalidRequestError, MissingExtraError
from polar_sdk.show.lines import print_line

if TYPE_CHECKING:
    from collections.abc import Iterator

    from polar_server.access import AccountStore, KeyStore
    from polar_server.pages import PageStore
    from polar_server.replies import ReplyStore

Host = Annotated[str, typer.Option(help="Address to listen on.")]


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.command(epilog="Example: polar serve --port 8000")(serve)
    app.command(epilog="Example: polar dashboard --zone Europe/Berlin")(dashboard)


def serve(
    host: Host = "127.0.0.1",
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
    policy: opt.PolicyFile = None,
    router: opt.RouterFolder = None,
    ledger: opt.Ledger = None,
    no_ledger: opt.NoLedger = False,
) -> None:
    """Serve a model through an OpenAI-compatible API; SIGTERM lets answers finish, a second one does not."""
    with _extra("polar serve"):
        from polar_server.app import build
        from polar_server.log import log_as_json
        from polar_server.settings import Settings
        from polar_server.uvicorn_server import UvicornServer
    keys, replies, accounts = _access(host, ledger, no_ledger=no_ledger, require_keys=require_keys)
    engine = opt.load_model(
        model,
        tenant=tenant,
        tag=tag,
        device=device,
        device_map=device_map,
        precision=precision,
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
            replies=replies,
            accounts=accounts,
            pages=None if no_ledger else _pages(ledger),
        )
    )
    log_as_json()
    server = UvicornServer(app, host=host, port=port)
    server.on_start = lambda where: print_line(f"Serving {app.state.server.catalog.name} on {where}/v1", err=True)
    server.run()


def dashboard(
    host: Host = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65_535, help="Port to listen on; 0 = any that is free.")] = 8001,
    require_keys: Annotated[
        bool | None,
        typer.Option(
            "--require-keys/--no-require-keys",
            help="Ask for API keys with the scope dashboard; always where --host is not this machine.",
            show_default=False,
        ),
    ] = None,
    zone: Annotated[str, typer.Option(help="IANA time zone of today and of all times.", metavar="ZONE")] = "UTC",
    ledger: opt.Ledger = None,
) -> None:
    """Show the operations page of a ledger in the browser; needs no server and no model, and changes nothing."""
    with _extra("polar dashboard"):
        from polar_server.access import find_access
        from polar_server.pages import build_pages, find_pages
        from polar_server.uvicorn_server import PlainServer
    keys = None
    if not _is_open(host, require_keys, "see this page"):
        keys, *_ = find_access(ledger)
        _check_keys(keys, "dashboard")
    pages = find_pages(ledger, zone)
    pages.check()
    server = PlainServer(build_pages(pages, keys), host=host, port=port)
    server.on_start = lambda where: print_line(f"Operations page on {where}/polar/; Ctrl-C ends it.", err=True)
    server.run()


@contextmanager
def _extra(command: str) -> Iterator[None]:
    """Imports of what only the extra brings.

    Raises:
        MissingExtraError: It is not installed.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        raise MissingExtraError(
            f"`{command}` needs {error.name!r}.",
            hint="Install the extra server of polar-llm, in a clone: `pip install '.[server]'`.",
        ) from error


def _pages(ledger: str | None) -> PageStore | None:
    """The operations page; None, and a line that says so, where what it needs is not installed."""
    from polar_server.pages import find_pages

    try:
        return find_pages(ledger)
    except ImportError as error:
        print_line(f"There is no page at /polar/: {error}", err=True)
        return None


def _is_open(host: str, require_keys: bool | None, what: str) -> bool:
    """Whether nobody is asked for a key, since only this machine can reach the server.

    Raises:
        InvalidRequestError: It would be open to the network.
    """
    from polar_server.settings import LOOPBACK

    local = host in LOOPBACK
    if require_keys is False and not local:
        raise InvalidRequestError(
            f"--host {host} would let anyone on the network {what}; leave out --no-require-keys, or use {LOOPBACK[0]}."
        )
    return local and not require_keys


def _check_keys(keys: KeyStore, scope: str | None = None) -> None:
    """Refuse to start where no key opens anything.

    Raises:
        InvalidRequestError: None does.
    """
    if not keys.any_active(scope):
        which, how = ("", "") if scope is None else (f" with the scope {scope}", f" and its --scope {scope}")
        raise InvalidRequestError(
            f"there is no API key{which}, so nobody could use this server; see `polar key create`{how}."
        )


def _access(
    host: str, ledger: str | None, *, no_ledger: bool, require_keys: bool | None
) -> tuple[KeyStore | None, ReplyStore | None, AccountStore | None]:
    """The stores of keys, replies and accounts; no keys where nobody but this machine can reach the server.

    Raises:
        InvalidRequestError: The server would be open to the network.
    """
    from polar_server.access import find_access

    is_open = _is_open(host, require_keys, "use this model")
    if no_ledger:
        if not is_open:
            raise InvalidRequestError("API keys are kept in the ledger; leave out --no-ledger.")
        return None, None, None
    keys, replies, accounts = find_access(ledger)
    if is_open:
        return None, replies, accounts
    _check_keys(keys)
    return keys, replies, accounts
