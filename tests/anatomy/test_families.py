"""What holds for every model family: keeping all is the normal forward, dropping is masking.

Reference in each test: the stock model on the full sequence. Logits here are of order one to four, so two orders of
summation of the same float32 numbers differ by about 3e-6 (measured between a padded and an unpadded row of the
stock models); 2e-5 leaves a margin, and dropping other tokens moves logits by more than 1e-2, which
`test_the_references_can_tell_tokens_apart` holds down.
"""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from tests.tiny import FAMILIES, IMAGE, WIDTH, Batch, TinyFamily, llama_settings
from torch import Tensor, nn

from trimtab.anatomy import assemble, check_model, encode_images, open_host
from trimtab.errors import TokenMismatchError, TrimtabWarning, UnsupportedModelError

ROWS = (1, 0, 2)
TIGHT = 2e-5
SIDES = pytest.mark.parametrize("side", ["right", "left"])


@pytest.fixture(params=sorted(FAMILIES))
def family(request: pytest.FixtureRequest) -> TinyFamily:
    return FAMILIES[request.param]


def keep_some(blocks: list[Tensor], share: float = 0.3, seed: int = 0) -> list[Tensor]:
    """Choose ascending rows of every block at random; blocks without rows keep none."""
    generator = torch.Generator().manual_seed(seed)
    kept = []
    for block in blocks:
        count = max(1, int(share * len(block))) if len(block) else 0
        kept.append(torch.randperm(len(block), generator=generator)[:count].sort().values)
    return kept


def keep_every(blocks: list[Tensor]) -> list[Tensor]:
    return [torch.arange(len(block)) for block in blocks]


def survivors(batch: Batch, blocks: list[Tensor], kept: list[Tensor]) -> Tensor:
    """Return the mask of the places of the full batch that stay: placeholders in reading order follow the blocks."""
    stays = [torch.zeros(len(block), dtype=torch.bool).index_fill(0, k, True) for block, k in zip(blocks, kept)]  # noqa: B905
    mask = batch["attention_mask"].bool().clone()
    mask[batch["input_ids"] == IMAGE] = torch.cat(stays)
    return mask


def full_positions(family: TinyFamily, model: Any, batch: Batch) -> Tensor:
    """Return the positions that the stock model gives the full sequence."""
    if family.mrope:
        positions, _ = model.model.get_rope_index(
            batch["input_ids"], mm_token_type_ids=batch["mm_token_type_ids"],
            image_grid_thw=batch["image_grid_thw"], attention_mask=batch["attention_mask"],
        )  # fmt: skip
        return positions
    rows, places = batch["input_ids"].shape
    return torch.arange(places).expand(rows, -1)


def masked_logits(family: TinyFamily, model: Any, batch: Batch, mask: Tensor) -> Tensor:
    """Run the stock model on the full sequence with the dropped tokens masked from attention."""
    inputs = {name: value for name, value in batch.items() if name not in ("labels", "mm_token_type_ids")}
    inputs.update(attention_mask=mask.long(), position_ids=full_positions(family, model, batch))
    with torch.no_grad():
        return model(**inputs).logits


def run(model: Any, inputs: Batch) -> Tensor:
    with torch.no_grad():
        return model(**{name: value for name, value in inputs.items() if name != "labels"}).logits


@SIDES
def test_keeping_all_is_the_normal_forward(family: TinyFamily, side: str) -> None:
    model = family.build_model()
    batch = family.make_batch(model, ROWS, padding_side=side)
    encoded = encode_images(open_host(model), batch)
    inputs = assemble(open_host(model), batch, encoded, keep_every(encoded.blocks), prefix=None, positions="original")
    expected = run(model, batch)
    real = batch["attention_mask"].bool()
    # Same tokens, features and positions in the same rectangle: only the bookkeeping differs, so nothing moves. With
    # left padding transformers counts positions from the padding on where none are given; rotary positions are
    # relative, and counting from the first token instead moves logits of order four by their last bits.
    drift = 0 if side == "right" else 5e-6
    torch.testing.assert_close(run(model, inputs)[inputs["attention_mask"].bool()], expected[real], atol=drift, rtol=0)
    assert torch.equal(inputs["labels"][inputs["attention_mask"].bool()], batch["labels"][real])


