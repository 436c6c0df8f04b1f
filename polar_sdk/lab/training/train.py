"""Train a router for a model: from a reward matrix to a router that can be calibrated, saved and served."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal, get_args

import torch

from polar_sdk.errors import DataError, RouterError, RouterModelError
from polar_sdk.lab.items import ChoiceItem, builtin_items, kind_of, text_of
from polar_sdk.lab.program_search.matrix import RewardMatrix
from polar_sdk.lab.training.examples import Examples, harder_kinds, kinds_of, losses
from polar_sdk.lab.training.layerwise_training import LayerwiseSettings, LayerwiseTask, fit_layerwise
from polar_sdk.lab.training.menu_training import MenuSettings, Trained, fit_menu, frontier
from polar_sdk.lab.training.outcomes import Bench, classes_of, id_prefixes
from polar_sdk.lab.training.table_training import fit_table
from polar_sdk.programs.program import Program
from polar_sdk.promises.losses import ANSWER_TOKENS
from polar_sdk.router.layerwise import EXECUTE, LayerwiseRouter, layerwise_dial
from polar_sdk.router.learned import RouterFacts
from polar_sdk.router.map_set import MapSet
from polar_sdk.router.menu import MenuRouter, Pricing, only_for
from polar_sdk.router.network import Familiar, FeatureKind, FeatureReader
from polar_sdk.router.store import save_with_maps
from polar_sdk.show.progress import Progress, silent

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from torch import Tensor

    from polar_sdk.lab.items import Item
    from polar_sdk.lab.rewards.cache import RewardCache
    from polar_sdk.model import PolarModel
    from polar_sdk.router.certificate import Loss
    from polar_sdk.router.learned import LearnedRouter
    from polar_sdk.router.network import Network


_CHECKPOINTS: Final = "checkpoints"
"""Name of the folder of checkpoints, in the router's folder."""
RouterKind = Literal["menu", "table", "policy", "static"]
"""`table` is a menu router that has one program for each kind of prompt, `policy` decides layer by layer; `static` is a
menu router that reads nothing, the baseline of routing."""
_DEFAULT_RISK: Final = 0.05
"""Share of lost dev prompts at which an uncalibrated router serves."""
_MAX_DEV_PROMPTS: Final = 256
"""Maximum dev prompts for a layerwise router: each epoch runs other programs on them."""
_LIKELIEST_THETA: Final = 0.5
"""θ at which a layerwise router leaves "execute" where it is less likely than not."""


def train(
    model: PolarModel,
    rewards: RewardMatrix | str | Path,
    *,
    kind: RouterKind = "menu",
    items: Sequence[Item] | None = None,
    wordings: Sequence[Item] = (),
    features: FeatureKind = "edges",
    settings: MenuSettings | LayerwiseSettings | None = None,
    out: str | Path | None = None,
    maps: str | Path | Sequence[str | Path] = (),
    on_progress: Progress = silent,
) -> LearnedRouter:
    """Train a router on what programs do on prompts; once it is calibrated, it serves.

    Args:
        model: The model.
        rewards: The reward matrix of `search`, or its file.
        kind: `menu` chooses among the matrix's programs, `table` does so by the prompt's kind, `policy` decides layer
            by layer; `static` reads nothing.
        items: For `policy`: the items that were searched on; None = the prompts that come with the package. For
            `table`: items that were not measured and only show what kinds of prompts look like; None = none.
        wordings: For `table`: items that only show by which words kinds are told; they make no prompt familiar.
        features: `edges` for the embeddings of all tokens, of the last ones and of the first ones of the last message;
            `ending` without the latter, `embedding` for those of all alone.
        settings: How to train, `LayerwiseSettings` for `policy`; None = the defaults.
        out: Folder to write the router to; checkpoints are kept there until training is done.
        maps: Folder of the bridges or fills that the programs use, or several; these are written beside the router.
        on_progress: Called with (stage, steps done, steps in all).

    Raises:
        RouterModelError: The rewards were measured on another model or in another dtype.
        RouterError: The kind is unknown, the settings are for another kind, or maps that programs use are missing.
        DataError: The matrix holds no train or no dev prompt, or its menu is identity alone.
    """
    if kind not in get_args(RouterKind):
        raise RouterError(f"router kind {kind!r} cannot be trained; choose from: {', '.join(get_args(RouterKind))}.")
    takes = LayerwiseSettings if kind == "policy" else MenuSettings
    if settings is not None and not isinstance(settings, takes):
        raise RouterError(f"kind {kind!r} takes {takes.__name__}, not {type(settings).__name__}.")
    matrix = rewards if isinstance(rewards, RewardMatrix) else RewardMatrix.load(rewards)
    used = [model.use_maps(each) for each in MapSet.load_all(maps)]
    # What was tuned to right choices knows nothing of answers in text.
    if any(each.facts.training.get("distil") and each.facts.training.get("labels") for each in used):
        forms = zip(matrix.programs, matrix.forms or (None,) * len(matrix.programs), strict=True)
        matrix = replace(matrix, forms=tuple("choice" if program.bridges else form for program, form in forms))
    checkpoints = None if out is None else Path(out) / _CHECKPOINTS
    trainer = RouterTrainer(model, matrix, features, checkpoints, on_progress)
    router: LearnedRouter
    if isinstance(settings, LayerwiseSettings) or kind == "policy":
        assert not isinstance(settings, MenuSettings)
        router = trainer.layerwise(builtin_items() if items is None else items, settings)
    else:
        makers = {
            "menu": trainer.menu,
            "table": lambda settings: trainer.table(settings, items or (), wordings),
            "static": trainer.static,
        }
        router = makers[kind](settings)
    if out is not None:
        save_with_maps(router, Path(out), used)
    return router


