"""Memory of trainings by mode, where their records hold it: what is held all the time, and what a step adds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from trimtab.report.blocks import Figure, Table, commands_of_runs
from trimtab.report.charts import MODE_COLORS, REST_COLOR, RUN_COLORS, stack_chart
from trimtab.report.runs import Run
from trimtab.report.series import number_of

_HELD = "held all the time"
_COLORS = {
    _HELD: REST_COLOR, "a step on full tokens": MODE_COLORS["full"], "a fast step": MODE_COLORS["fast"],
    "a slow step": MODE_COLORS["slow"], "a step": RUN_COLORS[3],
}  # fmt: skip
_PARTS = {"full": "a step on full tokens", "fast": "a fast step", "slow": "a slow step"}


def memory_figure(runs: Sequence[Run], dataset: str) -> Figure | None:
    """Return memory by run and mode in MiB, or None where no record holds it."""
    bars: dict[str, dict[str, float]] = {}
    methods: dict[str, None] = {}
    used = []
    for run in runs:
        memory = run.results.get("memory")
        steps = memory.get("step_mib") if isinstance(memory, Mapping) else None
        held = number_of(memory.get("held_mib")) if isinstance(memory, Mapping) else None
        for mode, value in steps.items() if isinstance(steps, Mapping) else ():
            peak = number_of(value)
            if peak is not None and held is not None:
                bars[f"{run.name}, {mode}"] = {_HELD: held, _PARTS.get(str(mode), "a step"): peak}
                methods[str(memory.get("method", "")) if isinstance(memory, Mapping) else ""] = None
                used.append(run)
    if not bars:
        return None
    sums = {name: sum(parts.values()) for name, parts in bars.items()}
    finding = "; ".join(f"{name}: {value:,.0f} MiB" for name, value in sums.items())
    cells = [
        (name, f"{parts[_HELD]:,.1f}", f"{sums[name] - parts[_HELD]:,.1f}", f"{sums[name]:,.1f}")
        for name, parts in bars.items()
    ]
    told = "; ".join(filter(None, methods))
    return Figure(
        "Peak memory, by mode",
        stack_chart(bars, _COLORS, f"Peak memory on {dataset}", unit=" MiB", finding=finding),
        "MiB. Held: weights and optimizer; a step adds activations and gradients."
        + (f" Measured: {told}." * bool(told)),
        Table(f"Numbers: peak memory in MiB on {dataset}", ("Run and mode", "Held", "A step adds", "Together"), cells),
        commands_of_runs(used),
    )
