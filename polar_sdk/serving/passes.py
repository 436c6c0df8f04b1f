"""Passes: one run of the model over chunks of several prompts, or over the next token of several rows and their drafts.

The caller of a pass states which jobs are in it. What it executed is charged however it ends, and an error while a
token is chosen ends only that token's job. Knows jobs and logits; no queue, no places and no limits.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import repeat
from typing import TYPE_CHECKING

import torch

from polar_sdk.engine.draft_head import MAX_GUESSES
from polar_sdk.engine.forward import drafted_logits, next_logits
from polar_sdk.engine.sampling import likeliest_tokens, near_ties
from polar_sdk.serving.drafts import Experience
from polar_sdk.serving.pass_costs import MAX_ROWS, DraftedRow, planned

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from torch import Tensor

    from polar_sdk.engine.decoder import Decoder
    from polar_sdk.engine.draft_head import Guess
    from polar_sdk.serving.job import Job


Charge = Callable[[Sequence["Job"]], None]
"""Called with the jobs of a pass, whether it ended or failed."""


class Passes:
    """Runs passes of one model, one after another."""

    def __init__(self, decoder: Decoder) -> None:
        self.decoder = decoder
        self.drafting = Experience()
        """Experience with drafts so far."""
        self.sampled_tokens = 0
        """Tokens chosen so far."""
        self._token = sum(cost.linear for cost in decoder.cost.layers) + decoder.cost.head
        """FLOPs of decoding one token at full depth."""

    def rows(self, jobs: Iterable[Job], pieces: Iterable[Sequence[int]] | None = None) -> dict[str, float]:
        """How many rows decode for each tenant, those of drafts included; each counts by its share of full depth."""
        rows: dict[str, float] = {}
        for job, piece in zip(jobs, repeat((0,)) if pieces is None else pieces, strict=False):
            share = len(piece) * job.row.work.next_token(job.row.length + 1) / self._token
            rows[job.request.tenant] = rows.get(job.request.tenant, 0.0) + share
        return rows

    def read(
        self, jobs: Sequence[Job], chunks: Sequence[Sequence[int]], charge: Charge, keep: Callable[[Job], None]
    ) -> None:
        """Run the next chunk of the prompt of each job; those whose prompt ends there have their first token then.

        `keep` is called with each job whose prompt has run, before it has a token.
        """
        for job in jobs:
            job.begin_ns = job.begin_ns or time.perf_counter_ns()
        again = [job.row.replaying for job in jobs]
        ends = [job.row.length + len(chunk) == len(job.request.tokens) for job, chunk in zip(jobs, chunks, strict=True)]
        scored = {
            index: partial(_score, job)
            for index, job in enumerate(jobs)
            if job.request.prompt_logprobs is not None and not again[index]
        }
        try:
            logits = next_logits(self.decoder, [job.row for job in jobs], chunks, ends, scored)
        finally:
            charge(jobs)
        ended = [(job, replayed) for job, end, replayed in zip(jobs, ends, again, strict=True) if end]
        for job, replayed in zip(jobs, again, strict=True):
            if replayed:
                job.row.note_replay()
        sampling = [index for index, (_, replayed) in enumerate(ended) if not replayed]
        new = [ended[index][0] for index in sampling]
        self._choose(new, logits[sampling] if len(new) < len(ended) else logits, keep)

    def decode(self, jobs: Sequence[Job], charge: Charge) -> dict[str, float]:
        """Run the next token of each job, and drafts as far as rows are idle; returns the rows that ran, see `rows`."""
        pieces = self._drafted(jobs)
        rows, count = self.rows(jobs, pieces), sum(map(len, pieces))
        began = time.perf_counter()
        run = next_logits if count == len(jobs) else drafted_logits
        try:
            logits = run(self.decoder, [job.row for job in jobs], pieces)
        finally:
            charge(jobs)
        if count == len(jobs):
            self._choose(jobs, logits)  # only now a GPU has done what it was asked for
        else:
            self._judge(jobs, pieces, logits)
        self.drafting.costs.measured(count, (time.perf_counter() - began) * count / sum(rows.values()))
        return rows

    def _drafted(self, jobs: Sequence[Job]) -> list[list[int]]:
        """The tokens that each job runs next: the one sampled last, and drafts as far as rows are idle and it pays."""
        pieces = [job.tokens[-1:] for job in jobs]
        idle, costs = MAX_ROWS - len(jobs), self.drafting.costs
        if idle <= 0:
            return pieces
        guesses = self._guessed({job: job.look_up_drafts(idle, self.drafting) for job in jobs})
        proposals = [
            [] if job.drafts is None else job.drafts.propose(guesses.get(job, []), costs).tokens for job in jobs
        ]
        if any(proposals):
            counts = planned([DraftedRow() if job.drafts is None else job.drafts.row for job in jobs], costs)
            for job, piece, proposal, drafted in zip(jobs, pieces, proposals, counts, strict=True):
                piece.extend(proposal[:drafted])
                if job.drafts is not None and not drafted:
                    job.drafts.passed(costs)
        for job, piece in zip(jobs, pieces, strict=True):
            job.row.work.guess(len(guesses.get(job, [])), len(piece) - 1)
        return pieces

    def _guessed(self, counts: Mapping[Job, int]) -> dict[Job, list[Guess]]:
        """Guesses of the draft head for jobs, at most N tokens for each, as far as all may be right."""
        asking = [job for job, count in counts.items() if count]
        if self.decoder.draft_head is None or not asking:
            return {}
        began = time.perf_counter()
        states = torch.cat([job.row.states for job in asking if job.row.states is not None])
        most = min(MAX_GUESSES, max(counts.values()))
        guesses = self.decoder.guess(states, [job.tokens[-1] for job in asking], most)
        self.drafting.costs.guessed(len(guesses[0]), time.perf_counter() - began)
        return dict(zip(asking, guesses, strict=True))

    def _judge(self, jobs: Sequence[Job], pieces: Sequence[Sequence[int]], logits: Tensor) -> None:
        """The next tokens of each job of a pass with drafts, from logits (N, V); errors as in `_choose`."""
        likeliest, highest = likeliest_tokens(logits)
        sure = all(job.row.independent for job in jobs)
        unsure = [False] * len(highest) if sure else near_ties(logits, highest, self.decoder.dtype)
        start = 0
        for job, piece in zip(jobs, pieces, strict=True):
            own = slice(start, start + len(piece))
            results = (logits[own], likeliest[own], highest[own], unsure[own])
            attempt([job], partial(job.judge, piece, *results, self.drafting, self._count_token))
            start += len(piece)

    def _choose(self, jobs: Sequence[Job], logits: Tensor, keep: Callable[[Job], None] | None = None) -> None:
        """The next token of each job from logits (B, V); an error, such as of a caller's hook, ends its job alone."""
        if not jobs:
            return
        for row, (job, likeliest, logit) in enumerate(zip(jobs, *likeliest_tokens(logits), strict=True)):
            if job.done:  # its prompt could not be scored
                continue
            if keep is not None and not job.tokens and math.isfinite(logit):
                keep(job)
            self._count_token()
            attempt([job], partial(job.choose, logits[row], likeliest, logit))

    def _count_token(self) -> None:
        """A token is about to be chosen, and its caller has not heard of it yet."""
        self.sampled_tokens += 1


def _score(job: Job, states: Tensor) -> None:
    """Score a part of a prompt; an error ends its job alone."""
    attempt([job], partial(job.score_prompt, states))


def attempt(jobs: Sequence[Job], run: Callable[[], None]) -> None:
    """Run something for jobs; an error ends them, and no others."""
    try:
        run()
    except BaseException as error:  # handed to the callers, whatever it is; the thread goes on serving others
        for job in jobs:
            if not job.done:
                job.fail(error)
