"""Looking at one image: the pruner's choice is that of training, the tower runs once, and the model stays as it was."""

from __future__ import annotations

import base64
import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tests.conformance.families import SUITE
from tests.run.small_run import SIZES, TOKENS

from trimtab.data.scenes import SceneSettings, make_scenes, vocabulary
from trimtab.dualspeed import DualSpeedConfig, attach, prune_for_inference
from trimtab.dualspeed.look import ImageLook, PixelLook
from trimtab.errors import DataError, SettingError
from trimtab.quickstart.model import build_model, build_processor

PRUNERS = (
    ("keep_all", {}),
    ("random", {}),
    ("grid_pool", {"merge": True}),
    ("cls_topk", {}),
    ("divprune", {"pre_projector": True}),
    ("dpp", {"use_text": True}),
    ("vispruner", {}),
    ("scope", {}),
    ("visionzip", {}),
)


@pytest.fixture(scope="module")
def processor() -> Any:
    return build_processor(SIZES, vocabulary())


@pytest.fixture(scope="module")
def model(processor: Any) -> Any:
    return build_model(SIZES, processor.tokenizer)


@pytest.fixture(scope="module")
def image() -> Image.Image:
    found: Image.Image = make_scenes("test", 1, settings=SceneSettings(canvas=96))[0]["image"]
    return found


def settings(pruner: str, options: dict[str, Any], **changes: Any) -> DualSpeedConfig:
    given = {"keep_ratio": 0.25, "isolator_tokens": 2, "seed": 3, **changes}
    if pruner == "keep_all":
        given["isolator_tokens"] = 0
    return DualSpeedConfig(pruner=pruner, pruner_options=options, **given)


def batch_of(processor: Any, image: Any, question: str) -> dict[str, Any]:
    conversation = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]
    text = processor.apply_chat_template(conversation, add_generation_prompt=True, tokenize=False)
    return dict(processor(text=[text], images=[[image]], padding=True, return_tensors="pt"))


# the choice is that of training and of pruned inference -------------------------------------------------------------


@pytest.mark.parametrize(("pruner", "options"), PRUNERS)
def test_the_choice_is_that_of_training(
    model: Any, processor: Any, image: Image.Image, pruner: str, options: dict[str, Any]
) -> None:
    config = settings(pruner, options)
    seen = ImageLook(model, processor, image, "how many dots are there ?").choose(config)
    handle = attach(model, config)
    try:
        wanted = handle.chosen_tokens(batch_of(processor, image, "how many dots are there ?"))[0].tolist()
    finally:
        handle.detach()
    assert list(seen.parts[0].kept) == wanted
    assert seen.kept_count == len(wanted)
    assert seen.tokens == TOKENS


@pytest.mark.parametrize("name", ["llava_next", "qwen2_5_vl", "idefics3", "internvl", "gemma3"])
@pytest.mark.parametrize("pruner", ["divprune", "random"])
def test_the_choice_is_that_of_training_for_tiles_and_grids(name: str, pruner: str) -> None:
    model = SUITE[name].build_model()
    batch = SUITE[name].make_batch(model, (1,))
    config = settings(pruner, {}, keep_ratio=0.5, isolator_tokens=1, keep_spread="content")
    seen = ImageLook.of_batch(model, batch).choose(config)
    handle = attach(model, config)
    try:
        wanted = handle.chosen_tokens(batch)
    finally:
        handle.detach()
    assert seen.kept_count == sum(len(one) for one in wanted)
    if name == "llava_next":  # cells are in raster order without newlines, so they are named by their tokens
        look = ImageLook.of_batch(model, batch)
        cells = [one.tokens[cell] for one, part in zip(look._seen.cells, seen.parts, strict=True) for cell in part.kept]
        assert sorted(cells) == wanted[0].tolist()


def test_the_choice_is_that_of_pruned_inference(model: Any, processor: Any, image: Image.Image) -> None:
    config = settings("divprune", {}, isolator_tokens=0)
    look = ImageLook(model, processor, image, "what is it ?")
    seen = look.choose(config)
    model.eval()
    with prune_for_inference(model, config) as handle, torch.no_grad():
        short = handle.prune_inputs(batch_of(processor, image, "what is it ?"))
    kept = short["mm_encoder_outputs"]["image"].pooler_output
    given = torch.cat(list(kept)) if not isinstance(kept, torch.Tensor) else kept.reshape(-1, kept.shape[-1])
    assert torch.equal(given, look._encoded.blocks[0][list(seen.parts[0].kept)])


