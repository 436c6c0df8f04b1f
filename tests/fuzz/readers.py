"""Every reader of the product that meets texts and files of strangers, with valid inputs to begin from.

A reader either reads an input or answers with a `PolarError`; a command ends with an exit code. Whatever else it raises
is a defect. Nothing is written outside the folder that a reader is given.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sqlite3
from contextlib import closing, suppress
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Final
from unittest.mock import patch

from polar_sdk.errors import PolarError
from tests.fuzz.mutate import VALUES, exchange, mutate

if TYPE_CHECKING:
    from collections.abc import Sequence
    from random import Random


class Reader:
    """A reader of one kind of input.

    Args:
        folder: Where it may write; an own one.
    """

    name: ClassVar[str]
    share: ClassVar[int]
    """Its share of the inputs; quick readers get more."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self.prepare()

    def prepare(self) -> None:
        """Make what the inputs begin from, once."""

    def read(self, draw: Random) -> None:
        """Make one input and read it.

        Raises:
            PolarError: The input is refused.
        """
        raise NotImplementedError


class Texts(Reader):
    """A reader of one text or file."""

    valid: Sequence[bytes]

    def read(self, draw: Random) -> None:
        content = draw.choice(self.valid)
        if draw.random() < 0.5:
            content = exchange(draw, content)
        if draw.random() < 0.6:
            content = mutate(draw, content, self.valid)
        self.read_text(content)

    def read_text(self, content: bytes) -> None:
        """Read one input."""
        raise NotImplementedError

    def file(self, name: str, content: bytes) -> Path:
        """Write an input to a file of the folder."""
        path = self.folder / name
        path.write_bytes(content)
        return path


class Programs(Texts):
    """The text of a program."""

    name, share = "program", 8
    valid = (b"0-29", b"0 3-11 15x2 18-29", b"0-3 [4-7] 8-29", b"0 1 2 1 2 3", b"0-5 5-9 9x3", b"", b"7")

    def read_text(self, content: bytes) -> None:
        from polar_sdk.programs.program import Program

        text = content.decode("utf-8", "surrogateescape")
        program = Program.of(text)
        assert Program.of(program.text) == program, "a program does not read back"


class PriceBooks(Texts):
    """A price book: TOML, or JSON as the ledger holds it."""

    name, share = "price book", 8

    def prepare(self) -> None:
        from polar_billing.prices.book import PriceBook

        folder = files("polar_billing")
        self.valid = [(folder / f"example_{kind}.toml").read_bytes() for kind in ("prices", "plans")]
        self.valid.append(PriceBook.example().document.encode())

    def read_text(self, content: bytes) -> None:
        from polar_billing.prices.book import PriceBook

        PriceBook.load(self.file("book.toml", content))


class PriceDocuments(PriceBooks):
    """A price book as JSON, as spool files hold it."""

    name, share = "price document", 3

    def prepare(self) -> None:
        super().prepare()
        self.valid = self.valid[-1:]

    def read_text(self, content: bytes) -> None:
        from polar_billing.prices.book import PriceBook

        PriceBook.from_document(content.decode("utf-8", "replace"))


class StripeCustomers(Texts):
    """Stripe's customers of tenants."""

    name, share = "stripe customers", 2
    valid = (b'acme = "cus_1"\n"=x" = "cus_Na2"\n', b"")

    def read_text(self, content: bytes) -> None:
        from polar_billing.exports.stripe import read_customers

        read_customers(self.file("customers.toml", content))


class EnergyLogs(Texts):
    """A log of measured energy."""

    name, share = "energy log", 2
    valid = (
        b'{"since": "2026-11-01T00:00:00+00:00", "until": "2026-11-01T00:00:10+00:00", "microjoules": {"a": 12}}\n'
        b'{"since": "2026-11-01T00:00:10+00:00", "until": "2026-11-01T00:00:20Z", "microjoules": {"a": 0, "b": 7}}\n',
        b"",
    )

    def read_text(self, content: bytes) -> None:
        from polar_billing.metering.energy import read_energy_log

        for interval in read_energy_log(self.file("energy.jsonl", content)):
            assert interval.since < interval.until, "an interval of no time"


