"""The withdrawal experiment at toy size: its records, its tables, and what its ways really compute."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from bench.vtw import count_layers, naive_curve
from experiments.vtw import measure, page, run, ways
from tests.quickstart.small import SIZES, small_task

from trimtab.dualspeed import DualSpeedConfig, attach
from trimtab.evaluate.prompts import prompts_of_rows
from trimtab.methods.vtw.cost import TextShape, read_text_shape
from trimtab.methods.vtw.search import search_withdrawal_layer
from trimtab.quickstart.model import build_model, build_processor, collect_words
from trimtab.quickstart.task import Task, open_start
from trimtab.records import read_record

DEPTH = 6
SHAPE = TextShape(layers=12, width=128, heads=4, kv_heads=4, head_width=32, mlp_width=256, gated=True)


@pytest.fixture(scope="module")
def task() -> Task:
    return small_task()


@pytest.fixture(scope="module")
def folder(task: Task, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of six layers with the isolator of a DualSpeed run, where the experiment looks for it."""
    work = tmp_path_factory.mktemp("work")
    place = work / f"layers-{DEPTH}" / "scenes" / "seed-0" / "arms" / "dualspeed" / "model"
    sizes = replace(SIZES, layers=DEPTH)
    processor = build_processor(sizes, collect_words([*task.train, *task.test]))
    model = build_model(sizes, processor.tokenizer)
    handle = attach(model, DualSpeedConfig(keep_ratio=0.25, isolator_tokens=2))
    handle.save_pretrained(place)
    handle.detach()
    model.save_pretrained(place)
    processor.save_pretrained(place)
    return place


@pytest.fixture(scope="module")
def opened(folder: Path) -> tuple[Any, Any]:
    model, processor = open_start(folder)
    return model.eval(), processor


