"""The table of pruners: names, hints, outside plugins."""

from __future__ import annotations

import pytest
import torch

import trimtab.registry
from trimtab.errors import SettingError
from trimtab.pruners import PRUNERS, Pruner, Selection, build_pruner, pruner_names, register_pruner
from trimtab.registry import Registry

NINE = ["cls_topk", "divprune", "dpp", "grid_pool", "keep_all", "random", "scope", "visionzip", "vispruner"]


class Head(Pruner):
    def select(self, inputs, num_keep):
        self.check(inputs, num_keep)
        index = torch.arange(num_keep).expand(inputs.features.shape[0], num_keep)
        return Selection(index, torch.ones_like(index, dtype=torch.bool))


def test_names():
    assert set(NINE) <= set(pruner_names())
    assert pruner_names() == sorted(pruner_names())
    assert [name for name, _ in PRUNERS.items()] == pruner_names()


def test_unknown_name_names_the_nearest():
    with pytest.raises(SettingError, match=r"Unknown pruner 'divprun'\. Did you mean 'divprune'"):
        build_pruner("divprun")


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("divprune", {"centred": True}),
        ("divprune", {"centered": 1}),
        ("dpp", {"use_text": "yes"}),
        ("grid_pool", {"merge": None}),
        ("scope", {"alpha": -1}),
        ("scope", {"alpha": float("inf")}),
        ("vispruner", {"saliency_share": 1.1}),
        ("visionzip", {"contextual_share": True}),
        ("random", {"seed": 1}),
    ],
)
def test_wrong_options_are_named(name, options):
    with pytest.raises(SettingError, match=next(iter(options))):
        build_pruner(name, options)


def test_taken_name():
    with pytest.raises(SettingError, match="taken by DivPrunePruner"):
        register_pruner("divprune")(Head)


@pytest.mark.parametrize("name", ["Upper", "with-dash", ""])
def test_malformed_name(name):
    with pytest.raises(SettingError, match="lower-case"):
        register_pruner(name)(Head)


def test_wrong_signature_base_and_missing_method():
    class Wrong(Pruner):
        def select(self, inputs, count):
            return None

    class Missing(Pruner):
        pass

    with pytest.raises(SettingError, match=r"must take \(self, inputs, num_keep\), but takes \(self, inputs, count\)"):
        register_pruner("wrong")(Wrong)
    with pytest.raises(SettingError, match="must define select"):
        register_pruner("missing")(Missing)
    with pytest.raises(SettingError, match="must derive from"):
        register_pruner("no_pruner")(dict)
    assert not {"wrong", "missing", "no_pruner"} & set(pruner_names())


def test_outside_plugin(monkeypatch):
    class Point:
        name = "head"

        def load(self):
            return Head

    asked = []
    monkeypatch.setattr(trimtab.registry, "entry_points", lambda group: asked.append(group) or [Point()])
    table = Registry("pruner", Pruner, "trimtab.pruners")
    assert table.names() == ["head"]
    assert table.get("head") is Head
    assert asked == ["trimtab.pruners"]
