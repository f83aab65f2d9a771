"""Pictures of the user's own images with the visual tokens that fast steps keep, as a record for the report."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from trimtab.data.images import image_path
from trimtab.data.messages import to_messages
from trimtab.dualspeed.config import DualSpeedConfig
from trimtab.dualspeed.look import ImageLook
from trimtab.dualspeed.ranks import is_sharded
from trimtab.records import make_record, write_record

logger = logging.getLogger("trimtab")

PICTURES_FILE = "records/pictures.json"
"""Where the record goes, below the output directory."""
PICTURES = 6
MOST_ROWS = 100
"""Rows that are looked through for images; later ones are not read."""
LONGEST_CAPTION = 200


@dataclass(frozen=True)
class Example:
    """One image of the user's data.

    Attributes:
        image: The image, opened.
        question: What is asked of it first, "" where nothing is.
        name: Name of its file without folders, or the row that it came from.
    """

    image: Any
    question: str
    name: str

    @property
    def caption(self) -> str:
        """File and question, cut where they are long."""
        text = f"{self.name}: {self.question}" if self.question else self.name
        return text if len(text) <= LONGEST_CAPTION else f"{text[: LONGEST_CAPTION - 1]}…"


def draw_pictures(
    directory: Path,
    model: Any,
    processor: Any,
    config: DualSpeedConfig,
    rows: Callable[[], Any],
    files: Sequence[str] = (),
) -> None:
    """Write the record of what fast steps keep of the first images of some rows; never raises.

    A training that has come to its end must not fail over a picture: what goes wrong is one line of warning. Of a
    model whose parameters lie on several processes nothing is drawn, since one process cannot run it alone.

    Args:
        directory: The output directory.
        model: The model, as training left it.
        processor: Its processor.
        config: The settings of the fast mode.
        rows: Returns rows as `trimtab.run.load.load_rows_of` does.
        files: The files that they came from.
    """
    if is_sharded(model):
        logger.warning("No pictures of kept tokens are drawn: the model's parameters lie on several processes.")
        return
    try:
        entries = [
            ImageLook(model, processor, example.image, example.question).choose(config).to_entry(example.caption)
            for example in islice(examples(rows()), PICTURES)
        ]
        if not entries:
            return
        results = {"pictures": entries, "arm": "dualspeed", "dataset": ", ".join(Path(file).stem for file in files)}
        record = make_record("pictures", {"dualspeed": config.to_dict()}, results, seed=config.seed)
        write_record(directory / PICTURES_FILE, record)
    except Exception as error:  # whatever it is: the checkpoint and its record are there, and are worth more
        reason = (str(error).strip().splitlines() or ["no reason given"])[0]
        logger.warning("No pictures of kept tokens were drawn (%s: %s).", type(error).__name__, reason)


def examples(rows: Any) -> Iterator[Example]:
    """Yield the first image of each of the first rows that have one.

    Args:
        rows: Rows of one file, or several joined.
    """
    parts = getattr(rows, "datasets", [rows])
    places = ((part, place) for part in parts for place in range(len(part)))
    for part, place in islice(places, MOST_ROWS):
        row = part[place]
        if row["images"]:
            yield Example(row["images"][0], _question(row["messages"]), _name(part, place))


def _question(messages: Sequence[Mapping[str, Any]]) -> str:
    """The text of the first turn of the user."""
    turn: Mapping[str, Any] = next((one for one in messages if one["role"] == "user"), {"content": []})
    return " ".join(part["text"] for part in turn["content"] if part["type"] == "text").strip()


def _name(rows: Any, place: int) -> str:
    number = rows.source.number(rows.places[place])
    image = to_messages(rows.source.raw(rows.places[place]))["images"][0]
    path = image_path(image, rows.image_folder)
    return f"{'line' if rows.counting == 'line' else 'row'} {number}" if path is None else path.name
