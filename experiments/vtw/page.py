"""Write the tables and charts of the withdrawal experiment from its records.

    python experiments/vtw/page.py

Tables go between marks in the README beside this file and in docs/methods/vtw.md, charts into docs/pictures.
"""

from __future__ import annotations

import math
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from experiments.vtw.charts import curves  # the line above is for this one

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
DOCUMENTS = ("experiments/vtw/README.md", "docs/methods/vtw.md")
"""Where the tables stand; the first has all."""
MAKER = "made by `python experiments/vtw/page.py`; a test compares"
DEPTHS = (6, 12)
CHOICE = "0.003"
ARM = "dualspeed"
COLORS = {6: "#0a0a02", 12: "#0a0a03"}
Record = dict[str, Any]


@cache
def read(kind: str, arm: str = ARM, folder: Path = HERE / "records") -> tuple[Record, ...]:
    """Return the records of a kind: those of all depths, tasks and seeds, sorted."""
    from trimtab.records import read_record

    paths = folder.glob(f"layers-*/*/seed-*/{arm}_{kind}.json")
    found = [read_record(path) for path in paths]
    return tuple(sorted(found, key=lambda r: (r["settings"]["task"], r["settings"]["layers"], r["seed"])))


def depth_records(kind: str, depth: int, arm: str = ARM) -> list[Record]:
    """Return the records of a kind and depth, one per seed."""
    return [record for record in read(kind, arm) if record["settings"]["layers"] == depth]


def pairs(depth: int, arm: str = ARM) -> Iterator[tuple[Record, Record]]:
    """Yield the results of search and accuracy of each seed that has both."""
    accuracy = {record["seed"]: record["results"] for record in depth_records("accuracy", depth, arm)}
    for record in depth_records("search", depth, arm):
        if record["seed"] in accuracy:
            yield record["results"], accuracy[record["seed"]]


def way(results: Record, name: str) -> Record | None:
    """Return what was measured of a way, or None."""
    found: Record | None = next((one for one in results["ways"] if one["name"] == name), None)
    return found


def share(one: Record, questions: int | None = None) -> float:
    """Return the accuracy of a way, of the first questions if asked."""
    marks = one["marks"][:questions]
    return float(marks.count("1") / len(marks))


def random_layer(results: Record, draws: int = 1000) -> tuple[float, float, float]:
    """Return mean accuracy, standard deviation over draws, and share of arithmetic of a layer drawn for each question.

    Layers from a quarter to three quarters of the depth are equally likely, as in the released code (8 to 24 of 32).
    What every question gives at every layer is known, so the mean is exact.
    """
    import numpy as np

    depth, count = results["depth"], results["curve_questions"]
    layers = range(math.ceil(depth / 4), math.floor(3 * depth / 4) + 1)
    found = [way(results, f"vtw_{layer}") for layer in layers]
    marks = np.array([[mark == "1" for mark in one["marks"][:count]] for one in found if one], dtype=float)
    drawn = np.random.default_rng(0).integers(len(marks), size=(draws, count))
    means = marks[drawn, np.arange(count)].mean(1)
    return float(marks.mean()), float(means.std()), statistics.fmean(one["flops_share"] for one in found if one)


def mean(values: Sequence[float], digits: int = 1, sign: bool = False) -> str:
    """Return mean and standard deviation over seeds as text."""
    if not values:
        return ""
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):{'+' if sign else ''}.{digits}f}{spread}"


def small(value: float) -> str:
    """Return a divergence as text."""
    return "0" if value == 0 else f"{value:.1e}" if value < 0.001 else f"{value:.2g}"


def rows(head: Sequence[str], lines: Sequence[Sequence[str]]) -> list[str]:
    """Return a Markdown table, numbers on the right."""
    return [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}", *(f"| {' | '.join(line)} |" for line in lines)]


