"""`check` and `bench` on rows of text alone, rows that do not fit, bad rows, and settings that are off."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from tests.run.small_run import TOKENS, write_rows

from trimtab.cli.app import main
from trimtab.data import SupervisedCollator, load_rows
from trimtab.errors import DataError, SettingError
from trimtab.run import probe
from trimtab.run.bench import bench
from trimtab.run.check import check
from trimtab.run.config import RunConfig, training_arguments
from trimtab.run.load import image_counts, load_processor, load_rows_of, row_name
from trimtab.run.row_tokens import SAMPLE, RowTokens, choose_places, read_timed
from trimtab.run.train import train

Make = Callable[..., RunConfig]


def told(words: str = "which digit is shown?") -> str:
    """Return a row without image."""
    turns = [{"role": "user", "content": words}, {"role": "assistant", "content": "red"}]
    return json.dumps({"messages": turns})


def mixed(path: Path, order: Sequence[int]) -> Path:
    """Write rows with an image (1) and of text alone (0) in this order."""
    shown = iter(write_rows(path, count=max(1, sum(order))).read_text(encoding="utf-8").splitlines())
    path.write_text("\n".join(next(shown) if one else told() for one in order) + "\n", encoding="utf-8")
    return path


# rows without image -------------------------------------------------------------------------------------------------


def test_a_batch_of_one_is_timed_on_a_row_with_an_image(make_config: Make, tmp_path: Path) -> None:
    path = mixed(tmp_path / "rows.jsonl", [0, 1, 1, 1])
    results = check(make_config(data_files=[str(path)], per_device_train_batch_size=1), seconds=20)["results"]
    assert results["problems"] == []
    assert results["measured"]["rows"] == 1
    assert ", 1 row with images, " in results["summary"]["timed"]
    assert results["measured"]["steps"]["plain"]["tower"] > 0


def test_every_timed_row_has_an_image(make_config: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    batches: list[Any] = []
    measure = probe.measure
    spied = lambda model, batch, *rest: batches.append(batch) or measure(model, batch, *rest)  # noqa: E731, one line is enough
    monkeypatch.setattr(probe, "measure", spied)
    path = mixed(tmp_path / "rows.jsonl", [0, 1, 0, 1, 0])
    results = check(make_config(data_files=[str(path)], per_device_train_batch_size=4), seconds=20)["results"]
    (batch,) = batches
    assert results["measured"]["rows"] == len(batch["input_ids"]) == len(batch["pixel_values"]) == 4


def test_rows_with_images_are_found_behind_rows_of_text(make_config: Make, tmp_path: Path) -> None:
    path = mixed(tmp_path / "rows.jsonl", [0] * 9 + [1] * 3)
    results = check(make_config(data_files=[str(path)]), seconds=0)["results"]
    assert results["problems"] == []
    assert results["text_only"] == pytest.approx(0.75)
    assert results["summary"]["rows without image"] == "75%"
    assert results["lengths_tried"] == 7  # three rows with images, and half of eight of text alone
    assert results["summary"]["lengths tried"] == "on 7 rows"
    assert results["tokens_per_row"]["visual"] == pytest.approx(TOKENS / 4)
    assert results["tokens_per_row"]["kept"] == pytest.approx(TOKENS / 16)
    assert results["tokens_per_image"]["full"]["mean"] == TOKENS


def test_means_weigh_both_kinds_of_rows_by_their_shares() -> None:
    shown = {"images": 2, "text": 10, "visual": 100, "labels": 3, "pixels": 50, "seconds": 4.0}
    text = {"images": 0, "text": 30, "visual": 0, "labels": 7, "pixels": 0, "seconds": 1.0}
    found = RowTokens([shown, text, shown], text_only=0.75, full=[50.0], kept=[5.0], isolator=4.0)
    means = {"text": 25, "visual": 25, "labels": 6, "images": 0.5, "pixels": 12.5, "kept": 2.5, "isolator": 2}
    assert found.per_row() == pytest.approx(means)
    assert found.seconds_per_row == pytest.approx(0.25 * 4 + 0.75 * 1)
    unread = RowTokens([shown], text_only=0.75, full=[50.0], kept=[5.0])  # no row of text was reached in time
    assert unread.per_row() == pytest.approx({**means, "text": 10, "labels": 3, "isolator": 0})


def test_places_are_spread_over_the_rows_looked_at() -> None:
    assert choose_places(dict.fromkeys(range(5), 1)) == [0, 1, 2, 3, 4]
    places = choose_places(dict.fromkeys(range(100), 1))
    assert (places[0], places[-1], len(places)) == (0, 99, SAMPLE)
    assert all(13 <= after - before <= 15 for before, after in pairwise(places))
    few = choose_places({place: int(place == 60) for place in range(100)})
    assert few == [60, 0, 33, 66, 99]
    rare = choose_places({place: int(place != 60) for place in range(100)})
    assert rare[1] == 60
    assert len(rare) == SAMPLE


def test_images_are_counted_and_rows_are_named_over_several_files(make_config: Make, tmp_path: Path) -> None:
    files = [mixed(tmp_path / "one.jsonl", [0, 1, 1]), mixed(tmp_path / "two.jsonl", [1, 0])]
    rows = load_rows_of([str(file) for file in files], make_config())
    assert dict(image_counts(rows)) == {0: 0, 1: 1, 2: 1, 3: 1, 4: 0}
    assert dict(image_counts(rows, limit=1)) == {0: 0, 3: 1}
    assert row_name(rows, 2).endswith("one.jsonl, line 3")
    assert row_name(rows, 4).endswith("two.jsonl, line 2")


def test_bench_takes_rows_with_images(make_config: Make, tmp_path: Path) -> None:
    path = mixed(tmp_path / "rows.jsonl", [0, 0, 0, 1, 0, 1, 1])
    results = bench(make_config(data_files=[str(path)]), steps=1)["results"]
    assert results["rows"] == 2
    assert results["modes"][0]["visual_tokens"] == 2 * TOKENS
    path = mixed(tmp_path / "rows.jsonl", [0, 0])
    with pytest.raises(DataError, match=r"No row of .*rows\.jsonl holds an image"):
        bench(make_config(data_files=[str(path)]), steps=1)


# rows that do not fit -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("limit", "words"), [(TOKENS + 20, "No supervised token is left"), (30, "cut inside")])
def test_rows_that_max_length_breaks_are_problems(make_config: Make, tmp_path: Path, limit: int, words: str) -> None:
    path = write_rows(tmp_path / "rows.jsonl", count=12)
    lines = path.read_text(encoding="utf-8").splitlines()
    row = json.loads(lines[-1])
    row["messages"] = row["messages"][:2]
    row["messages"][0]["content"][1]["text"] = 40 * "which digit is shown? "
    path.write_text("\n".join([*lines[:-1], json.dumps(row)]) + "\n", encoding="utf-8")
    config = make_config(data_files=[str(path)], max_length=limit)
    results = check(config, seconds=0)["results"]
    found = [problem for problem in results["problems"] if problem["row"] == 12]
    (problem,) = found
    assert problem["kind"] == "length"
    assert "rows.jsonl, line 12" in problem["message"]
    assert "Row 12" not in problem["message"]  # the place stands there already
    assert words in problem["message"]
    assert "max_length" in problem["message"]
    assert "empty_labels" not in problem["message"]
    assert results["measured"] is results["prediction"] is None
    with pytest.raises(DataError, match="max_length"):
        train(config)  # what check said is what the training says


def test_a_row_whose_answers_are_empty_of_tokens_is_refused(make_config: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    config = make_config()
    rows = load_rows_of(config.data_files, config)
    collate = SupervisedCollator(load_processor(config.model_name_or_path), empty_labels="count")
    batch = collate([rows[0]])
    batch["labels"].fill_(-100)
    monkeypatch.setattr(SupervisedCollator, "__call__", lambda self, rows: batch)
    _, batches, refused = read_timed(collate, rows, [0], 1.0)
    assert list(batches) == [0]
    assert refused == {0: "No token of its answers is supervised. Correct the answers, or leave the row out."}


# bad rows -----------------------------------------------------------------------------------------------------------


def broken(tmp_path: Path) -> Path:
    path = write_rows(tmp_path / "rows.jsonl", count=4)
    path.write_text(path.read_text(encoding="utf-8") + "{\n", encoding="utf-8")
    (tmp_path / "rows-2.png").unlink()
    return path


def test_rows_that_training_skips_are_listed_and_the_rest_is_judged(make_config: Make, tmp_path: Path) -> None:
    config = make_config(data_files=[str(broken(tmp_path))], on_bad="skip")
    results = check(config, seconds=0)["results"]
    assert results["problems"] == []
    assert [problem["row"] for problem in results["skipped"]] == [3, 5]
    assert results["summary"]["rows that will be skipped"] == 2
    assert results["prediction"]["speedup"] > 0


def test_a_bad_row_that_was_not_looked_at_is_a_problem_too(make_config: Make, tmp_path: Path) -> None:
    config = make_config(data_files=[str(broken(tmp_path))])
    results = check(config, limit=1, seconds=0)["results"]
    (problem,) = results["problems"]
    assert (problem["row"], problem["kind"]) == (None, "load")
    assert "line 5 is not JSON" in problem["message"]
    assert "`on_bad: skip`" in results["advice"][0]
    assert results["summary"]["rows looked at"] == results["summary"]["problems"] == 1


def test_where_the_first_rows_are_all_skipped_those_behind_are_judged(make_config: Make, tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", count=4)
    (tmp_path / "rows-0.png").unlink()
    results = check(make_config(data_files=[str(path)], on_bad="skip"), limit=1, seconds=0)["results"]
    assert [problem["row"] for problem in results["skipped"]] == [1]
    assert results["lengths_tried"] == 3


def test_the_command_prints_each_place_once_and_the_remedy(
    make_config: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_config(data_files=[str(broken(tmp_path))])
    with pytest.raises(SystemExit) as ended:
        main(["check", str(tmp_path / "run.yaml"), "--seconds", "0"])
    assert ended.value.code == 2
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "line 5 is not JSON" in line]
    assert line.startswith(str(tmp_path / "rows.jsonl"))
    with pytest.raises(SystemExit) as ended:
        main(["check", str(tmp_path / "run.yaml"), "--seconds", "0", "--on_bad", "skip"])
    assert not ended.value.code
    assert "will be skipped: " in capsys.readouterr().out


def test_stopping_at_bad_rows_names_the_setting_that_skips_them(make_config: Make, tmp_path: Path) -> None:
    config = make_config(data_files=[str(broken(tmp_path))])
    assert "`on_bad: skip`" in check(config, seconds=0)["results"]["advice"][0]
    path = write_rows(tmp_path / "good.jsonl", count=2)
    assert not any(
        "on_bad" in one for one in check(make_config(data_files=[str(path)]), seconds=0)["results"]["advice"]
    )
    assert len(load_rows(path)) == 2


# settings -----------------------------------------------------------------------------------------------------------


def test_a_run_without_dualspeed_is_judged_by_the_defaults_and_told_so(make_config: Make) -> None:
    results = check(make_config(dualspeed=False), seconds=0)["results"]
    assert "default settings of DualSpeed" in results["summary"]["settings"]
    assert results["tokens_per_image"]["kept"]["mean"] == TOKENS // 10
    assert "settings" not in check(make_config(), seconds=0)["results"]["summary"]


@pytest.mark.parametrize("verb", [train, check, bench, training_arguments])
def test_a_batch_without_rows_is_refused(make_config: Make, verb: Callable[[RunConfig], Any]) -> None:
    with pytest.raises(SettingError, match="per_device_train_batch_size must be at least 1, but 0 came"):
        verb(make_config(per_device_train_batch_size=0))


def test_without_timing_the_counts_give_the_advice(make_config: Make) -> None:
    results = check(make_config(dualspeed={"keep_ratio": 0.9, "slow_ratio": 0.1}), seconds=0)["results"]
    assert results["measured"] is None
    said = " ".join(results["advice"])
    assert "of the visual tokens, isolator included" in said
    assert "The gain to expect is below 1.2" in said or "slower than plain training" in said


def test_too_little_time_for_a_step_names_the_seconds_that_would_do(
    make_config: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trimtab.run.probe.matmul_speed", lambda *_: 1e4)  # a very slow machine
    reason = check(make_config(), seconds=3)["results"]["not_measured"]
    assert "of --seconds are left; --seconds " in reason
    need = float(reason.split(" takes about ")[1].split(" s ")[0])
    assert int(reason.split("--seconds ")[-1].split(" ")[0]) > need
