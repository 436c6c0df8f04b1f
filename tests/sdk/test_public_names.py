"""The public surface: exactly these names per package, and no heavy import before one is used."""

from __future__ import annotations

import subprocess
import sys
from importlib import import_module
from inspect import signature
from typing import Any

import pytest

PUBLIC = {
    "polar_sdk": """
        Audits Chunk Generation IdentityRouter JsonlSink LayerwiseRouter ListSink MenuRouter NullSink PolarError
        PolarModel Policy Program Router StaticRouter Tier TokenLogprobs UsageRecord UsageSink
    """,
    "polar_sdk.lab": """
        AnswerItem ChoiceItem BridgeOptions DraftOptions Evaluation FillOptions FitResult Item LayerwiseSettings
        MenuSettings PromptItem RedTeam RewardMatrix SearchOptions SearchResult SuiteEvaluation builtin_items
        calibrate evaluate evaluate_suite fit heal train_draft_head read_items redteam search train
    """,
    "polar_billing": """
        ALL_TENANTS ALL_TIME AccessError Account AmountError BillingError Budget BudgetError Budgets
        ConflictError
        CreditNote CurrencyMixError IssuedStatement Ledger LedgerUnsoundError LedgerUrlError Level
        Line Meter MissingExtraError OutputError OverBudget Period PeriodError PriceBook PriceBookError
        QueryError Quote Rating RecordRefusedError Report Repriced SchemaVersionError Selection Statement
        StatementLine StoreDamagedError StoreError StoreFullError StoreLockedError StoreNotFoundError
        StoreReadOnlyError StoreUnavailableError StoredUsage UnbalancedError UnknownTenantError UpstreamAuditError
        UsageRow Verification Window
        add_book balances build_report credit_note credit_notes draft_statement issue_statement
        issued_statements lines_of_usage open_meter post quote rate recheck report_csv report_html reprice
        usage_csv usage_of_line usage_rows verify_ledger
    """,
    "langchain_polar": """
        ChatPolar CostTotals PolarCall PolarCostCallbackHandler PolarLLM PolarTracer get_polar_cost_callback
        register
    """,
    "llama_index_polar": "CallCosts CostTotals PolarCall PolarLLM get_polar_cost_callback",
}
HEAVY = "torch transformers"
FRAMEWORKS = "langchain_core llama_index.core sqlalchemy"


@pytest.mark.parametrize("package", PUBLIC)
def test_exactly_the_listed_names(package: str) -> None:
    assert sorted(import_module(package).__all__) == sorted(PUBLIC[package].split())


@pytest.mark.parametrize("package", PUBLIC)
def test_every_name_is_there_and_shown(package: str) -> None:
    module = import_module(package)
    for name in PUBLIC[package].split():
        assert getattr(module, name) is not None
        assert name in dir(module)


@pytest.mark.parametrize("package", ["polar_sdk", "polar_billing", "langchain_polar", "llama_index_polar"])
def test_a_name_that_is_not_there(package: str) -> None:
    with pytest.raises(AttributeError, match=f"No {package} attribute PolarModle"):
        _ = import_module(package).PolarModle


def test_every_error_is_listed_and_drawn() -> None:
    from polar_sdk import errors

    classes = {
        name for name, value in vars(errors).items() if isinstance(value, type) and issubclass(value, BaseException)
    }
    assert errors.__doc__ is not None
    for name in classes:
        assert name in errors.__doc__


def test_imports_stay_light() -> None:
    """In one process, from the lightest on: each statement, and what it brings that it should not."""
    statements = {
        "import polar_sdk": f"{HEAVY} {FRAMEWORKS} pydantic",
        **dict.fromkeys(
            (
                "import polar_sdk.cli.main",
                "from polar_sdk import Program, Policy, UsageRecord, JsonlSink",
                "import polar_billing",
                "import langchain_polar",
                "import llama_index_polar",
                "from polar_sdk.frameworks.settings import ModelSettings; ModelSettings(compute='economy')",
                "from polar_sdk.models.load import LoadOptions, adopt, load_pretrained",
            ),
            f"{HEAVY} {FRAMEWORKS}",
        ),
        "from polar_billing import *": f"{HEAVY} langchain_core llama_index.core",
    }
    code = "import sys\n" + "\n".join(
        f"{statement}\nprint({statement!r}, *[name for name in {unwanted.split()} if name in sys.modules])"
        for statement, unwanted in statements.items()
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert (done.stdout.splitlines(), done.stderr, done.returncode) == (list(statements), "", 0)


def test_model_options_are_those_of_loading_and_of_the_constructor() -> None:
    from polar_sdk import PolarModel
    from polar_sdk.frameworks.settings import ModelSettings
    from polar_sdk.models.load import LoadOptions, load_pretrained
    from polar_sdk.request.options import ModelOptions

    constructor = set(signature(PolarModel).parameters) - {"loaded"}
    assert set(ModelOptions.__annotations__) == set(LoadOptions.__annotations__) | constructor
    assert set(LoadOptions.__annotations__) <= set(ModelSettings.model_fields)
    misspelt: Any = {"precison": "int8"}
    with pytest.raises(TypeError, match=r"precison.*'precision'"):
        PolarModel.from_pretrained(**misspelt)  # before anything is loaded
    with pytest.raises(TypeError, match=r"precison.*'precision'"):
        load_pretrained(**misspelt)
