"""Which places the stages choose, against loops over rows and places."""

from __future__ import annotations

import copy
import dataclasses
import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.dualspeed.host_syncs import HostSyncs
from torch import Tensor

from trimtab.anatomy import drop_stages
from trimtab.anatomy.drop_inside import Rows, Stage
from trimtab.anatomy.drop_stages import (
    fastv_stages,
    keep_highest,
    kept_of,
    pyramid_stages,
    random_stages,
    vtw_stages,
)
from trimtab.errors import SettingError

PADDED = "__TVVVVT", "TTVVVNVN", "TTTTTTTT", "VVVVVVV_", "___TVTVT"
"""Rows of padding, text, visual tokens and newline rows."""


def rows_of(drawing: tuple[str, ...] = PADDED, layer: Any = None) -> Rows:
    """Rows drawn with one letter per place; query row is the last real place."""
    real, visual, marks = (torch.tensor([[kind(one) for one in row] for row in drawing]) for kind in KINDS)
    places = torch.arange(real.shape[1]).expand(real.shape)
    last = (places == (places * real).amax(1, keepdim=True)) & real
    return Rows(
        states=torch.zeros(*real.shape, 4), visual=visual, real=real, source=places,
        rank=visual.long().cumsum(1) - visual.long(), marks=marks, total=visual.sum(1), queries=last, layer=layer,
        arguments={},
    )  # fmt: skip


KINDS: tuple[Callable[[str], bool], ...] = ("_".__ne__, "VN".__contains__, "N".__eq__)


def scored(monkeypatch: pytest.MonkeyPatch, score: Tensor) -> None:
    monkeypatch.setattr(drop_stages, "attention_scores", lambda rows: score)


def only(stages: tuple[Stage, ...]) -> Stage:
    (stage,) = stages
    return stage


@pytest.mark.parametrize("ratio", [1e-9, 0.05, 0.1, 0.125, 0.25, 0.3, 1 / 3, 0.5, 0.7, 0.999, 1, 1.0])
def test_host_and_device_count_alike(ratio: float) -> None:
    totals = torch.arange(6000)
    wanted = [max(1, math.floor(ratio * total + 1e-6)) if total else 0 for total in totals.tolist()]
    assert kept_of(totals, ratio).tolist() == wanted
    assert [kept_of(total, ratio) for total in totals.tolist()] == wanted


def test_float_error_does_not_cost_a_token() -> None:
    assert 0.29 * 100 < 29
    assert kept_of(100, 0.29) == 29
    assert kept_of(576, 0.1) == 57
    assert kept_of(2, 0.1) == 1
    assert kept_of(0, 0.5) == 0


def highest_by_loop(score: Tensor, among: Tensor, keep: Tensor) -> Tensor:
    kept = torch.zeros_like(among)
    for row in range(len(score)):
        places = [place for place in range(score.shape[1]) if among[row, place]]
        places.sort(key=lambda place: (-score[row, place].item(), place))
        for place in places[: int(keep[row])]:
            kept[row, place] = True
    return kept