def vtw_curve() -> list[str]:
    """Divergence, accuracy and cost at every layer."""
    lines = []
    for depth in DEPTHS:
        found = list(pairs(depth))
        for layer in range(depth + 1) if found else ():
            point = [[s[c]["curve"][layer] for s, _ in found] for c in ("last_token", "answer")]
            scored = [(one, a) for _, a in found if (one := way(a, f"vtw_{layer}"))]
            full = [share(way(a, f"vtw_{depth}") or {}, a["curve_questions"]) for _, a in found]
            got = [share(one, a["curve_questions"]) for one, a in scored]
            lines.append([
                str(depth), str(layer), *(small(statistics.fmean(p["mean"] for p in ps)) for ps in point),
                small(statistics.fmean(p["stderr"] for p in point[0])),
                f"{100 * statistics.fmean(p['same_token'] for p in point[0]):.0f} %",
                mean([100 * one for one in got]),
                mean([100 * (a - b) for a, b in zip(got, full, strict=True)], sign=True),
                f"{100 * statistics.fmean(one['flops_share'] for one, _ in scored):.0f} %",
                f"{100 * statistics.fmean(one['kv_share'] for one, _ in scored):.0f} %",
            ])  # fmt: skip
    head = ["layers", "K", "KL, next word", "KL, answer", "standard error", "same word", "accuracy, %", "against all",
            "FLOPs", "KV cache"]  # fmt: skip
    return rows(head, lines)


def vtw_chosen() -> list[str]:
    """The layers that searches choose, and what they cost in accuracy."""
    lines = []
    for depth in DEPTHS:
        found = list(pairs(depth))
        for criterion, words in (("last_token", "next word"), ("answer", "answer")):
            for threshold in found[0][0][criterion]["layers"] if found else ():
                layers = [s[criterion]["layers"][threshold] for s, _ in found]
                scored = [(one, a) for layer, (_, a) in zip(layers, found, strict=True) if (one := _at(a, layer))]
                gaps = [100 * (share(one, _count(one, a)) - _full(a, _count(one, a))) for one, a in scored]
                kept = [100 * (1 - one["flops_share"]) for one, _ in scored]
                entries = [100 * (1 - one["kv_share"]) for one, _ in scored]
                lines.append([
                    str(depth), words, threshold, ", ".join("none" if one is None else str(one) for one in layers),
                    mean(gaps, sign=True), mean(kept), mean(entries),
                ])  # fmt: skip
    head = ["layers", "criterion", "threshold", "K, seed by seed", "accuracy against all, points", "FLOPs saved, %",
            "KV saved, %"]  # fmt: skip
    return rows(head, lines)


def vtw_again() -> list[str]:
    """How much the chosen layer hangs on the 20 prompts."""
    lines = []
    for depth in DEPTHS:
        for record in depth_records("search", depth):
            found = record["results"]
            first = found["last_token"]["layers"][CHOICE]
            others = [str(one) if one is not None else "none" for one in found["again"]]
            counts = [f"{name} ({others.count(name)})" for name in sorted(set(others), key=lambda n: (len(n), n))]
            lines.append([str(depth), str(record["seed"]), str(first or "none"), ", ".join(counts)])
    return rows(["layers", "seed", "K of the first 20 prompts", "K of 10 other sets of 20 (how often)"], lines)


