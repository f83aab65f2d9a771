"""Lengths of rows: what the views of a training step have, counted before it."""

from __future__ import annotations

import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.conformance.families import SUITE
from tests.dualspeed.common import attached
from tests.tiny import FAMILIES, IMAGE, Batch, TinyFamily, TinyRows, collate, tiny_llava

from trimtab import DualSpeedConfig
from trimtab.anatomy import open_host
from trimtab.dualspeed.packs import SampleLength
from trimtab.dualspeed.sample_lengths import (
    ReadShape,
    lengths_fingerprint,
    load_lengths,
    measure_lengths,
    require_lengths,
    save_lengths,
    tiles_by_runs,
)
from trimtab.dualspeed.view import FastView
from trimtab.errors import DataError, OutputError, SettingError

CONFIG = DualSpeedConfig(keep_ratio=0.2, isolator_tokens=2)
BY_ENCODER = ("mistral3", "perception_lm", "deepseek_ocr2", "internvl", "hunyuan_vl", "aria")
"""Families whose placeholders alone do not tell how images are cut."""


def the_row(rows: list[Batch]) -> Batch:
    return rows[0]


def rows_of(family: TinyFamily, model: Any, images: tuple[int, ...] = (1, 0, 2, 3, 1)) -> list[Batch]:
    return [family.make_batch(model, [count], seed=n, text_lengths=[2 + n]) for n, count in enumerate(images)]


def views(model: Any, rows: list[Batch], config: DualSpeedConfig) -> list[SampleLength]:
    """The length of each row, asked of the model."""
    with attached(model, **config.to_dict()) as handle:
        return [SampleLength(row["input_ids"].shape[1], handle.prune_inputs(row)["input_ids"].shape[1]) for row in rows]


# exact --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"keep_ratio": 0.34, "keep_rule": "ceil", "isolator_tokens": 0},
        {"keep_ratio": 0.8, "isolator_tokens": 4},
        {"keep_ratio": 0.12, "pruner": "grid_pool", "isolator_tokens": 3},
        {"pruner": "keep_all", "isolator_tokens": 0},
        {"keep_ratio": 1.0, "isolator_tokens": 0},
    ],
    ids=["usual", "ceil", "most", "few", "keep_all", "whole"],
)
@pytest.mark.parametrize("name", ["llava", "llava_next", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "idefics3", "smolvlm"])
def test_lengths_are_those_of_the_views(name: str, settings: dict[str, Any]) -> None:
    config = replace(CONFIG, **settings)
    family = {**SUITE, **FAMILIES}[name]
    model = family.build_model()
    rows = rows_of(family, model)
    expected = views(model, rows, config)
    assert measure_lengths(rows, the_row, model, config) == expected
    assert not expected[1].pruned, "text alone loses nothing"
    assert config.keeps_all or any(one.pruned for one in expected)


@pytest.mark.parametrize("name", BY_ENCODER)
def test_families_whose_placeholders_do_not_tell_are_asked(name: str) -> None:
    family = SUITE[name]
    model = family.build_model()
    rows = rows_of(family, model, (1, 2))
    assert measure_lengths(rows, the_row, model, CONFIG) == views(model, rows, CONFIG)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(SUITE))
def test_every_family_is_counted_exactly(name: str) -> None:
    family = SUITE[name]
    model = family.build_model()
    rows = rows_of(family, model, (1, 2, 3))
    assert measure_lengths(rows, the_row, model, CONFIG) == views(model, rows, CONFIG)


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "idefics3", "llava_next"])
def test_the_tower_is_not_run_where_placeholders_tell(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    family = FAMILIES[name]
    model = family.build_model()
    rows = rows_of(family, model)
    expected = views(model, rows, CONFIG)
    monkeypatch.setattr(FastView, "encode", None)
    assert measure_lengths(rows, the_row, model, CONFIG) == expected


def test_images_without_a_word_between_them_are_told_apart() -> None:
    """Two runs of placeholders that touch look like one image of twice the size."""
    model = tiny_llava().eval()
    row = FAMILIES["llava"].make_batch(model, [2])
    between = row["input_ids"][0] != IMAGE
    between[:3] = False
    gap = int(between.nonzero()[0])
    kept = torch.arange(row["input_ids"].shape[1]) != gap
    row = {name: value if name == "pixel_values" else value[:, kept] for name, value in row.items()}
    host = open_host(model)
    shape = ReadShape(the_row, host.image_token_ids, host.encoder_names)([row])
    assert (shape.runs, shape.images) == ((72,), 2)
    assert tiles_by_runs(host, shape, CONFIG) is None
    # Of two images of 36 tokens a tenth is 3 and 3, of one of 72 it would be 7.
    config = replace(CONFIG, keep_ratio=0.1)
    assert measure_lengths([row], the_row, model, config) == views(model, [row], config)


def test_videos_are_asked_of_the_encoder() -> None:
    family = FAMILIES["qwen2_5_vl"]
    model = family.build_model()
    rows = [family.make_batch(model, [images], videos_per_row=[videos]) for images, videos in ((0, 1), (1, 1))]
    assert measure_lengths(rows, the_row, model, CONFIG) == views(model, rows, CONFIG)


def test_padding_is_no_length() -> None:
    model = tiny_llava().eval()
    family = FAMILIES["llava"]
    for side in ("left", "right"):
        batch = family.make_batch(model, [1, 0], text_lengths=[9, 2], padding_side=side)
        alone = family.take_row(batch, [1, 0], 1)["input_ids"].shape[1]
        row = {name: value[1:] for name, value in batch.items() if name != "pixel_values"}
        assert row["input_ids"].shape[1] > alone
        assert measure_lengths([row], the_row, model, CONFIG) == [SampleLength(alone, alone)]


# how they are measured ----------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
@pytest.mark.parametrize("workers", [0, 2])
def test_some_rows_are_measured_as_all_are(workers: int) -> None:
    model = tiny_llava()
    every = measure_lengths(TinyRows(20), collate, model, CONFIG, num_workers=workers)
    assert len(every) == 20
    assert measure_lengths(TinyRows(20), collate, model, CONFIG, rows=[17, 3, 6], num_workers=workers) == [
        every[17], every[3], every[6],
    ]  # fmt: skip
    assert measure_lengths(TinyRows(20), collate, model, CONFIG, rows=[]) == []


@pytest.mark.parametrize("name", ["llava", "mistral3"])
def test_measuring_touches_neither_random_states_nor_the_model(name: str) -> None:
    family = SUITE[name]
    model = family.build_model().train()
    rows = rows_of(family, model, (1, 2))
    state = torch.get_rng_state()
    measure_lengths(rows, the_row, model, CONFIG)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())


