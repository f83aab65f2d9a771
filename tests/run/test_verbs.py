"""`evaluate` and `bench`: what their records say."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from tests.run.small_run import TOKENS, settings

from trimtab.cli.app import main
from trimtab.errors import SettingError
from trimtab.records import check_record, read_record
from trimtab.report import render_report
from trimtab.run.bench import Bench, bench
from trimtab.run.config import RunConfig, build_config
from trimtab.run.evaluate import evaluate

Make = Callable[..., RunConfig]


def test_evaluation_on_full_and_pruned_tokens(trained_copy: Path, small_run: Path) -> None:
    config = build_config({**settings(small_run), "output_dir": str(trained_copy)})
    record = evaluate(config, pruned=True, max_new_tokens=4)
    assert record["results"].keys() == {"full", "pruned"}
    assert record["results"]["full"]["number"] == record["results"]["pruned"]["number"] == 8
    assert read_record(trained_copy / "records" / "eval.json") == record
    arm = read_record(trained_copy / "records" / "arm.json")
    assert arm["results"]["accuracy_full"] == record["results"]["full"]
    assert arm["results"]["dataset"] == "test"
    page = render_report(trained_copy, trained_copy / "report.html").read_text(encoding="utf-8")
    assert "DualSpeed" in page


def test_evaluation_asks_the_first_rows_only(trained_copy: Path, small_run: Path) -> None:
    config = build_config({**settings(small_run), "output_dir": str(trained_copy)})
    assert evaluate(config, limit=1, max_new_tokens=2)["results"]["full"]["number"] == 2


def test_evaluation_needs_files_and_a_model(make_config: Make, tmp_path: Path) -> None:
    with pytest.raises(SettingError, match="eval needs eval_files"):
        evaluate(make_config(eval_files=[]))
    with pytest.raises(SettingError, match="There is no directory"):
        evaluate(make_config(), tmp_path / "absent")


def test_bench_measures_every_mode(make_config: Make) -> None:
    record = check_record(bench(make_config(), steps=2))
    modes = {row["mode"]: row for row in record["results"]["modes"]}
    assert list(modes) == ["plain", "fast", "slow"]
    assert modes["plain"]["visual_tokens"] == modes["slow"]["visual_tokens"] == 2 * TOKENS
    assert modes["fast"]["visual_tokens"] == 2 * (TOKENS // 4)
    assert modes["plain"]["tokens"] - modes["fast"]["tokens"] == 2 * (TOKENS - TOKENS // 4)
    assert modes["plain"]["ratio"] == 1
    assert all(row["seconds"] > 0 and row["peak_mib"] > 0 for row in modes.values())
    assert record["results"]["rows"] == 2
    assert record["settings"]["steps"] == 2


def test_benching_moves_no_weight_and_leaves_the_model_bare(make_config: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from trimtab.run import bench as module

    kept: list[tuple[Bench, dict[str, torch.Tensor]]] = []

    class Kept(Bench):
        def __init__(self, model: torch.nn.Module, *rest: object) -> None:
            super().__init__(model, *rest)  # type: ignore[arg-type]  # passed on as they came
            kept.append((self, {name: value.clone() for name, value in model.state_dict().items()}))

    monkeypatch.setattr(module, "Bench", Kept)
    bench(make_config(), steps=1)
    parts, before = kept[0]
    assert parts.handle is None
    assert all(torch.equal(before[name], value) for name, value in parts.model.state_dict().items())


def test_an_annealed_schedule_needs_no_length_where_nothing_is_scheduled(
    make_config: Make, trained_copy: Path, small_run: Path
) -> None:
    block = {**settings(small_run)["dualspeed"], "schedule": "annealed"}
    config = build_config({**settings(small_run), "output_dir": str(trained_copy), "dualspeed": block})
    assert "pruned" in evaluate(config, pruned=True, max_new_tokens=1)["results"]
    assert bench(make_config(dualspeed=block), steps=1)["settings"]["dualspeed"]["schedule"] == "annealed"


def test_the_command_calls_a_slower_run_slower(
    make_config: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made = {"results": {"modes": [], "dualspeed_speedup": 0.76}}
    monkeypatch.setattr("trimtab.run.bench.bench", lambda *_, **__: made)
    make_config()
    with pytest.raises(SystemExit) as ended:
        main(["bench", str(tmp_path / "run.yaml")])
    assert not ended.value.code
    assert "DualSpeed as set: 1.32 times slower per step than plain training." in capsys.readouterr().out


def test_bench_without_the_block_measures_the_defaults(make_config: Make) -> None:
    record = bench(make_config(dualspeed=False), steps=1)
    assert record["settings"]["dualspeed"]["keep_ratio"] == 0.1
