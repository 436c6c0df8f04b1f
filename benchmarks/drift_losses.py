"""Measure what tiers lose, prompt by prompt, on usual prompts and on others: the recorded input of `drift.py`.

Usual prompts are those of the router's own kinds that neither training nor calibration has used; beside them the
prompts of the calibration, without losses, for what the router finds usual. Others are of a kind, of languages and of
lengths that calibration did not have. A row has what a router reads of its prompt, and per tier the share of full
depth's tokens that the tier keeps, the FLOPs, and those of the tier's own run in an audit.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from benchmarks.fit import HELD
from benchmarks.fit import prompts as fit_prompts
from benchmarks.router_texts import COMPARISONS, FITTED, PER_TASK, ROUTED, route_texts, rows, texts, unused_passages
from benchmarks.train_router import SETS, read_sets
from polar_sdk import PolarModel
from polar_sdk.engine.pages import PAGE
from polar_sdk.errors import DataError
from polar_sdk.lab.items import ChoiceItem, PromptItem, item_id, read_items
from polar_sdk.lab.rewards.cache import RewardCache, cache_path
from polar_sdk.lab.rewards.measure import Measurer
from polar_sdk.lab.rewards.tasks import choice_question, make_tasks
from polar_sdk.lab.training.outcomes import used
from polar_sdk.programs.program import Program
from polar_sdk.promises.novelty import Likeness, Usual
from polar_sdk.router.artifact import load_router, save_router
from polar_sdk.router.learned import LearnedRouter
from polar_sdk.serving.prefixes import LEAST_SHARED
from polar_sdk.show.progress import ProgressBars

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from polar_sdk.lab.items import Item
    from polar_sdk.programs.cost import CostModel

Row = dict[str, Any]
RECORDED: Final = Path(__file__).with_name("drift")
ENOUGH: Final = 0.9
"""Share of a calibration's prompts that must be found to say where its prompts fell."""
_TASKS: Final = (
    "{text}\n\nDoes the text contradict itself anywhere? Answer yes or no, with a reason.",
    "Text: {text}\n\nWhich claims in this text would need a source?",
    "{text}\n\nWrite three questions for an exam about the text above.",
    "What is the tone of the following text, and who may have written it?\n\n{text}",
)
_LANGUAGES: Final = {
    "German": (
        ("Sehr geehrte Damen und Herren,", "Guten Tag,", "Liebe Frau Weber,", "Hallo zusammen,"),
        (
            "am {day}. März habe ich bei Ihnen {count} Stühle bestellt, aber nur die Hälfte ist angekommen.",
            "die Heizung im Büro ist seit {count} Tagen kaputt, und niemand antwortet auf unsere Briefe.",
            "unser Treffen wird auf den {day}. Juni verschoben, weil der große Saal nicht frei ist.",
            "für die Reise nach Hamburg brauchen wir noch {count} Fahrkarten und ein Zimmer mit Frühstück.",
        ),
        (
            "Bitte schreiben Sie mir, wann ich mit einer Lösung rechnen kann.",
            "Die Rechnung vom {day}. Mai ist schon bezahlt.",
            "Meine Nachbarin hat das Paket leider nicht angenommen.",
            "Außerdem fehlt in der Liste die Adresse der neuen Werkstatt.",
        ),
        (
            "Fasse diese Nachricht in zwei Sätzen zusammen.",
            "Schreibe eine höfliche Antwort auf diese Nachricht.",
            "Welche Zahlen kommen in dieser Nachricht vor, und was bedeuten sie?",
        ),
    ),
    "Spanish": (
        ("Estimados señores:", "Buenos días:", "Querida Rosa:", "Hola a todos:"),
        (
            "el día {day} de marzo pedí {count} sillas en su tienda, pero solo llegó la mitad.",
            "la calefacción de la oficina lleva {count} días rota y nadie contesta nuestras cartas.",
            "la reunión pasa al {day} de junio porque la sala grande no está libre.",
            "para el viaje a Sevilla todavía necesitamos {count} billetes y una habitación con desayuno.",
        ),
        (
            "Les ruego que me digan cuándo habrá una solución.",
            "La factura del {day} de mayo ya está pagada.",
            "Mi vecina no quiso recoger el paquete.",
            "Además falta en la lista la dirección del taller nuevo.",
        ),
        (
            "Resume este mensaje en dos frases.",
            "Escribe una respuesta amable a este mensaje.",
            "¿Qué números aparecen en este mensaje y qué significan?",
        ),
    ),
    "French": (
        ("Madame, Monsieur,", "Bonjour,", "Chère Claire,", "Bonjour à tous,"),
        (
            "le {day} mars j'ai commandé {count} chaises chez vous, mais la moitié seulement est arrivée.",
            "le chauffage du bureau est en panne depuis {count} jours et personne ne répond à nos lettres.",
            "notre réunion est reportée au {day} juin, car la grande salle n'est pas libre.",
            "pour le voyage à Lyon il nous faut encore {count} billets et une chambre avec petit déjeuner.",
        ),
        (
            "Dites-moi, s'il vous plaît, quand je peux espérer une solution.",
            "La facture du {day} mai est déjà payée.",
            "Ma voisine n'a malheureusement pas pris le paquet.",
            "De plus, l'adresse du nouvel atelier manque dans la liste.",
        ),
        (
            "Résume ce message en deux phrases.",
            "Écris une réponse polie à ce message.",
            "Quels nombres trouve-t-on dans ce message, et que signifient-ils ?",
        ),
    ),
}


