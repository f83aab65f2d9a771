"""Bad settings, models and batches: each ends in an error (or a counted warning) that says what to do.

The first part follows the table of required errors of the specification, the second what users of vision-language
models run into beyond it.
"""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tests.dualspeed.common import ROWS, attached, training_arguments
from tests.tiny import FAMILIES, IMAGE, WIDTH, Batch, TinyRows, collate, llama_settings, tiny_llava, weights
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, Trainer

import trimtab
from trimtab import DualSpeedConfig
from trimtab.anatomy import families
from trimtab.dualspeed.attach import DualSpeedHandle
from trimtab.errors import (
    HostLibraryError,
    SettingError,
    TokenMismatchError,
    TrimtabError,
    TrimtabWarning,
    UnsupportedModelError,
    WrongOrderError,
)


@pytest.fixture
def llava() -> Any:
    return tiny_llava()


def llava_batch(images: tuple[int, ...] = ROWS, **changes: Any) -> Batch:
    return FAMILIES["llava"].make_batch(None, images, **changes)


# 1: settings outside their range ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("setting", "value", "allowed"),
    [
        ("keep_ratio", 0, r"\(0, 1\]"), ("keep_ratio", -0.1, r"\(0, 1\]"), ("keep_ratio", 1.01, r"\(0, 1\]"),
        ("keep_ratio", float("nan"), r"\(0, 1\]"), ("keep_ratio", "0.1", r"\(0, 1\]"), ("keep_ratio", True, r"\(0, 1"),
        ("slow_ratio", -0.1, r"\[0, 1\]"), ("slow_ratio", 1.1, r"\[0, 1\]"), ("slow_ratio", None, r"\[0, 1\]"),
        ("slow_ratio", float("nan"), r"\[0, 1\]"),
        ("isolator_tokens", -1, "at least 0"), ("isolator_tokens", 1.5, "at least 0"),
        ("kl_weight", -1.0, "at least 0"), ("kl_weight", float("inf"), "finite"),
        ("temperature", 0.0, "above 0"), ("temperature", float("nan"), "above 0"),
        ("seed", -1, "whole number"), ("seed", 2**63, "whole number"), ("head_chunk", 0, "at least 1"),
        ("keep_rule", "truncate", "floor"), ("schedule", "random", "stratified"), ("schedule_unit", "step", "micro"),
        ("positions", "compact", "renumber"), ("pruner", "", "name of a pruner"), ("pruner", None, "name of a pruner"),
        ("pruner_options", ["centered"], "mapping"), ("check_features", 1, "true or false"),
        ("total_steps", 0, "at least 1"), ("isolator_from", "", "path"),
    ],
)  # fmt: skip
def test_01_a_setting_outside_its_range_names_setting_range_and_value(setting: str, value: Any, allowed: str) -> None:
    with pytest.raises(ValueError, match=allowed) as raised:
        DualSpeedConfig(**{setting: value})
    assert isinstance(raised.value, SettingError)
    assert f"DualSpeedConfig.{setting}" in str(raised.value)
    assert repr(value) in str(raised.value)


def test_01_an_unknown_setting_names_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"'pruning_ratio'"):
        DualSpeedConfig.from_dict({"pruning_ratio": 0.9})
    with pytest.raises(ValueError, match=r"Did you mean 'slow_ratio'"):
        DualSpeedConfig.from_dict({"slowratio": 0.9})


def test_01_settings_survive_the_round_trip() -> None:
    config = DualSpeedConfig(keep_ratio=0.25, pruner_options={"centered": True}, schedule="bernoulli", seed=7)
    assert DualSpeedConfig.from_dict(config.to_dict()) == config


# 2: nothing kept -------------------------------------------------------------------------------------------------


def test_02_a_ratio_that_keeps_nothing_names_the_count(llava: Any) -> None:
    with (
        attached(llava, keep_ratio=0.02) as handle,
        handle.force_mode("fast"),
        pytest.raises(ValueError, match=r"(?s)keep_ratio=0\.02.*keeps 0 of 36 tokens.*[Rr]aise keep_ratio"),
    ):
        llava(**llava_batch())


@pytest.mark.parametrize("settings", [{"pruner": "keep_all"}, {"keep_ratio": 1.0}])
def test_02_keeping_everything_leaves_no_place_for_an_isolator(llava: Any, settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"isolator_tokens must be 0"):
        trimtab.attach(llava, DualSpeedConfig(**settings))


# 3: no slow steps ----------------------------------------------------------------------------------------------


