"""Validation: everything wrong is listed with its row, and what is right is counted."""

import json

import pytest
from PIL import Image

from trimtab.data.readers import load_rows
from trimtab.data.validate import validate_rows
from trimtab.errors import DataError, SettingError


def _row(image="a.png", answer="two words", question="<image>\nwhat is it?"):
    return {
        "image": image,
        "conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": answer}],
    }


@pytest.fixture
def folder(tmp_path):
    Image.new("RGB", (4, 3), "red").save(tmp_path / "a.png")
    Image.new("L", (2, 60), 9).save(tmp_path / "long.png")
    Image.new("L", (8, 5), 9).save(tmp_path / "b.png")
    (tmp_path / "broken.png").write_bytes(b"no image")
    return tmp_path


def _lines(folder, rows):
    path = folder / "rows.jsonl"
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
    return path


def test_sound_data_are_measured(folder):
    report = validate_rows(_lines(folder, [_row(), _row("b.png", answer="x"), _row("b.png")]))
    assert report.sound
    assert report.problems == []
    assert (report.rows, report.images, report.duplicates) == (3, 3, 0)
    assert report.layouts == {"llava": 3}
    assert report.width == {"min": 4, "median": 8, "max": 8}
    assert report.height == {"min": 3, "median": 5, "max": 5}
    assert report.words == {"min": 4, "median": 5, "max": 5}


def test_all_problems_are_listed_with_their_lines(folder):
    rows = [
        _row(),
        "{",
        _row("absent.png"),
        _row("broken.png"),
        _row(answer=""),
        _row(["a.png", "b.png"]),
        _row(),
        {"text": "x"},
    ]
    report = validate_rows(_lines(folder, rows))
    assert [(problem.row, problem.kind) for problem in report.problems] == [
        (2, "json"),
        (3, "image"),
        (4, "image"),
        (5, "layout"),
        (6, "layout"),
        (8, "layout"),
    ]
    assert report.counting == "line"
    assert report.first_bad_row == 2
    assert not report.sound
    assert report.rows == 8
    assert report.duplicates == 1
    assert "mark 1 image(s)" in report.problems[4].message
    assert "brings 2" in report.problems[4].message
    assert all("rows.jsonl, line" in problem.message for problem in report.problems)


def test_extreme_aspect_is_a_remark(folder):
    report = validate_rows(_lines(folder, [_row("long.png")]))
    assert [problem.kind for problem in report.problems] == ["aspect"]
    assert "2x60 pixels" in report.problems[0].message
    assert report.sound


def test_same_words_about_another_image_are_no_duplicate():
    pictures = [Image.new("RGB", (2, 2), colour) for colour in ("red", "blue", "red")]
    report = validate_rows([_row(picture) for picture in pictures])
    assert report.duplicates == 1
    assert report.counting == "index"


def test_limit_and_progress(folder):
    path, calls = _lines(folder, [_row(), "{", _row("b.png"), _row("absent.png"), "{"]), []
    report = validate_rows(path, limit=2, progress=lambda done, total: calls.append((done, total)))
    assert calls == [(1, 2), (2, 2)]
    assert [problem.row for problem in report.problems] == [2]
    with pytest.raises(SettingError, match="limit must be at least 1"):
        validate_rows(path, limit=0)


def test_broken_lines_behind_the_last_row_count_where_no_row_is_left_out(folder):
    path = _lines(folder, [_row(), _row("b.png"), "{"])
    for limit in (2, 200, None):
        assert validate_rows(path, limit=limit).first_bad_row == 3
    assert validate_rows(path, limit=1).sound


def test_rows_and_image_folder_are_taken(folder, tmp_path_factory):
    path = _lines(folder, [_row(), _row("b.png")])
    assert validate_rows(load_rows(path)).images == 2
    moved = tmp_path_factory.mktemp("elsewhere") / "rows.jsonl"
    path.rename(moved)
    assert validate_rows(moved, image_folder=folder).sound
    assert validate_rows(moved).first_bad_row == 1


def test_report_becomes_json(folder):
    report = validate_rows(_lines(folder, [_row("absent.png")]))
    plain = json.loads(json.dumps(report.to_dict()))
    assert plain["first_bad_row"] == 1
    assert plain["problems"][0]["kind"] == "image"


def test_unreadable_source_is_an_error(folder):
    (folder / "x.json").write_text("[{")
    with pytest.raises(DataError, match="not valid JSON"):
        validate_rows(folder / "x.json")