GROUPS: tuple[tuple[str, Callable[[Record], int]], ...] = (
    ("at the layer of the search", lambda results: int(results["chosen"])),
    ("at a third of the layers", lambda results: int(results["depth"]) // 3),
)
LABELS = {
    "random_tokens": "as many random tokens of all at K", "random_tokens_spared": "the same, the asking place spared",
    "divprune": "DivPrune before the language model", "random": "random visual tokens before it",
    "fastv": "FastV at layer 2, fitted",
}  # fmt: skip


def vtw_compared() -> list[str]:
    """Other ways at equal arithmetic, on checkpoints of DualSpeed."""
    return _compared(ARM)


def _compared(arm: str) -> list[str]:
    lines: list[list[str]] = []
    for depth in DEPTHS:
        found = [results for _, results in pairs(depth, arm)]
        if not found:
            continue
        lines.append(_line(depth, "all visual tokens", [(way(a, f"vtw_{depth}"), a) for a in found]))
        for words, layer_of in GROUPS:
            used = [a for a in found if layer_of(a) < depth]
            names = [f"vtw_{layer_of(a)}" for a in used]
            if not used:
                continue
            layers = ", ".join(dict.fromkeys(name.removeprefix("vtw_") for name in names))
            lines.append(_line(depth, f"**VTW {words}** (K = {layers})", _found(used, names)))
            lines += [_line(depth, told, _found(used, [f"{kind}_as_{n}" for n in names]), names)
                      for kind, told in LABELS.items()]  # fmt: skip
        for kind, words in (("fastv", "**FastV at layer 2, half kept**"), ("pyramid_drop", "**PyramidDrop**")):
            near = [_nearest(results, kind) for results in found]
            layers = ", ".join(dict.fromkeys(name.removeprefix("vtw_") for name in near))
            lines.append(_line(depth, words, _found(found, [kind] * len(found)), near))
            lines.append(_line(depth, f"VTW with at most as much (K = {layers})", _found(found, near)))
            if kind == "fastv":
                lines += [
                    _line(depth, LABELS[one], _found(found, [f"{one}_as_fastv"] * len(found)), near)
                    for one in ("divprune", "random")
                ]
    head = ["layers", "way", "FLOPs", "KV cache", "accuracy, %", "against all", "VTW minus this"]
    return rows(head, lines)


def vtw_random_layer() -> list[str]:
    """A random layer beside the searched one and beside half of the layers."""
    lines = []
    for depth in DEPTHS:
        found = [results for _, results in pairs(depth)]
        drawn = [random_layer(a) for a in found]
        if not found:
            continue
        lines.append([
            str(depth), "a random layer, a quarter to three quarters", mean([100 * d[2] for d in drawn]),
            mean([100 * d[0] for d in drawn]), f"{100 * statistics.fmean(d[1] for d in drawn):.1f}", "",
        ])  # fmt: skip
        for words, layer_of in (("VTW at half of the layers", lambda a: a["depth"] // 2), GROUPS[0][:2]):
            used = [(one, a, d) for a, d in zip(found, drawn, strict=True) if (one := way(a, f"vtw_{layer_of(a)}"))]
            got = [100 * share(one, a["curve_questions"]) for one, a, _ in used]
            gaps = [value - 100 * d[0] for value, (_, _, d) in zip(got, used, strict=True)]
            words = words if words.startswith("VTW") else f"VTW {words}"
            lines.append([str(depth), words, mean([100 * one["flops_share"] for one, _, _ in used]), mean(got), "",
                          mean(gaps, sign=True)])  # fmt: skip
    head = ["layers", "way", "FLOPs, %", "accuracy, %", "deviation of a draw", "against a random layer"]
    return rows(head, lines)


def vtw_search_cost() -> list[str]:
    """What a search costs."""
    lines = []
    for depth in DEPTHS:
        found = [record["results"]["cost"] for record in depth_records("search", depth)]
        if not found:
            continue
        counts = {n: statistics.fmean(one["evaluations"][n] for one in found) for n in found[0]["evaluations"]}
        timed = time_record(f"layers-{depth}_search")
        for name, words in (("naive", "the whole model anew for each K"), ("one_pass", "one pass, then the branches"),
                            ("stacked", "one pass, branches side by side")):  # fmt: skip
            apart = "" if name == "naive" else f"{max(one['apart_from_naive'][name] for one in found):.0e}"
            cells = [str(depth), words, f"{counts[name]:.1f}", f"{counts['naive'] / counts[name]:.1f}"]
            cells += ["", ""] if timed is None else _times(timed["results"], name)
            lines.append([*cells, apart])
    head = ["layers", "way to search", "layers run", "times fewer", "seconds", "times faster", "farthest from naive"]
    return rows(head, lines)


def vtw_time() -> list[str]:
    """Prefill times and caches beside the formula."""
    lines = []
    for name in [
        *(f"layers-{depth}_batch-{batch}" for depth in DEPTHS for batch in (1, 16)),
        "wide_576_1",
        "wide_576_16",
    ]:
        record = time_record(name)
        for row in record["results"]["rows"] if record else ():
            told = f"{row['share']:.2f} ({row['low']:.2f} to {row['high']:.2f})"
            lines.append([
                _model_of(name), str(record["results"]["batch"]) if record else "", str(row["layer"]),
                f"{1000 * row['seconds']:.1f} ms", told, f"{row['flops_share']:.2f}",
                f"{row['share'] / row['flops_share']:.2f}", f"{row['kv_bytes'] / 2**20:.2f} MiB",
                f"{row['kv_bytes_told'] / 2**20:.2f} MiB",
                f"{row['decode_share']:.2f}",
            ])  # fmt: skip
    head = ["model", "batch", "K", "prefill", "share of time", "formula", "time / formula", "KV cache", "formula",
            "decode step, share"]  # fmt: skip
    return rows(head, lines)


INSIDE = {
    "dualspeed": "DualSpeed: DivPrune keeps 10 % before the language model",
    "dualspeed_keep_20": "the same, keeping 20 %",
    "dualspeed_then_vtw": "10 %, and VTW at half of the layers",
    "dualspeed_vtw": "VTW at half of the layers only",
    "dualspeed_fastv": "FastV at layer 2 only, half kept",
    "dualspeed_pyramid": "PyramidDrop only",
}


def vtw_inside() -> list[str]:
    """What DualSpeed's fast mode gains where tokens leave inside the language model, at the least depth."""
    from trimtab.records import read_record

    lines = []
    for arm, words in INSIDE.items():
        paths = sorted((HERE / "records" / "training" / f"layers-{DEPTHS[0]}").glob(f"*/seed-*/{arm}.json"))
        found = [read_record(path)["results"] for path in paths]
        steps = [[statistics.median(e["seconds"] for e in one["log"] if e["mode"] == mode) for mode in ("fast", "slow")]
                 for one in found]  # fmt: skip
        full, pruned = (
            [100 * one[f"accuracy_{kind}"]["accuracy"] for one in found if one[f"accuracy_{kind}"] is not None]
            for kind in ("full", "pruned")
        )
        lines.append([
            words, str(len(found)), mean([fast / slow for fast, slow in steps], 2), mean(full), mean(pruned),
        ])  # fmt: skip
    head = ["fast mode", "seeds", "fast step / slow step", "accuracy, all tokens, %", "accuracy, fast view, %"]
    return rows(head, lines)


MAKERS: tuple[Callable[[], list[str]], ...] = (
    vtw_curve, vtw_chosen, vtw_again, vtw_compared, vtw_random_layer, vtw_search_cost, vtw_time, vtw_inside,
)  # fmt: skip
"""What makes the tables; the name of the function is that of the mark."""


def time_record(name: str) -> Record | None:
    """Return a record of times, or None."""
    from trimtab.records import read_record

    path = HERE / "records" / "time" / f"{name}.json"
    return read_record(path) if path.exists() else None


def _model_of(name: str) -> str:
    return (
        f"{name.split('_')[0].removeprefix('layers-')} layers, width 128"
        if "layers" in name
        else "12 layers, width 512"
    )


def _times(results: Record, name: str) -> list[str]:
    times = results["times"][name]
    return [f"{results['seconds'][name]:.2f}", f"{times['median']:.1f} ({times['low']:.1f} to {times['high']:.1f})"]


def _at(results: Record, layer: int | None) -> Record | None:
    return None if layer is None else way(results, f"vtw_{layer}")


def _count(one: Record, results: Record) -> int:
    """Questions on which a way can be held against the whole model."""
    return min(len(one["marks"]), int(results["questions"]))


def _full(results: Record, questions: int) -> float:
    return share(way(results, f"vtw_{results['depth']}") or {}, questions)


def _found(found: Sequence[Record], names: Sequence[str]) -> list[tuple[Record | None, Record]]:
    return [(way(results, name), results) for results, name in zip(found, names, strict=True)]


def _line(depth: int, words: str, found: Sequence[tuple[Record | None, Record]], than: Sequence[str] = ()) -> list[str]:
    """A line of the comparison: means over the seeds that have this way."""
    kept = [(number, one, results) for number, (one, results) in enumerate(found) if one is not None]
    gaps = [100 * (share(one) - _full(results, len(one["marks"]))) for _, one, results in kept]
    ahead = []
    for number, one, results in kept:
        ours = way(results, than[number]) if number < len(than) else None
        if ours is not None:
            ahead.append(100 * (share(ours) - share(one)))
    return [
        str(depth), words, f"{100 * statistics.fmean(one['flops_share'] for _, one, _ in kept):.1f} %",
        f"{100 * statistics.fmean(one['kv_share'] for _, one, _ in kept):.1f} %",
        mean([100 * share(one) for _, one, _ in kept]), mean(gaps, sign=True), mean(ahead, sign=True),
    ]  # fmt: skip


def _nearest(results: Record, name: str) -> str:
    """Name of the withdrawal with at most the arithmetic of another way."""
    target = (way(results, name) or {})["flops_share"]
    fits = [one for k in range(results["depth"] + 1) if (one := way(results, f"vtw_{k}"))]
    return str([one["name"] for one in fits if one["flops_share"] <= target][-1])


def charts() -> dict[str, str]:
    """Return file name -> chart: divergence and accuracy over the layers at both depths."""
    from trimtab.report.charts import Line

    divergence, accuracy, told = [], [], []
    for depth in DEPTHS:
        found = list(pairs(depth))
        if not found:
            continue
        places = [100 * layer / depth for layer in range(depth)]
        logs = [[math.log10(s["last_token"]["curve"][k]["mean"]) for s, _ in found] for k in range(depth)]
        divergence.append(_band(f"{depth} layers", places, logs, depth))
        scores = [[100 * share(one, a["curve_questions"]) for _, a in found if (one := way(a, f"vtw_{k}"))]
                  for k in range(depth + 1)]  # fmt: skip
        accuracy.append(_band(f"{depth} layers", [*places, 100.0], scores, depth))
        told.append(f"{depth} layers: {statistics.fmean(scores[depth // 2]):.1f} % half-way, "
                    f"{statistics.fmean(scores[-1]):.1f} % with all")  # fmt: skip
    if not divergence:
        return {}
    assert all(isinstance(line, Line) for line in divergence)
    axis = "layers that see the image, % of all"
    return {
        "docs/pictures/vtw_divergence.svg": curves(
            divergence, "How much the next word changes", x_label=axis, y_label="log10 of the divergence in nats",
            marks={"threshold 0.003": math.log10(0.003)},
            finding="Mean divergence over 20 prompts falls with every layer that sees the image, at both depths.",
        ),
        "docs/pictures/vtw_accuracy.svg": curves(
            accuracy, "Accuracy when all visual tokens leave", x_label=axis, y_label="accuracy, %",
            finding="; ".join(told),
        ),
    }  # fmt: skip


def _band(label: str, x: Sequence[float], values: Sequence[Sequence[float]], depth: int) -> Any:
    """A line of means over seeds with a band from least to most."""
    from trimtab.report.charts import Line

    low, high = [min(v) for v in values], [max(v) for v in values]
    middle = [statistics.fmean(v) for v in values]
    return Line(label, x, middle, color=COLORS[depth], points=True, low=low, high=high,
                dash="solid" if depth == 12 else "dashed")  # fmt: skip


def marks(name: str) -> tuple[str, str]:
    """Return the comments around a table."""
    return f"<!-- {name}: {MAKER} -->", f"<!-- /{name} -->"


def filled(text: str) -> str:
    """Return a document with the tables of the records between its marks."""
    for make in MAKERS:
        begin, end = marks(make.__name__)
        if begin in text:
            before, rest = text.split(begin, 1)
            _, after = rest.split(end, 1)
            text = "\n".join([before + begin, "", *make(), "", end + after])
    return text


def main() -> None:
    """Write tables and charts."""
    from trimtab.files import write_text_atomic

    texts = {name: filled((ROOT / name).read_text(encoding="utf-8")) for name in DOCUMENTS} | charts()
    for name, text in texts.items():
        write_text_atomic(ROOT / name, text)
    print(f"Wrote {', '.join(texts)}")


if __name__ == "__main__":
    main()
