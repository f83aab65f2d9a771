"""The images looked at, the pruners asked, and the model's answers; one at a time, for a model serves one caller."""

from __future__ import annotations

import inspect
import sys
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from PIL import Image

from trimtab.dualspeed.config import DualSpeedConfig
from trimtab.dualspeed.inference import prune_for_inference, saved_settings, settings_folder
from trimtab.dualspeed.look import ImageLook, PixelLook, Seen
from trimtab.errors import SettingError, TrimtabError
from trimtab.evaluate import exact_match
from trimtab.pruners import PRUNERS, pruner_names
from trimtab.run.load import load_to_use
from trimtab.run.progress import no_other_bars, plain_output
from trimtab.view.uploads import open_kept

READS = "use_text"
"""Option that lets a pruner read the question."""

LOOKS = 4
"""Images whose features are remembered."""

MAX_NEW_TOKENS = 64
"""Longest answer in tokens."""

Look = ImageLook | PixelLook


@dataclass(frozen=True)
class Choice:
    """A pruner as the page offers it.

    Attributes:
        label: What the page calls it.
        pruner: Its name.
        reads: Whether it reads the question.
        reason: Why it cannot be used here, or None.
    """

    label: str
    pruner: str
    reads: bool = False
    reason: str | None = None

    @property
    def options(self) -> dict[str, Any]:
        """Its keyword arguments."""
        return {READS: True} if self.reads else {}


@dataclass(frozen=True)
class Trained:
    """A model to look through and to ask.

    Attributes:
        model: The model, in evaluation mode.
        processor: Its processor.
        settings: Settings of its training as far as pruned inference uses them, without isolator where it has none.
        isolator: Folder of the trained isolator, or None.
    """

    model: Any
    processor: Any
    settings: DualSpeedConfig
    isolator: Path | None


@dataclass(frozen=True)
class Answer:
    """What the model said.

    Attributes:
        label: What it saw: all tokens, or those that a pruner kept.
        text: The answer as it was generated, or the reason why there is none.
        seconds: Time from the processor to the last token; None where there is no answer.
        tokens: Visual tokens that it saw; None where there is no answer.
    """

    label: str
    text: str
    seconds: float | None = None
    tokens: int | None = None


def load(name: str) -> Trained:
    """Load a model for the view.

    Args:
        name: A directory with a model or with adapters, or a hub name.

    Raises:
        SettingError: There is no such model.
        UnsupportedModelError: It is no vision-language model of transformers.
    """
    with no_other_bars() if plain_output(sys.stderr) else nullcontext():
        model, processor = load_to_use(name)
    if settings_folder(name) is None:
        return Trained(model, processor, DualSpeedConfig(isolator_tokens=0), None)
    settings, folder = saved_settings(name)
    return Trained(model, processor, settings, folder if settings.isolator_tokens else None)


