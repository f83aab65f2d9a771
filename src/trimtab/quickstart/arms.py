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
    """

    name: str
    letter: str
    what: str
    dualspeed: dict[str, Any] | None = None
    time_of: str | None = None

    def config(self, seed: int, **common: Any) -> DualSpeedConfig | None:
        """Return the settings of a run, or None for plain training."""
        if self.dualspeed is None:
            return None
        return DualSpeedConfig(**{**common, **self.dualspeed, "seed": seed})


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
