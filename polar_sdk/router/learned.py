"""Learned routers: what the kinds `menu` and `policy` have in common.

A learned router is created without a model (trained, or read from its folder) and serves once it is bound to one. It
has one dial, its looseness θ, from 0 (always identity) upward. The certificate turns the tier or tolerance of a
request, and the form of its answer, into a θ, but only while what would run is what was certified. Knows no text and
no money.
"""

from __future__ import annotations

import copy
import hashlib
from abc import abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Self

import torch
from pydantic import BaseModel, ConfigDict, Field

from polar_sdk.engine import engine_version
from polar_sdk.engine.hashes import hash_maps, hash_programs, hash_tensors
from polar_sdk.errors import RouterDamagedError, RouterError, RouterModelError, UnknownTierError
from polar_sdk.programs.cost import NOMINAL_OUTPUT, NOMINAL_PROMPT
from polar_sdk.promises.novelty import Likeness
from polar_sdk.router.base import IdentityRouter, Route, Router
from polar_sdk.router.certificate import AnswerForm, Certificate, Setting, Subject
from polar_sdk.router.network import FeatureKind, FeatureReader

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Sequence

    from torch import Tensor

    from polar_sdk.engine.decoder import Decoder
    from polar_sdk.programs.program import Program
    from polar_sdk.promises.audit import PromiseTerms
    from polar_sdk.router.network import Network


class RouterFacts(BaseModel):
    """Stored facts about a learned router, besides its weights."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    model: str
    """Name of the base model, for messages."""
    fingerprint: str
    """Fingerprint of the base model."""
    depth: int = Field(ge=1)
    """Number of layers of the base model, D."""
    features: FeatureKind = "embedding"
    separators: tuple[int, ...] = ()
    """Tokens that the model's chat template puts around messages, where the features need to know them."""
    dial: tuple[float, ...] = (0.0,)
    """Values of θ, ascending from 0, that calibration tests in order; fixed in training."""
    default_theta: float = Field(default=0.0, ge=0)
    """θ of an uncalibrated router, chosen on the dev prompts; it promises nothing."""
    own_length: bool = False
    """Whether θ and costs are those of the prompt's own length; else of 128 prompt and 64 output tokens."""
    par: float = Field(default=1.0, gt=0, le=1)
    """The predicted quality that is as good as identity, from which losses count."""
    answer_tokens: int = Field(default=NOMINAL_OUTPUT, ge=1)
    """Tokens of an answer that costs are compared at, where they are those of the prompt's own length."""
    default_tier: str = "standard"
    """Tier of a request that names none, where the router is certified."""
    forms: tuple[AnswerForm | None, ...] = ()
    """The form of answers that each program is for; None = any. Empty: all are for any."""
    training: dict[str, Any] = Field(default_factory=dict)
    """The training record: data, seeds, settings, utilities."""


class Serving(NamedTuple):
    """The router that serves a request, and its tier."""

    tier: str | None
    """The tier to record."""
    router: Router
    """With its dial set."""
    promises: tuple[PromiseTerms, ...] = ()
    """Promises on its answer, as far as audits can test them."""
    instead_of: str | None = None
    """The tier or tolerance asked for, whose promise is at risk; None = this is it."""


