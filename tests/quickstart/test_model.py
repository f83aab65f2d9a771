"""The small LLaVA: stock classes, saved and read back by stock transformers, and a tower that can be fitted."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from trimtab.data.scenes import COLOURS, DIGITS, QUADRANTS, SceneSettings, conversation, make_scenes, vocabulary
from trimtab.errors import DataError, SettingError
from trimtab.quickstart.model import (
    IMAGE,
    SmallLlava,
    build_model,
    build_processor,
    build_tokenizer,
    collect_words,
    split_words,
)
from trimtab.quickstart.proxy_labels import scene_labels
from trimtab.quickstart.tower import TowerFit, fit_tower, patch_features

SMALL = SmallLlava(image_size=32, patch_size=4, tower_layers=2, tower_width=32, layers=2, width=32, heads=2)
SCENES = SceneSettings(canvas=32, cell=4, size=1, pairs=0.5, distractors=0)


@pytest.fixture(scope="module")
def processor():
    return build_processor(SMALL, vocabulary())


def inputs_of(processor, rows, questions=None):
    """Processor outputs of conversations, with the assistant's places marked."""
    messages = []
    for row in rows:
        talk = conversation(row, questions)
        talk["messages"][0]["content"][0]["image"] = row["image"]
        messages.append(talk["messages"])
    return processor.apply_chat_template(
        messages,
        tokenize=True,
        return_dict=True,
        return_assistant_tokens_mask=True,
        return_tensors="pt",
        processor_kwargs={"padding": True},
    )


def test_words_are_split_at_marks_and_lowered():
    assert split_words("Where is it, the UPPER-left?") == ["where", "is", "it", ",", "the", "upper-left", "?"]


def test_collect_words_takes_questions_and_answers():
    rows = [{"questions": ["Is it Red?"], "answers": ["Yes"]}, {"questions": ["Red?"], "answers": ["no"]}]
    assert collect_words(rows) == ["?", "is", "it", "no", "red", "yes"]


def test_tokenizer_agrees_with_split_words():
    tokenizer = build_tokenizer(vocabulary())
    for row in make_scenes("train", 50).texts():
        for text in (*row["questions"], *row["answers"]):
            tokens = tokenizer.convert_ids_to_tokens(tokenizer.encode(text, add_special_tokens=False))
            assert tokens == split_words(text)
    assert tokenizer.convert_ids_to_tokens(tokenizer.encode("eleven zebras?", add_special_tokens=False)) == [
        "<unk>",
        "<unk>",
        "?",
    ]


@pytest.mark.parametrize("words", [[], ["Red"], ["two words"], ["what?"]])
def test_tokenizer_refuses_words_it_could_not_find_again(words):
    with pytest.raises(DataError, match="build_tokenizer"):
        build_tokenizer(words)


def test_conversation_expands_the_image_and_supervises_answers_only(processor):
    row = make_scenes("train", 1, settings=SCENES)[0]
    batch = inputs_of(processor, [row])
    ids, spoken = batch["input_ids"][0], torch.as_tensor(batch["assistant_masks"])[0].bool()
    assert int((ids == processor.image_token_id).sum()) == SMALL.visual_tokens == 64
    answers = " </s> ".join(row["answers"]) + " </s>"
    assert processor.tokenizer.decode(ids[spoken]) == answers
    rest = processor.tokenizer.decode(ids[~spoken]).replace(f"{IMAGE} ", "")
    turns = " ".join(f"<user> {' '.join(split_words(question))} <assistant>" for question in row["questions"])
    assert rest == f"<s> {turns}"


def test_prompt_ends_where_the_answer_begins(processor):
    messages = conversation(make_scenes("train", 1, settings=SCENES)[0], [0])["messages"]
    prompt = processor.apply_chat_template(messages[:1], add_generation_prompt=True)
    whole = processor.apply_chat_template(messages)
    assert whole.startswith(prompt)
    assert prompt.endswith("<assistant>")


