"""The tables of the speed page: cells from records, marks of the page, records of another kind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from trimtab.errors import DataError
from trimtab.records import make_record
from trimtab.report.speed import BEGIN, END, markdown, speed_lines, training_tables, write_speed_page

Record = dict[str, Any]


def spread(value: float) -> dict[str, float]:
    return {"median": value, "low": value - 0.1, "high": value + 0.1}


@pytest.fixture
def record() -> Record:
    rows = [
        {"name": "public", "title": "public recipe", "seconds_per_sample": 0.5, "times_public": spread(1.0),
         "predicted_public": 1.0},
        {"name": "ours", "title": "trimtab", "seconds_per_sample": 0.1, "times_public": spread(5.0),
         "predicted_public": 4.5, "times_packed": spread(3.0), "predicted_packed": 2.9, "over_floor": spread(1.15)},
    ]  # fmt: skip
    parts = ("tower", "pruner", "decoder", "head", "optimizer", "assembly")
    results = {
        "rows": rows,
        "summary": {"ours_over_public": spread(5.0), "ours_over_released": spread(2.0), "fast_over_floor": None},
        "arms": [
            {"name": "mixed", "shares": dict.fromkeys(parts, 1 / 6), "split_over_timed": 1.01,
             "predicted_shares": {"tower": 0.1, "pruner": 0.0, "decoder": 0.8, "head": 0.1}},
            {"name": "padded_fast"},
        ],
        "memory": [
            {"arm": "mixed", "budget_gib": 2.0, "rows": 10, "tokens": 1200, "peak_mib": 321.4, "held_mib": 20.2,
             "largest": 61, "method": "extended from two sizes"},
        ],
        "curves": {
            "keep": [{"value": 0.1, "speedup": 2.4, "low": 2.3, "high": 2.5, "predicted": 2.35,
                      "seconds_per_sample": 0.1}],
            "ranks": [{"value": 8, "full": 0.3, "lock_step": 0.2, "independent": 0.25, "per_sample": 0.11}],
        },
        "padding": {"full": 1.4, "fast": 2.1}, "out_of_memory": ["public_packed_kept"],
    }  # fmt: skip
    settings = {
        "size": "toy", "device": "cpu", "dtype": "float32", "attention": "sdpa", "keep_ratio": 0.1, "slow_ratio": 0.1,
        "repeats": 5, "threads": 1,
        "shape": {"tiles": 1, "image_size": 64, "patch_size": 4, "text_mean": 90, "layers": 4},
    }  # fmt: skip
    return make_record("bench_training", settings, results, seed=0)


def test_every_table_has_as_many_cells_as_columns(record: Record) -> None:
    tables = training_tables(record)
    assert [table.title for table in tables] == [
        "Time, toy", "Where the time goes", "Memory", "Cost against keep ratio", "Cost against ranks",
    ]  # fmt: skip
    for table in tables:
        assert table.rows
        assert all(len(row) == len(table.columns) for row in table.rows), table.title


def test_measurements_and_predictions_stand_side_by_side(record: Record) -> None:
    time, parts, memory, keep, ranks = training_tables(record)
    assert time.rows[1] == (
        "trimtab", "100", "5.00 (4.90 to 5.10)", "4.5", "3.00 (2.90 to 3.10)", "2.9", "1.15 (1.05 to 1.25)",
    )  # fmt: skip
    assert time.rows[0][4:] == ("–", "–", "–")
    notes = " ".join(time.notes)
    assert "5.00 (4.90 to 5.10) than the public recipe" in notes
    assert "1.40 places for each real one on full rows, 2.10 on pruned" in notes
    assert "Out of memory: public_packed_kept." in notes
    assert [row[0] for row in parts.rows] == ["`mixed`"]
    assert parts.rows[0][1:] == ("17% (10%)", "17% (0%)", "17% (80%)", "17% (10%)", "17%", "17%", "1.01")
    assert memory.rows == [("`mixed`", "10", "1,200", "321", "20", "61")]
    assert memory.columns[-1] == "rows that fit 2 GiB"
    assert keep.rows == [("0.1", "100", "2.40 (2.30 to 2.50)", "2.35")]
    assert ranks.rows == [("8", "300", "200", "250", "110")]


def test_markdown_has_a_line_per_row(record: Record) -> None:
    lines = markdown(training_tables(record)[2])
    assert lines[0] == "**Memory**"
    assert lines[2].startswith("| arm | rows |")
    assert lines[3] == "|---|---|---|---|---|---|"
    assert lines[4] == "| `mixed` | 10 | 1,200 | 321 | 20 | 61 |"


def test_the_page_says_on_what_it_was_measured(record: Record) -> None:
    text = "\n".join(speed_lines([record]))
    assert "### toy: 256 visual tokens, 90 words, 4 blocks" in text
    assert f"torch {record['versions']['torch']}" in text
    assert "1 thread(s); float32, sdpa" in text


def test_only_what_stands_between_the_marks_is_replaced(record: Record, tmp_path: Path) -> None:
    page = tmp_path / "speed.md"
    page.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    write_speed_page(page, [record])
    text = page.read_text()
    assert text.startswith(f"before\n{BEGIN}\n")
    assert text.endswith(f"{END}\nafter\n")
    assert "old" not in text
    write_speed_page(page, [record])
    assert page.read_text() == text
    page.write_text("no marks")
    with pytest.raises(DataError, match="lacks the marks"):
        write_speed_page(page, [record])


def test_a_record_of_another_kind_is_refused() -> None:
    with pytest.raises(DataError, match="kind 'arm' came"):
        training_tables(make_record("arm", {}, {}))