def test_03_pruning_without_slow_steps_warns_of_the_mismatch(llava: Any) -> None:
    with pytest.warns(TrimtabWarning, match=r"(?s)slow_ratio.*(full|mismatch)"), attached(llava, slow_ratio=0.0):
        pass


def test_03_but_not_where_the_language_model_is_frozen(llava: Any) -> None:
    llava.requires_grad_(False)
    llava.model.multi_modal_projector.requires_grad_(True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with attached(llava, slow_ratio=0.0):
            llava(**llava_batch()).loss.backward()


# 4: pruners ------------------------------------------------------------------------------------------------------


def test_04_an_unknown_pruner_names_the_nearest_and_changes_nothing(llava: Any) -> None:
    hooks = [len(module._forward_pre_hooks) for module in llava.modules()]
    with pytest.raises(ValueError, match=r"(?s)'divprun'.*'divprune'.*random"):
        trimtab.attach(llava, DualSpeedConfig(pruner="divprun"))
    assert [len(module._forward_pre_hooks) for module in llava.modules()] == hooks
    assert not any("isolator" in name for name, _ in llava.named_parameters())


def test_04_a_pruner_whose_needs_the_model_lacks_says_what_is_missing() -> None:
    model = FAMILIES["idefics3"].build_model().train()
    with pytest.raises(ValueError, match=r"(?s)cls_topk.*cls_attention.*divprune"):
        trimtab.attach(model, DualSpeedConfig(pruner="cls_topk"))


def test_04_an_unknown_pruner_option_is_named(llava: Any) -> None:
    with pytest.raises(ValueError, match=r"(?s)divprune.*centred"):
        trimtab.attach(llava, DualSpeedConfig(pruner_options={"centred": True}))


# 5: models -------------------------------------------------------------------------------------------------------


def test_05_a_model_without_images_is_refused_by_name() -> None:
    model = LlamaForCausalLM(LlamaConfig(**llama_settings()))
    with pytest.raises(TypeError, match=r"(?s)LlamaForCausalLM.*nearest.*Ll\w+ForConditionalGeneration") as raised:
        trimtab.attach(model, DualSpeedConfig())
    assert isinstance(raised.value, UnsupportedModelError)


def test_05_the_base_model_without_head_is_refused(llava: Any) -> None:
    with pytest.raises(TypeError, match=r"LlavaModel"):
        trimtab.attach(llava.model, DualSpeedConfig())


def test_05_something_that_is_no_model_of_transformers_is_refused() -> None:
    with pytest.raises(TypeError, match=r"Linear"):
        trimtab.attach(nn.Linear(2, 2), DualSpeedConfig())


# 6, 8: placeholders and features -----------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["fast", "slow"])
def test_06_a_missing_placeholder_names_both_counts_and_the_row(llava: Any, mode: str) -> None:
    batch = llava_batch((1, 1))
    batch["input_ids"][1, (batch["input_ids"][1] == IMAGE).nonzero()[-1, 0]] = 5
    with attached(llava) as handle, handle.force_mode(mode), pytest.raises(TokenMismatchError) as raised:
        llava(**batch)
    numbers = {int(number) for number in re.findall(r"\d+", str(raised.value))}
    assert {35, 36} <= numbers or {71, 72} <= numbers, str(raised.value)
    assert re.search(r"(?i)(row|sample)\D{0,10}1\b", str(raised.value)), str(raised.value)


def test_06_an_image_without_placeholders_is_a_mismatch(llava: Any) -> None:
    batch = llava_batch((1, 0))
    batch["input_ids"][batch["input_ids"] == IMAGE] = 5
    with attached(llava) as handle, handle.force_mode("fast"), pytest.raises(TokenMismatchError, match=r"36"):
        llava(**batch)


def test_06_placeholders_without_an_image_are_a_mismatch(llava: Any) -> None:
    batch = llava_batch((1, 0))
    del batch["pixel_values"]
    with attached(llava) as handle, handle.force_mode("fast"), pytest.raises(TokenMismatchError, match=r"36"):
        llava(**batch)


@pytest.mark.parametrize("mode", ["fast", "slow"])
def test_08_an_image_cut_by_truncation_points_to_max_length(llava: Any, mode: str) -> None:
    batch = llava_batch((1, 1))
    for name in ("input_ids", "labels", "attention_mask"):
        batch[name] = batch[name][:, :20]
    batch["labels"][:, 5] = 5
    with (
        attached(llava) as handle,
        handle.force_mode(mode),
        pytest.raises(ValueError, match=r"(?s)(?=.*36)(?=.*max_length)"),
    ):
        llava(**batch)


# 7: labels -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["fast", "slow"])
def test_07_absent_labels_are_an_error(llava: Any, mode: str) -> None:
    batch = llava_batch()
    del batch["labels"]
    with attached(llava) as handle, handle.force_mode(mode), pytest.raises(ValueError, match=r"labels"):
        llava(**batch)


@pytest.mark.parametrize("mode", ["fast", "slow"])
def test_07_a_batch_without_supervised_label_has_zero_loss_and_a_warning(llava: Any, mode: str) -> None:
    batch = llava_batch()
    batch["labels"][:] = -100
    before = weights(llava)
    with attached(llava) as handle, handle.force_mode(mode):
        with pytest.warns(TrimtabWarning, match=r"(?s)label"):
            loss = llava(**batch).loss
        loss.backward()
        assert loss.item() == 0.0
        parameters = [p for p in llava.parameters() if p.grad is not None]
        assert parameters, "there is a path for gradients, so that several processes stay in step"
        assert all(not p.grad.any() for p in parameters)
        torch.optim.SGD(parameters, lr=1.0).step()
    for key, value in before.items():
        assert torch.equal(llava.state_dict()[key], value), key


@pytest.mark.filterwarnings("ignore:A batch has no supervised label")
@pytest.mark.parametrize("items", [0, torch.tensor(0)])
def test_07_an_update_without_supervised_label_divides_by_no_zero(llava: Any, items: Any) -> None:
    batch = llava_batch()
    batch["labels"][:] = -100
    with attached(llava):
        loss = llava(**batch, num_items_in_batch=items).loss
        loss.backward()
    assert loss.item() == 0.0
    assert all(p.grad is None or not p.grad.any() for p in llava.parameters())


def test_07_labels_over_placeholders_are_masked_and_warned_about_once(llava: Any) -> None:
    clean = llava_batch()
    batch = {**clean, "labels": torch.where(clean["input_ids"] == IMAGE, IMAGE, clean["labels"])}
    with attached(llava, keep_ratio=0.2) as handle:
        for mode in ("fast", "slow"):
            with handle.force_mode(mode):
                expected = llava(**clean).loss
                if mode == "fast":
                    with pytest.warns(TrimtabWarning, match=r"(?s)label.*placeholder|placeholder.*label"):
                        loss = llava(**batch).loss
                else:
                    loss = llava(**batch).loss
            torch.testing.assert_close(loss, expected, atol=1e-6, rtol=0)


# 10, 11: the isolator --------------------------------------------------------------------------------------------


def test_10_an_isolator_of_another_shape_names_both_shapes(llava: Any, tmp_path: Path) -> None:
    with attached(llava, isolator_tokens=6) as handle:
        handle.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=rf"(?s)(?=.*\b6\b)(?=.*\b4\b)(?=.*\b{WIDTH}\b)(?=.*isolator)"):
        trimtab.attach(llava, DualSpeedConfig(isolator_from=str(tmp_path)))


