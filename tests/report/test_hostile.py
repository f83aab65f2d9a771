"""Whatever records hold is shown as text: nothing of it becomes a tag, an attribute, an address or an error."""

from __future__ import annotations

import re

import pytest
from tests.report.test_page import Page

from trimtab.records import make_record
from trimtab.report import render_experiment, render_report

BAD = (
    "\"'><script>alert(1)</script><img src=x onerror=alert(2)>&amp;</svg></title>$\\frac{$ {{ 7*7 }} "
    "\u202e\x00\x1b\ud800 漢"
)


def poison(value):
    """Put the hostile text into every word and every name of a record."""
    if isinstance(value, dict):
        return {name: poison(item) for name, item in value.items()}
    if isinstance(value, list):
        return [poison(item) for item in value]
    return BAD if isinstance(value, str) else value


def hostile_records(arm):
    records = []
    for name in ("full", "dualspeed", f"other_{BAD}"):
        record = arm(name, 80, 40.0, dataset=f"set {BAD}", **({} if name == "full" else {BAD: BAD}))
        accuracy = record["results"]["accuracy_full"]
        accuracy["wrong"] = [{"question": BAD, "answer": BAD, "predicted": BAD, "family": BAD}]
        accuracy["families"] = {f"{key}{BAD}": value for key, value in accuracy["families"].items()}
        record["command"] = ["trimtab", "train", BAD]
        record["settings"] = poison(record["settings"])
        record["versions"] = {BAD: BAD}
        record["hardware"] = poison(record["hardware"])
        record["commit"] = {"hash": BAD, "dirty": True}
        record["started"] = BAD
        records.append(record)
    picture = {
        "image": "iVBORw0KGgo=", "media_type": "image/png", "width": 8, "height": 8, "caption": BAD, "pruner": BAD,
        "keep_ratio": 0.1, "tokens": 4, "kept_count": 1, "parts": [{"box": [0, 0, 8, 8], "grid": [2, 2], "kept": [1]}],
    }  # fmt: skip
    foreign = [
        {**picture, "media_type": "image/svg+xml"}, {**picture, "image": f"AAAA{BAD}"},
        {**picture, "parts": [{"box": [0, BAD, 8, 8], "grid": [2, 2], "kept": [0]}]}, {**picture, "width": BAD},
        {"png_base64": BAD, "caption": BAD}, BAD, {**picture, "image": "PHN2Zz4="},
    ]  # fmt: skip
    under_way = make_record("progress", {}, {"arm": BAD, "steps": BAD, "max_steps": BAD, "log": [{"step": BAD}]})
    return [
        *records,
        make_record("pictures", {}, {"pictures": [picture, *foreign]}),
        make_record(BAD, {}, {BAD: {BAD: [BAD, {BAD: BAD}]}}),
        make_record("dataset", {}, {"dataset": f"set {BAD}", "majority": 0.1}),
        under_way,
    ]


class Attributes(Page):
    """A page with the names of all attributes."""

    def handle_starttag(self, tag, attrs):
        assert not [name for name, _ in attrs if name.startswith("on") or name in ("srcdoc", "formaction", "action")]
        assert tag == "img" or not dict(attrs).get("src")
        super().handle_starttag(tag, attrs)


def look_through(source: str) -> Page:
    page = Attributes(source)
    assert not {"script", "iframe", "object", "embed", "base", "form"} & set(page.tags)
    assert page.tags.count("a") == 1, "the link that skips to the content"
    assert page.tags.count("img") == source.count("<img ")
    assert not re.search(r"[\x00-\x08\x0b-\x1f\u202e\ud800]", source)
    assert all(address.startswith(("data:image/", "data:,", "#")) for address in page.addresses)
    return page


def test_hostile_words_are_shown_as_text(arm, tmp_path):
    title = f"A title {BAD}"
    source = render_report(hostile_records(arm), tmp_path / "a.html", title=title).read_text(encoding="utf-8")
    page = look_through(source)
    assert page.tags.count("img") == 1
    assert "7 more pictures are in the records" in page.text
    assert page.text.count("<script>alert(1)</script>") > 20
    assert "{{ 7*7 }}" in page.text
    drawn = "".join(re.findall(r"<svg.*?</svg>", source, flags=re.DOTALL))
    assert "&lt;script&gt;" in drawn, "labels within drawings are escaped as well"


def test_hostile_words_in_an_experiment_are_shown_as_text(arm, tmp_path):
    records = [r for r in hostile_records(arm) if r["kind"] in ("arm", "pictures")]
    page = render_experiment(records, tmp_path / "a.html", title=BAD, paragraphs=[BAD])
    look_through(page.read_text(encoding="utf-8"))


def test_hostile_directories_are_shown_as_text(arm, tmp_path):
    from trimtab.records import write_record

    name = "<img src=x onerror=alert(1)>"
    write_record(tmp_path / name / "full.json", arm("full", 80, 9.0))
    write_record(tmp_path / "b" / "dual.json", arm("dualspeed", 80, 4.0))
    source = render_report([tmp_path / name, tmp_path / "b"], tmp_path / "a.html").read_text(encoding="utf-8")
    assert "&lt;img src=x onerror=alert(1)&gt;: Full tokens" in source
    look_through(source)


@pytest.mark.parametrize("kind", ["page", "experiment"])
def test_the_page_forbids_scripts_and_addresses(arm, tmp_path, kind):
    render = render_report if kind == "page" else render_experiment
    source = render([arm("full", 80, 9.0)], tmp_path / "a.html").read_text(encoding="utf-8")
    policy = re.search(r'<meta http-equiv="Content-Security-Policy" content="([^"]+)">', source)
    assert policy is not None
    rules = dict(rule.strip().split(" ", 1) for rule in policy[1].replace("&#39;", "'").split(";"))
    assert rules["default-src"] == "'none'"
    assert rules["img-src"] == "data:"
    assert "script-src" not in rules
    assert source.index(policy[0]) < source.index("<style>")
