"""Write a small data set as a user would have it: JSON lines of conversations, and a folder of pictures.

The pictures are scenes of handwritten digits that trimtab draws itself, so nothing is downloaded.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from trimtab.data.scenes import conversation, make_scenes


def write_rows(folder: Path, split: str, count: int) -> Path:
    """Write `count` conversations to `folder/split.jsonl`, in the layout that TRL reads."""
    pictures = folder / "images"
    pictures.mkdir(parents=True, exist_ok=True)
    file = folder / f"{split}.jsonl"
    with file.open("w", encoding="utf-8") as lines:
        for number, scene in enumerate(make_scenes(split, count, seed=1)):
            row = conversation(scene)
            name = f"{split}-{number:04}.png"
            row["images"][0].save(pictures / name)
            lines.write(json.dumps({"messages": row["messages"], "images": [f"images/{name}"]}) + "\n")
    return file


def main(folder: str, train: int = 3000, test: int = 200) -> None:
    for split, count in (("train", train), ("test", test)):
        print(f"Wrote {write_rows(Path(folder), split, count)} with {count} rows.")


if __name__ == "__main__":
    main(sys.argv[1] if sys.argv[1:] else "runs/scenes", *map(int, sys.argv[2:4]))
