"""Steps that `check` and `bench` time are those of the training, and what is read off them reaches the record."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tests.tiny import FAMILIES
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from trimtab.bench import StepParts
from trimtab.dualspeed import DualSpeedConfig
from trimtab.run import check as check_module
from trimtab.run import probe, shallow
from trimtab.run.bench import bench
from trimtab.run.check import check
from trimtab.run.config import RunConfig

Make = Callable[..., RunConfig]
ARGUMENTS: Any = SimpleNamespace(device=torch.device("cpu"), bf16=False, fp16=False, gradient_checkpointing=False)
SETTINGS = DualSpeedConfig(keep_ratio=0.25, isolator_tokens=1)


def timed_by_check(config: RunConfig) -> None:
    assert check(config, seconds=20)["results"]["measured"] is not None


def timed_by_bench(config: RunConfig) -> None:
    bench(config, steps=1)


@pytest.fixture
def blocks(monkeypatch: pytest.MonkeyPatch) -> list[tuple[bool, torch.dtype, bool]]:
    """Whether autocast is on, the dtype of the weights and the mark of checkpointing, per forward pass of a block."""
    seen: list[tuple[bool, torch.dtype, bool]] = []
    forward = LlamaDecoderLayer.forward

    def spied(self: Any, *args: Any, **kwargs: Any) -> Any:
        marked = bool(self.gradient_checkpointing and self.training)
        seen.append((torch.is_autocast_enabled("cpu"), self.self_attn.q_proj.weight.dtype, marked))
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(LlamaDecoderLayer, "forward", spied)
    return seen


# as the training would run them -------------------------------------------------------------------------------------


@pytest.mark.parametrize("verb", [timed_by_check, timed_by_bench])
@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, (False, torch.float32, False)),
        ({"bf16": True}, (True, torch.float32, False)),
        ({"dtype": "bfloat16"}, (False, torch.bfloat16, False)),
        ({"activation_checkpointing": True}, (False, torch.float32, True)),
    ],
    ids=["plain", "bf16", "dtype", "checkpointing"],
)
def test_precision_and_checkpointing_of_the_run_are_those_of_its_steps(
    make_config: Make, blocks: list[Any], verb: Callable[[RunConfig], None], change: Any, expected: Any
) -> None:
    verb(make_config(**change))
    assert set(blocks) == {expected}


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")  # asked for by PEFT itself
def test_behind_an_adapter_the_gradient_runs_as_in_the_training(make_config: Make) -> None:
    pytest.importorskip("peft", reason="needs the extra peft")
    lora = {"r": 2, "target_modules": ".*language_model.*q_proj"}
    config = make_config(lora=lora, freeze=[])
    assert check(config, seconds=20)["results"]["measured"]["speedup"] > 0  # without blocks no adapter is left
    model = shallow.outline_to_train(config)
    assert {name for name, p in model.named_parameters() if p.requires_grad and "lora_" not in name} == set()
    assert any(p.requires_grad for p in model.parameters())


def opened(trained: bool) -> tuple[probe._Steps, list[str]]:
    """Return steps of a tiny model and a list that grows with every gradient of its tower."""
    model = FAMILIES["llava"].build().train()
    model.model.vision_tower.requires_grad_(trained)
    model.model.multi_modal_projector.requires_grad_(trained)
    seen: list[str] = []
    if trained:
        for name, parameter in model.model.vision_tower.named_parameters():
            parameter.register_post_accumulate_grad_hook(lambda _, name=name: seen.append(name))
    return probe._Steps(model, FAMILIES["llava"].make_batch(model), SETTINGS, ARGUMENTS), seen


def test_a_trained_tower_is_timed_with_its_backward_pass() -> None:
    steps, seen = opened(trained=True)
    steps.encode()
    assert len(set(seen)) > 10
    assert all(p.grad is None for p in steps.model.parameters())


def test_a_frozen_tower_and_a_batch_without_images_need_none() -> None:
    steps, _ = opened(trained=False)
    steps.encode()
    steps.batch = {name: value for name, value in steps.batch.items() if name != "pixel_values"}
    steps.encode()


def test_the_model_is_bare_after_measuring(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[probe._Steps] = []

    class Kept(probe._Steps):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            made.append(self)

    monkeypatch.setattr(probe, "_Steps", Kept)
    measured(monkeypatch, {})
    assert [steps.handle for steps in made] == [None]


# from the steps to the record ---------------------------------------------------------------------------------------


def measured(
    monkeypatch: pytest.MonkeyPatch, seconds: Mapping[str, float], spread: float = 0.0, tower_layers: int = 4
) -> dict[str, Any]:
    """Measure half of a deep model's decoder with made times: 4 s, 1 s when shallow, but for `seconds`."""

    def timed(calls: Mapping[str, Callable[[], object]], **_: Any) -> dict[str, Any]:
        found = {}
        for name, call in calls.items():
            call()
            median = seconds.get(name, 1.0 if "shallow" in name else 4.0)
            found[name] = {"median": median, "low": median * (1 - spread / 2), "high": median * (1 + spread / 2)}
        return {"steps": found}

    monkeypatch.setattr(probe, "time_steps", timed)
    config = FAMILIES["llava"].build().config
    config.text_config.num_hidden_layers = config.vision_config.num_hidden_layers = 4
    with torch.device("meta"):
        from transformers import LlavaForConditionalGeneration

        model = LlavaForConditionalGeneration(config).train()
    batch = FAMILIES["llava"].make_batch(model)
    return probe.measure(model, batch, SETTINGS, probe.Plan(3, 2, 4, tower_layers, 4), ARGUMENTS, seconds=0)


