"""Put the table of the kept records between the marks of docs/guides/check.md, and print it.

python experiments/check/table.py
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
PAGE = HERE.parents[1] / "docs" / "guides" / "check.md"
BEGIN = "<!-- comparison: made by `python experiments/check/table.py`; a test compares -->"
END = "<!-- /comparison -->"


def lines_of(records: Sequence[dict[str, Any]]) -> list[str]:
    """Return a Markdown table of the comparisons, and how far prediction and measurement are apart."""
    lines = ["", "| model | run | check | arithmetic alone | bench |", "|---|---|---|---|---|"]
    runs: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for record in records:
        sizes, results = record["settings"]["sizes"], record["results"]
        name = f"{sizes['layers']} + {sizes['tower_layers']} blocks"
        runs[name].append(results)
        gains = [f"{results[key]:.2f}" for key in ("predicted", "arithmetic", "measured")]
        lines.append(f"| {' | '.join([name, str(len(runs[name])), *gains])} |")
    every = [results for found in runs.values() for results in found]
    apart = max(abs(results["predicted"] / results["measured"] - 1) for results in every)
    bench = [[results["measured"] for results in found] for found in runs.values()]
    itself = max(max(found) / min(found) - 1 for found in bench)
    widest = max(max(results["spread"].values()) for results in every)
    cores = records[0]["hardware"]["cores"]
    return [
        *lines,
        "",
        f"On {cores} cores, which other programs may have used as well, prediction and measurement are up to "
        f"{apart:.0%} apart,",
        f"`bench` differs from itself by up to {itself:.0%}, and the rounds of `check` spread by up to {widest:.0%}.",
        "",
    ]


def main() -> None:
    """Write the table into the page."""
    from trimtab.files import write_text_atomic
    from trimtab.records import read_records

    lines = lines_of(read_records(HERE))
    before, rest = PAGE.read_text(encoding="utf-8").split(BEGIN, 1)
    write_text_atomic(PAGE, "\n".join([before + BEGIN, *lines, END + rest.split(END, 1)[1]]))
    print("\n".join(lines))


if __name__ == "__main__":
    main()
