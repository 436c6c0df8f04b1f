"""A file of the user's own prompts: read, or refused with one line that says where and why."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from polar_sdk.errors import DataError
from polar_simulate.prompt_file import MAX_TOKENS, read_prompts

if TYPE_CHECKING:
    from pathlib import Path


def test_lines_are_read(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": " Hello "}\n\n{"prompt": "b", "tenant": "acme", "tier": "exact", "max_tokens": 2}\n')
    first, second = read_prompts(path)
    assert (first.prompt, first.tenant, first.tier, first.max_tokens) == ("Hello", None, None, MAX_TOKENS)
    assert (second.tenant, second.tier, second.max_tokens) == ("acme", "exact", 2)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "has no line"),
        ("\n \n", "has no line"),
        ('{"prompt": "a"}\nnonsense', "jsonl:2 is not valid JSON"),
        ('["prompt"]', "jsonl:1 is not a JSON object"),
        ('{"text": "a"}', "jsonl:1: prompt: field required"),
        ('{"prompt": "a", "tennant": "b"}', "the key 'tennant' is unknown; use prompt, tenant, tier and max_tokens"),
        ('{"prompt": "  "}', "prompt: string should have at least 1 character (got '  ')"),
        ('{"prompt": 7}', "prompt: input should be a valid string (got 7)"),
        ('{"prompt": "a", "max_tokens": 0}', "max_tokens: input should be greater than or equal to 1 (got 0)"),
    ],
)
def test_what_is_wrong_is_said_on_one_line(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text(text)
    with pytest.raises(DataError) as caught:
        read_prompts(path)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"missing.jsonl' cannot be read"):
        read_prompts(tmp_path / "missing.jsonl")