class Policies(Texts):
    """A policy file."""

    name, share = "policy", 6

    def prepare(self) -> None:
        self.valid = [path.read_bytes() for path in Path(str(files("polar_sdk") / "shipped" / "policies")).iterdir()]

    def read_text(self, content: bytes) -> None:
        from polar_sdk.programs.policy import Policy

        Policy.load(self.file("policy.json", content))


class DataSets(Texts):
    """A file of prompts, for healing, training and calibration."""

    name, share = "data set", 6

    def prepare(self) -> None:
        lines = (files("polar_sdk") / "shipped" / "prompts.jsonl").read_bytes().splitlines()
        choice = b'{"question": "2+2?", "choices": ["3", "4"], "answer": 1, "passage": "Sums."}'
        self.valid = [b"\n".join(lines[:4]), lines[0], choice, b'{"prompt": "Hi", "answer": "Hello"}']

    def read_text(self, content: bytes) -> None:
        from polar_sdk.lab.items import distinct_items, read_items

        distinct_items(read_items(self.file("data.jsonl", content)))


class Menus(Texts):
    """A menu of programs that a search found."""

    name, share = "menu", 2

    def prepare(self) -> None:
        menu = {
            **dict.fromkeys(("model", "fingerprint", "dtype", "bridges", "data"), "x"),
            **{"format": "polar-menu-1", "seed": 0, "prompts": {"train": 1}, "tried": 1, "programs": []},
        }
        self.valid = [json.dumps(menu).encode()]

    def read_text(self, content: bytes) -> None:
        from polar_sdk.lab.program_search.menu import Menu

        Menu.load(self.file("menu.json", content))


class Evaluations(Texts):
    """An evaluation of the lab, of which a statement quotes agreement."""

    name, share = "evaluation", 2
    valid = (
        b'{"sets": [{"prompts": 4, "systems": '
        b'[{"role": "router", "name": "router (a)", "flops_saved": {"total": 0.5}}]}]}',
    )

    def read_text(self, content: bytes) -> None:
        from polar_billing.reports.mix import evaluated_savings

        evaluated_savings(self.file("evaluation.json", content))


class Spools(Texts):
    """A file of the spool that was left over."""

    name, share = "spool", 8

    def prepare(self) -> None:
        from polar_billing.metering.meter import Meter
        from polar_billing.metering.spool import Spool
        from polar_billing.testing import usage_record

        meter = Meter("sqlite://")
        spool = Spool(self.folder / "made")
        segment = spool.segment()
        segment.append([meter.entry(usage_record(f"r{n}", tags={"team": "a"})) for n in range(3)])
        self.valid = spool.keep(segment).read_bytes().splitlines()
        spool.close()
        meter.close()

    def read(self, draw: Random) -> None:
        lines = [draw.choice(self.valid) for _ in range(draw.choice([1, 2, 4]))]
        at = draw.randrange(len(lines))
        _, _, content = lines[at].partition(b" ")
        content = exchange(draw, content) if draw.random() < 0.7 else mutate(draw, content, self.valid)
        lines[at] = hashlib.sha256(content).hexdigest()[:16].encode() + b" " + content
        whole = b"\n".join(lines) + b"\n"
        self.read_text(mutate(draw, whole, self.valid) if draw.random() < 0.3 else whole)

    def read_text(self, content: bytes) -> None:
        from polar_billing.metering.spool import Spool
        from polar_billing.metering.spool_file import Unfinished
        from polar_billing.prices.book import PriceBook

        folder = self.folder / "spool"
        folder.mkdir(exist_ok=True)
        path = folder / "1-abc-1.jsonl"
        path.write_bytes(content)
        book = PriceBook.example()
        Unfinished(path).entries(lambda hashes: {book.content_hash: book} if book.content_hash in hashes else {})
        Spool(folder).status()


