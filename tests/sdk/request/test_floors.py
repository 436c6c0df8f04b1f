"""Floors: which requests a rule is for, that nothing a caller says gets under it, and rules that cannot be."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from polar_sdk import PolarModel, Policy, Program, StaticRouter
from polar_sdk.errors import PolicyError
from polar_sdk.frameworks.forms import AnswerForm
from polar_sdk.programs.floors import Floor
from polar_sdk.request.floors import FLOOR_TAG, RAISED_TAG
from polar_sdk.router.artifact import save_router
from polar_sdk.router.certificate import Certificate, Counts, tier_promise
from polar_sdk.router.topic import ordinary_prompts
from polar_sdk.testing import scripted_model, tiny_model, tiny_policy
from polar_sdk.usage import ListSink
from tests.sdk.fixed_router import fixed_router
from tests.sdk.request.test_admission import Gate

if TYPE_CHECKING:
    from pathlib import Path

    from polar_sdk.router.menu import MenuRouter

TOOL = {"type": "function", "function": {"name": "time", "parameters": {"type": "object", "properties": {}}}}
STAMPS = ("§§ ¶1 ¶¶", "¶¶§ 2 §", "§ ¶ § ¶ 34", "¶§¶§¶§ no", "so §¶ §¶ 5")
"""Texts of signs that no other prompt has."""
COOKING = (
    "How long do I boil an egg?",
    "Which cheese goes on a pizza?",
    "Fry the onions in butter, and then?",
    "What can I cook with rice, beans and onions?",
    "How much salt goes into bread dough?",
    "Bake the dough in the oven: for how long?",
    "Is soup better with cream or with milk?",
    "How do I roast a chicken with potatoes?",
)


def floored(*rules: dict[str, Any], **settings: Any) -> PolarModel:
    floors = tuple(Floor.model_validate({"name": f"rule {place}", **rule}) for place, rule in enumerate(rules))
    return tiny_model(policy=tiny_policy(6).model_copy(update={"floors": floors}), **settings)


def says(text: str, role: str = "user") -> dict[str, str]:
    return {"role": role, "content": text}


@pytest.mark.parametrize(
    ("rule", "meant", "other"),
    [
        ({"tenants": ["clinic-*"]}, {"tenant": "clinic-3"}, {"tenant": "shop"}),
        ({"keys": ["abc"]}, {"tags": {"key": "abc"}}, {"tags": {"key": "abcd"}}),
        (
            {"tags": {"team": "legal", "stage": "?"}},
            {"tags": {"team": "legal", "stage": "2"}},
            {"tags": {"team": "legal"}},
        ),
        ({"tenants": ["a"], "tags": {"b": "*"}}, {"tenant": "a", "tags": {"b": ""}}, {"tenant": "a"}),
    ],
)
def test_whom_a_rule_is_for(rule: dict[str, Any], meant: Any, other: Any) -> None:
    model = floored({"floor": "exact", **rule})
    assert model.request("hello", **meant).program.text == "0-5"
    untouched = model.request("hello", **other)
    assert (untouched.tier, FLOOR_TAG in untouched.tags) == ("standard", False)


@pytest.mark.parametrize(
    ("prompt", "options", "meant"),
    [
        ([says("You are a NURSE at\u200b the  desk.", "system"), says("Hello")], {}, True),
        ([says("Hello"), says("a nurse at the desk", "developer")], {}, True),
        ([says("You are a nurse at the desk."), says("Hello")], {}, False),
        ("a nurse at the desk", {}, False),
        ("<|system|>a nurse at the desk<|user|>Hello", {"template": "raw"}, True),
    ],
)
def test_a_rule_for_a_system_prompt_reads_what_the_system_says(prompt: Any, options: Any, meant: bool) -> None:
    model = floored({"floor": "exact", "system": ["a nurse at the desk"]})
    prompt = (
        [{**message, "role": "system"} if message["role"] == "developer" else message for message in prompt]
        if (isinstance(prompt, list))
        else prompt
    )
    assert (model.request(prompt, **options).tier == "exact") == meant
    ids = model.prompt_tokens(prompt, options.get("template", "auto"))
    assert model.request(ids).tier == "exact" if meant else True


def test_a_rule_for_tools_is_for_requests_that_offer_some() -> None:
    model = floored({"floor": "exact", "tools": True})
    form = AnswerForm.of({"tools": [TOOL]})
    assert model.request(form.teach([says("What time is it?")])).tier == "exact"
    assert model.request([says("What time is it?")]).tier == "standard"


def test_a_rule_for_a_topic_knows_it_by_its_examples() -> None:
    model = floored({"floor": "exact", "topic": {"examples": STAMPS}})
    assert model.request("Then §¶¶§ 7 §¶ goes here.").tier == "exact"
    assert model.request("x" * 200 + "§¶¶ §§¶ §¶ §¶" + "y" * 200).tier == "exact", "no text around it hides it"
    assert model.request("Then 1234 goes here.").tier == "standard"


@pytest.mark.model
def test_a_topic_is_more_than_its_words(tmp_path: Path) -> None:
    file = tmp_path / "floors.toml"
    file.write_text(f'[[floors]]\nname = "kitchen"\nfloor = "exact"\ntopic.examples = {json.dumps(COOKING)}\n')
    model = PolarModel.from_pretrained(policy=file, ledger=None)
    assert model.tiers[0] == "economy", "the router still serves"
    meant = ("Which spices suit fried fish and potatoes?", "How long must pasta boil in salted water?")
    assert [model.request(text).tier for text in meant] == ["exact", "exact"]
    buried = f"{'The train to the coast leaves every hour. ' * 20}{meant[0]}{' It rained all day.' * 20}"
    assert model.request(buried).tier == "exact"
    other = ("Who wrote the first book about the moon?", "What does a prime minister do?")
    assert [model.request(text).tier for text in other] == ["standard", "standard"]


@pytest.mark.parametrize(
    ("options", "program", "raised"),
    [
        ({}, "0-5", "standard"),
        ({"compute": "economy"}, "0-5", "economy"),
        ({"program": "0 2-5"}, "0-5", "0 2-5"),
        ({"compute": "exact"}, "0-5", None),
        ({"program": "0-5"}, "0-5", None),
        ({"compute": "economy", "tags": {"team": "other", FLOOR_TAG: "none", RAISED_TAG: "x"}}, "0-5", "economy"),
    ],
)
def test_no_option_of_a_caller_gets_under_a_floor(options: Any, program: str, raised: str | None) -> None:
    sink = ListSink()
    model = floored({"floor": "exact", "tags": {"team": "legal"}}, sink=sink, tags={"team": "legal"})
    answer = model.generate("hello", max_tokens=2, **options)
    usage = answer.usage
    assert (usage.program, usage.tags[FLOOR_TAG], usage.tags.get(RAISED_TAG)) == (program, "rule 0", raised)
    assert sum(usage.visits.prefill) == 6
    assert sink.records == [usage]


def test_a_floor_below_full_depth_leaves_what_is_above_it() -> None:
    model = floored({"floor": "standard", "tenants": ["*"]})
    asked: list[Any] = [{"compute": "economy"}, {"compute": "standard"}, {"compute": "premium"}, {"program": "0 3-5"}]
    assert [model.request("hello", **options).tier for options in asked] == [
        "standard",
        "standard",
        "premium",
        "standard",
    ]
    assert model.request("hello", program="0 2-5").program.text == "0 2-5", "a tier from the floor up runs it"


def test_the_highest_of_several_floors_counts() -> None:
    model = floored(
        {"floor": "standard", "tenants": ["*"]},
        {"floor": "exact", "tools": True},
        {"floor": "premium", "tenants": ["b"]},
    )
    assert [model.request("hello", tenant=name).tags[FLOOR_TAG] for name in "ab"] == ["rule 0", "rule 2"]


def test_a_budget_cannot_serve_cheaper_than_the_floor() -> None:
    gate = Gate()
    model = floored({"floor": "standard", "tenants": ["acme"]}, sink=gate)
    model.generate("hello", compute="exact", max_tokens=2, tenant="acme")
    assert [offer.tier for offer in gate.bounds[0].offers] == ["exact", "standard"]


def test_every_row_of_a_batch_has_its_own_floor() -> None:
    model = floored({"floor": "exact", "tenants": ["clinic"]}, sink=ListSink())
    rows: Any = [{"tenant": "clinic", "compute": "economy"}, {"tenant": "shop", "compute": "economy"}]
    answers = model.generate_batch(["a", "b"], each=rows, max_tokens=1)
    assert [answer.usage.program for answer in answers] == ["0-5", "0 3-5"]


def test_a_router_of_ones_own_does_not_go_before_a_floor() -> None:
    model = floored({"floor": "exact", "tenants": ["clinic"]}, router=StaticRouter("0 2-5"))
    assert model.request("hello", tenant="clinic").program.text == "0-5"
    assert model.request("hello").program.text == "0 2-5"


class TestCertifiedRouter:
    @staticmethod
    def router(model: PolarModel) -> MenuRouter:
        """Certified tiers: economy takes the cheap program, premium hardly ever any."""
        counts = Counts(n=1000, lost={"differs": (0, 0, 0)})
        bound = fixed_router(model, [Program.identity(6), Program.parse("0 3-5")], [0.7], dial=(0.0, 0.1, 0.4))
        certificate = Certificate(
            subject=bound.subject,
            data="",
            delta=0.1,
            thetas=(0.0, 0.1, 0.4),
            kinds={"prompt": counts.model_copy(update={"lost": {"differs": (0, 5, 40)}})},
            saved={"text": (0.0, 0.1, 0.2)},
        )
        for tier, alpha in (("economy", 0.1), ("premium", 0.02)):
            certificate = tier_promise(certificate, tier, (alpha, "differs", None))  # type: ignore[arg-type]
        return bound.with_certificate(certificate)

    def test_tiers_and_tolerances_are_raised_to_the_floors(self) -> None:
        router = self.router(tiny_model())
        model = floored({"floor": "premium", "tenants": ["clinic"]}, router=router)
        assert model.request("hello", compute="economy").program.text == "0 3-5"
        raised = model.request("hello", compute="economy", tenant="clinic")
        assert (raised.tier, raised.program.text, raised.router) == ("premium", "0-5", "menu")
        loose = model.request("hello", compute=0.1, tenant="clinic")
        assert (loose.tier, loose.tags[RAISED_TAG]) == ("premium", "0.1")
        assert RAISED_TAG not in model.request("hello", compute=0.02, tenant="clinic").tags

    def test_a_tier_that_the_router_does_not_promise_is_no_floor(self) -> None:
        with pytest.raises(PolicyError, match=r"'standard'.*economy, premium, exact"):
            floored({"floor": "standard", "tenants": ["clinic"]}, router=self.router(tiny_model()))

    def test_a_policy_that_only_adds_floors_leaves_the_tiers_to_the_router(self, tmp_path: Path) -> None:
        plain = tiny_model()
        save_router(self.router(plain), tmp_path / "router")
        file = tmp_path / "floors.toml"
        file.write_text(
            'cost_ceiling = 1.1\nprotected = [0, -1]\n[[floors]]\nname = "own"\nfloor = "exact"\ntenants = ["clinic"]\n'
        )
        model = PolarModel(plain.loaded, policy=file, router=tmp_path / "router", ledger=None)
        assert model.tiers == ("economy", "premium", "exact")
        assert model.policy.cost_ceiling == 1.1
        assert model.request("hello", compute="economy", tenant="clinic").tags[FLOOR_TAG] == "own"


@pytest.mark.parametrize(
    ("rule", "said"),
    [
        ({"floor": "gold", "tenants": ["a"]}, ["'own'", "'gold'", "economy"]),
        ({"floor": "exact"}, ["'own'", "tenants, keys, tags, system, tools or a topic"]),
        ({"floor": "exact", "tenants": []}, ["'own'", "no request"]),
        ({"floor": "exact", "topic": {"examples": []}}, ["topic", "at least 5"]),
        ({"floor": "exact", "topic": {"examples": ["a"]}}, ["there are 1"]),
        ({"floor": "exact", "team": "x"}, ["team"]),
        ({"tenants": ["a"]}, ["floor"]),
    ],
)
@pytest.mark.parametrize("form", ["json", "toml"])
def test_a_rule_that_cannot_be_is_one_clear_line(
    rule: dict[str, Any], said: list[str], form: str, tmp_path: Path
) -> None:
    file = tmp_path / f"policy.{form}"
    named = {"name": "own", **rule}
    lines = [f"{key} = {json.dumps(value)}".replace('{"examples": ', "{examples = ") for key, value in named.items()]
    file.write_text(json.dumps({"floors": [named]}) if form == "json" else "\n".join(["[[floors]]", *lines]))
    with pytest.raises(PolicyError) as caught:
        Policy.load(file)
    message = str(caught.value)
    assert all(part in message for part in said) and "\n" not in message and str(file) in message


def test_rules_that_do_not_go_together() -> None:
    with pytest.raises(PolicyError, match="two floors"):
        floored({"name": "a", "floor": "exact", "tools": True}, {"name": "a", "floor": "exact", "tenants": ["x"]})
    with pytest.raises(PolicyError, match="cannot be distinguished from other prompts"):
        floored({"floor": "exact", "topic": {"examples": ordinary_prompts()[:600:100]}})


def test_what_is_measured_has_no_floor() -> None:
    model = scripted_model(lambda _: "yes")
    floor = Floor(name="all", floor="exact", tenants=("*",))
    other = PolarModel(model.loaded, policy=tiny_policy(6).model_copy(update={"floors": (floor,)}), ledger=None)
    program = Program.parse("0 3-5")
    assert other.greedy_answers(["abc"], max_tokens=4, program=program) == tiny_model().greedy_answers(
        ["abc"], max_tokens=4, program=program
    )