@SIDES
@pytest.mark.parametrize("share", [0.3, 0.05])
def test_dropping_is_masking(family: TinyFamily, side: str, share: float) -> None:
    model = family.build_model()
    batch = family.make_batch(model, ROWS, padding_side=side)
    encoded = encode_images(open_host(model), batch)
    kept = keep_some(encoded.blocks, share)
    mask = survivors(batch, encoded.blocks, kept)
    inputs = assemble(open_host(model), batch, encoded, kept, prefix=None, positions="original")

    real = inputs["attention_mask"].bool()
    assert torch.equal(real.sum(1), mask.sum(1)), "each row loses exactly its dropped tokens"
    assert inputs["input_ids"].shape[1] == int(mask.sum(1).max()), "no column is padding in every row"
    assert torch.equal(inputs["input_ids"][real], batch["input_ids"][mask])
    assert torch.equal(inputs["labels"][real], batch["labels"][mask])
    expected = masked_logits(family, model, batch, mask)
    torch.testing.assert_close(run(model, inputs)[real], expected[mask], atol=TIGHT, rtol=0)


def test_the_references_can_tell_tokens_apart(family: TinyFamily) -> None:
    model = family.build_model()
    batch = family.make_batch(model, ROWS)
    encoded = encode_images(open_host(model), batch)
    masks = [survivors(batch, encoded.blocks, keep_some(encoded.blocks, seed=seed)) for seed in (0, 1)]
    text = batch["labels"] != -100
    first, second = (masked_logits(family, model, batch, mask)[text] for mask in masks)
    assert (first - second).abs().max() > 1e-2


@SIDES
def test_padding_stays_on_its_side(family: TinyFamily, side: str) -> None:
    model = family.build_model()
    batch = family.make_batch(model, ROWS, padding_side=side)
    encoded = encode_images(open_host(model), batch)
    inputs = assemble(open_host(model), batch, encoded, keep_some(encoded.blocks), prefix=None, positions="original")
    edges = inputs["attention_mask"][:, 0 if side == "right" else -1]
    assert edges.all()
    assert not inputs["attention_mask"].all(), "the rows of this batch differ in length"
    assert (inputs["labels"][inputs["attention_mask"] == 0] == -100).all()


@SIDES
def test_renumbered_positions_run_from_zero_without_gaps(family: TinyFamily, side: str) -> None:
    model = family.build_model()
    batch = family.make_batch(model, ROWS, padding_side=side)
    encoded = encode_images(open_host(model), batch)
    inputs = assemble(open_host(model), batch, encoded, keep_some(encoded.blocks), prefix=None, positions="renumber")
    real = inputs["attention_mask"].bool()
    given = inputs.get("position_ids")
    if family.mrope:
        assert given is not None
        for row in range(len(ROWS)):
            seen = given[-3:, row, real[row]].unique()
            assert torch.equal(seen, torch.arange(len(seen)))
        return
    if given is not None:
        for row in range(len(ROWS)):
            assert torch.equal(given[row, real[row]], torch.arange(int(real[row].sum())))
    fresh = torch.cumsum(real.long(), 1).sub(1).clamp_min(0)
    expected = run(model, {**inputs, "position_ids": fresh})
    torch.testing.assert_close(run(model, inputs)[real], expected[real], atol=TIGHT, rtol=0)