def others(passages: Sequence[str], count: int, seed: int = 3) -> dict[str, list[Item]]:
    """Prompts by what calibration did not have: questions with choices in a chat, tasks, languages, lengths."""
    dice = random.Random(seed)
    exams = dice.sample(rows("mmlu.test-open"), count)
    made = {
        "exam": [
            "\n".join(
                (row["question"], *(f"{letter}. {text}" for letter, text in zip("ABCD", row["choices"], strict=False)))
            )
            for row in exams
        ],
        "task": [_TASKS[place % len(_TASKS)].format(text=passages[place]) for place in range(count)],
        "language": [_letter(dice, (*_LANGUAGES,)[place % len(_LANGUAGES)]) for place in range(count)],
        "long": [_long(dice, passages) for _ in range(count // 4)],
    }
    return {pool: [PromptItem(prompt=prompt, task=pool) for prompt in prompts] for pool, prompts in made.items()}


def _letter(dice: random.Random, language: str) -> str:
    openings, subjects, details, tasks = _LANGUAGES[language]
    text = " ".join((dice.choice(openings), dice.choice(subjects), *dice.sample(details, dice.randint(1, 3))))
    return f"{text.format(day=dice.randint(1, 28), count=dice.randint(2, 40))}\n\n{dice.choice(tasks)}"


def _long(dice: random.Random, passages: Sequence[str]) -> str:
    found = dice.sample(passages, dice.randint(7, 9))
    text = "\n\n".join(f"[{number}] {passage}" for number, passage in enumerate(found, 1))
    return f"{text}\n\nWhat is passage {dice.randint(1, len(found))} about? Answer in two sentences."


def prompts(router: LearnedRouter, options: argparse.Namespace) -> dict[str, list[Item]]:
    """Prompts by pool, from what the router was made with: `train_router`'s texts, or those of `fit`."""
    if options.model is None:
        source = route_texts(texts("fit", FITTED), ROUTED, PER_TASK, COMPARISONS)
    else:
        fitted, held = (read_items(path) for path in fit_prompts(options.work))
        source = [*fitted, *held]
    training = router.facts.training
    calibrated = used(source, {"calibrated": training["calibrated"]})
    new = [item for item, old in zip(source, used(source, training), strict=True) if not old]
    new.sort(key=item_id)
    unknown = [] if options.model is None else [item for item in new if item.task in HELD]
    usual = [item for item in new if item not in unknown]
    made: dict[str, list[Item]] = {
        "calibration": [item for item, known in zip(source, calibrated, strict=True) if known],
        "usual": usual[: options.usual],
        "kind": unknown,
    }
    return made | others(unused_passages(source), options.each)


def measured(model: PolarModel, pools: dict[str, list[Item]], show: ProgressBars) -> Iterator[Row]:
    """A row per prompt: what the router reads, what each tier keeps and costs; `calibration` without losses.

    Pools take turns, so that what is there after an interruption has some of each.
    """
    router = model.router
    assert isinstance(router, LearnedRouter)
    assert router.certificate is not None
    tiers = {name: router.at(promise.setting) for name, promise in router.certificate.tiers.items()}
    identity, cost = Program.identity(model.depth), model.decoder.cost
    known = [item.prompt for item in pools.pop("calibration") if not isinstance(item, ChoiceItem)]
    for place, text in enumerate(known):
        yield {"pool": "calibration", **_read(router, model.prompt_tokens(text))}
        show("calibration", place + 1, len(known))
    turns = zip_longest(*([(pool, item) for item in items] for pool, items in pools.items()))
    order = [pair for turn in turns for pair in turn if pair is not None]
    order.sort(key=lambda pair: pair[0] == "long")  # each takes as long as ten others
    with RewardCache(cache_path(model.fingerprint, model.dtype)) as cache:
        measurer = Measurer(model, cache)
        for place, (pool, item) in enumerate(order):
            show("losses", place, len(order))
            for task in make_tasks(model, [item], cache):
                prompt, answer = len(task.question.prompt), len(task.question.continuations[0])
                programs = {tier: at.route(task.question.prompt).program for tier, at in tiers.items()}
                rewards = measurer.rewards([task], [identity, *programs.values()])
                yield {
                    "pool": pool,
                    "kind": item.task,
                    **_read(router, task.question.prompt),
                    "answer": answer,
                    "kept": {tier: round(float(rewards[own].share[0]), 4) for tier, own in programs.items()},
                    "flops": {tier: int(rewards[own].flops[0]) for tier, own in programs.items()},
                    "again": {tier: again(cost, own, prompt, answer) for tier, own in programs.items()},
                    "exact": cost.request(identity, prompt, answer).total,
                }


def again(cost: CostModel, program: Program, prompt: int, answer: int) -> int:
    """FLOPs of a program where the start of its prompt is kept, as it is after the request that is audited."""
    usable = min(max(0, prompt - program.tail), prompt - 1)
    rest = usable % PAGE
    return cost.request(program, prompt, answer, cached=usable - (rest if rest < LEAST_SHARED else 0)).total


def _read(router: LearnedRouter, tokens: Sequence[int]) -> Row:
    (found,) = router.likeness(router.reader(tokens).unsqueeze(0))
    return {**found._asdict(), "distance": round(found.distance, 5)}


def recorded(path: Path) -> dict[str, list[Row]]:
    """Measured prompts by pool."""
    pools: dict[str, list[Row]] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        pools.setdefault(row["pool"], []).append(row)
    return pools


def read(row: Row) -> Likeness:
    """The router's reading of a measured prompt."""
    return Likeness(row["tokens"], row["distance"], row["centre"])


def count_usual(model: PolarModel, path: Path, folder: Path) -> None:
    """Write into a shipped router where the prompts of its calibration fell: measured texts, and choices read anew."""
    router = model.router
    assert isinstance(router, LearnedRouter)
    assert router.certificate is not None
    found = {"prompt": [read(row) for row in recorded(path)["calibration"]]}
    if "choice" in router.certificate.kinds:
        items = [item for items in read_sets(SETS.split(","), None).values() for item in items]
        known = used(items, {"calibrated": router.facts.training["calibrated"]})
        questions = [item for item, old in zip(items, known, strict=True) if old and isinstance(item, ChoiceItem)]
        features = router.reader.stack([choice_question(model, item).prompt for item in questions])
        found["choice"] = router.likeness(features)
    for kind, counts in router.certificate.kinds.items():  # the makers of prompts have changed since, but little
        if len(found[kind]) < ENOUGH * counts.n:
            raise DataError(f"{len(found[kind])} prompts of kind {kind!r} were found; calibration had {counts.n}.")
    usual = {kind: Usual.of(prompts, router.centres) for kind, prompts in found.items()}
    shipped = load_router(folder)
    assert isinstance(shipped, LearnedRouter)
    assert shipped.certificate is not None
    save_router(shipped.with_certificate(shipped.certificate.model_copy(update={"usual": usual})), folder)
    print(f"wrote {folder}")


def main() -> None:
    """Measure the model's own router and write the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=None)
    parser.add_argument("--usual", type=int, default=300, help="maximum usual prompts")
    parser.add_argument("--each", type=int, default=90, help="prompts of each other pool, a quarter of long ones")
    parser.add_argument("--work", type=Path, default=Path("out/drift"), help="folder for the prompts of `fit`")
    parser.add_argument("--out", type=Path, default=RECORDED)
    parser.add_argument("--usual-into", type=Path, help="only count the calibration's prompts, for this shipped router")
    options = parser.parse_args()
    model = PolarModel.from_pretrained(options.model, ledger=None)
    router = model.router
    assert isinstance(router, LearnedRouter), "the model has no certified router"
    path = options.out / f"{model.name}.jsonl"
    if options.usual_into:
        count_usual(model, path, options.usual_into)
        return
    pools = prompts(router, options)
    print({pool: len(items) for pool, items in pools.items()}, flush=True)
    options.out.mkdir(exist_ok=True)
    with ProgressBars(quiet=not sys.stderr.isatty()) as show, path.open("w", encoding="utf-8") as file:
        for row in measured(model, pools, show):
            file.write(json.dumps(row) + "\n")
            file.flush()
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
