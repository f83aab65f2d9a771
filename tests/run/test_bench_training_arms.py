"""The arms of `bench training` compute the same: what differs between them is the way, not the loss."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import pytest
import torch
from tests.run.training_bed import TINY, tiny_bed

from trimtab.anatomy.recompute import recomputes
from trimtab.bench import count_flops
from trimtab.bench.floor import REMEDIES, FloorModel, Way
from trimtab.dualspeed.schedule import mode_of_sample
from trimtab.ops.label_head import IGNORED
from trimtab.pruners import PrunerInput, build_pruner
from trimtab.run.bench_arms import WAYS, TrainingBed
from trimtab.run.bench_baselines import ReleasedStep, divprune_loop, released_keep
from trimtab.run.bench_rows import Batch, make_updates, padded_batch, split_rows

EQUAL = [14] * 10
"""Text lengths of an update without padding."""


def loss_and_gradients(bed: TrainingBed, name: str) -> tuple[float, dict[str, torch.Tensor]]:
    bed.model.zero_grad()
    total = 0.0
    for loss in bed.losses(WAYS[name], 0):
        loss.backward()
        total += loss.item()
    found = {key: one.grad.clone() for key, one in bed.model.named_parameters() if one.grad is not None}
    bed.model.zero_grad()
    return total, {key: value for key, value in found.items() if "isolator" not in key}


def same(bed: TrainingBed, one: str, other: str) -> None:
    (loss, gradients), (expected, wanted) = (loss_and_gradients(bed, name) for name in (one, other))
    assert loss == pytest.approx(expected, rel=1e-5)
    assert gradients.keys() == wanted.keys()
    for key, value in gradients.items():
        scale = wanted[key].abs().max().item()
        assert (value - wanted[key]).abs().max().item() <= 1e-4 * max(scale, 1e-3), key


def share_isolator(bed: TrainingBed) -> None:
    """Give the released step the rows that DualSpeed starts with."""
    from trimtab import attach

    handle = attach(bed.model, bed.config)
    with torch.no_grad():
        bed.isolator.copy_(handle.isolator.rows)
    handle.detach()


def test_the_public_loss_is_that_of_packing_with_nothing_pruned() -> None:
    bed = tiny_bed(lengths=EQUAL)
    same(bed, "public_packed", "public")
    same(bed, "public_packed_kept", "public")


@pytest.mark.parametrize("mode", ["fast", "slow"])
def test_the_released_loss_is_that_of_dualspeed(mode: str) -> None:
    bed = tiny_bed(lengths=EQUAL)
    share_isolator(bed)
    for name in (f"padded_{mode}", f"packed_{mode}", mode):
        same(bed, f"released_{mode}", name)


@pytest.mark.parametrize("mended", [("batched",), ("batched", "tower_once"), REMEDIES, ("label_head",)])
def test_a_remedy_changes_the_way_but_not_the_loss(mended: tuple[str, ...]) -> None:
    bed = tiny_bed()
    update, rows = bed.updates[0], [0, 1, 2]
    batch = update.arguments(padded_batch(bed.shape, update, rows, placeholders=1))
    for mode in ("fast", "slow"):
        plain, other = (
            ReleasedStep(bed.model, bed.isolator, remedies=frozenset(names)).loss(batch, mode) for names in ((), mended)
        )
        assert other.item() == pytest.approx(plain.item(), rel=1e-5)


def test_mixed_packs_are_the_fast_rows_and_the_slow_rows() -> None:
    bed = tiny_bed()
    update = bed.updates[0]
    together = sum(loss.item() for loss in bed.losses(WAYS["mixed"], 0))
    parts = 0.0
    for mode, wanted in (("fast", False), ("slow", True)):
        rows = [row for row, slow in enumerate(update.slow) if slow == wanted]
        batch = padded_batch(bed.shape, update, rows)
        parts += sum(loss.item() for loss in bed.losses(WAYS[mode], 0, [batch]))
    assert together == pytest.approx(parts, rel=1e-5)
    assert sum(update.slow) == 1


def test_the_loop_picks_what_the_pruner_picks() -> None:
    generator = torch.Generator().manual_seed(0)
    for tokens, width in ((9, 5), (49, 16)):
        features = torch.randn(3, tokens, width, generator=generator)
        keep = released_keep(tokens, 0.3)
        batched = build_pruner("divprune", {}).select(PrunerInput(features), keep).index
        assert [divprune_loop(one, keep) for one in features] == batched.tolist()


def test_the_loop_maximises_the_smallest_distance_step_by_step() -> None:
    features = torch.randn(8, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    unit = features / features.norm(dim=-1, keepdim=True)
    distance = 1 - unit @ unit.T
    picks = [max(range(8), key=lambda one: min(float(distance[one, o]) for o in range(8) if o != one))]
    while len(picks) < 4:
        free = [one for one in range(8) if one not in picks]
        picks.append(max(free, key=lambda one: min(float(distance[one, o]) for o in picks)))
    assert divprune_loop(features, 4) == sorted(picks)


def test_the_released_count_is_that_of_its_arithmetic() -> None:
    assert [released_keep(tokens, 0.1) for tokens in (576, 256, 2880)] == [57, 25, 287]


def test_arms_move_no_weight_and_leave_the_model_bare() -> None:
    bed = tiny_bed()
    before = {key: value.clone() for key, value in bed.model.state_dict().items()}
    for way in WAYS.values():
        bed.runner(way)()
    after = bed.model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in bed.model.modules())
    assert all(one.grad is None for one in bed.model.parameters())


def test_a_runner_takes_the_updates_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    bed = tiny_bed(updates=2)
    seen: list[int] = []
    plain = bed.losses

    def noted(way: Way, number: int, batches: Sequence[Batch] | None = None) -> Iterator[torch.Tensor]:
        seen.append(number)
        return plain(way, number, batches)

    monkeypatch.setattr(bed, "losses", noted)
    run = bed.runner(WAYS["fast"])
    for _ in range(5):
        run()
    assert seen == [0, 1, 0, 1, 0]


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("tiles", [1, 2])
def test_the_floor_model_counts_what_the_arms_run(trained: bool, tiles: int) -> None:
    bed = tiny_bed(tower_trained=trained, tiles=tiles, max_length=200, pack_tokens=520)
    counted = FloorModel(bed.shape, masked_half=True)
    for name, way in WAYS.items():
        flops = count_flops(bed.runner(way))
        assert bed.work(way, [0], counted).total == pytest.approx(flops, rel=0.02), name


def test_no_arm_runs_a_backward_pass_through_a_frozen_tower() -> None:
    bed = tiny_bed()
    states = bed.model.model.vision_tower(bed.updates[0].pixels.flatten(0, 1), output_hidden_states=True)
    assert not any(one.requires_grad for one in states.hidden_states)


# samples -------------------------------------------------------------------------------------------------------------


def test_updates_are_a_function_of_the_seed() -> None:
    one, again, other = (make_updates(TINY, 2, slow_ratio=0.2, seed=seed) for seed in (4, 4, 5))
    assert [update.text for update in one] == [update.text for update in again]
    assert all(torch.equal(a.pixels, b.pixels) for a, b in zip(one, again, strict=True))
    assert [update.text for update in one] != [update.text for update in other]


def test_the_numbers_draw_the_modes_that_the_update_has() -> None:
    for update in make_updates(TINY, 3, slow_ratio=0.2, seed=4):
        drawn = [mode_of_sample(one, epoch=0, slow_ratio=0.2, seed=4) == "slow" for one in update.numbers]
        assert drawn == update.slow
        assert sum(update.slow) == 2


def test_a_batch_holds_the_words_the_images_and_the_answers() -> None:
    update = make_updates(TINY, 1, slow_ratio=0.1, seed=0)[0]
    batch = padded_batch(TINY, update, [3, 1])
    ids, labels, mask = (batch.entries[name] for name in ("input_ids", "labels", "attention_mask"))
    assert (ids == TINY.vocab - 1).sum(1).tolist() == [49, 49]
    assert mask.sum(1).tolist() == [49 + update.text[3], 49 + update.text[1]]
    assert (labels != IGNORED).sum(1).tolist() == [update.labels[3], update.labels[1]]
    assert torch.equal(labels[labels != IGNORED], ids[labels != IGNORED])
    assert torch.equal(update.arguments(batch)["pixel_values"], update.pixels[[3, 1]].flatten(0, 1))


def test_only_batches_of_trimtab_carry_notes_and_only_mixed_ones_numbers() -> None:
    bed = tiny_bed()
    for name, way in WAYS.items():
        (batch, *_) = bed.batches(way, 0)
        assert (batch.entries.get("row_notes") is not None) == (way.style == "trimtab"), name
        assert ("samples" in batch.entries) == (way.view == "mixed"), name
        images = (batch.entries["input_ids"] == bed.shape.vocab - 1).sum(1)
        assert set(images.tolist()) == {1 if way.style == "released" else 49}, name


def test_packs_hold_every_row_once_and_keep_the_budget() -> None:
    bed = tiny_bed()
    for view in ("full", "fast", "mixed"):
        packs = split_rows(bed.shape, bed.floor, bed.updates[0], view, packing=True)
        assert sorted(row for pack in packs for row in pack) == list(range(10))
        for pack in packs:
            assert sum(bed.floor.lengths(view, bed.updates[0].counts(pack))) <= bed.shape.pack_tokens
    rows = split_rows(bed.shape, bed.floor, bed.updates[0], "full", packing=False)
    assert rows == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]]


def test_several_tiles_are_blocks_of_their_own() -> None:
    bed = tiny_bed(tiles=2, max_length=200, pack_tokens=520, lengths=EQUAL)
    share_isolator(bed)
    same(bed, "released_fast", "fast")
    same(bed, "released_slow", "slow")
    assert bed.floor.short == 2 * (4 + 4)


def test_a_bed_can_be_changed_without_a_second_model() -> None:
    bed = tiny_bed()
    other = bed.changed(keep_ratio=0.5)
    assert other.model is bed.model
    assert other.optimizer is bed.optimizer
    assert (bed.floor.short, other.floor.short) == (8, 28)
    assert replace(bed.config, keep_ratio=0.5) == other.config


def test_arms_share_weights_but_not_hooks_or_flags() -> None:
    bed = tiny_bed()
    again, kept = (bed.arm(WAYS[name]) for name in ("packed_fast", "fast"))
    shared = dict(bed.model.named_parameters())
    for arm in (again, kept):
        own = {key: one for key, one in arm.model.named_parameters() if "isolator" not in key}
        assert own.keys() == shared.keys()
        assert all(own[key] is shared[key] for key in own)
        assert not {id(one) for one in arm.model.modules()} & {id(one) for one in bed.model.modules()}
    assert recomputes(again.model)
    assert not recomputes(kept.model)
    assert bed.arm(WAYS["public"]).handle is None
    assert bed.arm(WAYS["fast"]) is kept
