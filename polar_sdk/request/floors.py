"""The floor that applies to a request, by its tenant, tags and prompt.

Knows how a prompt is read; what a rule says is in `programs.floors`, and how it is enforced in `maker`.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from polar_sdk.errors import PolicyError
from polar_sdk.programs.floors import TOOLS_OFFERED, strictest
from polar_sdk.router.topic import Texts, TopicGate, ordinary_prompts

if TYPE_CHECKING:
    from collections.abc import Sequence

    from polar_sdk.engine.decoder import Decoder
    from polar_sdk.programs.floors import Floor
    from polar_sdk.request.encoder import PromptEncoder
    from polar_sdk.request.options import Prompt, Template

FLOOR_TAG: Final = "polar.floor"
"""Tag of the usage record of a request that a floor applied to: the name of the rule."""
RAISED_TAG: Final = "polar.raised_from"
"""Tag of one that it raised: the tier, tolerance or program that was asked for."""
_SYSTEM: Final = ("system", "developer")
_LEAST_FOUND: Final = 0.5


@dataclass(frozen=True)
class FloorRules:
    """The floors of one model object, ready to be looked up.

    Attributes:
        floors: The rules.
        encoder: Reads prompts.
        gates: Gates of the rules with a topic, by name.
    """

    floors: tuple[Floor, ...]
    encoder: PromptEncoder
    gates: Mapping[str, TopicGate] = field(default_factory=dict)

    @classmethod
    def made(
        cls, floors: Sequence[Floor], tiers: Sequence[str], encoder: PromptEncoder, decoder: Decoder
    ) -> FloorRules:
        """Rules for a model that offers these tiers.

        Raises:
            PolicyError: Two rules have one name, one names a tier that the model does not offer, or the examples of a
                topic do not tell it from other prompts.
        """
        gates: dict[str, TopicGate] = {}
        topics = any(floor.topic is not None for floor in floors)
        texts = Texts(decoder, [encoder.plain(text) for text in ordinary_prompts()] if topics else [])
        for place, floor in enumerate(floors):
            if any(floor.name == other.name for other in floors[:place]):
                raise PolicyError(f"two floors have the name {floor.name!r}; give each its own.")
            if floor.floor not in tiers:
                raise PolicyError(
                    f"floor {floor.name!r} names the tier {floor.floor!r}, which this model does not offer; "
                    f"use one of {', '.join(tiers)}."
                )
            if floor.topic is not None:
                gates[floor.name] = _gate(floor, encoder, texts)
        return cls(tuple(floors), encoder, gates)

    def of(
        self,
        prompt: Prompt,
        tokens: Sequence[int],
        template: Template,
        tenant: str,
        tags: Sequence[Mapping[str, str]],
        *,
        tools: bool = False,
    ) -> Floor | None:
        """The highest floor that applies to a request, or None.

        Args:
            prompt: As the caller gave it.
            tokens: The same, encoded.
            template: As it is encoded.
            tenant: Who is billed.
            tags: Of the model object, and of the request.
            tools: Whether the model's chat template shows tools; where it shows none, a system message does.
        """
        named = [floor for floor in self.floors if floor.names(tenant, tags)]
        if any(floor.system or floor.tools for floor in named):
            system = _even(self._system_text(prompt, tokens, template))
            offered = tools or _even(TOOLS_OFFERED) in system
            named = [floor for floor in named if (offered or not floor.tools) and _is_in(floor, system)]
        if any(floor.topic is not None for floor in named):
            said = self._said(prompt, tokens)
            named = [floor for floor in named if floor.topic is None or self.gates[floor.name].about(said)]
        return strictest(named)

    def _said(self, prompt: Prompt, tokens: Sequence[int]) -> Sequence[int]:
        """Tokens of a prompt without those of the template, among which a short text would hardly show."""
        if isinstance(prompt, str):
            return self.encoder.plain(prompt)
        if prompt and isinstance(prompt[0], int):
            return tokens
        texts = [message.get("content") for message in prompt if isinstance(message, Mapping)]
        return self.encoder.plain("\n".join(text for text in texts if isinstance(text, str)))

    def _system_text(self, prompt: Prompt, tokens: Sequence[int], template: Template) -> str:
        """The system text of a prompt; all of one that its caller has rendered."""
        if isinstance(prompt, str):
            return prompt if template == "raw" or not self.encoder.has_chat_template else ""
        if prompt and isinstance(prompt[0], int):
            return str(self.encoder.tokenizer.decode(list(tokens)))
        return "\n".join(
            str(message["content"])
            for message in prompt
            if isinstance(message, Mapping) and message["role"].lower() in _SYSTEM
        )


def _is_in(floor: Floor, system: str) -> bool:
    return not floor.system or any(_even(text) in system for text in floor.system)


def _even(text: str) -> str:
    """The text without case, spacing, forms of letters and characters that nobody sees."""
    seen = "".join(each for each in unicodedata.normalize("NFKC", text) if unicodedata.category(each) != "Cf")
    return " ".join(seen.casefold().split())


def _gate(floor: Floor, encoder: PromptEncoder, texts: Texts) -> TopicGate:
    assert floor.topic is not None
    about, unlike = ([encoder.plain(text) for text in some] for some in (floor.topic.examples, floor.topic.unlike))
    gate = TopicGate.of(texts, about, unlike)
    if gate.found < _LEAST_FOUND:
        raise PolicyError(
            f"the topic of floor {floor.name!r} cannot be distinguished from other prompts: of its {len(about)} "
            f"examples, only {gate.found:.0%} are recognised by the others; give more of them, and more similar ones."
        )
    return gate