@pytest.mark.parametrize("seed", range(20))
def test_highest_scores_stay_and_the_first_among_equals(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    score = torch.randint(-2, 3, (6, 15), generator=generator).float()
    among = torch.rand(6, 15, generator=generator) < 0.6
    among[1] = False
    keep = torch.randint(0, 18, (6,), generator=generator)
    assert torch.equal(keep_highest(score, among, keep), highest_by_loop(score, among, keep))


@pytest.mark.parametrize("ratio", [0.1, 0.4, 0.5, 0.8])
def test_fastv_keeps_text_and_the_best_of_each_row(monkeypatch: pytest.MonkeyPatch, ratio: float) -> None:
    rows, score = rows_of(), torch.rand(5, 8)
    scored(monkeypatch, score)
    stays = only(fastv_stages(3, ratio)).choose(rows)
    for row in range(5):
        count = int(rows.total[row])
        best = sorted(range(8), key=lambda place: (not rows.visual[row, place], -score[row, place].item()))
        wanted = set(best[: max(1, math.floor(ratio * count)) if count else 0])
        for place in range(8):
            assert stays[row, place] == (place in wanted if rows.visual[row, place] else True)


def test_fastv_asks_the_layer_before() -> None:
    stage = only(fastv_stages(2, 0.5))
    assert (stage.layer, stage.look_layer) == (2, 1)
    assert stage.kept is not None
    assert [stage.kept(count) for count in (0, 1, 2, 576)] == [0, 1, 1, 288]


def test_pyramid_asks_the_next_layer_and_counts_from_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    stages = pyramid_stages(32)
    assert [(stage.layer, stage.look_layer) for stage in stages] == [(8, 8), (16, 16), (24, 24)]
    assert [stage.kept(576) for stage in stages if stage.kept] == [288, 144, 72]
    # At the second stage half of the tokens have left, and a quarter of the original count stays.
    rows = dataclasses.replace(rows_of(("TVVVVVVT", "TTTVVTTT")), total=torch.tensor([12, 4]))
    score = torch.arange(16.0).view(2, 8)
    scored(monkeypatch, score)
    stays = stages[1].choose(rows)
    assert stays.tolist() == [[True, False, False, False, True, True, True, True], [*[True] * 3, False, *[True] * 4]]


@pytest.mark.parametrize(("depth", "layers"), [(4, [1, 2, 3]), (6, [1, 3, 4]), (12, [3, 6, 9]), (40, [10, 20, 30])])
def test_pyramid_stands_at_quarters(depth: int, layers: list[int]) -> None:
    assert [stage.layer for stage in pyramid_stages(depth)] == layers


def test_stages_at_which_nothing_leaves_are_left_out() -> None:
    assert fastv_stages(2, 1) == fastv_stages(2, 1.0) == ()
    assert pyramid_stages(32, [1, 2], [1, 1.0]) == ()
    assert [stage.layer for stage in pyramid_stages(32, [1, 2, 3, 4], [1, 0.5, 0.5, 0.25])] == [2, 4]
    assert random_stages(3, 0) == ()


def test_vtw_lets_all_visual_tokens_leave() -> None:
    rows = rows_of()
    stage = only(vtw_stages(16))
    assert (stage.layer, stage.look_layer) == (16, 16)
    assert torch.equal(stage.choose(rows), ~rows.visual)
    assert stage.kept is not None
    assert stage.kept(576) == 0


@pytest.mark.parametrize("sink_tokens", [0, 1, 2, 99])
@pytest.mark.parametrize("keep_newlines", [False, True])
def test_vtw_keeps_sinks_and_newlines(sink_tokens: int, keep_newlines: bool) -> None:
    rows = rows_of()
    stage = only(vtw_stages(16, sink_tokens, keep_newlines))
    stays = stage.choose(rows)
    for row in range(5):
        seen = 0
        for place in range(8):
            visual = bool(rows.visual[row, place])
            wanted = not visual or seen < sink_tokens or (keep_newlines and bool(rows.marks[row, place]))
            assert stays[row, place] == wanted
            seen += visual
    if keep_newlines:
        assert stage.kept is None  # how many there are only the device knows
    else:
        assert stage.kept is not None
        assert [stage.kept(int(count)) for count in rows.total] == (stays & rows.visual).sum(1).tolist()


@pytest.mark.parametrize("count", [None, 1, 3, 100])
@pytest.mark.parametrize("spare_queries", [False, True])
def test_random_places_leave_as_many_as_asked(count: int | None, spare_queries: bool) -> None:
    rows = rows_of()
    choose = only(random_stages(3, count, spare_queries=spare_queries)).choose
    left = torch.zeros(rows.real.shape)
    for _ in range(400):
        gone = ~choose(rows) & rows.real
        for row in range(5):
            real = int(rows.real[row].sum())
            wanted = int(rows.total[row]) if count is None else count
            assert gone[row].sum() == min(wanted, real - 1)
        left += gone
    free = rows.real & ~rows.queries if spare_queries else rows.real
    assert left[~free].eq(0).all()
    for row in range(5):
        # All places, text too, leave equally often: within 5 standard deviations of 400 draws.
        share = left[row, free[row]] / 400
        mean = share.mean()
        assert (share - mean).abs().max() <= 5 * (mean * (1 - mean) / 400).sqrt() + 1e-6


def test_random_draws_come_from_seed_layer_and_call_only() -> None:
    rows = rows_of(("T" * 40, "V" * 40))

    def draws(layer: int, seed: int, count: int = 3) -> list[Tensor]:
        torch.rand(seed + 1)  # the global generator does not matter
        choose = only(random_stages(layer, 20, seed)).choose
        return [choose(rows) for _ in range(count)]

    first = draws(2, 0)
    state = torch.get_rng_state()
    again = only(random_stages(2, 20, 0)).choose(rows)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(again, first[0])
    assert all(map(torch.equal, draws(2, 0), first))
    different = [*first, *draws(3, 0), *draws(2, 1)]
    for number, one in enumerate(different):
        assert not any(torch.equal(one, other) for other in different[:number])
    assert not torch.equal(first[0][0], first[0][1])


@pytest.mark.parametrize(
    "stages", [vtw_stages(2, 3, True), fastv_stages(2, 0.3), pyramid_stages(8), random_stages(2), random_stages(2, 3)]
)
def test_choosing_does_not_wait_for_the_device(stages: tuple[Stage, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    rows = rows_of()
    scored(monkeypatch, torch.rand(5, 8))
    with HostSyncs() as syncs:
        for stage in stages:
            stage.choose(rows)
    assert not syncs.waits


@pytest.mark.parametrize(
    "stages", [vtw_stages(2, 3), fastv_stages(2, 0.3), pyramid_stages(8), random_stages(2), random_stages(2, 3)]
)
def test_stages_can_be_copied_and_stored(stages: tuple[Stage, ...]) -> None:
    for other in (copy.deepcopy(stages), pickle.loads(pickle.dumps(stages))):
        assert [stage.layer for stage in other] == [stage.layer for stage in stages]
        assert [stage.kept and stage.kept(10) for stage in other] == [stage.kept and stage.kept(10) for stage in stages]


WRONG: list[tuple[Callable[[], Any], str]] = [
    (lambda: vtw_stages(-1), r"vtw_stages\.layer must be a whole number from 0 on, but -1 came"),
    (lambda: vtw_stages(1, True), r"vtw_stages\.sink_tokens must be a whole number from 0 on, but True came"),
    (lambda: vtw_stages(1, 0, 1), r"vtw_stages\.keep_newlines must be True or False, but 1 came"),  # type: ignore[arg-type]
    (lambda: fastv_stages(0, 0.5), r"fastv_stages\.layer must be a whole number from 1 on, but 0 came"),
    (lambda: fastv_stages(2.0, 0.5), r"fastv_stages\.layer must be a whole number from 1 on, but 2\.0 came"),  # type: ignore[arg-type]
    (lambda: fastv_stages(2, 0), r"fastv_stages\.keep_ratio must be a share in \(0, 1\], but 0 came\. 1 keeps all"),
    (lambda: fastv_stages(2, 1.5), r"fastv_stages\.keep_ratio must be a share in \(0, 1\], but 1\.5 came"),
    (lambda: fastv_stages(2, math.nan), r"fastv_stages\.keep_ratio must be a share in \(0, 1\], but nan came"),
    (lambda: fastv_stages(2, True), r"fastv_stages\.keep_ratio must be a share in \(0, 1\], but True came"),
    (lambda: fastv_stages(2, "half"), r"fastv_stages\.keep_ratio must be a share in \(0, 1\], but 'half' came"),  # type: ignore[arg-type]
    (lambda: pyramid_stages(0), r"pyramid_stages\.depth must be a whole number from 1 on, but 0 came"),
    (
        lambda: pyramid_stages(3),
        r"pyramid_stages\.layers must be given .*less than 4 .*None came\. This model has 3: pass",
    ),
    (lambda: pyramid_stages(8, 4), r"pyramid_stages\.layers must be a list of whole numbers, or None, but 4 came"),  # type: ignore[arg-type]
    (
        lambda: pyramid_stages(8, [1.5]),
        r"pyramid_stages\.layers must be a list of whole numbers, or None, but \[1\.5\]",
    ),  # type: ignore[list-item]
    (lambda: pyramid_stages(8, []), r"pyramid_stages\.layers must be one or more rising .*0 to 8, .*but \[\] came"),
    (lambda: pyramid_stages(8, [4, 4], [0.5, 0.2]), r"\.layers must be .*rising .*from 0 to 8, .*\[4, 4\] came\. At a"),
    (lambda: pyramid_stages(8, [4, 9], [0.5, 0.2]), r"\.layers must be .*rising .*from 0 to 8, .*\[4, 9\] came\. At a"),
    (lambda: pyramid_stages(8, [4, 5]), r"\.keep_ratios must be a list of 2 shares, .*\[4, 5\], but \(0\.5, .*as many"),
    (lambda: pyramid_stages(8, [4], 0.5), r"\.keep_ratios must be a list of 1 shares, .*\[4\], but 0\.5 came"),  # type: ignore[arg-type]
    (lambda: pyramid_stages(8, [4], [0.0]), r"\.keep_ratios must be a share in \(0, 1\], but 0\.0 came"),
    (
        lambda: pyramid_stages(8, [4, 5], [0.25, 0.5]),
        r"\.keep_ratios must be not rising, .*\[0\.25, 0\.5\] came\. Each is a share of the original count",
    ),
    (lambda: random_stages(-2), r"random_stages\.layer must be a whole number from 0 on, but -2 came"),
    (lambda: random_stages(2, -1), r"random_stages\.count must be a whole number from 0 on, but -1 came"),
    (lambda: random_stages(2, seed=-1), r"random_stages\.seed must be a whole number from 0 on, but -1 came"),
]


@pytest.mark.parametrize(("call", "message"), WRONG, ids=[str(number) for number in range(len(WRONG))])
def test_wrong_settings(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(SettingError, match=message):
        call()


def test_messages_name_who_asks() -> None:
    with pytest.raises(SettingError, match=r"^pyramid_drop\.layers "):
        pyramid_stages(2, owner="pyramid_drop")
    with pytest.raises(SettingError, match=r"^fastv\.keep_ratio "):
        fastv_stages(2, 2, owner="fastv")
    with pytest.raises(SettingError, match=r"^random_drop\.count "):
        random_stages(2, -2, owner="random_drop")
    with pytest.raises(SettingError, match=r"^withdraw\.sink_tokens "):
        vtw_stages(2, -2, owner="withdraw")
