"""A stopped tower gives the stock's features and gradients bit for bit, and runs none of the surplus blocks."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Sequence
from typing import Any
from unittest import mock

import pytest
import torch
from tests.anatomy.test_recompute import recompute_in
from tests.anatomy.test_tower import ALL, siglip_llava
from tests.conformance.families import SUITE
from tests.tiny import FAMILIES, IMAGE, clip_settings, gradients, llama_settings
from torch import nn

from trimtab.anatomy import encode_images, open_host
from trimtab.anatomy.tower_stop import PLAIN_TOWERS, stop_tower, surplus_blocks
from trimtab.bench import count_flops

STOPPED = ("llava", "llava_next", "llava_next_video", "video_llava")
"""Families whose tiny models of two blocks leave the last one out."""


def deep_llava(layer: int | list[int] = -2, blocks: int = 4) -> Any:
    """Return a LLaVA with a CLIP of some blocks."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    tower = CLIPVisionConfig(**{**clip_settings(24), "num_hidden_layers": blocks})
    config = LlavaConfig(
        vision_config=tower, text_config=LlamaConfig(**llama_settings()), image_token_index=IMAGE,
        vision_feature_layer=layer, vision_feature_select_strategy="default",
    )  # fmt: skip
    torch.manual_seed(0)
    return LlavaForConditionalGeneration(config).eval()


def images(count: int = 2, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, 3, 24, 24, generator=torch.Generator().manual_seed(seed))


@contextlib.contextmanager
def counted(blocks: Sequence[nn.Module]) -> Iterator[list[int]]:
    """Count how often the attention of each block runs; a hook would keep the tower from being stopped."""
    calls = [0] * len(blocks)
    number = {id(block.self_attn): place for place, block in enumerate(blocks)}
    kind = type(blocks[0].self_attn)
    stock = kind.forward

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if id(self) in number:
            calls[number[id(self)]] += 1
        return stock(self, *args, **kwargs)

    with mock.patch.object(kind, "forward", forward):
        yield calls


def without_stop() -> Any:
    return mock.patch("trimtab.anatomy.tower_stop.surplus_blocks", return_value=[])


@pytest.mark.parametrize("name", sorted(SUITE))
def test_features_are_the_stock_ones(name: str) -> None:
    family = SUITE[name]
    model = family.build_model()
    stopped = surplus_blocks(open_host(model))
    assert bool(stopped) == (name in STOPPED)
    if not stopped:
        return
    batch = family.make_batch(model, (1, 0, 2))
    with torch.no_grad():
        ours = encode_images(model, batch)
        with without_stop():
            plain = encode_images(model, batch)
    assert len(ours.blocks) == len(plain.blocks) == 3
    assert all(torch.equal(one, other) for one, other in zip(ours.blocks, plain.blocks, strict=True))
    assert (ours.tiles, ours.grid) == (plain.tiles, plain.grid)


@pytest.mark.parametrize("name", list(FAMILIES))
def test_logits_are_the_stock_models(name: str) -> None:
    from trimtab.anatomy import full_inputs

    family = FAMILIES[name]
    model = family.build_model()
    batch = {key: value for key, value in family.make_batch(model, (1, 2)).items() if key != "labels"}
    with torch.no_grad():
        expected = model(**batch).logits
        assert torch.equal(model(**full_inputs(model, batch, encode_images(model, batch))).logits, expected)


@pytest.mark.parametrize(
    ("layer", "runs"),
    [(-2, 3), (-1, 4), (-3, 2), (4, 4), (3, 3), (1, 1), (-4, 1), ([-2, 1], 3), ([1, -3], 2), ([-1, 1], 4)],
)
def test_blocks_behind_the_last_selected_state_do_not_run(layer: int | list[int], runs: int) -> None:
    model, pixels = deep_llava(layer), images()
    blocks = list(model.model.vision_tower.encoder.layers)
    stock = model.model.get_image_features(pixels, return_dict=True).pooler_output
    with counted(blocks) as calls:
        found = encode_images(model, {"pixel_values": pixels})
    assert calls == [1] * runs + [0] * (4 - runs)
    assert all(torch.equal(one, other) for one, other in zip(found.blocks, stock, strict=True))


