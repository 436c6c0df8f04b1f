"""Building the package: the native kernels come with it, where there is a C++ compiler for a machine that has some.

A wheel with them is for machines of that kind, which is the compiler's: `CXX=aarch64-linux-gnu-g++` makes one for Arm.
Without, it is for all, and layers run by torch. `HATCH_BUILD_NO_HOOKS=true` leaves them out.
"""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class NativeKernels(BuildHookInterface[Any]):
    """Compiles them into the source tree, where an editable installation finds them as well.

    That gets only what this machine runs fastest, in a fourth of the time; `polar models kernels` builds the others.
    """

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compile, and say what a wheel of it fits."""
        native = Path(self.root, "polar_sdk", "engine", "native")
        builder = runpy.run_path(str(native / "build.py"))
        machine: str = builder["compiled_machine"]()
        reasons: dict[str, str] = builder["build_missing"](machine, fastest=version == "editable")
        for kind, reason in reasons.items():
            self.app.display_warning(f"native kernels for {kind} are left out: {reason}")
        built = sorted(native.glob("kernels-*.so"))
        if version == "standard" and built:
            build_data["artifacts"].extend(library.relative_to(self.root).as_posix() for library in built)
            build_data["pure_python"] = False
            build_data["tag"] = f"py3-none-linux_{machine}"
