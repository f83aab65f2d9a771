"""Rows, questions and models by name, without a run file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tests.run.small_run import TOKENS, write_model, write_rows

from trimtab.errors import DataError, SettingError
from trimtab.run.ask import answer, prompt_batch, question_row, rows_with_images, supervised_batches
from trimtab.run.load import check_device, default_device, load_processor, load_to_use


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("ask")
    write_model(place / "model")
    write_rows(place / "rows.jsonl", count=4)
    turns = [{"role": "user", "content": "what ?"}, {"role": "assistant", "content": "red"}]
    lines = (place / "rows.jsonl").read_text(encoding="utf-8").splitlines()
    mixed = [lines[0], json.dumps({"messages": turns}), *lines[1:]]
    (place / "mixed.jsonl").write_text("\n".join(mixed), encoding="utf-8")
    (place / "text.jsonl").write_text(json.dumps({"messages": turns}), encoding="utf-8")
    return place


def test_the_first_rows_with_images_are_taken(folder: Path) -> None:
    rows = rows_with_images(str(folder / "mixed.jsonl"), 3)
    assert [row["row"] for row in rows] == [1, 3, 4]  # lines of the file; the second has none
    assert len(rows_with_images(str(folder / "mixed.jsonl"), 20)) == 4
    with pytest.raises(DataError, match=r"None of the 1 rows of .*text\.jsonl holds an image"):
        rows_with_images(str(folder / "text.jsonl"), 20)


def test_images_are_looked_for_in_the_folder_that_is_named(folder: Path, tmp_path: Path) -> None:
    moved = tmp_path / "rows.jsonl"
    moved.write_bytes((folder / "rows.jsonl").read_bytes())
    with pytest.raises(DataError, match="is missing"):
        rows_with_images(str(moved), 1)
    assert len(rows_with_images(str(moved), 1, folder)) == 1


def test_batches_have_a_length_and_labels_on_answers(folder: Path) -> None:
    processor = load_processor(folder / "model")
    batches = supervised_batches(processor, rows_with_images(str(folder / "rows.jsonl"), 3), 2)
    assert len(batches) == 2
    sizes = [len(batch["input_ids"]) for batch in batches]
    assert sizes == [2, 1]
    assert all((batch["labels"] != -100).any() for batch in batches)


def test_a_question_is_a_prompt_without_its_answer(folder: Path) -> None:
    processor = load_processor(folder / "model")
    row = question_row([folder / "rows-0.png", folder / "rows-1.png"], "what colour is it ?")
    batch = prompt_batch(processor, [row])
    assert int((batch["input_ids"] == processor.image_token_id).sum()) == 2 * TOKENS
    text = processor.tokenizer.decode(batch["input_ids"][0], skip_special_tokens=True)
    assert "what colour is it ?" in text
    with pytest.raises(DataError, match=r"absent\.png"):
        question_row(["absent.png"], "what ?")


def test_a_model_answers_without_training_mode(folder: Path) -> None:
    model, processor = load_to_use(folder / "model", dtype="bfloat16", device="cpu")
    assert not model.training
    assert model.dtype == torch.bfloat16
    row = question_row([folder / "rows-0.png"], "what colour is it ?")
    inputs = prompt_batch(processor, [row])
    made = model.generate(**inputs, max_new_tokens=3, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert answer(model, processor, row, 3) == processor.tokenizer.decode(made, skip_special_tokens=True)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")  # a name that peft 0.21 asks for
def test_adapters_are_loaded_with_their_model(folder: Path, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model, processor = load_to_use(folder / "model")
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"]))
    adapted.save_pretrained(str(tmp_path))
    processor.save_pretrained(str(tmp_path))
    found, _ = load_to_use(tmp_path)
    assert isinstance(found, peft.PeftModel)


def test_a_device_that_cannot_be_used_is_named() -> None:
    check_device(default_device())
    with pytest.raises(SettingError, match=r"device must be a device of torch .* but 'nowhere' came"):
        check_device("nowhere")
    if not torch.cuda.is_available():
        with pytest.raises(SettingError, match="'cuda' came"):
            check_device("cuda")
