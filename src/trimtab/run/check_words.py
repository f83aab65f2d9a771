"""What `check` says about rows and steps, as the lines of its table."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from trimtab.bench import SpeedPrediction, times_faster


@dataclass
class Findings:
    """What was found about rows and steps; None where there was no time or no way.

    Attributes:
        tokens: Counts of the rows that were processed, a `trimtab.run.row_tokens.RowTokens`.
        prediction: What arithmetic says.
        measured: The timed parts of a step and what follows from them.
        not_measured: Why no step was timed.
        advice: Sentences on what keeps DualSpeed from helping.
    """

    tokens: Any
    prediction: SpeedPrediction
    measured: dict[str, Any] | None = None
    not_measured: str = ""
    advice: list[str] = field(default_factory=list)


def describe(found: Findings) -> dict[str, Any]:
    """Return the lines on tokens, time and gain."""
    counts, image, prediction = found.tokens.per_row(), found.tokens.per_image(), found.prediction
    share = counts["visual"] / (counts["visual"] + counts["text"])
    summary = {
        "text tokens per row": counts["text"],
        "visual tokens per row": counts["visual"],
        "visual share of the sequence": f"{share:.0%}",
        "visual tokens per image": _range(image["full"]),
        "kept in a fast step": f"{_range(image['kept'])}, and {image['isolator']:.3g} of the isolator",
        "reading a row": f"{1000 * found.tokens.seconds_per_row:.3g} ms in one process",
        "gain by arithmetic": f"{times_faster(prediction.speedup)} (fast step {prediction.fast_over_full:.2f}, "
        f"slow step {prediction.slow_over_full:.2f} of a full one; matrix products alone)",
    }
    if found.measured is None:
        return {**summary, "no step was timed": found.not_measured}
    return summary | _measured_words(found.measured, " with images" * bool(found.tokens.text_only))


def _measured_words(measured: Mapping[str, Any], which: str) -> dict[str, str]:
    layers, rows, steps = measured["layers"], measured["rows"], measured["steps"]
    part = (
        f"{layers['decoder_layers']} of {layers['decoder_all']} blocks of the language model and "
        f"{layers['tower_layers']} of {layers['tower_all']} of the vision tower, scaled up"
        if measured["scaled"]
        else "whole model"
    )
    ratio = {mode: sum(steps[mode].values()) / sum(steps["plain"].values()) for mode in steps}
    return {
        "timed": f"{part}, random weights, {rows} row{'s' * (rows > 1)}{which}, {measured['device']}",
        "shares of a plain step": _percent(measured["shares"]),
        "shares of a fast step": _percent(measured["shares_fast"]),
        "measured steps": f"fast {ratio['fast']:.2f}, slow {ratio['slow']:.2f} of a plain one, which computes "
        f"{sum(steps['plain'].values()):.3g} s",
        "expected gain": f"training {times_faster(measured['speedup'])} "
        f"({times_faster(measured['speedup_compute'])} without waiting for data)",
    }


def _percent(shares: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {share:.0%}" for name, share in shares.items())


def _range(spread: Mapping[str, float]) -> str:
    least, mean, most = spread["min"], spread["mean"], spread["max"]
    return f"{mean:.4g}" if least == most else f"{mean:.4g} ({least:.4g} to {most:.4g})"