def test_10_a_missing_isolator_file_is_named(llava: Any, tmp_path: Path) -> None:
    missing = tmp_path / "stage1" / "dualspeed"
    with pytest.raises((TrimtabError, OSError), match=r"stage1"):
        trimtab.attach(llava, DualSpeedConfig(isolator_from=str(missing)))


def test_10_a_file_that_is_no_isolator_is_named(llava: Any, tmp_path: Path) -> None:
    (tmp_path / "isolator.safetensors").write_bytes(b"not tensors")
    with pytest.raises(TrimtabError, match=r"isolator\.safetensors"):
        trimtab.attach(llava, DualSpeedConfig(isolator_from=str(tmp_path)))
    save_file({"other": torch.zeros(4, WIDTH)}, tmp_path / "isolator.safetensors")
    with pytest.raises(TrimtabError, match=r"isolator\.safetensors"):
        trimtab.attach(llava, DualSpeedConfig(isolator_from=str(tmp_path)))


def test_11_a_frozen_isolator_says_how_to_train_it(llava: Any) -> None:
    with attached(llava) as handle:
        handle.isolator.requires_grad_(False)
        with handle.force_mode("fast"), pytest.raises(ValueError, match=r"(?s)isolator.*(trainable|requires_grad)"):
            llava(**llava_batch())


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")  # asked for by PEFT itself
def test_11_peft_after_attaching_is_caught() -> None:
    peft = pytest.importorskip("peft")
    model = tiny_llava()
    handle = trimtab.attach(model, DualSpeedConfig())
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    wrapped.train()
    with handle.force_mode("fast"), pytest.raises(ValueError, match=r"(?s)isolator.*modules_to_save|attach.*after"):
        wrapped(**llava_batch())