def test_original_positions_are_those_of_the_full_sequence(family: TinyFamily) -> None:
    if not family.mrope:
        pytest.skip("one coordinate: rotary positions count from anywhere, test_dropping_is_masking decides")
    model = family.build_model()
    batch = family.make_batch(model, ROWS)
    encoded = encode_images(open_host(model), batch)
    kept = keep_some(encoded.blocks)
    mask = survivors(batch, encoded.blocks, kept)
    inputs = assemble(open_host(model), batch, encoded, kept, prefix=None, positions="original")
    real = inputs["attention_mask"].bool()
    expected = full_positions(family, model, batch)
    assert torch.equal(inputs["position_ids"][-3:, real], expected[:, mask])


@pytest.mark.parametrize("positions", ["renumber", "original"])
def test_a_prefix_stands_in_front_of_every_image_and_learns(family: TinyFamily, positions: str) -> None:
    model = family.build_model()
    batch = family.make_batch(model, ROWS)
    encoded = encode_images(open_host(model), batch)
    kept = keep_some(encoded.blocks)
    prefix = nn.Parameter(torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(1)))
    plain = assemble(open_host(model), batch, encoded, kept, prefix=None, positions=positions)
    inputs = assemble(open_host(model), batch, encoded, kept, prefix=prefix, positions=positions)

    rows_with_prefix = (inputs["input_ids"] == IMAGE).sum(1) - (plain["input_ids"] == IMAGE).sum(1)
    assert rows_with_prefix[1] == 0, "a row without image gets no isolator"
    assert int(rows_with_prefix.sum()) == 4 * sum(len(block) > 0 for block in encoded.blocks)
    assert torch.equal(inputs["labels"][inputs["labels"] != -100], plain["labels"][plain["labels"] != -100])
    model(**inputs).loss.backward()
    assert prefix.grad is not None
    assert (prefix.grad.abs().sum(1) > 0).all()
    before, after = run(model, plain), run(model, inputs)
    text_row = inputs["attention_mask"][1].bool(), plain["attention_mask"][1].bool()
    torch.testing.assert_close(after[1, text_row[0]], before[1, text_row[1]], atol=TIGHT, rtol=0)
    last = [int(i["attention_mask"][0].sum()) - 1 for i in (plain, inputs)]
    assert (before[0, last[0]] - after[0, last[1]]).abs().max() > 1e-3, "the rest of the row sees the prefix"


def test_prefix_takes_the_first_visual_position(family: TinyFamily) -> None:
    if not family.mrope:
        pytest.skip("only multimodal rotary positions place the prefix by coordinates")
    model = family.build_model()
    batch = family.make_batch(model, (1,))
    encoded = encode_images(open_host(model), batch)
    prefix = torch.zeros(4, WIDTH)
    inputs = assemble(open_host(model), batch, encoded, keep_some(encoded.blocks), prefix=prefix, positions="original")
    places = (inputs["input_ids"][0] == IMAGE).nonzero().squeeze(1)[:4]
    first = (batch["input_ids"][0] == IMAGE).nonzero()[0, 0]
    expected = full_positions(family, model, batch)[:, 0, first]
    assert torch.equal(inputs["position_ids"][-3:, 0, places], expected[:, None].expand(-1, 4))


def test_dropped_rows_get_no_gradient_and_kept_rows_do(family: TinyFamily) -> None:
    model = family.build_model()
    batch = family.make_batch(model, ROWS)
    encoded = encode_images(open_host(model), batch)
    for block in encoded.blocks:
        block.retain_grad()
    kept = keep_some(encoded.blocks)
    model(**assemble(open_host(model), batch, encoded, kept, prefix=None, positions="original")).loss.backward()
    for block, index in zip(encoded.blocks, kept, strict=True):
        if not len(block):
            continue
        assert block.grad is not None
        reached = block.grad.abs().sum(1)
        dropped = torch.ones(len(block), dtype=torch.bool).index_fill(0, index, False)
        assert torch.equal(reached[dropped], torch.zeros(int(dropped.sum())))
        assert (reached[index] > 0).all()


