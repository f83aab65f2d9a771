"""The page of a run: whole, self-contained, and saying what the records say."""

from __future__ import annotations

import re
from html.parser import HTMLParser

import pytest

from trimtab.errors import DataError, OutputError
from trimtab.records import make_record, write_record
from trimtab.report import render_report

EMPTY_TAGS = {"meta", "link", "img", "br", "path", "use", "rect", "circle", "input"}


class Page(HTMLParser):
    """What a page holds: tags in balance, texts, rows of its tables, ids, addresses."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.source = source
        self.open: list[str] = []
        self.ids: list[str] = []
        self.addresses: list[str] = []
        self.tags: list[str] = []
        self.words: list[str] = []
        self.feed(source)
        assert self.open == [], "every tag is closed"

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        values = dict(attrs)
        self.ids += [values["id"]] if "id" in values else []
        self.addresses += [values[name] for name in ("src", "href", "xlink:href") if name in values]
        if tag not in EMPTY_TAGS:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in EMPTY_TAGS:
            self.open.pop()

    def handle_endtag(self, tag):
        if tag not in EMPTY_TAGS:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data.replace("\N{NO-BREAK SPACE}", " "))

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.words))


def render(records, tmp_path) -> Page:
    return Page(render_report(records, tmp_path / "page.html").read_text(encoding="utf-8"))


def test_the_page_needs_nothing_from_outside(run, tmp_path):
    page = render(run, tmp_path)
    assert "script" not in page.tags
    assert page.tags.count("style") == 1
    assert all(address.startswith(("data:", "#")) for address in page.addresses)
    assert not re.findall(r"@import|url\((?!#)", page.source)
    spaces = {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}
    assert set(re.findall(r"https?://[^\s\"<]+", page.source)) == spaces


def test_ids_are_unique_and_every_reference_has_its_id(run, tmp_path):
    page = render(run, tmp_path)
    assert len(page.ids) == len(set(page.ids)) > 10
    used = {a[1:] for a in page.addresses if a.startswith("#")} | set(re.findall(r"url\(#([^)]+)\)", page.source))
    assert used
    assert used <= set(page.ids)


def test_colours_follow_the_page_in_light_and_dark(run, tmp_path):
    page = render(run, tmp_path)
    drawings = re.findall(r"<svg.*?</svg>", page.source, flags=re.DOTALL)
    assert len(drawings) == 5
    for drawing in drawings:
        assert not re.search(r"#[0-9a-f]{6}\b", drawing)
        assert set(re.findall(r"var\((--[a-z0-9]+)\)", drawing)) <= set(re.findall(r"(--[a-z0-9]+):", page.source))
        assert "DejaVu" not in drawing
    assert "prefers-color-scheme: dark" in page.source


def test_the_numbers_are_those_of_the_records(run, tmp_path):
    text = render(run, tmp_path).text
    assert "DualSpeed took 0.40 of the training time and kept 97.8 % of the accuracy on full images." in text
    assert "2.50 ×" in text
    assert "+8.0 points above training on pruned tokens only (80.0 %)" in text
    memory = r"[\d,]+\*"
    assert re.search(rf"Full tokens 90.0 % 82.6 to 94.5 – 2 min 05 s 1.00 – {memory} 200 3,200", text)
    assert re.search(rf"Pruned only 80.0 % 71.1 to 86.7 70.0 % 40 s 0.32 88.9 % [\d.]+ to [\d.]+ {memory} 200", text)
    assert "majority 20.0 %, language only 30.0 %" in text
    assert "3 trainings are compared on scenes" in text
    assert "dualspeed off on on" in text
    assert "dualspeed.keep_ratio 0.1" in text
    assert all(f"{time} ms" in text for time in (400, 100, 500))


def test_pictures_and_wrong_answers_are_shown_and_escaped(run, tmp_path):
    page = render(run, tmp_path)
    assert "divprune keeps 2 of 16" in page.text
    assert any(address.startswith("data:image/png;base64,iVBOR") for address in page.addresses)
    assert "&lt;b&gt;no&lt;/b&gt;" in page.source
    assert "Is 1 &lt; 2?" in page.source


def test_the_same_records_give_the_same_page_byte_for_byte(run, tmp_path):
    for number, record in enumerate(run):
        write_record(tmp_path / "out" / "records" / f"{number}.json", record)
    first = render_report(tmp_path / "out", tmp_path / "a.html").read_bytes()
    assert render_report([tmp_path / "out"], tmp_path / "other" / "b.html").read_bytes() == first
    assert render_report([tmp_path / "out", tmp_path / "out" / "records"], tmp_path / "c.html").read_bytes() == first
    listed = render_report(run, tmp_path / "d.html").read_text(encoding="utf-8")
    without = re.sub(r'<div class="made"><span>To make it again</span>\s*<code>trimtab report out</code>\s*</div>', "",
                     first.decode())  # fmt: skip
    assert "trimtab report out" in first.decode()
    assert re.sub(r"\s+", " ", listed) == re.sub(r"\s+", " ", without), "records say the same without a directory"


@pytest.mark.parametrize("kept", [["full"], ["pruned", "dualspeed"], ["dualspeed"], []])
def test_fewer_arms_still_make_a_page(run, tmp_path, kept):
    fewer = [record for record in run if record["kind"] != "arm" or record["results"]["arm"] in kept]
    page = render(fewer, tmp_path)
    assert page.tags.count("h1") == 1
    told = {"full": "Records of this run", "dualspeed": "A fast step took 0.20 of the time of a slow one."}
    assert told.get(kept[-1], "") in page.text if kept else "No training is among these records." in page.text
    assert ("Results on scenes" in page.text) == bool(kept)


def test_gaps_in_the_log_do_no_harm(run, arm, tmp_path):
    bare = arm("full", 0, 10.0)
    bare["results"]["log"] = [{"step": 0, "mode": "full", "loss": None, "seconds": None}]
    bare["results"]["accuracy_full"].pop("marks")
    text = render([bare, arm("dualspeed", 50, 5.0)], tmp_path).text
    assert "DualSpeed took 0.50 of the training time." in text


def test_no_records_and_poor_records_are_named(arm, tmp_path):
    with pytest.raises(DataError, match="no record came"):
        render_report([], tmp_path / "a.html")
    poor = arm("full", 90, 1.0)
    del poor["results"]["samples"], poor["results"]["steps"]
    with pytest.raises(DataError, match="Record 0 of kind 'arm' lacks samples, steps"):
        render_report([poor], tmp_path / "a.html")
    with pytest.raises(DataError, match="record 0 is not a trimtab record"):
        render_report([{"kind": "arm"}], tmp_path / "a.html")
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="file"):
        render_report([make_record("dataset", {}, {})], tmp_path / "file" / "a.html")
    assert not (tmp_path / "a.html").exists()
