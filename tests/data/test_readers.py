"""Readers: every kind of file gives the same rows, lazily, and broken files say where."""

import io
import json
import pickle
import shutil

import datasets
import pytest
from PIL import Image
from torch.utils.data import DataLoader

from trimtab.data.readers import load_rows
from trimtab.errors import DataError, SettingError


@pytest.fixture
def folder(tmp_path):
    Image.new("RGB", (4, 3), "red").save(tmp_path / "a.png")
    Image.new("L", (2, 2), 9).save(tmp_path / "b.png")
    return tmp_path


def _row(image="a.png", answer="cat", question="<image>\nwhat?"):
    return {
        "image": image,
        "conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": answer}],
    }


def _write(path, rows):
    text = json.dumps(rows) if path.suffix == ".json" else "\n".join(map(json.dumps, rows))
    path.write_text(text, encoding="utf-8")
    return path


def _dataset(folder):
    data = [(folder / name).read_bytes() for name in ("a.png", "b.png")]
    turns = [{"role": "user", "content": "what?"}, {"role": "assistant", "content": "cat"}]
    table = {"messages": [turns, turns], "images": [[{"bytes": one, "path": None}] for one in data]}
    dataset = datasets.Dataset.from_dict(table)
    return dataset.cast_column("images", datasets.List(datasets.Image()))


def _check(rows):
    assert len(rows) == 2
    assert [row["images"][0].size for row in rows] == [(4, 3), (2, 2)]
    assert all(row["images"][0].mode == "RGB" for row in rows)
    assert rows[-1]["messages"][1] == {"role": "assistant", "content": [{"type": "text", "text": "cat"}]}
    with pytest.raises(IndexError):
        rows[2]


@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl"])
def test_text_files(folder, name):
    rows = load_rows(_write(folder / name, [_row(), _row("b.png")]))
    _check(rows)
    assert rows.layouts == {"llava": 2}
    assert rows.skipped == []
    assert [row["row"] for row in rows] == ([0, 1] if name == "rows.json" else [1, 2])
    _check(pickle.loads(pickle.dumps(rows)))


def test_parquet(folder):
    _dataset(folder).to_parquet(folder / "rows.parquet")
    rows = load_rows(folder / "rows.parquet")
    _check(rows)
    assert rows.layouts == {"messages": 2}
    _check(pickle.loads(pickle.dumps(rows)))


def test_saved_directories(folder):
    data = _dataset(folder)
    data.save_to_disk(folder / "one")
    _check(load_rows(folder / "one"))
    datasets.DatasetDict({"train": data, "test": data.select([0])}).save_to_disk(folder / "two")
    _check(load_rows(folder / "two"))
    assert len(load_rows(folder / "two", split="test")) == 1
    with pytest.raises(DataError, match=r"has no split 'tset'\. Did you mean 'test'"):
        load_rows(folder / "two", split="tset")


def test_half_written_directory_is_named(folder):
    _dataset(folder).save_to_disk(folder / "one")
    next((folder / "one").glob("*.arrow")).unlink()
    with pytest.raises(DataError, match="cannot be opened as a saved data set"):
        load_rows(folder / "one")


def test_image_folder_is_where_relative_paths_start(folder):
    (folder / "sub").mkdir()
    shutil.move(folder / "a.png", folder / "sub" / "c.png")
    path = _write(folder / "rows.json", [_row("c.png")])
    assert load_rows(path, image_folder=folder / "sub")[0]["images"][0].size == (4, 3)
    with pytest.raises(DataError, match=r"row 0: .*c\.png is missing.*image_folder"):
        load_rows(path)


def test_images_are_opened_on_access_and_not_kept(folder, monkeypatch):
    opened = []
    real = Image.open
    monkeypatch.setattr(Image, "open", lambda *args: opened.append(1) or real(*args))
    rows = load_rows(_write(folder / "rows.json", [_row(), _row("b.png")]))
    assert not opened
    first = rows[0]["images"][0]
    assert rows[0]["images"][0] is not first
    assert len(opened) == 2


def test_slices_and_layout_counts(folder):
    sharegpt = {"messages": [{"role": "user", "content": "<image>"}, {"role": "assistant", "content": "x"}]}
    rows = load_rows(_write(folder / "rows.json", [_row(), {**sharegpt, "images": ["a.png"]}, _row()]))
    assert rows.layouts == {"llava": 2, "sharegpt": 1}
    assert rows[1:].layouts == {"llava": 1, "sharegpt": 1}
    assert [row["row"] for row in rows[1:]] == [1, 2]


def test_worker_processes_can_read(folder):
    rows = load_rows(_write(folder / "rows.json", [_row(), _row("b.png")]))
    loader = DataLoader(rows, batch_size=None, num_workers=1, multiprocessing_context="fork")
    assert [row["images"][0].size for row in loader] == [(4, 3), (2, 2)]