def test_a_siglip_tower_stops_too() -> None:
    model, pixels = siglip_llava(), images()
    blocks = list(model.model.vision_tower.modules())
    assert len(surplus_blocks(open_host(model))) == 1
    stock = model.model.get_image_features(pixels, return_dict=True).pooler_output
    found = encode_images(model, {"pixel_values": pixels})
    assert all(torch.equal(one, other) for one, other in zip(found.blocks, stock, strict=True))
    assert not any("forward" in vars(module) for module in blocks)


def test_operations_fall_by_the_share_of_the_surplus_blocks() -> None:
    model, batch = deep_llava(-3, blocks=4), {"pixel_values": images()}

    def tower() -> int:
        return count_flops(lambda: encode_images(model, batch))

    ours = tower()
    with without_stop():
        plain = tower()
    block = count_flops(lambda: model.model.vision_tower.encoder.layers[0](torch.zeros(2, 37, 24), None))
    assert plain - ours == 2 * block > 0


@pytest.mark.parametrize("checkpointed", [False, True, "reentrant"])
def test_gradients_of_a_trained_tower_are_the_stock_ones(checkpointed: bool | str) -> None:
    model = deep_llava([-2, 2]).train()
    if checkpointed:
        recompute_in(model, use_reentrant=checkpointed == "reentrant")

    def learn(stop: bool) -> dict[str, torch.Tensor]:
        model.zero_grad(set_to_none=True)
        pixels = images().requires_grad_()
        with contextlib.nullcontext() if stop else without_stop():
            torch.stack(encode_images(model, {"pixel_values": pixels}).blocks).square().sum().backward()
        assert pixels.grad is not None
        return {**gradients(model.model.vision_tower), "pixels": pixels.grad}

    ours, plain = learn(True), learn(False)
    assert ours.keys() == plain.keys()
    assert any(name.startswith("encoder.layers.2.") for name in ours)
    assert not any(name.startswith("encoder.layers.3.") for name in plain)
    assert all(torch.equal(ours[name], plain[name]) for name in plain)


def test_observations_stay() -> None:
    model, batch = deep_llava(), {"pixel_values": images()}
    ours = encode_images(model, batch, ALL)
    with without_stop():
        plain = encode_images(model, batch, ALL)
    for name in ALL:
        for one, other in zip(getattr(ours, name), getattr(plain, name), strict=True):
            assert torch.equal(one, other)


def test_the_tower_is_whole_again_afterwards_also_after_an_exception() -> None:
    model, batch = deep_llava(), {"pixel_values": images()}
    before = model.model.vision_tower(images()).last_hidden_state
    blocks = list(model.model.vision_tower.encoder.layers)
    encode_images(model, batch)
    with stop_tower(open_host(model)) as surplus:
        assert [id(one) for one in surplus] == [id(blocks[3])]
        assert "forward" in vars(blocks[3])
    with pytest.raises(ValueError, match="doesn't match model"):
        encode_images(model, {"pixel_values": images()[..., :20]})
    with counted(blocks) as calls:
        assert torch.equal(model.model.vision_tower(images()).last_hidden_state, before)
    assert calls == [1] * 4
    assert not any("forward" in vars(module) for module in model.modules())


def test_a_stop_within_a_stop_leaves_the_outer_one_in_charge() -> None:
    host = open_host(deep_llava())
    with stop_tower(host) as outer, stop_tower(host) as inner:
        assert (len(outer), len(inner)) == (1, 0)
    assert surplus_blocks(host) == outer


def _hooked(model: Any) -> None:
    model.model.vision_tower.encoder.layers[3].mlp.register_forward_hook(lambda *call: None)


def _pooler_hooked(model: Any) -> None:
    model.model.vision_tower.post_layernorm.register_forward_pre_hook(lambda *call: None)


def _tower_hooked(model: Any) -> None:
    model.model.vision_tower.register_forward_hook(lambda *call: None)