def _kind_among(kinds: Collection[str], item: Item) -> str:
    """The class of an item that is one of these kinds, or else what it is."""
    return next(filter(kinds.__contains__, classes_of(item.task or "")), kind_of(item))


@dataclass
class RouterTrainer:
    """Trains routers for one model, which has the maps that programs use; see `train`."""

    model: PolarModel
    matrix: RewardMatrix
    features: FeatureKind = "edges"
    checkpoints: Path | None = None
    on_progress: Progress = silent

    def __post_init__(self) -> None:
        if self.matrix.fingerprint != self.model.fingerprint:
            raise RouterModelError(
                f"the reward matrix was measured on model {self.matrix.model} ({self.matrix.fingerprint[:12]}…), but "
                f"this model is {self.model.fingerprint[:12]}….",
                hint="Measure it with `polar lab search`.",
            )
        if self.matrix.dtype != self.model.dtype:
            raise RouterModelError(
                f"the reward matrix was measured in {self.matrix.dtype}, but this model runs in {self.model.dtype}.",
                hint="Load the model in that precision, or run `polar lab search` again.",
            )
        self._reader = FeatureReader(self.model.decoder, self.features, self._separators)

    @property
    def _separators(self) -> tuple[int, ...]:
        return self.model.template_separators if self.features == "edges" else ()

    def menu(self, settings: MenuSettings | None = None) -> MenuRouter:
        """Train a menu router over the programs of the matrix."""
        settings = settings or MenuSettings()
        order = self._order()
        train, dev = self._examples(settings)
        trained = fit_menu(train, dev, order, settings, checkpoints=self.checkpoints, on_progress=self.on_progress)
        familiar = Familiar.around(train.features, dev.features, trained.network)
        return self._menu(trained, replace(trained.network, familiar=familiar), dev, order, settings)

    def table(
        self, settings: MenuSettings | None = None, others: Sequence[Item] = (), wordings: Sequence[Item] = ()
    ) -> MenuRouter:
        """A menu router that runs the same program for all prompts of a kind, by its dial; see `table_training`.

        Choices are a kind of their own, which the request tells and not the network.

        Args:
            settings: How to train; None = the defaults.
            others: Items that are not in the matrix, which only show what kinds of prompts look like.
            wordings: Items that only show by which words kinds are told: no prompt is familiar for being like them.
        """
        settings = settings or MenuSettings()
        matrix = self._rows(settings)
        texts = [row for row, kind in enumerate(matrix.kinds) if kind != "choice"]
        kinds = ["choice"] * len(matrix)
        for row, kind in zip(texts, kinds_of(matrix.rows(texts)), strict=True):
            kinds[row] = kind
        shown = [(item, _kind_among(set(kinds), item)) for item in others if not isinstance(item, ChoiceItem)]
        shown = [(item, kind) for item, kind in shown if kind in kinds]
        told = [(item, _kind_among(set(kinds), item)) for item in wordings]
        prompts = [self.model.prompt_tokens(text_of(item)) for item, _ in (*shown, *told)]
        more = self._read(prompts) if prompts else None
        return self._by_kind(settings, [*kinds, *(kind for _, kind in (*shown, *told))], more, len(told))

    def static(self, settings: MenuSettings | None = None) -> MenuRouter:
        """A menu router that runs the same program for every prompt, by its dial: the baseline of routing."""
        settings = settings or MenuSettings()
        return self._by_kind(settings, ["all"] * len(self._rows(settings)))

    def _by_kind(
        self, settings: MenuSettings, kinds: Sequence[str], others: Tensor | None = None, wordings: int = 0
    ) -> MenuRouter:
        """A menu router with the same outputs for all prompts of a kind; the last of the others are but wordings."""
        order = self._order()
        train, dev = self._examples(settings)
        more = train.features[:0] if others is None else others
        features = torch.cat((train.features, dev.features, more))
        seen = torch.cat((train.features, more[: len(more) - wordings]))
        matrix = self._rows(settings)
        network = fit_table(
            matrix,
            features,
            kinds,
            settings.loss,
            wordings=wordings,
            strict=settings.strict,
            least=dev.least,
            most=settings.most,
        )
        counts = Counter(kinds[: len(matrix)])
        if len(counts) > 1:
            network = replace(network, familiar=Familiar.around(seen, dev.features, network))
        dev = replace(dev, kinds=torch.tensor([list(counts).index(kind) for kind in kinds[len(train) : len(matrix)]]))
        walked = frontier(self._needed(network, dev, settings), dev, order, max_theta=dev.end(settings.least))
        utility = walked.utility(settings.risks)
        spread = {"utility": utility, "utility_mean": utility, "utility_spread": 0.0}
        record = {"settings": settings.model_dump(mode="json"), "kinds": dict(counts), **spread}
        return self._menu(Trained(network, record), network, dev, order, settings)

    def _rows(self, settings: MenuSettings) -> RewardMatrix:
        """The rows that are learned from: those of the train split, then those of dev."""
        splits = self.matrix.splits
        matrix = self.matrix.rows([row for part in ("train", "dev") for row, own in enumerate(splits) if own == part])
        return matrix.rows(matrix.labelled) if settings.loss == "harms" else matrix

    def _order(self) -> list[int]:
        """Programs cheaper than identity, cheapest first."""
        if len(self.matrix.programs) < 2:
            raise DataError("the menu has only identity; search again with more budgets.")
        return self._pricing(own_length=False).cheaper

    def _pricing(self, *, own_length: bool, loss: Loss = "differs") -> Pricing:
        """Costs of the matrix's programs, for answers as long as identity's are on average."""
        par = _par(loss, own_length)
        return Pricing(self.matrix.programs, self.model.decoder.cost, own_length, ANSWER_TOKENS, par)

    def _menu(
        self, trained: Trained, network: Network, dev: Examples, order: Sequence[int], settings: MenuSettings
    ) -> MenuRouter:
        needed, end = self._needed(network, dev, settings), dev.end(settings.least)
        chooses = [kind == "choice" for kind in self._rows(settings).of("dev").kinds]
        dial = {0.0}
        for form in set(chooses):  # a certificate walks the answers of each form apart
            own = [each == form for each in chooses]
            dial.update(frontier(needed[torch.tensor(own)], dev.rows(own), order, max_theta=end).thetas)
        walked = frontier(needed, dev, order, sorted(dial))
        theta = walked.thetas[walked.best(_DEFAULT_RISK)]
        facts = self._facts(trained, walked.thetas, theta, settings.loss, own_length=settings.own_length)
        facts = facts.model_copy(update={"forms": self.matrix.forms})
        router = MenuRouter(facts, network, self.matrix.programs)
        return router.bind(self.model.decoder, self.model.fingerprint)

    @torch.no_grad()
    def _needed(self, network: Network, dev: Examples, settings: MenuSettings) -> Tensor:
        """The smallest θ of each program for each dev prompt, (P, M), which serves answers of the prompt's form."""
        outputs, forms = network(dev.features), self.matrix.forms
        choices = torch.tensor([kind == "choice" for kind in self._rows(settings).of("dev").kinds])
        choosing = only_for(network.where_choosing(outputs), forms, "choice")
        return dev.needed(torch.where(choices.unsqueeze(1), choosing, only_for(outputs, forms, "text")))

    def layerwise(
        self,
        items: Sequence[Item],
        settings: LayerwiseSettings | None = None,
        *,
        prompts: int = 1000,
        cache: RewardCache | None = None,
    ) -> LayerwiseRouter:
        """Train a layerwise router by running the programs that it draws on items that the matrix was measured on."""
        settings = settings or LayerwiseSettings()
        bench = Bench(self.model, self.on_progress, cache)
        split = dict(zip(self.matrix.ids, self.matrix.splits, strict=True))
        tasks = [task for task in bench.tasks(items) if split.get(task.id) in ("train", "dev")]
        rows = {name: [row for row, task in enumerate(tasks) if split[task.id] == name] for name in ("train", "dev")}
        if not rows["train"] or not rows["dev"]:
            raise DataError(
                "the items have no train or no dev prompt of the reward matrix; pass the items that were searched on."
            )
        outcomes = bench.outcomes(tasks, [], labels=False)

        def measure(chosen: Sequence[int], programs: Sequence[Program]) -> tuple[Tensor, Tensor]:
            ours = outcomes.of(chosen, programs)
            full = outcomes.of(chosen, [outcomes.matrix.programs[0]] * len(chosen))
            saved = [1 - outcome.flops / identity.flops for outcome, identity in zip(ours, full, strict=True)]
            return torch.tensor([not outcome.agree for outcome in ours]), torch.tensor(saved)

        task = LayerwiseTask(
            features=self._read([task.question.prompt for task in tasks]),
            train=rows["train"][:prompts],
            dev=rows["dev"][:_MAX_DEV_PROMPTS],
            depth=self.model.depth,
            free=self.model.policy.free(self.model.depth),
            measure=measure,
        )
        trained = fit_layerwise(task, settings, checkpoints=self.checkpoints, on_progress=self.on_progress)
        identity = (Program.identity(self.model.depth),)
        router = LayerwiseRouter(self._facts(trained, (0.0,), _LIKELIEST_THETA, "differs"), trained.network, identity)
        outputs = router.outputs(task.features[task.dev])
        dial = layerwise_dial(router.log_probabilities(outputs)[..., EXECUTE].exp())
        return router.with_facts(dial=dial).bind(self.model.decoder, self.model.fingerprint)

    def _examples(self, settings: MenuSettings) -> tuple[Examples, Examples]:
        """Examples of the train and of the dev split; means per program are taken over both together."""
        self.matrix.of("train"), self.matrix.of("dev")  # raises where there is none
        matrix = self._rows(settings)
        pricing = self._pricing(own_length=settings.own_length, loss=settings.loss)
        both = Examples.of(matrix, self._read(matrix.tokens), settings.loss, pricing, strict=settings.strict)
        train = matrix.splits.count("train")
        return both.rows([row < train for row in range(len(both))]), both.rows(
            [row >= train for row in range(len(both))]
        )

    def _read(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        rows = []
        for done, tokens in enumerate(prompts):
            if done % 50 == 0:
                self.on_progress("reading features", done, len(prompts))
            rows.append(self._reader(tokens).cpu())
        return torch.stack(rows).clone()

    def _facts(
        self, trained: Trained, dial: tuple[float, ...], theta: float, loss: Loss, *, own_length: bool = False
    ) -> RouterFacts:
        matrix, cost = self.matrix, self.model.decoder.cost
        base = (sum(layer.linear for layer in cost.layers) + cost.head) // 2
        used = [item_id for item_id, split in zip(matrix.ids, matrix.splits, strict=True) if split in ("train", "dev")]
        record: dict[str, Any] = {
            **trained.record,
            "data": matrix.data,
            "prompts": {split: matrix.splits.count(split) for split in ("train", "dev")},
            "parameters": trained.network.parameters,
            "parameter_share": trained.network.parameters / base,
            "static": self._static(loss),
            "harder": harder_kinds(matrix),
            "seen": id_prefixes(used),
        }
        return RouterFacts(
            model=self.model.name,
            fingerprint=self.model.fingerprint,
            depth=self.model.depth,
            features=self.features,
            separators=self._separators,
            dial=dial,
            default_theta=theta,
            own_length=own_length,
            par=_par(loss, own_length),
            answer_tokens=ANSWER_TOKENS,
            training=record,
        )

    def _static(self, loss: Loss) -> list[dict[str, Any]]:
        """How each program alone does on the dev prompts, for the control "best static program"."""
        dev = self.matrix.of("dev")
        quality = (1 - losses(dev, loss).mean(0)).tolist()
        saved = (1 - dev.flops.double().sum(0) / dev.flops[:, 0].double().sum()).tolist()
        return [
            {"program": program.text, "quality": quality[column], "saved": saved[column]}
            for column, program in enumerate(dev.programs)
        ]


def _par(loss: Loss, own_length: bool) -> float:
    """The quality that is as good as identity; ½ where answers can be gained, and losses count from it."""
    return 0.5 if own_length and loss == "drops" else 1.0