class Artifacts(Reader):
    """A folder of JSON and tensors."""

    source: Path

    def prepare(self) -> None:
        self._files = {path.name: path.read_bytes() for path in self.source.iterdir() if path.is_file()}

    def read(self, draw: Random) -> None:
        for name, content in self._files.items():
            changed = content
            if name.endswith(".json") and draw.random() < 0.7:
                changed = exchange(draw, changed)
            if draw.random() < 0.4:
                changed = mutate(draw, changed)
            (self.folder / name).write_bytes(changed)
        self.load()

    def load(self) -> None:
        """Read the folder."""
        raise NotImplementedError


class Routers(Artifacts):
    """A router."""

    name, share = "router", 2
    source = Path(str(files("polar_sdk") / "shipped" / "routers" / "smollm2-135m-instruct"))

    def load(self) -> None:
        from polar_sdk.router.artifact import load_router

        load_router(self.folder)


class MapSets(Artifacts):
    """The bridges of a router."""

    name, share = "maps", 2
    source = Routers.source / "bridges"

    def load(self) -> None:
        from polar_sdk.router.map_set import MapSet

        MapSet.load(self.folder)


class Ledgers(Reader):
    """A ledger file with damaged bytes: everything that reads ledgers."""

    name, share = "ledger file", 2

    def prepare(self) -> None:
        from polar_billing.budgets.budget import Budget
        from polar_billing.budgets.enforcement import Budgets
        from polar_billing.ledger.ledger import Ledger
        from polar_billing.metering.meter import Meter
        from polar_billing.proof.receipts import make_receipt
        from polar_billing.testing import usage_record
        from polar_sdk.usage import Offer, UsageBound

        path = self.folder / "made.sqlite3"
        for file in self.folder.glob("made*"):
            file.unlink()
        with Meter(Ledger(str(path))) as meter:
            budgets = Budgets(meter.ledger)
            budgets.set(Budget("acme", 1))  # type: ignore[arg-type]
            for n in range(4):
                record = usage_record(f"r{n}", tenant=("acme", "globex")[n % 2])
                offer = Offer(tier="standard", program="0-5", flops_bound=10**10)
                bound = UsageBound(
                    request_id=record.request_id,
                    tenant=record.tenant,
                    tokens_input=10,
                    tokens_output_max=10,
                    offers=(offer,),
                    at=record.started_at,
                )
                meter.reserve(bound)
                meter.emit(record)
            with meter.ledger.snapshot() as connection:
                self.receipt = make_receipt(connection, "acme", "r0")
        with closing(sqlite3.connect(path)) as connection:
            connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
            connection.execute("PRAGMA journal_mode = DELETE")
        self.content = path.read_bytes()

    def read(self, draw: Random) -> None:
        content = bytearray(self.content)
        for _ in range(draw.choice([1, 3, 20, 200])):
            at = draw.randrange(len(content)) if draw.random() < 0.8 else draw.randrange(4_096)
            content[at] = draw.randrange(256)
        if draw.random() < 0.1:
            del content[draw.randrange(len(content)) :]
        for left in self.folder.glob("damaged*"):
            shutil.rmtree(left) if left.is_dir() else left.unlink()
        path = self.folder / "damaged.sqlite3"
        if draw.random() < 0.5:
            path.write_bytes(self.content)
            self._change_cells(draw, path)
        else:
            path.write_bytes(content)
        for line in draw.sample(READING, 2):
            run_command(path, line)

    def _change_cells(self, draw: Random, path: Path) -> None:
        """Set cells to interesting values of any type, past the triggers."""
        with closing(sqlite3.connect(path, isolation_level=None)) as connection:
            objects = connection.execute("SELECT type, name FROM sqlite_master WHERE name LIKE 'polar%'").fetchall()
            for name in [name for kind, name in objects if kind == "trigger"]:
                connection.execute(f"DROP TRIGGER {name}")
            tables = sorted(name for kind, name in objects if kind == "table")
            for _ in range(draw.choice([1, 1, 3])):
                table = draw.choice(tables)
                columns = [row[1] for row in connection.execute(f"PRAGMA table_info({table})")]
                value = draw.choice([value for value in VALUES if not isinstance(value, list | dict)])
                if isinstance(value, int) and abs(value) >= 2**63:
                    value = str(value)
                elif isinstance(value, str) and draw.random() < 0.5:
                    value = value.encode("utf-8", "surrogatepass")[:100]
                with suppress(sqlite3.Error, UnicodeEncodeError):
                    connection.execute(f"UPDATE {table} SET {draw.choice(columns)} = ?", (value,))


