"""The ways to let visual tokens leave that the experiment compares, and what each costs."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from trimtab.anatomy.drop_stages import kept_of
from trimtab.errors import SettingError, TrimtabWarning
from trimtab.methods.vtw.cost import Drops, TextShape, kv_entries, layer_flops, prefill_flops

FASTV_LAYER, FASTV_KEEP = 2, 0.5
PYRAMID_KEEP = (0.5, 0.25, 0.125)


@dataclass(frozen=True)
class Prompts:
    """How long the prompts of a test are.

    Attributes:
        lengths: Number of prompts of each length, in places.
        visual: Visual tokens of each.
    """

    lengths: Mapping[int, int]
    visual: int

    @property
    def places(self) -> float:
        """Mean length."""
        return sum(length * count for length, count in self.lengths.items()) / sum(self.lengths.values())

    def mean(self, cost: Callable[[int], float]) -> float:
        """Mean of what a prompt of a length costs."""
        return sum(cost(length) * count for length, count in self.lengths.items()) / sum(self.lengths.values())


@dataclass(frozen=True)
class Way:
    """One way to let visual tokens leave.

    Attributes:
        name: Name in records; says the settings.
        kind: ``withdraw``, ``random_tokens``, ``random_tokens_spared``, ``fastv``, ``pyramid_drop``, or the name of a
            pruner in front of the language model.
        settings: Layer, tokens kept, seed.
        equal_to: Name of the way whose arithmetic this one was fitted to, or empty.
    """

    name: str
    kind: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    equal_to: str = ""

    def lengths(self, places: int, visual: int, depth: int) -> tuple[int, Drops]:
        """Return the places that enter the language model, and where some of them leave.

        Args:
            places: Places of the prompt with all visual tokens.
            visual: Its visual tokens.
            depth: Layers of the language model.
        """
        if self.kind in ("withdraw", "random_tokens", "random_tokens_spared"):
            layer = self.settings["layer"]
            return places, () if layer == depth else ((layer, places - visual),)
        if self.kind == "fastv":
            return places, ((self.settings["layer"], places - visual + self.settings["kept"]),)
        if self.kind == "pyramid_drop":
            stages = zip(self.settings["layers"], self.settings["keep_ratios"], strict=True)
            return places, tuple((layer, places - visual + kept_of(visual, ratio)) for layer, ratio in stages)
        return places - visual + self.settings["kept"] + self.settings["isolator_tokens"], ()

    def flops_share(self, shape: TextShape, prompts: Prompts) -> float:
        """Return the share of the layers' arithmetic in the prefill, over all prompts; 1 is the unmodified model."""
        return self._share(shape, prompts, lambda places, drops: prefill_flops(shape, places, drops))

    def kv_share(self, shape: TextShape, prompts: Prompts) -> float:
        """Return the share of the cache's entries after the prefill, over all prompts."""
        return self._share(shape, prompts, lambda places, drops: kv_entries(shape.layers, places, drops))

    def _share(self, shape: TextShape, prompts: Prompts, cost: Callable[[int, Drops], int]) -> float:
        ours = prompts.mean(lambda places: cost(*self.lengths(places, prompts.visual, shape.layers)))
        return ours / prompts.mean(lambda places: cost(places, ()))


def withdrawal(layer: int, equal_to: str = "") -> Way:
    """All visual tokens leave at one layer."""
    return Way(f"vtw_{layer}", "withdraw", {"layer": layer}, equal_to)


