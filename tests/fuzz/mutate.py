"""Hostile inputs from valid ones: bytes changed at random, and values of JSON exchanged for interesting ones."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Sequence
    from random import Random


VALUES: Final[Sequence[Any]] = (
    None,
    True,
    -1,
    0,
    2**31,
    2**63,
    2**64,
    10**40,
    -(10**40),
    1.5,
    float("nan"),
    float("inf"),
    1e308,
    "",
    " ",
    "\x00",
    "\x1b]0;x\x07",
    "\u202eevil",
    "\ud800",
    "9" * 400,
    "0e999999999",
    "1e-999999999",
    "NaN",
    "../../x",
    "/dev/null",
    "0-3 5x9999999999",
    "2026-13-40",
    "0001-01-01T00:00:00+23:59",
    "9999-12-31T23:59:59-12:00",
    "𝟙",
    "a" * 70_000,
    [],
    {},
    [[]],
    {"": {}},
    [0] * 5_000,
)

TOKENS: Final[Sequence[bytes]] = (
    b"[" * 500,
    b"{" * 500,
    b'{"a":' * 300,
    b"[" * 100_000,
    b"9" * 5_000,
    b"1e999999999",
    b"-0",
    b"nan",
    b"Infinity",
    b"\x00",
    b"\xff\xfe",
    b"\xed\xa0\x80",
    b"\\ud800",
    b"\r\n",
    b"\n",
    b'"',
    b"'",
    b'"""',
    b"#",
    b"=",
    b"a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a=1\n",
    b"a." * 20_000,
    b"[[prices]]\n",
    b"true",
    b"null",
    b"0x",
    b"0-9999999999",
    b"x-1",
)


def mutate(draw: Random, content: bytes, others: Sequence[bytes] = ()) -> bytes:
    """Some changes at random places."""
    for _ in range(draw.choice([1, 1, 2, 4, 16])):
        content = _mutated(draw, content, others)
    return content


def _mutated(draw: Random, content: bytes, others: Sequence[bytes]) -> bytes:
    at = draw.randrange(len(content) + 1)
    end = min(len(content), at + draw.choice([1, 1, 4, 64, 4_096]))
    match draw.randrange(8):
        case 0:
            return content[:at] + bytes([draw.randrange(256)]) + content[at + 1 :]
        case 1:
            return content[:at] + draw.choice(TOKENS) + content[at:]
        case 2:
            return content[:at] + draw.choice(TOKENS) + content[end:]
        case 3:
            return content[:at] + content[end:]
        case 4:
            return content[:end] + content[at:end] * draw.choice([1, 2, 50]) + content[end:]
        case 5:
            return content[:at]
        case 6 if others:
            other = draw.choice(others)
            return content[:at] + other[draw.randrange(len(other) + 1) :]
        case _:
            return content[:at] + draw.randbytes(draw.choice([1, 3, 40])) + content[at:]


def exchange(draw: Random, content: bytes) -> bytes:
    """JSON with values, keys or parts exchanged for interesting ones; as it is where it is no JSON."""
    try:
        value = json.loads(content)
    except ValueError:
        return content
    for _ in range(draw.choice([1, 1, 2, 5])):
        value = _exchanged(draw, value)
    text = json.dumps(value)
    return text.encode("utf-8", "surrogatepass")


def _exchanged(draw: Random, value: Any) -> Any:
    if isinstance(value, dict) and value and draw.random() < 0.85:
        key = draw.choice(list(value))
        match draw.randrange(8):
            case 0:
                return {name: part for name, part in value.items() if name != key}
            case 1:
                return {**value, str(draw.choice(VALUES))[:100]: draw.choice(VALUES)}
            case _:
                return {**value, key: _exchanged(draw, value[key])}
    if isinstance(value, list) and value and draw.random() < 0.85:
        at = draw.randrange(len(value))
        if draw.random() < 0.1:
            return value * draw.choice([0, 2, 100])
        return [*value[:at], _exchanged(draw, value[at]), *value[at + 1 :]]
    return draw.choice(VALUES)
