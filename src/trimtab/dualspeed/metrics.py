"""What DualSpeed measured: kept on the device until somebody asks."""

from __future__ import annotations

from typing import Any

from trimtab.dualspeed.schedule import Mode
from trimtab.shapes import Tensor


class StepMetrics:
    """Losses and token counts of the last step, counts of all steps, and means since the last reading."""

    def __init__(self) -> None:
        self.steps: dict[str, int] = {"fast": 0, "slow": 0}
        self.unlabelled_batches = 0
        self._last: dict[str, Any] = dict.fromkeys(("mode", "ce", "ce_fast", "ce_slow", "kl"))
        self._window: dict[str, tuple[Any, int]] = {}

    def note(self, mode: Mode, tokens_full: int | None, tokens_kept: int | None, ce: Tensor, kl: Tensor | None) -> None:
        """Note one step.

        Args:
            mode: Its mode.
            tokens_full: Visual tokens of its images, or None where it was left to the model.
            tokens_kept: Visual tokens that the student saw.
            ce: Its mean cross-entropy per label, in nats.
            kl: Its mean KL divergence per label, in nats, or None without a teacher
                (then counted as 0 in slow steps).
        """
        self.steps[mode] += 1
        values: dict[str, Any] = {"ce": ce.detach(), f"ce_{mode}": ce.detach()}
        if kl is not None:
            values["kl"] = kl.detach()
        elif mode == "slow":
            values["kl"] = 0.0
        if tokens_full is not None:
            values |= {"visual_tokens_full": tokens_full, "visual_tokens_kept": tokens_kept}
        self._last |= {"mode": mode, **values}
        values["slow_share"] = float(mode == "slow")
        for name, value in values.items():
            total, count = self._window.get(name, (0.0, 0))
            self._window[name] = (total + value, count + 1)

    def last(self) -> dict[str, Any]:
        """Return the values of the last step (of each mode) and all counts, as plain numbers; waits for the device."""
        plain = {name: _plain(value) for name, value in self._last.items()}
        return {**plain, **self._counts()}

    def means(self) -> dict[str, float]:
        """Return means since the last call, and all counts; waits for the device."""
        window, self._window = self._window, {}
        means = {name: float(_plain(total)) / count for name, (total, count) in window.items()}
        return {**means, **self._counts()}

    def _counts(self) -> dict[str, int]:
        counts = {f"steps_{mode}": count for mode, count in self.steps.items()}
        return {**counts, "unlabelled_batches": self.unlabelled_batches}


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, Tensor) else value
