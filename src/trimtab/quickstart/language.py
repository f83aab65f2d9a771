"""Teach the language model of a small LLaVA to answer before it sees images, and align the projector to its words.

The language model of a real LLaVA has read before it sees; one from scratch spends nearly all of a short run on finding
out how to look a thing up at all. Object lists let it learn that without images: a scene is told as one place per
object, whose input is the sum of the embeddings of the words for that object, and the questions follow. The projector
is then fitted so that every patch comes out as the sum of the words for what it shows, as alignment on captions does
for large models. Both are part of the start that all arms share.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from trimtab.errors import DataError, setting_error
from trimtab.quickstart.fitting import make_optimizer, update
from trimtab.quickstart.model import ASSISTANT, END, START, USER, split_words
from trimtab.quickstart.tower import Labels, patch_features

if TYPE_CHECKING:
    import torch
    from transformers import LlavaForConditionalGeneration, PreTrainedTokenizerFast

ToldObjects = Callable[[Mapping[str, Any]], list[list[str]]]
PatchWords = tuple[tuple[str, ...], ...]
IGNORED = -100
BETAS = (0.9, 0.98)
"""A second moment over fewer steps than AdamW's usual 0.999, for runs of about a thousand."""
CHUNK = 64
"""Images that pass through the vision tower at a time while their features are collected."""


@dataclass(frozen=True, kw_only=True)
class LanguageFit:
    """How the language model is taught and the projector aligned.

    Attributes:
        steps: Updates of the language model, at least 1.
        batch_size: Scenes (or images) per update, at least 1.
        learning_rate: Peak learning rate of the language model (AdamW; warm-up over a tenth, then cosine), above 0.
        turns: Questions per scene at most, at least 1.
        projector_steps: Updates of the projector, at least 1.
        projector_rate: Learning rate of the projector, above 0.
        seed: Seed of the order of scenes, objects and questions.
    """

    steps: int = 1200
    batch_size: int = 32
    learning_rate: float = 2e-3
    turns: int = 6
    projector_steps: int = 300
    projector_rate: float = 3e-3
    seed: int = 0

    def __post_init__(self) -> None:
        """Check every field; see the class for the ranges."""
        for name in ("steps", "batch_size", "turns", "projector_steps"):
            if getattr(self, name) < 1:
                raise setting_error("LanguageFit", name, "at least 1", getattr(self, name))
        for name in ("learning_rate", "projector_rate"):
            if not getattr(self, name) > 0:
                raise setting_error("LanguageFit", name, "above 0", getattr(self, name))


@dataclass(frozen=True)
class ToldScene:
    """A scene in tokens: what its objects are called, and what is asked.

    Attributes:
        objects: Tokens of the words for every object.
        questions: Tokens of every question.
        answers: Tokens of every answer.
    """

    objects: tuple[tuple[int, ...], ...]
    questions: tuple[tuple[int, ...], ...]
    answers: tuple[tuple[int, ...], ...]


def tell_scene(
    row: Mapping[str, Any], objects: Sequence[Sequence[str]], tokenizer: PreTrainedTokenizerFast
) -> ToldScene:
    """Turn a row and the words for its objects into tokens.

    Args:
        row: Row with ``questions`` and ``answers``; its image is not looked at.
        objects: Words for every object; each must be one token of the tokenizer.
        tokenizer: The tokenizer.

    Raises:
        DataError: A word that the tokenizer does not know.
    """

    def tokens(words: Sequence[str]) -> tuple[int, ...]:
        found = _numbers(tokenizer, words)
        for word, number in zip(words, found, strict=True):
            if number == tokenizer.unk_token_id:
                raise DataError(
                    f"tell_scene: the tokenizer does not know {word!r}. "
                    "Build it with all words of objects, questions and answers."
                )
        return tuple(found)

    return ToldScene(
        objects=tuple(tokens(words) for words in objects),
        questions=tuple(tokens(split_words(text)) for text in row["questions"]),
        answers=tuple(tokens(split_words(text)) for text in row["answers"]),
    )


def fit_language(
    model: LlavaForConditionalGeneration,
    tokenizer: PreTrainedTokenizerFast,
    scenes: Sequence[ToldScene],
    settings: LanguageFit | None = None,
    on_step: Callable[[int, float], None] | None = None,
) -> list[float]:
    """Train the language model to answer questions about scenes that it is told.

    A row of a batch is: start, one place per object in random order, and up to `turns` random questions with their
    answers, marked as the chat template marks them. Only answers and what ends them are supervised.

    Args:
        model: A model of `build_model`; its language model, embeddings and head change.
        tokenizer: Its tokenizer.
        scenes: What to tell and ask; scenes without questions are left out.
        settings: How to fit; None for the defaults.
        on_step: Called after every update with its number from 1 and its loss.

    Returns:
        The loss of every update.

    Raises:
        DataError: No scene has a question.
    """
    from torch.nn import functional

    settings = settings or LanguageFit()
    asked = [scene for scene in scenes if scene.questions]
    if not asked:
        raise DataError("fit_language needs scenes with questions, but none came.")
    draw = np.random.default_rng(settings.seed)
    decoder: Any = model.model.language_model
    head: Any = model.get_output_embeddings()
    table: Any = model.get_input_embeddings().weight
    parameters = [*decoder.parameters()]
    parameters += [p for p in head.parameters() if all(p is not known for known in parameters)]
    optimizer, schedule = make_optimizer(parameters, settings.learning_rate, settings.steps, betas=BETAS)
    losses = []
    for step in range(settings.steps):
        chosen = [asked[number] for number in draw.integers(len(asked), size=settings.batch_size)]
        bags, labels = pad_told([_lay_out(scene, tokenizer, settings.turns, draw) for scene in chosen])
        # Padding follows what it could disturb, and causal attention never looks ahead.
        inputs = functional.embedding_bag(
            bags.flatten(0, 1).clamp_min(0),
            table,
            per_sample_weights=(bags >= 0).flatten(0, 1).float(),
            mode="sum",
        ).view(*bags.shape[:2], -1)
        states = decoder(inputs_embeds=inputs, use_cache=False).last_hidden_state[:, :-1]
        supervised = labels[:, 1:] != IGNORED
        loss = functional.cross_entropy(head(states[supervised]), labels[:, 1:][supervised])
        update(loss, parameters, optimizer, schedule)
        losses.append(loss.item())
        if on_step is not None:
            on_step(step + 1, losses[-1])
    return losses


