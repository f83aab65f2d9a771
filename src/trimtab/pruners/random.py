"""Keep random tokens: the baseline without any signal."""

from __future__ import annotations

import torch

from trimtab.ops.host import to_device
from trimtab.ops.select import keep_best
from trimtab.pruners.contract import Pruner, PrunerInput, Selection
from trimtab.pruners.registry import register_pruner
from trimtab.shapes import Float, Tensor

_WORD = (1 << 64) - 1


@register_pruner("random")
class RandomPruner(Pruner):
    """Keeps tokens drawn uniformly without replacement.

    The draw is a hash of (seed, step, number of the image, token), so it needs no generator and no state, touches
    no global random numbers, and is the same on every device and in every batch. UniPruneBench (arXiv 2511.02650)
    finds it above several designed methods.
    """

    @torch.no_grad()
    def select(self, inputs: PrunerInput, num_keep: int) -> Selection:
        """Keep random tokens; see `Pruner.select`.

        The last integer of ``inputs.draw`` numbers the first image, the following images count on from it.
        """
        self.check(inputs, num_keep)
        images, tokens = inputs.features.shape[:2]
        noise = uniform_noise(inputs.draw, images, tokens, inputs.features.device)
        return Selection(*keep_best(noise, num_keep, inputs.valid))


def uniform_noise(
    draw: tuple[int, int, int], images: int, tokens: int, device: torch.device
) -> Float[Tensor, "image token"]:
    """Hash a draw into numbers that are uniform in [0, 1), by the SplitMix64 finaliser.

    Steele, Lea and Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014.

    Args:
        draw: Integers that name the draw; the last one numbers the first image.
        images: Number of images.
        tokens: Tokens per image.
        device: Where the numbers shall be.

    Returns:
        Multiples of 2^-53 in float64.
    """
    *names, first = draw
    key = 0
    for name in names:
        key = _mix(key ^ (int(name) & _WORD))
    keys = [_mix(key ^ ((int(first) + image) & _WORD)) for image in range(images)]
    column = to_device([_signed(value) for value in keys], device, torch.int64).unsqueeze(1)
    return (
        _mix_tensor(column + torch.arange(tokens, device=device) * _signed(0x9E3779B97F4A7C15)) >> 11 & (1 << 53) - 1
    ).double() * 2.0**-53


def _mix(value: int) -> int:
    value = (value + 0x9E3779B97F4A7C15) & _WORD
    value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 & _WORD
    value = (value ^ value >> 27) * 0x94D049BB133111EB & _WORD
    return value ^ value >> 31


def _mix_tensor(value: Tensor) -> Tensor:
    # int64 wraps as uint64 does; its right shift drags the sign along, which the masks cut off.
    value = (value ^ (value >> 30 & (1 << 34) - 1)) * _signed(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> 27 & (1 << 37) - 1)) * _signed(0x94D049BB133111EB)
    return value ^ (value >> 31 & (1 << 33) - 1)


def _signed(word: int) -> int:
    return word - (1 << 64) if word >> 63 else word
