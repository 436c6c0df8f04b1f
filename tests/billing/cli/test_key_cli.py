"""`polar key`: what it prints, and what it refuses."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING

import pytest

from polar_billing.errors import AccessError

if TYPE_CHECKING:
    from collections.abc import Callable

    from typer.testing import Result


def test_a_key_is_shown_once(ok: Callable[..., str]) -> None:
    shown = ok("key", "create", "acme", "search", "--tier", "economy", "--rpm", "60", "--expires", "90d")
    (text,) = re.findall(r"^pk_\w{8}_[\w-]{43}$", shown, re.MULTILINE)
    listed = ok("key", "list")
    assert text not in listed
    assert "search" in listed
    (row,) = json.loads(ok("key", "list", "--tenant", "acme", "--json"))
    assert (row["id"], row["tiers"], row["rpm"], row["state"]) == (text.split("_")[1], "economy", 60, "active")
    assert json.loads(ok("key", "list", "--tenant", "globex", "--json")) == []


def test_rotate_and_revoke(ok: Callable[..., str]) -> None:
    made = json.loads(ok("key", "create", "acme", "search", "--tag", "team=a", "--json"))
    new = json.loads(ok("key", "rotate", made["id"], "--overlap", "0s", "--json"))
    assert new["key"] != made["key"]
    assert (new["rotated_from"], new["tags"]) == (made["id"], "team=a")
    ok("key", "revoke", new["id"])
    states = {row["id"]: row["state"] for row in json.loads(ok("key", "list", "--json"))}
    assert states == {made["id"]: "expired", new["id"]: "revoked"}


@pytest.mark.parametrize(
    "arguments",
    [
        ("revoke", "nothing0"),
        ("rotate", "nothing0"),
        ("create", "acme", "search", "--expires", "soon"),
        ("create", "acme", "search", "--tag", "team"),
        ("create", "acme", "search", "--scope", "everything"),
    ],
)
def test_mistakes_are_refused(polar: Callable[..., Result], arguments: tuple[str, ...]) -> None:
    assert isinstance(polar("key", *arguments).exception, AccessError)
