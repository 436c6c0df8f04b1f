"""Every reader of files: bombs end in PolarErrors that name the file, and at once. `tests/fuzz` mutates valid files."""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING

import pytest

from polar_billing.cli.ledger import _read_receipt
from polar_billing.metering.spool_file import Unfinished
from polar_billing.prices.book import PriceBook
from polar_billing.reports.mix import evaluated_savings
from polar_sdk import reading
from polar_sdk.errors import PolarError
from polar_sdk.lab.items import read_items
from polar_sdk.lab.program_search.menu import Menu
from polar_sdk.models.fingerprint import file_sha256
from polar_sdk.models.store import check_folder, read_manifest
from polar_sdk.programs.policy import Policy
from polar_sdk.router.artifact import load_router
from polar_sdk.router.map_set import MapSet

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

BOMBS = {
    "lists": b"[" * 100_000,
    "objects": b'{"a":' * 100_000,
    "closed": b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "integer": b'{"max_visits": ' + b"9" * 5_000 + b"}",
    "fraction": b'{"cost_ceiling": 1.' + b"9" * 5_000 + b"}",
    "exponent": b'{"max_visits": 1e999999999, "prompt": 1e999999999}',
    "quotes": b'"' + b'\\"' * 100_000,
    "surrogate": b'{"prompt": "\\ud800", "model": "\\udfff"}',
    "not UTF-8": b"\xff\xfe\x00",
    "null": b"null",
    "empty": b"",
    "keys": b"a." * 50_000 + b"a = 1",
    "tables": b"[" + b"a." * 50_000 + b"a]",
    "arrays": b"a = " + b"[" * 100_000,
    "TOML integer": b"a = " + b"1" * 4_301,
}


READERS: dict[str, Callable[[Path], object]] = {
    "prices.toml": PriceBook.load,
    "policy.json": Policy.load,
    "router.json": lambda path: load_router(path.parent),
    "maps.json": lambda path: MapSet.load(path.parent),
    "config.json": lambda path: check_folder(path.parent),
    "polar.json": lambda path: read_manifest(path.parent),
    "items.jsonl": read_items,
    "menu.json": Menu.load,
    "evaluation.json": evaluated_savings,
    "receipt.json": _read_receipt,
    "1-2-3.jsonl": lambda path: Unfinished(path).entries(lambda _: {}),
}


@pytest.mark.parametrize("name", READERS)
def test_bombs_are_refused_at_once_with_the_name_of_the_file(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    for bomb in BOMBS.values():
        path.write_bytes(bomb)
        start = time.process_time()
        try:
            READERS[name](path)
        except PolarError as error:
            assert str(tmp_path) in str(error) or str(error).startswith("architecture None")
            assert len(str(error)) < 1_000
        assert time.process_time() - start < 5


def test_a_file_without_an_end_is_not_read_whole() -> None:
    with pytest.raises(reading.Unreadable, match="1,000"):
        reading.read_bytes("/dev/zero", 1_000)


def test_depth_digits_and_text_just_within_the_limits_are_read() -> None:
    assert reading.parse_json("[" * 64 + "]" * 64) is not None
    assert reading.parse_json('["' + "[" * 1_000 + '"]') == ["[" * 1_000]
    assert reading.parse_json("9" * 100) == int("9" * 100)
    assert reading.parse_toml("a.b = 1.50") == {"a": {"b": reading.parse_decimal("1.50")}}
    assert reading.parse_toml('a = """[[["x"""\nb = \'[[[\' # [[[') == {"a": '[[["x', "b": "[[["}
    for text in ("[" * 65 + "]" * 65, "9" * 101):
        with pytest.raises(reading.Unreadable):
            reading.parse_json(text)
    assert reading.parse_toml("a." * 15 + "b = 1")
    assert reading.parse_toml('a = """' + "one two. three. " * 9 + '"""')
    for toml in ("a." * 16 + "b = 1", '"a" . ' * 16 + "b = 1", "a = " + "[" * 65 + "]" * 65):
        with pytest.raises(reading.Unreadable):
            reading.parse_toml(toml)
    assert "too long to show" in reading.shown(10**5_000)


def test_a_damaged_cache_of_hashes_is_ignored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POLAR_CACHE", str(tmp_path))
    file = tmp_path / "x"
    file.write_bytes(b"x")
    for content in (BOMBS["lists"], BOMBS["closed"], json.dumps({str(file.resolve()): 5}).encode()):
        (tmp_path / "file-hashes.json").write_bytes(content)
        assert len(file_sha256(file)) == 64
