"""`train`: an ordinary checkpoint, a record, and a directory that is never half-written without saying so."""

from __future__ import annotations

import errno
import json
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tests.run.small_run import write_rows
from transformers import AutoModelForImageTextToText, AutoProcessor, Trainer, TrainerCallback

from trimtab.data import SupervisedCollator, load_rows
from trimtab.errors import DataError, HostLibraryError, OutputError, SettingError, UnsupportedModelError
from trimtab.records import read_record
from trimtab.run import load
from trimtab.run.config import RunConfig, load_config, training_arguments
from trimtab.run.train import _prepare, build_trainer, train

Make = Callable[..., RunConfig]


def weights(directory: Path) -> dict[str, torch.Tensor]:
    model = AutoModelForImageTextToText.from_pretrained(str(directory))
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_without_the_block_it_is_the_plain_trainer_bit_for_bit(make_config: Make, tmp_path: Path) -> None:
    config = make_config(dualspeed=False)
    record = train(config)
    model = load.load_model(config)
    processor = AutoProcessor.from_pretrained(config.model_name_or_path)
    plain = Trainer(
        model=model,
        args=training_arguments(make_config(dualspeed=False, output_dir=str(tmp_path / "plain"))),
        train_dataset=load_rows(config.data_files[0]),
        data_collator=SupervisedCollator(processor),
    )
    plain.train()
    assert same(weights(tmp_path / "out"), {name: value.cpu() for name, value in model.state_dict().items()})
    losses = [entry["loss"] for entry in plain.state.log_history if "loss" in entry]
    assert [entry["loss"] for entry in record["results"]["log"] if "loss" in entry] == losses
    assert record["results"]["arm"] == "full"


