"""Shapes, lengths, packs, the row-by-row count of operations and waiting ranks, against sums done by hand."""

from __future__ import annotations

import itertools
import math
import statistics
from dataclasses import replace

import pytest

from trimtab.bench import SpeedModel
from trimtab.bench.floor import FloorModel, Rows, Way, Work
from trimtab.bench.rank_cost import SCHEMES, TokenSeconds, simulate_ranks
from trimtab.bench.shapes import SHAPES, TrainingShape, draw_text_lengths, find_shape, first_fit, spread_places
from trimtab.errors import SettingError

LLAVA = SHAPES["llava-1.5-7b"]
FULL = Way(name="full", view="full", style="trimtab", packing=True)
FAST = Way(name="fast", view="fast", style="trimtab", packing=True, recompute=False)


def rows(*text: int, slow: tuple[int, ...] = ()) -> Rows:
    return Rows(text, [one // 2 for one in text], [place in slow for place in range(len(text))])


# shapes --------------------------------------------------------------------------------------------------------------


def test_the_shapes_are_those_of_the_models() -> None:
    assert LLAVA.visual_tokens == 576
    assert LLAVA.keep(0.1) == 57
    assert LLAVA.block_parameters == pytest.approx(6.476e9, rel=1e-3)
    assert SHAPES["llava-next-7b"].visual_tokens == 2880
    assert SHAPES["small"].tower_trained
    # Without the biases and norms of Qwen2-0.5B, whose blocks have 358 million parameters.
    assert SHAPES["small"].block_parameters == pytest.approx(358e6, rel=0.01)


def test_the_toy_has_the_proportions_of_llava() -> None:
    toy = SHAPES["toy"]
    assert toy.visual_tokens >= 256
    assert toy.text_mean / toy.visual_tokens == pytest.approx(LLAVA.text_mean / LLAVA.visual_tokens, rel=0.05)
    heads = [one.vocab * one.width / one.block_parameters for one in (toy, LLAVA)]
    assert heads[0] == pytest.approx(heads[1], rel=0.1)
    towers = []
    for shape in (toy, LLAVA):
        mean = int(shape.text_mean)
        work = FloorModel(shape).work(replace(FULL, recompute=False), [rows(mean)])
        towers.append(work.tower / work.total)
    assert 0.01 < towers[1] < towers[0] < 0.05


def test_lengths_have_the_mean_and_the_spread() -> None:
    shape = replace(LLAVA, max_length=10_000, pack_tokens=10_000)
    lengths = draw_text_lengths(shape, 4000, seed=1)
    assert statistics.fmean(lengths) == pytest.approx(200, rel=0.02)
    assert statistics.pstdev(lengths) / 200 == pytest.approx(0.7, rel=0.05)
    logs = [math.log(one) for one in lengths]
    assert statistics.fmean(logs) == pytest.approx(statistics.median(logs), abs=0.02), "lognormal"
    assert lengths == draw_text_lengths(shape, 4000, seed=1)
    assert lengths != draw_text_lengths(shape, 4000, seed=2)
    assert sorted(lengths) == sorted(draw_text_lengths(shape, 4000, seed=2))


def test_no_row_is_longer_than_the_longest() -> None:
    shape = replace(LLAVA, text_mean=2000)
    assert max(draw_text_lengths(shape, 50, seed=0)) == shape.max_length - 576
    assert min(draw_text_lengths(replace(LLAVA, text_mean=9), 50, seed=0)) >= 8


def test_spread_places_are_the_quantiles() -> None:
    assert spread_places([50, 10, 30, 20, 40], 1) == [2]
    assert spread_places([50, 10, 30, 20, 40, 60], 2) == [0, 3]
    assert spread_places([5, 6], 0) == []


def test_first_fit_against_every_assignment() -> None:
    sizes, budget = [5, 4, 3, 3, 2, 1], 9
    packs = first_fit(sizes, budget)
    assert sorted(itertools.chain(*packs)) == list(range(6))
    assert all(sum(sizes[row] for row in pack) <= budget for pack in packs)
    least = next(
        count
        for count in range(1, 7)
        if any(
            all(sum(s for s, pack in zip(sizes, choice, strict=True) if pack == one) <= budget for one in range(count))
            for choice in itertools.product(range(count), repeat=6)
        )
    )
    assert len(packs) == least


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"samples": 81}, "TrainingShape.samples must be a multiple of 16, but 81 came"),
        ({"text_mean": -1}, "TrainingShape.text_mean must be a finite number above 0"),
        ({"max_length": 500}, "TrainingShape.max_length must be at least 584"),
        ({"pack_tokens": 583}, "TrainingShape.pack_tokens must be at least 584"),
        ({"label_share": 1.0}, "TrainingShape.label_share must be below 1"),
    ],
)
def test_bad_shapes_are_named(changes: dict[str, float], words: str) -> None:
    with pytest.raises(SettingError, match=words):
        replace(LLAVA, **changes)


