"""A cached tower trains as the tower itself does, is not run again, and refuses what it is not of."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.conformance.families import llava as relatives
from tests.dualspeed.common import ROWS, SUM_ORDER, attached
from tests.tiny import FAMILIES as TINY

from trimtab import DualSpeedConfig
from trimtab.anatomy import encode_images, open_host
from trimtab.anatomy.tower_cache import tower_of
from trimtab.dualspeed.cache import TowerCache
from trimtab.dualspeed.cache_choice import choice_trouble
from trimtab.dualspeed.cache_keys import ENTRY, KeyImages, image_keys
from trimtab.dualspeed.cache_store import MANIFEST
from trimtab.dualspeed.view import FastView
from trimtab.errors import DataError, OutputError, SettingError, TrimtabWarning
from trimtab.pruners import build_pruner

Model = Any
FAMILIES = {**TINY, **{family.name: family for family in relatives.FAMILIES}}
PICKY = {"pruner": "divprune", "pruner_options": {"pre_projector": True}, "keep_ratio": 0.25}
"""A pruner whose choice follows from the tower alone."""


def build(family: str) -> tuple[Model, list[dict[str, Any]]]:
    """Return a model in training mode whose tower is frozen, and three batches."""
    model = FAMILIES[family].build_model()
    for parameter in tower_of(open_host(model)).parameters():
        parameter.requires_grad_(False)
    return model.train(), [FAMILIES[family].make_batch(model, ROWS, seed=seed) for seed in range(3)]


def fill(folder: Path, model: Model, batches: list[dict[str, Any]], kind: str = "features", **settings: Any) -> None:
    """Make a cache of some batches."""
    how = {name: settings.pop(name) for name in ("dtype", "on_stale", "precision") if name in settings}
    config = DualSpeedConfig(**settings)
    view = FastView(open_host(model), config)
    cache = TowerCache(folder, view.host, config, view.pruner, write=True, kind=kind, **{"dtype": "float32", **how})
    view.cache = cache
    with cache.store, torch.no_grad():
        for batch in batches:
            encoded, layout = view.encode(batch)
            view.choose(batch, encoded, layout, 0)


def tiles_seen(model: Model, batch: dict[str, Any]) -> int:
    """Return how many tiles of a batch the tower sees."""
    with counted(model) as seen, torch.no_grad():
        encode_images(model, batch)
    return sum(seen)


@contextmanager
def counted(model: Model) -> Iterator[list[int]]:
    """Count the tiles that pass through the first part of the real tower."""
    seen: list[int] = []
    first = tower_of(open_host(model)).embeddings
    hook = first.register_forward_hook(lambda module, args, output: seen.append(output.shape[0]))
    try:
        yield seen
    finally:
        hook.remove()


def train(
    model: Model, batches: list[dict[str, Any]], **settings: Any
) -> tuple[list[float], dict[str, Any], dict[str, Any]]:
    """Train a copy for one epoch, fast and slow by turns; return losses, last gradients and last metrics."""
    model = copy.deepcopy(model)
    losses = []
    with attached(model, slow_ratio=0.5, **settings) as handle:
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
        for step, batch in enumerate(batches * 2):
            with handle.force_mode("slow" if step % 2 else "fast"):
                optimizer.zero_grad()
                loss = model(**batch).loss
                loss.backward()
                optimizer.step()
                losses.append(loss.item())
        gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        return losses, gradients, handle.metrics()


@pytest.mark.parametrize("family", ["llava", "llava_next", "llava_onevision"])
@pytest.mark.parametrize("pruner", ["divprune", "cls_topk", "visionzip"])
def test_training_on_stored_features_is_training_bit_for_bit(family: str, pruner: str, tmp_path: Path) -> None:
    model, batches = build(family)
    settings = {"pruner": pruner, "keep_ratio": 0.25}
    fill(tmp_path / "cache", model, batches, **settings)
    losses, gradients, _ = train(model, batches, **settings)
    with counted(model) as seen:
        cached = train(model, batches, cache_from=str(tmp_path / "cache"), **settings)
    assert seen == []
    assert cached[0] == losses
    assert cached[1].keys() == gradients.keys()
    for name, gradient in gradients.items():
        assert torch.equal(cached[1][name], gradient), name
    tiles = sum(tiles_seen(model, batch) for batch in batches)
    assert {name: cached[2][name] for name in ("cache_hits", "cache_misses", "cache_broken")} == {
        "cache_hits": 2 * tiles, "cache_misses": 0, "cache_broken": 0,
    }  # fmt: skip


@pytest.mark.parametrize("family", ["llava", "llava_next"])
@pytest.mark.parametrize("kind", ["kept", "indices"])
def test_training_on_stored_choices_is_training_bit_for_bit(family: str, kind: str, tmp_path: Path) -> None:
    model, batches = build(family)
    fill(tmp_path / "cache", model, batches, kind, **PICKY)
    losses, gradients, _ = train(model, batches, **PICKY)
    cached = train(model, batches, cache_from=str(tmp_path / "cache"), **PICKY)
    assert cached[0] == losses
    for name, gradient in gradients.items():
        assert torch.equal(cached[1][name], gradient), name
    assert cached[2]["cache_hits"] == 2 * sum(len(image_keys(batch) or ()) for batch in batches)
    assert cached[2]["cache_misses"] == 0


@pytest.mark.parametrize("family", ["llava", "llava_next"])
def test_kept_states_spare_the_tower_in_fast_steps_only(family: str, tmp_path: Path) -> None:
    model, batches = build(family)
    fill(tmp_path / "cache", model, batches, "kept", **PICKY)
    with attached(model, cache_from=str(tmp_path / "cache"), **PICKY) as handle, counted(model) as seen:
        with handle.force_mode("fast"):
            model(**batches[0]).loss.backward()
        assert seen == []
        with handle.force_mode("slow"):
            model(**batches[0]).loss.backward()
    assert seen == [tiles_seen(model, batches[0])]


def test_kept_states_serve_the_fast_rows_of_a_batch_of_both_modes(tmp_path: Path) -> None:
    model, batches = build("llava")
    fill(tmp_path / "cache", model, batches, "kept", **PICKY)
    view = FastView(open_host(model), DualSpeedConfig(**PICKY))
    view.cache = TowerCache(tmp_path / "cache", view.host, view.config, view.pruner)
    plain = FastView(view.host, view.config)
    with torch.no_grad(), counted(model) as seen:
        encoded, layout = view.encode(batches[0], [0])  # one of three images stands in row 0
        kept = view.choose(batches[0], encoded, layout, 0)
        assert seen == [1]
        whole, _ = plain.encode(batches[0])
        wanted = plain.choose(batches[0], whole, layout, 0)
    torch.testing.assert_close(encoded.blocks[0], whole.blocks[0])
    for mine, index, block in zip(kept.index, wanted.index, whole.blocks, strict=True):
        assert torch.equal(mine, index)
        assert block.shape == encoded.blocks[0].shape
    for mine, tokens in zip(kept.tokens, wanted.tokens, strict=True):
        torch.testing.assert_close(mine, tokens)


@pytest.mark.parametrize("kind", ["features", "kept", "indices"])
def test_what_is_missing_is_made_and_counted(kind: str, tmp_path: Path) -> None:
    model, batches = build("llava_next")
    fill(tmp_path / "cache", model, batches[:2], kind, **PICKY)
    losses, _, _ = train(model, batches, **PICKY)
    cached, _, metrics = train(model, batches, cache_from=str(tmp_path / "cache"), **PICKY)
    torch.testing.assert_close(cached, losses, **SUM_ORDER)
    missing = tiles_seen(model, batches[2]) if kind == "features" else sum(ROWS)
    assert metrics["cache_misses"] == 2 * missing


def test_a_changed_image_is_another_image(tmp_path: Path) -> None:
    model, batches = build("llava")
    fill(tmp_path / "cache", model, batches, keep_ratio=0.25)
    batches[0]["pixel_values"][1, 0, 0, 0] += 1e-3
    metrics = train(model, batches[:1], keep_ratio=0.25, cache_from=str(tmp_path / "cache"))[2]
    assert (metrics["cache_hits"], metrics["cache_misses"]) == (4, 2)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_fewer_bits_give_the_features_of_those_bits(dtype: str, tmp_path: Path) -> None:
    model, batches = build("llava")
    fill(tmp_path / "cache", model, batches, dtype=dtype, keep_ratio=0.25)
    view = FastView(open_host(model), DualSpeedConfig(keep_ratio=0.25))
    with torch.no_grad():
        exact, _ = view.encode(batches[0])
        view.cache = TowerCache(tmp_path / "cache", view.host, view.config, view.pruner)
        rounded, _ = view.encode(batches[0])
    assert rounded.blocks[0].dtype == exact.blocks[0].dtype
    assert not torch.equal(rounded.blocks[0], exact.blocks[0])
    torch.testing.assert_close(rounded.blocks[0], exact.blocks[0], atol=0.05, rtol=0.05)


def test_a_tile_that_comes_twice_is_made_once(tmp_path: Path) -> None:
    model, batches = build("llava")
    batch = batches[0]
    batch["pixel_values"] = batch["pixel_values"][:1].repeat(3, 1, 1, 1)
    with counted(model) as seen:
        fill(tmp_path / "cache", model, [batch, batch], keep_ratio=0.25)
    assert seen == [1]


def test_a_half_precision_model_gets_its_own_number_format_back(tmp_path: Path) -> None:
    model, batches = build("llava")
    model = model.to(torch.bfloat16)
    fill(tmp_path / "cache", model, batches, dtype="bfloat16", keep_ratio=0.25)
    losses, _, _ = train(model, batches, keep_ratio=0.25)
    cached, _, metrics = train(model, batches, keep_ratio=0.25, cache_from=str(tmp_path / "cache"))
    assert cached == losses
    assert metrics["cache_misses"] == 0


# keys ---------------------------------------------------------------------------------------------------------------


def collate(rows: list[dict[str, Any]]) -> dict[str, Any]:
    return dict(rows[0])


@pytest.mark.parametrize("family", ["llava", "llava_next"])
def test_keys_of_the_collator_are_those_of_the_step_and_the_model_never_sees_them(family: str, tmp_path: Path) -> None:
    model, batches = build(family)
    fill(tmp_path / "cache", model, batches, keep_ratio=0.25)
    collator = pickle.loads(pickle.dumps(KeyImages(collate)))
    keyed = [collator([batch]) for batch in batches]
    assert keyed[0][ENTRY] == image_keys(batches[0])
    settings = {"keep_ratio": 0.25, "cache_from": str(tmp_path / "cache")}
    assert train(model, keyed, **settings)[0] == train(model, batches, **settings)[0]
    with attached(model, **settings):
        model.eval()
        with torch.no_grad():
            torch.testing.assert_close(model(**keyed[0]).loss, model(**batches[0]).loss, atol=0, rtol=0)


def test_keys_follow_bytes_shape_and_number_format_and_text_has_none() -> None:
    values = torch.arange(24.0).view(2, 3, 2, 2)
    keys = image_keys({"pixel_values": values}) or ()
    assert keys == (image_keys({"pixel_values": values[:1]}) or ()) + (image_keys({"pixel_values": values[1:]}) or ())
    others = (values.view(2, 3, 1, 4), values.view(torch.int32), values.nextafter(values + 1), values.flip(0))
    assert all(image_keys({"pixel_values": other}) != keys for other in others)
    assert image_keys({"pixel_values": values[None]}) == ((keys[0][0], keys[1][0]),)
    assert image_keys({"input_ids": torch.ones(1, 3)}) is None
    assert KeyImages(lambda rows: {"input_ids": rows})([1]) == {"input_ids": [1]}


def test_a_real_tile_of_zeros_is_served_all_the_same(tmp_path: Path) -> None:
    model, batches = build("llava_next")
    batches[0]["pixel_values"][0, 1] = 0
    settings = {"keep_ratio": 0.25}
    fill(tmp_path / "cache", model, batches, **settings)
    losses, _, _ = train(model, batches, **settings)
    cached, _, metrics = train(model, batches, cache_from=str(tmp_path / "cache"), **settings)
    assert cached == losses
    assert metrics["cache_misses"] == 0


# bad input ------------------------------------------------------------------------------------------------------------


def test_a_tower_that_trains_is_refused(tmp_path: Path) -> None:
    model, batches = build("llava")
    fill(tmp_path, model, batches, keep_ratio=0.25)
    next(tower_of(open_host(model)).parameters()).requires_grad_(True)
    with (
        pytest.raises(SettingError, match=r"tower trains .*class_embedding.*Freeze it"),
        attached(model, keep_ratio=0.25, cache_from=str(tmp_path)),
    ):
        pass


def test_a_tower_that_is_thawed_later_is_refused_at_the_next_step(tmp_path: Path) -> None:
    model, batches = build("llava")
    fill(tmp_path, model, batches, keep_ratio=0.25)
    with attached(model, keep_ratio=0.25, cache_from=str(tmp_path)):
        next(tower_of(open_host(model)).parameters()).requires_grad_(True)
        with pytest.raises(SettingError, match="tower trains"):
            model(**batches[0])


def other_weights(model: Model) -> None:
    with torch.no_grad():
        next(tower_of(open_host(model)).parameters()).add_(1e-4)


def other_layer(model: Model) -> None:
    model.config.vision_feature_layer = -1


def other_strategy(model: Model) -> None:
    model.config.vision_feature_select_strategy = "full"


def other_format(model: Model) -> None:
    model.to(torch.bfloat16)


@pytest.mark.parametrize(
    ("change", "named"),
    [(other_weights, "tower.weights"), (other_layer, "tower.layer"), (other_strategy, "tower.select"),
     (other_format, "tower.weights")],
)  # fmt: skip
def test_a_cache_of_another_tower_is_refused_by_name(
    change: Callable[[Model], None], named: str, tmp_path: Path
) -> None:
    model, batches = build("llava")
    fill(tmp_path, model, batches, keep_ratio=0.25)
    change(model)
    with (
        pytest.raises(SettingError, match=rf"of something else: {named}"),
        attached(model, keep_ratio=0.25, cache_from=str(tmp_path)),
    ):
        pass


@pytest.mark.parametrize(
    ("changed", "named"),
    [({"keep_ratio": 0.5}, "pruning.keep_ratio: 0.25 there, 0.5 here"),
     ({"keep_rule": "ceil"}, "pruning.keep_rule"),
     ({"isolator_tokens": 0}, "pruning.isolator_tokens"),
     ({"pruner": "cls_topk", "pruner_options": {}}, "pruning.pruner"),
     ({"pruner_options": {"pre_projector": True, "centered": True}}, "pruning.pruner_options.centered")],
)  # fmt: skip
def test_a_choice_of_other_pruning_is_refused_by_name(changed: dict[str, Any], named: str, tmp_path: Path) -> None:
    model, batches = build("llava")
    fill(tmp_path, model, batches, "kept", **PICKY)
    with pytest.raises(SettingError, match=named), attached(model, cache_from=str(tmp_path), **{**PICKY, **changed}):
        pass


def test_a_stale_cache_is_refused_when_it_is_to_grow_and_rebuilt_on_request(tmp_path: Path) -> None:
    model, batches = build("llava")
    fill(tmp_path, model, batches, keep_ratio=0.25)
    other_weights(model)
    with pytest.raises(SettingError, match=r"tower.weights.*on-stale rebuild"):
        fill(tmp_path, model, batches, keep_ratio=0.25)
    fill(tmp_path, model, batches, keep_ratio=0.25, on_stale="rebuild")
    metrics = train(model, batches, keep_ratio=0.25, cache_from=str(tmp_path))[2]
    assert (metrics["cache_misses"], metrics["cache_broken"]) == (0, 0)


def test_features_without_what_a_pruner_observes_are_refused(tmp_path: Path) -> None:
    model, batches = build("llava")
    fill(tmp_path, model, batches, keep_ratio=0.25)
    with (
        pytest.raises(SettingError, match=r"lacks cls_attention, which the pruner 'cls_topk' needs"),
        attached(model, pruner="cls_topk", keep_ratio=0.25, cache_from=str(tmp_path)),
    ):
        pass


def test_features_with_more_than_a_pruner_observes_serve_it(tmp_path: Path) -> None:
    model, batches = build("llava")
    fill(tmp_path, model, batches, pruner="visionzip", keep_ratio=0.25)
    assert train(model, batches, keep_ratio=0.25, cache_from=str(tmp_path))[2]["cache_misses"] == 0


def test_another_precision_is_refused(tmp_path: Path) -> None:
    model, batches = build("llava")
    fill(tmp_path, model, batches, keep_ratio=0.25)
    with attached(model, keep_ratio=0.25, cache_from=str(tmp_path)) as handle:
        handle.autocast = lambda: torch.autocast("cpu", torch.bfloat16)
        with pytest.raises(SettingError, match="under autocast None, but here it runs under 'bfloat16'"):
            model(**batches[0])


def test_a_model_without_a_known_tower_is_refused(tmp_path: Path) -> None:
    model = FAMILIES["qwen2_5_vl"].build_model()
    config = DualSpeedConfig(keep_ratio=0.25)
    with pytest.raises(SettingError, match=r"cannot be cached.*Qwen2_5_VLForConditionalGeneration has no vision tower"):
        TowerCache(tmp_path, open_host(model), config, build_pruner("divprune"), write=True)


def test_a_tower_with_dropout_is_refused(tmp_path: Path) -> None:
    model, batches = build("llava")
    model.config.vision_config.attention_dropout = 0.1
    with pytest.raises(SettingError, match=r"dropout of 0\.1"):
        fill(tmp_path, model, batches, keep_ratio=0.25)


def test_no_cache_and_no_such_kind_are_told(tmp_path: Path) -> None:
    model, batches = build("llava")
    with (
        pytest.raises(DataError, match=r"no cache in .*trimtab cache RUN.yaml"),
        attached(model, keep_ratio=0.25, cache_from=str(tmp_path)),
    ):
        pass
    with pytest.raises(SettingError, match="kind must be one of features, kept, indices, but 'all' came"):
        fill(tmp_path, model, batches, "all", **PICKY)
    with pytest.raises(SettingError, match="dtype must be one of float32, bfloat16, float16, but 'int8' came"):
        fill(tmp_path, model, batches, dtype="int8", **PICKY)


@pytest.mark.parametrize(
    ("pruner", "options", "reason"),
    [("divprune", {}, "projected features.*pre_projector"),
     ("divprune", {"pre_projector": True}, ""),
     ("cls_topk", {}, ""),
     ("vispruner", {}, "projected features.*saliency_share=1"),
     ("vispruner", {"saliency_share": 1}, ""),
     ("visionzip", {}, "merges.*contextual_share=0"),
     ("visionzip", {"contextual_share": 0}, ""),
     ("scope", {}, "projected features"),
     ("dpp", {}, "projected features"),
     ("grid_pool", {}, ""),
     ("grid_pool", {"merge": True}, "merges"),
     ("random", {}, "draws anew"),
     ("keep_all", {}, "no choice")],
)  # fmt: skip
def test_a_choice_is_stored_only_where_the_projector_has_no_say(
    pruner: str, options: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    """The table is held to the truth: with another projector the choice stays, or may move."""
    trouble = choice_trouble(pruner, build_pruner(pruner, options))
    model, batches = build("llava")
    settings = {"pruner": pruner, "pruner_options": options, "keep_ratio": 0.25, "isolator_tokens": 0}
    if reason:
        with pytest.raises(SettingError, match=rf"cannot be stored \(kind 'kept'\): .*{reason}"):
            fill(tmp_path, model, batches, "kept", **settings)
        return
    assert trouble == ""
    view = FastView(open_host(model), DualSpeedConfig(**settings))
    chosen = []
    for _ in range(2):
        with torch.no_grad():
            encoded, layout = view.encode(batches[0])
            kept = view.choose(batches[0], encoded, layout, len(chosen))
            chosen.append(kept.index)
            for block, index, tokens in zip(encoded.blocks, kept.index, kept.tokens, strict=True):
                torch.testing.assert_close(block[index], tokens)
            model.model.multi_modal_projector.linear_1.weight.mul_(-1)
    assert all(torch.equal(one, two) for one, two in zip(*chosen, strict=True))


@pytest.mark.parametrize("spread", ["random", "content"])
def test_a_choice_whose_number_changes_is_not_stored(spread: str, tmp_path: Path) -> None:
    model, batches = build("llava")
    with pytest.raises(SettingError, match=f"keep_spread='{spread}'"):
        fill(tmp_path, model, batches, "indices", keep_spread=spread, **PICKY)


def test_mixed_tokens_are_not_stored_as_kept(tmp_path: Path) -> None:
    model, batches = build("llava_onevision")
    with pytest.raises(SettingError, match="LLaVA-OneVision cannot be stored"):
        fill(tmp_path, model, batches, "kept", **PICKY)
    fill(tmp_path, model, batches, "indices", **PICKY)


def test_processes_in_lockstep_may_not_miss(tmp_path: Path) -> None:
    model, batches = build("llava")
    fill(tmp_path, model, batches[:1], keep_ratio=0.25)
    view = FastView(open_host(model), DualSpeedConfig(keep_ratio=0.25))
    view.cache = TowerCache(tmp_path, view.host, view.config, view.pruner)
    view.cache.require_hits = True
    with torch.no_grad():
        view.encode(batches[0])
        with pytest.raises(DataError, match="3 tiles of a batch are not in the cache"):
            view.encode(batches[1])


# damage ---------------------------------------------------------------------------------------------------------------


def shard(folder: Path) -> Path:
    (found,) = folder.glob("shard-*.safetensors")
    return found


def test_a_flipped_byte_costs_one_entry_and_is_told_once(tmp_path: Path) -> None:
    model, batches = build("llava")
    settings = {"keep_ratio": 0.25}
    fill(tmp_path, model, batches, **settings)
    content = bytearray(shard(tmp_path).read_bytes())
    content[-100] ^= 1  # the tables stand in front of the states, or behind them; both must be seen
    shard(tmp_path).write_bytes(content)
    losses, _, _ = train(model, batches, **settings)
    with pytest.warns(TrimtabWarning, match="is damaged") as told:
        cached, _, metrics = train(model, batches, cache_from=str(tmp_path), **settings)
    assert len([one for one in told if issubclass(one.category, TrimtabWarning)]) == 1
    torch.testing.assert_close(cached, losses, **SUM_ORDER)
    assert metrics["cache_broken"] == 1
    assert metrics["cache_misses"] >= 2


def test_another_manifest_over_the_same_shards_is_believed_in_nothing(tmp_path: Path) -> None:
    model, batches = build("llava")
    fill(tmp_path, model, batches, keep_ratio=0.25)
    other_weights(model)
    fill(tmp_path / "other", model, batches, keep_ratio=0.25)
    (tmp_path / MANIFEST).write_text((tmp_path / "other" / MANIFEST).read_text())
    with pytest.warns(TrimtabWarning, match="belongs to another cache"):
        metrics = train(model, batches, keep_ratio=0.25, cache_from=str(tmp_path))[2]
    assert metrics["cache_hits"] == 0


def test_a_damaged_manifest_is_told_and_mended_where_the_shards_agree(tmp_path: Path) -> None:
    model, batches = build("llava")
    fill(tmp_path, model, batches, keep_ratio=0.25)
    (tmp_path / MANIFEST).write_text("{")
    with (
        pytest.raises(DataError, match=r"manifest.json is damaged.*on-stale rebuild"),
        attached(model, keep_ratio=0.25, cache_from=str(tmp_path)),
    ):
        pass
    with counted(model) as seen:
        fill(tmp_path, model, batches, keep_ratio=0.25)
    assert seen == []
    assert json.loads((tmp_path / MANIFEST).read_text())["facts"]["kind"] == "features"


def test_a_second_writer_is_refused_and_a_reader_is_not(tmp_path: Path) -> None:
    model, batches = build("llava")
    fill(tmp_path, model, batches, keep_ratio=0.25)
    view = FastView(open_host(model), DualSpeedConfig(keep_ratio=0.25))
    make = {"folder": tmp_path, "host": view.host, "config": view.config, "pruner": view.pruner}
    writer = TowerCache(**make, write=True, dtype="float32")
    with pytest.raises(OutputError, match="is writing the cache"):
        TowerCache(**make, write=True, dtype="float32")
    assert len(TowerCache(**make).store) == 9
    writer.close()
    TowerCache(**make, write=True, dtype="float32").close()


@pytest.mark.parametrize("kind", ["features", "indices"])
def test_other_weights_loaded_later_are_refused(kind: str, tmp_path: Path) -> None:
    model, batches = build("llava")
    fill(tmp_path, model, batches, kind, **PICKY)
    with attached(model, cache_from=str(tmp_path), **PICKY) as handle:
        model.load_state_dict({name: value.clone() for name, value in model.state_dict().items()})
        model(**batches[0])
        assert handle.metrics()["cache_misses"] == 0, "the same weights again are the same tower"
        other_weights(model)
        with pytest.raises(SettingError, match=r"tower\.weights"):
            model(**batches[0])


def test_stored_indices_of_another_precision_are_refused(tmp_path: Path) -> None:
    model, batches = build("llava")
    fill(tmp_path, model, batches, "indices", **PICKY)
    with (
        attached(model, cache_from=str(tmp_path), **PICKY),
        torch.autocast("cpu", torch.bfloat16),
        pytest.raises(SettingError, match="under autocast None, but here it runs under 'bfloat16'"),
    ):
        model(**batches[0])


def test_kept_states_do_not_serve_processes_in_lockstep(tmp_path: Path) -> None:
    model, batches = build("llava")
    fill(tmp_path, model, batches, "kept", **PICKY)
    with attached(model, cache_from=str(tmp_path), **PICKY) as handle:
        handle._view.cache.require_hits = True
        with pytest.raises(SettingError, match="kind 'kept' cannot serve FSDP and ZeRO"):
            handle._view.encode(batches[0], [])
