"""The reference names everything that an entry of the log can hold."""

from __future__ import annotations

import json
import re
from pathlib import Path

from tests.documents.reading import ROOT
from tests.run.small_run import write_run

from trimtab.run.config import LOGGING_STEPS, load_config
from trimtab.run.train import train

OF_THE_TRAINER = {"step", "epoch", "loss", "learning_rate", "grad_norm"}
AT_THE_END = {"train_runtime", "train_samples_per_second", "train_steps_per_second", "train_loss", "total_flos"}


def described() -> set[str]:
    text = (ROOT / "docs" / "reference" / "records.md").read_text(encoding="utf-8")
    return set(re.findall(r"`(\w+)`", text.partition("## The log")[2].partition("\n## ")[0]))


def logged(folder: Path, **changes: object) -> set[str]:
    folder.mkdir()
    train(load_config(write_run(folder, **changes)))
    record = json.loads((folder / "out" / "records" / "train.json").read_text(encoding="utf-8"))
    return {name for entry in record["results"]["log"] for name in entry}


def test_every_entry_of_a_log_is_described(tmp_path: Path) -> None:
    found = logged(tmp_path / "steps") | logged(tmp_path / "plain", dualspeed=False)
    found |= logged(tmp_path / "samples", dualspeed={"schedule_unit": "sample", "packing": True, "keep_ratio": 0.25})
    assert {"seconds_fast", "seconds_slow", "seconds", "kl", "samples_fast"} <= found
    assert described() >= OF_THE_TRAINER
    assert found - AT_THE_END <= described()


def test_the_default_is_the_one_that_is_told() -> None:
    for page in ("records", "settings"):
        text = (ROOT / "docs" / "reference" / f"{page}.md").read_text(encoding="utf-8")
        assert re.search(rf"`logging_steps`[^.]*\b{LOGGING_STEPS}\b", text), page