def test_an_unknown_size_is_named() -> None:
    with pytest.raises(SettingError, match=r"no size 'lava-1.5-7b'.*llava-1.5-7b"):
        find_shape("lava-1.5-7b")


def test_a_row_that_fits_no_pack_is_an_error() -> None:
    with pytest.raises(SettingError, match="budget must be at least 7"):
        first_fit([3, 7], 6)


# operations ----------------------------------------------------------------------------------------------------------


def test_a_small_batch_by_hand() -> None:
    shape = TrainingShape(
        layers=2, width=8, mlp=12, heads=2, kv_heads=1, vocab=10, tower_layers=3, tower_width=4, tower_mlp=6,
        tower_heads=2, image_size=8, patch_size=2, text_mean=10, max_length=40, micro_batch=2, samples=2,
        pack_tokens=80,
    )  # fmt: skip
    blocks = 2 * (8 * 8 + 2 * 8 * 4 + 8 * 8 + 3 * 8 * 12)
    assert shape.block_parameters == blocks
    model = FloorModel(shape, keep_ratio=0.25, isolator_tokens=2)  # 16 tokens, 4 of which stay
    assert model.lengths("fast", rows(10, 12)) == [16, 18]
    assert model.lengths("mixed", rows(10, 12, slow=(1,))) == [16, 28]
    work = model.work(replace(FAST, style="trimtab"), [rows(10, 12)])
    square = 4 * 8 * 2 * (16**2 + 18**2) / 2
    assert work.decoder == 3 * 2 * blocks * 34 + 3.5 * square
    assert work.head == 3 * 2 * 8 * 10 * (5 + 6)
    assert work.pruner == 2 * 2 * 16**2 * 8
    block = 2 * (4 * 4 * 4 + 2 * 4 * 6) * 17 + 4 * 4 * 17**2
    patches, projector = 2 * 3 * 4 * 4 * 16, 2 * (2 * 16 * 4 * 8) + 3 * (2 * 16 * 8 * 8)
    assert work.tower == 2 * (2 * block + patches + projector)


def test_padding_counts_and_so_does_the_mask() -> None:
    model = FloorModel(LLAVA)
    padded = replace(FULL, packing=False)
    assert model.work(padded, [rows(100, 100)]).decoder == model.work(FULL, [rows(100, 100)]).decoder
    uneven = model.work(padded, [rows(100, 300)]).decoder / model.work(FULL, [rows(100, 300)]).decoder
    assert 2 * 876 / (676 + 876) < uneven < 1.3


def test_a_slow_step_is_a_full_step_and_a_teacher() -> None:
    model = FloorModel(LLAVA)
    full, fast, slow = (
        model.work(replace(FULL, view=view, recompute=False), [rows(200)]) for view in ("full", "fast", "slow")
    )
    assert slow.decoder - full.decoder == pytest.approx(fast.decoder / 3, rel=0.02)
    mixed = model.work(replace(FULL, view="mixed", recompute=False), [rows(200, 200, slow=(0,))])
    assert mixed.total == pytest.approx(slow.total + fast.total, rel=1e-9)


