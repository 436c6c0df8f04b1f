"""A router on disk: a folder with `router.safetensors` (weights) and `router.json` (everything else). No pickle.

`router.json` holds kind, programs, base model, training record, certificate, and the hashes of weights and programs, so
that an altered or missing file is detected before it serves. Bridges are stored in a separate folder next to them.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final, Literal

from pydantic import BaseModel, ConfigDict, Field

from polar_sdk.engine.hashes import hash_programs, hash_tensors
from polar_sdk.errors import RouterDamagedError, RouterError
from polar_sdk.programs.program import Program
from polar_sdk.reading import Unreadable, parse_object, read_bytes, read_document
from polar_sdk.router.base import IdentityRouter, StaticRouter
from polar_sdk.router.certificate import Certificate
from polar_sdk.router.layerwise import LayerwiseRouter
from polar_sdk.router.learned import LearnedRouter, RouterFacts
from polar_sdk.router.menu import MenuRouter
from polar_sdk.router.network import Network
from polar_sdk.writing import replacing

if TYPE_CHECKING:
    from torch import Tensor

    from polar_sdk.router.base import Router


_JSON: Final = "router.json"
_WEIGHTS: Final = "router.safetensors"
_LEARNED: Final = {"menu": MenuRouter, "policy": LayerwiseRouter}


class _File(BaseModel):
    """`router.json`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal[1] = 1
    kind: Literal["identity", "static", "menu", "policy"]
    programs: Annotated[tuple[Program, ...], Field(min_length=1)]
    programs_sha256: str
    weights_sha256: str
    facts: RouterFacts | None = None
    """None for kinds that need no training."""
    certificate: Certificate | None = None


def save_router(router: Router, folder: str | Path) -> Path:
    """Write a router's folder, which is created if needed; returns it.

    Raises:
        RouterError: Its kind cannot be stored.
    """
    from safetensors.torch import save_file

    tensors: dict[str, Tensor] = {}
    facts: RouterFacts | None = None
    certificate: Certificate | None = None
    if isinstance(router, LearnedRouter):
        tensors, programs = router.network.tensors(), router.programs
        facts, certificate = router.facts, router.certificate
    elif isinstance(router, StaticRouter):
        programs = (router.program,)
    else:
        raise RouterError(f"a router of kind {router.kind!r} cannot be saved; identity, static, menu and policy can.")
    file = _File.model_validate(
        {
            "kind": router.kind,
            "programs": programs,
            "programs_sha256": hash_programs(programs),
            "weights_sha256": hash_tensors(tensors),
            "facts": facts,
            "certificate": certificate,
        }
    )
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    save_file(tensors, target / _WEIGHTS)
    # Last, and in one step: a folder with a router.json is complete.
    with replacing(target / _JSON) as draft:
        draft.write_text(file.model_dump_json(indent=1) + "\n", encoding="utf-8")
    return target


def load_router(folder: str | Path) -> Router:
    """Read a router; a learned one serves once it is bound to its model.

    Raises:
        RouterError: There is no router in that folder.
        RouterDamagedError: A file is missing, altered or malformed.
    """
    source = Path(folder)
    file = _read_json(source)
    if hash_programs(file.programs) != file.programs_sha256:
        raise _damaged(source, _JSON, "its programs are not the ones it was saved with")
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors = load_file(source / _WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise _damaged(source, _WEIGHTS, str(error)) from error
    if hash_tensors(tensors) != file.weights_sha256:
        raise _damaged(source, _WEIGHTS, "its weights are not the ones it was saved with")
    if file.kind in ("identity", "static"):
        program = file.programs[0]
        return IdentityRouter(len(program)) if file.kind == "identity" else StaticRouter(program)
    return _learned(source, file, tensors)


def model_of(folder: Path) -> str | None:
    """Fingerprint of the model that a router names, before anything of it is checked; None if it names none."""
    try:
        facts = parse_object(read_bytes(folder / _JSON)).get("facts")
    except (OSError, Unreadable):
        return None
    return facts.get("fingerprint") if isinstance(facts, dict) else None


def _learned(source: Path, file: _File, tensors: dict[str, Tensor]) -> LearnedRouter:
    if file.facts is None:
        raise _damaged(source, _JSON, f"a router of kind {file.kind} needs 'facts'")
    try:
        network = Network.of(tensors)
    except ValueError as error:
        raise _damaged(source, _WEIGHTS, str(error)) from error
    kind = _LEARNED[file.kind]
    free = file.facts.training.get("free_layers", ())
    outputs = len(file.programs) - 1 if kind is MenuRouter else 3 * len(free)
    if network.biases[-1].shape[0] != outputs:
        raise _damaged(source, _WEIGHTS, f"it has {network.biases[-1].shape[0]} outputs; its kind needs {outputs}")
    if file.facts.forms and len(file.facts.forms) != len(file.programs):
        raise _damaged(source, _JSON, f"it names forms of {len(file.facts.forms)} of {len(file.programs)} programs")
    if file.certificate is not None and file.certificate.subject.router != file.weights_sha256:
        raise _damaged(source, _JSON, "its certificate belongs to other weights")
    return kind(file.facts, network, file.programs, file.certificate)


def _read_json(source: Path) -> _File:
    path = source / _JSON
    if not path.is_file():
        raise RouterError(
            f"there is no router in folder {str(source)!r} ({_JSON} is missing).",
            hint="Train one with `polar lab train --out FOLDER`, or pass the folder of a router.",
        )
    return read_document(path, _File, lambda reason: _damaged(source, _JSON, reason))


def _damaged(source: Path, name: str, reason: str) -> RouterDamagedError:
    return RouterDamagedError(
        f"router {str(source)!r} is damaged: {name}: {' '.join(reason.split())[:300]}.",
        hint="Copy it again, or train it again with `polar lab train`.",
    )
