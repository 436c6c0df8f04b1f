"""The source: the name of the service that meters. Knows no ledger.

Request ids, and the keys of repeated requests, are unique per tenant and source. So the replicas of one service have
one name, and none of them stores, charges or answers again what another one did; services that make ids of their own
accord in one ledger have different names.
"""

from __future__ import annotations

import os
from typing import Final

from polar_sdk.errors import InvalidRequestError
from polar_sdk.usage import flaw_of_name

SOURCE_VARIABLE: Final = "POLAR_SOURCE"
DEFAULT_SOURCE: Final = "polar"
_MAX_CHARACTERS: Final = 200


def source_named(name: str | None = None) -> str:
    """A source; None for the one that `POLAR_SOURCE` names, or else `polar`.

    Raises:
        InvalidRequestError: It is no name.
    """
    found = name if name is not None else os.environ.get(SOURCE_VARIABLE) or DEFAULT_SOURCE
    flaw = flaw_of_name(found)
    if not 1 <= len(found) <= _MAX_CHARACTERS:
        flaw = f"has {len(found)} characters; use 1 to {_MAX_CHARACTERS}"
    if flaw is not None:
        raise InvalidRequestError(
            f"source {found[:40]!r} {flaw}.", hint=f"Set {SOURCE_VARIABLE} to the service's name."
        )
    return found