@SIDES
def test_a_row_alone_equals_the_row_in_a_batch(family: TinyFamily, side: str) -> None:
    model = family.build_model()
    batch = family.make_batch(model, ROWS, padding_side=side)
    encoded = encode_images(open_host(model), batch)
    together = assemble(open_host(model), batch, encoded, keep_every(encoded.blocks), prefix=None, positions="renumber")
    logits = run(model, together)
    for row in range(len(ROWS)):
        alone = family.take_row(batch, ROWS, row)
        if ROWS[row]:
            own = encode_images(open_host(model), alone)
            alone = assemble(open_host(model), alone, own, keep_every(own.blocks), prefix=None, positions="renumber")
        real = together["attention_mask"][row].bool()
        torch.testing.assert_close(run(model, alone)[0], logits[row, real], atol=TIGHT, rtol=0)


def test_the_batch_is_left_as_it_came(family: TinyFamily) -> None:
    model = family.build_model()
    batch = family.make_batch(model, ROWS)
    before = {name: value.clone() for name, value in batch.items()}
    encoded = encode_images(open_host(model), batch)
    assemble(
        open_host(model), batch, encoded, keep_some(encoded.blocks), prefix=torch.zeros(2, WIDTH), positions="original"
    )
    assert batch.keys() == before.keys()
    for name, value in before.items():
        assert torch.equal(batch[name], value), name


def test_the_blocks_are_the_features_of_the_stock_model(family: TinyFamily) -> None:
    model = family.build_model()
    batch = family.make_batch(model, ROWS)
    visual = {n: v for n, v in batch.items() if n not in ("input_ids", "attention_mask", "labels", "mm_token_type_ids")}
    with torch.no_grad():
        features = model.get_image_features(**visual, return_dict=True).pooler_output
    blocks = encode_images(open_host(model), batch).blocks
    assert torch.equal(torch.cat(list(blocks)), torch.cat(list(features)))


def test_supported_families_are_reported(family: TinyFamily) -> None:
    report = check_model(family.build_model())
    assert report.supported, report.reason


def test_a_text_only_model_is_refused_by_name() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(LlamaConfig(**llama_settings()))
    report = check_model(model)
    assert not report.supported
    assert "LlamaForCausalLM" in report.reason
    with pytest.raises(UnsupportedModelError, match=r"LlamaForCausalLM(?s:.*)nearest supported class is \w+;"):
        open_host(model)


@pytest.mark.parametrize("surplus", [-1, 1])
def test_placeholders_that_do_not_fit_are_counted_with_their_row(family: TinyFamily, surplus: int) -> None:
    model = family.build_model()
    batch = family.make_batch(model, (1, 1))
    per_row = (batch["input_ids"] == IMAGE).sum(1)
    features = int(per_row[1])
    last = int((batch["input_ids"][1] == IMAGE).nonzero()[-1, 0])
    batch["input_ids"][1, last if surplus < 0 else last + 1] = 5 if surplus < 0 else IMAGE
    if family.mrope:
        batch["mm_token_type_ids"] = (batch["input_ids"] == IMAGE).int()

    def hand_over() -> None:
        encoded = encode_images(open_host(model), batch)
        assemble(open_host(model), batch, encoded, keep_every(encoded.blocks), prefix=None, positions="original")

    with pytest.raises(TokenMismatchError) as raised:
        hand_over()
    numbers = {int(number) for number in re.findall(r"\d+", str(raised.value))}
    of_row = {features, features + surplus}
    of_batch = {int(per_row.sum()), int(per_row.sum()) + surplus}
    assert of_row <= numbers or of_batch <= numbers, str(raised.value)
    assert re.search(r"(?i)(row|sample)\D{0,10}1\b", str(raised.value)), str(raised.value)