class LearnedRouter(Router):
    """A network that reads a prompt and chooses its program.

    Attributes:
        facts: What is stored about it.
        network: Its weights, on the CPU.
        programs: The programs it may choose; identity first.
        certificate: Counts and promises, or None before calibration.
    """

    kind: ClassVar[str]

    def __init__(
        self,
        facts: RouterFacts,
        network: Network,
        programs: Sequence[Program],
        certificate: Certificate | None = None,
    ) -> None:
        self.facts, self.network = facts, network
        self.programs = tuple(programs)
        self.certificate = certificate
        self.audited = {} if certificate is None else certificate.audited
        """The promises that audits of each tier's answers test."""
        self.version = hash_tensors(network.tensors())[:12]
        self._reader: FeatureReader | None = None
        self._running: Network = network
        self._subject: Subject | None = None

    def bind(self, decoder: Decoder, fingerprint: str) -> Self:
        """A copy that serves on this model.

        Raises:
            RouterModelError: The router was trained for another model.
            RouterDamagedError: Its weights were trained on other features than its facts name.
            MissingMapError: A program uses a bridge that the model does not have.
        """
        if fingerprint != self.facts.fingerprint:
            raise RouterModelError(
                f"the router was trained for model {self.facts.model} ({self.facts.fingerprint[:12]}…), but this model "
                f"is {fingerprint[:12]}….",
                hint="Load that model, or train a router for this one with `polar lab train`.",
            )
        reader = FeatureReader(decoder, self.facts.features, self.facts.separators)
        if len(self.network.mean) != reader.size:
            raise RouterDamagedError(
                f"the router's weights take {len(self.network.mean):,} numbers, but {self.facts.features!r} features "
                f"of this model are {reader.size:,}: its router.json names other features than it was trained on.",
                hint="Copy the router again, or train it again with `polar lab train`.",
            )
        bound = copy.copy(self)
        bound._reader = reader
        bound._running = self.network.to(decoder.device)
        bound._subject = Subject(
            model=fingerprint,
            menu=hash_programs(self.programs),
            router=hash_tensors(self.network.tensors()),
            bridges=hash_maps(decoder, self.programs),
            dtype=decoder.dtype_name,
            engine=engine_version(decoder.dtype_name),
        )
        bound._prepare(decoder)
        return bound

    @property
    def reader(self) -> FeatureReader:
        """Reads features on the model that the router is bound to.

        Raises:
            RouterError: It is not bound to a model.
        """
        if self._reader is None:
            raise RouterError(
                "the router is not bound to a model.", hint="Pass it to PolarModel(router=…), which binds it."
            )
        return self._reader

    @property
    def subject(self) -> Subject:
        """Hashes of what would run, which a certificate must match. Bridges may have been replaced since."""
        bridges = hash_maps(self.reader.decoder, self.programs)
        assert self._subject is not None
        if bridges == self._subject.bridges:
            return self._subject
        return self._subject.model_copy(update={"bridges": bridges})

    def fits(self, fingerprint: str, dtype: str) -> bool:
        """Whether it was certified for this model in this dtype; known before it is bound."""
        if self.certificate is None:
            return False
        subject = self.certificate.subject
        return (subject.model, subject.dtype, subject.engine) == (fingerprint, dtype, engine_version(dtype))

    @property
    def certified(self) -> bool:
        """Whether the certificate holds for what would run."""
        return self.certificate is not None and self.certificate.subject == self.subject

    def serving(self, compute: str | float | None, at_risk: Callable[[str], bool] = lambda _: False) -> Serving:
        """The router for a tier, a tolerance, or neither.

        Where the promise of a tier is at risk, the next safer certified tier serves in its place, or else identity.

        Args:
            compute: What was asked for.
            at_risk: Whether the promise of a digest is.

        Raises:
            UnknownTierError: The router's certificate has no such tier.
            ToleranceError: The certificate cannot promise such a tolerance.
            CertificateError: The promise does not hold for what would run.
        """
        if compute == "exact":
            return Serving("exact", IdentityRouter(self.facts.depth))
        if self.certificate is None:
            if compute is not None:
                raise UnknownTierError(
                    f"compute={compute!r} is a promise, but this router is not calibrated; use 'exact', leave compute "
                    "out, or calibrate the router with `polar lab calibrate`."
                )
            return Serving(None, self.at(Setting.to(self.facts.default_theta)))
        return self._by_certificate(self.certificate, compute, at_risk)

    def _by_certificate(
        self, certificate: Certificate, compute: str | float | None, at_risk: Callable[[str], bool]
    ) -> Serving:
        """The router for what was asked for, by its certificate."""
        certificate.check(self.subject)
        tiers, audited = certificate.tiers, self.audited
        broken = {tier for tier, promises in audited.items() if any(at_risk(each.digest) for each in promises)}
        if isinstance(compute, (int, float)):
            return self._tolerating(certificate, float(compute), broken)
        tier = self._tier(compute)
        if tier is None:
            return Serving(None, self.at(Setting()))
        if tier in broken:
            return self._safer(tiers[tier].setting, self._tested(tier), broken, tier)
        return Serving(tier, self.at(tiers[tier].setting), audited.get(tier, ()))

    def _tolerating(self, certificate: Certificate, tolerance: float, broken: Collection[str]) -> Serving:
        """The router for a tolerance, which has no tier: what is lost at a smaller θ is lost here, too."""
        setting = certificate.at_tolerance(tolerance).setting
        limits: dict[AnswerForm, float] = {}
        for tier in broken:
            for form in self._tested(tier):
                if 0 < (theta := certificate.tiers[tier].setting.of(form)) <= setting.of(form):
                    limits[form] = min(theta, limits.get(form, theta))
        if not limits:
            return Serving(None, self.at(setting))
        limit = Setting(text=limits.get("text", setting.text), choice=limits.get("choice", setting.choice))
        return self._safer(limit, limits, broken, f"{tolerance:g}")

    def _tested(self, tier: str) -> set[AnswerForm]:
        """The forms of answers that audits of a tier compare."""
        return {"text", "choice"} if any(term.choices for term in self.audited[tier]) else {"text"}

    def _safer(self, limit: Setting, tested: Collection[AnswerForm], broken: Collection[str], asked: str) -> Serving:
        """The loosest tier whose promise is in force, or identity, in place of another that is set to a limit.

        It is stricter for the forms of answers that were tested, and looser for none.
        """
        assert self.certificate is not None
        settings = {tier: promise.setting for tier, promise in self.certificate.tiers.items() if tier not in broken}

        def is_safe(form: AnswerForm, theta: float) -> bool:
            return theta < limit.of(form) if form in tested and limit.of(form) else theta <= limit.of(form)

        safer = [tier for tier, own in settings.items() if is_safe("text", own.text) and is_safe("choice", own.choice)]
        if not safer:
            # Where prompts are watched, the network still reads them: else none would ever be found usual again.
            watched = bool(self.certificate.usual)
            full = AtSetting(self, Setting(), asked=limit) if watched else IdentityRouter(self.facts.depth)
            return Serving("exact", full, instead_of=asked)
        tier = max(safer, key=lambda name: (settings[name].text, settings[name].choice))
        return Serving(tier, self.at(settings[tier]), self.audited.get(tier, ()), asked)

    def _tier(self, compute: str | None) -> str | None:
        """The certified tier in force; None = none was requested and there is no default."""
        assert self.certificate is not None
        tiers = self.certificate.tiers
        if compute is None:
            return self.facts.default_tier if self.facts.default_tier in tiers else None
        if compute not in tiers:
            names = ", ".join([*tiers, "exact"])
            raise UnknownTierError(
                f"tier {compute!r} is not certified for this router; use one of {names}, or a tolerance such as 0.05."
            )
        return compute

    def at(self, setting: Setting) -> Router:
        """The router with its dial set."""
        return IdentityRouter(self.facts.depth) if setting.runs_identity else AtSetting(self, setting)

    def route(self, tokens: Sequence[int]) -> Route:
        """Choose at the default tier, or at the default θ where the router is not calibrated."""
        return self.serving(None).router.route(tokens)

    @torch.inference_mode()
    def choose(self, tokens: Sequence[int], theta: float, *, asked: float = 0.0, form: AnswerForm = "text") -> Route:
        """Choose for one prompt with the dial at θ.

        Args:
            tokens: The prompt.
            theta: The dial.
            asked: The θ that identity serves in place of; 0 = of none.
            form: Of the answer.
        """
        read = self._running.read(self.reader(tokens))
        outputs = self.allowed(read.outputs, form)
        full = self.programs[0]
        program = self.decide(outputs, theta, len(tokens)) if theta else full
        wanted = self.decide(outputs, asked, len(tokens)) if asked else program
        likeness = Likeness(len(tokens), float(read.distance), int(read.centre), harmless=wanted == full)
        return Route(program, self.network.flops, likeness)

    def programs_for(self, form: AnswerForm) -> list[Program]:
        """The programs that may answer in this form, identity first."""
        forms = self.facts.forms or (None,) * len(self.programs)
        return [program for program, own in zip(self.programs, forms, strict=True) if own in (None, form)]

    def allowed(self, outputs: Tensor, form: AnswerForm) -> Tensor:
        """Outputs (…, O) of prompts that are answered in this form, as far as programs are for it."""
        return self.network.where_choosing(outputs) if form == "choice" else outputs

    def allowed_each(self, outputs: Tensor, chooses: Sequence[bool]) -> Tensor:
        """Outputs (M, O) of prompts some of which are answered with one of given choices; see `allowed`."""
        forms = torch.tensor(chooses).unsqueeze(1)
        return torch.where(forms, self.allowed(outputs, "choice"), self.allowed(outputs, "text"))

    @torch.inference_mode()
    def likeness(self, features: Tensor) -> list[Likeness]:
        """How like prompts with these features (M, F) are to those that the router knows."""
        read = self.network.read(features.cpu())
        lengths = features[:, -1].double().exp().round().int()
        return [*map(Likeness, lengths.tolist(), read.distance.tolist(), read.centre.tolist())]

    @property
    def centres(self) -> int:
        """Number of centres that a prompt may be nearest to."""
        return 1 if self.network.familiar is None else len(self.network.familiar.centres)

    @torch.inference_mode()
    def outputs(self, features: Tensor) -> Tensor:
        """The network's outputs (M, O) for the features (M, F) of many prompts, on the CPU."""
        return self.network(features.cpu())

    def with_facts(self, **changes: Any) -> Self:
        """The same router with some of its facts changed."""
        other = copy.copy(self)
        other.facts = self.facts.model_copy(update=changes)
        return other

    def with_certificate(self, certificate: Certificate | None) -> Self:
        """The same router with another certificate, or none."""
        other = copy.copy(self)
        other.certificate = certificate
        other.audited = {} if certificate is None else certificate.audited
        return other

    @abstractmethod
    def choose_all(self, outputs: Tensor, theta: float | Tensor, lengths: Sequence[int] | None = None) -> list[Program]:
        """The programs for many prompts, with the dial at θ.

        Args:
            outputs: Of the prompts, (M, O); see `outputs`.
            theta: The dial; a tensor (M,) has one for each prompt.
            lengths: Number of tokens of each prompt; None = 128.
        """

    def decide(self, outputs: Tensor, theta: float, length: int = NOMINAL_PROMPT) -> Program:
        """The program for the outputs (O,) of one prompt of that many tokens, with the dial at θ."""
        return self.choose_all(outputs.unsqueeze(0), theta, [length])[0]

    def _prepare(self, decoder: Decoder) -> None:
        """Look up what decisions need to know about the model."""


