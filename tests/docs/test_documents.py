"""The documents cannot lie: their code runs and prints what they say, their commands, files and links exist.

Python blocks that make the default model have the marker `model`; all else here needs neither model nor network.
"""

from __future__ import annotations

import ast
import fnmatch
import importlib.util
import io
import json
import re
import shlex
import tomllib
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest
import typer.main

from polar_sdk.cli.main import app

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
README = ROOT / "README.md"
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
        pytest.param(block, marks=() if "tiny_model" in block.text else pytest.mark.model, id=str(block))
        for block in found
    ]


def said_to_print(code: str) -> str:
    return "".join(f"{line.removeprefix('#> ')}\n" for line in code.splitlines() if line.startswith("#> "))


class TestPython:
    def test_the_readme_has_code_and_output_early(self) -> None:
        first = next(blocks(README, "python"))
        assert first.line + first.text.count("\n") < 30
        assert said_to_print(first.text)
        assert len([line for line in first.text.splitlines() if line and not line.startswith("#>")]) <= 5

    @pytest.mark.parametrize("block", [block for page in PAGES for block in blocks(page, "python")], ids=str)
    def test_names_exist(self, block: Block) -> None:
        """Without running it: the block parses, and every import of it succeeds."""
        tree = ast.parse(block.text)
        imports: list[ast.stmt] = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
        exec(compile(ast.Module(imports, type_ignores=[]), str(block), "exec"), {})

    @pytest.mark.parametrize("block", python_blocks())
    def test_output_is_as_printed(self, block: Block) -> None:
        printed = io.StringIO()
        with redirect_stdout(printed):
            exec(compile(block.text, str(block), "exec"), {"__name__": "__main__"})
        assert printed.getvalue() == said_to_print(block.text)


def commands() -> Iterator[Any]:
    for page in PAGES:
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


class TestFileTree:
    @staticmethod
    def listed() -> list[str]:
        """Paths of the README's tree, folders with a slash at the end; indentation is nesting."""
        text = README.read_text(encoding="utf-8").partition("## Files\n")[2]
        tree = re.search(r"```\n(.*?)```", text, re.DOTALL)
        assert tree is not None
        paths: list[str] = []
        parent = ""
        for line in tree[1].splitlines():
            name = line.split()[0]
            parent = parent if line.startswith(" ") else name
            paths.append(parent + name if line.startswith(" ") else name)
        return paths

    def test_every_path_exists(self) -> None:
        for path in self.listed():
            assert (ROOT / path).exists(), path
            assert (ROOT / path).is_dir() == path.endswith("/"), path

    def test_top_level_is_complete(self) -> None:
        patterns = (ROOT / ".gitignore").read_text(encoding="utf-8").split()
        real = {
            path.name + "/" * path.is_dir()
            for path in ROOT.iterdir()
            if not (path.name.startswith(".") and path.name != ".ci")
            and not any(fnmatch.fnmatch(path.name, pattern.rstrip("/")) for pattern in patterns)
        }
        assert {path for path in self.listed() if path.count("/") <= path.endswith("/")} == real

    def test_packages_are_complete(self) -> None:
        project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
        packages = project["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]
        assert {f"{package}/" for package in packages} <= set(self.listed())

    def test_every_part_of_the_engine_is_listed(self) -> None:
        listed = set(self.listed())
        for path in (ROOT / "polar_sdk").iterdir():
            if path.is_dir() and (path / "__init__.py").exists():
                assert f"polar_sdk/{path.name}/" in listed


class TestPages:
    @pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
    def test_links_lead_to_files(self, page: Path) -> None:
        for target in re.findall(r"\]\(([^)]+)\)", page.read_text(encoding="utf-8")):
            if not re.match(r"https?://", target):
                assert (page.parent / target.partition("#")[0]).exists(), target

    @pytest.mark.parametrize("page", ["ARCHITECTURE.md", "CONTRIBUTING.md", "README.md"])
    def test_paths_in_the_text_exist(self, page: str) -> None:
        """Names in backticks that look like a file of the project are one, from the root or inside a package."""
        roots = [ROOT, ROOT / "polar_sdk", ROOT / "billing"]
        text = re.sub(r"^```.*?^```$", "", (ROOT / page).read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
        for name in re.findall(r"`([\w./]+(?:\.py|\.toml|\.md|/))`", text):
            if name == "__init__.py":
                continue
            assert any((root / name).exists() for root in roots), name

    def test_the_changelog_knows_this_version(self) -> None:
        project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
        text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
        sections = re.findall(r"^## \[([^\]]+)\](?: - (\d{4}-\d{2}-\d{2}))?$", text, re.MULTILINE)
        assert sections[0] == ("Unreleased", "")
        assert project["version"] in dict(sections)
        assert all(date for name, date in sections[1:])

    def test_the_promises_are_those_of_the_shipped_router(self) -> None:
        file = ROOT / "polar_sdk/routers/smollm2-135m-instruct/router.json"
        tiers = json.loads(file.read_text(encoding="utf-8"))["certificate"]["tiers"]
        rows = README.read_text(encoding="utf-8").splitlines()
        for name, promise in tiers.items():
            assert any(row.startswith(f"| {name}") and f"| {100 * promise['alpha']:g}% |" in row for row in rows), name

    def test_the_licence_is_the_one_that_is_named(self) -> None:
        project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
        assert project["license"] == "Apache-2.0"
        text = (ROOT / "LICENSE").read_text(encoding="utf-8")
        assert "Apache License" in text
        assert "Version 2.0, January 2004" in text
        assert "END OF TERMS AND CONDITIONS" in text

    def test_the_commands_page_is_what_the_command_says(self) -> None:
        spec = importlib.util.spec_from_file_location("generate_cli", ROOT / "docs" / "generate_cli.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        assert module.PAGE.read_text(encoding="utf-8") == module.page(), "run: python docs/generate_cli.py"
