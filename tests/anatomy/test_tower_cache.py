"""Stored states stand for a tower's run, and the tower is as before afterwards."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from tests.conformance.families import llava as relatives
from tests.tiny import FAMILIES as TINY

from trimtab.anatomy import encode_images, open_host
from trimtab.anatomy.tower import observe_tower
from trimtab.anatomy.tower_cache import (
    Run,
    Tiles,
    cache_trouble,
    packed_rows,
    packed_tiles,
    replace_tower,
    tiles_of_images,
    tower_of,
    tower_shape,
)

FAMILIES = {**TINY, **{family.name: family for family in relatives.FAMILIES}}
CACHED = ["llava", "llava_next", "llava_next_video", "llava_onevision"]
ALL = frozenset({"hidden", "cls_attention", "keys"})


def encode(host: Any, batch: dict[str, Any]) -> Any:
    """Run the model's own image encoder."""
    names = [name for name in ("pixel_values", "image_sizes", "batch_num_images") if name in batch]
    with torch.no_grad():
        return host.base.get_image_features(**{name: batch[name] for name in names}, return_dict=True)


def images_of(batch: dict[str, Any]) -> list[Any]:
    """Return the tiles of each image, filled up."""
    return [image if image.dim() == 4 else [image] for image in batch["pixel_values"]]


def real(pixels: torch.Tensor, run: Run) -> Tiles:
    return run(pixels)


@pytest.mark.parametrize("family", CACHED)
@pytest.mark.parametrize("layer", [-2, -1, 1, [-2, 1]])
def test_the_towers_own_states_give_the_models_own_features(family: str, layer: Any) -> None:
    model = FAMILIES[family].build_model()
    model.config.vision_feature_layer = layer
    if isinstance(layer, list):
        projector = model.model.multi_modal_projector
        width = model.config.vision_config.hidden_size * 2
        projector.linear_1 = torch.nn.Linear(width, projector.linear_1.out_features)
    host, batch = open_host(model), FAMILIES[family].make_batch(model)
    plain = encode(host, batch).pooler_output
    with replace_tower(host, frozenset(), real):
        given = encode(host, batch).pooler_output
    for one, two in zip(given, plain, strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("family", CACHED)
def test_what_is_observed_is_what_an_observer_sees(family: str) -> None:
    model = FAMILIES[family].build_model()
    host, batch = open_host(model), FAMILIES[family].make_batch(model)
    with observe_tower(host, ALL) as wanted:
        encode(host, batch)
    with replace_tower(host, ALL, real) as observed:
        encode(host, batch)
    assert observed.keys() == wanted.keys()
    for name, value in wanted.items():
        assert torch.equal(observed[name], value), name


def test_other_states_give_other_features() -> None:
    model = FAMILIES["llava"].build_model()
    host, batch = open_host(model), FAMILIES["llava"].make_batch(model)
    given: list[torch.Tensor] = []

    def zeros(pixels: torch.Tensor, run: Run) -> Tiles:
        shape = tower_shape(host)
        given.append(torch.zeros(len(pixels), shape.tokens, shape.layers, shape.channels))
        return {"states": given[0]}

    with replace_tower(host, frozenset(), zeros):
        found = encode(host, batch).pooler_output
    empty = model.model.multi_modal_projector(torch.zeros(1, 1, model.config.vision_config.hidden_size))
    torch.testing.assert_close(found[0], empty[0].expand_as(found[0]))


@pytest.mark.parametrize("family", CACHED)
def test_the_tower_is_as_before_also_after_an_error(family: str) -> None:
    model = FAMILIES[family].build_model()
    host = open_host(model)
    encode(host, FAMILIES[family].make_batch(model))  # transformers puts its own hooks in at the first call
    before = copy.copy(vars(tower_of(host)))
    with replace_tower(host, ALL, real):
        assert "forward" in vars(tower_of(host))
    assert vars(tower_of(host)) == before

    def fail(pixels: torch.Tensor, run: Run) -> Tiles:
        run(pixels)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), replace_tower(host, ALL, fail):
        encode(host, FAMILIES[family].make_batch(model))
    assert vars(tower_of(host)) == before
    assert all(not module._forward_pre_hooks for module in tower_of(host).modules())


