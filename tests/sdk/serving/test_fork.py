"""A child forked at any moment answers, begins with an empty pool, and leaves what the parent was doing alone."""

from __future__ import annotations

import gc
import os
import signal
import sys
import threading
import time
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import psutil
import pytest
import torch

from polar_sdk.engine.pages import PAGE, PagePool
from polar_sdk.errors import CacheMemoryError, InvalidRequestError
from polar_sdk.models.convert import LOADING_LOCK
from polar_sdk.serving import scheduler as module
from polar_sdk.serving.places import Limits
from polar_sdk.testing import tiny_model
from polar_sdk.usage import ListSink

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from torch import Tensor

pytestmark = [
    pytest.mark.skipif(not hasattr(os, "fork"), reason="this platform has no fork"),
    pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning"),
]
FORKS = 3
LONG = 400
START = "You are a careful assistant. " * 6


def in_child(act: Callable[[], object]) -> int:
    """Run something in a forked child, which an alarm ends if it hangs; its exit status."""
    child = os.fork()
    if child == 0:  # pragma: no cover  (another process)
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(60)
        try:
            act()
        except BaseException as error:
            os.write(2, f"{error!r}\n".encode())
            os._exit(1)
        os._exit(0)
    return os.waitpid(child, 0)[1]


@pytest.fixture
def busy() -> Iterator[tuple[Any, ListSink]]:
    """A model that decodes and prefills in the background, with kept starts of prompts and streams that rest."""
    sink = ListSink()
    model = tiny_model(sink=sink, context_window=1024, kv_memory=6 * 2 * 2 * 64 * 12 * 4 * 40)
    model.scheduler.limits = Limits(max_rows=3)
    model.generate(START, max_tokens=2)
    over = threading.Event()

    def load(number: int) -> None:
        while not over.is_set():
            model.generate(START + str(number), max_tokens=30, tenant=str(number), cancel=over)

    threads = [threading.Thread(target=load, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    yield model, sink
    over.set()
    for thread in threads:
        thread.join(60)


def test_children_of_a_decoding_parent_answer(busy: tuple[Any, ListSink]) -> None:
    model, sink = busy
    expected = tiny_model(context_window=1024).generate("hello", max_tokens=8).token_ids
    stream = model.stream("mine", max_tokens=LONG, request_id="mine")
    next(stream)

    def answers() -> None:
        pool = model.decoder.pool
        assert pool.free == pool.size
        assert model.generate("hello", max_tokens=8).token_ids == expected
        assert model.generate(START + "x", max_tokens=2).usage.tokens.cached == 0  # what was kept is the parent's
        assert model.generate(START + "y", max_tokens=2).usage.tokens.cached > 0
        stream.close()
        gc.collect()
        assert "mine" not in {record.request_id for record in sink.records}
        model.scheduler.close()
        model.scheduler.prefixes.make_room(pool.sizes)
        assert pool.free == pool.size

    for _ in range(FORKS):
        next(stream)
        assert in_child(answers) == 0
    stream.close()
    assert [record.outcome for record in list(sink.records) if record.request_id == "mine"] == ["cancelled"]


def test_an_inherited_stream_is_its_parents() -> None:
    sink = ListSink()
    stream = tiny_model(sink=sink).stream("hello", max_tokens=LONG)
    next(stream)

    def closes() -> None:
        begun = time.monotonic()
        stream.close()
        assert time.monotonic() - begun < 3, "it waited for a record that is its parent's"
        assert sink.records == []

    def drops() -> None:
        nonlocal stream
        del stream
        gc.collect()
        assert sink.records == []

    def reads() -> None:
        with pytest.raises(InvalidRequestError):
            list(stream)

    for act in (closes, drops, reads):
        assert in_child(act) == 0
    stream.close()
    assert [record.outcome for record in sink.records] == ["cancelled"]


def test_the_parent_goes_on_exactly(busy: tuple[Any, ListSink]) -> None:
    model, _ = busy
    expected = tiny_model(context_window=1024).generate("mine", max_tokens=12)
    stream = model.stream("mine", max_tokens=12)
    for chunk in stream:
        if chunk.generation is None:
            assert in_child(lambda: None) == 0
        else:
            assert chunk.generation.token_ids == expected.token_ids
            assert chunk.generation.usage.flops.layers_decode == expected.usage.flops.layers_decode


@pytest.mark.parametrize("held", ["the pool's lock", "the pool's maker", "loading"])
def test_whatever_another_thread_holds(held: str) -> None:
    model = tiny_model()
    model.generate("hello", max_tokens=1)
    lock: Any = {
        "the pool's lock": model.decoder.pool._lock,
        "the pool's maker": model.decoder._making_pool,
        "loading": LOADING_LOCK,
    }[held]
    taken, free = threading.Event(), threading.Event()

    def hold() -> None:
        with lock:
            taken.set()
            assert free.wait(60)

    holder = threading.Thread(target=hold)
    holder.start()
    assert taken.wait(20)

    def answers() -> None:
        with ExitStack() as stack:
            if held == "loading":
                stack.enter_context(LOADING_LOCK)
            model.generate("x" * 200, max_tokens=1)

    status = in_child(answers)
    free.set()
    holder.join()
    assert status == 0


def test_a_hook_that_waits_for_whoever_forks_does_not_stop_the_fork(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_FORK_SECONDS", 0.2)
    sink = ListSink()
    model = tiny_model(sink=sink)
    reached, opened = threading.Event(), threading.Event()

    def hook(tokens: Sequence[int], logits: Tensor) -> Tensor:
        if len(tokens) == 2:
            reached.set()
            assert opened.wait(60)
        return logits

    thread = threading.Thread(target=lambda: model.generate("hello", max_tokens=5, logits_hook=hook))
    thread.start()
    assert reached.wait(20)
    assert in_child(lambda: model.generate("hello", max_tokens=3)) == 0
    opened.set()
    thread.join(60)
    assert [record.outcome for record in sink.records] == ["completed"]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="what other systems promise is not counted like this")
def test_stores_larger_than_the_memory_do_not_stop_a_fork() -> None:
    """As several models have them, each with half of what was free when it was loaded; the system joins neighbours."""
    page = 2 * 1 * PAGE * 64 * torch.float32.itemsize
    pages = psutil.virtual_memory().total * 3 // 5 // page
    pools = [PagePool([(torch.device("cpu"), pages)], 1, 64, torch.float32) for _ in range(3)]
    for pool in pools:
        pool.take([0])
        pool.stores[0][0] = 1
    assert in_child(lambda: [pool.take([0]) for pool in pools]) == 0


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="elsewhere torch refuses")
def test_what_the_system_refuses_is_said() -> None:
    with pytest.raises(CacheMemoryError, match=r"refuses \d+ MiB .*kv_memory"):
        PagePool([(torch.device("cpu"), 2**40)], 1, 64, torch.float32)