class Desk:
    """Everything that the page asks for.

    Args:
        trained: The model, or None to look at the pixels of patches.

    Attributes:
        choices: Every registered pruner, those that read the question a second time, in the order of their names.
    """

    def __init__(self, trained: Trained | None = None) -> None:
        self.trained = trained
        self._lock = threading.Lock()
        self._looks: OrderedDict[tuple[Path, str], Look] = OrderedDict()
        # Also a first use of the model, whose errors come before the page does.
        self.choices = tuple(_choices(self._open(Image.new("RGB", (336, 336), (128, 128, 128)), "what is this ?")))

    def choice(self, label: str) -> Choice:
        """Return the choice of that label.

        Raises:
            SettingError: There is none.
        """
        for choice in self.choices:
            if choice.label == label:
                return choice
        raise SettingError(f"There is no pruner {label!r} here. Choose from the list.")

    def select(self, image: Path, label: str, keep_ratio: float, question: str = "") -> Seen:
        """Let a pruner choose among the tokens of an image; the vision tower runs only for one not seen lately.

        Args:
            image: A file that `trimtab.view.uploads.keep_image` kept.
            label: Label of the choice.
            keep_ratio: Share that is kept, in (0, 1].
            question: What is asked; only pruners that read it need it.

        Raises:
            SettingError: The pruner cannot be used here, or has no question to read.
        """
        choice = self.choice(label)
        if choice.reason is not None:
            raise SettingError(f"{label} cannot be used here: {choice.reason}")
        if choice.reads and not question.strip():
            raise SettingError(f"{label} reads the question, and there is none. Write one.")
        with self._lock:
            look = self._look(image, question.strip() if choice.reads else "")
            return look.select(choice.pruner, keep_ratio=keep_ratio, options=choice.options)

    def answers(self, image: Path, labels: Sequence[str], keep_ratio: float, question: str) -> list[Answer]:
        """Ask the model on all visual tokens, then on those that each pruner keeps.

        Greedy, each answer timed from the processor to its last token, after one answer that is not timed.

        Args:
            image: A kept file.
            labels: Labels of choices.
            keep_ratio: Share that is kept.
            question: What is asked.

        Returns:
            One answer for all tokens, one for each pruner; where a pruner cannot answer, the reason.

        Raises:
            SettingError: There is no model or no question.
        """
        if self.trained is None:
            raise SettingError("Only a model can answer. Start the view with --model.")
        if not question.strip():
            raise SettingError("There is no question. Write one.")
        row = {"image": open_kept(image), "questions": [question.strip()], "answers": [""]}
        with self._lock:
            self._ask(row)
            text, seconds = self._ask(row)
            full = Answer("all tokens", text, seconds, self._look(image, "").tokens)
            return [full, *(self._pruned(image, self.choice(label), keep_ratio, row) for label in labels)]

    def _pruned(self, image: Path, choice: Choice, keep_ratio: float, row: dict[str, Any]) -> Answer:
        assert self.trained is not None
        try:
            # One image keeps its share; so does pruned inference.
            config = replace(
                self.trained.settings, pruner=choice.pruner, pruner_options=choice.options, keep_ratio=keep_ratio,
                keep_spread="fixed",
            )  # fmt: skip
            look = self._look(image, row["questions"][0] if choice.reads else "")
            with prune_for_inference(self.trained.model, config, self.trained.isolator) as handle:
                text, seconds = self._ask(row, prepare=handle.prune_inputs)
            return Answer(choice.label, text, seconds, look.choose(config).kept_count)
        except TrimtabError as error:
            return Answer(choice.label, str(error))

    def _ask(self, row: dict[str, Any], prepare: Any = None) -> tuple[str, float]:
        assert self.trained is not None
        found = exact_match(
            self.trained.model, self.trained.processor, [row], max_new_tokens=MAX_NEW_TOKENS, prepare=prepare,
            predictions=True,
        )  # fmt: skip
        return str(found["predictions"][0]), float(found["seconds"])

    def _look(self, image: Path, question: str) -> Look:
        key = (image, question)
        if key not in self._looks:
            self._looks[key] = self._open(open_kept(image), question)
        self._looks.move_to_end(key)
        while len(self._looks) > LOOKS:
            self._looks.popitem(last=False)
        return self._looks[key]

    def _open(self, image: Image.Image, question: str) -> Look:
        if self.trained is None:
            return PixelLook(image)
        return ImageLook(self.trained.model, self.trained.processor, image, question)


def _choices(look: Look) -> Iterator[Choice]:
    reasons = look.pruners()
    for name in pruner_names():
        yield Choice(name, name, reason=reasons[name])
        if READS in inspect.signature(PRUNERS.get(name)).parameters:
            yield Choice(f"{name}, reading the question", name, reads=True, reason=_why_unread(look, name))


def _why_unread(look: Look, name: str) -> str | None:
    """Say why a pruner cannot read the question here, by trying."""
    try:
        look.select(name, options={READS: True})
    except TrimtabError as error:
        return str(error)
    return None
