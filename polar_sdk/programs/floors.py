"""Floors: rules that set the lowest tier for certain requests, whatever their callers ask for.

A rule names tenants, API keys, tags, system prompts, the use of tools or a topic. If a request matches all that the
rule names, no tier below the floor serves it, no program by hand that no tier from the floor up runs, and no cheaper
offer of a budget. Knows the content of a rule, not how a request is read (`request.floors`) or a topic recognised
(`router.topic`).
"""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Annotated, Final, Self

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

TIERS: Final = ("economy", "standard", "premium", "exact")
"""From the cheapest to full depth."""
TOOLS_OFFERED: Final = "You can call these functions:"
"""How a system message begins to describe tools."""
FEWEST_EXAMPLES: Final = 5
Text = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1)]
_CONDITIONS: Final = ("tenants", "keys", "tags", "system", "tools", "topic")


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Topic(_Frozen):
    """A topic, by examples of requests that are about it."""

    examples: tuple[Text, ...]
    unlike: tuple[Text, ...] = ()
    """Requests that look similar but are not about it."""

    @model_validator(mode="after")
    def _has_examples(self) -> Self:
        if len(self.examples) < FEWEST_EXAMPLES:
            raise ValueError(
                f"a topic is recognised by its examples, but there are {len(self.examples)}; give at "
                f"least {FEWEST_EXAMPLES}"
            )
        return self


class Floor(_Frozen):
    """One rule. Of each list one entry is enough; `*` and `?` in tenants and tags stand for any text and character."""

    name: Text
    """Name of the rule, as usage records and answers show it."""
    floor: str
    """The lowest tier that may serve such requests; `exact` = full depth."""
    tenants: tuple[Text, ...] = ()
    keys: tuple[Text, ...] = ()
    """Ids of API keys, which `polar serve` notes in the tag `key`."""
    tags: dict[str, Text] = Field(default_factory=dict)
    """Tag → value; all of them."""
    system: tuple[Text, ...] = ()
    """Texts that a system message contains, whatever their case and spacing."""
    tools: bool = False
    """Whether the rule is only for requests that offer tools."""
    topic: Topic | None = None

    @model_validator(mode="after")
    def _says_when_and_what(self) -> Self:
        if self.floor not in TIERS:
            raise ValueError(f"floor {self.name!r} names the tier {self.floor!r}; use one of {', '.join(TIERS)}")
        if not any(getattr(self, condition) for condition in _CONDITIONS):
            raise ValueError(
                f"floor {self.name!r} applies to no request; name {', '.join(_CONDITIONS[:-1])} or a topic"
            )
        return self

    def allows(self, tier: str) -> bool:
        """Whether that tier is not below the floor."""
        return tier in TIERS and TIERS.index(tier) >= TIERS.index(self.floor)

    def names(self, tenant: str, tags: Iterable[Mapping[str, str]]) -> bool:
        """Whether tenant, keys and tags of a request are those of the rule.

        Args:
            tenant: The request's.
            tags: The tags that it could have: none of them takes it out of a rule that another puts it in.
        """
        held: dict[str, list[str]] = {}
        for some in tags:
            for name, value in some.items():
                held.setdefault(name, []).append(value)
        if self.tenants and not any(fnmatchcase(tenant, pattern) for pattern in self.tenants):
            return False
        if self.keys and not set(self.keys) & set(held.get("key", ())):
            return False
        return all(any(fnmatchcase(value, p) for value in held.get(name, ())) for name, p in self.tags.items())


def strictest(floors: Iterable[Floor]) -> Floor | None:
    """The highest of some floors, the first of equals; None if there are none."""
    return max(floors, key=lambda floor: TIERS.index(floor.floor), default=None)
