"""Options that several commands share, as typer annotations, and the model and request that they describe."""

from __future__ import annotations

import gc
import inspect
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Protocol, TypeVar, Unpack, cast

import typer

from polar_sdk import lab
from polar_sdk.errors import InvalidRequestError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from polar_sdk.lab.items import Item
    from polar_sdk.model import PolarModel
    from polar_sdk.request.options import ModelOptions, RequestOptions

N = TypeVar("N", int, float)
_SELDOM = 100_000
"""Number of new objects after which to look for garbage while a model is loaded; the interpreter looks after 700."""

Model = Annotated[str | None, typer.Option("--model", "-m", help="Alias, hub id, folder or .gguf file.")]
Compute = Annotated[
    str | None,
    typer.Option(
        "--compute",
        "-c",
        help="Tier: economy, standard, premium or exact; or a tolerance, such as 0.05.",
        show_default=False,
    ),
]
ProgramText = Annotated[str | None, typer.Option("--program", "-p", help="Program by hand, e.g. '0-11 15x2 18-29'.")]
MaxTokens = Annotated[int | None, typer.Option(help="Maximum number of tokens in the answer.")]
Temperature = Annotated[float, typer.Option(help="Sampling temperature; 0 is greedy.")]
TopP = Annotated[float, typer.Option(help="Sample from the likeliest tokens up to this total probability.")]
TopK = Annotated[int, typer.Option(help="Sample from the N likeliest tokens; 0 = all.")]
MinP = Annotated[float, typer.Option(help="Minimum probability of a token, relative to the likeliest; 0 = all.")]
Penalty = Annotated[float, typer.Option(help="Subtracted from the logits of tokens in the answer, -2 to 2.")]
FrequencyPenalty = Annotated[float, typer.Option(help="The same, once per occurrence.")]
RepetitionPenalty = Annotated[float, typer.Option(help="Divides the logits of tokens in prompt or answer.")]
StopRepeats = Annotated[
    int | None, typer.Option(help="End an answer that repeats the same text N times in a row; default: never.")
]
IgnoreEos = Annotated[bool, typer.Option("--ignore-eos", help="Keep the model from ending its answer.")]
Seed = Annotated[int | None, typer.Option(help="Seed that makes sampling repeatable.")]
SpeculateMode = Annotated[
    str | None,
    typer.Option(
        "--speculate",
        help="Draft tokens: off, auto (where it pays) or prompt (wherever the prompt or answer repeats); default: auto "
        "where the answer stays the same to the bit.",
        show_default=False,
    ),
]
Tenant = Annotated[str, typer.Option(help="Who is billed.")]
Tags = Annotated[list[str] | None, typer.Option("--tag", help="Tag of the usage record, key=value; may be repeated.")]
Ledger = Annotated[
    str | None, typer.Option(help="Ledger as a SQLAlchemy URL; default: POLAR_LEDGER or your data folder.")
]
NoLedger = Annotated[bool, typer.Option("--no-ledger", help="Do not meter.")]
RouterFolder = Annotated[str | None, typer.Option("--router", help="Folder of a router for this model.")]
Data = Annotated[
    Path | None,
    typer.Option(help="JSONL of {prompt}, {prompt, answer} or {question, choices, answer}; default: built-in."),
]
Limit = Annotated[int | None, typer.Option(min=1, help="Use only the first N items.")]
Maps = Annotated[
    list[Path] | None, typer.Option("--maps", help="Folder of bridges or fills that programs use; may be repeated.")
]
PolicyFile = Annotated[str | None, typer.Option("--policy", help="Policy file for this model.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps …")]
DeviceMap = Annotated[
    str | None,
    typer.Option(help="Layers on several devices: auto, or e.g. '0-14=cuda:0,15-29=cuda:1'.", show_default=False),
]
Precision = Annotated[str, typer.Option(help="auto, bf16, fp16, fp32, int8 or int4.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@dataclass(frozen=True)
class Chosen:
    """The options of `with_model`."""

    model: dict[str, Any]
    """Arguments of `load_model`."""
    request: RequestOptions
    """Options of every request."""

    def load(self) -> PolarModel:
        """Load the model."""
        return load_model(**self.model)


def with_model(command: Callable[..., None]) -> Callable[..., None]:
    """Add to a command the options of a request and of the model that answers it.

    If it is interrupted, its message says whether what was executed is metered.

    Args:
        command: Takes the values as `chosen`; typer does not see that parameter.
    """
    own = _parameters(command, without="chosen")
    arguments = {name: option for name, option in own.items() if option.default is inspect.Parameter.empty}
    request, model = _parameters(_request), _parameters(_model)

    def run(**values: Any) -> None:
        chosen = Chosen(
            model=_model(**{name: values[name] for name in model}),
            request=cast("RequestOptions", _request(**{name: values[name] for name in request})),
        )
        try:
            command(**{name: values[name] for name in own}, chosen=chosen)
        except KeyboardInterrupt:
            metered = () if chosen.model["no_ledger"] else ("what was executed until then is in the ledger",)
            raise KeyboardInterrupt(*metered) from None

    return _described(run, command, {**arguments, **request, **own, **model})


class Load(Protocol):
    """Loader of the model that a command of the laboratory is for."""

    def __call__(self, **options: Unpack[ModelOptions]) -> PolarModel:
        """Load it, unmetered, with further arguments of `load_model`."""


def with_lab_model(command: Callable[..., None]) -> Callable[..., None]:
    """Add to a command the options of the model that it works on.

    Args:
        command: Takes the loader as `load`; typer does not see that parameter. It may take the model itself as an
            argument.
    """
    own, model = _parameters(command, without="load"), _parameters(_lab_model)

    def run(**values: Any) -> None:
        load = partial(load_model, no_ledger=True, **{name: values[name] for name in model})
        command(**{name: values[name] for name in own}, load=load)

    return _described(run, command, {**own, **{name: option for name, option in model.items() if name not in own}})


def _parameters(function: Callable[..., Any], *, without: str = "") -> dict[str, inspect.Parameter]:
    parameters = inspect.signature(function, eval_str=True).parameters.items()
    return {name: option.replace(kind=inspect.Parameter.KEYWORD_ONLY) for name, option in parameters if name != without}


def _described(
    run: Callable[..., None], command: Callable[..., None], options: dict[str, inspect.Parameter]
) -> Callable[..., None]:
    """A function that typer sees as the command with these options."""
    run.__name__, run.__doc__ = command.__name__, command.__doc__
    run.__annotations__ = {name: option.annotation for name, option in options.items()}
    run.__signature__ = inspect.Signature(list(options.values()))  # type: ignore[attr-defined]
    return run


def _request(
    compute: Compute = None,
    program: ProgramText = None,
    max_tokens: MaxTokens = None,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    top_k: TopK = 0,
    min_p: MinP = 0.0,
    presence_penalty: Penalty = 0.0,
    frequency_penalty: FrequencyPenalty = 0.0,
    repetition_penalty: RepetitionPenalty = 1.0,
    stop_repeats: StopRepeats = None,
    ignore_eos: IgnoreEos = False,
    seed: Seed = None,
    speculate: SpeculateMode = None,
) -> dict[str, Any]:
    return {**locals(), "compute": compute_of(compute)}


def _model(
    tenant: Tenant = "default",
    tag: Tags = None,
    model: Model = None,
    device: Device = "auto",
    device_map: DeviceMap = None,
    precision: Precision = "auto",
    policy: PolicyFile = None,
    router: RouterFolder = None,
    ledger: Ledger = None,
    no_ledger: NoLedger = False,
) -> dict[str, Any]:
    return locals()


def _lab_model(
    model: Model = None,
    policy: PolicyFile = None,
    device: Device = "auto",
    device_map: DeviceMap = None,
    precision: Precision = "auto",
) -> None:
    """The options of `with_lab_model`."""


def load_model(
    model: str | None, *, no_ledger: bool = False, tag: Sequence[str] | None = None, **options: Unpack[ModelOptions]
) -> PolarModel:
    """Load the model that the options describe; `tag` holds texts such as `team=search`."""
    with _collecting_seldom():
        from polar_sdk.sinks import AUTO_LEDGER, find_sink

        options["tags"] = dict(name_and_value("--tag", text, "team=search") for text in tag or ())
        ledger = options.pop("ledger", None) or AUTO_LEDGER
        sink = options["sink"] = find_sink(None if no_ledger else ledger)
        sink.check()  # before seconds are spent on loading the model
        from polar_sdk.model import PolarModel

        return PolarModel.from_pretrained(model, **options)


def items_of(data: Path | None, limit: int | None) -> list[Item] | None:
    """The first N items of a file, or of the package's own prompts if none is given; None = all of the latter.

    Raises:
        DataError: The file cannot be used.
    """
    if data is not None:
        return lab.read_items(data, limit)
    return None if limit is None else lab.builtin_items()[:limit]


@contextmanager
def _collecting_seldom() -> Iterator[None]:
    """Collect garbage less often: the imports that load a model are not garbage, and collecting takes a sixth of it."""
    before = gc.get_threshold()
    gc.set_threshold(_SELDOM, *before[1:])
    try:
        yield
    finally:
        gc.set_threshold(*before)


def compute_of(text: str | None) -> str | float | None:
    """A tier, or the tolerance that a number means."""
    if text is None:
        return None
    try:
        return float(text)
    except ValueError:
        return text


def numbers(option: str, text: str, kind: type[N], example: str) -> tuple[N, ...]:
    """The numbers of a comma-separated text."""
    try:
        return tuple(kind(part) for part in text.split(","))
    except ValueError:
        what = "whole numbers" if kind is int else "numbers"
        raise InvalidRequestError(f"{option} {text!r} is not a list of {what}, e.g. {example}.") from None


def name_and_value(option: str, text: str, example: str) -> tuple[str, str]:
    """The parts of a text such as `team=search`."""
    name, equals, value = text.partition("=")
    if not (name and equals):
        raise InvalidRequestError(f"{option} {text!r} is not name=value, such as {option} {example}.")
    return name, value