def test_plain_text_content_is_taken_too(processor):
    messages = [{"role": "user", "content": "which digit?"}, {"role": "assistant", "content": "two"}]
    assert processor.apply_chat_template(messages) == "<s> <user> which digit? <assistant> two </s>"


def test_images_are_resized_and_their_ground_becomes_zero(processor):
    grounds = np.full((50, 50, 3), round(SMALL.image_mean * 255), dtype=np.uint8)
    pixels = processor.image_processor(grounds, return_tensors="pt")["pixel_values"]
    assert pixels.shape == (1, 3, 32, 32)
    assert pixels.abs().max() < 0.02


@pytest.mark.parametrize("sizes", [SMALL, SmallLlava(image_size=60, patch_size=6, tower_layers=1, layers=1)])
def test_placeholders_and_features_fit_together(sizes):
    processor = build_processor(sizes, vocabulary())
    model = build_model(sizes, processor.tokenizer)
    batch = inputs_of(processor, make_scenes("train", 2, settings=SCENES))
    with torch.no_grad():
        features = model.get_image_features(batch["pixel_values"], return_dict=True).pooler_output
        logits = model(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], pixel_values=batch["pixel_values"]
        ).logits
    assert [len(one) for one in features] == [sizes.visual_tokens] * 2
    assert logits.shape == (*batch["input_ids"].shape, len(processor.tokenizer))


def test_default_has_256_visual_tokens():
    assert SmallLlava().visual_tokens == 256


def test_weights_depend_on_the_seed_alone(processor):
    state = torch.random.get_rng_state()
    one, same, other = (build_model(SMALL, processor.tokenizer, seed=seed).state_dict() for seed in (1, 1, 2))
    assert torch.equal(state, torch.random.get_rng_state())
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not torch.equal(one["lm_head.weight"], other["lm_head.weight"])


def test_stock_classes_load_what_was_saved(processor, tmp_path):
    from transformers import AutoProcessor, LlavaForConditionalGeneration

    model = build_model(SMALL, processor.tokenizer).eval()
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    loaded, report = LlavaForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    rows = list(make_scenes("test", 2, settings=SCENES))
    before, after = (inputs_of(one, rows) for one in (processor, AutoProcessor.from_pretrained(tmp_path)))
    for name in ("input_ids", "attention_mask", "pixel_values"):
        assert torch.equal(before[name], after[name])
    asked = {name: before[name] for name in ("input_ids", "attention_mask", "pixel_values")}
    with torch.no_grad():
        assert torch.equal(model(**asked).logits, loaded.eval()(**asked).logits)
    assert json.loads((tmp_path / "generation_config.json").read_text())["eos_token_id"] == 3


def test_generation_stops_at_the_closing_token(processor):
    model = build_model(SMALL, processor.tokenizer).eval()
    end = processor.tokenizer.eos_token_id
    row = make_scenes("test", 1, settings=SCENES)[0]
    messages = conversation(row, [0])["messages"][:1]
    messages[0]["content"][0]["image"] = row["image"]
    prompt = processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    bias = torch.full((len(processor.tokenizer),), -1e4)
    bias[end] = 1e4
    model.lm_head.register_forward_hook(lambda module, inputs, logits: logits + bias)
    told = model.generate(**prompt, max_new_tokens=5, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert told.tolist() == [end]


def test_first_attention_of_the_tower_looks_at_one_neighbour_per_head(processor):
    sizes = SmallLlava(image_size=32, patch_size=4, tower_layers=1, tower_width=64, tower_heads=4, layers=1)
    tower = build_model(sizes, processor.tokenizer).model.vision_tower
    attention, places = tower.encoder.layers[0].self_attn, tower.embeddings.position_embedding.weight[1:]
    query, key = (
        (places @ maps.weight.T).view(64, 4, 16).transpose(0, 1) for maps in (attention.q_proj, attention.k_proj)
    )
    seen = (query @ key.transpose(1, 2)).argmax(-1)
    middle = 3 * 8 + 4
    assert seen[:, middle].tolist() == [middle + 1, middle + 8, middle - 1, middle - 8]


def test_locality_zero_leaves_the_stock_attention(processor):
    plain = SmallLlava(**{**SMALL.__dict__, "tower_locality": 0.0})
    local, stock = (build_model(one, processor.tokenizer).state_dict() for one in (SMALL, plain))
    differing = {name for name in local if not torch.equal(local[name], stock[name])}
    assert differing == {f"model.vision_tower.encoder.layers.{layer}.self_attn.{maps}_proj.weight"
                         for layer in range(2) for maps in "qk"}  # fmt: skip


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ({"image_size": 100}, "image_size must be a multiple of patch_size=8"),
        ({"patch_size": 0}, "patch_size must be at least 1"),
        ({"tower_width": 130}, "tower_width must be a multiple of tower_heads=4"),
        ({"width": 100}, "width must be a multiple of twice heads=4"),
        ({"mlp_ratio": 0}, "mlp_ratio must be above 0"),
        ({"init_scale": -1.0}, "init_scale must be above 0"),
    ],
)
def test_bad_sizes_are_named(sizes, words):
    with pytest.raises(SettingError, match=words):
        SmallLlava(**sizes)


