"""Icons, thinned-out frames and long questions: what the fast view makes of single blocks."""

from __future__ import annotations

from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
from tests.conformance.families import SUITE
from tests.conformance.family_tools import model_of
from tests.dualspeed.common import attached
from tests.tiny import FAMILIES, IMAGE, Batch, TinyFamily, qwen_images
from torch import Tensor

from trimtab.anatomy import encode_images, open_host, question_embeddings, read_rows
from trimtab.errors import SettingError
from trimtab.pruners.dpp import DppPruner


def icons(*shapes: tuple[int, int, int]) -> tuple[TinyFamily, Any]:
    """Return Qwen2.5-VL with images of these patches, four to a token."""
    family = replace(FAMILIES["qwen2_5_vl"], images=lambda *given: qwen_images(*given, shapes))
    return family, family.build_model().train()


def fast_step(model: Any, batch: Batch, **settings: Any) -> tuple[dict[str, Any], Tensor, int]:
    """Take a fast step; return its metrics, the isolator's gradient and how many placeholders the model saw."""
    seen: list[Tensor] = []
    with attached(model, **settings) as handle, handle.force_mode("fast"):
        hook = handle._host.base.register_forward_pre_hook(
            lambda module, args, kwargs: seen.append(kwargs["input_ids"]), with_kwargs=True
        )
        loss = model(**batch).loss
        loss.backward()
        hook.remove()
        assert loss.isfinite()
        return handle.metrics(), handle.isolator.rows.grad, int((seen[0] == IMAGE).sum())


def test_an_icon_beside_an_image_trains_with_the_default_settings() -> None:
    family, model = icons((1, 16, 16), (1, 4, 4))
    metrics, gradient, seen = fast_step(model, family.make_batch(model, (2,)))
    assert metrics["visual_tokens_full"] == 64 + 4
    assert metrics["visual_tokens_kept"] == 6 + 4, "the icon has no room for the isolator and stays whole"
    assert seen == 6 + 4 + 4, "the isolator stands in front of the image only"
    assert gradient.any()


def test_an_icon_alone_trains_too() -> None:
    family, model = icons((1, 4, 4))
    metrics, gradient, seen = fast_step(model, family.make_batch(model, (1,)))
    assert (metrics["visual_tokens_kept"], seen) == (4, 4)
    assert not gradient.any()
    metrics, gradient, seen = fast_step(model, family.make_batch(model, (1,)), isolator_tokens=2)
    assert (metrics["visual_tokens_kept"], seen) == (1, 3)
    assert gradient.any()


def test_a_frame_that_the_processor_thinned_out_keeps_a_token() -> None:
    family = SUITE["video_llama_3"]
    model = model_of(family, fresh=True).train()
    batch = family.make_batch(model, (0,), videos_per_row=(1,))
    mask = batch["video_compression_mask"]
    places = (batch["input_ids"][0] == family.video_token).nonzero().flatten()
    with torch.no_grad():
        last = encode_images(model, batch).tiles[0][-1]
    batch["input_ids"][0, places[3 - last :]] = 5  # 3 tokens of the last frame are left
    mask[mask.nonzero().flatten()[3 - last :]] = False
    with torch.no_grad():
        tiles = encode_images(model, batch).tiles[0]
    assert tiles[-1] == 3
    metrics, *_ = fast_step(model, batch)
    assert metrics["visual_tokens_kept"] == sum(max(1, size // 10) for size in tiles)


def test_a_ratio_that_leaves_no_image_of_one_size_a_place_is_refused() -> None:
    model = FAMILIES["llava"].build_model().train()
    batch = FAMILIES["llava"].make_batch(model, (0, 1))
    wanted = r"keep_ratio=0\.95 \(rule 'floor'\) of the 36 visual tokens of image 0.*the 4 places that the isolator"
    with (
        attached(model, keep_ratio=0.95) as handle,
        handle.force_mode("fast"),
        pytest.raises(SettingError, match=wanted),
    ):
        model(**batch)


@pytest.mark.parametrize("name", ["llava", "llava_next", "idefics3", "llama4"])
def test_a_ratio_that_keeps_nothing_of_any_image_of_one_size_is_refused(name: str) -> None:
    model = model_of(SUITE[name], fresh=True).train()
    batch = SUITE[name].make_batch(model, (1,))
    with (
        attached(model, keep_ratio=0.01) as handle,
        handle.force_mode("fast"),
        pytest.raises(SettingError, match=r"keep_ratio=0\.01 keeps 0 of \d+ tokens"),
    ):
        model(**batch)


@pytest.mark.parametrize("rows", [(3,), (1, 0, 2)])
def test_text_aware_pruners_get_the_words_of_each_row_and_nothing_else(rows: tuple[int, ...]) -> None:
    model = FAMILIES["llava"].build_model().train()
    batch = FAMILIES["llava"].make_batch(model, rows)
    seen: list[Any] = []

    def spy(pruner: Any, inputs: Any, num_keep: int) -> Any:
        seen.append(inputs)
        return select(pruner, inputs, num_keep)

    select = DppPruner.select
    with mock.patch.object(DppPruner, "select", spy):
        fast_step(model, batch, pruner="dpp", pruner_options={"use_text": True})
    table = model.get_input_embeddings().weight
    words = (batch["input_ids"] != IMAGE) & batch["attention_mask"].bool() & (batch["labels"] == -100)
    owners = [row for row, count in enumerate(rows) for _ in range(count)]
    (inputs,) = seen
    assert inputs.text.shape[:2] == (3, int(words.sum(1).max()))
    for tile, row in enumerate(owners):
        assert torch.equal(inputs.text[tile, inputs.text_valid[tile]], table[batch["input_ids"][row, words[row]]])
    if len(rows) == 1:
        assert inputs.text.stride(0) == 0, "one row is not copied for each of its images"


def test_a_row_without_a_word_that_counts_has_none() -> None:
    model = FAMILIES["llava"].build_model()
    batch = FAMILIES["llava"].make_batch(model, (1,))
    batch["labels"] = torch.where(batch["input_ids"] == IMAGE, -100, batch["input_ids"])
    host = open_host(model)
    with torch.no_grad():
        encoded = encode_images(host, batch)
    layout = read_rows(host, batch, encoded)
    words = question_embeddings(host, batch, layout.placeholder, layout.block_rows)
    assert not words.counts.any()
    assert words.around([0])[1].shape == (1, 1)
