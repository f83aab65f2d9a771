"""Modes per sample: fast and slow rows in one batch, packed or padded, each as it would be alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from tests.dualspeed.common import ROWS, attached, portrait, same_model
from tests.dualspeed.packing_tools import (
    SETTINGS,
    STOCK,
    alone_and_together,
    implementations,
    label_count,
    only_row,
    row_lengths,
    same_loss,
    same_step,
    seen_by_decoder,
    take_step,
)
from tests.tiny import FAMILIES, Batch, TinyFamily, tiny_llava, weights

from trimtab.dualspeed.samples import Samples
from trimtab.dualspeed.schedule import mode_of_sample
from trimtab.errors import SettingError

LLAVA = FAMILIES["llava"]
DRAW: dict[str, Any] = {"slow_ratio": 0.5, "seed": SETTINGS["seed"]}
PER_SAMPLE: dict[str, Any] = {"schedule_unit": "sample", "slow_ratio": 0.5}
IMAGES = (1, 0, 2, 1, 0, 1)
"""Images per row; together with `MIXED` there is a fast and a slow row of each kind."""
MIXED = ("fast", "slow", "slow", "fast", "fast", "slow")
TAUGHT = ("fast", "fast", "slow", "fast", "fast", "slow")
"""What `MIXED` comes to: a slow row without image loses nothing, so its full view has nothing to learn."""

pytestmark = pytest.mark.filterwarnings("ignore:slow_ratio=0 trains the language model on pruned images only")


@pytest.fixture(params=["llava", "llava_next", "idefics3", "qwen2_5_vl", "qwen3_vl"])
def family(request: pytest.FixtureRequest) -> TinyFamily:
    return FAMILIES[request.param]


def samples(modes: Sequence[str], epoch: int = 0) -> Samples:
    """Return numbers of samples that the draw of `DRAW` gives these modes."""
    free, found = iter(range(10_000)), []
    for mode in modes:
        found.append(next(one for one in free if mode_of_sample(one, epoch=epoch, **DRAW) == mode))
    return Samples(tuple(found), epoch)


def mixed_batch(family: TinyFamily, model: Any, modes: Sequence[str] = MIXED, **changes: Any) -> Batch:
    batch = family.make_batch(model, IMAGES, **changes)
    return {**batch, "samples": samples(modes)}


def without_samples(batch: Batch) -> Batch:
    return {name: value for name, value in batch.items() if name != "samples"}


# the draw ---------------------------------------------------------------------------------------------------------


def test_the_mode_of_a_sample_is_a_pure_function_with_the_right_share() -> None:
    for ratio in (0.1, 0.25, 0.5):
        modes = [mode_of_sample(one, epoch=3, slow_ratio=ratio, seed=7) for one in range(20_000)]
        assert modes == [mode_of_sample(one, epoch=3, slow_ratio=ratio, seed=7) for one in range(20_000)]
        share = Counter(modes)["slow"] / len(modes)
        # A share of independent draws has the deviation sqrt(r (1 - r) / n), 0.0035 at most.
        assert abs(share - ratio) < 4 * 0.0036


def test_every_epoch_and_every_seed_draws_anew() -> None:
    def drawn(epoch: int, seed: int) -> list[str]:
        return [mode_of_sample(one, epoch=epoch, slow_ratio=0.5, seed=seed) for one in range(200)]

    found = [drawn(epoch, seed) for epoch in (0, 1) for seed in (0, 1)]
    for number, one in enumerate(found):
        for other in found[number + 1 :]:
            agree = sum(a == b for a, b in zip(one, other, strict=True))
            assert 60 < agree < 140, "independent draws agree in about half of 200"


def test_no_sample_or_every_sample_is_slow_at_the_ends() -> None:
    assert {mode_of_sample(one, epoch=0, slow_ratio=0.0, seed=1) for one in range(100)} == {"fast"}
    assert {mode_of_sample(one, epoch=0, slow_ratio=1.0, seed=1) for one in range(100)} == {"slow"}
    with pytest.raises(SettingError, match="slow_ratio"):
        mode_of_sample(1, epoch=0, slow_ratio=1.5, seed=1)


# off is identity --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("packing", [False, True])
def test_detaching_leaves_the_model_as_it_was(family: TinyFamily, packing: bool) -> None:
    model = family.build_model().train()
    batch = mixed_batch(family, model)
    model(**without_samples(batch))  # transformers installs its own capturing hooks on the first forward
    before, attention = (portrait(model), weights(model)), implementations(model)
    take_step(model, batch, packing=packing, **PER_SAMPLE)
    same_model(model, before)
    assert implementations(model) == attention


def test_evaluation_is_untouched_by_the_entry_of_the_batch(family: TinyFamily) -> None:
    """A Trainer evaluates with the collator that it trains with; no model of transformers knows the entry."""
    model = family.build_model()
    batch = mixed_batch(family, model)
    entries: list[set[str]] = []
    with torch.no_grad():
        expected = model(**without_samples(batch))
        with attached(model, packing=True, **SETTINGS, **PER_SAMPLE):
            hook = model.register_forward_pre_hook(lambda *call: entries.append(set(call[2])), with_kwargs=True)
            model.train()(**batch)
            found = model.eval()(**batch)
            hook.remove()
    assert entries == [batch.keys() - {"samples"}] * 2
    assert torch.equal(found.logits, expected.logits)
    assert torch.equal(found.loss, expected.loss)


# each row as it would be alone ------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("packing", [False, True])
def test_a_mixed_batch_is_the_sum_of_its_rows(family: TinyFamily, packing: bool, side: str) -> None:
    model = family.build_model().train()
    batch = mixed_batch(family, model, padding_side=side)
    settings = {"kl_weight": 0.5, "temperature": 2.0}
    found = take_step(model, batch, packing=packing, **settings, **PER_SAMPLE)
    same_step(found, alone_and_together(model, family, batch, IMAGES, TAUGHT, **settings))
    assert found.metrics["kl"] > 1e-3, "or the distillation of slow rows could be missing"


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("positions", ["renumber", "original"])
def test_a_mixed_batch_keeps_its_positions(family: TinyFamily, packing: bool, positions: str) -> None:
    model = family.build_model().train()
    batch = mixed_batch(family, model)
    settings = {"positions": positions, "isolator_tokens": 0}
    found = take_step(model, batch, packing=packing, **settings, **PER_SAMPLE)
    same_step(found, alone_and_together(model, family, batch, IMAGES, TAUGHT, **settings))


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("modes", [("fast",) * 6, ("slow",) * 6, ("slow",) + ("fast",) * 5], ids=" ".join)
def test_batches_of_one_mode_are_the_sum_of_their_rows_too(modes: tuple[str, ...], packing: bool) -> None:
    model = tiny_llava()
    batch = mixed_batch(LLAVA, model, modes)
    taught = ["slow" if mode == "slow" and count else "fast" for mode, count in zip(modes, IMAGES, strict=True)]
    found = take_step(model, batch, packing=packing, **PER_SAMPLE)
    same_step(found, alone_and_together(model, LLAVA, batch, IMAGES, taught))
    counts = Counter(taught)
    assert (found.metrics["samples_fast"], found.metrics["samples_slow"]) == (counts["fast"], counts["slow"])


@pytest.mark.parametrize("packing", [False, True])
def test_text_alone_is_fast_whatever_the_draw(packing: bool) -> None:
    model = tiny_llava()
    batch = {**LLAVA.make_batch(model, (0, 0, 0)), "samples": samples(("slow",) * 3)}
    found = take_step(model, batch, packing=packing, **PER_SAMPLE)
    same_step(found, alone_and_together(model, LLAVA, batch, (0, 0, 0), ("fast",) * 3))
    assert (found.metrics["samples_fast"], found.metrics["samples_slow"]) == (3, 0)


@pytest.mark.parametrize("packing", [False, True])
def test_rows_that_lose_nothing_are_fast(packing: bool) -> None:
    model = tiny_llava()
    batch = mixed_batch(LLAVA, model, ("slow",) * 6)
    stock = model(**without_samples(batch), use_cache=False).loss.detach()
    found = take_step(model, batch, packing=packing, **{**STOCK, **PER_SAMPLE})
    same_loss(found.loss, stock)
    assert (found.metrics["samples_fast"], found.metrics["samples_slow"]) == (6, 0)


@pytest.mark.parametrize("packing", [False, True])
def test_without_a_teacher_slow_rows_are_full_all_the_same(packing: bool) -> None:
    model = tiny_llava()
    batch = mixed_batch(LLAVA, model)
    with seen_by_decoder(model) as calls:
        found = take_step(model, batch, packing=packing, kl_weight=0.0, **PER_SAMPLE)
    assert len(calls) == 1, "no teacher"
    same_step(found, alone_and_together(model, LLAVA, batch, IMAGES, TAUGHT, kl_weight=0.0))
    fast = take_step(model, without_samples(batch), "fast")
    assert abs(found.loss - fast.loss) > 1e-3, "or slow rows could be pruned"


@pytest.mark.parametrize("packing", [False, True])
def test_the_sum_is_divided_by_the_labels_of_the_update(packing: bool) -> None:
    model = tiny_llava()
    batch = mixed_batch(LLAVA, model)
    of_batch = take_step(model, batch, packing=packing, **PER_SAMPLE)
    of_update = take_step(model, {**batch, "num_items_in_batch": 100}, packing=packing, **PER_SAMPLE)
    same_loss(of_update.loss, of_batch.loss * label_count(batch) / 100)


@pytest.mark.parametrize("packing", [False, True])
def test_recomputing_changes_nothing(packing: bool) -> None:
    found = []
    for recompute in (None, "model", "slow"):
        model = tiny_llava()
        if recompute:
            model.activation_checkpointing_enable({"use_reentrant": False})
        settings = {"recompute": recompute} if recompute else {}
        found.append(take_step(model, mixed_batch(LLAVA, model), packing=packing, **settings, **PER_SAMPLE))
    same_step(found[1], found[0])
    same_step(found[2], found[0])


def test_one_teacher_pass_sees_the_pruned_slow_rows_only(family: TinyFamily) -> None:
    model = family.build_model().train()
    batch = mixed_batch(family, model)
    full, pruned = (row_lengths(model, without_samples(batch), view) for view in ("full", "pruned"))
    slow = [mode == "slow" for mode in TAUGHT]
    teacher = sum(short for short, is_slow in zip(pruned, slow, strict=True) if is_slow)
    student = sum(long if is_slow else short for long, short, is_slow in zip(full, pruned, slow, strict=True))
    with seen_by_decoder(model) as calls:
        take_step(model, batch, packing=True, **PER_SAMPLE)
    assert [tuple(one.shape[:2]) for one in calls] == [(1, teacher), (1, student)]


def test_no_gradient_of_a_row_reaches_another(family: TinyFamily) -> None:
    model = family.build_model().train()
    batch = mixed_batch(family, model)
    full, pruned = (row_lengths(model, without_samples(batch), view) for view in ("full", "pruned"))
    lengths = [long if mode == "slow" else short for long, short, mode in zip(full, pruned, TAUGHT, strict=True)]
    for row in range(len(IMAGES)):
        with seen_by_decoder(model) as calls, attached(model, packing=True, **SETTINGS, **PER_SAMPLE):
            model(**only_row(batch, row)).loss.backward()
        reached = [bool(part.any()) for part in calls[-1].grad[0].split(lengths)]
        assert reached == [number == row for number in range(len(IMAGES))]


# who decides ------------------------------------------------------------------------------------------------------


def test_the_epoch_goes_into_the_draw() -> None:
    model = tiny_llava()
    batch = LLAVA.make_batch(model, (1, 1, 1, 1, 1, 1))
    ids = tuple(range(6))
    found, counts = [], Counter()
    with attached(model, packing=True, **SETTINGS, **PER_SAMPLE) as handle:
        for epoch in range(4):
            model(**batch, samples=Samples(ids, epoch))
            counts.update(mode_of_sample(one, epoch=epoch, **DRAW) for one in ids)
            metrics = handle.metrics()
            assert (metrics["samples_fast"], metrics["samples_slow"]) == (counts["fast"], counts["slow"])
            found.append(metrics["ce"])
    assert len(set(found)) > 1


@pytest.mark.parametrize("packing", [False, True])
def test_a_frozen_language_model_takes_fast_rows_only(packing: bool) -> None:
    model = tiny_llava()
    model.model.language_model.requires_grad_(False)
    model.lm_head.requires_grad_(False)
    batch = mixed_batch(LLAVA, model)
    found = take_step(model, batch, packing=packing, **PER_SAMPLE)
    assert found.metrics["mode"] == "fast"
    assert found.metrics.get("samples_slow", 0) == 0
    same_step(found, take_step(model, without_samples(batch), "fast"))


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("mode", ["fast", "slow"])
def test_a_forced_mode_is_that_of_all_rows(mode: str, packing: bool) -> None:
    model = tiny_llava()
    batch = mixed_batch(LLAVA, model)
    found = take_step(model, batch, mode, packing=packing, **PER_SAMPLE)
    same_step(found, take_step(model, without_samples(batch), mode))


def test_other_units_pass_over_the_entry() -> None:
    model = tiny_llava()
    batch = mixed_batch(LLAVA, model)
    for packing in (False, True):
        found = take_step(model, batch, "slow", packing=packing)
        same_step(found, take_step(model, without_samples(batch), "slow", packing=packing))


def test_metrics_tell_fast_from_slow_rows() -> None:
    model = tiny_llava()
    batch = mixed_batch(LLAVA, model)
    slow = [row for row, mode in enumerate(TAUGHT) if mode == "slow"]
    counts = {
        mode: sum(label_count(batch, row) for row, one in enumerate(TAUGHT) if one == mode) for mode in ("fast", "slow")
    }
    sums: dict[str, float] = {"fast": 0.0, "slow": 0.0, "kl": 0.0}
    kept = 0
    with attached(model, **SETTINGS) as handle:
        for row, mode in enumerate(TAUGHT):
            alone = LLAVA.take_row(batch, IMAGES, row)
            with handle.force_mode(mode):
                model(**alone)
            metrics = handle.metrics()
            sums[mode] += metrics["ce"] * label_count(alone)
            sums["kl"] += metrics["kl"] * label_count(alone) if row in slow else 0
            kept += metrics["visual_tokens_kept"] if IMAGES[row] else 0
    for packing in (False, True):
        found = take_step(model, batch, packing=packing, **PER_SAMPLE).metrics
        assert found["mode"] == "mixed"
        assert (found["samples_fast"], found["samples_slow"]) == (4, 2)
        for mode in ("fast", "slow"):
            assert found[f"ce_{mode}"] == pytest.approx(sums[mode] / counts[mode], abs=1e-5)
        assert found["ce"] == pytest.approx((sums["fast"] + sums["slow"]) / sum(counts.values()), abs=1e-5)
        assert found["kl"] == pytest.approx(sums["kl"] / counts["slow"], abs=1e-5)
        assert found["visual_tokens_full"] == 36 * sum(IMAGES)
        assert found["visual_tokens_kept"] == kept


@pytest.mark.parametrize("packing", [False, True])
def test_nobody_elses_random_numbers_are_consumed(packing: bool) -> None:
    model = tiny_llava()
    batch = mixed_batch(LLAVA, model)
    before = torch.get_rng_state()
    take_step(model, batch, packing=packing, pruner="random", **PER_SAMPLE)
    assert torch.equal(torch.get_rng_state(), before)


# bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("packing", [False, True])
def test_a_batch_that_does_not_say_its_samples_is_refused(packing: bool) -> None:
    model = tiny_llava()
    batch = LLAVA.make_batch(model, ROWS)
    model(**batch)
    before = portrait(model), weights(model)
    with (
        attached(model, packing=packing, **SETTINGS, **PER_SAMPLE),
        pytest.raises(SettingError, match=r"(?s)samples.*(Samples|schedule_unit)"),
    ):
        model(**batch)
    same_model(model, before)


@pytest.mark.parametrize(
    "wrong", [Samples((1, 2), 0), Samples((1, 2, 3, 4), 0), Samples((), 0), (1, 2, 3), "abc", torch.arange(3)],
    ids=["fewer", "more", "none", "no epoch", "text", "tensor"],
)  # fmt: skip
def test_samples_that_are_not_those_of_the_rows_are_refused(wrong: Any) -> None:
    model = tiny_llava()
    batch = LLAVA.make_batch(model, ROWS)
    with (
        attached(model, packing=True, **SETTINGS, **PER_SAMPLE),
        pytest.raises(SettingError, match="samples"),
    ):
        model(**batch, samples=wrong)


def test_a_batch_without_samples_trains_where_a_mode_is_forced() -> None:
    """Checks and pictures force modes on batches that no sampler has numbered."""
    model = tiny_llava()
    batch = LLAVA.make_batch(model, ROWS)
    found = take_step(model, batch, "slow", packing=True, **PER_SAMPLE)
    same_step(found, take_step(model, batch, "slow"))
