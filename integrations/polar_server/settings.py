"""Settings of a server."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from polar_sdk.errors import InvalidRequestError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from polar_sdk import PolarModel
    from polar_server.access.keys import KeyRule
    from polar_server.access.stores import AccountStore, AlertSender, KeyStore, RateStore, ReplyStore
    from polar_server.embedder import Embedder
    from polar_server.http.pages import PageStore
    from polar_server.telemetry.traces import Telemetry

LOOPBACK: Final = ("127.0.0.1", "::1", "localhost")


def key_rule(host: str, require_keys: bool | None, what: str) -> KeyRule:
    """The calls of a server that need a key.

    Args:
        host: Address that it listens on.
        require_keys: Whether all need one, or none; None = those that do not come straight from this machine.
        what: What anyone could do.

    Raises:
        InvalidRequestError: It would be open to the network.
    """
    local = host in LOOPBACK
    if require_keys is False and not local:
        raise InvalidRequestError(
            f"--host {host} would let anyone on the network {what}; leave out --no-require-keys, or use {LOOPBACK[0]}."
        )
    if require_keys or not local:
        return "always"
    return "forwarded" if require_keys is None else "never"


NOT_ENFORCED: Final[Mapping[KeyRule, str]] = {
    "forwarded": "Calls from this machine need no API key; without one, no key's tenant, tiers, rates or scopes are "
    "enforced. Calls through a proxy need one, and with --require-keys all do.",
    "never": "No call needs an API key, also through a proxy; without one, no key's tenant, tiers, rates or scopes are "
    "enforced.",
}
"""The line printed at the start of a server of which some calls need no key."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Settings for `build`.

    Attributes:
        engine: The model to serve, with its policy, router and sink.
        name: Id of the model at `/v1/models`, or several; None = the name under which it was loaded.
        max_body: Maximum size of a request body. Unit: bytes.
        max_choices: Maximum number of answers of one call: `n` times its prompts.
        timeout: Maximum time of one answer; None = unlimited. Unit: seconds.
        usage_always: Send `usage` at the end of every stream, asked for or not.
        lenient: Ignore and count fields that the API does not know, instead of refusing them.
        drain: How long answers may still run when the server is told to stop. Unit: seconds.
        keys: Where API keys are kept; None = there are none, and no key is valid.
        require_keys: The calls that need one; None = all if keys are kept, otherwise none. A call without a key is
            made in the engine's own name.
        replies: Where answers to repeated requests are kept; None = in this process.
        rates: Where the use of keys' limits is kept; None = in this process.
        accounts: What tenants may see of their own usage; None = nothing, as without a ledger.
        alerts: Notifies a webhook of promises at risk; None = no alerts.
        pages: The operations page; None = there is none.
        backends: URLs of other servers, by the tier that they compute; see `polar_server.upstream`.
        backend_key: API key for them.
        embeddings: Embeds texts; None = no embeddings.
        telemetry: Where spans and metrics of OpenTelemetry go; None = there are none.
        keep_alive: How often a stream without news sends a comment. Unit: seconds.
    """

    engine: PolarModel
    name: str | Sequence[str] | None = None
    max_body: int = 4 * 2**20
    max_choices: int = 16
    timeout: float | None = None
    usage_always: bool = False
    lenient: bool = False
    drain: float = 30.0
    keys: KeyStore | None = None
    require_keys: KeyRule | None = None
    replies: ReplyStore | None = None
    rates: RateStore | None = None
    accounts: AccountStore | None = None
    alerts: AlertSender | None = None
    pages: PageStore | None = None
    backends: Mapping[str, Sequence[str]] = field(default_factory=dict)
    backend_key: str | None = None
    embeddings: Embedder | None = None
    telemetry: Telemetry | None = None
    keep_alive: float = 15.0

    @property
    def model_id(self) -> str:
        """First id of the model, without a tier."""
        return self.model_ids[0]

    @property
    def model_ids(self) -> tuple[str, ...]:
        """Every id of the model, without a tier."""
        names = (self.name,) if isinstance(self.name, str) else tuple(self.name or ())
        return tuple(dict.fromkeys(names)) or (self.engine.name,)

    @property
    def key_rule(self) -> KeyRule:
        """The calls that need an API key."""
        return self.require_keys or ("never" if self.keys is None else "always")
