"""Names of tenants, tags and requests: taken as they are or refused, never changed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from pydantic import ValidationError

from polar_billing.testing import usage_record
from polar_sdk.errors import TagError
from polar_sdk.testing import tiny_model
from polar_sdk.usage import AS_STORED, ListSink, UsageRecord

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


@pytest.mark.parametrize("value", CONTROL)
def test_the_value_of_a_tag_has_no_control_characters(model: PolarModel, value: str) -> None:
    with pytest.raises(TagError, match=r"value of tag 'team', '.*contains the control character"):
        model.generate("hello", max_tokens=1, tags={"team": value})


def test_what_is_taken_stays_as_it_is(model: PolarModel, records: ListSink) -> None:
    tags = {"team name": "  search and rescue ", "κλειδί": "søk\u00a0—\u3000検索"}
    model.generate("hello", max_tokens=1, tenant="Société Générale", request_id="a b", tags=tags)
    record = records.records.pop()
    assert (record.tenant, record.request_id, record.tags) == ("Société Générale", "a b", tags)


@pytest.mark.parametrize("name", [*AROUND, *CONTROL, "ac\ud800me", "ac\x00me"])
@pytest.mark.parametrize("where", ["tenant", "request_id", "tag"])
def test_a_record_that_a_host_builds_is_held_to_the_same_rule(records: ListSink, where: str, name: str) -> None:
    """It was stripped: usage of ` acme` was billed to `acme`."""
    changes: Any = {"tags": {name: "x"}} if where == "tag" else {where: name}
    stated = usage_record().model_dump()
    with pytest.raises(ValidationError, match=r"white space|control character U\+|lone surrogate U\+|valid string"):
        UsageRecord.model_validate({**stated, **changes})
    if "\ud800" not in name:  # what an earlier version stored can be read
        read = UsageRecord.model_validate({**stated, **changes}, context=AS_STORED)
        assert (read.tags if where == "tag" else getattr(read, where)) in (name, {name: "x"})
