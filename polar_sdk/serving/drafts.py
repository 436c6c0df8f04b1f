"""Drafts: tokens that are likely to follow, run together with the one sampled last.

They are kept only as far as they are what would have been sampled anyway. A pass over a few rows takes little longer
than one over a single row, since most of its time goes into reading the weights. So tokens copied from after an earlier
occurrence of the last ones, in prompt, answer or earlier answers to the tenant, or guessed by the model's draft head,
may yield several tokens at once; an answer is the same with and without drafts. Drafts that are not kept were executed
nevertheless. So drafts fill only rows that would be idle, and `auto` drafts only where it pays, by how often drafts of
this request were right, and by the measured time of guesses and wider passes. Knows tokens and seconds; no logits and
no weights.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from itertools import accumulate
from operator import mul
from typing import TYPE_CHECKING, Final, Literal, NamedTuple

from polar_sdk.engine.draft_head import MAX_GUESSES
from polar_sdk.serving.pass_costs import DraftedRow, PassCosts
from polar_sdk.serving.prefixes import common_start

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from polar_sdk.engine.draft_head import Guess
    from polar_sdk.engine.sampling import Sampling
    from polar_sdk.programs.cost import CostModel
    from polar_sdk.programs.program import Program


Speculate = Literal["auto", "off", "prompt"]
MAX_DRAFT: Final = 11
"""Maximum number of tokens drafted at a time for one row."""
LONGEST_MATCH: Final = 3
"""Number of tokens that must have stood in a row before, at best; else one fewer, and so on."""
FREE_WASTE: Final = 8
WASTE_PER_TOKEN: Final = 2
"""Rows that a request may waste, and further rows per answer token; what budgets hold follows from these."""
Source = Literal["request", "earlier", "head"]
"""Source of drafts: prompt and answer so far, an earlier answer to the tenant, or the model's draft head."""
_HITS: Final[dict[Source, tuple[float, ...]]] = {
    "request": (0.75, 0.2, 0.4, 0.6),
    "earlier": (0.5, 0.15, 0.25, 0.45),
    "head": (1.0,),
}
"""Share of drafted tokens taken to be right before any was tried: of tokens after one that was right, and of first ones
after a match of 1, 2 and 3 tokens; of a draft head, as a multiple of what it says."""
_FIRST_WEIGHT: Final = 4.0
"""Number of tries that these count for; in a request, what earlier requests came to."""
_FADING: Final = 0.97
"""Weight of a try when one more was made."""
_CERTAIN_GAIN: Final = 2.5
"""Gain of a draft from texts, in tokens for its time, from which the draft head is not asked."""
_MIN_JOINED: Final = 2
"""Number of tokens, the last guess among them, that must have stood in a row before, so that a text goes on from it."""
_HEAD_BEFORE: Final = (3.0, 1.0)
"""Tokens that a draft head is taken to have brought before it was tried, and passes that it took."""
_HEAD_FADING: Final = 0.95
_HEAD_WAIT: Final = 8
"""Tokens for which a head that does not pay is not asked, at first."""
_EARLIER_TOKENS: Final = 8192
_EARLIER_TENANTS: Final = 16
"""Tokens per tenant, at most twice this number, and tenants, whose earlier answers are kept; 4 MiB for each tenant."""
_PROBE_AFTER: Final = 32
"""A request whose drafts do not pay tries again after this number of tokens, then after twice as many each time, …"""
_MAX_PATIENCE: Final = 1024
"""… up to this number."""


class Proposal(NamedTuple):
    """Tokens that may follow: guesses of a draft head, tokens of a text, or guesses and what a text says after them."""

    tokens: list[int]
    match: int = 0
    """Number of tokens in a row that stood before those of the text; 0 = there are none."""
    source: Source = "request"
    """Source of these."""
    said: tuple[float, ...] = ()
    """How likely each of the guesses, the first tokens, is by the draft head, if all before it are right."""
    chances: Sequence[float] = ()
    """How likely it is that each of the tokens is kept."""
    gain: float = 1.0
    """How much faster the row comes by it."""