READING: Final[Sequence[Sequence[str]]] = (
    ("verify",),
    ("usage",),
    ("usage", "--requests"),
    ("report",),
    ("budget", "show"),
    ("budget", "recheck"),
    ("statement", "acme"),
    ("price", "show"),
    ("receipt", "r0", "--tenant", "acme"),
    ("explain", "r0", "--tenant", "acme"),
)
"""Every way that a person reads a ledger."""


def run_command(ledger: Path, line: Sequence[str]) -> None:
    """Run `polar` on a ledger.

    Raises:
        Exception: What would have been a traceback.
    """
    from typer.testing import CliRunner

    from polar_sdk.cli.main import app

    with patch.dict(os.environ, {"POLAR_LEDGER": str(ledger), "POLAR_MODEL": "/nowhere", "COLUMNS": "100"}):
        result = CliRunner().invoke(app, list(line))
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception


class Receipts(Ledgers):
    """A receipt, checked against a ledger."""

    name, share = "receipt", 4

    def read(self, draw: Random) -> None:
        from polar_billing.ledger.ledger import Ledger
        from polar_billing.proof.receipts import check_receipt
        from polar_sdk.reading import Unreadable, parse_object

        content = exchange(draw, json.dumps(self.receipt).encode())
        if draw.random() < 0.3:
            content = mutate(draw, content)
        try:
            receipt = parse_object(content)
        except Unreadable:  # the command's own error follows
            return
        with Ledger(str(self.folder / "made.sqlite3")) as ledger, ledger.snapshot() as connection:
            check_receipt(connection, receipt)


class Commands(Ledgers):
    """The arguments of commands."""

    name, share = "arguments", 3
    lines: ClassVar[Sequence[Sequence[str]]] = (
        ("usage", "--since", "2026-11-01", "--until", "2026-12-01", "--zone", "UTC", "--by", "tenant,tier"),
        ("usage", "--tenant", "acme", "--tag", "team=a", "--requests", "--last", "3", "--json"),
        ("report", "--month", "2026-11", "--currency", "USD"),
        ("verify", "--tenant", "acme"),
        ("receipt", "r0", "--tenant", "acme"),
        ("explain", "r0", "--tenant", "acme", "--source", "polar", "--records", "3"),
        ("budget", "set", "acme", "12.50", "USD", "--window", "day", "--zone", "Europe/Berlin"),
        ("budget", "show", "--tenant", "acme"),
        ("statement", "acme", "2026-11", "--draft"),
        ("credit-note", "acme", "1.00", "--reference", "x"),
        ("price", "show", "--at", "2026-11-01"),
        ("prune", "--before", "2020-01-01", "--yes"),
        ("models", "list"),
        ("run", "Hi", "--model", "/nowhere", "--program", "0-5", "--compute", "0.05", "--tag", "a=b"),
    )

    def read(self, draw: Random) -> None:
        first, *rest = draw.choice(self.lines)
        for _ in range(draw.choice([1, 1, 2, 3])):
            at = draw.randrange(len(rest) + 1)
            word = str(draw.choice(VALUES))[:2_000]
            if draw.random() < 0.5 and at < len(rest):
                word = mutate(draw, rest[at].encode("utf-8", "surrogatepass")).decode("utf-8", "surrogateescape")[
                    :5_000
                ]
            rest[at : at + draw.choice([0, 1, 1])] = [word.replace("\x00", "")]
        path = self.folder / "commands.sqlite3"
        path.write_bytes(self.content)
        if "--html" in rest or "--csv" in rest or "--save" in rest or "--out" in rest:
            return  # it would write where the argument says
        run_command(path, [first, *rest])


