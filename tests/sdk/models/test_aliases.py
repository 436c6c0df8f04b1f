"""Which model a name means."""

from __future__ import annotations

from pathlib import Path

import pytest

from polar_sdk.errors import ModelNotFoundError
from polar_sdk.models.aliases import ALIASES, Alias, Folder, Gguf, Hub, resolve

DEFAULT = ALIASES[0]


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("POLAR_MODEL", raising=False)
    return tmp_path


@pytest.mark.parametrize("name", [None, "default", "smollm2-135m-instruct", "SmolLM2-135M-Instruct"])
def test_default_alias(name: str | None) -> None:
    assert resolve(name) is DEFAULT


@pytest.mark.parametrize("alias", ALIASES, ids=lambda alias: alias.name)
def test_alias_is_one_file_in_wheels(alias: Alias) -> None:
    assert resolve(alias.name.upper()) is alias
    assert len({part.wheel_sha256 for part in alias.parts}) == len({part.requirement for part in alias.parts})
    assert all(len(part.wheel_sha256) == 64 and 0 < part.wheel_bytes < 1.01 * part.bytes for part in alias.parts)
    assert alias.bytes + 2 * max(part.wheel_bytes for part in alias.parts) < 3 * alias.bytes


def test_environment_names_the_default(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POLAR_MODEL", "org/other")
    assert resolve() == Hub("org/other")
    assert resolve("default") is DEFAULT
    monkeypatch.setenv("POLAR_MODEL", "")
    assert resolve() is DEFAULT


@pytest.mark.parametrize("spell", [str, Path])
def test_folder_and_file(here: Path, spell: type[str] | type[Path]) -> None:
    (here / "org" / "name").mkdir(parents=True)
    (here / "some.GGUF").touch()
    # A folder on the disk wins over a hub id of the same name.
    assert resolve(spell("org/name")) == Folder("org/name", here / "org" / "name")
    assert resolve(spell("some.GGUF")) == Gguf("some.GGUF", here / "some.GGUF")


def test_a_folder_called_like_an_alias_needs_a_path(here: Path) -> None:
    (here / "default").mkdir()
    assert resolve("default") is DEFAULT
    assert resolve("./default") == Folder("./default", here / "default")
    assert resolve(Path("default")) == Folder("default", here / "default")


@pytest.mark.parametrize("name", ["HuggingFaceTB/SmolLM2-135M", "a/b", "org/name.v1-2_x"])
def test_hub_id(name: str) -> None:
    assert resolve(name) == Hub(name)


@pytest.mark.parametrize(
    "name",
    [
        "./a",
        "../a/b",
        "/no/such",
        "~/nothing",
        "~nobody-here/x",
        "a/b/c",
        "a.gguf",
        "org/a.gguf",
        "c:\\m",
        "a/",
    ],
)
def test_missing_path_does_not_go_to_the_hub(name: str) -> None:
    with pytest.raises(ModelNotFoundError, match="no such file or folder") as raised:
        resolve(name)
    assert repr(name) in str(raised.value)
    assert isinstance(raised.value, FileNotFoundError)


@pytest.mark.parametrize("name", ["smolm2", "smollm2-135m-instuct", "SmolLM2"])
def test_near_miss_is_suggested(name: str) -> None:
    with pytest.raises(ModelNotFoundError, match=f"{name!r} is unknown. Did you mean 'smollm2-135m-instruct'?"):
        resolve(name)


@pytest.mark.parametrize("name", ["", "gpt2", "a b", "x" * 5000, "nul\0byte"])
def test_unknown_name_lists_the_aliases(name: str) -> None:
    with pytest.raises(ModelNotFoundError, match="Aliases: smollm2-135m-instruct, default"):
        resolve(name)


def test_file_of_another_kind(here: Path) -> None:
    (here / "model.safetensors").touch()
    with pytest.raises(ModelNotFoundError, match=r"not a `\.gguf` file"):
        resolve("model.safetensors")


def test_name_fits_a_usage_record(here: Path) -> None:
    deep = here / "/".join(["d" * 100] * 3)
    deep.mkdir(parents=True)
    source = resolve(deep)
    assert isinstance(source, Folder)
    assert source.path == deep
    assert len(source.name) == 200
    assert source.name.endswith("d" * 100)
