"""Make the picture of `trimtab train` on a terminal from a small real run: `python docs/make_terminal_picture.py`.

The run takes about a minute on two CPU cores and needs no download. The picture shows the table before the first step
and the line at the foot of the terminal as it stood in the middle of the run; paces are those of the machine.
"""

from __future__ import annotations

import argparse
import io
import json
import re
import sys
import tempfile
from contextlib import chdir
from pathlib import Path
from typing import Any

from chromium import MISSING, find_chromium, launch

PICTURE = Path(__file__).parent / "pictures" / "terminal.png"
COMMAND = "trimtab train --config run.yaml"
COLUMNS = 96
"""Width of the terminal in the picture."""
SHARE = 0.7
"""Share of the steps that are done when the line is taken."""
STEPS = 120
ROWS = 160


def main() -> None:
    """Train, and write the picture."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--to", type=Path, default=PICTURE, help="where the picture goes")
    to = arguments.parse_args().to.resolve()
    browser = find_chromium()
    if browser is None:
        sys.exit(MISSING)
    with tempfile.TemporaryDirectory() as folder, chdir(folder):
        facts, figures = run_and_look(write_run(Path()))
    take_picture(browser, svg_of(facts, figures), to)


def write_run(folder: Path) -> Path:
    """Write a small LLaVA with random weights, conversations about scenes, and a run file; return the run file."""
    import yaml

    from trimtab.data.scenes import conversation, make_scenes, vocabulary
    from trimtab.quickstart.model import SmallLlava, build_model, build_processor

    processor = build_processor(SmallLlava(), vocabulary())
    build_model(SmallLlava(), processor.tokenizer).save_pretrained(str(folder / "small-llava"))
    processor.save_pretrained(str(folder / "small-llava"))
    lines = []
    for number, scene in enumerate(make_scenes("train", ROWS, questions=4)):
        row, name = conversation(scene), f"{number}.png"
        row["images"][0].save(folder / name)
        lines.append(json.dumps({"messages": row["messages"], "images": [name]}))
    (folder / "train.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    settings = {
        "model_name_or_path": "small-llava",
        "data_files": "train.jsonl",
        "output_dir": "out",
        "per_device_train_batch_size": 4,
        "max_steps": STEPS,
        "learning_rate": 1e-3,
        "logging_steps": 10,
        "save_strategy": "no",
        "use_cpu": True,
        "freeze": ["vision_tower"],
        "dualspeed": {"pruner": "divprune", "keep_ratio": 0.1, "slow_ratio": 0.1},
    }
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(settings), encoding="utf-8")
    return path


def run_and_look(config: Path) -> tuple[dict[str, Any], Any]:
    """Train as the run file says; return the facts of the table and the figures of one moment."""
    from trimtab.run.config import load_config
    from trimtab.run.train import train
    from trimtab.run.train_progress import TrainView

    class Look(TrainView):
        """Keeps the table, and the figures after a log at the moment that is wanted."""

        def __init__(self) -> None:
            self.facts: dict[str, Any] = {}
            self.figures: Any = None

        def begin(self, facts: Any, figures: Any, *, bar: bool) -> None:
            self.facts = dict(facts)

        def step(self, figures: Any) -> None:
            if figures.step <= SHARE * figures.steps:
                self.figures = figures

    look = Look()
    train(load_config(config), look)
    return look.facts, look.figures


def svg_of(facts: dict[str, Any], figures: Any) -> str:
    """Draw a terminal with the command, the table and the line."""
    from rich.console import Console

    from trimtab.cli.show import cell_text, framed_table
    from trimtab.cli.show_training import training_lines

    console = Console(record=True, width=COLUMNS, file=io.StringIO(), force_terminal=True, color_system="truecolor")
    console.print(f"[bold green]$[/] {COMMAND}")
    console.print(framed_table("Training", None, [(name, cell_text(value)) for name, value in facts.items()]))
    console.print(training_lines(figures))
    # Without the letters that Rich's picture would fetch from elsewhere.
    return re.sub(r"@font-face\s*{[^}]*}", "", console.export_svg(title="trimtab"))


def take_picture(browser: str, svg: str, to: Path) -> None:
    """Let the browser draw it."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        page = launch(playwright, browser).new_page(device_scale_factor=2, viewport={"width": 1000, "height": 800})
        page.set_content(f"<body style='margin:0;background:transparent'>{svg}</body>")
        page.locator("svg").screenshot(path=str(to), omit_background=True)


if __name__ == "__main__":
    main()