def _compiled(model: Any) -> None:
    model.model.vision_tower.encoder.layers[3].compile(backend="eager")


def _compiled_around(model: Any) -> None:
    model.model.vision_tower.encoder = torch.compile(model.model.vision_tower.encoder, backend="eager")


def _patched(model: Any) -> None:
    block = model.model.vision_tower.encoder.layers[3]
    block.forward = block.forward


def _wrapped(model: Any) -> None:
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    layers = model.model.vision_tower.encoder.layers
    for place, block in enumerate(layers):
        layers[place] = checkpoint_wrapper(block)


def _partitioned(model: Any) -> None:
    next(model.model.vision_tower.encoder.layers[3].parameters()).ds_id = 7


def _other_count(model: Any) -> None:
    model.model.vision_tower.config.num_hidden_layers = 5


def _other_tower(model: Any) -> None:
    model.model.vision_tower.config.model_type = "someone_elses"


def _out_of_range(model: Any) -> None:
    model.config.vision_feature_layer = -6


def _no_layer(model: Any) -> None:
    model.config.vision_feature_layer = []


@pytest.mark.parametrize(
    "change",
    [
        _hooked, _pooler_hooked, _tower_hooked, _compiled, _compiled_around, _patched, _wrapped, _partitioned,
        _other_count, _other_tower, _out_of_range, _no_layer,
    ],
)  # fmt: skip
def test_where_it_is_not_sure_nothing_is_stopped(change: Any) -> None:
    model = deep_llava()
    assert len(surplus_blocks(open_host(model))) == 1
    change(model)
    assert surplus_blocks(open_host(model)) == []


def test_sharded_parameters_are_left_alone(tmp_path: Any) -> None:
    from torch import distributed
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import distribute_tensor

    distributed.init_process_group(
        "gloo", store=distributed.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1
    )
    try:
        for part in (lambda tower: tower.encoder.layers[3], lambda tower: tower):
            model = deep_llava()
            fully_shard(part(model.model.vision_tower))
            assert surplus_blocks(open_host(model)) == []
        model = deep_llava()
        layer = model.model.vision_tower.encoder.layers[3].mlp.fc1
        layer.weight = nn.Parameter(distribute_tensor(layer.weight.detach(), init_device_mesh("cpu", (1,))))
        assert surplus_blocks(open_host(model)) == []
    finally:
        distributed.destroy_process_group()


def test_a_compiled_model_encodes_as_before() -> None:
    model, batch = deep_llava(), {"pixel_values": images()}
    with torch.no_grad():
        expected = encode_images(model, batch).blocks
        copied = copy.deepcopy(model)
        copied.compile(backend="eager")
        assert len(surplus_blocks(open_host(copied))) == 1, "its encoder still runs as ordinary Python"
        assert all(torch.equal(*pair) for pair in zip(encode_images(copied, batch).blocks, expected, strict=True))


def test_each_plain_tower_stands_in_a_family_of_the_suite() -> None:
    seen = set()
    for name in SUITE:
        config = SUITE[name].build_model().config
        seen.add(getattr(getattr(config, "vision_config", None), "model_type", None))
    assert set(PLAIN_TOWERS) <= seen


@pytest.mark.parametrize("name", ["aria", "aya_vision", "internvl", "llava_onevision", "mistral3", "qianfan_ocr"])
def test_towers_of_other_kinds_stop_where_an_earlier_layer_is_chosen(name: str) -> None:
    family = SUITE[name]
    model = family.build_model()
    model.config.vision_feature_layer = 1
    batch = family.make_batch(model, (1, 0, 2))
    assert len(surplus_blocks(open_host(model))) == 1
    with torch.no_grad():
        ours = encode_images(model, batch).blocks
        with without_stop():
            plain = encode_images(model, batch).blocks
        model.config.vision_feature_layer = -1
        other = encode_images(model, batch).blocks
    assert all(torch.equal(*pair) for pair in zip(ours, plain, strict=True))
    assert not all(torch.equal(*pair) for pair in zip(ours, other, strict=True)), "the layer matters"
