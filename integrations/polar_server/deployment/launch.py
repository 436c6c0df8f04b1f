"""The options of `polar serve` as data: enough to make the same server here, or on another machine; and its log.

A launch is plain values, so that it can be written to a file and read by a replica that Ray starts. Knows commands'
options; loads the model and finds the stores on request.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Self

from polar_sdk.cli.options import load_model
from polar_sdk.errors import InvalidRequestError
from polar_sdk.request.options import Audits
from polar_sdk.show.lines import print_line
from polar_server.access.stores import find_access
from polar_server.embedder import Embedder
from polar_server.http.pages import find_pages
from polar_server.settings import LOOPBACK, Settings, key_rule
from polar_server.telemetry.traces import Telemetry

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from polar_server.http.pages import PageStore


_MODEL: Final = (
    *("model", "tenant", "device", "device_map", "precision", "speculate", "policy", "router", "ledger", "no_ledger"),
)
"""Options of the model, as `load_model` takes them."""


@dataclass(frozen=True, kw_only=True)
class Launch:
    """The options of one server; see `polar serve --help`."""

    host: str = LOOPBACK[0]
    name: Sequence[str] = ()
    lenient: bool = False
    drain: float = 30.0
    timeout: float | None = None
    require_keys: bool | None = None
    otel: bool = False
    backend: Sequence[str] = ()
    embeddings: str | None = None
    alert_url: str | None = None
    alert_secret: str | None = None
    tenant: str = "default"
    model: str | None = None
    device: str = "auto"
    device_map: str | None = None
    precision: str = "auto"
    speculate: str | None = None
    policy: str | None = None
    router: str | None = None
    ledger: str | None = None
    no_ledger: bool = False
    audit_share: Sequence[str] = ()
    audit_key: str | None = None
    audit_keep: Sequence[str] = ()
    audit_keep_days: float = 30.0

    def __post_init__(self) -> None:
        """Refuse backends and shares that cannot be before anything is loaded."""
        self.backends()
        self.shares()

    @classmethod
    def options(cls) -> list[str]:
        """Names of the options."""
        return [one.name for one in fields(cls)]

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Self:
        """The launch that `values` describes.

        Raises:
            InvalidRequestError: There is no such option.
        """
        known = cls.options()
        for name in values:
            if name not in known:
                raise InvalidRequestError(f"there is no option {name[:40]!r} of a server; use {', '.join(known)}.")
        return cls(**values)

    def values(self) -> dict[str, Any]:
        """The options that differ from the defaults, as JSON has them."""
        default = asdict(type(self)())
        return {name: value for name, value in asdict(self).items() if value != default[name]}

    def backends(self) -> dict[str, list[str]]:
        """URLs by tier, of texts such as `economy=http://10.0.0.5:8000`.

        Raises:
            InvalidRequestError: One is not TIER=URL.
        """
        backends: dict[str, list[str]] = {}
        for text in self.backend:
            tier, _, url = text.partition("=")
            if not tier or not url:
                raise InvalidRequestError(f"--backend {text!r} is not TIER=URL, e.g. economy=http://10.0.0.5:8000.")
            backends.setdefault(tier, []).append(url)
        return backends

    def shares(self) -> float | dict[str, float] | None:
        """The share of requests that are audited, of texts such as `0.02` or `economy=0.05`; None = none was named.

        Raises:
            InvalidRequestError: One is neither.
        """
        shares: dict[str, float] = {}
        for text in self.audit_share:
            tier, _, share = text.rpartition("=")
            try:
                shares[tier] = float(share)
            except ValueError:
                raise InvalidRequestError(
                    f"--audit-share {text!r} is neither a share, such as 0.02, nor TIER=SHARE, such as economy=0.05."
                ) from None
        if "" in shares and len(shares) > 1:
            raise InvalidRequestError(
                "--audit-share gives a share for all tiers and others by tier; give one for all, or one per tier."
            )
        return shares.get("", shares or None)

    def stores(self) -> dict[str, Any]:
        """The stores of the ledger, and which calls need a key, as `Settings` takes them.

        Raises:
            InvalidRequestError: The server would be open to the network, or closed to everybody.
        """
        rule = key_rule(self.host, self.require_keys, "use this model")
        if (self.alert_url is None) != (self.alert_secret is None):
            raise InvalidRequestError("--alert-url and --alert-secret go together; add the other one.")
        if self.no_ledger:
            if self.alert_url is not None:
                raise InvalidRequestError("alerts need a ledger; leave out --no-ledger, or --alert-url.")
            if rule == "always":
                raise InvalidRequestError("API keys are kept in the ledger; leave out --no-ledger.")
            return {"require_keys": rule}
        access = find_access(self.ledger)
        if rule == "always" and not access.keys.any_active():
            raise InvalidRequestError("there is no API key, so nobody could use this server; see `polar key create`.")
        stores: dict[str, Any] = {
            "keys": access.keys,
            "replies": access.replies,
            "rates": access.rates,
            "accounts": access.accounts,
        }
        if self.alert_url is not None and self.alert_secret is not None:
            stores["alerts"] = access.alerts(self.alert_url, Path(self.alert_secret))
        return {**stores, "require_keys": rule}

    def settings(self) -> Settings:
        """Find the stores, load the model, and say what to serve.

        Raises:
            PolarError: Something that was named cannot be.
        """
        telemetry = Telemetry.configured() if self.otel else None
        stores = self.stores()
        embeddings = None if self.embeddings is None else Embedder(self.embeddings)
        return Settings(
            engine=load_model(
                **{name: getattr(self, name) for name in _MODEL},
                audit_share=self.shares(),
                audits=Audits(key=self.audit_key, keep=self.audit_keep, keep_days=self.audit_keep_days),
            ),
            name=self.name,
            lenient=self.lenient,
            timeout=self.timeout,
            drain=self.drain,
            pages=None if self.no_ledger else self._pages(),
            backends=self.backends(),
            embeddings=embeddings,
            telemetry=telemetry,
            backend_key=os.environ.get("POLAR_BACKEND_KEY") or None,
            **stores,
        )

    def _pages(self) -> PageStore | None:
        """The operations page; None, and a line that says so, where what it needs is not installed."""
        try:
            return find_pages(self.ledger)
        except ImportError as error:
            print_line(f"There is no page at /polar/: {error}", err=True)
            return None


# -- the log -----------------------------------------------------------------------------------------------------------


class JsonLines(logging.Formatter):
    """A record as one line of JSON; what a caller wrote is escaped."""

    def format(self, record: logging.LogRecord) -> str:
        """The line, without its end."""
        line: dict[str, Any] = {
            "at": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, "polar", {}),
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


def log_as_json() -> None:
    """Write what the server and its engine log to standard error, never with a prompt or an answer."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines())
    for name in ("polar_server", "polar_sdk"):
        logger = logging.getLogger(name)
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
        logger.propagate = False