def test_a_run_leaves_model_processor_record_and_settings(trained: Path, small_run: Path) -> None:
    _, info = AutoModelForImageTextToText.from_pretrained(str(trained), output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    AutoProcessor.from_pretrained(str(trained))
    record = read_record(trained / "records" / "train.json")
    results = record["results"]
    assert (results["arm"], results["steps"], results["samples"], results["rows"]) == ("dualspeed", 4, 8, 8)
    assert results["metrics"]["steps_fast"] + results["metrics"]["steps_slow"] == 4
    assert record["settings"]["dualspeed"]["keep_ratio"] == 0.25
    assert json.loads((trained / "run.json").read_text())["status"] == "finished"
    assert load_config(trained / "resolved.yaml").dualspeed is not None
    assert (trained / "dualspeed").is_dir()


def test_frozen_parts_stay_and_the_rest_learns(trained: Path, small_run: Path) -> None:
    before, after = weights(small_run / "model"), weights(trained)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert not any("vision_tower" in name for name in changed)


class Kill(TrainerCallback):
    def on_step_end(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        if state.global_step == 3:
            raise KeyboardInterrupt


@pytest.mark.parametrize("block", [False, {"keep_ratio": 0.25, "slow_ratio": 0.5, "schedule": "bernoulli"}])
def test_interrupted_and_resumed_equals_never_interrupted(
    make_config: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: Any
) -> None:
    saving = {"save_strategy": "steps", "save_steps": 2, "dualspeed": block}
    train(make_config(**saving, output_dir=str(tmp_path / "whole")))

    def build_and_kill(*arguments: Any) -> Any:
        trainer = build_trainer(*arguments)
        trainer.add_callback(Kill())
        return trainer

    with monkeypatch.context() as patch:
        patch.setattr("trimtab.run.train.build_trainer", build_and_kill)
        with pytest.raises(KeyboardInterrupt):
            train(make_config(**saving))
    with pytest.raises(OutputError, match=r"holds a run that did not finish.*`resume: true`"):
        train(make_config(**saving))
    train(make_config(**saving, resume=True))
    assert same(weights(tmp_path / "out"), weights(tmp_path / "whole"))


def test_a_finished_run_is_not_repeated(trained_copy: Path) -> None:
    config = load_config(trained_copy / "resolved.yaml", ["--output_dir", str(trained_copy), "--resume"])
    state = json.loads((trained_copy / "run.json").read_text())
    state["settings"]["output_dir"] = str(trained_copy)
    (trained_copy / "run.json").write_text(json.dumps(state))
    before = (trained_copy / "model.safetensors").stat().st_mtime_ns
    assert train(config) == read_record(trained_copy / "records" / "train.json")
    assert (trained_copy / "model.safetensors").stat().st_mtime_ns == before


@pytest.mark.parametrize("status", ["running", "finished"])
def test_every_process_knows_whether_the_run_was_finished(make_config: Make, tmp_path: Path, status: str) -> None:
    """Else the first one would return the record and the others wait for it in vain."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "run.json").write_text(json.dumps({"made_by": "trimtab", "status": status}))
    second = SimpleNamespace(process_index=1, main_process_first=lambda desc: nullcontext())
    assert _prepare(make_config(resume=True), second).finished == (status == "finished")


def test_resuming_with_other_settings_is_refused(make_config: Make) -> None:
    train(make_config(max_steps=1, dualspeed=False))
    with pytest.raises(OutputError, match=r"learning_rate=0.01, but 0.5 came"):
        train(make_config(max_steps=1, dualspeed=False, learning_rate=0.5, resume=True))


def test_somebody_elses_directory_is_left_alone(make_config: Make, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("x")
    with pytest.raises(OutputError, match=r"thesis\.tex"):
        train(make_config())
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["thesis.tex"]


def test_nothing_is_written_where_the_data_is_bad(make_config: Make, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="absent"):
        train(make_config(data_files=[str(tmp_path / "absent.jsonl")]))
    assert not (tmp_path / "out").exists()


def test_a_full_disk_is_explained(make_config: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Trainer, "save_model", full)
    with pytest.raises(OutputError, match=r"The disk is full.*--resume true"):
        train(make_config(max_steps=1, dualspeed=False))


def test_bad_rows_are_skipped_and_counted_on_request(make_config: Make, tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", count=4)
    (tmp_path / "rows-1.png").write_bytes(b"not a picture")
    files = {"data_files": [str(path)], "max_steps": 1, "dualspeed": False}
    with pytest.raises(DataError, match=r"rows-1\.png"):
        train(make_config(**files, num_train_epochs=1, per_device_train_batch_size=4))
    record = train(make_config(**files, on_bad="skip", overwrite=True))
    assert (record["results"]["rows"], record["results"]["rows_skipped"]) == (3, 1)


def test_several_files_are_read_one_after_the_other(make_config: Make, small_run: Path) -> None:
    files = [str(small_run / "train.jsonl"), str(small_run / "test.jsonl")]
    assert train(make_config(data_files=files, max_steps=1, dualspeed=False))["results"]["rows"] == 12


def test_the_loss_on_eval_files_is_followed(make_config: Make) -> None:
    record = train(make_config(eval_strategy="steps", eval_steps=2, max_steps=2, per_device_eval_batch_size=2))
    assert [entry["step"] for entry in record["results"]["log"] if "eval_loss" in entry] == [2]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")
def test_trl_trains_on_the_same_rows(make_config: Make) -> None:
    pytest.importorskip("trl", reason="needs the extra trl")
    record = train(make_config(trainer="sft", max_steps=2, bf16=False))
    assert record["results"]["steps"] == 2
    assert record["results"]["metrics"]["steps_fast"] + record["results"]["metrics"]["steps_slow"] == 2


# what goes wrong while loading -----------------------------------------------------------------------------------


def test_a_model_that_is_not_there_is_explained(make_config: Make, tmp_path: Path) -> None:
    with pytest.raises(SettingError, match=r"There is no model 'nobody/nothing'.*go online once"):
        load.load_model(make_config(model_name_or_path="nobody/nothing"))
    with pytest.raises(SettingError, match="is a file"):
        load.load_model(make_config(model_name_or_path=str(tmp_path / "run.yaml")))
    (tmp_path / "empty").mkdir()
    with pytest.raises(SettingError, match=r"holds no model: there is no config\.json"):
        load.load_processor(tmp_path / "empty")


def test_a_model_without_eyes_is_refused(make_config: Make, tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=8)).save_pretrained(str(tmp_path / "llama"))
    with pytest.raises(UnsupportedModelError, match="cannot be loaded as a vision-language model"):
        load.load_model(make_config(model_name_or_path=str(tmp_path / "llama")))


def test_a_name_that_freezes_nothing_gets_the_nearest(make_config: Make) -> None:
    with pytest.raises(SettingError, match=r"freeze: 'vision_towr' fits no parameter.*Did you mean 'vision_tower'"):
        load.load_model(make_config(freeze=["vision_towr"]))


def test_freezing_takes_whole_pieces_of_names_only(make_config: Make) -> None:
    model = load.load_model(make_config(freeze=[]))
    layers = model.model.language_model.layers
    assert load.freeze(model, ["language_model.layers.0"]) == sum(p.numel() for p in layers[0].parameters())
    with pytest.raises(SettingError, match="fits no parameter"):
        load.freeze(model, ["language_model.layers.00", "guage_model"])


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (RuntimeError("operator torchvision::nms does not exist"), "torchvision"),
        (AttributeError("VIDEO_PROCESSOR_MAPPING_NAMES has no x"), "torchvision"),
        (ImportError("cannot import name y"), "Try a newer transformers"),
    ],
)
def test_host_libraries_that_do_not_fit_are_explained(
    make_config: Make, monkeypatch: pytest.MonkeyPatch, error: Exception, words: str
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(AutoProcessor, "from_pretrained", fail)
    with pytest.raises(HostLibraryError, match=words):
        load.load_processor("x")


def test_unknown_fields_of_lora_get_the_nearest(make_config: Make) -> None:
    pytest.importorskip("peft", reason="needs the extra peft")
    with pytest.raises(SettingError, match=r"Unknown setting 'rank' of lora"):
        load.load_model(make_config(lora={"rank": 4}))
    with pytest.raises(SettingError, match="peft cannot use these settings"):
        load.load_model(make_config(lora={"r": 4, "target_modules": ["nowhere"]}))


def test_packs_count_the_samples_that_they_held(make_config: Make, tmp_path: Path) -> None:
    packs = {"packing": True, "pack_tokens": 300, "schedule_unit": "sample", "keep_ratio": 0.25}
    results = train(make_config(dualspeed=packs, output_dir=str(tmp_path / "packs")))["results"]
    told = results["metrics"]
    assert results["samples"] == told["samples_fast"] + told["samples_slow"]
    assert results["samples"] > results["steps"] == 4, "several samples in a pack"