class Settings(Reader):
    """Environment variables."""

    name, share = "settings", 4
    names: ClassVar[Sequence[str]] = ("POLAR_LEDGER", "POLAR_SPOOL", "POLAR_PRICE_BOOK", "POLAR_CACHE", "POLAR_MODEL")

    def read(self, draw: Random) -> None:
        from polar_billing.ledger.ledger import Ledger
        from polar_billing.ledger.location import sqlite_file
        from polar_billing.metering.meter import Meter
        from polar_billing.metering.spool import spool_folder
        from polar_sdk.models.paths import cache_folder

        with patch.dict(os.environ, {name: self._value(draw) for name in self.names}):
            cache_folder()
            ledger = Ledger()
            spool_folder(ledger.url)
            file = sqlite_file(ledger.url)
            if file is not None and str(file).startswith(str(self.folder)) and ".." not in file.parts:
                with suppress(PolarError):
                    _ = Meter(ledger).price_book
                ledger.check()
                ledger.close()

    def _value(self, draw: Random) -> str:
        tail = str(draw.choice(VALUES))[:300] if draw.random() < 0.5 else "x"
        scheme = draw.choice(["", "", "sqlite:///", "sqlite+x:///", "postgresql://", "mysql://", "sqlite://?", "://"])
        text = f"{scheme}{self.folder}/{tail}".encode("utf-8", "surrogatepass")
        if draw.random() < 0.3:
            text = text[: len(scheme) + len(str(self.folder)) + 1] + mutate(draw, tail.encode("utf-8", "surrogatepass"))
        return text.replace(b"\x00", b"").decode("utf-8", "surrogateescape")


class ModelFolders(Reader):
    """The texts of a model folder: configuration, tokenizer, chat template."""

    name, share = "model folder", 1
    texts: ClassVar[Sequence[str]] = (
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
    )

    def prepare(self) -> None:
        from polar_sdk.testing import tiny_llama, tiny_tokenizer

        self.made = self.folder / "made"
        tiny_llama(layers=2).save_pretrained(self.made)
        tiny_tokenizer().save_pretrained(self.made)
        self.valid = {path.name: path.read_bytes() for path in self.made.iterdir() if path.name in self.texts}

    def read(self, draw: Random) -> None:
        from polar_sdk import PolarModel
        from polar_sdk.models.load import clear_cache

        name = draw.choice(list(self.valid))
        content = self.valid[name]
        if name.endswith(".json") and draw.random() < 0.7:
            content = exchange(draw, content)
        else:
            content = mutate(
                draw, content, [b"{{1/0}}", b"{{'x'*30000000}}", b"{% for a in range(10**9) %}{% endfor %}"]
            )
        try:
            (self.made / name).write_bytes(content)
            model = PolarModel.from_pretrained(self.made, ledger=None, device="cpu", precision="float32")
            model.generate([{"role": "user", "content": "Hi"}], max_tokens=2)
        finally:
            (self.made / name).write_bytes(self.valid[name])
            clear_cache()


READERS: Final[Sequence[type[Reader]]] = (
    Programs,
    PriceBooks,
    PriceDocuments,
    StripeCustomers,
    EnergyLogs,
    Policies,
    DataSets,
    Menus,
    Evaluations,
    Spools,
    Routers,
    MapSets,
    Ledgers,
    Receipts,
    Commands,
    Settings,
    ModelFolders,
)