@pytest.fixture
def command(folder: Path, task: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setattr("trimtab.quickstart.tasks.open_task", lambda *args: task)
    words = ["--layers", str(DEPTH), "--seeds", "0", "--images", "3", "--curve-images", "2", "--samples", "3"]
    return [*words, "--again", "1", "--work", str(folder.parents[5]), "--records", str(tmp_path)]


def test_the_experiment_runs_at_toy_size(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run.main(command) == 0
    place = tmp_path / f"layers-{DEPTH}" / "scenes" / "seed-0"
    found = {path.stem: read_record(path) for path in place.glob("*.json")}
    assert set(found) == {"dualspeed_search", "dualspeed_accuracy"}
    searched, judged = (found[f"dualspeed_{kind}"]["results"] for kind in ("search", "accuracy"))
    for criterion in ("last_token", "answer"):
        curve = searched[criterion]["curve"]
        assert [point["layer"] for point in curve] == list(range(DEPTH + 1))
        assert curve[-1]["mean"] == 0 < curve[0]["mean"]
        assert set(searched[criterion]["layers"]) == {"0.01", "0.003", "0.001", "0.0001"}
    assert len(searched["again"]) == 1
    counts = searched["cost"]["evaluations"]
    assert counts["one_pass"] == counts["stacked"] < counts["naive"] / 2
    names = {one["name"]: one for one in judged["ways"]}
    assert {f"vtw_{layer}" for layer in range(DEPTH + 1)} <= set(names)
    assert {"fastv", "pyramid_drop", "divprune_as_fastv", "random_tokens_as_vtw_2"} <= set(names)
    assert names[f"vtw_{DEPTH}"]["flops_share"] == 1
    assert (
        len(names["vtw_2"]["marks"]) == judged["questions"] > judged["curve_questions"] == len(names["vtw_0"]["marks"])
    )
    assert "vtw_0" in capsys.readouterr().out

    assert run.main(command) == 0
    assert capsys.readouterr().out == "", "records that exist are kept"

    monkeypatch.setattr(page, "DEPTHS", (DEPTH,))
    monkeypatch.setattr(page, "read", lambda kind, arm=page.ARM: (found[f"dualspeed_{kind}"],))
    monkeypatch.setattr(page, "time_record", lambda name: None)
    lines = {make.__name__: make() for make in page.MAKERS}
    assert len(lines["vtw_curve"]) == 2 + DEPTH + 1
    assert len(lines["vtw_chosen"]) == 2 + 2 * 4
    assert lines["vtw_curve"][-1].split("|")[2:5] == [f" {DEPTH} ", " 0 ", " 0 "]
    for table in lines.values():
        assert len({line.count("|") for line in table}) == 1, table
    assert len(page.charts()) == 2


def test_times_are_measured_at_toy_size(command: list[str], tmp_path: Path) -> None:
    assert run.main([*command, "--time", "--small", "--repeats", "1"]) == 0
    made = {path.stem: read_record(path)["results"] for path in (tmp_path / "time").glob("*.json")}
    assert set(made) == {
        f"layers-{DEPTH}_batch-1", f"layers-{DEPTH}_batch-16", f"layers-{DEPTH}_search", "wide_576_1", "wide_576_16"
    }  # fmt: skip
    assert all(row["kv_bytes"] == row["kv_bytes_told"] for row in made[f"layers-{DEPTH}_batch-16"]["rows"])
    assert set(made[f"layers-{DEPTH}_search"]["times"]) == {"naive", "one_pass", "stacked"}


def test_a_checkpoint_that_is_not_there_is_told_how_to_be_made(
    command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run.main([*command, "--arm", "full"]) == 2
    told = capsys.readouterr().err
    assert "There is no checkpoint layers-6/scenes/seed-0/arms/full" in told
    assert "experiments/dualspeed/run.py --task scenes --seeds 0 --arms full --layers 6 --keep-models" in told


def test_every_way_runs_the_layers_that_its_cost_says(folder: Path, task: Task, opened: tuple[Any, Any]) -> None:
    model, processor = opened
    inputs = measure.prompts_alone(processor, task.train, 1)
    places = inputs["input_ids"].shape[1]
    prompts = ways.Prompts({places: 1}, SIZES.visual_tokens)
    compared = ways.all_ways(read_text_shape(model), prompts, 4, isolator_tokens=2)
    kinds = {way.kind for way in compared}
    assert kinds == {"withdraw", "random_tokens", "random_tokens_spared", "fastv", "pyramid_drop", "divprune", "random"}
    for way in compared:
        with ways.applied(way, model, folder, prompts.visual), torch.no_grad():
            ran = count_layers(model, places, lambda: model(**inputs))
        assert ran / DEPTH == pytest.approx(way.kv_share(read_text_shape(model), prompts)), way.name


def test_fitted_ways_come_near_and_a_withdrawal_is_never_given_more() -> None:
    prompts = ways.Prompts({265: 3, 271: 1}, 256)
    assert prompts.places == 266.5
    compared = {way.name: way for way in ways.all_ways(SHAPE, prompts, 7, isolator_tokens=4)}
    cost = {name: way.flops_share(SHAPE, prompts) for name, way in compared.items()}
    for name, way in compared.items():
        if way.equal_to:
            assert cost[name] == pytest.approx(cost[way.equal_to], abs=0.005), name
    assert cost["vtw_12"] == 1
    assert ways.nearest_withdrawal(cost["fastv"], SHAPE, prompts).settings["layer"] == 6
    for target in (cost["fastv"], 0.9999, 0.5):
        near = ways.nearest_withdrawal(target, SHAPE, prompts)
        after = ways.withdrawal(near.settings["layer"] + 1)
        assert near.flops_share(SHAPE, prompts) <= target < after.flops_share(SHAPE, prompts)
    without = {way.name for way in ways.all_ways(SHAPE, prompts, 12, isolator_tokens=0)}
    assert set(compared) - without == {name for name in compared if name.endswith("vtw_7")}, "no layer, no group"


def test_the_share_of_a_withdrawal_is_the_formula() -> None:
    prompts = ways.Prompts({671: 1}, 576)
    llava = TextShape(layers=32, width=4096, heads=32, kv_heads=32, head_width=128, mlp_width=11008, gated=False)
    assert 1 - ways.withdrawal(16).flops_share(llava, prompts) == pytest.approx(0.431, abs=5e-4)
    assert 1 - ways.withdrawal(16).kv_share(llava, prompts) == pytest.approx(16 * 576 / (32 * 671))


def test_prompts_are_as_long_as_the_processor_makes_them(task: Task, opened: tuple[Any, Any]) -> None:
    _, processor = opened
    counted = ways.read_prompts(processor, task.test.texts(), SIZES.visual_tokens)
    lengths: dict[int, int] = {}
    for prompt in prompts_of_rows(task.test):
        text = processor.apply_chat_template(prompt.messages, add_generation_prompt=True, tokenize=False)
        length = processor(text=text, images=list(prompt.images), return_tensors="pt")["input_ids"].shape[1]
        lengths[length] = lengths.get(length, 0) + 1
    assert dict(counted.lengths) == lengths


def test_the_search_finds_what_the_whole_model_gives_layer_by_layer(task: Task, opened: tuple[Any, Any]) -> None:
    model, processor = opened
    batches = measure.search_batches(processor, task.train, 0, 5)
    assert all(((batch["labels"] != -100).sum(1) > 0).all() for batch in batches)
    report = search_withdrawal_layer(model, batches, threshold=1e6)
    ours = [point.mean for point in report.curve]
    assert ours == pytest.approx(naive_curve(model, batches, range(DEPTH + 1)), abs=1e-7)


def test_a_random_layer_is_the_mean_over_its_layers_and_its_draws_spread_around_it() -> None:
    def one(layer: int, marks: str) -> dict[str, Any]:
        return {"name": f"vtw_{layer}", "marks": marks, "flops_share": layer / 4}

    results = {
        "depth": 4,
        "curve_questions": 4,
        "ways": [one(1, "00000"), one(2, "11001"), one(3, "11111"), one(4, "1")],
    }
    accuracy, spread, cost = page.random_layer(results)
    assert accuracy == pytest.approx((0 + 2 + 4) / 12)
    assert cost == pytest.approx(0.5)
    # Two questions are right at two layers of three, two at one of three.
    assert spread == pytest.approx(math.sqrt(4 * (2 / 9)) / 4, rel=0.1)
