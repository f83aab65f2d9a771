"""Records of runs as users have them: three arms, a training that is not over, and texts that want to be code."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from trimtab.evaluate.intervals import wilson_interval
from trimtab.records import make_record, write_record

HOSTILE = [
    """<img src=x data-hostile onerror="window.hostile=1;alert(1)">""",
    """</script></style></title><b data-hostile>bold</b>""",
    """" onmouseover="alert(2)" autofocus onfocus="alert(3)" x=\"""",
    """' onmouseover='alert(4)' &lt;b&gt; & {{ 7 * 7 }} ${7 * 7}""",
    """]]></svg><script data-hostile>window.hostile=1</script><!--""",
    """\N{RIGHT-TO-LEFT OVERRIDE}gnp.<b data-hostile>\N{ARABIC LETTER BEH}\N{HEBREW LETTER ALEF}""",
    """javascript:alert(5)""",
]
LONG = "endless" * 1430
CELL, GRID, KEPT = 16, (4, 4), (0, 5, 10)


def _accuracy(correct: int, number: int = 200, **words: str) -> dict[str, Any]:
    half = number // 2
    families = {words.get("family", "digit"): (min(correct, half), half), "place": (max(correct - half, 0), half)}
    wrong = {"question": words.get("question", "Which?"), "answer": words.get("answer", "nine"), "family": "digit"}
    return {
        **_share(correct, number),
        "families": {name: _share(*counts) for name, counts in families.items()},
        "marks": "1" * correct + "0" * (number - correct),
        "wrong": [{"row": row, **wrong, "predicted": words.get("predicted", "one")} for row in range(4)],
    }


def _share(correct: int, number: int) -> dict[str, Any]:
    low, high = wilson_interval(correct, number)
    return {"accuracy": correct / number, "correct": correct, "number": number, "interval": [low, high]}


def _log(arm: str, steps: int) -> list[dict[str, Any]]:
    noise = np.random.default_rng(len(arm))
    modes = {"full": ["full"], "pruned": ["fast"]}.get(arm, ["fast"] * 4 + ["slow"])
    entries = []
    for step in range(1, steps + 1):
        mode = modes[step % len(modes)]
        loss = 2 / (1 + step / 20) + 0.2 * float(noise.random())
        seconds = {"full": 0.4, "fast": 0.1, "slow": 0.5}[mode] * (1 + 0.2 * float(noise.random()))
        entries.append(
            {"step": step, "mode": mode, "loss": loss, "ce": loss, "kl": 0.01 if mode == "slow" else None,
             "seconds": seconds, "visual_tokens_full": 256, "visual_tokens_kept": 256 if mode == "full" else 25}
        )  # fmt: skip
    return entries


def arm(name: str, correct: int, steps: int = 60, seed: int = 0, **words: str) -> dict[str, Any]:
    """Return the record of an arm of which so many of 200 answers are right."""
    log = _log(name, steps)
    method = {} if name == "full" else {"dualspeed": {"pruner": "divprune", "keep_ratio": 0.1, "slow_ratio": 0.2}}
    results = {
        "arm": words.get("arm", name), "dataset": words.get("dataset", "scenes"), "steps": steps, "samples": 8 * steps,
        "seconds_train": sum(entry["seconds"] for entry in log), "log": log,
        "accuracy_full": _accuracy(correct, **words),
        "accuracy_pruned": None if name == "full" else _accuracy(correct - 4, **words),
    }  # fmt: skip
    settings = {"learning_rate": 0.002, "note": words.get("setting", "plain"), **method}
    return make_record("arm", settings, results, seed=seed, seconds=30.0)


def white_picture(caption: str, parts: int = 1) -> dict[str, Any]:
    """Return an entry of a white picture of which three cells per part are kept."""
    side = CELL * GRID[0]
    stream = io.BytesIO()
    Image.new("RGB", (side * parts, side), "white").save(stream, format="PNG")
    boxes = [[side * part, 0, side * (part + 1), side] for part in range(parts)]
    return {
        "image": base64.b64encode(stream.getvalue()).decode(), "media_type": "image/png",
        "width": side * parts, "height": side, "caption": caption, "pruner": "divprune", "keep_ratio": 0.1875,
        "tokens": 16 * parts, "kept_count": len(KEPT) * parts,
        "parts": [{"box": box, "grid": list(GRID), "kept": list(KEPT)} for box in boxes],
    }  # fmt: skip


def write_arms(folder: Path, *, captions: tuple[str, ...] = ("What is shown?",), seed: int = 0, **words: str) -> Path:
    """Write what a run of three arms leaves; return its folder."""
    for name, correct in {"full": 180, "pruned": 168, "dualspeed": 178}.items():
        write_record(folder / "records" / f"{name}.json", arm(name, correct, seed=seed, **words))
    pictures = [white_picture(caption, parts) for caption in captions for parts in (1, 2)]
    write_record(folder / "records" / "pictures.json", make_record("pictures", {}, {"pictures": pictures}))
    floor = {"dataset": words.get("dataset", "scenes"), "majority": 0.1, "language_only": 0.3, "rows": 200}
    write_record(folder / "records" / "dataset.json", make_record("dataset", {}, floor))
    return folder


def write_running(folder: Path, trained: dict[str, Any], steps: int) -> Path:
    """Write what a training has left that is at this step of those of a finished record; return its folder."""
    results = dict(trained["results"])
    entries = [entry for entry in results["log"] if "loss" in entry and entry["step"] <= steps]
    results |= {"status": "running", "steps": steps, "max_steps": trained["results"]["steps"], "log": entries}
    record = make_record("progress", trained["settings"], results, seed=trained["seed"])
    write_record(folder / "records" / "progress.json", record)
    return folder


def write_hostile(folder: Path) -> Path:
    """Write a run in which every text that a user, a file or a model supplies wants to be more than text."""
    names = ["arm", "dataset", "setting", "family", "question", "answer", "predicted"]
    write_arms(folder, captions=(*HOSTILE, LONG), **dict(zip(names[2:], HOSTILE, strict=False)))
    for number, text in enumerate([*HOSTILE, LONG]):
        record = arm("dualspeed", 170, 10, **dict.fromkeys(names, text))
        write_record(folder / "records" / f"hostile-{number}.json", record)
    return folder
