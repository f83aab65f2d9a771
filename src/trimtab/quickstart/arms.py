"""The arms of the comparison: one start, one number of samples, different ways to spend them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from trimtab.dualspeed import DualSpeedConfig
from trimtab.errors import SettingError, near_miss


@dataclass(frozen=True)
class Arm:
    """One way to train.

    Attributes:
        name: Name in records and tables.
        letter: Letter in the experiment's plan.
        what: What it is, in a few words.
        dualspeed: Settings that differ from DualSpeed's defaults, or None for plain training on all tokens.
        time_of: Arm whose wall-clock time limits this one, or None for the common number of steps.
        pace_of: Arm whose steps say how many fit into that time.
    """

    name: str
    letter: str
    what: str
    dualspeed: dict[str, Any] | None = None
    time_of: str | None = None
    pace_of: str = "full"

    def config(self, seed: int, **common: Any) -> DualSpeedConfig | None:
        """Return the settings of a run, or None for plain training."""
        if self.dualspeed is None:
            return None
        return DualSpeedConfig(**{**common, **self.dualspeed, "seed": seed})


PACKED: dict[str, Any] = {"packing": True, "schedule_unit": "sample"}
"""Rows of a batch behind one another without padding, fast and slow ones together."""
PACKED_FULL: dict[str, Any] = {
    "packing": True, "pruner": "keep_all", "isolator_tokens": 0, "slow_ratio": 0.0, "kl_weight": 0.0,
}  # fmt: skip
"""Plain training on all visual tokens, packed in the same way."""

INSIDE: dict[str, Any] = {"pruner": "keep_all", "isolator_tokens": 0}
"""All visual tokens enter the language model, and leave inside it."""

ARMS: dict[str, Arm] = {
    arm.name: arm
    for arm in (
        Arm("full", "A", "all visual tokens in every step"),
        Arm("pruned", "B", "pruned tokens in every step", {"slow_ratio": 0.0, "isolator_tokens": 0, "kl_weight": 0.0}),
        Arm("dualspeed", "C", "DualSpeed", {}),
        Arm("dualspeed_no_isolator", "D", "DualSpeed without the mode isolator", {"isolator_tokens": 0}),
        Arm("dualspeed_no_kl", "E", "DualSpeed without distillation", {"kl_weight": 0.0}),
        Arm("dualspeed_random", "F", "DualSpeed with random pruning", {"pruner": "random"}),
        Arm("full_equal_time", "G", "all visual tokens, stopped at DualSpeed's time", None, "dualspeed"),
        Arm("dualspeed_slow_0", "H", "DualSpeed without slow steps: isolator only", {"slow_ratio": 0.0}),
        Arm("dualspeed_slow_5", "H", "DualSpeed with 5 % slow steps", {"slow_ratio": 0.05}),
        Arm("dualspeed_slow_20", "H", "DualSpeed with 20 % slow steps", {"slow_ratio": 0.2}),
        Arm("dualspeed_slow_30", "H", "DualSpeed with 30 % slow steps", {"slow_ratio": 0.3}),
        Arm("dualspeed_annealed", "H", "DualSpeed, slow steps mostly late", {"schedule": "annealed"}),
        Arm("dualspeed_annealed_20", "H", "20 % slow steps, mostly late", {"schedule": "annealed", "slow_ratio": 0.2}),
        Arm("dualspeed_annealed_15_no_kl", "H", "15 % slow steps, mostly late, without distillation",
            {"schedule": "annealed", "slow_ratio": 0.15, "kl_weight": 0.0}),
        Arm("dualspeed_keep_5", "H", "DualSpeed keeping 5 %", {"keep_ratio": 0.05}),
        Arm("dualspeed_keep_20", "H", "DualSpeed keeping 20 %", {"keep_ratio": 0.2}),
        Arm("dualspeed_keep_40", "H", "DualSpeed keeping 40 %", {"keep_ratio": 0.4}),
        Arm("dualspeed_original", "H", "DualSpeed with original positions", {"positions": "original"}),
        Arm("full_packed", "I", "all visual tokens, rows packed without padding", PACKED_FULL),
        Arm("full_packed_equal_time", "I", "all visual tokens, packed, stopped at packed DualSpeed's time", PACKED_FULL,
            "dualspeed_packed", "full_packed"),
        Arm("dualspeed_sample", "I", "DualSpeed, a mode for every sample", {"schedule_unit": "sample"}),
        Arm("dualspeed_packed", "I", "DualSpeed, packed, a mode for every sample", PACKED),
        Arm("dualspeed_packed_slow_5", "I", "DualSpeed, packed, with 5 % slow samples", {**PACKED, "slow_ratio": 0.05}),
        Arm("dualspeed_random_keep", "I", "DualSpeed, a random share of every image", {"keep_spread": "random"}),
        Arm("dualspeed_random_keep_5", "I", "a random share of every image, 5 % slow steps",
            {"keep_spread": "random", "slow_ratio": 0.05}),
        Arm("dualspeed_content_keep", "I", "DualSpeed, more of images with more in them", {"keep_spread": "content"}),
        Arm("dualspeed_two_way", "I", "DualSpeed, both views learn from each other", {"distillation": "two_way"}),
        Arm("dualspeed_vtw", "J", "all visual tokens leave half-way through the language model",
            {**INSIDE, "inside": "vtw"}),
        Arm("dualspeed_fastv", "J", "nine of ten visual tokens leave behind layer 2, by attention",
            {**INSIDE, "inside": "fastv", "inside_options": {"keep_ratio": 0.1}}),
        Arm("dualspeed_pyramid", "J", "visual tokens leave in three stages, by attention",
            {**INSIDE, "inside": "pyramid_drop"}),
        Arm("dualspeed_then_vtw", "J", "DualSpeed, and what is left leaves half-way", {"inside": "vtw"}),
        Arm("dualspeed_keep_20_then_vtw", "J", "DualSpeed keeping 20 %, which leave half-way",
            {"keep_ratio": 0.2, "inside": "vtw"}),
        Arm("mixed", "-", "90 % pruned, 10 % full steps, neither isolator nor KL",
            {"isolator_tokens": 0, "kl_weight": 0.0}),
    )
}  # fmt: skip
"""All arms by name; letters as in the plan of the experiment."""


def arm_of(name: str) -> Arm:
    """Return the arm of that name.

    Raises:
        SettingError: No such arm; the nearest is named.
    """
    if name not in ARMS:
        raise SettingError(f"Unknown arm {name!r}. {near_miss(name, ARMS)}")
    return ARMS[name]
