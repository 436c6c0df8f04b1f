"""Files that are written whole or not at all."""

from __future__ import annotations

import os
import threading
from typing import TYPE_CHECKING

import pytest

from polar_sdk.writing import replacing

if TYPE_CHECKING:
    from pathlib import Path


def test_a_file_appears_whole_with_its_folder(tmp_path: Path) -> None:
    path = tmp_path / "new" / "table.json"
    with replacing(path) as draft:
        draft.write_text("whole")
        assert not path.exists()
        assert draft.suffix == ".json"
        assert draft.stem.endswith(f".{os.getpid()}")
    assert [file.read_text() for file in path.parent.iterdir()] == ["whole"]


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
def test_what_breaks_off_leaves_the_former_file(tmp_path: Path, error: BaseException) -> None:
    path = tmp_path / "table.json"
    path.write_text("former")
    with pytest.raises(type(error)), replacing(path) as draft:
        draft.write_text("ha")
        raise error
    assert [file.read_text() for file in tmp_path.iterdir()] == ["former"]


def test_writers_at_the_same_time_do_not_mix(tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    contents = [str(writer) * 50_000 for writer in range(8)]

    def write(content: str) -> None:
        for _ in range(20):
            with replacing(path) as draft:
                draft.write_text(content)

    writers = [threading.Thread(target=write, args=(content,)) for content in contents]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert path.read_text() in contents
    assert list(tmp_path.iterdir()) == [path]
