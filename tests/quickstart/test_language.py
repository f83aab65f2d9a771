"""A language model from scratch learns from scenes in words, and the projector to speak in those words."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tests.quickstart.small import SIZES, small_task

from trimtab.data.scenes import COLOURS, DIGITS, QUADRANTS
from trimtab.errors import DataError, SettingError
from trimtab.quickstart.language import (
    LanguageFit,
    ToldScene,
    fit_language,
    fit_projector,
    pad_told,
    tell_scene,
)
from trimtab.quickstart.model import build_model, build_processor
from trimtab.quickstart.proxy_labels import NLVR_WORDS, nlvr_labels, nlvr_told
from trimtab.quickstart.task import make_start, open_start

WORDS = (("red", "blue"), ("ball", "cube"))


@pytest.fixture
def tokenizer():
    spare = [word for kind in WORDS for word in kind]
    return build_processor(SIZES, [*spare, "what", "colour", "?", "is", "it"]).tokenizer


@pytest.fixture
def model(tokenizer):
    return build_model(SIZES, tokenizer, seed=0)


def scene(tokenizer, colour: str) -> ToldScene:
    row = {"questions": ["What colour is it?"], "answers": [colour]}
    return tell_scene(row, [[colour, "ball"]], tokenizer)


def test_a_scene_is_told_in_tokens(tokenizer):
    told = scene(tokenizer, "red")
    assert [tokenizer.convert_ids_to_tokens(list(bag)) for bag in told.objects] == [["red", "ball"]]
    assert tokenizer.convert_ids_to_tokens(list(told.questions[0])) == ["what", "colour", "is", "it", "?"]
    assert tokenizer.convert_ids_to_tokens(list(told.answers[0])) == ["red"]


@pytest.mark.parametrize(
    ("question", "answer", "word"), [("what", "red", "mauve"), ("mauve ?", "red", "red"), ("what", "mauve", "red")]
)
def test_unknown_words_of_objects_questions_and_answers_are_named(question, answer, word, tokenizer):
    with pytest.raises(DataError, match=r"'mauve'.* objects, questions and answers"):
        tell_scene({"questions": [question], "answers": [answer]}, [[word]], tokenizer)


def test_padding_is_marked_in_tokens_and_labels():
    tokens, labels = pad_told([([(1,), (2, 3)], [-100, 5]), ([(4,)], [-100])])
    assert tokens.tolist() == [[[1, -1], [2, 3]], [[4, -1], [-1, -1]]]
    assert labels.tolist() == [[-100, 5], [-100, -100]]


def test_the_language_model_learns_what_it_is_told_and_nothing_else_changes(model, tokenizer):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    scenes = [scene(tokenizer, colour) for colour in WORDS[0]]
    seen = []
    losses = fit_language(
        model, tokenizer, scenes, LanguageFit(steps=150, batch_size=8), lambda step, loss: seen.append((step, loss))
    )
    assert losses[-1] < 0.1 < losses[0], "which colour it is stands only among the objects"
    assert seen == list(enumerate(losses, start=1))
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed
    assert all("language_model" in name or name == "lm_head.weight" for name in changed)


def test_teaching_is_the_same_with_one_seed_and_leaves_the_global_state(tokenizer):
    scenes = [scene(tokenizer, colour) for colour in WORDS[0]]
    state = torch.random.get_rng_state()
    one, same, other = (
        fit_language(build_model(SIZES, tokenizer), tokenizer, scenes, LanguageFit(steps=3, batch_size=4, seed=seed))
        for seed in (1, 1, 2)
    )
    assert one == same != other
    assert torch.equal(torch.random.get_rng_state(), state)


def test_scenes_without_questions_are_left_out(model, tokenizer):
    empty = tell_scene({"questions": [], "answers": []}, [["red"]], tokenizer)
    fit_language(model, tokenizer, [empty, scene(tokenizer, "red")], LanguageFit(steps=1, batch_size=4))
    with pytest.raises(DataError, match="none came"):
        fit_language(model, tokenizer, [empty], LanguageFit(steps=1))


def test_the_projector_comes_to_speak_in_words(model, tokenizer):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    generator = torch.Generator().manual_seed(0)
    colours = torch.randint(3, (12, 64), generator=generator)
    labels = torch.stack([colours, torch.where(colours > 0, 1, 0)], dim=-1)
    shown = colours.view(12, 8, 8).repeat_interleave(8, 1).repeat_interleave(8, 2)
    pixels = torch.stack([(shown == 1) * 2.0, (shown == 2) * 2.0, (shown == 0) * 1.0], dim=1)
    fit = LanguageFit(projector_steps=80, batch_size=4, projector_rate=1e-2)
    losses = fit_projector(model, tokenizer, pixels, labels, WORDS, fit)
    assert losses[-1] < 0.2 * losses[0]
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert all("multi_modal_projector" in name for name in changed)
    features = model.get_image_features(pixel_values=pixels, return_dict=True).pooler_output
    embeddings = model.get_input_embeddings().weight.detach()
    red, blue, ball = embeddings[tokenizer.convert_tokens_to_ids(["red", "blue", "ball"])]
    wanted = torch.stack([embeddings[model.config.image_token_id], red + ball, blue + ball])
    nearest = torch.cdist(torch.stack(list(features)).flatten(0, 1), wanted).argmin(-1)
    assert (nearest == colours.flatten()).float().mean() > 0.95


def test_a_task_may_teach_its_common_start(tmp_path):
    task = small_task()
    told = replace(
        task,
        train=[task.train[number] for number in range(len(task.train))],
        language=LanguageFit(steps=3, batch_size=4, projector_steps=2),
        told_objects=lambda row: [[o["digit"], o["colour"], o["quadrant"]] for o in row["objects"]],
        patch_words=(DIGITS, tuple(COLOURS), QUADRANTS),
    )
    done = {}
    make_start(task, 0, tmp_path / "plain", lambda *_: None)
    make_start(told, 0, tmp_path / "told", lambda what, step, _: done.update({what: step}))
    assert (done["language model"], done["projector"]) == (3, 2)
    assert "language" in told.settings()
    assert "language" not in task.settings(), "what made a start before means the same start now"
    plain, _ = open_start(tmp_path / "plain")
    taught, processor = open_start(tmp_path / "told")
    assert processor.tokenizer.unk_token_id not in processor.tokenizer.convert_tokens_to_ids([*DIGITS, *QUADRANTS])
    ends = taught.state_dict()
    shared = [
        (name, torch.equal(value, ends[name])) for name, value in plain.state_dict().items() if ".layers.0" in name
    ]
    assert all(equal for name, equal in shared if "vision_tower" in name), "the tower is fitted as without teaching"
    assert not any(equal for name, equal in shared if "language_model" in name and "proj" in name)


@pytest.mark.parametrize(("field", "empty"), [("told_objects", None), ("patch_words", ())])
def test_a_task_with_language_needs_words_for_its_scenes(field, empty):
    words = {"told_objects": lambda row: [], "patch_words": WORDS, field: empty}
    with pytest.raises(SettingError, match=rf"Task\.{field} must be given .*Give {field}, or set language=None"):
        replace(small_task(), language=LanguageFit(), **words)
    assert replace(small_task(), **words).language is None


def test_words_must_fit_the_labels(model, tokenizer):
    labels = torch.full((1, 64, 2), 3)
    with pytest.raises(SettingError, match=r"\[3, 3\]"):
        fit_projector(model, tokenizer, torch.zeros(1, 3, 64, 64), labels, WORDS)


@pytest.mark.parametrize(
    "field", ["steps", "batch_size", "turns", "projector_steps", "learning_rate", "projector_rate"]
)
def test_settings_have_ranges(field):
    with pytest.raises(SettingError, match=field):
        LanguageFit(**{field: 0})


def test_nlvr_objects_are_told_in_the_words_of_their_patches():
    row = {"objects": [["yellow", "square", 20, 40, 0], ["black", "circle", 10, 90, 90]]}
    told = nlvr_told(row)
    assert told == [
        ["yellow", "square", "medium", "row2", "column6"],
        ["black", "circle", "small", "row10", "column10"],
    ]

    class Image:
        width = 100

    labels = nlvr_labels({**row, "image": Image}, 10).reshape(10, 10, 5)
    middle = [kind[number - 1] for kind, number in zip(NLVR_WORDS, labels[9, 9], strict=True)]
    assert middle == told[1]
