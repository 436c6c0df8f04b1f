"""Checks of tenants, tags and request ids, before anything is computed for them.

A name is taken as it is or refused, never changed: two names that differ are never charged as one. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from polar_sdk.errors import TagError
from polar_sdk.usage import flaw_of_name, flaw_of_text

_MAX_LENGTH: Final = 200
"""As many as a usage record stores. Unit: characters."""


def check_name(what: str, value: str) -> str:
    """A tenant, a request id or the name of a tag: short text, not blank, without white space around it."""
    _check_text(what, value)
    if not value.strip() or len(value) > _MAX_LENGTH:
        raise TagError(f"{what} {value[:40]!r} has {len(value)} characters; use 1 to {_MAX_LENGTH}, not only blanks.")
    if (flaw := flaw_of_name(value)) is not None:
        raise TagError(f"{what} {value[:40]!r} {flaw}; remove it.")
    return value


def check_tags(tags: Mapping[str, str]) -> Mapping[str, str]:
    """Tags whose names and values a usage record can hold."""
    if not isinstance(tags, Mapping):
        raise TagError(f"tags is {tags!r}; pass a mapping of text to text.")
    for key, value in tags.items():
        check_name("tag", key)
        _check_text(f"the value of tag {key!r}", value)
        if (flaw := flaw_of_text(value)) is not None:
            raise TagError(f"the value of tag {key!r}, {value[:40]!r}, {flaw}; remove it.")
    return tags


def _check_text(what: str, value: object) -> None:
    if not isinstance(value, str):
        raise TagError(f"{what} is {value!r}, which is not text; use str().")
