"""Ask the official FOCUS validator what it thinks of the FOCUS export: `make focus-check`.

The validator needs Python 3.12 and other versions of libraries than ours, so it gets the environment `.focus`. A ledger
is made with plain rates, a plan with bands, packages, a discount and a minimum, prepaid credit, an issued statement, a
credit note, a draft, and a correction; its statements are exported as CSV and as Parquet. No rule may fail but those
two of which one always does: InvoiceId must be null (C-004), and must not be (C-005).

    python -m tests.billing.exports.focus_check [PYTHON]
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from decimal import Decimal
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final

from polar_billing.exports.focus import focus_csv, focus_rows
from polar_billing.exports.parquet import write_focus
from polar_billing.ledger.ledger import Ledger
from polar_billing.ledger.records import ALL_TENANTS
from polar_billing.statements.issue import credit_note, issued_statements
from polar_billing.statements.period import statements_of_period
from tests.billing.exports.conftest import NOVEMBER, OCTOBER, make_usage

FOLDER: Final = Path(".focus").absolute()
PACKAGES: Final = ("focus-validator==2.2.1", "pyarrow<22")  # it pins numpy 1, which newer pyarrow refuses
VERSION: Final = "1.2.0.1"
CRITERIA: Final = "USAGE_MEASUREMENT_SUPPORTED,UNIT_PRICING_SUPPORTED,PUBLIC_PRICE_LIST_SUPPORTED"
CONTRADICTORY: Final = {"InvoiceId-C-004-C", "InvoiceId-C-005-C"}
_TOTALS: Final = re.compile(r"Total: \d+ \| Pass: (\d+) \| Fail: (\d+) \| Skipped: (\d+)")


def find_python(named: str | None) -> str:
    """A Python 3.12: the one named, one on the PATH, or one of pyenv's."""
    pyenv = sorted((Path.home() / ".pyenv").glob("versions/3.12*/bin/python"))
    for candidate in [named] if named else ["python3.12", *map(str, pyenv)]:
        found = shutil.which(candidate) if candidate else None
        # A shim of pyenv is on the PATH whether or not there is a Python behind it.
        if found and subprocess.run([found, "-c", ""], capture_output=True, check=False).returncode == 0:
            return found
    raise SystemExit("error: no Python 3.12 was found; name one: make focus-check FOCUS_PYTHON=/path/to/python3.12")


def prepare(named: str | None) -> Path:
    """Make the environment of the validator, once; the folder of its packages."""
    if not (FOLDER / "bin" / "focus-validator").exists():
        subprocess.run([find_python(named), "-m", "venv", FOLDER], check=True)
        subprocess.run([FOLDER / "bin" / "pip", "install", "--quiet", *PACKAGES], check=True)
    (packages,) = FOLDER.glob("lib/python3*/site-packages")
    return packages


def failures(packages: Path, file: Path) -> set[str]:
    """The rules that a file breaks."""
    command = [str(FOLDER / "bin" / "focus-validator"), "--validate-version", VERSION, "--block-download"]
    command += ["--applicability-criteria", CRITERIA, "--data-file", str(file)]
    # It reads some of its own files relative to where it runs.
    output = subprocess.run(command, cwd=packages, capture_output=True, text=True, check=False)
    totals = _TOTALS.search(output.stdout)
    if totals is None:
        raise SystemExit(f"error: the validator came to no result:\n{output.stdout}{output.stderr}")
    failed = set(re.findall(r"(\S+): FAIL ", output.stdout))
    assert len(failed) == int(totals[2])
    print(f"{file.name}: {totals[1]} rules pass, {totals[2]} fail {sorted(failed)}, {totals[3]} do not apply")
    return failed


def main() -> None:
    packages = prepare(sys.argv[1] if len(sys.argv) > 1 else None)
    broken: set[str] = set()
    with TemporaryDirectory() as folder, Ledger(f"sqlite:///{folder}/ledger.sqlite3") as ledger:
        make_usage(ledger)
        (issued,) = issued_statements(ledger, "acme")
        credit_note(ledger, "acme", issued.statement.id, Decimal("0.001"), reason="outage", reference="1")
        for period in (OCTOBER, NOVEMBER):
            statements = statements_of_period(ledger, ALL_TENANTS, {"acme": period, "globex": period}.__getitem__)
            assert period.since is not None
            text, binary = (Path(folder) / f"focus-{period.since:%Y-%m}.{ending}" for ending in ("csv", "parquet"))
            text.write_text(focus_csv(focus_rows(statements)))
            write_focus(binary, focus_rows(statements))
            broken |= failures(packages, text) | failures(packages, binary)
    if broken - CONTRADICTORY:
        raise SystemExit(f"error: the export breaks {', '.join(sorted(broken - CONTRADICTORY))}")


if __name__ == "__main__":
    main()