def test_every_remedy_saves_what_it_names() -> None:
    model, one = FloorModel(LLAVA), [rows(200, 200)]
    slow = Way(name="slow", view="slow", style="released")
    plain = model.work(slow, one)
    once = model.work(replace(slow, remedies=frozenset({"tower_once"})), one)
    head = model.work(replace(slow, remedies=frozenset({"label_head"})), one)
    assert once.tower < 0.7 * plain.tower
    assert (once.decoder, once.head) == (plain.decoder, plain.head)
    assert head.head < 0.2 * plain.head
    assert model.work(replace(slow, remedies=frozenset({"batched"})), one) == plain
    ours = model.work(replace(slow, style="trimtab"), one)
    assert ours.tower < once.tower, "the tower stops behind the block that gives the features"


def test_recomputing_leaves_out_the_last_matrix_of_a_block() -> None:
    model = FloorModel(LLAVA)
    again, kept = (model.work(replace(FULL, recompute=on), [rows(200)]).decoder for on in (True, False))
    forward = model.work(replace(FULL, view="slow", recompute=False), [rows(200)]).decoder - kept  # a short teacher
    assert 0 < again - kept - 2 * 776 * (LLAVA.block_parameters - 32 * 4096 * 11008) < 0.05 * forward


def test_a_trained_tower_costs_its_backward_pass() -> None:
    trained = replace(LLAVA, tower_trained=True)
    frozen, learnt = (FloorModel(shape).work(FAST, [rows(200)]).tower for shape in (LLAVA, trained))
    assert 2.4 < learnt / frozen < 3.2


def test_mean_rows_agree_with_the_model_of_the_bound() -> None:
    bound = SpeedModel(
        block_parameters=LLAVA.block_parameters, layers=32, width=4096, vocab=32064, text_tokens=200, visual_tokens=576,
        kept_tokens=57, tower_flops=382e9, projector_flops=24e9, label_tokens=100,
    )  # fmt: skip
    model = FloorModel(LLAVA)
    full, fast, slow = (
        model.work(replace(FULL, view=view, recompute=False), [rows(200)]).total for view in ("full", "fast", "slow")
    )
    predicted = bound.predict()
    assert full == pytest.approx(predicted.full, rel=0.02)
    assert fast / full == pytest.approx(predicted.fast_over_full, rel=0.03)
    assert slow / full == pytest.approx(predicted.slow_over_full, rel=0.03)


def test_work_adds_up() -> None:
    work = Work(1.0, 2.0, 3.0, 4.0) + Work(10.0, 20.0, 30.0, 40.0)
    assert (work.tower, work.pruner, work.decoder, work.head, work.total) == (11, 22, 33, 44, 110)


# ranks ---------------------------------------------------------------------------------------------------------------

SECONDS = TokenSeconds(full=1.0, fast=1.0, slow=1.4)


def test_one_rank_waits_for_nobody() -> None:
    found = simulate_ranks(LLAVA, FloorModel(LLAVA), SECONDS, 1, slow_ratio=0.0, steps=400)
    mean = statistics.fmean(draw_text_lengths(LLAVA, 2048, 0))
    assert tuple(found) == SCHEMES
    assert found["full"] == pytest.approx(576 + mean, rel=0.02)
    for scheme in ("lock_step", "independent", "per_sample"):
        assert found[scheme] == pytest.approx(61 + mean, rel=0.02)


def test_ranks_without_agreement_wait_for_the_slow_one() -> None:
    model = FloorModel(LLAVA)
    alone, many = (
        simulate_ranks(LLAVA, model, SECONDS, ranks, slow_ratio=0.1, steps=2000 // ranks) for ranks in (1, 16)
    )
    assert many["lock_step"] < 1.3 * alone["lock_step"]
    # With 16 ranks some rank is slow in 1 - 0.9 ** 16 = 81 % of the steps.
    slow, fast = 1.4 * (576 + 200), 61 + 200
    assert many["independent"] == pytest.approx(0.81 * slow + 0.19 * fast, rel=0.2)
    assert many["per_sample"] < many["lock_step"] < many["independent"]


@pytest.mark.parametrize("name", ["ranks", "steps"])
def test_bad_numbers_of_ranks_are_named(name: str) -> None:
    given = {"ranks": 2, "steps": 3, name: 0}
    with pytest.raises(SettingError, match=f"simulate_ranks.{name} must be at least 1, but 0 came"):
        simulate_ranks(LLAVA, FloorModel(LLAVA), SECONDS, given["ranks"], slow_ratio=0.1, steps=given["steps"])
