"""What the page shows, as HTML in which every word of a user or a model is text.

Gradio's Markdown component takes the HTML (its HTML component would need a policy that lets the page run text as
code). One block without empty lines is passed on as it stands; `text` writes every character that could mean
something, to HTML or to Markdown, as its number.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean

from trimtab.dualspeed.look import Seen
from trimtab.view.desk import Answer, Choice
from trimtab.view.drawing import data_url, heat_picture, kept_picture, scale_picture

DISTANCE = "distance to the nearest kept token"
ATTENTION = "class-token attention"
HEATS = (DISTANCE, ATTENTION)
"""What heat maps show."""

_SCALE = data_url(scale_picture())


def text(words: object) -> str:
    """Return words such that they are shown as they are; all that are no letters, digits or spaces as numbers."""
    return "".join(letter if letter.isalnum() or letter == " " else f"&#{_shown(letter)};" for letter in str(words))


def _shown(letter: str) -> int:
    """Return the number of a character; of one that HTML cannot hold, that of the sign for unknown characters."""
    number = ord(letter)
    bad = number == 0 or 0x80 <= number < 0xA0 or 0xD800 <= number < 0xE000 or number == 0x0D
    return 0xFFFD if bad else number


def notice(words: object, role: str = "status") -> str:
    """Return a sentence in a frame; role "alert" for what went wrong."""
    return f'<div class="tt-notice tt-{role}" role="{role}">{text(words)}</div>'


def panels(found: Mapping[str, Seen | str], heat: str) -> str:
    """Show pruners side by side.

    Args:
        found: What each pruner kept, or why it cannot, by label.
        heat: One of `HEATS`.
    """
    seen = {label: one for label, one in found.items() if isinstance(one, Seen)}
    high = max((value for one in seen.values() for values in _values(one, heat) for value in values), default=0.0)
    low = min((value for one in seen.values() for values in _values(one, heat) for value in values), default=0.0)
    shown = "".join(
        _panel(label, one, heat, low, high) if isinstance(one, Seen) else _refused(label, one)
        for label, one in found.items()
    )
    told = ", ".join(f"{label}: {one.kept_count} of {one.tokens}" for label, one in seen.items())
    status = f'<p class="tt-status" role="status">{text(f"Kept visual tokens: {told}.")}</p>' if told else ""
    above = f"{status}{_table(seen)}{_legend(seen, heat, low, high)}"
    return f'<div class="tt-found">{above}<div class="tt-panels">{shown}</div></div>'


def answers(found: Sequence[Answer]) -> str:
    """Show what the model said, on all tokens and on those that were kept."""
    rows = "".join(
        f'<tr><th scope="row">{text(one.label)}</th><td class="tt-answer">{_lines(one.text)}</td>'
        f"<td>{'' if one.tokens is None else one.tokens}</td>"
        f"<td>{'' if one.seconds is None else f'{one.seconds:.3f}'}</td></tr>"
        for one in found
    )
    head = _head(("sees", "answer", "visual tokens", "seconds"))
    return _scrolling("Answers of the model", f"<table>{head}<tbody>{rows}</tbody></table>")


def _lines(words: str) -> str:
    # Gradio's Markdown turns line ends into spaces, also those that are written as numbers.
    return "<br />".join(map(text, words.split("\n")))


def unusable(choices: Iterable[Choice]) -> str:
    """List the pruners that cannot be used here, with reasons; empty where all can."""
    missing = [choice for choice in choices if choice.reason is not None]
    if not missing:
        return ""
    items = "".join(f"<li>{text(choice.label)}: {text(choice.reason)}</li>" for choice in missing)
    return f'<details class="tt-missing"><summary>Pruners that cannot be used here</summary><ul>{items}</ul></details>'


def _panel(label: str, seen: Seen, heat: str, low: float, high: float) -> str:
    share = f"{seen.kept_count} of {seen.tokens} tokens kept, {1000 * seen.seconds:.1f} ms"
    shown = _pictures(label, share, seen, heat, low, high)
    return f'<section class="tt-panel"><h2>{text(label)}</h2><p class="tt-share">{text(share)}</p>{shown}</section>'


def _pictures(label: str, share: str, seen: Seen, heat: str, low: float, high: float) -> str:
    if not seen.parts:
        return notice(seen.reason or "It is not known where the tokens lie in the image.")
    kept = _picture(data_url(kept_picture(seen), "JPEG"), f"Kept by {label}: {share}; kept cells framed, others dark.")
    values = _values(seen, heat)
    if not values:
        return f"{kept}{notice(f'There is no {heat} here.')}"
    mean = fmean(value for part in values for value in part)
    limits = f"from {_number(low, high)} (dark) to {_number(high, high)} (bright)"
    words = f"Heat map of the {heat} for {label}: mean {_number(mean, high)}, {limits}."
    return kept + _picture(data_url(heat_picture(seen, values, low, high)), words)


def _refused(label: str, reason: str) -> str:
    return f'<section class="tt-panel"><h2>{text(label)}</h2>{notice(reason, "alert")}</section>'


def _picture(address: str, words: str) -> str:
    return f'<img class="tt-picture" src="{address}" alt="{text(words)}" />'


def _legend(found: Mapping[str, Seen], heat: str, low: float, high: float) -> str:
    if not any(_values(seen, heat) for seen in found.values()):
        return ""
    scale = f'<img src="{_SCALE}" alt="Colours from dark blue to bright yellow" />'
    limits = f"<span>{_number(low, high)}</span>{scale}<span>{_number(high, high)}</span>"
    return f'<div class="tt-legend"><span>{text(heat)}</span><span class="tt-scale">{limits}</span></div>'


def _number(value: float, largest: float) -> str:
    return f"{value:.3g}" if abs(value) > largest / 1000 else "0"


def _table(found: Mapping[str, Seen]) -> str:
    if not found:
        return ""
    rows = "".join(_row(label, seen) for label, seen in found.items())
    head = _head(("pruner", "tokens before", "after", "time, ms", "mean distance", "largest distance"))
    name = "Tokens and times; distances are from a token to the nearest kept one"
    return _scrolling(name, f"<table>{head}<tbody>{rows}</tbody></table>")


def _row(label: str, seen: Seen) -> str:
    distances = [value for part in seen.parts for value in part.distance]
    far = (f"{fmean(distances):.3f}", f"{max(distances):.3f}") if distances else ("", "")
    cells = (seen.tokens, seen.kept_count, f"{1000 * seen.seconds:.1f}", *far)
    data = "".join(f"<td>{cell}</td>" for cell in cells)
    return f'<tr><th scope="row">{text(label)}</th>{data}</tr>'


def _head(columns: Iterable[str]) -> str:
    cells = "".join(f'<th scope="col">{column}</th>' for column in columns)
    return f"<thead><tr>{cells}</tr></thead>"


def _scrolling(name: str, table: str) -> str:
    """Let a wide table scroll by itself, also by keyboard, so that the page need not."""
    return (
        f'<p class="tt-name">{name}</p><div class="tt-scroll" role="region" title="{name}" tabindex="0">{table}</div>'
    )


def _values(seen: Seen, heat: str) -> list[Sequence[float]]:
    if heat == DISTANCE:
        return [part.distance for part in seen.parts]
    return [part.attention for part in seen.parts if part.attention is not None]
