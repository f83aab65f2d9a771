"""Pictures of the user's own images: written by train and eval of a DualSpeed run, and never in the way of them."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tests.run.small_run import TOKENS

from trimtab.data import load_rows
from trimtab.dualspeed import DualSpeedConfig
from trimtab.errors import DataError
from trimtab.records import read_record
from trimtab.run import pictures
from trimtab.run.config import RunConfig
from trimtab.run.evaluate import evaluate
from trimtab.run.load import load_rows_of, load_trained
from trimtab.run.pictures import LONGEST_CAPTION, PICTURES, PICTURES_FILE, draw_pictures, examples
from trimtab.run.train import train

Make = Callable[..., RunConfig]


def entries_of(directory: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = read_record(directory / PICTURES_FILE)["results"]["pictures"]
    return found


def write_row(folder: Path, name: str, question: str = "what is it ?") -> Path:
    Image.new("RGB", (40, 30), (200, 40, 40)).save(folder / name, format="PNG")
    turns = [{"role": "user", "content": f"<image>{question}"}, {"role": "assistant", "content": "red"}]
    path = folder / "rows.jsonl"
    path.write_text(json.dumps({"messages": turns, "images": [name]}) + "\n", encoding="utf-8")
    return path


def test_training_draws_the_images_that_it_is_judged_on(trained: Path) -> None:
    record = read_record(trained / PICTURES_FILE)
    assert record["kind"] == "pictures"
    assert record["settings"]["dualspeed"]["keep_ratio"] == 0.25
    assert record["results"]["arm"] == "dualspeed"
    assert record["results"]["dataset"] == "test"
    found = entries_of(trained)
    assert len(found) == 4  # as many rows as test.jsonl has
    for number, entry in enumerate(found):
        assert entry["caption"].startswith(f"test-{number}.png: ")
        assert (entry["tokens"], entry["kept_count"]) == (TOKENS, TOKENS // 4)
        assert entry["parts"][0]["grid"] == [8, 8]
        assert len(entry["parts"][0]["kept"]) == TOKENS // 4
        picture = Image.open(io.BytesIO(base64.b64decode(entry["image"])))
        assert picture.size == (entry["width"], entry["height"])


def test_the_kept_tokens_are_those_of_the_trained_model(trained: Path, make_config: Make) -> None:
    config = make_config()
    model, processor = load_trained(trained, config)
    row = load_rows(config.eval_files[0])[0]
    question = row["messages"][0]["content"][1]["text"]
    look = pictures.ImageLook(model, processor, row["images"][0], question)
    wanted = look.choose(config.dualspeed).parts[0].kept  # type: ignore[arg-type]
    assert tuple(entries_of(trained)[0]["parts"][0]["kept"]) == wanted


def test_without_eval_files_training_draws_what_it_was_trained_on(make_config: Make, tmp_path: Path) -> None:
    train(make_config(eval_files=[], max_steps=1))
    found = entries_of(tmp_path / "out")
    assert len(found) == PICTURES
    assert found[0]["caption"].startswith("train-0.png: ")


def test_plain_training_draws_nothing(make_config: Make, tmp_path: Path) -> None:
    config = make_config(dualspeed=False, max_steps=1)
    train(config)
    evaluate(config, limit=1)
    assert not (tmp_path / "out" / PICTURES_FILE).exists()


def test_evaluation_of_plain_training_draws_nothing_whatever_the_run_file_says(
    make_config: Make, tmp_path: Path
) -> None:
    train(make_config(dualspeed=False, max_steps=1))
    evaluate(make_config(), tmp_path / "out", limit=1)
    assert not (tmp_path / "out" / PICTURES_FILE).exists()


def test_evaluation_draws_with_the_settings_of_the_training(trained_copy: Path, make_config: Make) -> None:
    before = entries_of(trained_copy)
    (trained_copy / PICTURES_FILE).unlink()
    evaluate(make_config(dualspeed={"keep_ratio": 0.5}), trained_copy, limit=1)
    assert entries_of(trained_copy) == before


# failure is a line of warning ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [RuntimeError("CUDA out of memory"), DataError("no such image")])
def test_a_picture_that_fails_does_not_end_the_training(
    make_config: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
    error: Exception,
) -> None:  # fmt: skip
    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(pictures, "ImageLook", fail)
    assert train(make_config(max_steps=1))["results"]["steps"] == 1
    assert not (tmp_path / "out" / PICTURES_FILE).exists()
    told = [one.getMessage() for one in caplog.records if "pictures" in one.getMessage().lower()]
    assert told == [f"No pictures of kept tokens were drawn ({type(error).__name__}: {error})."]


def test_eval_files_that_vanished_do_not_end_the_training(
    make_config: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    gone = tmp_path / "gone.jsonl"
    assert train(make_config(eval_files=[str(gone)], max_steps=1))["results"]["steps"] == 1
    assert any("gone.jsonl" in one.getMessage() for one in caplog.records)


def test_a_model_on_several_processes_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model = torch.nn.Linear(2, 2)
    model.weight.ds_id = 0  # type: ignore[assignment] # as ZeRO-3 marks a parameter
    draw_pictures(tmp_path, model, None, DualSpeedConfig(), lambda: pytest.fail("it was drawn"))
    assert any("several processes" in one.getMessage() for one in caplog.records)
    assert list(tmp_path.iterdir()) == []


# captions -----------------------------------------------------------------------------------------------------------


def test_a_hostile_name_is_kept_as_it_is(trained: Path, make_config: Make, tmp_path: Path) -> None:
    name = "<img src=x onerror=alert(1)>.png"
    rows = load_rows(write_row(tmp_path, name, '<script>alert("q")</script>'))
    config = make_config()
    model, processor = load_trained(trained, config)
    assert config.dualspeed is not None
    draw_pictures(tmp_path, model, processor, config.dualspeed, lambda: rows)
    assert entries_of(tmp_path)[0]["caption"] == f'{name}: <script>alert("q")</script>'


def test_folders_do_not_enter_captions(tmp_path: Path) -> None:
    (tmp_path / "private").mkdir()
    path = write_row(tmp_path, "private/a.png")
    assert next(examples(load_rows(path))).name == "a.png"


def test_an_image_without_a_file_is_named_by_its_row(tmp_path: Path) -> None:
    path = write_row(tmp_path, "a.png")
    row = json.loads(path.read_text(encoding="utf-8"))
    row["images"] = ["data:image/png;base64," + base64.b64encode((tmp_path / "a.png").read_bytes()).decode()]
    path.write_text(json.dumps(row) + "\n", encoding="utf-8")
    assert next(examples(load_rows(path))).name == "line 1"


def test_long_questions_are_cut(tmp_path: Path) -> None:
    caption = next(examples(load_rows(write_row(tmp_path, "a.png", "why " * 200)))).caption
    assert len(caption) == LONGEST_CAPTION
    assert caption.endswith("…")


def test_rows_without_images_are_passed_over(make_config: Make, tmp_path: Path) -> None:
    path = write_row(tmp_path, "a.png")
    plain = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hi"}]}
    path.write_text(json.dumps(plain) + "\n" + path.read_text(encoding="utf-8"), encoding="utf-8")
    joined = load_rows_of([str(path), str(path)], make_config())
    assert [one.name for one in examples(joined)] == ["a.png", "a.png"]