def all_ways(shape: TextShape, prompts: Prompts, chosen: int, isolator_tokens: int) -> list[Way]:
    """Return what is compared on one model, what matters most first; other layers stand in the curve only.

    Args:
        shape: Form of its language model.
        prompts: Of the test.
        chosen: Layer that the search found; the number of layers where it found none.
        isolator_tokens: Rows that the model was trained to see in front of pruned images.
    """
    depth, visual = shape.layers, prompts.visual
    ours, early = withdrawal(chosen), withdrawal(depth // 3)
    fastv = Way("fastv", "fastv", {"layer": FASTV_LAYER, "kept": kept_of(visual, FASTV_KEEP)})
    layers = [depth // 4, depth // 2, 3 * depth // 4]
    pyramid = Way("pyramid_drop", "pyramid_drop", {"layers": layers, "keep_ratios": list(PYRAMID_KEEP)})
    found = [withdrawal(depth), ours]
    for way in (ours, early) if chosen < depth else (early,):
        layer = way.settings["layer"]
        found += [
            Way(f"{kind}_as_{way.name}", kind, {"layer": layer, "seed": 0}, way.name)
            for kind in ("random_tokens", "random_tokens_spared")
        ]
        found += _equal(way, shape, prompts, isolator_tokens, fastv_too=True)
    found += [early, fastv, *_equal(fastv, shape, prompts, isolator_tokens), pyramid]
    found += [nearest_withdrawal(way.flops_share(shape, prompts), shape, prompts) for way in (fastv, pyramid)]
    first: dict[str, Way] = {}
    for way in found:
        first.setdefault(way.name, way)
    return list(first.values())


def nearest_withdrawal(target: float, shape: TextShape, prompts: Prompts) -> Way:
    """Return the withdrawal that does at most a share of the arithmetic, and as much of that as it can."""
    fits = [
        way for layer in range(shape.layers + 1) if (way := withdrawal(layer)).flops_share(shape, prompts) <= target
    ]
    return fits[-1] if fits else withdrawal(0)


def _equal(way: Way, shape: TextShape, prompts: Prompts, isolator_tokens: int, fastv_too: bool = False) -> list[Way]:
    """Other ways with as many tokens kept as come nearest to the arithmetic of one."""
    target = way.flops_share(shape, prompts)

    def fitted(kind: str, settings: Mapping[str, Any], most: int) -> Way:
        tried = [
            Way(f"{kind}_as_{way.name}", kind, {**settings, "kept": kept}, way.name) for kept in range(1, most + 1)
        ]
        return min(tried, key=lambda one: abs(one.flops_share(shape, prompts) - target))

    before = {"isolator_tokens": isolator_tokens}
    room = prompts.visual - isolator_tokens - 1
    found = [fitted(kind, before, room) for kind in ("divprune", "random")]
    return [*found, fitted("fastv", {"layer": FASTV_LAYER}, prompts.visual - 1)] if fastv_too else found


@contextmanager
def applied(way: Way, model: Any, folder: Path, visual: int) -> Iterator[None]:
    """Let tokens leave from a model for a while.

    Args:
        way: How.
        model: Opened from `folder`.
        folder: The checkpoint; one of a DualSpeed run has its isolator there, which pruned images then stand behind.
        visual: Visual tokens of every prompt.
    """
    from trimtab.methods.vtw import withdraw
    from trimtab.methods.vtw.peers import fastv, pyramid_drop, random_drop

    given = way.settings
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"withdraw.layer is 0", category=TrimtabWarning)
        if way.kind == "withdraw":
            handle: Any = withdraw(model, given["layer"])
        elif way.kind in ("random_tokens", "random_tokens_spared"):
            spared = way.kind == "random_tokens_spared"
            handle = random_drop(model, given["layer"], seed=given["seed"], spare_last=spared)
        elif way.kind == "fastv":
            handle = fastv(model, given["layer"], given["kept"] / visual)
        elif way.kind == "pyramid_drop":
            handle = pyramid_drop(model, given["layers"], given["keep_ratios"])
        else:
            handle = _pruned(way, model, folder, visual)
    with handle:
        yield


def _pruned(way: Way, model: Any, folder: Path, visual: int) -> Any:
    from trimtab.dualspeed import prune_for_inference

    config, place = pruning_of(folder)
    config = replace(config, pruner=way.kind, pruner_options={}, keep_ratio=way.settings["kept"] / visual)
    return prune_for_inference(model, config, isolator_from=place)


def pruning_of(folder: Path) -> tuple[Any, Path | None]:
    """Return the settings under which a checkpoint knows pruned images, and the folder of its isolator.

    One that was trained on all tokens knows none: its images are pruned without an isolator.
    """
    from trimtab.dualspeed import DualSpeedConfig
    from trimtab.dualspeed.inference import saved_settings, settings_folder

    if settings_folder(folder) is None:
        return DualSpeedConfig(isolator_tokens=0), None
    config, place = saved_settings(folder)
    return config, place if config.isolator_tokens else None


def read_prompts(processor: Any, rows: Any, visual: int) -> Prompts:
    """Count the places of the prompts that `trimtab.evaluate.exact_match` makes of rows.

    Args:
        processor: The model's.
        rows: Question rows, best without their images.
        visual: Visual tokens of an image.

    Raises:
        SettingError: There is no row.
    """
    from trimtab.evaluate.prompts import prompts_of_rows

    counts: Counter[int] = Counter()
    for prompt in prompts_of_rows({**row, "image": None} for row in rows):
        text = processor.apply_chat_template(prompt.messages, add_generation_prompt=True, tokenize=False)
        counts[len(processor.tokenizer(text)["input_ids"]) + visual] += 1
    if not counts:
        raise SettingError("There is no question to ask: no rows came. Give at least one image with --images.")
    return Prompts(dict(sorted(counts.items())), visual)


def shares(layers: Sequence[int], shape: TextShape, prompts: Prompts) -> list[float]:
    """Return the share of arithmetic of a withdrawal at each of some layers."""
    return [withdrawal(layer).flops_share(shape, prompts) for layer in layers]


def layer_share(shape: TextShape, prompts: Prompts) -> float:
    """Return what a layer costs without visual tokens over what it costs with them."""
    deep = prompts.mean(lambda places: layer_flops(places - prompts.visual, shape))
    return deep / prompts.mean(lambda places: layer_flops(places, shape))
