"""Ask a model every question by greedy generation and count the answers that match."""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from trimtab.errors import DataError, setting_error
from trimtab.evaluate.intervals import wilson_interval
from trimtab.evaluate.prompts import Prompt, prompt_inputs, prompts_of_rows

if TYPE_CHECKING:
    import torch

Batch = dict[str, Any]
Prepare = Callable[[Batch], Mapping[str, Any]]


def plain_answer(text: str) -> str:
    """Return an answer in lower case, with single spaces and without a closing period."""
    return " ".join(text.lower().split()).rstrip(".").rstrip()


def exact_match(
    model: Any,
    processor: Any,
    rows: Iterable[Mapping[str, Any]],
    *,
    batch_size: int = 16,
    max_new_tokens: int = 8,
    prepare: Prepare | None = None,
    progress: Callable[[int, int], None] | None = None,
    normalize: Callable[[str], str] = plain_answer,
    predictions: bool = False,
    wrong_examples: int = 20,
) -> dict[str, Any]:
    """Ask every question as a prompt of its own and compare the generated answer with the true one.

    Greedy, without beams; prompts are batched in their order, by number of images, with padding on the left. An image
    that several questions of a batch share passes through the vision tower once where the model's inputs allow it (one
    row of pixels per image, features of equal form); the answers are the same either way. Rows are read as they are
    asked about and their images let go again, so that a large set needs no more memory than a small one.

    Args:
        model: A transformers model with `generate`; its mode and generation settings are restored at the end, also
            after an error.
        processor: Its processor, with a chat template; the padding side is restored likewise.
        rows: Question rows or message rows, see `trimtab.evaluate.prompts.prompts_of_row`. A sequence that decodes
            its images when a row is asked for is read row by row.
        batch_size: Questions per batch, at least 1.
        max_new_tokens: Tokens per answer at most, at least 1.
        prepare: Swaps the inputs of a batch for other ones, for example for the pruned view. It gets what the
            processor made, pixels included, on the model's device, and returns the arguments of `generate`, with
            ``input_ids`` or ``inputs_embeds``.
        progress: Called after every batch with the rows read so far and the rows in all (what was read, where
            the rows have no length).
        normalize: Applied to both answers before they are compared.
        predictions: Whether to return every generated answer.
        wrong_examples: How many wrong answers to return at most.

    Returns:
        ``accuracy``, ``correct``, ``number``, ``interval`` (95 %, Wilson), ``families`` (the same per family),
        ``marks`` (one ``"0"`` or ``"1"`` per question, in order), ``wrong`` (examples with row, family, question,
        answer and predicted), ``seconds``, and ``predictions`` if asked for.

    Raises:
        DataError: No rows, or a row of neither form.
        SettingError: A number outside its range.
    """
    for name, value in (("batch_size", batch_size), ("max_new_tokens", max_new_tokens)):
        if value < 1:
            raise setting_error("exact_match", name, "at least 1", value)
    began = time.perf_counter()
    total = len(rows) if isinstance(rows, Sized) else None
    asked: list[Prompt] = []
    answers: dict[int, str] = {}
    with _asking(model, processor):
        for numbers, batch in _batches(_numbered(prompts_of_rows(rows), asked), batch_size):
            answers.update(zip(numbers, _answer(model, processor, batch, max_new_tokens, prepare), strict=True))
            if progress is not None:
                read = asked[-1].row + 1
                progress(read, total or read)
    if not asked:
        raise DataError("There is no question to ask: no rows came. Give at least one row.")
    prompts, predicted = asked, [answers[number] for number in range(len(asked))]
    result = _score(prompts, predicted, normalize, wrong_examples)
    result["seconds"] = round(time.perf_counter() - began, 3)
    return {**result, "predictions": predicted} if predictions else result


@contextmanager
def _asking(model: Any, processor: Any) -> Iterator[None]:
    """Hold the model in evaluation mode without gradients and the tokenizer padding on the left."""
    import torch

    tokenizer = getattr(processor, "tokenizer", processor)
    modes = [(module, module.training) for module in model.modules()]
    side = tokenizer.padding_side
    try:
        model.eval()
        tokenizer.padding_side = "left"
        with torch.no_grad():
            yield
    finally:
        tokenizer.padding_side = side
        for module, mode in modes:
            module.training = mode


def _numbered(prompts: Iterable[Prompt], asked: list[Prompt]) -> Iterator[tuple[int, Prompt]]:
    """Yield prompts with their numbers, and keep of each what scoring needs: all but conversation and images."""
    for number, prompt in enumerate(prompts):
        asked.append(replace(prompt, messages=[], images=()))
        yield number, prompt


def _batches(numbered: Iterable[tuple[int, Prompt]], batch_size: int) -> Iterator[tuple[list[int], list[Prompt]]]:
    """Yield neighbouring prompts with equally many images, and their numbers; questions of an image stay together."""
    waiting: dict[int, list[tuple[int, Prompt]]] = {}
    for number, prompt in numbered:
        of_kind = waiting.setdefault(len(prompt.images), [])
        of_kind.append((number, prompt))
        if len(of_kind) == batch_size:
            yield _parted(waiting.pop(len(prompt.images)))
    for of_kind in waiting.values():
        yield _parted(of_kind)


