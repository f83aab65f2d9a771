"""Settings of tokens that leave inside the language model: ranges, models, files, resumed runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tests.conformance.families import SUITE
from tests.dualspeed.common import ROWS, attached, portrait, training_arguments
from tests.dualspeed.inside_tools import AFTER, deep_llava, settings
from tests.tiny import TinyRows, collate, weights
from torch import Tensor, equal
from transformers import Trainer

import trimtab
from trimtab import DualSpeedConfig
from trimtab.anatomy import open_host
from trimtab.anatomy.drop_inside import drop_inside
from trimtab.anatomy.drop_stages import vtw_stages
from trimtab.dualspeed.inside import DropsInside
from trimtab.dualspeed.inside_options import INSIDE
from trimtab.errors import NotSupportedError, SettingError, TrimtabWarning, WrongOrderError
from trimtab.run.config import build_config, load_config


@pytest.fixture
def llava() -> Any:
    return deep_llava()


# settings -------------------------------------------------------------------------------------------------------------

BAD: list[tuple[dict[str, Any], list[str]]] = [
    ({"inside": "half"}, ["DualSpeedConfig.inside must be one of", *INSIDE, "'half' came"]),
    ({"inside": True}, ["DualSpeedConfig.inside must be", "True came"]),
    ({"inside": "vtw", "packing": True}, ["inside must be None with packing=True", "'vtw' came", "Set packing=False"]),
    ({"inside_options": {"layer": 3}}, ["inside_options must be empty without inside", "'layer': 3", "Set inside to"]),
    ({"inside": "vtw", "inside_options": [3]}, ["inside_options must be a mapping by name", "[3] came"]),
    ({"inside": "vtw", "inside_options": {"layr": 3}}, ["inside='vtw'", "'layr'", "Did you mean 'layer'"]),
    ({"inside": "vtw", "inside_options": {"layer": 0}}, ["inside_options['layer']", "at least 1", "0 came"]),
    ({"inside": "vtw", "inside_options": {"layer": True}}, ["inside_options['layer']", "at least 1", "True came"]),
    ({"inside": "vtw", "inside_options": {"sink_tokens": -1}}, ["['sink_tokens']", "at least 0", "-1 came"]),
    ({"inside": "vtw", "inside_options": {"keep_newlines": 1}}, ["['keep_newlines']", "true or false", "1 came"]),
    ({"inside": "fastv", "inside_options": {"keep_ratio": 1}}, ["['keep_ratio']", "in (0, 1)", "1 came"]),
    ({"inside": "fastv", "inside_options": {"layers": [1]}}, ["'layers'", "Did you mean 'layer'"]),
    ({"inside": "pyramid_drop", "inside_options": {"layers": [3, 2]}}, ["['layers']", "rising", "[3, 2] came"]),
    ({"inside": "pyramid_drop", "inside_options": {"layers": []}}, ["['layers']", "rising", "[] came"]),
    ({"inside": "pyramid_drop", "inside_options": {"keep_ratios": [0.2, 0.4, 0.1]}},
     ["['keep_ratios']", "falling numbers in (0, 1)", "[0.2, 0.4, 0.1] came"]),
    ({"inside": "pyramid_drop", "inside_options": {"layers": [1, 2]}},
     ["['keep_ratios']", "layers has 2", "[0.5, 0.25, 0.125] came", "together"]),
    ({"inside": "pyramid_drop", "inside_options": {"keep_ratios": [0.5]}}, ["the default has 3", "[0.5] came"]),
]  # fmt: skip


@pytest.mark.parametrize(("given", "words"), BAD, ids=[str(number) for number in range(len(BAD))])
def test_a_bad_setting_is_told(given: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(SettingError) as raised:
        DualSpeedConfig(**given)
    assert all(word in str(raised.value) for word in words), str(raised.value)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (settings("vtw", inside_options={"layer": 4}),
         ["inside_options['layer'] must be from 1 to 3", "4 layers", "4 came"]),
        (settings("pyramid_drop", inside_options={"layers": [2, 9], "keep_ratios": [0.5, 0.2]}),
         ["inside_options['layers'] must be from 1 to 3", "[2, 9] came", "Name the layers"]),
        (settings("vtw", inside_options={"layer": 2, "keep_newlines": True}),
         ["inside_options['keep_newlines'] must be False for Llava", "image_newline", "True came", "text and stay"]),
        (settings("vtw", {"pruner": "keep_all"}), ["isolator_tokens must be 0 with pruner='keep_all'", "4 came"]),
    ],
)  # fmt: skip
def test_a_setting_that_the_model_cannot_meet_is_told_and_changes_nothing(
    llava: Any, given: dict[str, Any], words: list[str]
) -> None:
    before = portrait(llava)
    with pytest.raises(SettingError) as raised:
        trimtab.attach(llava, DualSpeedConfig(**given))
    assert all(word in str(raised.value) for word in words), str(raised.value)
    assert portrait(llava) == before


def test_a_model_whose_layers_must_all_see_is_refused() -> None:
    model = SUITE["qwen3_vl"].build_model()
    with pytest.raises(SettingError, match=r"inside must be None for Qwen3VL.*first 2 must see.*'fastv' came"):
        trimtab.attach(model, DualSpeedConfig(**settings("fastv", inside_options={})))


def test_layers_with_windows_are_refused() -> None:
    model = SUITE["gemma3"].build_model()
    before = portrait(model)
    with pytest.raises(NotSupportedError, match="sliding_attention"):
        trimtab.attach(model, DualSpeedConfig(**settings("vtw", inside_options={"layer": 1})))
    assert portrait(model) == before


def test_an_isolator_that_cannot_be_loaded_leaves_no_hooks(llava: Any, tmp_path: Path) -> None:
    before = portrait(llava)
    with pytest.raises(OSError, match="isolator"):
        trimtab.attach(llava, DualSpeedConfig(**settings("vtw", AFTER, isolator_from=str(tmp_path))))
    assert portrait(llava) == before


def test_defaults_are_those_of_the_papers(llava: Any) -> None:
    for way, expected in (("vtw", [2]), ("fastv", [2]), ("pyramid_drop", [1, 2, 3])):
        with attached(llava, **settings(way, inside_options={})) as handle:
            stages = handle._view.inside.stages
            assert [stage.layer for stage in stages] == expected
            kept = [stage.kept(576) for stage in stages]
            assert kept == {"vtw": [0], "fastv": [288], "pyramid_drop": [288, 144, 72]}[way]


def test_it_is_no_idle_setting(llava: Any) -> None:
    config = DualSpeedConfig(**settings("vtw", slow_ratio=0.0))
    assert config.keeps_all
    assert not config.drops_nothing
    assert not config.prunes_nothing
    with pytest.warns(TrimtabWarning, match="slow_ratio=0"):
        handle = trimtab.attach(llava, config)
    handle.detach()


def test_balancing_losses_are_refused() -> None:
    family = SUITE["glm4v_moe"]
    model = family.build_model().train()
    batch = family.make_batch(model, ROWS)
    given = settings("vtw", inside_options={"layer": 1})
    with attached(model, **given) as handle, handle.force_mode("fast"):
        model(**batch)
        model.config.get_text_config().output_router_logits = True
        with pytest.raises(NotSupportedError, match=r"inside='vtw'.*output_router_logits=True.*Set .* to False"):
            model(**batch)


def test_a_second_drop_on_the_model_is_refused(llava: Any) -> None:
    with attached(llava, **settings("vtw")), pytest.raises(WrongOrderError, match=r"inside='vtw'"):
        drop_inside(llava, vtw_stages(1), owner="withdraw")


def test_settings_survive_files(tmp_path: Path) -> None:
    config = DualSpeedConfig(**settings("pyramid_drop", inside_options={"layers": (1, 2), "keep_ratios": (0.5, 0.1)}))
    assert config.inside_options == {"layers": [1, 2], "keep_ratios": [0.5, 0.1]}
    assert DualSpeedConfig.from_dict(config.to_dict()) == config
    block = {"inside": "vtw", "inside_options": {"layer": 3}, "pruner": "keep_all", "isolator_tokens": 0}
    built = build_config({"model_name_or_path": "m", "data_files": "t", "output_dir": "o", "dualspeed": block})
    assert built.dualspeed == DualSpeedConfig(**block)


def test_the_command_line_reaches_the_options(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("model_name_or_path: m\ndata_files: t\noutput_dir: o\ndualspeed: {pruner: keep_all}\n")
    given = ["--dualspeed.inside", "pyramid_drop", "--dualspeed.inside_options.layers", "2"]
    given += ["--dualspeed.inside_options.keep_ratios", "0.25"]
    found = load_config(path, given).dualspeed
    assert found is not None
    assert found.inside_options == {"layers": [2], "keep_ratios": [0.25]}


# runs -----------------------------------------------------------------------------------------------------------------


def trained(out: Path, resume: bool = False, **changes: Any) -> tuple[list[float], dict[str, Tensor]]:
    model = deep_llava()
    arguments = training_arguments(out, max_steps=4, save_strategy="steps", save_steps=2, **changes)
    trainer = trimtab.with_dualspeed(Trainer)(
        model=model, args=arguments, train_dataset=TinyRows(), data_collator=collate,
        dualspeed=DualSpeedConfig(**settings("fastv", AFTER, slow_ratio=0.5)),
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=str(out / "checkpoint-2") if resume else None)
    return [entry["visual_tokens_deep"] for entry in trainer.state.log_history if "loss" in entry], weights(model)


def test_a_resumed_run_ends_where_the_whole_one_does(tmp_path: Path) -> None:
    deep, expected = trained(tmp_path)
    assert len(deep) == 4
    assert min(deep) < max(deep), "fast and slow steps"
    _, found = trained(tmp_path, resume=True)
    for name, one in expected.items():
        assert equal(found[name], one), name


def test_side_files_of_other_settings_are_told(llava: Any, tmp_path: Path) -> None:
    with attached(llava, **settings("vtw")) as handle:
        handle.save_pretrained(tmp_path)
    with attached(llava, **settings("fastv")) as handle, pytest.warns(TrimtabWarning) as told:
        handle.load_pretrained(tmp_path)
    assert "inside='vtw', now 'fastv'" in str(told[0].message)
    assert "inside_options={'layer': 2}" in str(told[0].message)
    with attached(llava, **settings("vtw")) as handle:
        handle.load_pretrained(tmp_path)


def test_nothing_to_drop_inside_is_refused(llava: Any) -> None:
    with pytest.raises(SettingError, match=r"DualSpeedConfig\.inside must be one of fastv.* here, but None came"):
        DropsInside(open_host(llava), DualSpeedConfig())
