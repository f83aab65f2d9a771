"""The plug-in for ms-swift, through the interface of its release 4.6: the classes below stand for that interface."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from tests.dualspeed.common import training_arguments
from tests.tiny import TinyRows, collate, tiny_llava, weights
from transformers import Trainer

from trimtab import DualSpeedConfig, with_dualspeed
from trimtab.errors import MissingExtraError, SettingError
from trimtab.integrations.ms_swift import register

SETTINGS = {"keep_ratio": 0.2, "slow_ratio": 0.4, "seed": 3}


class Template:
    """ms-swift's template: its hook embeds ids and images itself, which would undo what DualSpeed does."""

    sequence_parallel_size = 1
    padding_free = packing = False

    def __init__(self) -> None:
        self.hook: Any = None

    def register_post_encode_hook(self, model: Any) -> None:
        self.hook = model.register_forward_pre_hook(self._embed, with_kwargs=True)

    def remove_post_encode_hook(self) -> None:
        if self.hook is not None:
            self.hook.remove()
        self.hook = None

    def _embed(self, model: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        kept = {name: kwargs[name] for name in ("attention_mask", "labels", "position_ids") if name in kwargs}
        return args, {**kept, "inputs_embeds": model.get_input_embeddings()(kwargs["input_ids"])}


class SwiftTrainer(Trainer):
    """ms-swift's Trainer: callbacks by name, hook while training, and a loss scaled to the labels of the update."""

    def __init__(self, *, makers: dict[str, Callable[..., Any]], names: list[str], args: Any, **kwargs: Any) -> None:
        self.template = Template()
        callbacks = [makers[name](args, self) for name in names]
        super().__init__(args=args, callbacks=callbacks, **kwargs)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        self.template.register_post_encode_hook(self.model)
        found = super().train(*args, **kwargs)
        self.template.remove_post_encode_hook()
        return found

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        outputs = model(**inputs)
        if num_items_in_batch is not None:
            outputs.loss = outputs.loss * ((inputs["labels"][:, 1:] != -100).sum() / num_items_in_batch)
        return (outputs.loss, outputs) if return_outputs else outputs.loss


@pytest.fixture
def makers(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Stand in for ``swift.callbacks``."""
    swift, callbacks = ModuleType("swift"), ModuleType("swift.callbacks")
    callbacks.callbacks_map = {"early_stop": object}  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "swift", swift)
    monkeypatch.setitem(sys.modules, "swift.callbacks", callbacks)
    found: dict[str, Any] = callbacks.callbacks_map  # type: ignore[attr-defined]
    return found


def swift_trainer(makers: dict[str, Any], out: Path, **changes: Any) -> SwiftTrainer:
    model = tiny_llava()
    model.model.vision_tower.requires_grad_(False)
    arguments = training_arguments(out)
    vars(arguments).update({"use_logits_to_keep": None, "enable_dft_loss": False, "loss_type": None, **changes})
    return SwiftTrainer(
        makers=makers, names=["dualspeed"], model=model, args=arguments, train_dataset=TinyRows(), data_collator=collate
    )


def test_a_run_equals_with_dualspeed(makers: dict[str, Any], tmp_path: Path) -> None:
    register(SETTINGS)
    trainer = swift_trainer(makers, tmp_path / "swift")
    assert trainer.args.use_logits_to_keep is False
    trainer.train()
    model = tiny_llava()
    model.model.vision_tower.requires_grad_(False)
    own = with_dualspeed(Trainer)(
        model=model, args=training_arguments(tmp_path / "own"), train_dataset=TinyRows(), data_collator=collate,
        dualspeed=DualSpeedConfig(**SETTINGS),
    )  # fmt: skip
    own.train()
    handle = next(c for c in trainer.callback_handler.callbacks if hasattr(c, "handle")).handle
    assert handle.metrics()["steps_slow"] == own.dualspeed.metrics()["steps_slow"] >= 1
    for key, value in weights(own.model).items():
        # The loss is divided by the labels of the batch and scaled back, which rounds once more; AdamW turns that into
        # up to a learning rate (1e-3) in single weights whose gradient is nearly 0, and 1e-5 in all others.
        torch.testing.assert_close(weights(trainer.model)[key], value, atol=1e-4, rtol=0)


def test_the_name_of_another_callback_is_not_taken(makers: dict[str, Any]) -> None:
    with pytest.raises(SettingError, match=r"early_stop"):
        register(SETTINGS, name="early_stop")
    register(SETTINGS)
    register({**SETTINGS, "keep_ratio": 0.5})
    assert makers["dualspeed"].config.keep_ratio == 0.5, "our own name may be registered again"


@pytest.mark.parametrize("name", ["enable_dft_loss", "loss_type"])
def test_a_loss_of_its_own_is_refused(makers: dict[str, Any], tmp_path: Path, name: str) -> None:
    register(SETTINGS)
    with pytest.raises(SettingError, match=rf"{name}=.*no place beside DualSpeed"):
        swift_trainer(makers, tmp_path, **{name: True})


def test_packing_and_split_rows_are_refused(makers: dict[str, Any], monkeypatch: Any, tmp_path: Path) -> None:
    register(SETTINGS)
    monkeypatch.setattr(Template, "packing", True)
    with pytest.raises(SettingError, match=r"packing=True"):
        swift_trainer(makers, tmp_path)
    monkeypatch.setattr(Template, "packing", False)
    monkeypatch.setattr(Template, "sequence_parallel_size", 2)
    with pytest.raises(SettingError, match=r"sequence_parallel_size=2"):
        swift_trainer(makers, tmp_path)


def test_an_unknown_field_is_named_with_the_nearest(makers: dict[str, Any]) -> None:
    with pytest.raises(SettingError, match=r"keep_rate.*keep_ratio"):
        register({"keep_rate": 0.1})


def test_without_ms_swift_the_message_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "swift", None)
    with pytest.raises(MissingExtraError, match="pip install -U ms-swift"):
        register(SETTINGS)


@pytest.mark.parametrize("wrong", [0.1, "divprune", []])
def test_settings_that_are_no_mapping_are_refused(makers: dict[str, Any], wrong: Any) -> None:
    with pytest.raises(
        SettingError, match=r"register\.config must be a DualSpeedConfig, a mapping of its fields, or No"
    ):
        register(wrong)
    assert "dualspeed" not in makers
