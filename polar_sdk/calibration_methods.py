"""What `PolarModel` can do with data besides answering: fit bridges, search programs, and measure.

A mix-in, so that the class that serves stays small: heavy parts are imported when one of these methods is called.
Knows no framework and no money.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from polar_sdk.programs.program import Program
from polar_sdk.request.generation import answer
from polar_sdk.router.fixed import fixed_router
from polar_sdk.usage import NullSink

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from polar_sdk.lab.evaluation.calibrate import TierPromise
    from polar_sdk.lab.evaluation.results import Evaluation
    from polar_sdk.lab.items import Item
    from polar_sdk.lab.program_search.matrix import RewardMatrix
    from polar_sdk.lab.program_search.options import SearchResult
    from polar_sdk.lab.rewards.cache import RewardCache
    from polar_sdk.lab.training.settings import MenuSettings, PolicySettings
    from polar_sdk.lab.training.train import RouterKind
    from polar_sdk.models.load import LoadedModel
    from polar_sdk.request.prompts import PromptEncoder
    from polar_sdk.request.request import Prompt, RequestMaker
    from polar_sdk.router.base import Router
    from polar_sdk.router.bridge_set import BridgeSet
    from polar_sdk.router.features import FeatureKind
    from polar_sdk.router.learned import LearnedRouter

    Progress = Callable[[str, int, int], None]


def _silent(stage: str, done: int, total: int) -> None: ...


class CalibrationMethods:
    """Methods of `PolarModel` that take data sets."""

    _loaded: LoadedModel
    _encoder: PromptEncoder
    _maker: RequestMaker

    def heal(
        self,
        items: Sequence[Item] | None = None,
        segments: str = "",
        *,
        out: str | Path | None = None,
        cache: RewardCache | None = None,
        on_progress: Progress = _silent,
        **options: Any,
    ) -> BridgeSet:
        """Fit bridges over segments of layers, and use them from now on; see `polar_sdk.bridges.Healer`.

        Args:
            items: Prompts to fit on; None = those that come with the package.
            segments: First and last layers, such as `12-15,17-20`; groups that are not used together are parted by `;`.
            out: Folder to write the bridges to; checkpoints are kept there too.
            cache: Where full depth's answers to prompts are kept; None = in memory.
            on_progress: Called with (stage, steps done, steps in all).
            **options: Fields of `polar_sdk.bridges.HealOptions`.

        Raises:
            DataError: The data is empty or nothing but copies.
            BridgeError: A segment does not fit the model.
        """
        from polar_sdk.lab.bridges.heal import Healer, HealOptions

        chosen = HealOptions(**options)
        made = Healer(self, items, segments, chosen, out=out, cache=cache, on_progress=on_progress).run()  # type: ignore[arg-type]
        self._use(made)
        return made

    def load_bridges(self, path: str | Path) -> BridgeSet:
        """Use the bridges in a folder that `heal` wrote, beside those that the weights have already.

        Bridges belong to the weights, which all objects of one model in this process share. Load them before requests
        run: a request that crosses a segment while its bridge is replaced mixes the two.

        Raises:
            BridgeModelError: They were fitted for another model.
            BridgeDamagedError: A file is missing, altered or malformed.
        """
        found = self._read_bridges(path)
        self._use(found)
        return found

    def search(self, items: Sequence[Item] | None = None, **options: Any) -> SearchResult:
        """Search programs for several budgets and pick a menu; see `polar_sdk.search.Search`.

        Args:
            items: Prompts to search on; None = those that come with the package.
            **options: Fields of `polar_sdk.search.SearchOptions`, and `cache` and `on_progress` of `Search`.

        Raises:
            DataError: The data is empty, nothing but copies, or its labels are of one class.
        """
        from polar_sdk.lab.program_search.run import search

        return search(self, items, **options)  # type: ignore[arg-type]

    def train_router(
        self,
        rewards: RewardMatrix | str | Path,
        *,
        kind: RouterKind = "menu",
        items: Sequence[Item] | None = None,
        features: FeatureKind = "embedding",
        layers: int = 3,
        settings: MenuSettings | PolicySettings | None = None,
        out: str | Path | None = None,
        bridges: str | Path | None = None,
        on_progress: Progress = _silent,
    ) -> LearnedRouter:
        """Train a router on what programs do on prompts; it serves once it is calibrated.

        Args:
            rewards: The reward matrix of `search`, or its file.
            kind: `menu` chooses among the matrix's programs, `policy` layer by layer; `static` reads nothing.
            items: For `policy`: the items that were searched on; None = those that come with the package.
            features: `embedding`, or `early` to run the first layers and read their states.
            layers: Layers run for `early`.
            settings: How to train; None = as usual.
            out: Folder to write the router to; checkpoints are kept there until training is done.
            bridges: Folder of the bridges that the programs cross, to be written beside the router.
            on_progress: Called with (stage, steps done, steps in all).

        Raises:
            RouterModelError: The rewards were measured on another model or in another dtype.
            DataError: The matrix holds no train or no dev prompt, or its menu is identity alone.
        """
        from polar_sdk.lab.workflow import train_router

        return train_router(
            self,  # type: ignore[arg-type]
            rewards,
            kind=kind,
            items=items,
            features=features,
            layers=layers,
            settings=settings,
            out=out,
            bridges=bridges,
            on_progress=on_progress,
        )

    def calibrate(
        self,
        items: Sequence[Item] | None = None,
        *,
        router: Router | str | Path | None = None,
        tiers: Mapping[str, TierPromise] | None = None,
        delta: float = 0.1,
        out: str | Path | None = None,
        on_progress: Progress = _silent,
    ) -> LearnedRouter:
        """Certify what a router promises, on prompts it was not trained on.

        Args:
            items: Prompts; None = those that come with the package.
            router: A trained router or its folder; None = this model's.
            tiers: α, and what counts as lost (`differs`, `harms` or `drops`), by tier; None = the usual ones.
            delta: Most probability that a promise is wrong.
            out: Folder to write the certified router to; None, where `router` is a folder, writes it there.
            on_progress: Called with (stage, steps done, steps in all).

        Raises:
            CalibrationSizeError: A tier's α needs more prompts.
        """
        from polar_sdk.lab.workflow import calibrate_router

        return calibrate_router(
            self,  # type: ignore[arg-type]
            items,
            router=router,
            tiers=tiers,
            delta=delta,
            out=out,
            on_progress=on_progress,
        )

    def evaluate(
        self,
        data: Sequence[Item] | Mapping[str, Sequence[Item]] | None = None,
        *,
        router: Router | str | Path | None = None,
        points: Mapping[str, float] | None = None,
        timed: int = 8,
        seed: int = 0,
        on_progress: Progress = _silent,
    ) -> Evaluation:
        """Measure a router beside identity and honest controls, on prompts it has not seen.

        Args:
            data: Items, or several sets by name; None = the prompts that come with the package.
            router: A trained router or its folder; None = this model's.
            points: θ by name; None = the certified tiers. The first is compared with the controls.
            timed: Prompts that are timed.
            seed: Of the controls.
            on_progress: Called with (stage, steps done, steps in all).
        """
        from polar_sdk.lab.workflow import evaluate_router

        return evaluate_router(
            self,  # type: ignore[arg-type]
            data,
            router=router,
            points=points,
            timed=timed,
            seed=seed,
            on_progress=on_progress,
        )

    def prompt_tokens(self, prompt: Prompt) -> list[int]:
        """Token ids of a prompt as a request has them, chat template included."""
        return self._encoder.encode(prompt)

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of token ids, special tokens left out."""
        return str(self._loaded.tokenizer.decode(list(tokens), skip_special_tokens=True))

    def greedy_answers(
        self,
        prompts: Sequence[Prompt],
        *,
        max_tokens: int,
        program: Program | None = None,
        router: Router | None = None,
    ) -> list[tuple[int, ...]]:
        """Token ids of greedy answers, for calibration; not metered.

        Args:
            prompts: What to answer.
            max_tokens: Most tokens of each answer.
            program: What runs; None = identity.
            router: What chooses, in the place of `program`.
        """
        depth = self._loaded.decoder.depth
        maker = replace(self._maker, router=router or fixed_router(program or Program.identity(depth), depth))
        requests = [maker.make(prompt, {"max_tokens": max_tokens}) for prompt in prompts]
        return [one.token_ids for one in answer(self._loaded, requests, NullSink())] if requests else []

    def _read_bridges(self, path: str | Path) -> BridgeSet:
        from polar_sdk.router.bridge_set import BridgeSet

        found = BridgeSet.load(path)
        found.check_model(self._loaded.name, self._loaded.fingerprint)
        return found

    def _use(self, bridges: BridgeSet) -> None:
        self._place(bridges)
        self._maker = replace(self._maker, cost=self._loaded.decoder.cost)

    def _place(self, bridges: BridgeSet) -> None:
        decoder = self._loaded.decoder
        placed = {segment: bridge.to(decoder.dtype, decoder.device) for segment, bridge in bridges.bridges.items()}
        decoder.set_bridges({**decoder.bridges, **placed})
