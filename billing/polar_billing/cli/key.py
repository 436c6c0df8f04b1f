"""The commands `polar key create`, `list`, `rotate` and `revoke`.

Arguments in, text out; the work is done by `access`.
"""

from __future__ import annotations

import re
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from polar_billing.cli import options as opt
from polar_billing.errors import AccessError
from polar_sdk.errors import did_you_mean
from polar_sdk.show.lines import print_json, print_line

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from polar_billing.access.keys import ApiKey, ApiKeys
    from polar_billing.ledger.ledger import Ledger

_Id = Annotated[str, typer.Argument(help="The key's id, which `polar key list` shows.", metavar="ID")]
_UNITS: Final = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days"}

_key = typer.Typer(no_args_is_help=True)


def register(app: typer.Typer) -> None:
    """Add `polar key` to the command `polar`."""
    app.add_typer(_key, name="key")


@_key.callback(epilog="Example: polar key list")
def key() -> None:
    """Manage API keys: who may use a server, which tenant pays, and how much is allowed."""


@_key.command(epilog="Example: polar key create acme search-team --tier economy --rpm 60 --expires 90d")
def create(
    tenant: Annotated[str, typer.Argument(help="Who is billed.", metavar="TENANT")],
    name: Annotated[str, typer.Argument(help="Name of the key.", metavar="NAME")],
    scope: Annotated[
        list[str] | None,
        typer.Option(help="infer (the default), usage:read, metrics or dashboard; may be repeated."),
    ] = None,
    model: Annotated[list[str] | None, typer.Option(help="Only this model; may be repeated.")] = None,
    tier: Annotated[list[str] | None, typer.Option(help="Only this tier; may be repeated.")] = None,
    tag: Annotated[
        list[str] | None, typer.Option(help="Tag of every usage record, key=value; may be repeated.")
    ] = None,
    max_tokens: Annotated[int | None, typer.Option(help="Maximum number of tokens in an answer.")] = None,
    rpm: Annotated[int | None, typer.Option(help="Maximum requests per minute.")] = None,
    tpm: Annotated[int | None, typer.Option(help="Maximum tokens per minute, prompt and answer.")] = None,
    parallel: Annotated[int | None, typer.Option(help="Maximum concurrent answers.")] = None,
    expires: Annotated[str | None, typer.Option(help="How long the key is valid, e.g. 12h or 90d.")] = None,
    as_json: opt.Json = False,
    ledger: opt.Ledger = None,
) -> None:
    """Create a key; it is printed once, and only its hash is stored."""
    with _open(ledger) as keys:
        _check_tiers(keys.ledger, tier or ())
        made, text = keys.create(
            tenant,
            name,
            expires_in=None if expires is None else _duration(expires),
            scopes=tuple(scope or ("infer",)),
            models=tuple(model or ()),
            tiers=tuple(tier or ()),
            tags=opt.tags_of(tag or ()),
            max_tokens=max_tokens,
            requests_per_minute=rpm,
            tokens_per_minute=tpm,
            parallel=parallel,
        )
    _show_new(made, text, as_json=as_json)


@_key.command("list", epilog="Example: polar key list --tenant acme --json")
def list_(tenant: opt.Tenant = None, as_json: opt.Json = False, ledger: opt.Ledger = None) -> None:
    """Show keys and what they allow; never a secret."""
    with _open(ledger) as keys:
        found = list(keys.all(opt.tenant_or_all(tenant)))
    rows = [_row(one) for one in found]
    if as_json:
        print_json([_facts(one) for one in found])
    elif not rows:
        print_line("There are no keys.")
    else:
        from polar_billing.reports.billing_tables import rows_view

        opt.show(rows_view(rows, "Keys"))


@_key.command(epilog="Example: polar key rotate abcd2345 --overlap 24h")
def rotate(
    key_id: _Id,
    overlap: Annotated[str, typer.Option(help="How long the old key stays valid, e.g. 0s or 24h.")] = "24h",
    as_json: opt.Json = False,
    ledger: opt.Ledger = None,
) -> None:
    """Create a key with the same rights, and let the old one expire."""
    with _open(ledger) as keys:
        made, text = keys.rotate(key_id, _duration(overlap))
    _show_new(made, text, as_json=as_json)


@_key.command(epilog="Example: polar key revoke abcd2345")
def revoke(key_id: _Id, ledger: opt.Ledger = None) -> None:
    """Revoke a key; every server refuses it within 5 seconds."""
    with _open(ledger) as keys:
        revoked = keys.revoke(key_id)
    print_line(f"Key {revoked.key_id} ({revoked.name}) of tenant {revoked.tenant} is revoked.")


@contextmanager
def _open(ledger: str | None) -> Iterator[ApiKeys]:
    with opt.open_ledger(ledger) as opened:
        from polar_billing.access.keys import ApiKeys

        yield ApiKeys(opened)


def _show_new(made: ApiKey, text: str, *, as_json: bool) -> None:
    if as_json:
        print_json({**_facts(made), "key": text})
        return
    print_line(f"Key {made.key_id} ({made.name}) of tenant {made.tenant}; this is the only time that it is shown:")
    typer.echo(text)


def _row(found: ApiKey) -> dict[str, Any]:
    return {
        "id": found.key_id,
        "tenant": found.tenant,
        "name": found.name,
        "state": found.state(datetime.now(UTC)),
        "scopes": " ".join(found.scopes),
        "models": " ".join(found.models),
        "tiers": " ".join(found.tiers),
        "tags": " ".join(f"{name}={value}" for name, value in found.tags.items()),
        "max_tokens": found.max_tokens,
        "rpm": found.requests_per_minute,
        "tpm": found.tokens_per_minute,
        "parallel": found.parallel,
        "expires_at": None if found.expires_at is None else found.expires_at.isoformat(timespec="seconds"),
        "rotated_from": found.rotated_from,
    }


def _facts(found: ApiKey) -> dict[str, Any]:
    """The same for programs: several values are a list."""
    listed = {"scopes": list(found.scopes), "models": list(found.models), "tiers": list(found.tiers)}
    return {**_row(found), **listed, "tags": dict(found.tags)}


def _check_tiers(ledger: Ledger, tiers: Sequence[str]) -> None:
    """Refuse tiers that are neither in a price book of the ledger nor among the usual ones.

    Raises:
        AccessError: There is one.
    """
    from polar_billing.prices.entries import USUAL_TIERS

    priced = (entry.tiers for book in ledger.price_books().values() for entry in book.prices)
    known = {*USUAL_TIERS, *(name for tiers in priced for name in tiers)}
    for tier in tiers:
        if tier not in known:
            raise AccessError(f"there is no tier {tier[:40]!r}; {did_you_mean(tier, known)}")


def _duration(text: str) -> timedelta:
    match = re.fullmatch(r"(\d{1,6})([smhd])", text)
    if match is None:
        raise AccessError(f"{text[:40]!r} is not a duration; write it like 30m, 24h or 90d.")
    return timedelta(**{_UNITS[match[2]]: int(match[1])})
