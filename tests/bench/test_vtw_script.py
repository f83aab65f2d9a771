"""`bench/vtw.py`: the cells of a GPU's table at toy size, the layers it counts, and what it measures against."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from bench import vtw as script
from trimtab.methods.vtw import withdraw
from trimtab.methods.vtw.cost import search_evaluations
from trimtab.records import read_record


def test_the_real_cells_run_at_toy_size(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wanted = ["--only", "7b_576_8_sdpa", "13b_2880_1_flash"]
    command = ["--size", "real", "--small", "--repeats", "1", "--records", str(tmp_path), *wanted]
    assert script.main(command) == 0
    capsys.readouterr()
    made = {path.stem: read_record(path) for path in tmp_path.glob("*.json")}
    assert set(made) == {"vtw_7b_576_8_sdpa", "vtw_13b_2880_1_flash"}
    for record in made.values():
        rows, settings = record["results"]["rows"], record["settings"]
        assert [row["layer"] for row in rows] == [*settings["withdrawals"], settings["shape"]["layers"]]
        assert rows[-1]["share"] == rows[-1]["flops_share"] == 1
        assert [row["flops_share"] for row in rows] == sorted(row["flops_share"] for row in rows)
        assert all(row["kv_bytes"] == row["kv_bytes_told"] > 0 for row in rows)
        assert all(row["seconds"] > 0 < row["decode_seconds"] for row in rows)
    assert script.main(command) == 0
    assert capsys.readouterr().out == "", "a record that exists is kept"
    assert script.main(["--table", "--records", str(tmp_path)]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 2 + sum(len(made[n]["results"]["rows"]) for n in made)


def test_the_cells_are_those_of_the_plan() -> None:
    cells = script.cells("real")
    assert len({cell.name for cell in cells}) == len(cells) == 2 * 2 * 3 * 2
    assert {cell.places for cell in cells} == {35 + 576 + 60, 35 + 2880 + 60}
    assert {cell.batch for cell in cells} == {1, 8, 32}
    seven = next(cell for cell in cells if cell.shape.layers == 32)
    assert (*seven.withdrawals, seven.shape.layers) == (8, 12, 16, 24, 32)
    parameters = {cell.shape.layers: _weights(cell.shape) for cell in cells}
    assert parameters == {32: pytest.approx(6.5e9, rel=0.02), 40: pytest.approx(12.7e9, rel=0.02)}


def _weights(shape: script.LlamaShape) -> int:
    return shape.layers * (4 * shape.width**2 + 3 * shape.width * shape.mlp)


def test_a_cell_that_does_not_fit_is_recorded_as_that(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def burst(*args: object) -> None:
        raise torch.cuda.OutOfMemoryError("Tried to allocate 90 GiB. More words.")

    monkeypatch.setattr(script, "_cell_results", burst)
    record = script.bench_cell(script.cells("toy")[0], torch.device("cpu"), 1)
    assert record["results"] == {"rows": [], "out_of_memory": "Tried to allocate 90 GiB"}
    assert script.table([record])[-1].count("out of memory") == 1


def test_real_cells_without_a_gpu_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert script.main(["--size", "real", "--records", str(tmp_path)]) == 2
    assert "--size real needs a GPU" in capsys.readouterr().err
    assert script.main(["--size", "toy", "--small"]) == 2
    assert "--small makes no records to keep" in capsys.readouterr().err
    assert script.main(["--size", "toy", "--only", "8b", "--records", str(tmp_path)]) == 2
    assert "--only must name some of toy, but '8b' came" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_layers_are_counted_as_they_run() -> None:
    cell = script.cells("toy")[0]
    model = script.build_llama(cell.shape, "sdpa", torch.device("cpu"), torch.float32)
    inputs, mask = script.prompts_of(cell, torch.device("cpu"))
    assert int(mask.sum()) == cell.batch * cell.visual
    places = cell.batch * cell.places
    share = sum(cell.text) / cell.places
    assert script.count_layers(model, places, lambda: script.prefill(model, inputs)) == cell.shape.layers
    with withdraw(model, 1, visual_mask=mask):
        counted = script.count_layers(model, places, lambda: script.prefill(model, inputs))
    assert counted == pytest.approx(1 + (cell.shape.layers - 1) * share)
    told = script.count_search(model, [{**inputs, "visual_mask": mask}])
    ours, naive = search_evaluations(cell.shape.layers, told["layers"], share)
    assert told["evaluations"] == {"naive": pytest.approx(naive), "one_pass": pytest.approx(ours),
                                   "stacked": pytest.approx(ours)}  # fmt: skip
    assert max(told["apart_from_naive"].values()) < 1e-5


def test_the_naive_curve_is_not_zero_and_reads_the_place_before_the_answer() -> None:
    cell = script.cells("toy")[0]
    model = script.build_llama(cell.shape, "sdpa", torch.device("cpu"), torch.float32)
    inputs, mask = script.prompts_of(cell, torch.device("cpu"))
    batch = {**inputs, "visual_mask": mask}
    curve = script.naive_curve(model, [batch], [0, 1, cell.shape.layers])
    assert curve[0] > 0
    assert curve[2] == 0
    labels = torch.full_like(inputs["input_ids"], -100)
    labels[:, -2:] = 5
    longer = script.naive_curve(model, [{**batch, "labels": labels}], [1])
    cut = {name: value[:, :-2] for name, value in batch.items()}
    assert longer == pytest.approx(script.naive_curve(model, [cut], [1]), rel=1e-4)
    assert longer != curve[1:2]