class TokenIndex:
    """Index of where the last few tokens stood before."""

    def __init__(self) -> None:
        self._tokens: list[int] = []
        self._after: tuple[dict[tuple[int, ...], int], ...] = tuple({} for _ in range(LONGEST_MATCH))
        """By number of tokens in a row: where the token stands that last followed them."""

    def __len__(self) -> int:
        return len(self._tokens)

    def extend(self, tokens: Sequence[int]) -> None:
        """Add tokens at the end."""
        for token in tokens:
            end = len(self._tokens)
            for length in range(1, min(LONGEST_MATCH, end) + 1):
                self._after[length - 1][tuple(self._tokens[end - length :])] = end
            self._tokens.append(token)

    @property
    def last(self) -> list[int]:
        """The last tokens, as many as may match."""
        return self._tokens[-LONGEST_MATCH:]

    def propose(self, count: int) -> Proposal:
        """Tokens after the last place where the last tokens stood before; a repetition goes on repeating."""
        proposal = self.following(self.last, count)
        followed = proposal.tokens
        while followed and len(followed) < count:  # they reach to the end, and are taken to go on as they began
            followed += followed[: count - len(followed)]
        return proposal

    def following(self, last: Sequence[int], count: int, least: int = 1) -> Proposal:
        """Tokens after the last place where such tokens stood, as many as match, `least` of them; at most `count`."""
        for length in range(min(LONGEST_MATCH, len(last)), least - 1, -1):
            start = self._after[length - 1].get(tuple(last[-length:]))
            if start is not None:
                return Proposal(self._tokens[start : start + count], length)
        return Proposal([], 0)


class OtherAnswers:
    """The latest other answers to the same tenant, by what follows the same tokens.

    Tenants never share them, so that how fast one's answers come reveals nothing of another's. For the scheduler's
    thread alone.
    """

    def __init__(self) -> None:
        self._of: OrderedDict[str, deque[TokenIndex]] = OrderedDict()
        """By tenant, the least recent first: answers of late, and those before."""

    def add(self, tenant: str, prompt: Sequence[int], answer: Sequence[int]) -> None:
        """Keep an answer; with the end of its prompt, so that its first tokens are found as well."""
        indexes = self._of.setdefault(tenant, deque([TokenIndex()], maxlen=2))
        self._of.move_to_end(tenant)
        if len(indexes[-1]) >= _EARLIER_TOKENS:
            indexes.append(TokenIndex())
        room = _EARLIER_TOKENS - len(indexes[-1])
        indexes[-1].extend([*prompt[-LONGEST_MATCH:], *answer][:room])
        if len(self._of) > _EARLIER_TENANTS:
            self._of.popitem(last=False)

    def following(self, tenant: str, last: Sequence[int], count: int) -> Proposal:
        """Tokens after such tokens in answers to that tenant; at most `count`."""
        found = [index.following(last, count) for index in reversed(self._of.get(tenant, ()))]
        longest = max(found, key=lambda proposal: proposal.match, default=Proposal([], 0))
        return longest._replace(source="earlier")


class _Share:
    """How often something was right, lately."""

    def __init__(self, share: float) -> None:
        self._right, self._tries = share * _FIRST_WEIGHT, _FIRST_WEIGHT

    @property
    def value(self) -> float:
        return self._right / self._tries

    def tried(self, right: bool, expected: float) -> None:
        self._right, self._tries = _FADING * self._right + right, _FADING * self._tries + expected


class Hits:
    """How often drafts are right, beginning with how often they were before."""

    def __init__(self, before: Hits | None = None) -> None:
        known = {} if before is None else before._shares
        self._shares: dict[Source, list[_Share]] = {
            source: [_Share(share) for share in ([each.value for each in known[source]] if known else shares)]
            for source, shares in _HITS.items()
        }

    def chances(self, proposal: Proposal) -> list[float]:
        """How likely it is that each of the proposed tokens is kept: less and less."""
        each = (min(share.value * expected, 1.0) for share, expected in self._expected(proposal))
        return list(accumulate(each, mul))

    def tried(self, proposal: Proposal, drafted: int, kept: int) -> None:
        """Note that of N drafted tokens of a proposal, the first `kept` were right."""
        tries = self._expected(proposal)[: min(kept + 1, drafted)]
        for place, (share, expected) in enumerate(tries):
            share.tried(place < kept, expected)

    def _expected(self, proposal: Proposal) -> list[tuple[_Share, float]]:
        """For each proposed token, if all before it are right: how often such ones are, and of what that is a share."""
        (guessed,) = self._shares["head"]
        of_text = len(proposal.tokens) - len(proposal.said)
        following, *first = self._shares[proposal.source]
        found = [(following if place else first[proposal.match - 1], 1.0) for place in range(of_text)]
        return [*((guessed, chance) for chance in proposal.said), *found]


