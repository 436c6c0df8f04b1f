"""A short, fixed sample of hostile inputs for every reader; `make fuzz` runs the long one.

In a process of its own: commands change the environment, and memory is measured per process.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from tests.fuzz.readers import READERS

ROOT = Path(__file__).parents[2]


def test_no_reader_answers_with_a_traceback() -> None:
    paths = os.pathsep.join(str(ROOT / part) for part in (".", "billing", "integrations"))
    ran = subprocess.run(
        [sys.executable, "-m", "tests.fuzz", "--inputs", "300", "--jobs", "1"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        check=False,
    )
    result = json.loads(ran.stdout.splitlines()[-1])
    assert result["tracebacks"] == 0, ran.stderr
    assert result["inputs"] >= 300
    assert set(result["by_reader"]) == {reader.name for reader in READERS}
