"""The plug-in for axolotl, through the interface of its release 0.19: the classes below stand for that interface."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from tests.dualspeed.common import training_arguments
from tests.tiny import TinyRows, collate, tiny_llava, weights
from transformers import Trainer

from trimtab import DualSpeedConfig, with_dualspeed
from trimtab.errors import MissingExtraError, SettingError

NAME = "trimtab.integrations.axolotl"


class BasePlugin:
    """axolotl's `BasePlugin`, as far as it is used."""

    def get_input_args(self) -> str | None:
        return None

    def get_trainer_cls(self, cfg: Any) -> type | None:
        return None


class AxolotlTrainer(Trainer):
    """axolotl's `AxolotlTrainer`, as its builder calls it."""

    def __init__(self, *args: Any, bench_data_collator: Any = None, dataset_tags: Any = None, **kwargs: Any) -> None:
        self.bench_data_collator, self.dataset_tags = bench_data_collator, dataset_tags
        super().__init__(*args, **kwargs)


@pytest.fixture
def plugin(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Load the plug-in as axolotl does: the module by its name, then the class from it."""
    for name, content in {
        "axolotl": {}, "axolotl.integrations": {}, "axolotl.core": {},
        "axolotl.integrations.base": {"BasePlugin": BasePlugin},
        "axolotl.core.trainers": {"AxolotlTrainer": AxolotlTrainer},
    }.items():  # fmt: skip
        module = ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)
    module = importlib.import_module(NAME)
    module._plugin_class.cache_clear()
    yield getattr(module, "DualSpeedPlugin")()  # noqa: B009, the way axolotl takes it
    module._plugin_class.cache_clear()


def settings_of(plugin: Any, given: dict[str, Any]) -> dict[str, Any]:
    """Read a file's settings through the class that the plug-in adds."""
    module, name = plugin.get_input_args().rsplit(".", 1)
    return dict(given, **getattr(importlib.import_module(module), name)(**given).model_dump())


def run(trainer_class: type, out: Path, **settings: Any) -> Any:
    model = tiny_llava()
    model.model.vision_tower.requires_grad_(False)
    trainer = trainer_class(
        model=model, args=training_arguments(out), train_dataset=TinyRows(), data_collator=collate, **settings
    )
    trainer.train()
    return trainer


def test_the_block_of_the_file_trains_as_with_dualspeed(plugin: Any, tmp_path: Path) -> None:
    block = {"keep_ratio": 0.2, "slow_ratio": 0.4, "seed": 3}
    trainer_class = plugin.get_trainer_cls(settings_of(plugin, {"dualspeed": block}))
    assert isinstance(plugin, BasePlugin)
    assert issubclass(trainer_class, AxolotlTrainer)
    found = run(trainer_class, tmp_path / "plugin", bench_data_collator=collate, dataset_tags=["x"])
    expected = run(with_dualspeed(Trainer), tmp_path / "own", dualspeed=DualSpeedConfig(**block))
    assert found.dualspeed.config == expected.dualspeed.config
    assert found.dualspeed.metrics()["steps_slow"] >= 1
    assert found.dataset_tags == ["x"]
    for key, value in weights(expected.model).items():
        assert value.equal(weights(found.model)[key]), key


def test_without_the_block_axolotl_keeps_its_trainer(plugin: Any) -> None:
    assert plugin.get_trainer_cls(settings_of(plugin, {})) is None


def test_an_unknown_field_is_named_with_the_nearest(plugin: Any) -> None:
    with pytest.raises(SettingError, match=r"keep_rate.*keep_ratio"):
        plugin.get_trainer_cls({"dualspeed": {"keep_rate": 0.1}})


@pytest.mark.parametrize("name", ["sample_packing", "rl", "kd_trainer"])
def test_what_clashes_is_refused_by_name(plugin: Any, name: str) -> None:
    with pytest.raises(SettingError, match=rf"{name}=.*no place beside `dualspeed`"):
        plugin.get_trainer_cls({"dualspeed": {}, name: True})


def test_without_axolotl_the_message_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "axolotl", None)
    module = importlib.import_module(NAME)
    module._plugin_class.cache_clear()
    with pytest.raises(MissingExtraError, match="pip install axolotl"):
        module.DualSpeedPlugin  # noqa: B018, making it is the point
    with pytest.raises(AttributeError, match="Nothing"):
        module.Nothing  # noqa: B018