def test_the_question_steers_a_pruner_that_reads_it(model: Any, processor: Any, image: Image.Image) -> None:
    config = settings("dpp", {"use_text": True})
    kept = {
        question: ImageLook(model, processor, image, question).choose(config).parts[0].kept
        for question in ("how many dots are there ?", "what is the colour of the digit ?", "")
    }
    assert len(set(kept.values())) > 1
    plain = settings("dpp", {})
    assert len({ImageLook(model, processor, image, one).choose(plain).parts[0].kept for one in kept}) == 1


# one run of the tower, and no trace on the model --------------------------------------------------------------------


def test_the_tower_runs_once_however_many_pruners_are_asked(model: Any, processor: Any, image: Image.Image) -> None:
    calls: list[int] = []
    remover = model.model.vision_tower.register_forward_hook(lambda *_: calls.append(1))
    look = ImageLook(model, processor, image)
    for pruner, reason in look.pruners().items():
        assert reason is None
        look.select(pruner, keep_ratio=0.5)
    remover.remove()
    assert len(calls) == 1


def test_the_model_stays_as_it_was(model: Any, processor: Any, image: Image.Image) -> None:
    model.train()
    model.model.vision_tower.eval()
    before = {name: module.training for name, module in model.named_modules()}
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    ImageLook(model, processor, image).select("random")
    assert {name: module.training for name, module in model.named_modules()} == before
    assert [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()] == hooks
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    assert all(one.grad is None for one in model.parameters())


def test_a_model_under_training_can_be_looked_through(model: Any, processor: Any, image: Image.Image) -> None:
    plain = ImageLook(model, processor, image).select("divprune")
    handle = attach(model, settings("divprune", {}))
    try:
        assert ImageLook(model, processor, image).select("divprune").parts == plain.parts
    finally:
        handle.detach()


# what is told -------------------------------------------------------------------------------------------------------


def test_distances_are_those_to_the_nearest_kept_token(model: Any, processor: Any, image: Image.Image) -> None:
    look = ImageLook(model, processor, image)
    part = look.select("divprune", keep_ratio=0.2).parts[0]
    features = look._encoded.blocks[0].double()
    unit = features / features.norm(dim=1, keepdim=True)
    for cell, told in enumerate(part.distance):
        nearest = max(float(unit[cell] @ unit[other]) for other in part.kept)
        assert told == pytest.approx(0 if cell in part.kept else max(0, 1 - nearest), abs=1e-5)
    assert all(part.distance[cell] == 0 for cell in part.kept)


def test_attention_is_what_attention_pruners_go_by(model: Any, processor: Any, image: Image.Image) -> None:
    part = ImageLook(model, processor, image).select("cls_topk", keep_ratio=0.25).parts[0]
    assert part.attention is not None
    best = sorted(range(TOKENS), key=lambda cell: -part.attention[cell])[: len(part.kept)]
    assert tuple(sorted(best)) == part.kept


def test_the_picture_is_what_the_tower_sees(model: Any, processor: Any) -> None:
    values = np.zeros((64, 64, 3), dtype=np.uint8)
    values[:32, :32] = (250, 200, 40)
    picture = ImageLook(model, processor, Image.fromarray(values)).picture
    assert picture.size == (SIZES.image_size, SIZES.image_size)
    half = SIZES.image_size // 2
    shown = np.asarray(picture).astype(int)
    assert np.abs(shown[: half - 4, : half - 4] - (250, 200, 40)).max() <= 2
    assert shown[half + 4 :, half + 4 :].max() <= 2


def test_pruners_that_a_model_cannot_serve_have_a_reason() -> None:
    model = SUITE["qwen2_5_vl"].build_model()
    look = ImageLook.of_batch(model, SUITE["qwen2_5_vl"].make_batch(model, (1,)))
    reasons = look.pruners()
    assert reasons["divprune"] is None
    assert "class-token attention" in str(reasons["cls_topk"])
    with pytest.raises(SettingError, match="class-token attention"):
        look.select("cls_topk")
    assert look.select("divprune").parts == ()  # the order of the patches is not known without the image
    assert "order" in look.select("divprune").reason


