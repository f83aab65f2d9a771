"""What the experiment measures on one checkpoint: the search, its cost, and the accuracy of every way."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from experiments.vtw.ways import Way, applied

from trimtab.files import read_json, write_json_atomic

THRESHOLDS = (1e-2, 3e-3, 1e-3, 1e-4)
SAMPLES = 20
"""Prompts of a search, as in the paper's command."""
AGAIN = 10
"""How many other sets of as many prompts are searched, to see how much the choice hangs on them."""
BATCH = 10
Batch = dict[str, Any]


def search_batches(processor: Any, rows: Sequence[Mapping[str, Any]], first: int, count: int) -> list[Batch]:
    """Return prompts with their answers, one question of each of some training images.

    Args:
        processor: The model's.
        rows: Rows to train on.
        first: Number of the first image.
        count: How many images.
    """
    from trimtab.data import SupervisedCollator
    from trimtab.data.scenes import conversation

    collate = SupervisedCollator(processor)
    made = []
    for number in range(first, first + count):
        row = rows[number % len(rows)]
        question = number % len(row["questions"])
        made.append(conversation(row, range(question, question + 1)))
    return [dict(collate(made[start : start + BATCH])) for start in range(0, count, BATCH)]


def prompts_alone(processor: Any, rows: Sequence[Mapping[str, Any]], count: int) -> Batch:
    """Return prompts without their answers, one question of each of the first training images, as one batch.

    Args:
        processor: The model's.
        rows: Rows to train on.
        count: How many images.
    """
    from trimtab.evaluate.prompts import prompts_of_row

    chosen = [rows[number % len(rows)] for number in range(count)]
    prompts = [prompts_of_row(row)[number % len(row["questions"])] for number, row in enumerate(chosen)]
    texts = [processor.apply_chat_template(one.messages, add_generation_prompt=True, tokenize=False) for one in prompts]
    side = processor.tokenizer.padding_side
    processor.tokenizer.padding_side = "left"
    images = [list(prompt.images) for prompt in prompts]
    try:
        return dict(processor(text=texts, images=images, padding=True, return_tensors="pt"))
    finally:
        processor.tokenizer.padding_side = side


def search(model: Any, processor: Any, rows: Sequence[Mapping[str, Any]], samples: int, again: int) -> dict[str, Any]:
    """Search on prompts of the training set, by both criteria, for several thresholds, and on other prompts.

    Returns:
        For each criterion ``curve`` and ``layers`` by threshold; ``again``, the layers of other sets of prompts.
    """
    from trimtab.methods.vtw.layer_choice import choose_layer
    from trimtab.methods.vtw.search import search_withdrawal_layer

    found: dict[str, Any] = {}
    batches = search_batches(processor, rows, 0, samples)
    with _quiet():
        for criterion in ("last_token", "answer"):
            report = search_withdrawal_layer(model, batches, criterion=criterion)
            layers = {
                str(one): choose_layer(report.curve, report.depth, threshold=one, start_layer=report.start_layer)
                for one in THRESHOLDS
            }
            told = report.to_dict()
            names = ("start_layer", "samples", "places", "left")
            found[criterion] = {**{n: told[n] for n in names}, "layers": layers, "curve": told["curve"]}
        others = [
            search_withdrawal_layer(model, search_batches(processor, rows, samples * number, samples)).layer
            for number in range(1, again + 1)
        ]
    return {**found, "again": others}


@contextmanager
def _quiet() -> Iterator[None]:
    """A search that finds no layer is a finding here."""
    import warnings

    from trimtab.errors import TrimtabWarning

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="No layer from", category=TrimtabWarning)
        yield


def judge(
    way: Way, model: Any, processor: Any, rows: Sequence[Mapping[str, Any]], folder: Path, visual: int, kept: Path
) -> dict[str, Any]:
    """Ask all questions while tokens leave in one way; what was asked before is read back.

    Args:
        way: The way.
        model: Opened from `folder`.
        processor: Its processor.
        rows: Rows to judge on.
        folder: The checkpoint.
        visual: Visual tokens of an image.
        kept: File that keeps the result, so that an interrupted run goes on.
    """
    from trimtab.evaluate import exact_match

    if kept.exists():
        found: dict[str, Any] = read_json(kept)
        return found
    with applied(way, model, folder, visual):
        result = exact_match(model, processor, rows, batch_size=16, max_new_tokens=2, wrong_examples=0)
    families = {name: one["accuracy"] for name, one in result["families"].items()}
    names = ("accuracy", "correct", "number", "interval", "marks", "seconds")
    found = {**{name: result[name] for name in names}, "families": families}
    write_json_atomic(kept, found)
    return found
