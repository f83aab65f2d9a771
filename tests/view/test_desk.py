"""Looking through a model, and asking it."""

from __future__ import annotations

import dataclasses
import inspect
import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from tests.run.small_run import TOKENS, write_model
from trimtab.dualspeed import DualSpeedConfig, attach
from trimtab.errors import SettingError
from trimtab.evaluate import exact_match
from trimtab.view.desk import READS, Desk, load
from trimtab.view.uploads import keep_image

QUESTION = "which digit is red ?"
READING = "dpp, reading the question"


@pytest.fixture(autouse=True)
def _short_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trimtab.view.desk.MAX_NEW_TOKENS", 4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with the side files of its training."""
    folder = write_model(tmp_path_factory.mktemp("desk") / "model")
    model = load(str(folder)).model
    handle = attach(model, DualSpeedConfig(keep_ratio=0.25, isolator_tokens=2))
    handle.save_pretrained(folder / "dualspeed")
    return folder


@pytest.fixture(scope="module")
def desk(folder: Path) -> Desk:
    return Desk(load(str(folder)))


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    Image.effect_noise((32, 32), 60).convert("RGB").save(folder / "a.png")
    return keep_image((folder / "a.png").read_bytes(), "a.png", folder)


def count_tower_runs(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    runs: list[int] = []
    stock = Desk._open

    def counted(self: Desk, *args: Any) -> Any:
        runs.append(1)
        return stock(self, *args)

    monkeypatch.setattr(Desk, "_open", counted)
    desk._looks.clear()
    return runs


def test_every_pruner_is_offered_and_those_that_read_twice(desk: Desk) -> None:
    from trimtab.pruners import pruner_names

    assert [choice.pruner for choice in desk.choices if not choice.reads] == pruner_names()
    reading = [choice for choice in desk.choices if choice.reads]
    assert [choice.label for choice in reading] == [READING]
    assert reading[0].options == {READS: True}
    assert all(choice.reason is None for choice in desk.choices)


def test_loading_draws_no_bar_into_a_pipe(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from transformers.utils import logging

    before = logging.is_progress_bar_enabled()
    logging.enable_progress_bar()
    try:
        load(str(folder))
        assert logging.is_progress_bar_enabled(), "put back"
    finally:
        if not before:
            logging.disable_progress_bar()
    assert "Loading weights" not in capsys.readouterr().err


def test_without_a_model_the_reasons_are_given() -> None:
    reasons = {choice.label: choice.reason for choice in Desk().choices}
    assert reasons["divprune"] is None
    assert "class-token attention" in str(reasons["cls_topk"])
    assert "words of a question" in str(reasons[READING])


def test_the_tower_runs_once_per_image(desk: Desk, image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = count_tower_runs(desk, monkeypatch)
    counts = {}
    for label in ("divprune", "random", "cls_topk", "divprune"):
        for ratio in (0.1, 0.5):
            counts[ratio] = desk.select(image, label, ratio, QUESTION).kept_count
    assert len(runs) == 1
    assert counts == {0.1: round(0.1 * TOKENS), 0.5: TOKENS // 2}
    desk.select(image, READING, 0.1, QUESTION)
    desk.select(image, READING, 0.2, QUESTION)
    assert len(runs) == 2  # once more, for the words


def test_a_few_images_are_remembered(desk: Desk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = count_tower_runs(desk, monkeypatch)
    paths = []
    for shade in range(6):
        Image.new("RGB", (32, 32), (shade, 0, 0)).save(tmp_path / "a.png")
        paths.append(keep_image((tmp_path / "a.png").read_bytes(), "a.png", tmp_path))
    for path in [*paths, paths[-1], paths[0]]:
        desk.select(path, "random", 0.5)
    assert len(runs) == 7


@pytest.mark.parametrize(
    ("label", "ratio", "question", "words"),
    [
        ("nonsense", 0.5, "", "no pruner 'nonsense'"),
        ("divprune", 0.0, "", "keep_ratio must be"),
        ("divprune", 1.5, "", "keep_ratio must be"),
        (READING, 0.5, "  ", "there is none. Write one"),
    ],
)
def test_what_cannot_be_selected_is_told(
    desk: Desk, image: Path, label: str, ratio: float, question: str, words: str
) -> None:
    with pytest.raises(SettingError, match=words):
        desk.select(image, label, ratio, question)


def test_answers_are_those_of_the_model(desk: Desk, image: Path, folder: Path) -> None:
    found = desk.answers(image, ["divprune", READING, "keep_all"], 0.5, QUESTION)
    assert [one.label for one in found] == ["all tokens", "divprune", READING, "keep_all"]
    assert found[0].tokens == TOKENS
    row = {"image": Image.open(image).convert("RGB"), "questions": [QUESTION], "answers": [""]}
    trained = load(str(folder))
    plain = exact_match(trained.model, trained.processor, [row], max_new_tokens=4, predictions=True)
    assert found[0].text == plain["predictions"][0]
    assert [one.tokens for one in found[1:3]] == [TOKENS // 2, TOKENS // 2]
    assert all(one.seconds is not None and one.seconds > 0 for one in found[:3])
    assert found[3].seconds is None
    assert "isolator" in found[3].text
    assert "generate" not in vars(desk.trained.model)  # type: ignore[union-attr]


def test_an_export_without_side_files_has_no_isolator(folder: Path, image: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "bare", ignore=shutil.ignore_patterns("dualspeed"))
    found = Desk(load(str(tmp_path / "bare"))).answers(image, ["random", "keep_all"], 0.5, QUESTION)
    assert [one.tokens for one in found] == [TOKENS, TOKENS // 2, TOKENS]
    assert found[2].text == found[0].text


def test_settings_of_the_training_are_used(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "other")
    side = tmp_path / "other" / "dualspeed" / "dualspeed.json"
    told = json.loads(side.read_text())
    told["config"]["keep_rule"] = "ceil"
    side.write_text(json.dumps(told))
    assert load(str(tmp_path / "other")).settings.keep_rule == "ceil"


@pytest.mark.parametrize(("model", "question", "words"), [(False, QUESTION, "--model"), (True, " ", "Write one")])
def test_what_cannot_be_asked_is_told(desk: Desk, image: Path, model: bool, question: str, words: str) -> None:
    with pytest.raises(SettingError, match=words):
        (desk if model else Desk()).answers(image, ["divprune"], 0.5, question)


def test_a_model_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(SettingError, match="holds no model"):
        load(str(tmp_path))


def test_one_call_of_the_model_at_a_time(desk: Desk, image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inside, most = [0], [0]
    assert desk.trained is not None
    stock = desk.trained.model.forward

    def counted(*args: Any, **kwargs: Any) -> Any:
        inside[0] += 1
        most[0] = max(most[0], inside[0])
        torch.randn(300, 300) @ torch.randn(300, 300)
        made = stock(*args, **kwargs)
        inside[0] -= 1
        return made

    before = [dataclasses.replace(one, seconds=None) for one in desk.answers(image, ["divprune"], 0.5, QUESTION)]
    counted.__signature__ = inspect.signature(stock)  # type: ignore[attr-defined]  # generate looks at it
    monkeypatch.setattr(desk.trained.model, "forward", counted)
    with ThreadPoolExecutor(3) as threads:
        asked = [threads.submit(desk.answers, image, ["divprune"], 0.5, QUESTION) for _ in range(3)]
        after = [[dataclasses.replace(one, seconds=None) for one in one.result()] for one in asked]
    assert most == [1]
    assert after == [before] * 3