# pixels alone -------------------------------------------------------------------------------------------------------


def test_pixels_alone_have_576_tokens(image: Image.Image) -> None:
    look = PixelLook(image)
    assert look.tokens == 576
    seen = look.select("divprune", keep_ratio=0.1)
    assert (seen.tokens, seen.kept_count, len(seen.parts)) == (576, 57, 1)
    assert seen.parts[0].grid == (24, 24)
    assert seen.parts[0].attention is None
    assert seen.picture.size == (336, 336)
    assert {name for name, why in look.pruners().items() if why is None} == {
        "divprune", "dpp", "grid_pool", "keep_all", "random",
    }  # fmt: skip


def test_features_of_pixels_are_the_patches() -> None:
    values = np.zeros((4, 4, 3), dtype=np.uint8)
    values[2:, :2] = 255  # the left lower patch
    look = PixelLook(Image.fromarray(values), patch=2, side=4)
    assert look.tokens == 4
    assert [float(one.mean()) for one in look._encoded.blocks[0]] == [-1, -1, 1, -1]


def test_a_pruner_that_keeps_all_says_so(image: Image.Image) -> None:
    seen = PixelLook(image).select("keep_all", keep_ratio=0.1)
    assert (seen.kept_count, seen.keep_ratio) == (576, 1.0)
    assert set(seen.parts[0].distance) == {0.0}


def test_a_seed_gives_one_draw(image: Image.Image) -> None:
    look = PixelLook(image)
    assert look.select("random", seed=1).parts == look.select("random", seed=1).parts
    assert look.select("random", seed=1).parts != look.select("random", seed=2).parts


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"patch": 0}, "PixelLook.patch must be at least 1"),
        ({"side": 100}, "PixelLook.side must be a multiple of patch=14"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(image: Image.Image, given: dict[str, int], words: str) -> None:
    with pytest.raises(SettingError, match=words):
        PixelLook(image, **given)


def test_bad_values_are_refused(model: Any, processor: Any, image: Image.Image, tmp_path: Path) -> None:
    look = PixelLook(image)
    with pytest.raises(SettingError, match="keep_ratio"):
        look.select("divprune", keep_ratio=0)
    with pytest.raises(SettingError, match="divprune"):
        look.select("divprun")
    with pytest.raises(SettingError, match="sharpness"):
        look.select("divprune", options={"sharpness": 1})
    with pytest.raises(SettingError, match="Give a model"):
        look.select("visionzip")
    with pytest.raises(DataError, match="missing"):
        ImageLook(model, processor, tmp_path / "none.png")


# records ------------------------------------------------------------------------------------------------------------


def test_an_entry_holds_picture_boxes_and_kept_cells(image: Image.Image) -> None:
    seen = PixelLook(image.resize((900, 600)), side=896).select("grid_pool", keep_ratio=0.25)
    entry = seen.to_entry("what <b>is</b> it? scene.png")
    picture = Image.open(io.BytesIO(base64.b64decode(entry["image"])))
    assert picture.format == "JPEG"
    assert picture.size == (entry["width"], entry["height"]) == (448, 448)
    assert entry["caption"] == "what <b>is</b> it? scene.png"
    assert (entry["pruner"], entry["keep_ratio"], entry["media_type"]) == ("grid_pool", 0.25, "image/jpeg")
    assert (entry["tokens"], entry["kept_count"]) == (64 * 64, len(entry["parts"][0]["kept"]))
    assert entry["parts"][0]["box"] == [0, 0, 448, 448]
    assert entry["parts"][0]["grid"] == [64, 64]


def test_boxes_of_several_parts_are_scaled_with_the_picture(image: Image.Image) -> None:
    seen = PixelLook(image, side=28).select("keep_all", keep_ratio=1)
    wide = replace(seen, picture=image.resize((896, 448)), parts=(replace(seen.parts[0], box=(448, 0, 896, 448)),))
    assert wide.to_entry("")["parts"][0]["box"] == [224, 0, 448, 224]
