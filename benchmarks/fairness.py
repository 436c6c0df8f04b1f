"""The cost of other tenants to one: its time to first token and its speed, beside what it has alone.

    python -m benchmarks.fairness [--model NAME] [--tiny] [--rounds 5] [--callers 1000] [--readers 32]

One tenant asks again and again, in turn: alone; beside streams of another tenant of which nobody reads more than a
piece; and beside a crowd of callers of another tenant. All in one run, so that a slow moment of the machine affects all
of them; a ratio is the median over the rounds. The fair share of two tenants is half. `--tiny` runs the tiny model of
`polar_sdk.testing`, whose rows gain less by running together. Prints a Markdown table and writes the figures to
`--results`.
"""

from __future__ import annotations

import random
import statistics
import threading
import time
from contextlib import ExitStack, closing, contextmanager
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

from benchmarks.peers import alternate, apart
from benchmarks.results import Recorder, arguments
from polar_sdk import PolarModel
from polar_sdk.serving.places import Limits
from polar_sdk.testing import tiny_model

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager

PROMPT_WORDS, NEW, ASKED = 60, 32, 4
"""Words of the quiet tenant's prompts, tokens of its answers, and how often it asks per round."""
CROWD_NEW = 64
FAIR_SHARE = 0.5
_WORDS = ("light", "sea", "stone", "letter", "house", "old", "storm", "ship", "road", "river", "night", "tree", "voice")


class Service(NamedTuple):
    """Service of the quiet tenant."""

    first_token: float
    """Unit: seconds."""
    speed: float
    """From the first token to the last. Unit: tokens/s."""


def main() -> None:
    args = _arguments()
    model = _model(args)
    recorder = Recorder("fairness", args.results, model="tiny" if args.tiny else args.model, device=args.device)
    print(f"{model.name}, {model.device}, {args.callers} callers, {args.readers} readers\n")
    settings: dict[str, Callable[[PolarModel], AbstractContextManager[None]]] = {
        "alone": _nobody,
        f"beside {args.readers} paused readers": lambda model: _readers(model, args.readers),
        f"beside {args.callers:,} callers": lambda model: _callers(model, args.callers),
    }
    measured = alternate(args.rounds, *(partial(_service, model, others) for others in settings.values()))
    alone = measured[0]
    for name, services in list(zip(settings, measured, strict=True))[1:]:
        waits, waits_alone = ([1000 * one.first_token for one in side] for side in (services, alone))
        recorder.compare(
            f"time to first token, {name}", waits, waits_alone, "ms", peer="alone", goal=2.0, better="lower"
        )
        speeds, speeds_alone = ([one.speed for one in side] for side in (services, alone))
        recorder.compare(f"speed, {name}", speeds, speeds_alone, "tokens/s", peer="alone", goal=FAIR_SHARE)
    print(f"\nwrote {recorder.path}")


def _service(model: PolarModel, others: Callable[[PolarModel], AbstractContextManager[None]]) -> Service:
    with others(model):
        services = [_ask(model) for _ in range(ASKED)]
    return Service(*map(statistics.median, zip(*services, strict=True)))


def _arguments() -> argparse.Namespace:
    parser = arguments(__doc__)
    parser.add_argument("--model")
    parser.add_argument("--tiny", action="store_true", help="the tiny model of polar_sdk.testing")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--callers", type=int, default=1000)
    parser.add_argument("--readers", type=int, default=32)
    parser.add_argument("--pace", type=float, default=Limits().pace, help="see polar_sdk.serving.places.Limits")
    return parser.parse_args()


def _model(args: argparse.Namespace) -> PolarModel:
    if args.tiny:
        model = tiny_model()
    else:
        model = apart(lambda: PolarModel.from_pretrained(args.model, device=args.device, ledger=None))
    model.scheduler.limits = Limits(pace=args.pace, prefix_share=0)
    return model


def random_prompt(words: int = PROMPT_WORDS) -> str:
    """Words that make no sense, so that no earlier prompt began alike."""
    return " ".join(random.choices(_WORDS, k=words))


def _ask(model: PolarModel) -> Service:
    """One answer of full length to the quiet tenant."""
    start = time.perf_counter()
    first, tokens = 0.0, 0
    for _ in model.stream(random_prompt(), tenant="quiet", compute="exact", max_tokens=NEW, temperature=1.0):
        first = first or time.perf_counter()
        tokens += 1
    return Service(first - start, (tokens - 1) / max(time.perf_counter() - first, 1e-9))


@contextmanager
def _nobody(model: PolarModel) -> Iterator[None]:
    yield


@contextmanager
def _readers(model: PolarModel, count: int) -> Iterator[None]:
    """Streams of another tenant, of which one piece is read."""
    with ExitStack() as stack:
        for _ in range(count):
            stream = stack.enter_context(closing(model.stream(random_prompt(), tenant="noisy", compute="exact")))
            next(stream)
        yield


@contextmanager
def _callers(model: PolarModel, count: int) -> Iterator[None]:
    """Requests of another tenant, all at once, that go on until the block ends."""
    over = threading.Event()

    def flood() -> None:
        while not over.is_set():
            prompts = [random_prompt() for _ in range(count)]
            model.generate_batch(prompts, tenant="noisy", compute="exact", max_tokens=CROWD_NEW, cancel=over)

    thread = threading.Thread(target=flood)
    thread.start()
    while len(model.scheduler) < count // 2:
        time.sleep(0.01)
    time.sleep(1)  # until places and passes are full
    yield
    over.set()
    thread.join()


if __name__ == "__main__":
    main()
