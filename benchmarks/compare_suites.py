"""LangChain's standard suites for chat models, on `ChatPolar` and on its peer over the same weights.

    python -m benchmarks.compare_suites [--only polar|huggingface] [--results FOLDER]

The peer is `ChatHuggingFace(HuggingFacePipeline)`, as its documents say to use it, with the abilities that the suite
reads from the class; `pip install --group compare` brings it. Ours is what `make standard-suite` runs on the default
model. Each runs in a process of its own, without a network; the result lines of pytest are printed, and the counts
are written to `--results`. A busy machine changes the times, and no count.

The classes below are the peer's suites, which pytest finds in this file. Knows nothing of what a test asks.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from langchain_tests.integration_tests import ChatModelIntegrationTests
from langchain_tests.unit_tests import ChatModelUnitTests

from benchmarks.results import Recorder, arguments
from polar_sdk import PolarModel
from polar_sdk.models.aliases import ALIASES
from polar_sdk.models.paths import cache_folder

if TYPE_CHECKING:
    from langchain_core.language_models import BaseChatModel

ROOT: Final = Path(__file__).parents[1]
MAX_TOKENS: Final = 128
"""Max tokens of an answer, of both."""
SUITES: Final = {
    "ChatPolar": [str(ROOT / "tests/integrations/test_langchain_standard.py"), "-k", "TestUnit or TestRealModel"],
    # Warnings are errors in our own tests; the peer's are its own affair.
    "ChatHuggingFace(HuggingFacePipeline)": [__file__, "-o", "filterwarnings=default"],
}
OUTCOMES: Final = ("passed", "failed", "skipped")
OURS_FAILED: Final = ("ChatPolar", "failed")
GOAL: Final[dict[str, Any]] = {"goal": 0.0, "better": "lower"}
_LONGEST_S: Final = 3_600


@cache
def _pipeline() -> Any:
    """The peer's model, loaded once: the default model's weights, greedy, in bfloat16 as ours."""
    import transformers
    from langchain_huggingface import HuggingFacePipeline

    folder = str(cache_folder() / "models" / ALIASES[0].key)
    answering = transformers.pipeline(
        "text-generation",
        model=folder,
        dtype="bfloat16",
        max_new_tokens=MAX_TOKENS,
        do_sample=False,
        return_full_text=False,
    )
    return HuggingFacePipeline(pipeline=answering, model_id=folder)


class _Peer:
    @property
    def chat_model_class(self) -> type[BaseChatModel]:
        from langchain_huggingface import ChatHuggingFace

        chosen: type[BaseChatModel] = ChatHuggingFace
        return chosen

    @property
    def chat_model_params(self) -> dict[str, Any]:
        return {"llm": _pipeline()}


class TestPeerUnit(_Peer, ChatModelUnitTests):
    """Tests that need no answer."""


class TestPeerIntegration(_Peer, ChatModelIntegrationTests):
    """Tests that need one."""


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--only", choices=["polar", "huggingface"], help="run one of the two")
    args = parser.parse_args()
    if args.only != "polar" and find_spec("langchain_huggingface") is None:
        parser.error("the peer is not installed; run: pip install --group compare")
    PolarModel.from_pretrained(ledger=None)  # fetched from here on
    recorder = Recorder("suites", args.results)
    lines = {}
    for name, command in SUITES.items():
        if args.only is None or args.only in name.lower():
            lines[name] = line = _result_line(name, command)
            for outcome, count in counts(line).items():
                recorder.add(f"{name}: {outcome}", count, "tests", **(GOAL if (name, outcome) == OURS_FAILED else {}))
    print("\nLangChain's unit and integration suites for chat models, same weights")
    for name, line in lines.items():
        print(f"  {name:<38} {line}")
    print(f"\nwrote {recorder.path}")


def _result_line(name: str, command: list[str]) -> str:
    """Run one suite; print its output, and return the line that ends it.

    Raises:
        RuntimeError: It ended without a result.
    """
    print(f"== {name}", flush=True)
    pytest = [sys.executable, "-m", "pytest", "-q", "-rfE", "--tb=no", "-p", "no:cacheprovider"]
    ended = subprocess.run(
        [*pytest, "--disable-socket", "--allow-unix-socket", *command],
        cwd=ROOT,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
        timeout=_LONGEST_S,
    )
    print(ended.stdout, flush=True)
    last = ended.stdout.strip().rpartition("\n")[2]
    if not sum(counts(last).values()):
        raise RuntimeError(f"the suite of {name} ended with {ended.returncode} and no result; its output is above.")
    return last


def counts(line: str) -> dict[str, int]:
    """Tests by outcome, from the line that ends a run of pytest; one that could not be set up has failed."""
    found = dict.fromkeys(OUTCOMES, 0)
    for count, outcome in re.findall(r"(\d+) (passed|failed|errors?|skipped)", line):
        found["failed" if outcome.startswith("error") else outcome] += int(count)
    return found


if __name__ == "__main__":
    main()