class Drafts:
    """The drafts of one request.

    Args:
        prompt: Its tokens.
        speculate: `prompt` drafts wherever something in prompt or answer matches; `auto` only where that pays, and
            from other answers, too.
    """

    def __init__(self, prompt: Sequence[int], speculate: Speculate) -> None:
        self.always = speculate == "prompt"
        self._prompt, self._index = prompt, TokenIndex()
        self._hits: Hits | None = None
        self._best = Proposal([])
        self._from_texts: list[Proposal] = []
        self._room = 0
        self._head = _HeadWorth()
        self._guesses: Sequence[Guess] = ()
        self._alone = False
        """Whether the next pass runs one token, whatever matches: the last one did not settle what follows it."""
        self._wasted = 0
        self._idle, self._patience = 0, _PROBE_AFTER
        """Tokens since it drafted last, and how many to wait for the next try."""

    def look_up(self, answer: Sequence[int], room: int, experience: Experience, tenant: str) -> int:
        """Look in texts for tokens that may follow the answer so far.

        Args:
            answer: So far.
            room: How many may be drafted.
            experience: What requests so far came to.
            tenant: Whose request it is.

        Returns:
            How many tokens the draft head, if there is one, may guess besides: 0 if that does not pay.
        """
        if self._hits is None:
            self._hits = Hits(experience.hits)
        if not len(self._index):
            self._index.extend(self._prompt)
        self._index.extend(answer[len(self._index) - len(self._prompt) :])
        left = 0 if self._alone else FREE_WASTE + WASTE_PER_TOKEN * len(answer) - self._wasted - 1
        self._alone = False
        self._room = count = max(min(room, left, MAX_DRAFT), 0)
        found = [self._index.propose(count)] if count else []
        if found and not self.always:
            found.append(experience.others.following(tenant, self._index.last, count))
        self._from_texts = self._rated(found, experience.costs)
        if self.always or not count:
            return 0
        return count if self._head.take_turn() and _best(self._from_texts).gain < _CERTAIN_GAIN else 0

    def propose(self, guesses: Sequence[Guess], costs: PassCosts) -> Proposal:
        """Tokens that may follow the answer so far: what `look_up` found or the draft head guesses, by what gains most.

        Args:
            guesses: Of the draft head; none where it was not asked.
            costs: What passes take.
        """
        self._guesses = guesses
        self._best = _best([*self._from_texts, *self._rated(self._guessed(guesses[: self._room]), costs)])
        return self._best

    @property
    def row(self) -> DraftedRow:
        """The row as it is planned by what was proposed."""
        probes = self._idle >= self._patience and bool(self._best.tokens)
        return DraftedRow(self._best.chances, self.always, probes)

    def _rated(self, proposals: Iterable[Proposal], costs: PassCosts) -> list[Proposal]:
        assert self._hits is not None, "see `look_up`"
        rated = ((each, self._hits.chances(each)) for each in proposals if each.tokens)
        return [each._replace(chances=chances, gain=costs.gain(chances)) for each, chances in rated]

    def _guessed(self, guesses: Sequence[Guess]) -> Iterator[Proposal]:
        """Guesses, alone and as far as what stood before in prompt or answer goes on from them."""
        tokens, said = [guess.token for guess in guesses], tuple(guess.chance for guess in guesses)
        yield Proposal(tokens, source="head", said=said)
        for count in range(1, len(tokens) + 1):
            last = [*self._index.last, *tokens[:count]][-LONGEST_MATCH:]
            found = self._index.following(last, self._room - count, _MIN_JOINED)
            if found.tokens:
                yield found._replace(tokens=[*tokens[:count], *found.tokens], said=said[:count])

    def passed(self, costs: PassCosts) -> None:
        """The row decodes without drafts."""
        self._idle += 1
        self._head.brought(0, len(self._guesses), costs)

    def judged(self, drafted: int, brought: int, experience: Experience, *, settled: bool = True) -> None:
        """Note what came of a pass with drafts.

        Args:
            drafted: Number of drafted tokens.
            brought: Tokens that the pass brought: one, and one more for each drafted token that was right and ran on.
            experience: What other requests came to.
            settled: Whether the pass said which token follows the last one that it brought.
        """
        self._patience = min(2 * self._patience, _MAX_PATIENCE) if self.row.probes else _PROBE_AFTER
        self._idle = 0
        self._wasted += 1 + drafted - brought
        self._alone = not settled
        kept = max(brought - 1, 0)
        for hits in (experience.hits, self._hits):
            if hits is not None:
                hits.tried(self._best, drafted, kept)
        guessed = [guess.token for guess in self._guesses]
        right = common_start(guessed, self._best.tokens[:kept])
        self._head.brought(right, len(guessed), experience.costs)


