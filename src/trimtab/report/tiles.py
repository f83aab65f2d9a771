"""The figures at the top of a page, each with what it means."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from trimtab.report import rows
from trimtab.report.runs import Run


def tiles_of(
    facts: Mapping[str, Any], runs: Sequence[Run], dual: Run | None, floors: Mapping[str, Mapping[str, float]]
) -> list[Mapping[str, str]]:
    """Return figures with words for the top of a page, those that matter most first.

    Args:
        facts: What `trimtab.report.verdict.judge` found.
        runs: All runs.
        dual: The DualSpeed run that the page is about, or None.
        floors: What a model that does not see would reach, by words, by data set.
    """
    makers = (_progress_tile, _speed_tile, _accuracy_tile, _memory_tile, _step_tile, _tokens_tile)
    tiles: list[Mapping[str, str]] = [tile for make in makers if (tile := make(facts)) is not None]
    if dual is not None:
        pruned = next(
            (r for r in runs if r.arm == "pruned" and r.dataset == dual.dataset and r.seed == dual.seed), None
        )
        if pruned is not None and pruned.accuracy is not None and dual.accuracy is not None:
            lost = 100 * (dual.accuracy - pruned.accuracy)
            words = f"points above training on pruned tokens only ({rows.percent(pruned.accuracy)})"
            tiles.append({"value": f"{lost:+.1f}", "words": words})
        blind = floors.get(dual.dataset, {}).get("language only")
        if blind is not None:
            words = "is reached from the question alone, without the image"
            tiles.append({"value": rows.percent(blind), "words": words})
    return tiles


def _progress_tile(facts: Mapping[str, Any]) -> dict[str, str] | None:
    if not facts["running"]:
        return None
    first = facts["running"][0]
    rate = f", {first['steps_per_second']:.3g} steps a second" if first["steps_per_second"] else ""
    left = first["seconds_left"]
    if left is None:
        return {"value": f"{first['steps']:,}", "words": f"steps done{rate}"}
    end = str(first["expected_end"]).replace("T", " ").removesuffix("+00:00")
    told = f"; expected end {end} UTC" if first["expected_end"] else ""
    return {"value": rows.duration(left), "words": f"left at this rate{rate}{told}"}


def _speed_tile(facts: Mapping[str, Any]) -> dict[str, str] | None:
    speed = facts["speed"]
    if speed:
        spread = f" (time ratio {speed['time_ratio']:.2f} ± {speed['spread']:.2f})" if speed["spread"] else ""
        per_sample = "" if speed["same_samples"] else " per sample"
        if speed["times_faster"] < 1:
            words = f"the speed of training{per_sample} on full tokens: slower{spread}"
        else:
            words = f"faster training{per_sample} than on full tokens{spread}"
        return {"value": f"{speed['times_faster']:.2f} ×", "words": words}
    return None


def _step_tile(facts: Mapping[str, Any]) -> dict[str, str] | None:
    steps = facts["steps"]
    if not steps or not steps["fast_of_slow"]:
        return None
    fast, slow = (f"{1000 * steps[f'{mode}_seconds']:.3g} ms" for mode in ("fast", "slow"))
    of_what = "single steps" if steps["single_steps"] else "means between entries of the log"
    if "fast_of_full" in steps:
        full = f"{1000 * steps['full_seconds']:.3g} ms"
        words = f"is the time of a fast step over that of one on full tokens: {fast} to {full}; a slow one takes {slow}"
        return {"value": f"{steps['fast_of_full']:.2f}", "words": f"{words} (medians of {of_what})"}
    words = f"is the time of a fast step over that of a slow one: {fast} to {slow} (medians of {of_what})"
    return {"value": f"{steps['fast_of_slow']:.2f}", "words": words}


def _accuracy_tile(facts: Mapping[str, Any]) -> dict[str, str] | None:
    found = facts["accuracy"]
    if not found:
        return None
    if found["kept"] is None:
        return {"value": rows.percent(found["dualspeed"]), "words": "right answers on full images"}
    interval = found["interval"]
    told = f", 95\N{NO-BREAK SPACE}% interval {100 * interval[0]:.1f} to {100 * interval[1]:.1f}" if interval else ""
    told = told or (f", ± {100 * found['spread']:.1f} over runs" if found["spread"] else "")
    words = (
        f"of the accuracy kept{told}. DualSpeed {rows.percent(found['dualspeed'])}; "
        f"full tokens: {rows.percent(found['full'])}"
    )
    return {"value": rows.percent(found["kept"]), "words": words}


def _memory_tile(facts: Mapping[str, Any]) -> dict[str, str] | None:
    found = facts["memory"]
    if not found:
        return None
    if "ratio" in found:
        words = f"of the peak memory of full tokens ({found['dualspeed_mib']:,.0f} of {found['full_mib']:,.0f} MiB)"
        words += ", each of its whole process" if found["of_processes"] else ""
        if "fast_mib" in found:
            set_by = ", set by its slow steps" if found.get("slow_mib", 0.0) > found["fast_mib"] else ""
            words += f"{set_by}; a fast step alone {found['fast_mib'] / found['full_mib']:.2f}"
            words += f" ({found['fast_mib']:,.0f} MiB)"
        return {"value": f"{found['ratio']:.2f}", "words": words}
    words = "peak resident memory of a process; not measured for each training by itself"
    return {"value": f"{found['highest_mib']:,.0f} MiB", "words": words}


def _tokens_tile(facts: Mapping[str, Any]) -> dict[str, str] | None:
    found = facts["tokens"]
    if not found or found["kept_share"] is None:
        return None
    words = "of the visual tokens passed through the language model, over all steps"
    if found["fast_after"] is not None:
        words += f"; {found['fast_before']:,.0f} became {found['fast_after']:,.0f} in a fast step"
    return {"value": rows.percent(found["kept_share"]), "words": words}