def test_rows_of_equal_shape_are_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    family = SUITE["mistral3"]
    model = family.build_model()
    rows = [family.make_batch(model, [1], seed=n) for n in range(5)]
    calls: list[Batch] = []
    plain = FastView.encode
    monkeypatch.setattr(FastView, "encode", lambda view, batch: calls.append(batch) or plain(view, batch))
    measure_lengths(rows, the_row, model, CONFIG)
    assert len(calls) == 1


def test_what_counts_rows_goes_to_worker_processes() -> None:
    read = pickle.loads(pickle.dumps(ReadShape(collate, (IMAGE,), ("pixel_values",))))
    assert read([TinyRows()[0]]).images == 1


# keeping ------------------------------------------------------------------------------------------------------------


def test_saved_lengths_are_those_that_are_loaded(tmp_path: Path) -> None:
    lengths = [SampleLength(700 + n, 60 + n) for n in range(5)]
    path = tmp_path / "new" / "lengths.safetensors"
    save_lengths(path, lengths, "abc")
    assert load_lengths(path) == load_lengths(path, "abc") == lengths
    with pytest.raises(DataError, match="other data, another model, or other settings"):
        load_lengths(path, "abd")


@pytest.mark.parametrize("content", [None, b"", b"\x08\x00\x00\x00\x00\x00\x00\x00{}      ", b"words" * 20])
def test_a_file_that_is_missing_or_broken_is_told(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "lengths.safetensors"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=r"(?s)Cannot read lengths from .*lengths\.safetensors.*measure anew"):
        load_lengths(path)


def test_lengths_that_cannot_be_written_are_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="Cannot write"):
        save_lengths(tmp_path / "file" / "lengths.safetensors", [SampleLength(2, 1)], "abc")


class Cutting:
    """A collator with a limit."""

    def __init__(self, max_length: int) -> None:
        self.max_length = max_length


def test_whatever_lengths_depend_on_changes_the_fingerprint() -> None:
    model, other = tiny_llava(), FAMILIES["qwen2_5_vl"].build_model()

    def made(rows: int = 9, model: Any = model, collator: Any = collate, **settings: Any) -> str:
        return lengths_fingerprint(rows, model, collator, replace(CONFIG, **settings))

    found = [
        made(), made(rows=8), made(model=other), made(collator=Cutting(9)), made(collator=Cutting(8)),
        made(keep_ratio=0.3), made(keep_rule="ceil"), made(isolator_tokens=3),
        made(pruner="keep_all", isolator_tokens=0),
    ]  # fmt: skip
    assert len(set(found)) == len(found)
    assert made() == made(seed=9, slow_ratio=0.7, head_chunk=3), "what has no say in lengths"


# bad input ----------------------------------------------------------------------------------------------------------


def test_a_collator_that_joins_rows_is_refused() -> None:
    def flat(rows: Any) -> Any:
        return {"input_ids": torch.ones(7, dtype=torch.long)}

    with pytest.raises(DataError, match=r"(?s)one row.*\(7,\).*dualspeed_lengths"):
        measure_lengths(TinyRows(2), flat, tiny_llava(), CONFIG)


@pytest.mark.parametrize("wrong", ["abc", [SampleLength(1, 1)] * 2, 5])
def test_lengths_for_other_rows_are_refused(wrong: Any) -> None:
    with pytest.raises(SettingError, match=r"dualspeed_lengths must be one SampleLength for each of the 3 rows"):
        require_lengths(wrong, 3, "Trainer")
    assert require_lengths([(4, 2)], 1, "Trainer") == [SampleLength(4, 2)]
