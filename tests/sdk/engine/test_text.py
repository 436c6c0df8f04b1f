"""Text piece by piece is the text at once: characters across tokens, stop strings across pieces."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from polar_sdk.engine.text import Detokenizer, StopMatcher, TextStream
from polar_sdk.testing import tiny_tokenizer

END = 256  # the tiny tokenizer's first special token


def decode(ids: list[int]) -> str:
    text = tiny_tokenizer().decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert isinstance(text, str)
    return text


def pushed(ids: list[int]) -> tuple[list[str], str]:
    detokenizer = Detokenizer(tiny_tokenizer())
    return [detokenizer.push(token) for token in ids], detokenizer.finish()


# Bytes of real characters, cut and mixed with bytes that are none.
texts = st.text(st.characters(codec="utf-8"), max_size=20) | st.text("aé€😀 \ufffd", max_size=20)
tokens = st.lists(
    st.one_of(
        texts.map(lambda text: tiny_tokenizer().encode(text, add_special_tokens=False)),
        st.lists(st.integers(0, 259), max_size=12),
    ),
    max_size=5,
).map(lambda parts: [token for part in parts for token in part])


@given(tokens)
def test_pieces_join_to_the_whole_decode(ids: list[int]) -> None:
    pieces, rest = pushed(ids)
    assert "".join(pieces) + rest == decode(ids)


@pytest.mark.parametrize("character", ["é", "€", "😀"])
def test_no_half_character_is_ever_shown(character: str) -> None:
    ids = tiny_tokenizer().encode(character, add_special_tokens=False)
    pieces, rest = pushed(ids)
    assert pieces == [""] * (len(ids) - 1) + [character]
    assert rest == ""


def test_endless_broken_bytes_are_shown_in_time() -> None:
    pieces, _ = pushed(tiny_tokenizer().encode("€", add_special_tokens=False)[:1] * 300)
    shown = "".join(pieces)
    assert set(shown) == {"\ufffd"}
    assert len(shown) >= 290


def cut(text: str, at: list[int]) -> list[str]:
    borders = [0, *sorted(place % (len(text) + 1) for place in at), len(text)]
    return [text[start:end] for start, end in pairwise(borders)]


def before_first_stop(text: str, stops: list[str]) -> str:
    starts = [text.find(stop) for stop in stops if stop in text]
    return text[: min(starts)] if starts else text


# Few letters, so that stops overlap themselves, each other, and the borders of pieces.
letters = st.text("abc", max_size=30)
stop_lists = st.lists(st.text("abc", min_size=1, max_size=5), max_size=4)


@given(letters, stop_lists, st.lists(st.integers(0, 30), max_size=10))
def test_output_is_the_text_before_the_first_stop(text: str, stops: list[str], at: list[int]) -> None:
    matcher = StopMatcher(stops)
    shown = ""
    for piece in cut(text, at):
        shown += matcher.push(piece)
        assert before_first_stop(text, stops).startswith(shown)  # nothing is ever taken back
    shown += matcher.finish()
    assert shown == before_first_stop(text, stops)
    assert matcher.stopped == any(stop in text for stop in stops)


@given(letters, stop_lists)
def test_what_cannot_become_a_stop_is_shown_at_once(text: str, stops: list[str]) -> None:
    matcher = StopMatcher(stops)
    shown = ""
    for position, letter in enumerate(text, 1):
        shown += matcher.push(letter)
        if matcher.stopped:
            break
        held = text[len(shown) : position]
        assert not held or any(held.startswith(stop) or stop.startswith(held) for stop in stops)


@pytest.mark.parametrize("text", ["a" * 2_000, "ab" * 1_000, "a" * 999 + "b"])
def test_the_work_per_character_does_not_grow_with_the_length_of_stops(
    monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    looks = 0

    class Counting(str):
        def __getitem__(self, key: object) -> str:
            nonlocal looks
            looks += 1
            return super().__getitem__(key)  # type: ignore[index]

    stops = ["a" * 990 + str(number) for number in range(32)]
    matcher = StopMatcher(stops)
    for group in matcher._by_first.values():
        for stop in group:
            stop.text = Counting(stop.text)
    shown = "".join(map(matcher.push, text)) + matcher.finish()
    assert shown == text
    assert looks <= 8 * len(stops) * len(text)


@pytest.mark.parametrize(
    ("text", "shown", "stopped"),
    [("xab", ["x", "", ""], False), ("xabc", ["x", "", "", ""], True), ("xabd", ["x", "", "", "a"], True)],
)
def test_an_earlier_longer_stop_wins_over_one_that_ends_sooner(text: str, shown: list[str], stopped: bool) -> None:
    matcher = StopMatcher(["b", "abc"])
    assert [matcher.push(letter) for letter in text] == shown
    assert matcher.stopped is stopped


@given(texts, st.lists(st.text("aé€😀 ", min_size=1, max_size=3), max_size=3))
def test_stops_are_met_across_bytes_of_characters(text: str, stops: list[str]) -> None:
    stream = TextStream(tiny_tokenizer(), stops)
    shown = "".join(map(stream.push, tiny_tokenizer().encode(text, add_special_tokens=False)))
    shown += stream.finish()
    assert shown == stream.text == before_first_stop(text, stops)