def test_scene_labels_name_what_lies_under_a_patch():
    for row in make_scenes("train", 10, settings=SCENES):
        labels = scene_labels(row, 8).reshape(8, 8, 3)
        for entry in row["objects"]:
            left, top, _, _ = entry["box"]
            found = labels[top // 4, left // 4]
            assert DIGITS[found[0] - 1] == entry["digit"]
            assert list(COLOURS)[found[1] - 1] == entry["colour"]
            assert QUADRANTS[found[2] - 1] == entry["quadrant"]
        assert (labels[..., 0] > 0).sum() == len(row["objects"])


def fitted(processor, steps, seed=0):
    rows = list(make_scenes("train", 48, settings=SCENES))
    pixels = processor.image_processor([row["image"] for row in rows], return_tensors="pt")["pixel_values"]
    labels = np.stack([scene_labels(row, 8) for row in rows])
    model = build_model(SMALL, processor.tokenizer)
    seen = []
    losses = fit_tower(model, pixels, labels, TowerFit(steps=steps, seed=seed), lambda *step: seen.append(step))
    assert seen == list(enumerate(losses, 1))
    return model, losses, pixels, labels


def test_fitting_teaches_the_tower_and_freezes_it(processor):
    fresh = build_model(SMALL, processor.tokenizer).state_dict()
    model, losses, pixels, labels = fitted(processor, 60)
    assert np.mean(losses[-5:]) < 0.6 * np.mean(losses[:5])
    changed = {name.split(".")[1] for name, value in model.state_dict().items() if not torch.equal(value, fresh[name])}
    assert changed == {"vision_tower"}
    frozen = {name.split(".")[1] for name, value in model.named_parameters() if not value.requires_grad}
    assert frozen == {"vision_tower"}
    with torch.no_grad():
        features = torch.nn.functional.normalize(patch_features(model, pixels), dim=-1)
    shown = torch.as_tensor(labels[..., 0] > 0)
    ground = features[~shown].mean(0)
    assert (features[shown] @ ground).mean() < (features[~shown] @ ground).mean() - 0.2


def test_fitting_depends_on_the_seed_alone(processor):
    state = torch.random.get_rng_state()
    one, same, other = (fitted(processor, 3, seed)[1] for seed in (1, 1, 2))
    assert torch.equal(state, torch.random.get_rng_state())
    assert one == same
    assert one != other


def test_labels_of_another_grid_are_refused(processor):
    model = build_model(SMALL, processor.tokenizer)
    with pytest.raises(SettingError, match=r"\[2 images, 64 patches, kinds\]"):
        fit_tower(model, torch.zeros(2, 3, 32, 32), np.zeros((2, 16, 1), dtype=np.int64))


@pytest.mark.parametrize("changes", [{"steps": 0}, {"batch_size": 0}, {"learning_rate": 0.0}])
def test_bad_fit_settings_are_named(changes):
    with pytest.raises(SettingError, match=next(iter(changes))):
        TowerFit(**changes)