def test_sound_times_raise_no_doubt(monkeypatch: pytest.MonkeyPatch) -> None:
    found = measured(monkeypatch, {"plain": 9.0, "fast": 5.0, "slow": 9.0}, spread=0.19)
    assert found["clamped"] == []
    assert found["spread"] == pytest.approx({"plain": 0.19, "fast": 0.19, "slow": 0.19})
    assert probe.split_trouble(found) == ""


def test_parts_below_zero_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    found = measured(monkeypatch, {"tower": 0.5, "fast": 0.9, "plain": 9.0, "slow": 9.0, "slow, shallow": 0.8})
    assert found["clamped"] == ["the tower's blocks", "the decoder in a fast step", "the head in a slow step"]
    assert found["steps"]["fast"].decoder == found["steps"]["slow"].head == 0
    said = probe.split_trouble(found)
    assert said.startswith("The machine is too busy or the model too small to split the step")
    assert "the decoder in a fast step came out below 0" in said


def test_a_tower_that_is_not_shortened_has_no_difference_to_scale(monkeypatch: pytest.MonkeyPatch) -> None:
    few = shallow.least_tower_layers(FAMILIES["llava"].build())
    found = measured(monkeypatch, {"plain": 9.0, "fast": 5.0, "slow": 9.0}, tower_layers=few)
    assert found["steps"]["plain"].tower == 4  # not 3 s more for every block that was left out
    assert found["steps"]["plain"].decoder == 2 * (9 - 1)  # half of the blocks were timed
    assert found["clamped"] == []


def test_rounds_that_spread_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    found = measured(monkeypatch, {"plain": 9.0, "fast": 5.0, "slow": 9.0}, spread=0.25)
    assert "the rounds spread by 25%" in probe.split_trouble(found)


def test_the_update_is_that_of_all_trained_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr(probe, "_update_seconds", lambda _, weights: asked.append(weights) or 2.5)
    found = measured(monkeypatch, {"plain": 9.0, "fast": 5.0, "slow": 9.0})
    config = FAMILIES["llava"].build().config
    config.text_config.num_hidden_layers = config.vision_config.num_hidden_layers = 4
    whole = type(FAMILIES["llava"].build())(config)
    assert asked == [sum(p.numel() for p in whole.parameters())]
    assert found["steps"]["fast"].optimizer == 2.5


