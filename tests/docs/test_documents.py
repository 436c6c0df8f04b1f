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
OF_THE_MODEL = ("from_pretrained", "from langchain_polar", "from llama_index_polar")
"""Texts in a Python block that loads the default model, unless it says `tiny_model`."""
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
    @pytest.mark.parametrize(
        "block", [block for page in PAGES for block in blocks(page, "python") if needs_model(block)], ids=str
    )
    def test_names_exist(self, block: Block) -> None:
        """Blocks that need the model do not run in the quick tests: they parse, and their imports succeed."""
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
            "COLUMNS": "100",
        }
        for attempt in range(3):  # one request in 200 is audited, which is a row more
            printed = []
            for line in block.text.splitlines():
                if line.startswith("$ "):
                    done = subprocess.run(
                        ["bash", "-c", line.removeprefix("$ ")],
                        cwd=ROOT,
                        env=environment | {"POLAR_LEDGER": str(tmp_path / f"{attempt}.sqlite3")},
                        stdout=subprocess.PIPE,
                        stderr=subprocess.STDOUT,
                        text=True,
                        check=True,
                    )
                    printed += [line, *(one.rstrip() for one in done.stdout.rstrip().splitlines())]
            if not any("polar.audit" in line for line in printed):
                break
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

    def test_messages_and_pages_name_commands_that_exist(self) -> None:
        sources = (
            path for folder in ("polar_sdk", "billing", "integrations", "deploy") for path in (ROOT / folder).rglob("*")
        )
        texts = (
            path.read_text(encoding="utf-8") for path in sources if path.suffix in {".py", ".jinja", ".js", ".yaml"}
        )
        for named in {
            words for text in texts for words in re.findall(r"(?:`|<code>)polar ([a-z][a-z-]*(?: [a-z][a-z-]*)?)", text)
        }:
            command = COMMANDS
            for word in named.split():
                if hasattr(command, "commands"):
                    assert word in command.commands, f"there is no command polar {named}"
                    command = command.commands[word]

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


def exists(name: str) -> bool:
    """Whether a path of the project leads somewhere, from the root or from inside a package."""
    packages = [ROOT / "polar_sdk", ROOT / "polar_sdk" / "lab", ROOT / "billing" / "polar_billing"]
    roots = [ROOT, ROOT / "billing", ROOT / "integrations" / "polar_server", *packages]
    return any((root / name).exists() for root in roots)


class TestPriceBook:
    PAGE = ROOT / "docs" / "billing.md"

    def test_the_fields_of_the_page_are_those_of_a_book(self) -> None:
        schema = PriceBook.model_json_schema()
        fields = {name for model in [schema, *schema["$defs"].values()] for name in model.get("properties", {})}
        text = without_blocks(self.PAGE)
        rows = re.findall(r"^\| (`\w+`(?:, `\w+`)*) \|", text, re.MULTILINE)
        assert set(re.findall(r"\w+", " ".join(rows))) <= fields <= set(re.findall(r"`(\w+)`", text))

    def test_the_example_is_a_book(self) -> None:
        [example] = blocks(self.PAGE, "toml")
        assert PriceBook.from_toml(example.text).currency == "EUR"


def test_every_environment_variable_is_listed() -> None:
    """`docs/configuration.md` has all that the source reads, and no other of PoLar's."""
    folders = ("polar_sdk", "billing", "integrations", "benchmarks", "examples", "tests")
    paths = [ROOT / "Makefile", *(path for folder in folders for path in (ROOT / folder).rglob("*.py"))]
    source = "\n".join(path.read_text(encoding="utf-8") for path in paths)
    page = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    listed = set(re.findall(r"^\| `([A-Z_]+)` \|", page, re.MULTILINE))
    ours = set(re.findall(r"\bPOLAR_[A-Z]+(?:_[A-Z]+)*\b", source))
    assert {name for name in listed if name.startswith("POLAR_")} == ours
    read = r"""environ(?:\.\w+)?[\[(]["']([A-Z][A-Z_]+)["']|["']([A-Z][A-Z_]+)["'] (?:not )?in os\.environ"""
    assert {name for names in re.findall(read, source) for name in names if name} <= listed


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

    def test_paths_in_the_diagrams_of_the_architecture_exist(self) -> None:
        """Files and folders; a module may stand without its `.py`."""
        diagrams = "".join(block.text for block in blocks(ROOT / "ARCHITECTURE.md", ""))
        named = set(re.findall(r"(?<![\w./])(?:[a-z_]+/)+|(?<![\w./])[a-z_]+(?:/[a-z_]+)+|[\w./]+\.py", diagrams))
        assert len(named) > 10
        assert [name for name in named if not exists(name) and not exists(f"{name}.py")] == []

    def test_every_page_is_on_the_site(self) -> None:
        listed = re.findall(r"^  - .+: ([\w/]+\.md)$", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), re.MULTILINE)
        assert sorted(listed) == sorted(path.name for path in (ROOT / "docs").glob("*.md"))

    def test_the_promises_are_those_of_the_shipped_router(self) -> None:
        [file] = (ROOT / "polar_sdk").glob("**/smollm2-135m-instruct/router.json")
        certificate = json.loads(file.read_text(encoding="utf-8"))["certificate"]
        page = (ROOT / "docs" / "router.md").read_text(encoding="utf-8")
        promised = dict(re.findall(r"^\| (\w+) \| .* drops by at most ([\d.]+)% \|$", page, re.MULTILINE))
        assert promised == {name: f"{100 * promise['alpha']:g}" for name, promise in certificate["tiers"].items()}
        assert f"at δ = {certificate['delta']:g}" in page

    def test_the_classes_of_peer_suites_exist(self) -> None:
        page = (ROOT / "docs" / "compatibility.md").read_text(encoding="utf-8")
        suites = (ROOT / "tests/integrations/server" / f"test_{name}_suite.py" for name in ("vllm", "llama_cpp"))
        for part, suite in zip(page.split("\n## ")[1:], suites, strict=True):
            classes = set(re.findall(r"^class (Test\w+)", suite.read_text(encoding="utf-8"), re.MULTILINE))
            assert set(re.findall(r"`(Test\w+)`", part)) == classes

    @pytest.mark.parametrize("name", ["generate_cli", "generate_options", "generate_proof"])
    def test_generated_pages_are_as_generated(self, name: str) -> None:
        module = generator(name)
        assert module.PAGE.read_text(encoding="utf-8") == module.page(), f"run: python docs/{name}.py"

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
