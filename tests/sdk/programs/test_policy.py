"""The policy: its bounds, its files, its tiers; each refusal names the value, the limit and the fix."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from polar_sdk.errors import (
    CostCeilingError,
    PolicyError,
    ProgramDepthError,
    ProgramError,
    ProtectedLayerError,
    UnknownTierError,
    VisitLimitError,
)
from polar_sdk.programs.cost import CostModel, LayerCost
from polar_sdk.programs.floors import TIERS
from polar_sdk.programs.policy import Policy, Tier
from polar_sdk.programs.program import Program
from polar_sdk.router.store import find_policy
from polar_sdk.testing import tiny_model, tiny_policy

if TYPE_CHECKING:
    from pathlib import Path

DEPTH = 10
COST = CostModel(layers=(LayerCost(linear=1000, attention=10),) * DEPTH, head=5000)
OPEN = Policy(protected=(), max_visits=4096, cost_ceiling=float("inf"))


def open_but(**bounds: object) -> Policy:
    return OPEN.model_copy(update=bounds)


class TestBounds:
    def test_default_policy(self) -> None:
        policy = Policy()
        assert (policy.protected, policy.max_visits, policy.cost_ceiling) == ((0, 1, -1), 3, 1.15)
        assert policy.default_tier is None
        policy.check(Program.identity(DEPTH), COST)
        policy.check(Program.skipping(DEPTH, range(2, 9)), COST)

    @pytest.mark.parametrize("skipped", [0, 1, 9])
    def test_protected_layers(self, skipped: int) -> None:
        with pytest.raises(ProtectedLayerError, match=f"layer {skipped},.*0, 1, -1"):
            Policy().check(Program.skipping(DEPTH, [skipped]), COST)

    def test_protected_counts_from_the_last_layer(self) -> None:
        policy = open_but(protected=(-2,))
        policy.check(Program.skipping(DEPTH, [9]), COST)
        with pytest.raises(ProtectedLayerError, match="skips layer 8"):
            policy.check(Program.skipping(DEPTH, [8]), COST)

    def test_most_visits(self) -> None:
        policy = open_but(max_visits=3)
        policy.check(Program.looping(DEPTH, {4: 3}), COST)
        with pytest.raises(VisitLimitError, match=r"'0-3 4x4 5-9'.*4 times; at most 3"):
            policy.check(Program.looping(DEPTH, {4: 4}), COST)

    def test_beyond_the_model(self) -> None:
        with pytest.raises(ProgramDepthError, match=r"layer 10 .*10 layers"):
            OPEN.check(Program.identity(11), COST)

    def test_permissive_allows_any_path(self) -> None:
        Policy.permissive().check(Program.of([9, 0, 9, 9, 9, 9, 9]), COST)


class TestCostCeiling:
    """The ceiling holds at 128 prompt and 64 output tokens, head included."""

    @staticmethod
    def ratio(program: Program) -> float:
        def flops(visits: int) -> int:
            prefill = (visits - 1) * (1000 * 128 + 10 * 128 * 128) + 1000 + 10 * 128
            decode = sum(1000 + 10 * (128 + step) for step in range(1, 64))
            return prefill + visits * decode + 5000 * 64

        return flops(len(program)) / flops(DEPTH)

    @given(st.integers(1, 3 * DEPTH), st.floats(0.05, 4))
    def test_arithmetic(self, visits: int, ceiling: float) -> None:
        program = Program.of([visit % DEPTH for visit in range(visits)])
        policy = open_but(cost_ceiling=ceiling)
        if self.ratio(program) > ceiling:
            with pytest.raises(CostCeilingError, match=re.escape(f"{self.ratio(program):.4g} × identity")):
                policy.check(program, COST)
        else:
            policy.check(program, COST)

    def test_identity_is_never_too_expensive_at_one(self) -> None:
        open_but(cost_ceiling=1.0).check(Program.identity(DEPTH), COST)


class TestTiers:
    policy = tiny_policy(6)

    @pytest.mark.parametrize(
        ("tier", "name", "program"),
        [
            ("economy", "economy", "0 3-5"),
            ("standard", "standard", "0 2-5"),
            ("premium", "premium", "0-5"),
            ("exact", "exact", "0-5"),
            (None, "standard", "0 2-5"),
        ],
    )
    def test_programs(self, tier: str | None, name: str, program: str) -> None:
        assert self.policy.program_for(tier, 6) == (name, Program.parse(program))

    def test_without_tiers_only_full_depth(self) -> None:
        assert Policy().program_for(None, 6) == (None, Program.identity(6))
        assert Policy().program_for("exact", 6) == ("exact", Program.identity(6))
        with pytest.raises(UnknownTierError, match=r"'economy'.*exact"):
            Policy().program_for("economy", 6)

    @pytest.mark.parametrize(
        ("tier", "meant"), [("econmy", "economy"), ("Standard", "standard"), ("premum", "premium"), ("exakt", "exact")]
    )
    def test_a_suggestion_for_a_slip(self, tier: str, meant: str) -> None:
        with pytest.raises(UnknownTierError, match=f"{tier!r}.*economy, standard, premium, exact.*{meant!r}"):
            self.policy.program_for(tier, 6)

    @pytest.mark.parametrize("tier", ["", "xyzzy"])
    def test_no_suggestion_where_nothing_is_near(self, tier: str) -> None:
        with pytest.raises(UnknownTierError) as caught:
            self.policy.program_for(tier, 6)
        assert "mean" not in str(caught.value)

    def test_a_tier_that_is_no_text(self) -> None:
        with pytest.raises(UnknownTierError, match="5"):
            self.policy.program_for(5, 6)  # type: ignore[arg-type]


policies = st.builds(
    Policy,
    model=st.none() | st.text(st.characters(codec="utf-8"), max_size=20),
    fingerprint=st.none() | st.text("0123456789abcdef", min_size=64, max_size=64),
    protected=st.lists(st.integers(-5, 5), max_size=4).map(tuple),
    max_visits=st.integers(1, 4096),
    cost_ceiling=st.floats(0.01, 100) | st.just(float("inf")),
    tiers=st.dictionaries(
        st.sampled_from(TIERS),
        st.builds(
            Tier,
            program=st.lists(st.integers(0, 40), min_size=1, max_size=20).map(lambda path: Program(tuple(path))),
            note=st.text(st.characters(codec="utf-8"), max_size=20),
        ),
    ),
)


class TestFiles:
    @given(policies)
    def test_round_trip(self, tmp_path_factory: pytest.TempPathFactory, policy: Policy) -> None:
        path = tmp_path_factory.mktemp("policy") / "made" / "on" / "the" / "way.json"
        policy.save(path)
        assert Policy.load(path) == policy

    def test_programs_stand_as_text(self, tmp_path: Path) -> None:
        tiny_policy(6).save(tmp_path / "p.json")
        stored = json.loads((tmp_path / "p.json").read_text(encoding="utf-8"))
        assert stored["tiers"]["economy"]["program"] == "0 3-5"

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (b"{", "line 1"),
            (b"\xff\xfe{}", "byte 0"),
            (b"[]", "file:"),
            (b'{"max_visits": 0}', "max_visits:"),
            (b'{"cost_ceiling": -1}', "cost_ceiling:"),
            (b'{"cost_ceiling": NaN}', "cost_ceiling:"),
            (b'{"most_visits": 3}', "most_visits:"),
            (b'{"tiers": {"cheap": {"program": "0-5"}}}', "'cheap'"),
            (b'{"tiers": {"economy": {"program": "0-x"}}}', "tiers.economy.program:"),
            (b'{"tiers": {"economy": {"program": 5}}}', "tiers.economy.program:"),
            (b'{"tiers": {"economy": {"program": [0, 1.5]}}}', "tiers.economy.program:"),
            (b'{"tiers": {"economy": {}}}', "tiers.economy.program:"),
            (b'{"default_tier": "economy"}', "default_tier 'economy'"),
        ],
    )
    def test_malformed(self, tmp_path: Path, content: bytes, message: str) -> None:
        path = tmp_path / "wrong.json"
        path.write_bytes(content)
        with pytest.raises(PolicyError) as caught:
            Policy.load(path)
        assert message in str(caught.value)
        assert "wrong.json" in str(caught.value)
        assert "\n" not in str(caught.value)

    def test_missing(self, tmp_path: Path) -> None:
        for path in (tmp_path / "absent.json", tmp_path):
            with pytest.raises(PolicyError, match=path.name):
                Policy.load(path)


class TestBinding:
    def test_wrong_fingerprint(self) -> None:
        policy = Policy(model="another", fingerprint="f" * 64)
        with pytest.raises(PolicyError, match=r"another .*ffffffffffff"):
            tiny_model(policy=policy)

    def test_right_fingerprint(self) -> None:
        fingerprint = tiny_model().fingerprint
        assert tiny_model(policy=Policy(fingerprint=fingerprint)).policy.fingerprint == fingerprint

    @pytest.mark.parametrize(
        ("bounds", "program", "error"),
        [
            ({}, "0-6", ProgramDepthError),
            ({}, "1-5", ProtectedLayerError),
            ({}, "0-2 3x4 4-5", VisitLimitError),
            ({"cost_ceiling": 0.5}, "0-5", CostCeilingError),
        ],
    )
    def test_a_tier_that_breaks_the_bounds(
        self, bounds: dict[str, float], program: str, error: type[ProgramError]
    ) -> None:
        policy = Policy.model_validate({**bounds, "tiers": {"economy": {"program": program}}})
        with pytest.raises(error):
            tiny_model(policy=policy)

    def test_a_path_is_read(self, tmp_path: Path) -> None:
        tiny_policy(6).save(tmp_path / "mine.json")
        assert tiny_model(policy=str(tmp_path / "mine.json")).policy == tiny_policy(6)


class TestStore:
    """The caller's policy, else the user's own for this model, else the shipped one, else plain bounds."""

    @pytest.fixture(autouse=True)
    def own_cache(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("POLAR_CACHE", str(tmp_path / "cache"))

    def test_plain_bounds_for_an_unknown_model(self) -> None:
        assert find_policy(None, "0" * 64) == Policy()

    def test_the_callers_policy_wins(self) -> None:
        mine = Policy(max_visits=1)
        assert find_policy(mine, "0" * 64) is mine

    def test_every_shipped_policy_is_sound(self) -> None:
        from importlib import resources

        for file in (resources.files("polar_sdk") / "shipped" / "policies").iterdir():
            if file.name.endswith(".json"):
                stored = json.loads(file.read_text(encoding="utf-8"))
                policy = Policy.shipped(stored["fingerprint"])
                assert policy is not None
                assert policy.model is not None
                assert set(policy.tiers) == set(TIERS)
                assert policy.tiers["exact"].program.is_identity(len(policy.tiers["exact"].program))


def test_protecting_a_layer_that_does_not_exist_is_an_error() -> None:
    with pytest.raises(PolicyError, match=r"layer 40,.*6 layers"):
        tiny_model(policy=Policy(protected=(40,)))


def test_the_exact_tier_is_full_depth() -> None:
    policy = Policy(protected=(), tiers={"exact": Tier(program=Program.parse("0 2-5"))})
    with pytest.raises(PolicyError, match="0-5"):
        tiny_model(policy=policy)
