"""The documents cannot lie: their code runs and prints what they say, their commands, files and links exist.

Python blocks that make the default model have the marker `model`; all else here needs neither model nor network.
"""

from __future__ import annotations

import ast
import importlib.util
import io
import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest
import typer.main

from polar_billing import PriceBook
from polar_sdk.cli.main import app
from polar_sdk.models.paths import cache_folder
from polar_sdk.serving.scheduler import _LIVING

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), ROOT / "examples" / "README.md"])
README = ROOT / "README.md"
ARCHITECTURE = ROOT / "ARCHITECTURE.md"
OF_THE_MODEL = ("from_pretrained", "from langchain_polar", "from llama_index_polar")
"""What a Python block says that loads the default model, unless it says `tiny_model`."""
COMMANDS: Any = typer.main.get_command(app)


class Block(NamedTuple):
    """A fenced block of a page."""

    page: str
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def blocks(page: Path, *languages: str) -> Iterator[Block]:
    text = page.read_text(encoding="utf-8")
    for match in re.finditer(r"^```(\w*)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE):
        if match[1] in languages:
            yield Block(page.name, text.count("\n", 0, match.start()) + 1, match[1], match[2])


def python_blocks() -> list[Any]:
    """Every Python block; one that makes a model other than the tiny one needs the default model."""
    found = [block for page in PAGES for block in blocks(page, "python")]
    return [
        pytest.param(block, marks=pytest.mark.model if needs_model(block) else (), id=str(block)) for block in found
    ]


def needs_model(block: Block) -> bool:
    return "tiny_model" not in block.text and any(said in block.text for said in OF_THE_MODEL)


def forget_prompts() -> None:
    """As in a process of its own: models that are shared in this one keep no starts of other blocks' prompts."""
    for scheduler in list(_LIVING):
        scheduler.prefixes.make_room(scheduler.decoder.pool.sizes)


def said_to_print(code: str) -> str:
    return "".join(f"{line.removeprefix('#> ')}\n" for line in code.splitlines() if line.startswith("#> "))


class TestPython:
    @pytest.mark.parametrize("block", [block for page in PAGES for block in blocks(page, "python")], ids=str)
    def test_names_exist(self, block: Block) -> None:
        """Without running it: the block parses, and every import of it succeeds."""
        tree = ast.parse(block.text)
        imports: list[ast.stmt] = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
        exec(compile(ast.Module(imports, type_ignores=[]), str(block), "exec"), {})

    @pytest.mark.parametrize("block", python_blocks())
    def test_output_is_as_printed(self, block: Block) -> None:
        forget_prompts()
        printed = io.StringIO()
        with redirect_stdout(printed):
            exec(compile(block.text, str(block), "exec"), {"__name__": "__main__"})
        assert printed.getvalue() == said_to_print(block.text)


class TestReadme:
    @pytest.mark.model
    def test_the_metered_run_prints_what_it_says(self, tmp_path: Path) -> None:
        """The commands of the console block, one after another on one ledger, and their whole output."""
        [block] = blocks(README, "console")
        (tmp_path / "models").symlink_to(cache_folder() / "models")
        environment = {
            **os.environ,
            "PATH": os.pathsep.join([str(Path(sys.executable).parent), *os.get_exec_path()]),
            "POLAR_CACHE": str(tmp_path),
            "POLAR_LEDGER": str(tmp_path / "ledger.sqlite3"),
            "COLUMNS": "100",
        }
        printed = []
        for line in block.text.splitlines():
            if line.startswith("$ "):
                done = subprocess.run(
                    ["bash", "-c", line.removeprefix("$ ")],
                    cwd=ROOT,
                    env=environment,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    text=True,
                    check=True,
                )
                printed += [line, *(one.rstrip() for one in done.stdout.rstrip().splitlines())]
        assert [*map(without_drafts, printed)] == [*map(without_drafts, block.text.splitlines())]


def without_drafts(line: str) -> str:
    """A printed line without what depends on drafts, which pay or not by what passes were measured to take here."""
    line = re.sub(r" · \d+ of \d+ drafts kept \([^)]*\)", "", line)
    return re.sub(r"^(acme +standard +\d+ +\d+ +\d+) +\d+", r"\1", line)  # visits


def commands() -> Iterator[Any]:
    """Commands of all pages but the changelog, which names those of the past."""
    for page in sorted({*PAGES} - {ROOT / "CHANGELOG.md"}):
        for block in blocks(page, "sh", "console"):
            for line in block.text.splitlines():
                words = line.removeprefix("$ ") if block.language == "console" and line.startswith("$ ") else line
                if words.startswith("polar ") and (block.language == "sh" or line.startswith("$ ")):
                    yield pytest.param(words, id=f"{page.name} {words}")
        for words in re.findall(r"`(polar [a-z][^`]*)`", page.read_text(encoding="utf-8")):
            yield pytest.param(words, id=f"{page.name} {words}")


class TestShell:
    @pytest.mark.parametrize("line", list(commands()))
    def test_commands_and_options_exist(self, line: str) -> None:
        words = shlex.split(line, comments=True)[1:]
        command, path = COMMANDS, ["polar"]
        while words and hasattr(command, "commands") and not words[0].startswith("-"):
            assert words[0] in command.commands, f"{' '.join(path)} has no command {words[0]!r}"
            command = command.commands[words[0]]
            path.append(words.pop(0))
        if words:  # raises where an option does not exist or an argument is missing; runs nothing
            command.make_context(" ".join(path), words)

    def test_make_targets_exist(self) -> None:
        targets = set(re.findall(r"^([a-z-]+):.*## ", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
        for page in PAGES:
            text = page.read_text(encoding="utf-8")
            named = set(re.findall(r"`make (?:\w+=\S+ )?([a-z-]+)`", text))
            assert named <= targets, page.name
        table = set(re.findall(r"^\| `make ([a-z-]+)` \|", (ROOT / "CONTRIBUTING.md").read_text("utf-8"), re.MULTILINE))
        assert table == targets - {"help", "install"}

    def test_nobody_is_sent_to_another_companys_package(self) -> None:
        for page in PAGES:
            assert not re.search(r"pip install [^\n]*polar-sdk", page.read_text(encoding="utf-8")), page.name


class TestArchitecture:
    def test_every_path_exists(self) -> None:
        """Files and folders, in the text and in the diagrams; there a module may stand without its `.py`."""
        text = ARCHITECTURE.read_text(encoding="utf-8")
        diagrams = "".join(block.text for block in blocks(ARCHITECTURE, ""))
        named = set(re.findall(r"[\w./]+\.(?:py|toml|md)\b", text)) - {"__init__.py"}
        named |= set(re.findall(r"(?<![\w./])[a-z_]+(?:/[a-z_]+)*/(?![\w/])", text))
        named |= set(re.findall(r"(?<![\w./])[a-z_]+(?:/[a-z_]+)+(?![\w./])", diagrams))
        assert named
        for name in sorted(named):
            assert exists(name) or exists(f"{name}.py"), name

    def test_every_part_is_named(self) -> None:
        text = ARCHITECTURE.read_text(encoding="utf-8")
        project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
        packages = project["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]
        parts = [path.name for path in (ROOT / "polar_sdk").iterdir() if (path / "__init__.py").exists()]
        for name in [*packages, *parts]:
            assert f"{name}/" in text or f"`{name}`" in text or Path(name).name == "polar_sdk", name


def exists(name: str) -> bool:
    """Whether a path of the project leads somewhere, from the root or from inside a package."""
    packages = [ROOT / "polar_sdk", ROOT / "polar_sdk" / "lab", ROOT / "billing" / "polar_billing"]
    roots = [ROOT, ROOT / "billing", ROOT / "integrations" / "polar_server", *packages]
    return any((root / name).exists() for root in roots)


class TestPriceBook:
    PAGE = ROOT / "docs" / "billing.md"

    @staticmethod
    def fields() -> set[str]:
        schema = PriceBook.model_json_schema()
        return {name for model in [schema, *schema["$defs"].values()] for name in model.get("properties", {})}

    def test_every_field_is_on_the_page(self) -> None:
        named = set(re.findall(r"`(\w+)`", without_blocks(self.PAGE)))
        assert self.fields() - named == set()

    def test_every_field_of_the_page_exists(self) -> None:
        rows = re.findall(r"^\| (`\w+`(?:, `\w+`)*) \|", without_blocks(self.PAGE), re.MULTILINE)
        assert {name for row in rows for name in re.findall(r"\w+", row)} <= self.fields()

    def test_the_example_is_a_book(self) -> None:
        [example] = blocks(self.PAGE, "toml")
        assert PriceBook.from_toml(example.text).currency == "EUR"


class TestConfiguration:
    """`docs/configuration.md` lists every environment variable that the source reads, and no other of PoLar's."""

    @staticmethod
    def sources() -> Iterator[str]:
        for folder in ("polar_sdk", "billing", "integrations", "benchmarks", "examples", "tests"):
            for path in (ROOT / folder).rglob("*.py"):
                yield path.read_text(encoding="utf-8")
        yield (ROOT / "Makefile").read_text(encoding="utf-8")

    @staticmethod
    def listed() -> set[str]:
        text = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
        return set(re.findall(r"^\| `([A-Z_]+)` \|", text, re.MULTILINE))

    def test_variables_of_ours(self) -> None:
        used = {name for text in self.sources() for name in re.findall(r"\bPOLAR_[A-Z]+(?:_[A-Z]+)*\b", text)}
        assert {name for name in self.listed() if name.startswith("POLAR_")} == used

    def test_variables_that_are_read_by_their_name(self) -> None:
        read = r"""environ(?:\.\w+)?[\[(]["']([A-Z][A-Z_]+)["']|["']([A-Z][A-Z_]+)["'] (?:not )?in os\.environ"""
        used = {name for text in self.sources() for names in re.findall(read, text) for name in names if name}
        assert used <= self.listed()


class TestPages:
    @pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
    def test_links_lead_to_files(self, page: Path) -> None:
        text = without_blocks(page)
        targets = re.findall(r"\]\(([^)]+)\)", text) + re.findall(r'(?:src|srcset|href)="([^"]+)"', text)
        for target in targets:
            if not re.match(r"https?://", target):
                path, _, anchor = target.partition("#")
                file = page.parent / path if path else page
                assert file.exists(), target
                assert not anchor or anchor in anchors(file), target

    @pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
    def test_paths_in_the_text_exist(self, page: Path) -> None:
        """Names in backticks that look like a file of the project, with a folder or in capitals, are one."""
        for name in re.findall(r"`([\w.]+/[\w./]+(?:\.py|\.toml|\.md|/)|[A-Z]+\.md)`", without_blocks(page)):
            assert exists(name), name

    @pytest.mark.parametrize("page", sorted((ROOT / "docs").glob("*.md")), ids=lambda page: page.name)
    def test_pages_of_the_site_link_to_nothing_outside_it(self, page: Path) -> None:
        """What the site does not have, `make docs` cannot link to; name such a file in backticks."""
        assert "](../" not in without_blocks(page)

    def test_every_page_is_on_the_site(self) -> None:
        listed = re.findall(r"^  - .+: ([\w/]+\.md)$", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), re.MULTILINE)
        assert sorted(listed) == sorted(path.name for path in (ROOT / "docs").glob("*.md"))

    def test_the_changelog_knows_this_version(self) -> None:
        project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
        text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
        sections = re.findall(r"^## \[([^\]]+)\](?: - (\d{4}-\d{2}-\d{2}))?$", text, re.MULTILINE)
        assert sections[0] == ("Unreleased", "")
        assert project["version"] in dict(sections)
        assert all(date for name, date in sections[1:])

    def test_the_promises_are_those_of_the_shipped_router(self) -> None:
        [file] = (ROOT / "polar_sdk").glob("**/smollm2-135m-instruct/router.json")
        certificate = json.loads(file.read_text(encoding="utf-8"))["certificate"]
        page = (ROOT / "docs" / "router.md").read_text(encoding="utf-8")
        promised = dict(re.findall(r"^\| (\w+) \| .* drops by at most ([\d.]+)% \|$", page, re.MULTILINE))
        assert promised == {name: f"{100 * promise['alpha']:g}" for name, promise in certificate["tiers"].items()}
        assert f"at δ = {certificate['delta']:g}" in page

    def test_the_licence_is_the_one_that_is_named(self) -> None:
        project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
        assert project["license"] == "Apache-2.0"
        text = (ROOT / "LICENSE").read_text(encoding="utf-8")
        assert "Apache License" in text
        assert "Version 2.0, January 2004" in text
        assert "END OF TERMS AND CONDITIONS" in text

    def test_the_commands_page_is_what_the_command_says(self) -> None:
        module = generator("generate_cli")
        assert module.PAGE.read_text(encoding="utf-8") == module.page(), "run: python docs/generate_cli.py"

    def test_the_page_on_the_proof_is_what_the_schema_declares(self) -> None:
        module = generator("generate_proof")
        assert module.PAGE.read_text(encoding="utf-8") == module.page(), "run: python docs/generate_proof.py"

    def test_the_pictures_are_what_is_drawn(self) -> None:
        pictures = generator("generate_images").pictures()
        assert set(pictures) <= set((ROOT / "docs" / "images").glob("*.svg"))
        for file, content in pictures.items():
            assert file.read_text(encoding="utf-8") == content, "run: python docs/generate_images.py"


def generator(name: str) -> Any:
    """A script of `docs/`, as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "docs" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def without_blocks(page: Path) -> str:
    return re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub and the site make them."""
    headings = re.findall(r"^#+ (.+)$", without_blocks(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}