# 12: generation ------------------------------------------------------------------------------------------------


def test_12_generating_in_training_mode_is_an_error(llava: Any) -> None:
    prompt = {name: value for name, value in llava_batch((1,)).items() if name != "labels"}
    with attached(llava), pytest.raises(RuntimeError, match=r"eval\(\)") as raised:
        llava.generate(**prompt, max_new_tokens=2, do_sample=False)
    assert isinstance(raised.value, WrongOrderError)


def test_12_a_cache_in_a_training_step_is_an_error(llava: Any) -> None:
    from transformers import DynamicCache

    with attached(llava) as handle, handle.force_mode("fast"), pytest.raises(RuntimeError, match=r"past_key_values"):
        llava(**llava_batch(), past_key_values=DynamicCache())


def test_12_generating_in_eval_mode_is_that_of_the_stock_model(llava: Any) -> None:
    prompt = {name: value for name, value in llava_batch((1,)).items() if name != "labels"}
    llava.eval()
    expected = llava.generate(**prompt, max_new_tokens=4, do_sample=False)
    with attached(llava):
        assert torch.equal(llava.generate(**prompt, max_new_tokens=4, do_sample=False), expected)


# 13: features ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_13_broken_features_name_the_image(llava: Any, value: float) -> None:
    batch = llava_batch((1, 1))
    batch["pixel_values"][1, 0, 0, 0] = value
    with (
        attached(llava, check_features=True) as handle,
        handle.force_mode("fast"),
        pytest.raises(ValueError, match=r"(?s)(?=.*(NaN|nan|finite|infinity))(?=.*\b1\b)"),
    ):
        llava(**batch)


# beyond the table ------------------------------------------------------------------------------------------------


