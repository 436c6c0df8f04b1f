"""The command `polar audit-upstream`. Arguments in, text out; the figures come from `reports.upstream_audit`."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Annotated, Final
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import ProxyHandler, Request, build_opener

import typer

from polar_billing.cli import options as opt
from polar_billing.errors import QueryError, UpstreamAuditError
from polar_sdk.show.lines import print_json

if TYPE_CHECKING:
    from polar_billing.reports.upstream_audit import WorkerCounts

_WAIT_S: Final = 10.0
_MAX_BYTES: Final = 2**20


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("audit-upstream", epilog="Example: polar audit-upstream http://10.0.0.5:8001")(audit_upstream)


def audit_upstream(
    urls: Annotated[
        list[str],
        typer.Argument(
            help="URL of each vLLM that runs programs; POLAR_BACKEND_KEY is the API key.",
            metavar="URL...",
            show_default=False,
        ),
    ],
    ledger: opt.Ledger = None,
    as_json: opt.Json = False,
) -> None:
    """Compare the work that vLLM workers executed with what the ledger billed for their answers.

    Executed work must equal what records needed plus what was replayed, rejected, unread, late or not sent, to the
    token; otherwise the command fails. Counts begin when a vLLM starts; run this while it is idle.
    """
    counts = {url: _counts(url) for url in urls}
    with opt.existing_ledger(ledger) as store:
        from polar_billing.reports.upstream_audit import audit, audits_view

        audits = [audit(store, url, each) for url, each in counts.items()]
    if as_json:
        print_json({"audits": [one.model_dump(mode="json") for one in audits]})
    else:
        opt.show(audits_view(audits))
    if open_ones := [one.verdict for one in audits if not one.closes]:
        raise UpstreamAuditError(" ".join(open_ones))


def _counts(url: str) -> WorkerCounts:
    from polar_billing.reports.upstream_audit import WorkerCounts

    parts = urlsplit(url)
    if parts.scheme not in {"http", "https"} or not parts.hostname:
        raise QueryError(f"{url[:200]!r} is not the URL of a vLLM.", hint="Write for example http://10.0.0.5:8001.")
    base = url.rstrip("/").removesuffix("/v1")
    key = os.environ.get("POLAR_BACKEND_KEY")
    headers = {"authorization": f"Bearer {key}"} if key else {}
    try:
        with build_opener(ProxyHandler({})).open(
            Request(f"{base}/v1/polar/metrics", headers=headers), timeout=_WAIT_S
        ) as answer:
            text = answer.read(_MAX_BYTES).decode(errors="replace")
    except HTTPError as error:
        error.close()
        hint = "Set POLAR_BACKEND_KEY." if error.code in {401, 403} else "Start it with VLLM_PLUGINS=polar."
        raise QueryError(f"{url} answered with status {error.code} instead of counts.", hint=hint) from error
    except (URLError, OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        why = getattr(reason, "strerror", None) or reason
        raise QueryError(f"{url} cannot be reached ({why}).", hint="Check the URL.") from error
    return WorkerCounts.parse(text, url)
