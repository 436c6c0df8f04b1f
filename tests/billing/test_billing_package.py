"""The package as a whole: what importing it loads, what it shows, what its errors are."""

from __future__ import annotations

import subprocess
import sys

import pytest

import polar_billing
from polar_billing import errors
from polar_sdk.errors import PolarError, SinkError

ERRORS = [
    name for name, kind in vars(errors).items() if isinstance(kind, type) and issubclass(kind, errors.BillingError)
]


def loaded_by(code: str) -> set[str]:
    script = f"import sys\n{code}\nprint(*sorted({{name.partition('.')[0] for name in sys.modules}}))"
    done = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    return set(done.stdout.split())


@pytest.mark.parametrize(
    "code",
    [
        "import polar_billing",
        "from polar_billing import *",
        "import polar_billing.metering.meter, polar_billing.cli",
        "import polar_billing.reports.html",
    ],
)
def test_torch_and_frameworks_are_never_imported(code: str) -> None:
    assert not loaded_by(code) & {"torch", "transformers", "langchain_core", "llama_index"}


def test_importing_the_package_loads_no_database_and_the_command_none_either() -> None:
    assert not loaded_by("import polar_billing, polar_billing.cli") & {"sqlalchemy", "matplotlib", "jinja2"}


def test_every_public_name_can_be_had() -> None:
    for name in polar_billing.__all__:
        assert getattr(polar_billing, name) is not None
    assert set(polar_billing.__all__) == set(dir(polar_billing))
    assert set(ERRORS) <= set(polar_billing.__all__)
    with pytest.raises(AttributeError, match="Meters"):
        _ = polar_billing.Meters  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", ERRORS)
def test_every_error_is_one_of_the_tree(name: str) -> None:
    kind = getattr(errors, name)
    assert issubclass(kind, errors.BillingError)
    assert issubclass(kind, PolarError)
    error = kind("what is wrong.", hint="What to do.")
    assert str(error) == "what is wrong. What to do."
    assert error.hint == "What to do."
    assert name in (errors.__doc__ or "")
    if issubclass(kind, errors.StoreError):
        assert issubclass(kind, SinkError)
        assert error.exit_code == 1


@pytest.mark.parametrize("command", ["usage", "report"])
def test_without_its_database_library_a_command_says_which_extra_brings_it(command: str) -> None:
    script = f"""
import sys
sys.modules["sqlalchemy"] = None
sys.argv = ["polar", {command!r}]
from polar_sdk.cli.main import main
main()
"""
    done = subprocess.run([sys.executable, "-c", script], check=False, capture_output=True, text=True)
    assert done.returncode != 0
    assert done.stderr.startswith("error: this command needs 'sqlalchemy'. Install the extra billing")
    assert len(done.stderr.splitlines()) == 1
