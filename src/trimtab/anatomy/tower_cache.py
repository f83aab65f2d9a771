"""Let stored states stand for the run of a vision tower, so that the model's own encoder goes on with them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from trimtab.anatomy.encode import _pack
from trimtab.anatomy.families import Host
from trimtab.anatomy.tower import OBSERVABLE_TOWERS, Observed, _attention_block, _read
from trimtab.anatomy.tower_stop import stop_tower
from trimtab.shapes import Float, Int, Tensor

Tiles = dict[str, Tensor]
"""What a tower gives for some tiles: ``states`` [tile, token, layer, channel] of the selected layers, without the class
token where the model drops it; where asked for ``cls_attention`` [tile, token] and ``keys`` [tile, token, key]."""

Run = Callable[[Float[Tensor, "tile color height width"]], Tiles]
"""Sends tiles through the real tower."""

Supply = Callable[[Float[Tensor, "tile color height width"], Run], Tiles]
"""Gives the states of all tiles of a batch, from wherever; `Run` makes those that are nowhere."""

ATTENTION = frozenset({"cls_attention", "keys"})


@dataclass(frozen=True)
class TowerShape:
    """Numbers of one tile.

    Attributes:
        tokens: Tokens that the model takes of a tile.
        layers: Layers whose states become features.
        channels: Width of a state.
        key: Width of a key vector.
        side: Rows (and columns) of pixels.
    """

    tokens: int
    layers: int
    channels: int
    key: int
    side: int


def cache_trouble(host: Host) -> str:
    """Say why states of this model's tower cannot be stored and given back; empty where they can."""
    config = host.model.config
    kind = getattr(getattr(config, "vision_config", None), "model_type", None)
    if not host.family.tower or kind not in OBSERVABLE_TOWERS:
        return (
            f"{type(host.model).__name__} has no vision tower that encodes each tile by itself and is known here "
            f"({', '.join(OBSERVABLE_TOWERS)} in LLaVA, LLaVA-NeXT, LLaVA-NeXT-Video and LLaVA-OneVision)."
        )
    if getattr(config.vision_config, "attention_dropout", 0.0):
        return (
            f"Its vision tower has a dropout of {config.vision_config.attention_dropout}, so it never runs twice alike."
        )
    return ""


def tower_of(host: Host) -> Any:
    """Return the module whose run is replaced."""
    return host.base.vision_tower