def _best(rated: Sequence[Proposal]) -> Proposal:
    """The first of those that gain most."""
    return max(rated, key=lambda each: each.gain, default=Proposal([]))


class _HeadWorth:
    """Whether a draft head pays for a request: by the tokens that it brought lately and the time that it took."""

    def __init__(self) -> None:
        self._brought, self._took = _HEAD_BEFORE
        self._wait, self._patience = 0, _HEAD_WAIT
        """Turns that it still waits, and how many next time that it does not pay."""

    def take_turn(self) -> bool:
        """Whether it is asked this time; one that does not pay waits for some turns."""
        self._wait = max(self._wait - 1, 0)
        return not self._wait

    def brought(self, kept: int, guesses: int, costs: PassCosts) -> None:
        """Note that N of its guesses were kept; without guesses, nothing is learned."""
        if not guesses:
            return
        self._brought = _HEAD_FADING * self._brought + kept
        self._took = _HEAD_FADING * self._took + guesses * costs.guess
        if self._brought < self._took:
            self._wait, self._patience = self._patience, min(2 * self._patience, _MAX_PATIENCE)
        else:
            self._patience = _HEAD_WAIT


def drafts_of(
    prompt: Sequence[int], speculate: Speculate | None, sampling: Sampling, *, exact: bool, repeats: bool
) -> Drafts | None:
    """The drafts of a request, or None.

    `auto` leaves a sampled answer with a seed alone where it might not repeat: when a pass is wide depends on the time
    that others took.

    Args:
        prompt: Its tokens.
        speculate: How it drafts; None = as `auto` where passes of any size compute the same.
        sampling: How its tokens are chosen.
        exact: Whether they do, to the bit.
        repeats: Whether they do, or so nearly that it does not show.
    """
    if speculate is None:
        speculate = "auto" if exact else "off"
    seeded = sampling.temperature > 0 and sampling.seed is not None
    if speculate == "off" or (speculate == "auto" and seeded and not repeats):
        return None
    return Drafts(prompt, speculate)


class Experience:
    """Experience of a scheduler from all requests so far: what passes take, how often drafts are right, and answers."""

    def __init__(self) -> None:
        self.costs, self.hits, self.others = PassCosts(), Hits(), OtherAnswers()


def most_wasted(cost: CostModel, program: Program, prompt: int, output: int) -> int:
    """FLOPs that drafts of a request can execute beyond what its answer needs, at most."""
    costs = [cost.step(step) for step in program]
    linear, attention = sum(each.linear for each in costs), sum(each.attention for each in costs)
    rows = FREE_WASTE + WASTE_PER_TOKEN * output
    whole = linear + attention * (prompt + output) + cost.head
    # A token that is kept was counted over the keys of the whole pass, too.
    return rows * whole + output * (MAX_DRAFT * attention + MAX_GUESSES * cost.guess)
