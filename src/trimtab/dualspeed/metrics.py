"""What DualSpeed measured: kept on the device until somebody asks."""

from __future__ import annotations

from typing import Any

from trimtab.dualspeed.losses import StepLosses
from trimtab.dualspeed.step import Step
from trimtab.shapes import Tensor


class StepMetrics:
    """Losses and token counts of the last step, counts of all steps, and means since the last reading."""

    def __init__(self) -> None:
        self.steps: dict[str, int] = {"fast": 0, "slow": 0}
        self.samples: dict[str, int] = {"fast": 0, "slow": 0}
        """Of steps with a mode for every sample."""
        self.unlabelled_batches = 0
        self._last: dict[str, Any] = dict.fromkeys(("mode", "ce", "ce_fast", "ce_slow", "kl"))
        self._window: dict[str, tuple[Any, int]] = {}

    def note_plain(self, ce: Tensor) -> None:
        """Note a step that was left to the model.

        Args:
            ce: Its mean cross-entropy per label, in nats.
        """
        self.steps["fast"] += 1
        self._keep("fast", {"ce": ce.detach(), "ce_fast": ce.detach(), "slow_share": 0.0})

    def note_step(self, step: Step, losses: StepLosses) -> None:
        """Note one step; what it measured stays on the device.

        Args:
            step: The step.
            losses: Its sums over labels.
        """
        rows, slow = len(step.label_counts), len(step.slow_rows)
        every = max(losses.labels_fast + losses.labels_slow, 1)
        mean = losses.ce.detach() / every
        values: dict[str, Any] = {"ce": mean}
        if step.mode == "mixed":
            self.samples["fast"] += rows - slow
            self.samples["slow"] += slow
            parts = (("fast", losses.ce_fast, losses.labels_fast), ("slow", losses.ce_slow, losses.labels_slow))
            values |= {f"ce_{name}": one.detach() / n for name, one, n in parts if one is not None and n}
            if slow:
                kl = losses.kl
                values["kl"] = 0.0 if kl is None else kl.detach() / max(losses.labels_slow, 1)
            values["slow_share"] = slow / rows
        else:
            self.steps[step.mode] += 1
            values[f"ce_{step.mode}"] = mean
            if losses.kl is not None:
                values["kl"] = losses.kl.detach() / every
            elif step.mode == "slow":
                values["kl"] = 0.0
            values["slow_share"] = float(step.mode == "slow")
        values |= {"visual_tokens_full": step.tokens_full, "visual_tokens_kept": step.tokens_kept}
        if step.tokens_deep is not None:
            values["visual_tokens_deep"] = step.tokens_deep
        self._keep(step.mode, values)

    def _keep(self, mode: str, values: dict[str, Any]) -> None:
        self._last |= {"mode": mode, **{name: value for name, value in values.items() if name != "slow_share"}}
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
        if any(self.samples.values()):
            counts |= {f"samples_{mode}": count for mode, count in self.samples.items()}
        return {**counts, "unlabelled_batches": self.unlabelled_batches}


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, Tensor) else value
