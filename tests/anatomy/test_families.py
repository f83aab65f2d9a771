"""How `assemble` shortens a batch, for the families that differ most; the conformance suite holds what all share.

Logits here are of order one to four, so two orders of summation of the same float32 numbers differ by about 3e-6; 2e-5
leaves a margin.
"""

from __future__ import annotations

import re

import pytest
import torch
from tests.conformance.family_tools import full_positions, keep_some, logits_of, masked_logits, survivors
from tests.tiny import FAMILIES, IMAGE, WIDTH, TinyFamily, llama_settings
from torch import Tensor, nn

from trimtab.anatomy import assemble, check_model, encode_images, open_host
from trimtab.errors import TokenMismatchError, TrimtabWarning, UnsupportedModelError

ROWS = (1, 0, 2)
TIGHT = 2e-5
SIDES = pytest.mark.parametrize("side", ["right", "left"])


@pytest.fixture(params=sorted(FAMILIES))
def family(request: pytest.FixtureRequest) -> TinyFamily:
    return FAMILIES[request.param]


def keep_every(blocks: list[Tensor]) -> list[Tensor]:
    return [torch.arange(len(block)) for block in blocks]


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
    expected = logits_of(model, {**inputs, "position_ids": fresh})
    torch.testing.assert_close(logits_of(model, inputs)[real], expected[real], atol=TIGHT, rtol=0)


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
    before, after = logits_of(model, plain), logits_of(model, inputs)
    text_row = inputs["attention_mask"][1].bool(), plain["attention_mask"][1].bool()
    torch.testing.assert_close(after[1, text_row[0]], before[1, text_row[1]], atol=TIGHT, rtol=0)
    last = [int(i["attention_mask"][0].sum()) - 1 for i in (plain, inputs)]
    assert (before[0, last[0]] - after[0, last[1]]).abs().max() > 1e-3, "the rest of the row sees the prefix"


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
    mask = survivors(model, batch, kept, encoded.blocks)
    inputs = assemble(open_host(model), batch, encoded, kept, prefix=None, positions="original")
    real = inputs["attention_mask"].bool()
    expected = masked_logits(family, model, batch, mask)
    torch.testing.assert_close(logits_of(model, inputs)[real], expected[mask], atol=TIGHT, rtol=0)
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
    torch.testing.assert_close(logits_of(model, with_them)[real], logits_of(model, without)[real], atol=TIGHT, rtol=0)


def test_a_batch_without_attention_mask_is_one_without_padding(family: TinyFamily) -> None:
    model = family.build_model()
    batch = family.make_batch(model, (1,))
    bare = {name: value for name, value in batch.items() if name != "attention_mask"}
    encoded = encode_images(open_host(model), batch)
    kept = keep_some(encoded.blocks)
    expected = logits_of(model, assemble(open_host(model), batch, encoded, kept, prefix=None, positions="original"))
    found = logits_of(model, assemble(open_host(model), bare, encoded, kept, prefix=None, positions="original"))
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
