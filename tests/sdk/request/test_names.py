"""Names of tenants, tags and requests: taken as they are or refused, never changed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from polar_sdk.errors import TagError
from polar_sdk.testing import tiny_model
from polar_sdk.usage import ListSink

if TYPE_CHECKING:
    from polar_sdk.model import PolarModel

AROUND = [" acme", "acme ", "acme\u00a0", "\u2003acme", "\u3000acme", "acme\x1f"]
CONTROL = ["ac\nme", "\x1b]0;pwn\x07", "ac\x9bme", "ac\u202eme", "ac\u200bme", "ac\ufeffme", "ac\u2028me", "ac\u2029me"]


@pytest.fixture(scope="module")
def records() -> ListSink:
    return ListSink()


@pytest.fixture(scope="module")
def model(records: ListSink) -> PolarModel:
    return tiny_model(sink=records)


@pytest.mark.parametrize("name", [*AROUND, *CONTROL])
@pytest.mark.parametrize("where", ["tenant", "request_id", "tag"])
def test_a_name_is_refused_before_it_could_be_billed_as_another(
    model: PolarModel, records: ListSink, where: str, name: str
) -> None:
    options: Any = {"tags": {name: "x"}} if where == "tag" else {where: name}
    with pytest.raises(
        TagError, match=rf"{where} '.*(white space|control character U\+[0-9A-F]{{4}}); remove it\."
    ) as caught:
        model.generate("hello", max_tokens=1, **options)
    assert str(caught.value).isprintable()
    assert records.records == []


@pytest.mark.parametrize("name", [*AROUND, *CONTROL])
def test_of_the_model_object_too(name: str) -> None:
    with pytest.raises(TagError, match="tenant"):
        tiny_model(tenant=name).generate("hello", max_tokens=1)


@pytest.mark.parametrize("value", CONTROL)
def test_the_value_of_a_tag_has_no_control_characters(model: PolarModel, value: str) -> None:
    with pytest.raises(TagError, match=r"value of tag 'team', '.*contains the control character"):
        model.generate("hello", max_tokens=1, tags={"team": value})


def test_what_is_taken_stays_as_it_is(model: PolarModel, records: ListSink) -> None:
    tags = {"team name": "  search and rescue ", "κλειδί": "søk\u00a0—\u3000検索"}
    model.generate("hello", max_tokens=1, tenant="Société Générale", request_id="a b", tags=tags)
    record = records.records.pop()
    assert (record.tenant, record.request_id, record.tags) == ("Société Générale", "a b", tags)
