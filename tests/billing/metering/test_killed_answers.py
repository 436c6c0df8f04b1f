"""A process is killed in the middle of its answers: what they had executed up to their last marks is billed, once."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from decimal import Decimal
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from polar_billing.budgets.budget import Budget
from polar_billing.budgets.enforcement import Budgets
from polar_billing.cli.statement import register
from polar_billing.ledger.ledger import Ledger
from polar_billing.ledger.records import INTERRUPTED_TAG, Selection
from polar_billing.metering.spool import recover_abandoned
from polar_billing.prices.book import PriceBook
from polar_billing.prices.rating import rate
from polar_billing.proof.verify import verify_ledger
from polar_sdk.programs.program import Program
from polar_sdk.testing import tiny_model
from polar_sdk.usage import Outcome

KILLED = """
import json, os, signal, sys, threading
from polar_billing.metering.meter import Meter
from polar_sdk.testing import tiny_model, tiny_tokenizer

class Marking(Meter):
    # Says on standard output what it has marked, once that is written.
    def mark(self, record):
        super().mark(record)
        os.write(1, (json.dumps([record.request_id, record.flops.total, record.tokens.output]) + "\\n").encode())

letter = tiny_tokenizer().encode("A", add_special_tokens=False)[0]

def go_on(_, logits):
    logits[letter] += 1e3
    return logits

def answer(name, tokens):
    for _ in model.stream("hello " + name, program="0-5", max_tokens=tokens, request_id=name, logits_hook=go_on):
        pass

model = tiny_model(sink=Marking(sys.argv[1], durability=sys.argv[2]), tenant="acme", context_window=4096)
answer("whole", 100)
answer("short", 10)
threads = [threading.Thread(target=answer, args=(name, 4_000), daemon=True) for name in ("a", "b", "c")]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
"""


def killed_in_mid_answer(url: str, durability: str, marks: int) -> list[list[Any]]:
    """Kill a process that answers, once each of its long answers has so many marks; the marks that it told of."""
    with subprocess.Popen(
        [sys.executable, "-c", KILLED, url, durability], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        told = []
        for line in process.stdout:
            told.append(json.loads(line))
            if all([mark[0] for mark in told].count(name) >= marks for name in ("a", "b", "c")):
                break
        process.send_signal(signal.SIGKILL)
        told += [json.loads(line) for line in process.stdout if line.endswith("\n")]
    assert process.returncode == -signal.SIGKILL
    return told


@pytest.mark.parametrize(("url", "durability"), [("sqlite", "spool"), ("postgresql", "commit")], indirect=["url"])
def test_a_kill_in_mid_answer_is_billed_to_the_last_mark(url: str, durability: str) -> None:
    with Ledger(url) as ledger:
        budgets = Budgets(ledger)
        budgets.set(Budget("acme", Decimal(1_000)))
        told = killed_in_mid_answer(url, durability, marks=3)
        recover_abandoned(ledger)
        stored = list(ledger.read(Selection("acme")))
        names = {one.record.tags.get(INTERRUPTED_TAG, one.record.request_id): one for one in stored}
        assert len(names) == len(stored) == 5
        assert {name for name, one in names.items() if one.record.outcome is Outcome.COMPLETED} == {"whole", "short"}
        cost = tiny_model().decoder.cost
        for name in ("a", "b", "c"):
            one = names[name]
            tokens, marks = one.record.tokens, [mark[1:] for mark in told if mark[0] == name]
            assert [one.record.flops.total, tokens.output] >= (marks[-1] if marks else [0, 0]), "what was told is kept"
            assert one.record.flops.total == cost.request(Program.of("0-5"), tokens.input, tokens.output).total
            assert one.record.outcome is Outcome.CANCELLED
            assert one.cost == rate(one.record, PriceBook.example()).rounded.total
        assert list(ledger.read(Selection("acme"))) == stored, "once"
        assert verify_ledger(ledger).sound
        assert budgets.holds("acme") == []
        (standing,) = budgets.standings("acme")
        assert standing.spent == sum(one.record.flops.total for one in stored)
        assert budgets.recheck("acme") == []
    month = f"{stored[0].record.started_at:%Y-%m}"
    shown = typer.Typer()
    register(shown)
    drafted = CliRunner().invoke(shown, ["statement", "--tenant", "acme", "--month", month, "--ledger", url, "--json"])
    assert drafted.exit_code == 0, drafted.output
    bill = json.loads(drafted.output)
    assert (bill["requests"], bill["unrated"]) == (5, {})
    (line,) = bill["usage"]
    assert Decimal(line["compute_units"]) * 10**12 == sum(one.record.flops.total for one in stored)