def fit_projector(
    model: LlavaForConditionalGeneration,
    tokenizer: PreTrainedTokenizerFast,
    pixel_values: torch.Tensor,
    labels: Labels | torch.Tensor,
    words: PatchWords,
    settings: LanguageFit | None = None,
    on_step: Callable[[int, float], None] | None = None,
) -> list[float]:
    """Align the projector: every patch comes out as the sum of the embeddings of the words for what it shows.

    Patches of the ground come out as the embedding of the image placeholder.

    Args:
        model: A model of `build_model` with a fitted tower; only its projector changes.
        tokenizer: Its tokenizer.
        pixel_values: Preprocessed images, [image, 3, height, width].
        labels: Classes of every patch, [image, token, kind], counted from 1; 0 of the first kind means ground.
        words: The word of every class of every kind.
        settings: How to fit; None for the defaults.
        on_step: Called after every update with its number from 1 and its loss.

    Returns:
        The loss of every update: mean squared distance in units of the mean squared length of the words' embeddings.

    Raises:
        SettingError: Words and labels have different numbers of kinds or classes.
    """
    import torch

    settings = settings or LanguageFit()
    target = torch.as_tensor(labels)
    if target.shape[-1] != len(words) or any(int(target[..., k].max()) > len(w) for k, w in enumerate(words)):
        counts = [int(target[..., kind].max()) for kind in range(target.shape[-1])]
        raise setting_error("fit_projector", "words", f"one per class, {counts} of them", [len(w) for w in words])
    embeddings: Any = model.get_input_embeddings()
    table = embeddings.weight.detach()
    ground = table[model.config.image_token_id]
    of_kind = [table[_numbers(tokenizer, kind)] for kind in words]
    lookup = [torch.cat([torch.zeros_like(ground)[None], kind]) for kind in of_kind]
    unit = torch.cat(of_kind).pow(2).sum(-1).mean()
    with torch.no_grad():
        features = torch.cat([patch_features(model, part) for part in pixel_values.split(CHUNK)])
    projector: Any = model.model.multi_modal_projector
    parameters = [*projector.parameters()]
    optimizer, schedule = make_optimizer(parameters, settings.projector_rate, settings.projector_steps, betas=BETAS)
    generator = torch.Generator().manual_seed(settings.seed)
    losses = []
    for step in range(settings.projector_steps):
        chosen = torch.randint(len(features), (settings.batch_size,), generator=generator)
        shown = target[chosen]
        told = torch.stack([rows[shown[..., kind]] for kind, rows in enumerate(lookup)]).sum(0)
        told = torch.where(shown[..., :1] > 0, told, ground)
        loss = (projector(features[chosen]) - told).pow(2).sum(-1).mean() / unit
        update(loss, parameters, optimizer, schedule)
        losses.append(loss.item())
        if on_step is not None:
            on_step(step + 1, losses[-1])
    return losses


def pad_told(rows: Sequence[tuple[list[tuple[int, ...]], list[int]]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Pad rows of bags of tokens on the right.

    Args:
        rows: Of every row the tokens of each place and the label of each place.

    Returns:
        Tokens [row, place, token of the bag], -1 where there is none, and labels [row, place], -100 likewise.
    """
    import torch

    places = max(len(bags) for bags, _ in rows)
    most = max(len(bag) for bags, _ in rows for bag in bags)
    tokens = torch.full((len(rows), places, most), -1, dtype=torch.int64)
    labels = torch.full((len(rows), places), IGNORED, dtype=torch.int64)
    for number, (bags, wanted) in enumerate(rows):
        tokens[number, : len(bags)] = torch.tensor([[*bag, *[-1] * (most - len(bag))] for bag in bags])
        labels[number, : len(wanted)] = torch.tensor(wanted)
    return tokens, labels


def _lay_out(
    scene: ToldScene, tokenizer: PreTrainedTokenizerFast, turns: int, draw: np.random.Generator
) -> tuple[list[tuple[int, ...]], list[int]]:
    """Return the tokens of every place and their labels, objects and questions in random order."""
    start, user, assistant, end = _numbers(tokenizer, (START, USER, ASSISTANT, END))
    bags: list[tuple[int, ...]] = [
        (start,),
        *(scene.objects[number] for number in draw.permutation(len(scene.objects))),
    ]
    labels = [IGNORED] * len(bags)
    for number in draw.permutation(len(scene.questions))[:turns]:
        unsupervised = [user, *scene.questions[number], assistant]
        supervised = [*scene.answers[number], end]
        bags += [(token,) for token in (*unsupervised, *supervised)]
        labels += [IGNORED] * len(unsupervised) + supervised
    return bags, labels


def _numbers(tokenizer: PreTrainedTokenizerFast, words: Sequence[str]) -> list[int]:
    return cast("list[int]", tokenizer.convert_tokens_to_ids(list(words)))