class Margin(NamedTuple):
    """Lowers θ by a share that is drawn for each prompt, so that nobody can search for prompts that just pass.

    The draw is a keyed hash of the prompt: who lacks the key cannot foresee it, and gets it again for the same prompt.
    θ goes down to one that was certified, and all of these keep the promise, so that their mixture does.
    """

    share: float
    """Largest share."""
    key: bytes
    thetas: tuple[float, ...]
    """Those that were certified, ascending."""

    def lowered(self, theta: float, tokens: Sequence[int]) -> float:
        """θ for a prompt."""
        digest = hashlib.blake2b(repr(tuple(tokens)).encode(), key=self.key, digest_size=8).digest()
        drawn = theta * (1 - self.share * int.from_bytes(digest, "big") / 2**64)
        return max((known for known in self.thetas if known <= drawn), default=0.0)


class AtSetting(Router):
    """A learned router with its dial set, for one request.

    Args:
        router: The router.
        setting: The dial.
        margin: Lowers it at random.
        asked: The setting of the tier that identity serves in place of.
        form: Of the answer.
    """

    def __init__(
        self,
        router: LearnedRouter,
        setting: Setting,
        margin: Margin | None = None,
        *,
        asked: Setting | None = None,
        form: AnswerForm = "text",
    ) -> None:
        self.setting = setting
        """The dial."""
        self._router, self._margin, self._asked, self._form = router, margin, asked, form
        self.version = router.version

    @property
    def kind(self) -> str:  # type: ignore[override]
        """The kind of the router."""
        return self._router.kind

    def route(self, tokens: Sequence[int]) -> Route:
        """Choose the program for one prompt."""
        theta, asked = (0.0 if setting is None else setting.of(self._form) for setting in (self.setting, self._asked))
        if not (theta or asked):
            return Route(self._router.programs[0])
        theta = theta if self._margin is None else self._margin.lowered(theta, tokens)
        return self._router.choose(tokens, theta, asked=asked, form=self._form)

    def answering(self, form: AnswerForm) -> AtSetting:
        """The same for a request that is answered in this form, whatever its prompt looks like.

        Bridges that were fitted to choices hardly keep a text: who makes a prompt look like choices must not get them.
        """
        return AtSetting(self._router, self.setting, self._margin, asked=self._asked, form=form)

    def within(self, share: float, key: bytes) -> AtSetting:
        """The same with its dial lowered at random by at most that share."""
        certificate = self._router.certificate
        margin = Margin(share, key, certificate.thetas if certificate else (0.0,))
        return AtSetting(self._router, self.setting, margin, asked=self._asked, form=self._form)
