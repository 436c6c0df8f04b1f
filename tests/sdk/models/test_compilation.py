"""Compiling in the background: the process, what requests see of it, and what happens where it cannot run."""

from __future__ import annotations

import errno
import logging
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import pytest

from polar_sdk import PolarModel, Policy
from polar_sdk.engine.compiled import load_kernels, parts
from polar_sdk.engine.decoder import build_decoder
from polar_sdk.engine.eager import Compiled
from polar_sdk.errors import CompileError
from polar_sdk.models import compilation, compiler
from polar_sdk.models.compilation import (
    BUSY,
    DISK_FULL,
    NOT_WRITABLE,
    Background,
    Order,
    is_held,
    lock_of,
    packages_folder,
    read_status,
    statuses,
    write_status,
)
from polar_sdk.testing import tiny_llama, tiny_tokenizer

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from torch import Tensor
    from transformers import PreTrainedModel

    TinyFamily = Callable[..., PreTrainedModel]

LAYERS = 3


@pytest.fixture
def background(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Compiling in the background is on, in a fresh cache, and does not wait until the machine is idle."""
    monkeypatch.setenv("POLAR_COMPILE", "background")
    monkeypatch.setattr(compilation, "IDLE", False)
    monkeypatch.setattr(compilation, "_LOOK_SECONDS", 0.0)
    monkeypatch.setattr(compilation, "_said", set())
    return cache


@pytest.fixture
def refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """No process may be started."""
    monkeypatch.setattr(compilation, "_spawn", lambda *_: pytest.fail("a process was started"))


def tiny(**options: Any) -> PolarModel:
    return PolarModel.from_hf(
        tiny_llama(layers=LAYERS), tiny_tokenizer(), policy=Policy.permissive(), ledger=None, **options
    )


def order(precision: str = "fp32", **changes: Any) -> Order:
    facts: dict[str, Any] = {
        "model": "tiny", "fingerprint": "f" * 64, "config": compilation.config_of(tiny_llama(layers=LAYERS).config),
        "dtype": "float32", "precision": precision, "threads": 1, "environment": "here", "idle": False,
    }  # fmt: skip
    return Order(**(facts | changes))


def waiting(model: PolarModel) -> Background:
    """What the model asks at each request."""
    assert isinstance(model.decoder.renewal, Background)
    return model.decoder.renewal


def runs_compiled(model: PolarModel) -> bool:
    """Whether a request that comes now runs compiled."""
    return model.compiled


def put_packages(packages: Path, but: str | None = None, stage: Compiled = Compiled.ALL) -> int:
    """Put the tiny model's packages up to a stage into the cache, all but those of this name; returns how many."""
    decoder = build_decoder(tiny_llama(layers=LAYERS), kv_memory=1 << 24)
    assert load_kernels(decoder, packages, build=True) is not None
    packages_folder().mkdir(parents=True, exist_ok=True)
    put = [part for part in parts(decoder).values() if part.name != but and part.stage <= stage]
    for part in put:
        name = f"{part.key}.pt2"
        (packages_folder() / name).write_bytes((packages / name).read_bytes())
    return len(put)


@pytest.mark.parametrize("precision", ["fp32", "int8", "int4"])
def test_the_process_compiles_what_the_model_looks_for(family: str, precision: str, tiny_family: TinyFamily) -> None:
    """A decoder without weights, and one layer for all that look alike, names the same packages as the real one."""
    model = tiny_family(family)
    real = build_decoder(model, precision=precision, kv_memory=1 << 24)
    config = compilation.config_of(model.config)
    made = compiler.template(order(precision, config=config))
    assert {part.key for part in parts(made).values()} == {part.key for part in parts(real).values()}


def test_requests_run_at_once_and_compiled_once_the_process_has_ended(
    background: Path, packages: Path, caplog: pytest.LogCaptureFixture
) -> None:
    put_packages(packages, but="head 1")
    with caplog.at_level(logging.INFO, "polar_sdk"):
        model = tiny()
        begun = model.stream("a request that began before", max_tokens=24)
        first = next(begun).text
        assert not runs_compiled(model)
        process = waiting(model).process
        assert process is not None
        alone = model.generate("a request that began before", max_tokens=24)
        assert process.wait(1800) == 0  # a busy machine must not fail a test
        assert not runs_compiled(model)  # nothing changes between requests
        later = model.generate("a later one", max_tokens=8)
        assert runs_compiled(model)
        assert model.decoder.renewal is None
    text = first + "".join(chunk.text for chunk in begun)
    assert text == alone.text  # it ended with what it began with
    assert later.usage.flops == model.cost(prompt=later.usage.tokens.input, output=later.usage.tokens.output)
    lines = [record.message for record in caplog.records if record.name.startswith("polar_sdk.models")]
    assert [line.split()[0] for line in lines] == ["compiling", "requests"]
    (status,) = [read_status(path) for path in packages_folder().glob("*.json")]
    assert status is not None
    assert (status.state, status.precision, status.text) == ("compiled", "float32", "compiled")
    assert tiny().compiled  # from now on, models run compiled from the start


def test_a_request_never_mixes(background: Path, packages: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that began without compiled layers go on so beside rows that have them; starts of prompts are not mixed."""
    put_packages(packages)
    model = tiny(compile=False)
    prompt = "the same long start of a prompt, which fills more than one page of keys and values by far " * 2
    stream = model.stream(prompt, max_tokens=40, template="raw")
    next(stream)
    kernels = load_kernels(model.decoder, packages_folder(), build=False)
    assert kernels is not None
    calls: list[int] = []
    decode = kernels.decode

    def counted(w: Any, x: Tensor, *rest: Any) -> Tensor:
        calls.append(x.shape[0])
        return decode(w, x, *rest)

    monkeypatch.setattr(kernels, "decode", counted)
    model.decoder.renewal = lambda: kernels
    with ThreadPoolExecutor(1) as pool:
        rest = pool.submit(list, stream)
        other = model.generate(prompt, max_tokens=12, template="raw")
        assert len(rest.result()) >= 39
    assert model.compiled
    assert calls == [1] * (1 + 11 * LAYERS)  # the last visit of its prompt, and its tokens: no pass had both requests
    assert other.usage.tokens.cached == 0  # what uncompiled code left of the prompt is not for it
    assert model.generate(prompt, max_tokens=2, template="raw").usage.tokens.cached > 0


def test_what_is_compiled_is_used_by_stages(background: Path, packages: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers first, then rows, while the process is at the rest; the next program begins with what is there."""
    monkeypatch.setattr(
        compilation, "_spawn", lambda *_: compilation._Detached([sys.executable, "-c", "import time; time.sleep(300)"])
    )
    model = tiny()
    wait = waiting(model)
    assert wait.process is not None
    prompt = "the same long start of a prompt, which fills more than one page of keys and values by far " * 2
    texts = [model.generate(prompt, max_tokens=8, template="raw").text]
    try:
        for stage in (Compiled.ONE_ROW, Compiled.ROWS):
            done = put_packages(packages, stage=stage)
            assert model.generate("hello", max_tokens=2).token_ids
            assert model.decoder.kernels.compiled < stage  # the process has not said so yet
            write_status(wait._order.key, wait._order.status("compiling", done=done, total=7))
            answer = model.generate(prompt, max_tokens=8, template="raw")
            assert answer.usage.tokens.cached == 0  # what other code left of the prompt is not for it
            texts.append(answer.text)
            assert model.decoder.kernels.compiled == stage
            assert not model.compiled
            assert model.decoder.renewal is wait
            together = model.generate_batch([prompt] * 6, max_tokens=8, template="raw")
            assert {each.text for each in together} == {answer.text}
        assert texts == texts[:1] * 3
        assert tiny().decoder.kernels.compiled == Compiled.ROWS
    finally:
        wait.process.kill()
        wait.process.wait()


def test_one_process_for_all_who_ask(background: Path, refused: None) -> None:
    decoder = build_decoder(tiny_llama(layers=LAYERS))
    waits = Background(decoder, order())
    with lock_of(order().key):
        assert waits.start()  # by whoever holds the lock
        assert waits.process is None
        assert waits() is None
        decoder.renewal = waits
        assert waits() is None
        assert decoder.renewal is waits


@pytest.mark.parametrize(
    ("code", "status", "reason"),
    [
        (-9, None, "it was interrupted"),
        (-9, ("compiling", {"done": 3, "total": 7}), "it was interrupted after 3 of 7 parts"),
        (DISK_FULL, None, "the disk of the cache folder is full"),
        (NOT_WRITABLE, None, "the cache folder cannot be written"),
        (1, ("failed", {"reason": "no such flag"}), "no such flag"),
    ],
)
def test_what_ends_early_is_said_in_one_line(
    background: Path, code: int, status: Any, reason: str, caplog: pytest.LogCaptureFixture, monkeypatch: Any
) -> None:
    kill = "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
    script = kill if code < 0 else f"raise SystemExit({code})"
    monkeypatch.setattr(compilation, "_spawn", lambda *_: compilation._Detached([sys.executable, "-c", script]))
    model = tiny()
    wait = waiting(model)
    if status is not None:
        write_status(wait._order.key, wait._order.status(status[0], **status[1]))
    assert wait.process is not None
    wait.process.wait(60)
    assert model.generate("hello", max_tokens=3).token_ids
    assert model.generate("hello", max_tokens=3).token_ids
    (line,) = [record.message for record in caplog.records if record.levelno >= logging.WARNING]
    assert f"({reason})" in line
    assert "\n" not in line
    assert model.decoder.renewal is None


def test_the_process_leaves_to_another_that_is_at_it(background: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = order().model_dump_json()
    with lock_of(order().key):
        assert is_held(order().key)
        ended = subprocess.run(
            [sys.executable, "-c", "from polar_sdk.models import compiler as c; c.LOCK_SECONDS = 0.1; exit(c.main())"],
            input=text.encode(), timeout=120, check=False,
        )  # fmt: skip
    assert ended.returncode == BUSY
    assert not is_held(order().key)


@pytest.mark.parametrize(
    ("error", "code", "reason"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), DISK_FULL, "the disk of the cache folder is full"),
        (OSError(errno.EROFS, "Read-only file system"), NOT_WRITABLE, "the cache folder cannot be written"),
        (
            CompileError("layers cannot be compiled here\n(x)."),
            compilation.FAILED,
            "layers cannot be compiled here (x).",
        ),
    ],
)
def test_the_process_says_why_it_failed(
    background: Path, error: Exception, code: int, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        if isinstance(error, CompileError):
            raise error
        raise CompileError("compiling failed") from error

    packages_folder().mkdir(parents=True)
    monkeypatch.setattr("polar_sdk.engine.compiled.load_kernels", fail)
    assert compiler._compile(order()) == code
    ((status,),) = statuses().values()
    assert (status.state, status.reason) == ("failed", reason)


def test_a_folder_that_cannot_be_used_is_said_once(
    background: Path, refused: None, caplog: pytest.LogCaptureFixture
) -> None:
    background.parent.mkdir(parents=True, exist_ok=True)
    background.write_text("a file in the place of the folder")
    for _ in range(2):
        model = tiny()
        assert model.decoder.renewal is None
        assert model.generate("hello", max_tokens=2).token_ids
    (record,) = caplog.records
    assert "cannot be used" in record.message
    assert "POLAR_CACHE" in record.message


def test_without_a_compiler_it_is_said_once(
    background: Path, refused: None, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert tiny().generate("hello", max_tokens=2).token_ids
    assert tiny().generate("hello", max_tokens=2).token_ids
    (record,) = caplog.records
    assert record.message == "there is no C++ compiler (no-such-compiler) on this machine: layers run uncompiled"


def test_what_has_failed_is_not_tried_at_each_start(
    background: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[Order] = []

    def spawn(what: Order, _: object) -> Any:
        started.append(what)
        return compilation._Detached([sys.executable, "-c", ""])

    monkeypatch.setattr(compilation, "_spawn", spawn)
    tiny()
    (what,) = started
    failed = what.status("failed", reason="no such flag")
    write_status(what.key, failed)
    assert tiny().decoder.renewal is None
    assert len(started) == 1
    (record,) = caplog.records
    assert "(no such flag), `polar models compile` tries again: layers run uncompiled" in record.message
    write_status(what.key, failed.model_copy(update={"at": failed.at - compilation.RETRY}))
    tiny()
    assert len(started) == 2


@pytest.mark.parametrize("options", [{"compile": False}, {"compile": "stored"}])
def test_options_turn_it_off(background: Path, refused: None, options: dict[str, Any]) -> None:
    model = tiny(**options)
    assert model.decoder.renewal is None
    assert not model.compiled


def test_the_environment_turns_it_off(background: Path, refused: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POLAR_COMPILE", "off")
    assert tiny().decoder.renewal is None
    monkeypatch.setenv("POLAR_COMPILE", "sometimes")
    with pytest.raises(CompileError, match="POLAR_COMPILE='sometimes' is unknown; use background or off"):
        tiny()


def test_a_fork_asks_for_itself(background: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A forked child cannot wait for its parent's process; it looks at the lock."""
    sleep = [sys.executable, "-c", "import time; time.sleep(60)"]
    monkeypatch.setattr(compilation, "_spawn", lambda *_: compilation._Detached(sleep))
    model = tiny()
    wait = waiting(model)
    assert wait.process is not None
    try:
        with lock_of(wait._order.key):
            monkeypatch.setattr(wait, "_owner", os.getpid() + 1)
            assert wait() is None
            assert model.decoder.renewal is wait
    finally:
        wait.process.kill()
        wait.process.wait()


def test_the_end_of_a_program_does_not_wait_for_it(background: Path, tmp_path: Path) -> None:
    """It says nothing in the program, ends at once, and the process goes on."""
    (tmp_path / "sleeper.py").write_text("import time; time.sleep(300)")
    program = (
        "from polar_sdk import PolarModel, Policy\n"
        "from polar_sdk.models import compilation\n"
        "from polar_sdk.testing import tiny_llama, tiny_tokenizer\n"
        "compilation.MODULE = 'sleeper'\n"
        "model = PolarModel.from_hf(tiny_llama(), tiny_tokenizer(), policy=Policy.permissive(), ledger=None)\n"
        "print(model.decoder.renewal.process.pid)\n"
    )
    paths = os.pathsep.join([str(tmp_path), *filter(None, sys.path)])
    environment = {**os.environ, "PYTHONPATH": paths, "PYTHONWARNINGS": "always::ResourceWarning"}
    ended = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=240, check=True, env=environment
    )
    assert ended.stderr == ""
    number = int(ended.stdout)
    try:
        os.kill(number, 0)
        assert os.getsid(number) == number  # no Ctrl-C of the program's terminal reaches it
    finally:
        os.kill(number, 9)


@pytest.mark.skipif(not hasattr(os, "killpg"), reason="needs groups of processes")
def test_a_process_without_time_is_given_a_share(background: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that only gets idle time, and finds none, is exchanged; one that has a share is left to it."""
    orders: list[Order] = []
    real = compilation._processor_seconds

    def spawn(what: Order, _: object) -> Any:
        orders.append(what)
        script = "import time; time.sleep(300)"
        return compilation._Detached([sys.executable, "-c", script], start_new_session=True)

    monkeypatch.setattr(compilation, "_spawn", spawn)
    monkeypatch.setattr(compilation, "IDLE", True)
    monkeypatch.setattr(compilation, "PATIENCE_SECONDS", 0.0)
    monkeypatch.setattr(compilation, "_processor_seconds", lambda _: 1e9)
    model = tiny()
    wait = waiting(model)
    first = wait.process
    assert first is not None
    assert wait() is None
    assert wait.process is first  # it got enough
    monkeypatch.setattr(compilation, "_processor_seconds", real)
    wait._window = time.monotonic() - 1000, 0.0
    assert wait() is None
    second = wait.process
    assert second is not None
    assert second is not first
    assert first.returncode is not None
    wait._window = time.monotonic() - 1000, 0.0
    assert wait() is None
    assert wait.process is second
    assert [what.idle for what in orders] == [True, False]
    assert orders[0].key == orders[1].key
    os.killpg(second.pid, 9)
    second.wait()


def test_a_model_is_compiled_in_the_memory_of_one_layer(background: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    orders: list[Order] = []

    def spawn(what: Order, _: object) -> Any:
        orders.append(what)
        return compilation._Detached([sys.executable, "-c", ""])

    monkeypatch.setattr(compilation, "_spawn", spawn)
    model = tiny()
    decoder = compiler.template(orders[0])
    matrices = [value for weights in decoder.layers for value in weights.values() if isinstance(value, tuple)]
    assert len(decoder.layers) == model.depth > 1
    assert len({value[0].data_ptr() for value in matrices}) == len(matrices) // model.depth


def test_two_threads_start_one_process(background: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[Order] = []

    def spawn(what: Order, _: object) -> Any:
        started.append(what)
        time.sleep(0.1)
        return compilation._Detached([sys.executable, "-c", ""])

    monkeypatch.setattr(compilation, "_spawn", spawn)
    model = tiny(compile=False)
    loaded = model.loaded

    def begin(_: int) -> None:
        compilation.compile_in_background(loaded.decoder, loaded.config, loaded.name, loaded.fingerprint)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(begin, range(4)))
    assert len(started) == 1


def test_a_status_of_a_dead_process_is_an_interrupted_one(background: Path) -> None:
    packages_folder().mkdir(parents=True)
    (packages_folder() / "damaged.json").write_text("{")
    write_status(order().key, order().status("compiling", done=2, total=5))
    with lock_of(order().key):
        ((status,),) = statuses().values()
        assert status.text == "compiling, 40 %"
    ((status,),) = statuses().values()
    assert status.text == "failed (it was interrupted)"


def test_drafts_of_dead_processes_are_removed(background: Path) -> None:
    folder = packages_folder()
    folder.mkdir(parents=True)
    process = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, check=True)
    dead, own, whole = folder / f"a.{int(process.stdout)}.pt2", folder / f"b.{os.getpid()}.pt2", folder / "c.pt2"
    for path in (dead, own, whole):
        path.touch()
    compiler._remove_drafts(folder)
    assert sorted(folder.iterdir()) == [own, whole]
