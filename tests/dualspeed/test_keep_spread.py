"""Other shares of every image: at random and by content, with the mean that was asked for."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.dualspeed.common import attached
from tests.tiny import FAMILIES, gradients
from torch import Tensor

from trimtab import DualSpeedConfig
from trimtab.anatomy import EncodedImages
from trimtab.dualspeed import fast_view
from trimtab.dualspeed.fast_view import KeptTokens, choose_tokens
from trimtab.dualspeed.keep_spread import (
    LEVELS,
    SKETCH,
    effective_ranks,
    level_counts,
    level_of_image,
    shared_counts,
)
from trimtab.pruners import Pruner, PrunerInput, Selection, build_pruner, kept_count

WIDTH = 24
SPREADS = ("random", "content")


def pictures(*sizes: list[int], newlines: int = 0, any_size: bool = False, seed: int = 0) -> EncodedImages:
    """Return images of tiles of these sizes; the n-th tile holds n different tokens, over and over."""
    generator = torch.Generator().manual_seed(seed)
    different = itertools.count(1)
    blocks, filler = [], []
    for tiles in sizes:
        parts = []
        for size in tiles:
            several = torch.randn(min(size, next(different)), WIDTH, generator=generator)
            parts.append(several.repeat(-(-size // len(several)), 1)[:size])
        blocks.append(torch.cat([*parts, torch.zeros(newlines, WIDTH)]))
        mark = torch.zeros(sum(tiles) + newlines, dtype=torch.bool)
        mark[sum(tiles) :] = True
        filler.append((mark, newlines) if newlines else None)
    return EncodedImages(
        outputs={}, counts={}, blocks=blocks, tiles=list(sizes), grid=None, filler=filler, any_size=any_size
    )


class Spy(Pruner):
    """Passes everything on and notes how many tiles of how many tokens came, and how many were asked for."""

    def __init__(self, inner: Pruner) -> None:
        self.inner, self.needs, self.calls = inner, inner.needs, []

    def select(self, inputs: PrunerInput, num_keep: int) -> Selection:
        self.calls.append((*inputs.features.shape[:2], num_keep))
        return self.inner.select(inputs, num_keep)


def choose(encoded: EncodedImages, draw: tuple[int, int] = (0, 0), **changes: Any) -> tuple[KeptTokens, Spy]:
    config = DualSpeedConfig(**{"isolator_tokens": 2, **changes})
    spy = Spy(build_pruner(config.pruner, config.pruner_options))
    return choose_tokens(spy, config, encoded, draw), spy


# off ----------------------------------------------------------------------------------------------------------------


def test_a_fixed_share_is_dealt_out_to_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> Any:
        pytest.fail("a fixed share came to be dealt out")

    monkeypatch.setattr(fast_view, "_spread", refuse)
    kept, spy = choose(pictures([100], [100], [40, 40]))
    assert [len(one) for one in kept.index] == [10, 10, 8]
    assert spy.calls == [(2, 40, 4), (2, 100, 10)]


@pytest.mark.parametrize("spread", SPREADS)
@pytest.mark.parametrize("whole", [{"pruner": "keep_all"}, {"keep_ratio": 1}])
def test_where_everything_stays_there_is_nothing_to_deal_out(spread: str, whole: dict[str, Any]) -> None:
    encoded = pictures([30], [40])
    kept, _ = choose(encoded, keep_spread=spread, isolator_tokens=0, **whole)
    assert all(torch.equal(one, block) for one, block in zip(kept.tokens, encoded.blocks, strict=True))


# brute force ---------------------------------------------------------------------------------------------------------


@settings(max_examples=60, derandomize=True, deadline=None)
@given(st.integers(1, 400), st.integers(0, 600))
def test_levels_have_the_mean_and_stay_below_the_cap(base: int, more: int) -> None:
    counts = level_counts(base, base + more)
    assert len(counts) == LEVELS
    assert list(counts) == sorted(counts)
    assert counts[0] >= 1
    assert counts[-1] <= base + more
    # Where several levels round up at once the sum can jump over the wanted one, by no more than all but one of them.
    assert 0 <= LEVELS * base - sum(counts) < LEVELS


def test_levels_are_even_in_the_logarithm_over_a_factor_of_twenty() -> None:
    counts = np.array(level_counts(1000, 100_000))
    np.testing.assert_allclose(counts[1:] / counts[:-1], 20 ** (1 / 7), rtol=5e-3)  # counts of 140 and more, rounded
    assert counts.sum() == 8000


def naive_parts(base: list[int], caps: list[int], content: list[float]) -> list[float]:
    """Hand out what capped and raised tiles leave again and again, until nothing is left to hand out."""
    low = [max(1.0, b / 4) for b in base]
    high = [min(c, max(1.0, 5.0 * b)) for b, c in zip(base, caps, strict=True)]
    best, found = None, None
    weights = [b * c for b, c in zip(base, content, strict=True)]
    for state in itertools.product((-1, 0, 1), repeat=len(base)):  # below its limit, free, above it
        fixed = sum(low[i] if s < 0 else high[i] for i, s in enumerate(state) if s)
        free = [i for i, s in enumerate(state) if not s]
        scale = (sum(base) - fixed) / sum(weights[i] for i in free) if free else None
        parts = [low[i] if s < 0 else high[i] if s > 0 else scale * weights[i] for i, s in enumerate(state)]
        if scale is None:
            continue
        wrong = sum(
            max(0.0, low[i] - parts[i], parts[i] - high[i])
            + (max(0.0, scale * weights[i] - low[i]) if state[i] < 0 else 0)
            + (max(0.0, high[i] - scale * weights[i]) if state[i] > 0 else 0)
            for i in range(len(base))
        )
        if best is None or wrong < best:
            best, found = wrong, parts
    assert best is not None
    assert best < 1e-9
    assert found is not None
    return found


@settings(max_examples=40, derandomize=True, deadline=None)
@given(st.lists(st.tuples(st.integers(4, 60), st.integers(0, 40), st.floats(0.05, 20)), min_size=1, max_size=6))
def test_parts_are_those_of_every_way_to_cap_them(tiles: list[tuple[int, int, float]]) -> None:
    base, more, content = (list(one) for one in zip(*tiles, strict=True))
    caps = [b + m for b, m in zip(base, more, strict=True)]
    # Tiles of different sizes are no group, so each is rounded by itself.
    counts = shared_counts(base, caps, list(range(1000, 1000 + len(base))), content)
    assert sum(counts) == sum(base)
    for count, part in zip(counts, naive_parts(base, caps, content), strict=True):
        assert abs(count - part) <= 1 + 1e-6


@pytest.mark.parametrize("width", [3, 20, SKETCH])
def test_effective_rank_is_the_definition_in_float64(width: int) -> None:
    generator = torch.Generator().manual_seed(width)
    tokens = torch.randn(3, 30, width, generator=generator) * torch.rand(width, generator=generator) ** 3
    valid = torch.rand(3, 30, generator=generator) < 0.7
    expected = []
    for tile, real in zip(tokens.double(), valid, strict=True):
        unit = tile[real] / tile[real].norm(dim=1, keepdim=True)
        values = torch.linalg.svdvals(unit)
        share = values / values.sum()
        expected.append(float((-share * share.log()).sum().exp()))
    # Singular values are roots of float32 Gram entries of order 30: off by about 1e-3 where they are near zero.
    np.testing.assert_allclose(effective_ranks([(tokens, valid)]), expected, rtol=1e-3)


def test_projected_tokens_keep_the_order_of_their_ranks() -> None:
    generator = torch.Generator().manual_seed(4)
    tokens = torch.stack([torch.randn(n, 512, generator=generator).repeat(64 // n, 1) for n in (1, 2, 4, 8, 16, 32)])
    ranks = effective_ranks([(tokens, None)])
    for rank, many in zip(ranks, (1, 2, 4, 8, 16, 32), strict=True):
        # Random directions of 512 dimensions lose up to half the rank when seen in 48 directions, and win nothing
        # but float32 noise: 48 roots of 1e-7.
        assert 0.6 * many <= rank <= 1.1 * many


# what stays equal -----------------------------------------------------------------------------------------------------


def batches() -> list[EncodedImages]:
    rng = random.Random(5)
    one_size = [[100]] * 24
    tiled = [[64] * rng.randint(1, 5) for _ in range(9)]
    several = [[rng.choice((30, 64, 144))] * rng.randint(1, 3) for _ in range(20)]
    return [pictures(*one_size), pictures(*tiled), pictures(*several), pictures(*tiled, newlines=7), pictures([50])]


@pytest.mark.parametrize("number", range(5))
@pytest.mark.parametrize("ratio", [0.05, 0.1, 0.3, 0.6])
def test_by_content_a_batch_keeps_as_many_tokens_as_with_a_fixed_share(number: int, ratio: float) -> None:
    encoded = batches()[number]
    fixed, _ = choose(encoded, keep_ratio=ratio)
    dealt, spy = choose(encoded, keep_ratio=ratio, keep_spread="content")
    assert dealt.count == fixed.count
    assert len({len(one) for one in dealt.index}) > 1 or len(encoded.blocks) == 1
    calls: dict[int, int] = {}
    for _, size, _ in spy.calls:
        calls[size] = calls.get(size, 0) + 1
    assert all(count <= LEVELS for count in calls.values())


@pytest.mark.parametrize("ratio", [0.05, 0.1, 0.3, 0.6])
def test_at_random_every_eight_images_keep_as_many_tokens_as_with_a_fixed_share(ratio: float) -> None:
    encoded = pictures(*[[100]] * 24)
    fixed = kept_count(100, ratio)
    for step in range(3):
        kept, spy = choose(encoded, (7, step), keep_ratio=ratio, keep_spread="random")
        counts = [len(one) for one in kept.index]
        for start in range(0, 24, LEVELS):
            assert tuple(sorted(counts[start : start + LEVELS])) == level_counts(fixed, 98)
        assert sum(counts) == 24 * fixed
        assert len(spy.calls) <= LEVELS


def test_every_level_is_as_likely_for_every_image() -> None:
    for image in (0, 5, 11):
        seen = np.bincount([level_of_image(0, step, image) for step in range(1600)], minlength=LEVELS)
        # 200 expected, standard deviation 13: five of them.
        assert abs(seen - 200).max() < 66


def test_a_random_share_depends_on_seed_step_and_image_alone() -> None:
    def counts(draw: tuple[int, int], images: int) -> list[int]:
        kept, _ = choose(pictures(*[[100]] * images), draw, keep_spread="random")
        return [len(one) for one in kept.index]

    before = random.getstate(), torch.get_rng_state()
    first = counts((3, 4), 16)
    assert random.getstate() == before[0]
    assert torch.equal(torch.get_rng_state(), before[1])
    assert counts((3, 4), 16) == first
    assert counts((3, 4), 5) == first[:5], "whatever comes after an image"
    assert counts((3, 5), 16) != first
    assert counts((2, 4), 16) != first


def test_all_tiles_of_an_image_share_its_random_draw() -> None:
    kept, _ = choose(pictures([64, 64], [64, 64], [64]), keep_spread="random", keep_ratio=0.2)
    per_tile = [[int((one // 64 == tile).sum()) for tile in range(2)] for one in kept.index[:2]]
    assert all(first == second for first, second in per_tile)
    assert per_tile[0] != per_tile[1]


def test_more_content_never_gets_less() -> None:
    kept, _ = choose(pictures(*[[120]] * 20), keep_spread="content")  # the n-th has n different tokens
    counts = [len(one) for one in kept.index]
    assert counts == sorted(counts)
    assert counts[0] == 3, "a quarter of the fixed share at least"
    assert counts[-1] > 12


def test_no_tile_gets_more_than_five_times_its_fixed_count() -> None:
    counts = shared_counts([10] * 20, [95] * 20, [100] * 20, [1000.0, *[1.0] * 19])
    assert counts[0] == 50
    assert sum(counts) == 200
    assert max(counts[1:]) - min(counts[1:]) <= 1


@pytest.mark.parametrize("spread", SPREADS)
def test_kept_tokens_are_those_of_their_image_in_order(spread: str) -> None:
    encoded = pictures([64, 30], [30], [64], newlines=5)
    kept, _ = choose(encoded, keep_spread=spread, keep_ratio=0.3)
    for index, tokens, block in zip(kept.index, kept.tokens, encoded.blocks, strict=True):
        assert torch.equal(block[index], tokens)
        assert (index.diff() > 0).all()
        assert (index < block.shape[0] - 5).all(), "newlines are dropped"


@pytest.mark.parametrize("spread", SPREADS)
@pytest.mark.parametrize("options", [("grid_pool", {"merge": True}), ("divprune", {}), ("random", {})])
def test_every_pruner_is_asked_for_whole_groups_and_gives_them(spread: str, options: tuple[str, Any]) -> None:
    encoded = pictures(*[[81]] * 16)
    kept, spy = choose(encoded, keep_spread=spread, pruner=options[0], pruner_options=options[1])
    counts = sorted(len(one) for one in kept.tokens)
    assert counts == sorted(keep for images, _, keep in spy.calls for _ in range(images))
    assert [len(one) for one in kept.tokens] == [len(one) for one in kept.index]
    assert len(set(counts)) > 2


@pytest.mark.parametrize("spread", SPREADS)
@pytest.mark.parametrize("ratio", [0.1, 0.5, 0.9])
def test_the_isolator_keeps_its_places_and_small_blocks_stay_whole(spread: str, ratio: float) -> None:
    encoded = pictures(*[[20]] * 9, [3], [20, 2], any_size=True)
    for step in range(4):
        kept, _ = choose(encoded, (0, step), keep_spread=spread, keep_ratio=ratio)
        for place, (index, block) in enumerate(zip(kept.index, encoded.blocks, strict=True)):
            room = block.shape[0] - 2
            assert len(index) <= room or (len(index) == block.shape[0] and place == 9)
            assert len(index) >= 1
    assert len(kept.index[9]) == (3 if ratio == 0.9 else 1)


def test_tiny_tiles_beside_others_do_not_take_the_isolators_places() -> None:
    encoded = pictures(*[[20] + [1] * 10] * 2, any_size=True)
    seen = set()
    for step in range(16):
        kept, _ = choose(encoded, (0, step), keep_spread="random", keep_ratio=0.5, isolator_tokens=4)
        seen |= {len(one) for one in kept.index[:2]}
    assert len(seen) > 4
    assert max(seen) <= 26
    assert 10 + 17 > 26, "the highest level would be too much"


def test_no_more_is_asked_of_a_tile_than_shows_something() -> None:
    encoded = pictures(*[[40]] * LEVELS, newlines=15)
    kept, _ = choose(encoded, keep_spread="random", keep_ratio=0.3)
    assert max(len(one) for one in kept.index) == 40 - 15


def test_what_leaves_the_isolator_room_in_one_image_does_so_in_all() -> None:
    # Of 20 tokens 16 leave 4 places; of three tiles of 20 each may keep 18.
    encoded = pictures([20], [20] * 3)
    kept = [choose(encoded, (0, s), keep_spread="random", keep_ratio=0.6, isolator_tokens=4)[0] for s in range(16)]
    assert max(len(one.index[0]) for one in kept) == 16
    assert max(len(one.index[1]) for one in kept) == 3 * 16


def test_broken_features_count_as_empty_and_do_not_stop_the_others() -> None:
    tokens = torch.randn(3, 12, WIDTH, generator=torch.Generator().manual_seed(0))
    tokens[1] = torch.nan
    ranks = effective_ranks([(tokens, None), (torch.zeros(1, 5, WIDTH), None)])
    assert ranks[1] == ranks[3] == 1
    assert min(ranks[0], ranks[2]) > 5


# inside a model -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("spread", SPREADS)
@pytest.mark.parametrize("mode", ["fast", "slow"])
def test_every_family_trains(name: str, spread: str, mode: str) -> None:
    family = FAMILIES[name]
    model = family.build_model().train()
    batch = family.make_batch(model, (1, 0, 2))
    with (
        attached(model, keep_spread=spread, keep_ratio=0.2, isolator_tokens=1, check_features=True) as handle,
        handle.force_mode(mode),
    ):
        loss = model(**batch).loss
        loss.backward()
        metrics = handle.metrics()
        assert loss.isfinite()
        assert handle.isolator.rows.grad.any() == (mode == "fast")
    assert all(one.isfinite().all() for one in gradients(model).values())
    assert (metrics["visual_tokens_kept"] < metrics["visual_tokens_full"]) == (mode == "fast")


@pytest.mark.parametrize("spread", SPREADS)
def test_pruned_inputs_keep_the_same_share_of_every_image(spread: str) -> None:
    family = FAMILIES["llava"]
    model = family.build_model()
    batch = family.make_batch(model, (1, 0, 2))
    lengths = []
    for kind in ("fixed", spread):
        with attached(model, keep_spread=kind, keep_ratio=0.3, isolator_tokens=1) as handle, torch.no_grad():
            lengths.append(handle.prune_inputs(batch)["attention_mask"].sum(1).tolist())
    assert lengths[0] == lengths[1]


def test_content_is_looked_at_without_gradients_and_kept_tokens_have_them() -> None:
    encoded = pictures([40], [40], [40])
    learned = [block.clone().requires_grad_() for block in encoded.blocks]
    live: Callable[..., EncodedImages] = lambda blocks: EncodedImages(  # noqa: E731
        outputs={}, counts={}, blocks=blocks, tiles=encoded.tiles, grid=None, filler=encoded.filler
    )
    kept, _ = choose(live(learned), keep_spread="content", keep_ratio=0.2)
    total: Tensor = torch.stack([one.sum() for one in kept.tokens]).sum()
    total.backward()
    for block, index in zip(learned, kept.index, strict=True):
        assert block.grad is not None
        assert torch.equal(block.grad.any(1).nonzero().flatten(), index)
