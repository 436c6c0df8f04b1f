"""Every reader of files: bombs and mutated files end in PolarErrors that name the file, and at once."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from polar_billing.cli.proof import _read_receipt
from polar_billing.metering.spool import Spool
from polar_billing.metering.spool_file import Unfinished
from polar_billing.prices.book import PriceBook
from polar_billing.statements.promises import evaluated_agreement
from polar_billing.testing import usage_record
from polar_sdk import reading
from polar_sdk.errors import PolarError
from polar_sdk.lab.items import read_items
from polar_sdk.lab.program_search.menu import Menu
from polar_sdk.models.fingerprint import file_sha256
from polar_sdk.models.store import check_folder, read_manifest
from polar_sdk.programs.policy import Policy
from polar_sdk.router.artifact import load_router
from polar_sdk.router.map_set import MapSet
from polar_sdk.testing import tiny_llama

if TYPE_CHECKING:
    from collections.abc import Callable

SHIPPED = Path(__file__).parents[2] / "polar_sdk" / "shipped"
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


class Reader:
    """A reader of one file, and a valid content of it."""

    def __init__(self, name: str, valid: bytes, read: Callable[[Path], object], beside: Path | None = None) -> None:
        self.name, self.valid, self._read, self._beside = name, valid, read, beside

    def __call__(self, folder: Path, content: bytes) -> str | None:
        """Read this content; the error's message, or None where it is valid."""
        path = folder / self.name
        path.write_bytes(content)
        if self._beside is not None and not (target := folder / self._beside.name).exists():
            target.write_bytes(self._beside.read_bytes())
        start = time.process_time()
        try:
            self._read(path)
        except PolarError as error:
            return str(error)
        finally:
            assert time.process_time() - start < 5
        return None


def spool_line(tmp: Path) -> bytes:
    from polar_billing.metering.meter import Meter

    spool = Spool(tmp / "spool")
    segment = spool.segment()
    with Meter(f"sqlite:///{tmp / 'x.sqlite3'}", prices=PriceBook.example()) as meter:
        segment.append([meter.entry(usage_record("a"))])
    return spool.keep(segment).read_bytes()


@pytest.fixture(scope="module")
def readers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Reader]:
    tmp = tmp_path_factory.mktemp("valid")
    tiny_llama().save_pretrained(tmp)
    router = SHIPPED / "routers" / "smollm2-135m-instruct"
    evaluation = {"sets": [{"prompts": 4, "systems": [{"role": "router", "name": "router (a)", "agreement": [0.5]}]}]}
    menu = {
        **dict.fromkeys(("model", "fingerprint", "dtype", "bridges", "data"), "x"),
        **{"format": "polar-menu-1", "seed": 0, "prompts": {"train": 1}, "tried": 1, "programs": []},
    }
    all_readers = [
        Reader("prices.toml", _book(), PriceBook.load),
        Reader("policy.json", (SHIPPED / "policies" / "smollm2-135m-instruct.json").read_bytes(), Policy.load),
        Reader(
            "router.json",
            (router / "router.json").read_bytes(),
            lambda path: load_router(path.parent),
            router / "router.safetensors",
        ),
        Reader(
            "maps.json",
            (router / "bridges" / "maps.json").read_bytes(),
            lambda path: MapSet.load(path.parent),
            router / "bridges" / "maps.safetensors",
        ),
        Reader(
            "config.json",
            (tmp / "config.json").read_bytes(),
            lambda path: check_folder(path.parent),
            tmp / "model.safetensors",
        ),
        Reader("polar.json", b'{"conversion": 1, "files": {}}', lambda path: read_manifest(path.parent)),
        Reader(
            "items.jsonl", b'{"prompt": "one"}\n{"question": "q", "choices": ["a", "b"], "answer": 1}\n', read_items
        ),
        Reader("menu.json", json.dumps(menu).encode(), Menu.load),
        Reader("evaluation.json", json.dumps(evaluation).encode(), evaluated_agreement),
        Reader("receipt.json", b'{"format": "polar-receipt-1", "chain": {"number": 1}}', _read_receipt),
        Reader("1-2-3.jsonl", spool_line(tmp), lambda path: Unfinished(path).entries(lambda _: {})),
    ]
    return {reader.name: reader for reader in all_readers}


def _book() -> bytes:
    from importlib import resources

    return (resources.files("polar_billing") / "example_plans.toml").read_bytes()


NAMES = (
    *("prices.toml", "policy.json", "router.json", "maps.json", "config.json", "polar.json", "items.jsonl"),
    *("menu.json", "evaluation.json", "receipt.json", "1-2-3.jsonl"),
)


@pytest.mark.parametrize("name", NAMES)
def test_bombs_are_refused_at_once_with_the_name_of_the_file(
    readers: dict[str, Reader], name: str, tmp_path: Path
) -> None:
    reader = readers[name]
    for bomb in BOMBS.values():
        told = reader(tmp_path, bomb)
        if told is not None:
            assert str(tmp_path) in told or told.startswith("architecture None")
            assert len(told) < 1_000


@pytest.mark.parametrize("name", NAMES)
def test_mutated_files_end_in_polar_errors_only(
    readers: dict[str, Reader], name: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    reader, folder = readers[name], tmp_path_factory.mktemp("mutated")
    valid = reader.valid
    pieces = st.sampled_from(
        [
            b"[" * 500,
            b'{"a":' * 500,
            b"9" * 5_000,
            b"1e999999999",
            b"-",
            b"null",
            b"0",
            b'"',
            b"\xff",
            b"\\ud800",
            b"\n",
            b"",
        ]
    ) | st.binary(max_size=4)

    @settings(max_examples=60, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(st.lists(st.tuples(st.integers(0, len(valid)), st.integers(0, 12), pieces), min_size=1, max_size=3))
    def mutate(edits: list[tuple[int, int, bytes]]) -> None:
        content = valid
        for start, length, piece in edits:
            content = content[:start] + piece + content[start + length :]
        reader(folder, content)

    mutate()


@pytest.mark.parametrize("name", ["config.json", "policy.json", "router.json", "maps.json", "menu.json"])
def test_values_of_other_types_end_in_polar_errors_only(
    readers: dict[str, Reader], name: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    reader, folder = readers[name], tmp_path_factory.mktemp("typed")
    valid: dict[str, Any] = json.loads(reader.valid)
    values: list[Any] = [None, True, -1, 0, 10**30, 1e308, float("nan"), "evil", [], {}, [[]], {"a": [1]}]
    for key in valid:
        for value in values:
            reader(folder, json.dumps({**valid, key: value}).encode())


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
