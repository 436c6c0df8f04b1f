"""Options that several commands share, as typer annotations, and what becomes of them."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from polar_sdk.errors import InvalidRequestError

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
MaxTokens = Annotated[int | None, typer.Option(help="Most tokens of the answer.")]
Temperature = Annotated[float, typer.Option(help="0 chooses greedily.")]
TopP = Annotated[float, typer.Option(help="Keep the likeliest tokens up to this probability.")]
TopK = Annotated[int, typer.Option(help="Keep that many likeliest tokens; 0 keeps all.")]
Seed = Annotated[int | None, typer.Option(help="Makes sampling repeatable.")]
Tenant = Annotated[str, typer.Option(help="Who is billed.")]
Tags = Annotated[list[str] | None, typer.Option("--tag", help="key=value on the usage record; may be repeated.")]
Ledger = Annotated[
    str | None, typer.Option(help="Ledger as a SQLAlchemy URL; default: POLAR_LEDGER or your data folder.")
]
NoLedger = Annotated[bool, typer.Option("--no-ledger", help="Do not meter.")]
RouterFolder = Annotated[str | None, typer.Option("--router", help="Folder of a router for this model.")]
PolicyFile = Annotated[str | None, typer.Option("--policy", help="Policy file for this model.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps …")]
DeviceMap = Annotated[
    str | None,
    typer.Option(help="Layers on several devices: auto, or e.g. '0-14=cuda:0,15-29=cuda:1'.", show_default=False),
]
Precision = Annotated[str, typer.Option(help="auto, bf16, fp16, fp32, int8 or int4.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def load_model(
    model: str | None,
    *,
    device: str,
    device_map: str | None = None,
    precision: str,
    policy: str | None = None,
    router: str | None = None,
    ledger: str | None = None,
    no_ledger: bool = False,
    tenant: str = "default",
    tags: list[str] | None = None,
) -> Any:
    """Load the model that the options describe."""
    from polar_sdk.model import PolarModel
    from polar_sdk.sinks import AUTO_LEDGER

    return PolarModel.from_pretrained(
        model,
        device=device,
        device_map=device_map,
        precision=precision,
        policy=policy,
        router=router,
        ledger=None if no_ledger else ledger or AUTO_LEDGER,
        tenant=tenant,
        tags=dict(map(_tag, tags or [])),
    )


def compute_of(text: str | None) -> str | float | None:
    """A tier, or the tolerance that a number means."""
    if text is None:
        return None
    try:
        return float(text)
    except ValueError:
        return text


def _tag(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not (key and equals):
        raise InvalidRequestError(f"tag {text!r} is no key=value pair; write for example --tag team=search.")
    return key, value
