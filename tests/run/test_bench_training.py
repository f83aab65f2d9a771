"""`trimtab bench training`: what its record says, its settings, and its command."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.run.training_bed import TINY, tiny_bed

from trimtab.bench.shapes import SHAPES
from trimtab.cli.app import main
from trimtab.errors import SettingError
from trimtab.records import check_record, read_record
from trimtab.run import bench_memory
from trimtab.run.bench_arms import WAYS
from trimtab.run.bench_memory import largest_that_fits, measure_memory
from trimtab.run.bench_parts import PARTS, PartClock, split_seconds
from trimtab.run.bench_summary import ROWS, padding_of, quartiles, summarise
from trimtab.run.bench_training import bench_training

Record = dict[str, Any]
FEW = ["public", "public_packed", "public_packed_kept", "released_fast", "released_slow", "fast", "slow", "mixed"]


@pytest.fixture(autouse=True)
def _small_toy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SHAPES, "toy", TINY)


@pytest.fixture(scope="module")
def record() -> Record:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(SHAPES, "toy", TINY)
        return bench_training(repeats=2, curves=["keep", "text", "tiles", "ranks"])


def test_the_record_has_every_arm_and_every_row(record: Record) -> None:
    check_record(record)
    results = record["results"]
    assert [arm["name"] for arm in results["arms"]] == list(WAYS)
    assert [row["name"] for row in results["rows"]] == [row.name for row in ROWS]
    assert results["out_of_memory"] == []
    assert record["settings"]["shape"]["tower_trained"] is False
    assert record["hardware"]["threads"] == 1
    assert json.loads(json.dumps(record)) == record


def test_every_measurement_stands_beside_its_prediction(record: Record) -> None:
    rows = {row["name"]: row for row in record["results"]["rows"]}
    for row in rows.values():
        assert row["seconds_per_sample"] > 0
        for base in ("public", "packed", "packed_kept"):
            assert row[f"predicted_{base}"] > 0
            assert row[f"times_{base}"]["low"] <= row[f"times_{base}"]["median"] <= row[f"times_{base}"]["high"]
    assert rows["public"]["times_public"]["median"] == rows["public"]["predicted_public"] == 1
    assert rows["public_packed_kept"]["over_floor"]["median"] == 1
    assert rows["ours"]["predicted_public"] > rows["packed"]["predicted_public"] > rows["released"]["predicted_public"]


def test_the_summary_is_that_of_the_rows(record: Record) -> None:
    rows = {row["name"]: row for row in record["results"]["rows"]}
    summary = record["results"]["summary"]
    assert summary["ours_over_public"] == rows["ours"]["times_public"]
    assert summary["ours_over_public_packed"] == rows["ours"]["times_packed"]
    assert summary["fast_over_floor"] == rows["fast"]["over_floor"]
    steps = record["results"]["timing"]["steps"]
    released = [
        0.9 * fast + 0.1 * slow
        for fast, slow in zip(steps["released_fast"]["seconds"], steps["released_slow"]["seconds"], strict=True)
    ]
    ratios = [one / ours for one, ours in zip(released, steps["mixed"]["seconds"], strict=True)]
    assert summary["ours_over_released"] == pytest.approx(quartiles(ratios))


def test_the_parts_are_shares_of_the_whole(record: Record) -> None:
    split = {arm["name"]: arm for arm in record["results"]["arms"] if "shares" in arm}
    assert {"public", "released_slow", "mixed"} <= set(split)
    for name, arm in split.items():
        assert set(arm["shares"]) == set(PARTS)
        assert sum(arm["shares"].values()) == pytest.approx(1)
        assert sum(arm["predicted_shares"].values()) == pytest.approx(1)
        prunes = WAYS[name].view != "full"
        assert (arm["shares"]["pruner"] > 0) == prunes, name
        for part in ("tower", "decoder", "head", "optimizer", "assembly"):
            assert arm["shares"][part] > 0


def test_the_curves_have_points_with_predictions(record: Record) -> None:
    curves = record["results"]["curves"]
    assert list(curves) == ["keep", "text", "tiles", "ranks"]
    predicted = [point["predicted"] for point in curves["keep"]]
    assert predicted == sorted(predicted, reverse=True), "the fewer are kept, the faster"
    predicted = [point["predicted"] for point in curves["text"]]
    assert predicted == sorted(predicted, reverse=True), "the fewer words, the faster"
    predicted = [point["predicted"] for point in curves["tiles"]]
    assert predicted == sorted(predicted), "the more tiles, the faster"
    assert [point["value"] for point in curves["ranks"]] == [1, 2, 4, 8, 16, 32, 64]


def test_what_a_row_of_two_arms_takes_is_their_mean_at_the_slow_ratio() -> None:
    bed = tiny_bed()
    seconds = {"public": [4.0, 8.0], "released_fast": [1.0, 2.0], "released_slow": [6.0, 2.0]}
    timing = {"steps": {name: {"seconds": taken} for name, taken in seconds.items()}}
    rows = {row["name"]: row for row in summarise(bed, timing, 0.25)["rows"]}
    assert list(rows) == ["public", "released"]
    assert rows["released"]["seconds_per_sample"] == pytest.approx((0.75 + 1.5 + 2.0) / 2 / 10)
    assert rows["released"]["times_public"]["median"] == pytest.approx((4 / 2.25 + 8 / 2.0) / 2)
    work = {name: bed.work(WAYS[name]).total for name in seconds}
    mean = 0.75 * work["released_fast"] + 0.25 * work["released_slow"]
    assert rows["released"]["predicted_public"] == pytest.approx(work["public"] / mean)


def test_padding_is_counted() -> None:
    bed = tiny_bed(lengths=[10] * 5 + [10, 10, 10, 10, 60])
    found = padding_of(bed)
    assert found["full"] == pytest.approx((5 * 59 + 5 * 109) / (9 * 59 + 109))
    assert found["fast"] == pytest.approx((5 * 18 + 5 * 68) / (9 * 18 + 68))


def test_the_clock_gives_every_second_to_one_part(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter((0.0, 1.0, 3.0, 7.0, 15.0))
    monkeypatch.setattr("trimtab.run.bench_parts.time.perf_counter", lambda: next(now))
    clock = PartClock()
    clock.start()
    clock.switch("decoder")
    assert clock.timed("pruner", lambda one: one + 1)(1) == 2
    clock.switch("head")
    assert clock.seconds == {**dict.fromkeys(PARTS, 0.0), "assembly": 1.0, "decoder": 2.0 + 8.0, "pruner": 4.0}


def test_splitting_leaves_the_model_as_it_was() -> None:
    from trimtab.pruners.divprune import DivPrunePruner
    from trimtab.run import bench_baselines

    bed = tiny_bed()
    bed.runner(WAYS["released_slow"])()  # transformers installs hooks of its own when states are first asked for
    model = bed.arm(WAYS["released_slow"]).model
    before = (DivPrunePruner.select, bench_baselines.divprune_loop)
    hooks = [len(one._forward_hooks) + len(one._forward_pre_hooks) for one in model.modules()]
    assert sum(split_seconds(bed, WAYS["released_slow"], [0]).values()) > 0
    assert before == (DivPrunePruner.select, bench_baselines.divprune_loop)
    assert hooks == [len(one._forward_hooks) + len(one._forward_pre_hooks) for one in model.modules()]


# memory --------------------------------------------------------------------------------------------------------------


def test_keeping_activations_takes_more_memory_and_fits_fewer_rows() -> None:
    bed = tiny_bed()
    again, kept, fast = (
        measure_memory(bed, WAYS[name], 1.0) for name in ("public_packed", "public_packed_kept", "fast")
    )
    assert again.peak_mib < kept.peak_mib
    assert again.largest > kept.largest
    assert fast.largest > kept.largest
    parameters = sum(one.numel() for one in bed.model.parameters())
    trained = sum(one.numel() for one in bed.model.parameters() if one.requires_grad)
    assert again.held_mib == pytest.approx((4 * parameters + 8 * trained) / 2**20)
    assert all(one.grad is None for one in bed.model.parameters())


def test_rows_that_fit_are_extended_from_two_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    bed = tiny_bed()
    monkeypatch.setattr(bench_memory, "_peak_of_rows", lambda bed, way, rows: 100.0 + 10.0 * rows)
    monkeypatch.setattr(bench_memory, "_held_mib", lambda bed: 24.0)
    assert measure_memory(bed, WAYS["fast"], 1.0).largest == (1024 - 24 - 100) // 10
    assert measure_memory(bed, WAYS["fast"], 0.01).largest == 0


@pytest.mark.parametrize("limit", [0, 1, 7, 16, 100, 5000])
def test_the_largest_that_fits_is_found_within_a_sixteenth(limit: int) -> None:
    tried: list[int] = []

    def fits(rows: int) -> bool:
        tried.append(rows)
        return rows <= limit

    found = largest_that_fits(fits, most=4096)
    limit = min(limit, 4096)
    assert found <= limit
    assert limit - found <= max(1, found // 16) - 1 or limit == found
    assert max(tried) <= 4096


# settings ------------------------------------------------------------------------------------------------------------


def test_settings_change_the_shape() -> None:
    record = bench_training(
        repeats=1,
        arms=["public", "fast"],
        text_mean=20,
        tiles=2,
        layers=1,
        micro_batch=2,
        dtype="bfloat16",
        device="cpu",
    )
    shape = record["settings"]["shape"]
    assert (shape["text_mean"], shape["tiles"], shape["layers"], shape["micro_batch"]) == (20, 2, 1, 2)
    assert shape["samples"] == 10
    assert shape["max_length"] == TINY.max_length + 49
    assert record["settings"]["dtype"] == "bfloat16"
    assert [row["name"] for row in record["results"]["rows"]] == ["public", "fast"]
    assert "over_floor" not in record["results"]["rows"][0]


def test_the_number_of_threads_is_given_back() -> None:
    before = torch.get_num_threads()
    record = bench_training(repeats=1, arms=["fast"], threads=before + 1, memory=False)
    assert record["results"]["memory"] == []
    assert torch.get_num_threads() == before


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"size": "toi"}, r"no size 'toi'.*toy"),
        ({"arms": ["publik"]}, r"no arm 'publik'.*public"),
        ({"curves": ["kep"]}, r"no curve 'kep'.*keep"),
        ({"curves": ["ranks"], "arms": ["public"]}, "arms must be with public_packed_kept, fast and slow"),
        ({"dtype": "int8"}, "dtype must be one of float32, bfloat16, float16"),
        ({"repeats": 0}, "repeats must be at least 1"),
        ({"threads": 0}, "threads must be at least 1"),
        ({"memory_gib": 0.0}, "memory_gib must be above 0"),
        ({"keep_ratio": 0.0}, "keep_ratio"),
        ({"micro_batch": 3, "samples": 10}, "samples must be a multiple of 3"),
    ],
)
def test_bad_settings_are_named(given: dict[str, Any], words: str) -> None:
    with pytest.raises(SettingError, match=words):
        bench_training(**given)


# command -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    def call(*arguments: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as ended:
            main(["bench", "training", *arguments])
        told = capsys.readouterr()
        return int(ended.value.code or 0), told.out, told.err

    return call


def test_the_command_prints_tables_and_writes_the_record(run: Callable[..., Any], tmp_path: Path) -> None:
    out = tmp_path / "record.json"
    code, told, _ = run("--steps", "1", "--arms", *FEW, "--out", str(out))
    assert code == 0
    for words in ("Time, toy", "DualSpeed as released", "Where the time goes", "Memory"):
        assert words in told
    assert read_record(out)["settings"]["arms"] == FEW


def test_with_json_the_command_prints_the_record_alone(run: Callable[..., Any]) -> None:
    code, told, _ = run("--json", "--repeats", "1", "--arms", "public", "--text-mean", "12")
    assert code == 0
    assert json.loads(told)["settings"]["shape"]["text_mean"] == 12.0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--sise", "toy"), "Did you mean 'size'"),
        (("--steps", "1", "--repeats", "2"), "--steps and --repeats are two names"),
        (("--tiles", "many"), "tiles"),
    ],
)
def test_a_wrong_command_says_so(run: Callable[..., Any], arguments: tuple[str, ...], words: str) -> None:
    code, _, error = run(*arguments)
    assert code == 2
    assert words in error


def test_out_belongs_to_training(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with pytest.raises(SystemExit):
        main(["bench", "pruners", "--out", str(tmp_path / "x.json")])
    assert "--out takes the record of `trimtab bench training`" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"attention": "paper_attention"}, "bench training.attention must be one that transformers has"),
        ({"device": "abacus"}, "bench training.device must be one that torch can use"),
        ({"device": "meta"}, "bench training.device must be cpu or cuda"),
        ({"micro_batch": 0}, "micro_batch must be a finite number above 0, but 0 came"),
        ({"pack_tokens": 50}, "bench training.pack_tokens must be at least 57"),
    ],
)
def test_what_no_machine_can_run_is_refused_with_words(given: dict[str, Any], named: str) -> None:
    with pytest.raises(SettingError, match=re.escape(named)):
        bench_training(layers=1, **given)
