"""The command `polar`: what it prints where, the exit codes that scripts rely on, and never a traceback.

Most tests run over a tiny model saved to a folder; those with the marker `model` over the default one. Where the
process itself matters (signals, pipes, exit codes), a real one is started.
"""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
from io import BytesIO, TextIOWrapper
from typing import TYPE_CHECKING, Any

import pytest
import typer.main

from polar_sdk.cli.main import app, main
from polar_sdk.cli.options import items_of
from polar_sdk.lab import builtin_items
from polar_sdk.testing import tiny_llama, tiny_policy, tiny_tokenizer
from tests.sdk.command import polar

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from typer.testing import Result

POLAR = [sys.executable, "-c", "from polar_sdk.cli.main import main; main()"]
TIMEOUT_S = 120


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model as a folder; its greedy answers run on for thousands of tokens."""
    path = tmp_path_factory.mktemp("tiny")
    tiny_llama(max_position_embeddings=16_384).save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    tiny_policy(6).save(path / "policy.json")
    return path


@pytest.fixture
def on_tiny(folder: Path) -> list[str]:
    return ["--model", str(folder), "--policy", str(folder / "policy.json"), "--precision", "fp32"]


def refused(result: Result, code: int, *words: str) -> None:
    """One line on standard error, nothing on standard output."""
    assert result.exit_code == code
    assert result.stdout == ""
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    for word in words:
        assert word in result.stderr


def requests_in_ledger(*filters: str) -> list[dict[str, Any]]:
    result = polar("usage", "--requests", "--json", *filters)
    found: list[dict[str, Any]] = json.loads(result.stdout) if result.stdout.startswith("[") else []
    return found


class TestRun:
    def test_answer_and_cost_go_two_ways(self, on_tiny: list[str]) -> None:
        result = polar("run", "hello", "--max-tokens", "5", *on_tiny)
        assert result.exit_code == 0
        assert result.stdout.strip()
        assert result.stderr.startswith("[standard · program 0 2-5 · 7+5 tokens · ")
        assert result.stderr.rstrip().endswith("USD]")

    def test_json_is_all_of_standard_output(self, on_tiny: list[str]) -> None:
        result = polar("run", "hello", "--json", "--max-tokens", "5", "--request-id", "mine", *on_tiny)
        facts = json.loads(result.stdout)
        assert set(facts) == {"text", "finish_reason", "usage", "receipt"}
        assert facts["usage"]["request_id"] == "mine"
        assert facts["usage"]["tokens"] == {"input": 7, "cached": 0, "output": 5, "drafted": 0, "accepted": 0}
        assert facts["receipt"]["currency"] == "USD"
        assert result.stderr == ""

    def test_stream_is_the_same_text(self, on_tiny: list[str]) -> None:
        whole = polar("run", "hello", "--max-tokens", "30", *on_tiny)
        streamed = polar("run", "hello", "--max-tokens", "30", "--stream", *on_tiny)
        assert streamed.stdout == whole.stdout

    def test_stream_json_is_a_line_per_piece(self, on_tiny: list[str]) -> None:
        result = polar("run", "hello", "--max-tokens", "30", "--stream", "--json", *on_tiny)
        lines = [json.loads(line) for line in result.stdout.splitlines()]
        assert all(set(line) == {"text"} for line in lines[:-1])
        assert "".join(line["text"] for line in lines[:-1]) == lines[-1]["text"]
        assert lines[-1]["usage"]["outcome"] == "completed"

    @pytest.mark.parametrize("stream", [[], ["--stream"]])
    def test_an_answer_by_a_schema(self, on_tiny: list[str], tmp_path: Path, stream: list[str]) -> None:
        schema = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}
        path = tmp_path / "schema.json"
        path.write_text(json.dumps({**schema, "additionalProperties": False}))
        result = polar("run", "hello", "--max-tokens", "30", "--schema", str(path), *stream, *on_tiny)
        assert isinstance(json.loads(result.stdout)["n"], int)

    def test_a_cut_off_answer_by_a_schema_is_an_error(self, on_tiny: list[str], tmp_path: Path) -> None:
        path = tmp_path / "schema.json"
        path.write_text(json.dumps({"type": "string", "minLength": 50}))
        result = polar("run", "hello", "--max-tokens", "9", "--schema", str(path), *on_tiny)
        assert result.exit_code == 1
        assert "not complete JSON: it ended after 9 tokens" in result.stderr

    @pytest.mark.parametrize(
        ("content", "message"), [("{", "not valid JSON"), ('{"not": {}}', "no grammar can enforce")]
    )
    def test_a_schema_that_cannot_be_used(self, on_tiny: list[str], tmp_path: Path, content: str, message: str) -> None:
        path = tmp_path / "schema.json"
        path.write_text(content)
        refused(polar("run", "hello", "--schema", str(path), *on_tiny), 2, message)
        refused(polar("run", "hello", "--schema", str(tmp_path / "no"), *on_tiny), 2, "cannot be read")

    def test_a_dash_reads_standard_input(self, on_tiny: list[str]) -> None:
        piped = polar("run", "-", "--max-tokens", "5", *on_tiny, typed="héllo\nworld €")
        assert piped.exit_code == 0
        assert piped.stdout == polar("run", "héllo\nworld €", "--max-tokens", "5", *on_tiny).stdout

    @pytest.mark.parametrize("typed", ["", " \n "])
    def test_nothing_on_standard_input(self, typed: str) -> None:
        refused(polar("run", "-", typed=typed), 2, "prompt is empty", "give it some text")

    def test_raw_adds_no_template(self, on_tiny: list[str]) -> None:
        result = polar("run", "hello", "--raw", "--max-tokens", "1", "--json", *on_tiny)
        assert json.loads(result.stdout)["usage"]["tokens"]["input"] == 5

    def test_who_and_what_reach_the_ledger(self, on_tiny: list[str]) -> None:
        polar("run", "hi", "--max-tokens", "1", "--tenant", "acme", "--tag", "a=1", "--tag", "b=x=y", *on_tiny)
        (stored,) = requests_in_ledger()
        assert (stored["tenant"], stored["tags"]) == ("acme", {"a": "1", "b": "x=y"})

    def test_no_ledger_keeps_nothing(self, on_tiny: list[str]) -> None:
        result = polar("run", "hi", "--max-tokens", "1", "--no-ledger", *on_tiny)
        assert result.exit_code == 0
        assert "USD" not in result.stderr
        assert requests_in_ledger() == []

    def test_sampling_with_a_seed_repeats(self, on_tiny: list[str]) -> None:
        words = ["run", "hi", "--max-tokens", "9", "--temperature", "1.5", "--top-k", "50", "--seed", "7", *on_tiny]
        assert polar(*words).stdout == polar(*words).stdout

    def test_an_answer_stops_at_a_stop(self, on_tiny: list[str]) -> None:
        whole = polar("run", "hello", "--max-tokens", "40", *on_tiny).stdout.rstrip("\n")
        stop = whole[10:12]
        cut = polar("run", "hello", "--max-tokens", "40", "--stop", stop, *on_tiny).stdout.rstrip("\n")
        assert cut == whole[: whole.find(stop)]


class TestMistakes:
    """Exit code 2, one line with value, limit and fix; the ledger keeps no trace."""

    @pytest.mark.parametrize(
        ("words", "told"),
        [
            (["", "--stream"], ["prompt is empty"]),
            (["hi", "--compute", "econmy", "--stream"], ["'econmy'"]),
            (["hi", "--program", "0-6", "--json"], ["'0-6'"]),
            (["x" * 16_400], ["16402", "16384"]),
            (["hi", "--max-tokens", "16384"], ["max_tokens=16384", "16380"]),
            (["hi", "--top-p", "0"], ["top_p=0"]),
            (["hi", "--tag", "team"], ["'team'", "--tag team=search"]),
            (["hi", "--tenant", " "], ["tenant ' '"]),
            (["hi", "--stop", ""], ["stop string"]),
            (["hi", "--device", "tpu"], ["'tpu'"]),
            (["hi", "--precision", "int3"], ["'int3'"]),
        ],
    )
    def test_run(self, on_tiny: list[str], words: list[str], told: list[str]) -> None:
        refused(polar("run", *on_tiny, *words), 2, *told)
        assert requests_in_ledger() == []

    @pytest.mark.parametrize(
        ("words", "told"),
        [
            (["run", "hi", "--model", "no-such-model"], ["'no-such-model'", "smollm2-135m-instruct"]),
            (["run", "hi", "--model", "./no/such/folder"], ["./no/such/folder", "no such file or folder"]),
            (["models", "fetch", "no-such-model"], ["'no-such-model'"]),
            (["lab", "search", "--data", "absent.jsonl", "--out", "menu.json"], ["absent.jsonl", "cannot be read"]),
            (["lab", "drafts", "--limit", "7"], ["--limit 7", "--data", "--questions 7"]),
            (["usage", "--month", "2026-13"], ["2026-13"]),
        ],
    )
    def test_other_commands(self, words: list[str], told: list[str]) -> None:
        refused(polar(*words), 2, *told)

    def test_a_policy_file_that_is_wrong(self, folder: Path, tmp_path: Path) -> None:
        (tmp_path / "wrong.json").write_bytes(b"\xff{")
        words = ["run", "hi", "--model", str(folder), "--policy"]
        refused(polar(*words, str(tmp_path / "wrong.json")), 2, "wrong.json", "not UTF-8")
        refused(polar(*words, str(tmp_path / "absent.json")), 2, "absent.json", "polar fit")

    def test_an_unknown_command_or_option(self) -> None:
        assert polar("rnu").exit_code == 2
        assert polar("run", "hi", "--cheap").exit_code == 2
        assert polar("run").exit_code == 2

    def test_a_prompt_that_is_no_text(
        self, on_tiny: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """By whichever way the standard input of a process reads bytes that are no UTF-8."""
        refused(polar("run", "-", *on_tiny, typed=b"ab\xff"), 2)
        monkeypatch.setattr(sys, "stdin", TextIOWrapper(BytesIO(b"ab\xff"), "utf-8", "surrogateescape"))
        monkeypatch.setattr(sys, "argv", ["polar", "run", "-", *on_tiny])
        with pytest.raises(SystemExit) as ended:
            main()
        assert ended.value.code == 2
        said = capsys.readouterr().err
        assert (said.startswith("error: "), said.count("\n")) == (True, 1)


class TestLedger:
    """A ledger that cannot take the record: exit code 1 before anything runs, and the file as it was."""

    def test_read_only(self, on_tiny: list[str], ledger_url: str, tmp_path: Path) -> None:
        polar("run", "hi", "--max-tokens", "1", *on_tiny)
        file = tmp_path / "ledger.sqlite3"
        before = len(requests_in_ledger()), file.read_bytes()
        assert before[0] == 1
        read_only = f"sqlite:///file:{file}?mode=ro&uri=true"  # file modes do not stop a test that runs as root
        refused(polar("run", "hi", "--max-tokens", "1", "--ledger", read_only, *on_tiny), 1, "ledger", "read-only")
        assert (len(requests_in_ledger()), file.read_bytes()) == before

    def test_a_file_without_permission(self, on_tiny: list[str], tmp_path: Path) -> None:
        if os.geteuid() == 0:
            pytest.skip("root may write every file")
        polar("run", "hi", "--max-tokens", "1", *on_tiny)
        file = tmp_path / "ledger.sqlite3"
        file.chmod(0o444)
        refused(polar("run", "hi", "--max-tokens", "1", *on_tiny), 1, "ledger.sqlite3")

    def test_a_file_that_is_no_ledger(self, on_tiny: list[str], tmp_path: Path) -> None:
        file = tmp_path / "notes.txt"
        file.write_text("not a database, but dear to somebody\n" * 100, encoding="utf-8")
        before = file.read_bytes()
        refused(polar("run", "hi", "--ledger", str(file), *on_tiny), 1, "notes.txt")
        assert file.read_bytes() == before

    @pytest.mark.parametrize("where", ["absent/ledger.sqlite3", "."])
    def test_a_place_where_none_can_be(self, tmp_path: Path, where: str) -> None:
        """It is said before the model is looked for: to load one takes seconds."""
        there = f"sqlite:///{tmp_path / where}"
        refused(polar("run", "hi", "--ledger", there, "--model", "no-such-model"), 1, str(tmp_path))

    def test_a_request_id_twice(self, on_tiny: list[str]) -> None:
        words = ["run", "hi", "--max-tokens", "1", "--request-id", "once", *on_tiny]
        assert polar(*words).exit_code == 0
        result = polar(*words)  # other timings, so another record under the same id
        assert "Traceback" not in result.output
        assert len(requests_in_ledger()) == 1


class TestProcess:
    """A real process, where signals and pipes matter."""

    @pytest.fixture
    def running(self) -> Iterator[list[subprocess.Popen[bytes]]]:
        started: list[subprocess.Popen[bytes]] = []
        yield started
        for process in started:
            if process.poll() is None:
                process.kill()
            process.communicate()

    @staticmethod
    def start(running: list[subprocess.Popen[bytes]], *words: str) -> subprocess.Popen[bytes]:
        process = subprocess.Popen(
            [*POLAR, *words], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        running.append(process)
        return process

    def test_ctrl_c_in_mid_stream(self, running: list[subprocess.Popen[bytes]], on_tiny: list[str]) -> None:
        process = self.start(running, "run", "hello", "--stream", "--max-tokens", "16000", *on_tiny)
        assert process.stdout is not None
        assert process.stdout.read(4)  # the answer has begun
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=TIMEOUT_S)
        assert process.returncode == 130
        assert errors.decode() == "error: interrupted; what was executed until then is in the ledger.\n"
        (stored,) = requests_in_ledger()
        assert (stored["outcome"], stored["finish_reason"]) == ("cancelled", "cancelled")
        assert 0 < stored["tokens"]["output"] < 16_000
        assert stored["visits"]["decode"][0] > 0
        assert stored["flops"]["total"] > 0

    def test_only_what_meters_says_that_it_metered(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def interrupted(*_: object, **__: object) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr("polar_sdk.cli.options.load_model", interrupted)
        for words, line in (
            (["run", "hi"], "error: interrupted; what was executed until then is in the ledger."),
            (["run", "hi", "--no-ledger"], "error: interrupted."),
            (["lab", "search", "--out", "menu.json"], "error: interrupted."),
        ):
            done = polar(*words)
            assert (done.exit_code, done.stderr.strip()) == (130, line)

    def test_ctrl_c_without_stream(self, running: list[subprocess.Popen[bytes]], on_tiny: list[str]) -> None:
        process = self.start(running, "chat", "--max-tokens", "16000", *on_tiny)
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(b"hello\n")
        process.stdin.flush()
        assert process.stdout.read(4)
        process.send_signal(signal.SIGINT)  # in a chat it interrupts the answer, not the conversation
        _, errors = process.communicate(b"/exit\n", timeout=TIMEOUT_S)
        assert process.returncode == 0
        assert errors.decode() == "[interrupted]\n"
        assert [stored["outcome"] for stored in requests_in_ledger()] == ["cancelled"]

    def test_a_reader_that_has_had_enough(self, running: list[subprocess.Popen[bytes]], on_tiny: list[str]) -> None:
        process = self.start(running, "run", "hello", "--stream", "--max-tokens", "16000", *on_tiny)
        assert process.stdout is not None
        assert process.stdout.read(1)
        process.stdout.close()  # what `head -c 1` does
        assert process.stderr is not None
        assert process.stderr.read() == b""
        assert process.wait(TIMEOUT_S) == 0
        assert [stored["outcome"] for stored in requests_in_ledger()] == ["cancelled"]


class TestChat:
    def test_piped_turns(self, on_tiny: list[str]) -> None:
        result = polar("chat", "--max-tokens", "5", *on_tiny, typed="hello\n\n  \nand again\n")
        assert result.exit_code == 0
        assert result.stderr.count("[standard · program 0 2-5 · ") == 2
        first, second = reversed(requests_in_ledger())
        assert first["tokens"] == {"input": 7, "cached": 0, "output": 5, "drafted": 0, "accepted": 0}
        assert second["tokens"]["input"] > 7 + len("and again")  # the conversation so far is part of the prompt

    def test_answers_stand_on_lines_of_their_own(self, on_tiny: list[str]) -> None:
        alone = polar("run", "hello", "--max-tokens", "5", *on_tiny).stdout
        result = polar("chat", "--max-tokens", "5", *on_tiny, typed="hello\n/exit\nnever said\n")
        assert result.stdout == alone

    def test_the_system_message_counts(self, on_tiny: list[str]) -> None:
        polar("chat", "--system", "short", "--max-tokens", "1", *on_tiny, typed="hello\n")
        (stored,) = requests_in_ledger()
        assert stored["tokens"]["input"] == len("short") + len("hello") + 3

    def test_a_turn_that_is_refused_ends_nothing(self, on_tiny: list[str]) -> None:
        result = polar("chat", "--max-tokens", "3", *on_tiny, typed="x" * 17_000 + "\nhello\n")
        assert result.exit_code == 0
        assert result.stderr.startswith("error: ")
        assert len(requests_in_ledger()) == 1


def test_a_limit_also_cuts_the_packages_own_prompts() -> None:
    assert items_of(None, 3) == builtin_items()[:3]
    assert items_of(None, None) is None


class TestExport:
    def test_a_program_becomes_a_folder_that_runs(self, folder: Path, tmp_path: Path) -> None:
        out = tmp_path / "cut"
        words = ["--model", str(folder), "--policy", str(folder / "policy.json"), "--json"]
        made = polar("export", "--program", "0 2-5", "--out", str(out), *words)
        facts = json.loads(made.stdout)
        assert (made.exit_code, facts["folder"], facts["program"], facts["layers"]) == (0, str(out), "0 2-5", 5)
        assert facts["bytes"] == sum(path.stat().st_size for path in out.iterdir())
        ran = polar("run", "hi", "--model", str(out), "--no-ledger", "--max-tokens", "2", "--json")
        assert json.loads(ran.stdout)["usage"]["program"] == "0-4"

    def test_it_refuses_and_replaces(self, folder: Path, tmp_path: Path) -> None:
        words = ["export", "--out", str(tmp_path / "cut"), "--model", str(folder)]
        words += ["--policy", str(folder / "policy.json"), "--program"]
        refused(polar(*words, "0 2x2 4-5"), 2, "visits layer 2 2 times", "each layer once")
        refused(polar(*words, "0-b"), 2, "'0-b'")
        assert polar(*words, "0-5").exit_code == 0
        refused(polar(*words, "0 5"), 2, "contains a model already", "--force")
        assert polar(*words, "0 5", "--force").exit_code == 0
        assert json.loads((tmp_path / "cut" / "config.json").read_text())["num_hidden_layers"] == 2


class TestHelp:
    @staticmethod
    def commands(command: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
        for name, one in getattr(command, "commands", {}).items():
            if not one.hidden:
                yield (*path, name), one
                yield from TestHelp.commands(one, (*path, name))

    def test_every_command_has_help_with_an_example_that_parses(self) -> None:
        for path, command in self.commands(typer.main.get_command(app)):
            assert command.help
            words = shlex.split(command.epilog.removeprefix("Example: polar "))
            assert tuple(words[: len(path)]) == path
            command.make_context(" ".join(path), words[len(path) :])  # raises on an option that does not exist

    def test_it_is_shown(self) -> None:
        result = polar("lab", "search", "--help")
        assert (result.exit_code, "Example: polar lab search" in result.stdout) == (0, True)

    def test_version(self) -> None:
        from polar_sdk import __version__

        assert polar("--version").stdout == f"polar {__version__}\n"


@pytest.mark.model
class TestDefaultModel:
    def test_paris(self) -> None:
        result = polar("run", "What is the capital of France?", "--compute", "exact", "--max-tokens", "20")
        assert result.exit_code == 0
        assert "Paris" in result.stdout
        assert result.stderr.startswith("[exact · program 0-29 · ")