def made_measure(**changes: Any) -> dict[str, Any]:
    step = StepParts(tower=1.0, decoder=2.0, head=0.5, optimizer=0.5)
    steps = {"plain": StepParts(tower=1.0, decoder=20.0, head=1.0, optimizer=0.5), "fast": step, "slow": step}
    made = {"steps": steps, "rows": 2, "scaled": False, "device": "cpu", "layers": {}, "threads": 1, "repeats": 1}
    return {**made, "spread": {"plain": 0.0}, "clamped": [], **changes}


def test_workers_and_doubts_reach_the_record(make_config: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "measure", lambda *_: made_measure(spread={"plain": 0.5}))
    results = check(make_config(dataloader_num_workers=3), seconds=20)["results"]
    assert results["measured"]["data"]["workers"] == 3
    assert results["measured"]["spread"] == {"plain": 0.5}
    assert results["advice"][0].startswith("The machine is too busy or the model too small to split the step")
    assert "faster" in results["summary"]["expected gain"]


def test_a_slower_run_is_called_slower(make_config: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    slow = StepParts(tower=1.0, decoder=30.0, head=1.0, optimizer=0.5)
    steps = {**made_measure()["steps"], "fast": slow, "slow": slow}
    monkeypatch.setattr(probe, "measure", lambda *_: made_measure(steps=steps))
    results = check(make_config(dataloader_num_workers=1), seconds=20)["results"]
    assert results["measured"]["speedup"] < 1
    assert "1.44 times slower" in results["summary"]["expected gain"]
    assert "than plain training here: train plainly." in results["advice"][-1]


@pytest.mark.parametrize(("freeze", "trained"), [(["vision_tower"], False), ([], True)])
def test_whether_the_tower_is_trained_reaches_the_advice(
    make_config: Make, monkeypatch: pytest.MonkeyPatch, freeze: list[str], trained: bool
) -> None:
    given: list[dict[str, Any]] = []
    monkeypatch.setattr(probe, "measure", lambda *_: made_measure())
    monkeypatch.setattr(check_module, "advice", lambda *_, **settings: given.append(settings) or [])
    check(make_config(freeze=freeze), seconds=20)
    assert [settings["tower_trained"] for settings in given] == [trained]


# what arithmetic is told --------------------------------------------------------------------------------------------


def predicted(config: RunConfig) -> dict[str, float]:
    prediction: dict[str, float] = check(config, seconds=0)["results"]["prediction"]
    return prediction


def test_teacher_and_recompute_reach_the_prediction(make_config: Make) -> None:
    block = {"keep_ratio": 0.25, "slow_ratio": 0.5, "isolator_tokens": 2}
    plain = predicted(make_config(dualspeed=block))
    assert plain["slow_over_full"] > 1
    assert predicted(make_config(dualspeed={**block, "kl_weight": 0.0}))["slow_over_full"] == 1
    assert predicted(make_config(dualspeed=block, activation_checkpointing=True))["full"] > plain["full"]


def test_tower_and_projector_are_what_is_visual() -> None:
    model = FAMILIES["llava"].build()
    parts = (model.model.vision_tower, model.model.multi_modal_projector)
    expected = {id(p) for part in parts for p in part.parameters()}
    assert {id(p) for p in check_module._visual_parameters(model)} == expected


def test_patches_over_several_frames_are_counted_once() -> None:
    for frames, expected in ((None, 8.0), (1, 8.0), (2, 4.0)):
        vision = SimpleNamespace(patch_size=4, temporal_patch_size=frames)
        model = SimpleNamespace(config=SimpleNamespace(vision_config=vision))
        assert check_module._patches(model, {"pixels": 128.0}) == expected
