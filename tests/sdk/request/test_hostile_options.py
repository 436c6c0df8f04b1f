"""Options of absurd size or kind, and chat templates that raise or blow up: clear errors before anything runs."""

from __future__ import annotations

import time
from itertools import repeat
from typing import Any

import pytest

from polar_sdk.errors import InvalidRequestError, SamplingError
from polar_sdk.testing import tiny_model


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"temperature": 10**400}, "temperature=1000"),
        ({"temperature": 10**5_000}, "temperature=a value of type int that is too long to show is out of range"),
        ({"temperature": float("nan")}, "temperature=nan is out of range"),
        ({"top_p": 10**5_000}, "top_p=a value"),
        ({"top_k": 10**5_000}, "top_k=a value"),
        ({"seed": 10**5_000}, "seed=a value"),
        ({"max_tokens": 10**5_000}, "max_tokens=a value"),
        ({"max_tokens": -(10**5_000)}, "max_tokens=a value"),
        ({"logprobs": 10**5_000}, "logprobs=a value"),
        ({"timeout": 10**400}, "timeout=1000"),
        ({"timeout": 10**5_000}, "timeout=a value"),
        ({"compute": 10**400}, "compute=1000"),
        ({"stop": 5}, "stop=5 is neither text nor a list of texts"),
        ({"stop": 0}, "stop=0 is neither"),
        ({"stop": ["a"] * 100_000}, "more than 256 stop strings"),
        ({"stop": repeat("a")}, "more than 256 stop strings"),
        ({"stop": "a" * 1_001}, "has 1,001 characters; use at most 1,000"),
        ({"stop": [10**5_000]}, "is not text"),
    ],
)
def test_an_absurd_option_is_refused_by_name(options: dict[str, Any], told: str) -> None:
    start = time.process_time()
    with pytest.raises((InvalidRequestError, SamplingError)) as caught:
        tiny_model().generate("hello", **options)
    assert told in str(caught.value)
    assert len(str(caught.value)) < 500
    assert time.process_time() - start < 5


def test_many_stop_strings_are_served() -> None:
    assert tiny_model().generate("hello", max_tokens=2, stop=["\x01" * 1_000] * 256).token_ids


@pytest.mark.parametrize(
    ("template", "told"),
    [
        ("{{ 1/0 }}", "ZeroDivisionError: division by zero"),
        ("{{ 1 + 'a' }}", "TypeError"),
        ("{{ messages[99].content.x.y }}", "UndefinedError"),
        ("{{ raise_exception('no') }}", "TemplateError: no"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
        ("{{ 'x' * 10**12 }}", "MemoryError"),
        ("{{ 'x' * 30000000 }}", "makes 30,000,000 characters of 9; at most 4 times as many and 200,000 more"),
        ("{% if %}", "TemplateSyntaxError"),
    ],
)
def test_a_chat_template_that_raises_or_blows_up_is_refused_with_its_own_error(
    monkeypatch: pytest.MonkeyPatch, template: str, told: str
) -> None:
    model = tiny_model()
    monkeypatch.setattr(model.loaded.tokenizer, "chat_template", template)  # all tiny models share the tokenizer
    start = time.process_time()
    with pytest.raises(InvalidRequestError) as caught:
        model.generate("hello")
    assert told in str(caught.value)
    assert time.process_time() - start < 5