def test_an_older_transformers_is_refused_with_the_command_to_run(llava: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    # The module as families sees it: transformers may enter itself in sys.modules a second time.
    monkeypatch.setattr(families.transformers, "__version__", "5.17.2")
    with pytest.raises(ImportError, match=r"(?s)5\.18.*5\.17\.2.*pip install") as raised:
        trimtab.attach(llava, DualSpeedConfig())
    assert isinstance(raised.value, HostLibraryError)


@pytest.mark.parametrize("mode", ["fast", "slow"])
def test_a_batch_without_images_is_a_plain_step(llava: Any, mode: str) -> None:
    batch = llava_batch((0, 0))
    expected = llava(**batch).loss
    with attached(llava) as handle, handle.force_mode(mode):
        loss = llava(**batch).loss
        loss.backward()
        metrics = handle.metrics()
        isolator = handle.isolator.rows.grad
    torch.testing.assert_close(loss, expected, atol=2e-5, rtol=0)
    assert metrics["visual_tokens_full"] == metrics["visual_tokens_kept"] == 0
    assert isolator is not None
    assert not isolator.any()


def test_attaching_twice_is_refused(llava: Any) -> None:
    with attached(llava), pytest.raises(RuntimeError, match=r"(?s)attached.*detach"):
        trimtab.attach(llava, DualSpeedConfig())


def test_detaching_twice_is_harmless(llava: Any) -> None:
    handle = trimtab.attach(llava, DualSpeedConfig())
    handle.detach()
    handle.detach()
    again = trimtab.attach(llava, DualSpeedConfig())
    again.detach()


def test_an_unknown_mode_cannot_be_forced(llava: Any) -> None:
    with attached(llava) as handle, pytest.raises(ValueError, match=r"(?s)fast.*slow"), handle.force_mode("medium"):
        pass


def test_metrics_before_the_first_step(llava: Any) -> None:
    with attached(llava) as handle:
        metrics = handle.metrics()
    assert metrics.get("mode") is None
    assert not metrics.get("steps_fast")


def test_embeddings_instead_of_ids_are_refused(llava: Any) -> None:
    batch = llava_batch()
    embeds = llava.get_input_embeddings()(batch.pop("input_ids")).detach()
    with attached(llava) as handle, handle.force_mode("fast"), pytest.raises(TrimtabError, match=r"input_ids"):
        llava(**batch, inputs_embeds=embeds)


def test_annealed_without_length_is_refused_outside_a_trainer(llava: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"total_steps"):
        trimtab.attach(llava, DualSpeedConfig(schedule="annealed"))
    trainer = trimtab.with_dualspeed(Trainer)(
        model=llava, args=training_arguments(tmp_path, max_steps=2), train_dataset=TinyRows(), data_collator=collate,
        dualspeed=DualSpeedConfig(schedule="annealed"),
    )  # fmt: skip
    trainer.train()
    assert sum(trainer.dualspeed.metrics()[f"steps_{mode}"] for mode in ("fast", "slow")) == 2


def test_a_second_training_spreads_an_annealed_schedule_anew(llava: Any) -> None:
    handle = DualSpeedHandle(llava, DualSpeedConfig(schedule="annealed"))
    for steps in (20, 50):
        handle.spread_over(steps)
        assert handle.config.total_steps == steps
    handle.detach()
    fixed = DualSpeedHandle(llava, DualSpeedConfig(schedule="annealed", total_steps=30))
    fixed.spread_over(20)
    assert fixed.config.total_steps == 30
    fixed.detach()


def test_resuming_with_other_settings_is_told(llava: Any, tmp_path: Path) -> None:
    with attached(llava, keep_ratio=0.5) as handle:
        handle.save_pretrained(tmp_path)
    with attached(llava, keep_ratio=0.25) as handle, pytest.warns(TrimtabWarning, match="keep_ratio=0.5, now 0.25"):
        handle.load_pretrained(tmp_path)
    with attached(llava, keep_ratio=0.5) as handle, warnings.catch_warnings():
        warnings.simplefilter("error")
        handle.load_pretrained(tmp_path)


def test_side_files_are_not_written_over_a_file(llava: Any, tmp_path: Path) -> None:
    (tmp_path / "dualspeed").write_text("in the way")
    with attached(llava) as handle, pytest.raises(OSError, match=r"dualspeed"):
        handle.save_pretrained(tmp_path / "dualspeed")
    assert (tmp_path / "dualspeed").read_text() == "in the way"


def test_several_gpus_in_one_process_are_refused(llava: Any, tmp_path: Path) -> None:
    arguments = training_arguments(tmp_path)
    arguments._n_gpu = 2
    with pytest.raises(SettingError, match=r"2 GPUs.*accelerate launch"):
        trimtab.with_dualspeed(Trainer)(
            model=llava, args=arguments, train_dataset=TinyRows(), data_collator=collate, dualspeed=DualSpeedConfig()
        )


def test_a_loss_of_the_users_own_is_refused(llava: Any, tmp_path: Path) -> None:
    with pytest.raises(SettingError, match=r"compute_loss_func"):
        trimtab.with_dualspeed(Trainer)(
            model=llava, args=training_arguments(tmp_path), train_dataset=TinyRows(), data_collator=collate,
            compute_loss_func=lambda *_, **__: torch.zeros(()), dualspeed=DualSpeedConfig(),
        )  # fmt: skip


def test_settings_may_be_a_mapping_and_nothing_else(llava: Any) -> None:
    handle = trimtab.attach(llava, {"keep_ratio": 0.5, "isolator_tokens": 0})
    assert handle.config == DualSpeedConfig(keep_ratio=0.5, isolator_tokens=0)
    handle.detach()
    for wrong in (None, 0.1, "divprune"):
        with pytest.raises(
            SettingError, match=rf"attach\.config must be a DualSpeedConfig or a mapping.*{wrong!r} came"
        ):
            trimtab.attach(llava, wrong)


def test_a_model_over_several_devices_is_refused(llava: Any) -> None:
    llava.hf_device_map = {"model.vision_tower": 0, "model.language_model": 1, "lm_head": "cpu"}
    with pytest.raises(SettingError, match=r"device_map has spread .* over 0, 1, cpu.*without device_map"):
        trimtab.attach(llava, DualSpeedConfig())
    llava.hf_device_map = {"": 0}
    trimtab.attach(llava, DualSpeedConfig()).detach()


def test_the_remedy_for_a_frozen_isolator_is_one_that_works(llava: Any) -> None:
    peft = pytest.importorskip("peft")
    lora = peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["dualspeed_isolator"])
    handle = trimtab.attach(llava, DualSpeedConfig())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of PEFT, for names that transformers has deprecated
        wrapped = peft.get_peft_model(llava, lora)
    with pytest.raises(SettingError, match=r"after get_peft_model or after freezing\.$"):
        wrapped(**llava_batch())
    handle.detach()