def tower_shape(host: Host) -> TowerShape:
    """Return the numbers of one tile, from the configuration alone."""
    vision = host.model.config.vision_config
    patches = (vision.image_size // vision.patch_size) ** 2
    class_token = vision.model_type == "clip_vision_model"
    return TowerShape(
        tokens=patches + int(class_token) - _first(host),
        layers=len(_layers(host)),
        channels=vision.hidden_size,
        key=vision.hidden_size // vision.num_attention_heads,
        side=vision.image_size,
    )


@contextlib.contextmanager
def replace_tower(host: Host, needs: frozenset[str], supply: Supply) -> Iterator[Observed]:
    """While active, a function stands for the vision tower's run; the tower is as before afterwards.

    The model's own encoder selects, projects and packs what it is given as ever, so that this knows no family. Only
    the states of the selected layers are handed on: the class token, where the model drops it, is zero, and
    ``last_hidden_state`` is None, since nothing was computed that it could be.

    Args:
        host: The opened model, without `cache_trouble`.
        needs: What to observe, as in `trimtab.anatomy.tower.observe_tower`.
        supply: Gives the states; called once for every call of the tower.

    Yields:
        A dict that holds what was observed once the tower was called.
    """
    tower = tower_of(host)
    attributes: dict[str, Any] = vars(tower)
    observed: Observed = {}
    with stop_tower(host):  # before the tower looks patched
        before = {"forward": attributes["forward"]} if "forward" in attributes else {}
        real = tower.forward

        def forward(pixel_values: Tensor, **options: Any) -> Any:
            tiles = supply(pixel_values, lambda some: _run(host, needs, lambda: real(some, **options)))
            observed.update(_observed(tiles, needs))
            return _output(host, tiles["states"])

        attributes["forward"] = forward
        try:
            yield observed
        finally:
            del attributes["forward"]
            attributes.update(before)


def returned_type(host: Host, device: torch.device) -> torch.dtype:
    """Return the number format in which the tower hands on its states."""
    # Under autocast the normalised states are float32, and the projector casts them itself.
    return torch.float32 if torch.is_autocast_enabled(device.type) else tower_of(host).dtype


def packed_rows(host: Host, image_sizes: Any, tiles: Sequence[int], **more: Any) -> list[Int[Tensor, "token"]]:
    """Say which row of its tiles each token of an image is, in the order of the model's own packing.

    Args:
        host: The opened model.
        image_sizes: Rows and columns of pixels of each image; None in families that do not pack.
        tiles: Tiles of each image, as the tower sees them.
        more: Other arguments of the image encoder that the packing looks at.

    Returns:
        For each image ``tile * tokens + token`` of every packed token, -1 for a newline.

    Raises:
        ValueError: Tokens are mixtures of several rows.
    """
    tokens = tower_shape(host).tokens
    if host.family.tiles != "packed":
        return [torch.arange(count * tokens) for count in tiles]
    starts = torch.cat([torch.arange(count) for count in tiles])[:, None, None] * tokens
    places = (starts + torch.arange(tokens)[:, None]).double()
    packed = _pack(host, {"image_sizes": torch.as_tensor(image_sizes).cpu(), **more}, places, newline=-1.0)
    if any((one != one.round()).any() for one in packed):
        raise ValueError("packed tokens are mixtures")
    return [one[:, 0].long() for one in packed]


def tiles_of_images(host: Host, batch: Mapping[str, Any], images: Sequence[Sequence[Any]]) -> list[int]:
    """Return how many tiles of each image of a batch the tower sees.

    Args:
        host: The opened model.
        batch: Arguments of its forward.
        images: The tiles of each image, those included that fill it up.
    """
    if host.family.tiles != "packed" or batch["pixel_values"].dim() == 4:
        return [len(tiles) for tiles in images]
    several = batch.get("batch_num_images")  # LLaVA-OneVision cuts only images that stand alone into tiles
    alone = [True] * len(images) if several is None else [n == 1 for n in several.tolist() for _ in range(n)]
    sizes = torch.as_tensor(batch["image_sizes"]).tolist()
    return [packed_tiles(host, size) if cut else 1 for size, cut in zip(sizes, alone, strict=True)]


def packed_tiles(host: Host, image_size: Sequence[int]) -> int:
    """Return how many tiles the tower sees of an image of that many rows and columns of pixels."""
    if host.family.tiles != "packed":
        return 1
    from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

    config = host.model.config
    return int(
        image_size_to_num_patches(
            image_size=list(image_size),
            grid_pinpoints=config.image_grid_pinpoints,
            patch_size=config.vision_config.image_size,
        )
    )


def _run(host: Host, needs: frozenset[str], call: Callable[[], Any]) -> Tiles:
    """Send tiles through the real tower."""
    caught: dict[str, Tensor] = {}

    def catch(name: str) -> Any:
        return lambda module, args, output: caught.__setitem__(name, output.detach())

    hooks = []
    if needs & ATTENTION:
        attention = _attention_block(host)
        hooks = [getattr(attention, name).register_forward_hook(catch(name)) for name in ("q_proj", "k_proj")]
    try:
        with torch.no_grad():
            output = call()
    finally:
        for hook in hooks:
            hook.remove()
    first = _first(host)
    tiles = {"states": torch.stack([output.hidden_states[layer][:, first:] for layer in _layers(host)], dim=2)}
    if needs & ATTENTION:
        has_class = any(name.endswith("class_embedding") for name, _ in tower_of(host).named_parameters())
        seen: Observed = {}
        _read(attention, caught, has_class, first, seen)
        tiles |= {name: seen[name] for name in sorted(needs & ATTENTION)}
    return tiles


def _output(host: Host, states: Float[Tensor, "tile token layer channel"]) -> Any:
    """Lay states where the model's own encoder looks for them."""
    from transformers.modeling_outputs import BaseModelOutputWithPooling

    first = _first(host)
    count = int(host.model.config.vision_config.num_hidden_layers) + 1
    hidden: list[Tensor | None] = [None] * count
    for number, layer in enumerate(_layers(host)):
        hidden[layer] = torch.nn.functional.pad(states[:, :, number], (0, 0, first, 0))
    return BaseModelOutputWithPooling(hidden_states=tuple(hidden))  # type: ignore[arg-type]  # as transformers does


def _observed(tiles: Tiles, needs: frozenset[str]) -> Observed:
    found = {name: tiles[name] for name in needs & ATTENTION}
    if "hidden" in needs:
        found["hidden"] = tiles["states"].flatten(2)  # layers side by side, as before the projector
    return found


def _layers(host: Host) -> list[int]:
    layer = host.model.config.vision_feature_layer
    return [layer] if isinstance(layer, int) else list(layer)


def _first(host: Host) -> int:
    """How many tokens in front the model drops."""
    return 1 if host.model.config.vision_feature_select_strategy == "default" else 0