def _parted(numbered: Sequence[tuple[int, Prompt]]) -> tuple[list[int], list[Prompt]]:
    return [number for number, _ in numbered], [prompt for _, prompt in numbered]


def _answer(
    model: Any, processor: Any, batch: Sequence[Prompt], max_new_tokens: int, prepare: Prepare | None
) -> list[str]:
    """Generate the answers of one batch."""
    inputs = prompt_inputs(processor, batch).to(model.device)
    given = dict(prepare(dict(inputs))) if prepare else _share_images(model, dict(inputs), batch)
    made = model.generate(**given, generation_config=_greedy(model, processor, max_new_tokens))
    prompt_length = given["input_ids"].shape[1] if given.get("input_ids") is not None else 0
    tokenizer = getattr(processor, "tokenizer", processor)
    return list(tokenizer.batch_decode(made[:, prompt_length:], skip_special_tokens=True))


def _greedy(model: Any, processor: Any, max_new_tokens: int) -> Any:
    """Return settings of plain greedy generation that end where the model ends."""
    from transformers import GenerationConfig

    tokenizer = getattr(processor, "tokenizer", processor)
    own = getattr(model, "generation_config", None)
    end = getattr(own, "eos_token_id", None)
    end = tokenizer.eos_token_id if end is None else end
    pad = tokenizer.pad_token_id
    return GenerationConfig(
        do_sample=False, num_beams=1, max_new_tokens=max_new_tokens, eos_token_id=end, pad_token_id=pad,
        temperature=1.0, top_p=1.0, top_k=50, repetition_penalty=1.0,
    )  # fmt: skip


def _share_images(model: Any, inputs: Batch, batch: Sequence[Prompt]) -> Batch:
    """Encode each distinct image once if inputs and features stand one per image; else return the inputs."""
    if "generate" in vars(model):  # someone put an own one on this model, which prunes images and must see them
        return inputs
    images = [image for prompt in batch for image in prompt.images]
    position = {key: number for number, key in enumerate(dict.fromkeys(map(id, images)))}
    visual = {name: inputs[name] for name in _visual_names(model) if name in inputs}
    per_image = "pixel_values_local" not in visual and all(len(value) == len(images) for value in visual.values())
    if len(position) == len(images) or "pixel_values" not in visual or not per_image:
        return inputs
    features = _encode_once(model, visual, [position[id(image)] for image in images])
    if features is None:
        return inputs
    return {**{n: v for n, v in inputs.items() if n not in visual}, "mm_encoder_outputs": {"image": features}}


def _visual_names(model: Any) -> list[str]:
    """Return the inputs of the model's encoder function, or none where its forward takes no ready features."""
    takes = "mm_encoder_outputs" in inspect.signature(model.forward).parameters
    if not (takes and hasattr(model, "get_image_features")):  # Fuyu has it on its base model only
        return []
    return [name for name in inspect.signature(model.get_image_features).parameters if name != "kwargs"]


def _encode_once(model: Any, visual: Mapping[str, torch.Tensor], wanted: Sequence[int]) -> Any:
    """Encode the first occurrence of each image and repeat the features; None where they are not one per image."""
    import torch

    firsts = [wanted.index(number) for number in range(max(wanted) + 1)]
    output = model.get_image_features(**{name: value[firsts] for name, value in visual.items()}, return_dict=True)
    found = output.pooler_output
    if len(found) != len(firsts) or getattr(output, "deepstack_features", None) is not None:
        return None
    repeated = [found[number] for number in wanted]
    output.pooler_output = torch.stack(repeated) if isinstance(found, torch.Tensor) else repeated
    return output


def _score(
    prompts: Sequence[Prompt], answers: Sequence[str], normalize: Callable[[str], str], wrong_examples: int
) -> dict[str, Any]:
    hits = [normalize(a) in {normalize(x) for x in p.answers} for p, a in zip(prompts, answers, strict=True)]
    families = sorted({prompt.family for prompt in prompts})
    wrong = [
        {"row": p.row, "family": p.family, "question": p.question, "answer": p.answers[0], "predicted": a}
        for p, a, hit in zip(prompts, answers, hits, strict=True)
        if not hit
    ]
    of_family = {name: [h for h, p in zip(hits, prompts, strict=True) if p.family == name] for name in families}
    return {
        **_share(hits),
        "families": {name: _share(marks) for name, marks in of_family.items()},
        "marks": "".join(str(int(hit)) for hit in hits),
        "wrong": _spread(wrong, wrong_examples),
    }


def _share(hits: Sequence[bool]) -> dict[str, Any]:
    correct = sum(hits)
    low, high = wilson_interval(correct, len(hits))
    return {"accuracy": correct / len(hits), "correct": correct, "number": len(hits), "interval": [low, high]}


def _spread(wrong: Sequence[dict[str, Any]], most: int) -> list[dict[str, Any]]:
    """Return at most that many examples, evenly from first to last."""
    if len(wrong) <= most:
        return list(wrong)
    return [wrong[number * len(wrong) // most] for number in range(most)]
