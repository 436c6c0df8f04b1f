"""Building the package: the native kernels come with it, where there is a C++ compiler for a machine that has some.

A wheel with them is for machines of that kind; without, it is for all, and kernels are compiled when a model is first
loaded. `HATCH_BUILD_NO_HOOKS=true` leaves them out.
"""

from __future__ import annotations

import os
import runpy
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class NativeKernels(BuildHookInterface[Any]):
    """Compiles them into the source tree, where an editable installation finds them as well."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compile, and say what a wheel of it fits."""
        native = Path(self.root, "polar_sdk", "engine", "native")
        builder = runpy.run_path(str(native / "build.py"))
        if not builder["is_possible"]():
            return
        libraries: dict[str, Path] = {kind: native / builder["library_name"](kind) for kind in builder["INSTRUCTIONS"]}
        for other in set(native.glob("kernels-*.so")).difference(libraries.values()):
            other.unlink()  # of another state of the sources

        def why_not(kind: str) -> str:
            """Why the library for these processors cannot be built; empty where it can, or is there."""
            try:
                if not libraries[kind].exists():
                    builder["build_library"](kind, libraries[kind])
            except (builder["BuildError"], OSError) as error:
                return (str(error).strip().splitlines() or [repr(error)])[0]
            return ""

        with ThreadPoolExecutor(os.cpu_count()) as compilers:
            reasons = dict(zip(libraries, compilers.map(why_not, libraries), strict=True))
        for kind, reason in reasons.items():
            if reason:
                self.app.display_warning(f"native kernels for {kind} are left out: {reason}")
        built = [libraries[kind] for kind, reason in reasons.items() if not reason]
        if version == "standard" and built:
            build_data["artifacts"].extend(library.relative_to(self.root).as_posix() for library in built)
            build_data["pure_python"] = False
            build_data["tag"] = f"py3-none-{sysconfig.get_platform().replace('-', '_').replace('.', '_')}"
