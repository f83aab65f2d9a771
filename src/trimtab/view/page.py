"""The controls of the page, and what they do."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from trimtab.dualspeed.look import Seen
from trimtab.errors import DataError, SettingError, TrimtabError
from trimtab.view.desk import Desk
from trimtab.view.panels import HEATS, answers, notice, panels, text, unusable

FIRST = ("divprune", "random")
"""Pruners that are shown at the start."""

KEEP_RATIO = 0.1
"""Share that is kept at the start."""

NO_MODEL = (
    "There is no model: the features of a token are the pixels of its patch (14 by 14 pixels, 576 tokens). A trained "
    "vision tower sees more alike and more unlike things than pixels do. Start with --model to look through one."
)
HOW_TO_READ = (
    "Each cell is one visual token. A pruner keeps a share of them: kept cells are framed, dropped ones lie in the "
    "dark. The heat map below each picture colours the same cells."
)
NO_IMAGE = "Choose an image: drop a file on the field above, or press it."


def build_page(desk: Desk, images: Sequence[tuple[str, Path]], title: str) -> Any:
    """Build the page.

    Args:
        desk: Answers what is asked.
        images: Names and files of the images given at the start; the first is shown.
        title: What is looked through, in words.

    Returns:
        The ``gradio.Blocks``.
    """
    import gradio as gr

    usable = [choice.label for choice in desk.choices if choice.reason is None]
    first = [label for label in FIRST if label in usable] or usable[:1]
    # Gradio would check and convert what comes from the controls; what is wrong is told in words here instead. Its
    # queue answers over a stream that the browser closes and opens again, and of two quick clicks one gets lost.
    quiet: dict[str, Any] = {
        "preprocess": False,
        "api_visibility": "private",
        "show_progress": "hidden",
        "queue": False,
    }
    with gr.Blocks(title="trimtab view", analytics_enabled=False) as page:
        _words(gr, f"<div><h1>Which visual tokens stay</h1><p>{text(title)} {text(HOW_TO_READ)}</p></div>")
        if desk.trained is None:
            _words(gr, notice(NO_MODEL))
        with gr.Row():
            with gr.Column(scale=1, min_width=280):
                image = gr.Image(
                    value=str(images[0][1]) if images else None, type="filepath", sources=["upload", "clipboard"],
                    label="Image", alt_text="The image that is looked at", buttons=[], height=260,
                )  # fmt: skip
                given = gr.Radio(
                    [(name, number) for number, (name, _) in enumerate(images)], value=0 if images else None,
                    label="Images given at the start", visible=len(images) > 1,
                )  # fmt: skip
            with gr.Column(scale=2, min_width=280):
                pruners = gr.CheckboxGroup(usable, value=first, label="Pruners")
                ratio = gr.Slider(0.01, 1, KEEP_RATIO, step=0.01, label="Keep ratio", buttons=[])
                heat = gr.Radio([(name.capitalize(), name) for name in HEATS], value=HEATS[0], label="Heat map")
                question = gr.Textbox(label="Question", info=_question_info(desk), max_lines=3)
                ask = gr.Button("Ask the model", visible=desk.trained is not None)
                _words(gr, unusable(desk.choices))
        told = _words(gr, "")
        found = _words(gr, notice(NO_IMAGE))
        asked = [image, pruners, ratio, heat, question]
        show = _in_words(lambda *values: _show(desk, *values))
        late: dict[str, Any] = {"trigger_mode": "always_last", **quiet}
        # Answers belong to what they were given for; other changes leave them.
        gr.on([image.change, pruners.change, ratio.change], lambda *v: (show(*v), ""), asked, [found, told], **late)
        gr.on([heat.change, question.submit, question.blur, page.load], show, asked, found, **late)
        question.input(lambda: "", None, told, **late)
        ask.click(_in_words(lambda *values: _ask(desk, *values)), asked, told, **{**quiet, "show_progress": "full"})
        given.change(lambda number: _given(images, number), given, image, **quiet)
    return page


def _show(desk: Desk, image: Any, pruners: Any, ratio: Any, heat: Any, question: Any) -> str:
    if image is None:
        return notice(NO_IMAGE)
    path, labels, keep_ratio = _file(image), _labels(pruners), _ratio(ratio)
    if heat not in HEATS:
        raise SettingError(f"There is no heat map {heat!r}. Choose from the list.")
    if not labels:
        return notice("Choose a pruner.")
    found: dict[str, Seen | str] = {}
    for label in labels:
        try:
            found[label] = desk.select(path, label, keep_ratio, str(question or ""))
        except SettingError as error:
            found[label] = str(error)
    return panels(found, heat)


def _ask(desk: Desk, image: Any, pruners: Any, ratio: Any, heat: Any, question: Any) -> str:
    if image is None:
        return notice(NO_IMAGE)
    return answers(desk.answers(_file(image), _labels(pruners), _ratio(ratio), str(question or "")))


def _in_words(answer: Callable[..., str]) -> Callable[..., str]:
    """Turn what goes wrong into a notice on the page."""

    def tell(*values: Any) -> str:
        try:
            return answer(*values)
        except TrimtabError as error:
            return notice(error, "alert")
        except Exception as error:  # a fault of ours or of the model must not leave an old picture standing
            traceback.print_exc()
            return notice(f"This could not be done ({type(error).__name__}: {error}). The terminal says more.", "alert")

    return tell


def _file(image: Any) -> Path:
    path = image.get("path") if isinstance(image, dict) else None
    if not isinstance(path, str):
        raise DataError("The image has no file. Choose it again.")
    return Path(path)


def _labels(pruners: Any) -> list[str]:
    if not isinstance(pruners, list):
        raise SettingError("The pruners must be a list. Load the page again.")
    return list(dict.fromkeys(map(str, pruners)))


def _ratio(ratio: Any) -> float:
    if isinstance(ratio, bool) or not isinstance(ratio, (int, float)):
        raise SettingError(f"The keep ratio must be a number in (0, 1], but {ratio!r} came.")
    return float(ratio)


def _given(images: Sequence[tuple[str, Path]], number: Any) -> str | None:
    known = isinstance(number, int) and 0 <= number < len(images)
    return str(images[number][1]) if known else None


def _question_info(desk: Desk) -> str:
    if desk.trained is None:
        return "Only a model reads it; there is none."
    return "Read by the model, and by pruners that say so."


def _words(gr: Any, value: str) -> Any:
    return gr.Markdown(value, latex_delimiters=[], sanitize_html=True, buttons=[], container=False)