def test_a_forward_that_somebody_else_has_put_there_is_called_and_comes_back() -> None:
    model = FAMILIES["llava"].build_model()
    host, batch = open_host(model), FAMILIES["llava"].make_batch(model)
    tower, calls = tower_of(host), []
    own = tower.forward

    def patched(*args: Any, **kwargs: Any) -> Any:
        calls.append(len(args[0]))
        return own(*args, **kwargs)

    tower.forward = patched
    with replace_tower(host, frozenset(), real):
        encode(host, batch)
    assert calls == [3]
    assert tower.forward is patched


@pytest.mark.parametrize("family", CACHED)
def test_shape_and_tiles_are_what_the_tower_really_has(family: str) -> None:
    model = FAMILIES[family].build_model()
    host, batch = open_host(model), FAMILIES[family].make_batch(model)
    seen: list[torch.Tensor] = []

    def watch(pixels: torch.Tensor, run: Run) -> Tiles:
        tiles = run(pixels)
        seen.extend([pixels, tiles["states"], tiles["keys"]])
        return tiles

    with replace_tower(host, ALL, watch):
        encode(host, batch)
    shape = tower_shape(host)
    assert seen[0].shape[-1] == shape.side
    assert tuple(seen[1].shape[1:]) == (shape.tokens, shape.layers, shape.channels)
    assert seen[2].shape[-1] == shape.key
    assert sum(tiles_of_images(host, batch, images_of(batch))) == len(seen[0])


@pytest.mark.parametrize("family", ["llava", "llava_next"])
def test_rows_of_packed_tokens_are_where_the_tokens_come_from(family: str) -> None:
    model = FAMILIES[family].build_model()
    host, batch = open_host(model), FAMILIES[family].make_batch(model)
    with torch.no_grad():
        encoded = encode_images(host, batch, frozenset({"hidden"}))
    flat: list[torch.Tensor] = []

    def watch(pixels: torch.Tensor, run: Run) -> Tiles:
        tiles = run(pixels)
        flat.append(tiles["states"].flatten(0, 2))
        return tiles

    with replace_tower(host, frozenset(), watch):
        encode(host, batch)
    tiles = tiles_of_images(host, batch, images_of(batch))
    rows = packed_rows(host, batch.get("image_sizes"), tiles)
    first = 0
    assert encoded.hidden is not None
    for places, states, count in zip(rows, encoded.hidden, tiles, strict=True):
        shown = places >= 0
        assert torch.equal(flat[0][places[shown] + first * tower_shape(host).tokens], states[shown])
        assert not states[~shown].any()
        first += count
    assert any((places < 0).any() for places in rows) == (family == "llava_next")


def test_mixed_tokens_have_no_row() -> None:
    model = FAMILIES["llava_onevision"].build_model()
    host = open_host(model)
    host.model.config.image_grid_pinpoints = [[96, 96]]
    tiles = packed_tiles(host, (96, 96))
    with pytest.raises(ValueError, match="mixtures"):
        packed_rows(host, [[96, 96]], [tiles], vision_aspect_ratio="anyres_max_1")


@pytest.mark.parametrize("family", sorted(TINY))
def test_trouble_is_told_of_every_other_family(family: str) -> None:
    trouble = cache_trouble(open_host(FAMILIES[family].build_model()))
    assert bool(trouble) == (family not in CACHED)


def test_a_tower_with_dropout_is_trouble() -> None:
    model = FAMILIES["llava"].build_model()
    model.config.vision_config.attention_dropout = 0.5
    assert "dropout of 0.5" in cache_trouble(open_host(model))