@pytest.mark.parametrize("rows", [(1, 0), (0, 1), (0, 2, 0)])
def test_rows_without_image_may_stand_anywhere(family: TinyFamily, rows: tuple[int, ...]) -> None:
    model = family.build_model()
    batch = family.make_batch(model, rows)
    encoded = encode_images(open_host(model), batch)
    kept = keep_some(encoded.blocks)
    mask = survivors(batch, encoded.blocks, kept)
    inputs = assemble(open_host(model), batch, encoded, kept, prefix=None, positions="original")
    real = inputs["attention_mask"].bool()
    expected = masked_logits(family, model, batch, mask)
    torch.testing.assert_close(run(model, inputs)[real], expected[mask], atol=TIGHT, rtol=0)
    prefixed = assemble(open_host(model), batch, encoded, kept, prefix=torch.ones(3, WIDTH), positions="original")
    more = (prefixed["input_ids"] == IMAGE).sum(1) - (inputs["input_ids"] == IMAGE).sum(1)
    assert [bool(count) for count in more] == [bool(images) for images in rows]


@pytest.mark.parametrize("positions", ["renumber", "original"])
def test_positions_that_the_user_gives_are_those_that_count(family: TinyFamily, positions: str) -> None:
    model = family.build_model()
    batch = family.make_batch(model, ROWS)
    encoded = encode_images(open_host(model), batch)
    kept, prefix = keep_some(encoded.blocks), torch.randn(3, WIDTH)
    given = {**batch, "position_ids": full_positions(family, model, batch)}
    with_them = assemble(open_host(model), given, encoded, kept, prefix=prefix, positions=positions)
    without = assemble(open_host(model), batch, encoded, kept, prefix=prefix, positions=positions)
    real = without["attention_mask"].bool()
    torch.testing.assert_close(run(model, with_them)[real], run(model, without)[real], atol=TIGHT, rtol=0)


def test_a_batch_without_attention_mask_is_one_without_padding(family: TinyFamily) -> None:
    model = family.build_model()
    batch = family.make_batch(model, (1,))
    bare = {name: value for name, value in batch.items() if name != "attention_mask"}
    encoded = encode_images(open_host(model), batch)
    kept = keep_some(encoded.blocks)
    expected = run(model, assemble(open_host(model), batch, encoded, kept, prefix=None, positions="original"))
    found = run(model, assemble(open_host(model), bare, encoded, kept, prefix=None, positions="original"))
    torch.testing.assert_close(found, expected, atol=TIGHT, rtol=0)


def test_a_family_that_no_test_holds_is_opened_with_a_warning() -> None:
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    class NewConfig(LlavaConfig):
        model_type = "newer_than_the_table"

    class NewForConditionalGeneration(LlavaForConditionalGeneration):
        config_class = NewConfig

    settings = FAMILIES["llava"].build_model().config.to_dict()
    settings.pop("model_type")
    new = NewForConditionalGeneration(NewConfig(**settings))
    with pytest.warns(TrimtabWarning, match=r"NewForConditionalGeneration \(newer_than_the_table\).*not among"):
        host = open_host(new)
    assert host.family.name == "NewForConditionalGeneration"
    report = check_model(new)
    assert (report.supported, report.tested) == (True, False)


def test_audio_of_the_shape_of_the_text_is_left_whole() -> None:
    """A mask of sound frames that is as long as the row by chance has no value per place."""
    from tests.conformance.families import SUITE

    family = SUITE["qwen2_5_omni_thinker"]
    model = family.build_model()
    batch = family.make_batch(model, ROWS)
    batch["feature_attention_mask"] = torch.ones_like(batch["input_ids"])
    encoded = encode_images(model, batch)
    with torch.no_grad():
        short = assemble(model, batch, encoded, keep_some(encoded.blocks), positions="original")
    assert short["input_ids"].shape[1] < batch["input_ids"].shape[1]
    assert torch.equal(short["feature_attention_mask"], batch["feature_attention_mask"])