def test_utf8_mark_and_empty_lines_are_fine(folder):
    text = "\ufeff" + json.dumps(_row()) + "\r\n\r\n" + json.dumps(_row("b.png", answer="cat\u2028")) + "\n"
    (folder / "rows.jsonl").write_text(text, encoding="utf-8")
    rows = load_rows(folder / "rows.jsonl")
    assert [row["row"] for row in rows] == [1, 3]


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        (
            "a.json",
            json.dumps([_row(), _row()])[:-30],
            r"not valid JSON: .*line 1, character \d+.*truncated",
        ),
        ("a.json", '[\n{"a": 1},\n{"b" 2}\n]', r"line 3, character 6\. Correct that place"),
        ("a.json", '{"a": 1}\n{"a": 2}', r"Extra data.*must end in \.jsonl"),
        ("a.json", '{"rows": []}', r"holds a dict with the keys \['rows'\]; a list"),
        ("a.json", "[]", "holds no rows"),
        ("a.json", "", r"is empty \(0 bytes\)"),
        ("a.jsonl", "", r"is empty \(0 bytes\)"),
        ("a.jsonl", "\n \n", "holds no rows"),
        ("a.jsonl", json.dumps(_row()) + '\n{"image": "a', r"line 2 is not JSON .*character 11\).*on_bad='skip'"),
        ("a.jsonl", "3", r"line 1 is a int, not a mapping"),
        ("a.json", "Gr\u00fc\u00dfe".encode("latin-1"), r"is not UTF-8: byte 0xfc at line 1 \(byte 2\)"),
        ("a.jsonl", "[1]\n".encode("utf-16"), r"is not UTF-8: byte 0xff at line 1"),
        ("a.parquet", "PAR1 but not really", "cannot be read as parquet"),
        ("a.csv", "x", r"ends in '\.csv'; files of \.json"),
    ],
)
def test_broken_files_say_where(folder, name, data, message):
    (folder / name).write_bytes(data if isinstance(data, bytes) else data.encode())
    with pytest.raises(DataError, match=message) as caught:
        load_rows(folder / name)
    assert str(folder / name) in str(caught.value)


def test_bad_row_is_named_or_skipped_and_counted(folder):
    Image.effect_noise((64, 64), 50).save(folder / "broken.png")
    (folder / "broken.png").write_bytes((folder / "broken.png").read_bytes()[:-900])
    lines = [
        json.dumps(_row()),
        "{",
        json.dumps(_row("absent.png")),
        json.dumps(_row("broken.png")),
        json.dumps(_row(answer="")),
        json.dumps({"text": "x"}),
        json.dumps(_row("b.png")),
    ]
    (folder / "rows.jsonl").write_text("\n".join(lines))
    with pytest.raises(DataError, match="line 2 is not JSON"):
        load_rows(folder / "rows.jsonl")
    rows = load_rows(folder / "rows.jsonl", on_bad="skip")
    assert [row["row"] for row in rows] == [1, 7]
    assert [number for number, _ in rows.skipped] == [2, 3, 4, 5, 6]
    reasons = ["not JSON", "absent.png is missing", "truncated or damaged", "content is empty", "no known layout"]
    assert all(reason in said for reason, (_, said) in zip(reasons, rows.skipped, strict=True))
    (folder / "rows.jsonl").write_text("\n".join(lines[1:6]))
    with pytest.raises(DataError, match=r"no usable row; 5 were skipped\. The first: not JSON"):
        load_rows(folder / "rows.jsonl", on_bad="skip")


def test_corrupt_image_found_on_access_names_row_and_file(folder):
    (folder / "b.png").write_bytes(b"no image")
    rows = load_rows(_write(folder / "rows.jsonl", [_row(), _row("b.png")]))
    with pytest.raises(DataError, match=r"rows\.jsonl, line 2: .*b\.png is not an image"):
        rows[1]


def test_bad_parquet_row_is_named(folder):
    turns = [{"role": "user", "content": "<image>"}, {"role": "assistant", "content": "x"}]
    data = datasets.Dataset.from_dict({"messages": [turns, turns], "images": [["a.png"], ["a.png", "b.png"]]})
    data.to_parquet(folder / "rows.parquet")
    with pytest.raises(DataError, match=r"rows\.parquet, row 1: the turns mark 1 .*brings 2"):
        load_rows(folder / "rows.parquet")
    assert len(load_rows(folder / "rows.parquet", on_bad="skip")) == 1


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("absent.jsonl", r"absent\.jsonl is missing"),
        ("some/where/else", "is missing"),
        ("nobody/nothing", r"no file or directory here.*save_to_disk"),
    ],
)
def test_absent_sources_are_explained(name, message, monkeypatch):
    def offline(*args, **kwargs):
        raise ConnectionError("offline")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(DataError, match=message):
        load_rows(name)


def test_hub_names_go_to_load_dataset(folder, monkeypatch):
    asked = {}
    monkeypatch.setattr(datasets, "load_dataset", lambda name, split: asked.update({name: split}) or _dataset(folder))
    _check(load_rows("owner/name", split="train[:2]"))
    assert asked == {"owner/name": "train[:2]"}


def test_other_directories_and_settings_are_refused(folder):
    with pytest.raises(DataError, match=r"neither state\.json nor"):
        load_rows(folder)
    with pytest.raises(SettingError, match="on_bad must be one of error, skip"):
        load_rows(folder, on_bad="ignore")


def test_rows_feed_the_collator(folder):
    from tests.data.tiny_processors import tiny_llava

    from trimtab.data import SupervisedCollator

    rows = load_rows(_write(folder / "rows.json", [_row(), _row("b.png")]))
    batch = SupervisedCollator(tiny_llava())(list(rows))
    assert batch["pixel_values"].shape == (2, 3, 8, 8)
    assert bool((batch["labels"] != -100).any(1).all())
    (folder / "raw.png").write_bytes(io.BytesIO().getvalue())
