"""Savings of a router's tiers as calibration measured them, from `router.json` alone: no weights, tensors or model.

For pricing tiers. The figures are those of the certificate, for prompts like those of its calibration.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from polar_sdk.models.paths import cache_folder
from polar_sdk.reading import Unreadable, parse_object, read_bytes

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping


@dataclass(frozen=True)
class MeasuredTiers:
    """Figures of a certificate about the tiers of one model."""

    router: str
    """SHA-256 of the router's weights, hexadecimal."""
    prompts: int
    """Number of calibration prompts."""
    saved: Mapping[str, float]
    """Tier → mean share of full depth's FLOPs that it saved on those that are answered in text, or on choices where
    there is no such prompt, after the router's own."""


def measured_tiers(fingerprint: str) -> MeasuredTiers | None:
    """The certificate of the user's own router for a model, or else of the shipped one; None if there is none.

    Args:
        fingerprint: The model's, as usage records have it.
    """
    for file in _files(fingerprint):
        try:
            found = _read(parse_object(read_bytes(file)), fingerprint)
        except (OSError, Unreadable, LookupError, TypeError, ValueError):
            continue  # a router that is damaged serves nobody
        if found is not None:
            return found
    return None


def _files(fingerprint: str) -> Iterator[Path]:
    own = cache_folder() / "routers" / fingerprint / "router.json"
    if own.is_file():
        yield own
    shipped = resources.files("polar_sdk") / "shipped" / "routers"
    for folder in shipped.iterdir() if shipped.is_dir() else ():
        if isinstance(folder, Path) and (folder / "router.json").is_file():
            yield folder / "router.json"


def _read(router: dict[str, Any], fingerprint: str) -> MeasuredTiers | None:
    certificate = router["certificate"]
    if certificate is None or certificate["subject"]["model"] != fingerprint:
        return None
    form = "text" if "text" in certificate["saved"] else "choice"
    kinds = certificate["kinds"].items()
    saved = dict(zip(certificate["thetas"], certificate["saved"][form], strict=True))
    return MeasuredTiers(
        router=router["weights_sha256"],
        prompts=sum(int(counts["n"]) for kind, counts in kinds if (kind == "choice") == (form == "choice")),
        saved={tier: float(saved[promise["setting"][form]]) for tier, promise in certificate["tiers"].items()},
    )
