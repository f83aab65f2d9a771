"""`check`: what it says about model, rows and gain, and that its scaled times are those of the whole model."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from tests.run.small_run import TOKENS, write_rows
from tests.tiny import FAMILIES
from transformers.models.clip.modeling_clip import CLIPEncoderLayer
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from trimtab.anatomy import SupportReport
from trimtab.bench import StepParts
from trimtab.cli.app import main
from trimtab.dualspeed import DualSpeedConfig, attach
from trimtab.errors import SettingError
from trimtab.records import check_record
from trimtab.run import probe, shallow
from trimtab.run.check import check
from trimtab.run.config import RunConfig, build_config
from trimtab.run.row_tokens import RowTokens, count_kept, read_timed

Make = Callable[..., RunConfig]
CPU = torch.device("cpu")
ARGUMENTS: Any = SimpleNamespace(device=CPU, bf16=False, fp16=False, gradient_checkpointing=False)
SETTINGS = DualSpeedConfig(keep_ratio=0.25, isolator_tokens=1)


def outline(family: str) -> Any:
    """Return a tiny model on the meta device, in training mode."""
    with torch.device("meta"):
        return FAMILIES[family].build().train()


# what the record says ---------------------------------------------------------------------------------------------


def test_check_counts_tokens_and_predicts(make_config: Make) -> None:
    seen: list[tuple[int, int]] = []
    progress = lambda done, total: seen.append((done, total))  # noqa: E731, one line is enough
    record = check_record(check(make_config(), limit=5, progress=progress, seconds=0))
    results = record["results"]
    assert results["supported"] is True
    assert results["problems"] == []
    assert results["summary"]["model"] == "LlavaForConditionalGeneration"
    assert results["summary"]["rows looked at"] == 5
    assert results["summary"]["visual tokens per row"] == TOKENS
    assert seen[-1] == (5, 5)
    assert results["prediction"]["speedup"] > 1
    assert results["prediction"]["fast_over_full"] < 1 < results["prediction"]["slow_over_full"]
    spread = {"min": TOKENS, "mean": TOKENS, "max": TOKENS}
    kept = dict.fromkeys(spread, TOKENS // 4)
    assert results["tokens_per_image"] == {"full": spread, "kept": kept, "isolator": 2}
    assert results["tokens_per_row"]["kept"] == TOKENS // 4
    assert results["measured"] is results["shares"] is None
    assert "--seconds 0" in results["not_measured"]


def test_check_times_the_parts_of_a_step(make_config: Make) -> None:
    results = check(make_config(), seconds=20)["results"]
    measured = results["measured"]
    assert results["not_measured"] is None
    assert results["shares"] == measured["shares"]
    assert set(measured["shares"]) == {"tower", "decoder", "head", "optimizer", "data"}
    assert sum(measured["shares"].values()) == pytest.approx(1)
    assert measured["rows"] == 2
    assert measured["scaled"] is False
    assert measured["data"]["seconds_per_step"] == pytest.approx(2 * measured["data"]["seconds_per_row"])
    plain, fast, slow = (sum(measured["steps"][mode].values()) for mode in ("plain", "fast", "slow"))
    assert measured["speedup_compute"] == pytest.approx(plain / (0.5 * fast + 0.5 * slow))  # slow_ratio of the run
    assert results["summary"]["timed"] == "whole model, random weights, 2 rows, cpu"


def test_no_weights_are_loaded_and_nothing_is_written(make_config: Make, small_run: Path, tmp_path: Path) -> None:
    import shutil

    bare = Path(shutil.copytree(small_run / "model", tmp_path / "bare"))
    (bare / "model.safetensors").unlink()
    before = sorted(path.name for path in tmp_path.iterdir())
    config = make_config(model_name_or_path=str(bare))
    assert check(config, seconds=20)["results"]["measured"] is not None
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*before, "run.yaml"])


def test_keeping_more_predicts_less_gain(make_config: Make) -> None:
    gains = [
        check(make_config(dualspeed={"keep_ratio": ratio, "slow_ratio": 0}), seconds=0)["results"]["prediction"]
        for ratio in (0.1, 0.5)
    ]
    assert gains[0]["speedup"] > gains[1]["speedup"] > 1


def test_a_frozen_tower_predicts_more_gain(make_config: Make) -> None:
    shares = [
        check(make_config(freeze=part), seconds=0)["results"]["prediction"]["tower_share"]
        for part in (["vision_tower"], [])
    ]
    assert shares[0] < shares[1]


def test_check_lists_bad_rows(make_config: Make, tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", count=3)
    (tmp_path / "rows-2.png").unlink()
    results = check(make_config(data_files=[str(path)]))["results"]
    assert [problem["row"] for problem in results["problems"]] == [3]
    assert "rows-2.png" in results["problems"][0]["message"]
    assert results["prediction"] is results["measured"] is results["tokens_per_image"] is None


def test_check_of_a_model_that_is_not_supported_predicts_nothing(
    make_config: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(model: object) -> SupportReport:
        return SupportReport(False, False, "Made", "Made lacks get_image_features.")

    monkeypatch.setattr("trimtab.run.check.check_model", refuse)
    results = check(make_config())["results"]
    assert (results["supported"], results["prediction"], results["measured"]) == (False, None, None)
    assert results["summary"]["why"] == "Made lacks get_image_features."
    assert "gain by arithmetic" not in results["summary"]


def test_check_of_data_without_images_says_so(make_config: Make, tmp_path: Path) -> None:
    path = tmp_path / "text.jsonl"
    path.write_text('{"messages": [{"role": "user", "content": "which"}, {"role": "assistant", "content": "red"}]}\n')
    results = check(make_config(data_files=[str(path)]))["results"]
    (problem,) = results["problems"]
    assert (problem["row"], problem["kind"]) == (None, "images")
    assert "None of the 1 rows looked at has an image" in problem["message"]
    assert results["summary"]["rows looked at"] == results["summary"]["problems"] == 1
    assert results["supported"] is True
    assert results["text_only"] == 1
    assert results["measured"] is results["prediction"] is None


def test_settings_that_training_would_refuse_are_refused(make_config: Make) -> None:
    with pytest.raises(SettingError, match="leaves fewer than the 2 places that the isolator needs"):
        check(make_config(dualspeed={"keep_ratio": 0.99, "isolator_tokens": 2}), seconds=0)
    with pytest.raises(SettingError, match="seconds must be a finite number, at least 0"):
        check(make_config(), seconds=-1)


def test_settings_of_the_record_make_a_run_file(make_config: Make) -> None:
    record = check(make_config(), limit=1, seconds=0)
    chosen = {name: value for name, value in record["settings"].items() if name not in ("limit", "seconds")}
    assert build_config(yaml.safe_load(yaml.safe_dump(chosen))).dualspeed == make_config().dualspeed


def test_the_command_prints_what_stands_in_the_way(
    make_config: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make_config()
    slow = StepParts(tower=1.0, decoder=1.0, head=0.0, optimizer=0.0)
    made = {"steps": dict.fromkeys(("plain", "fast", "slow"), slow), "rows": 2, "scaled": False, "device": "cpu"}
    made |= {"layers": {}, "threads": 1, "repeats": 1, "spread": {"plain": 0.1}, "clamped": []}
    monkeypatch.setattr(probe, "measure", lambda *_: made)
    with pytest.raises(SystemExit) as ended:
        main(["check", str(tmp_path / "run.yaml"), "--seconds", "5"])
    assert not ended.value.code
    assert "- The gain to expect is below 1.2" in capsys.readouterr().out


# rows ---------------------------------------------------------------------------------------------------------------


class SlowRows:
    """Rows that take 20 ms to read."""

    def __init__(self, rows: Any) -> None:
        self.rows = rows
        self.asked: list[int] = []

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, place: int) -> Any:
        self.asked.append(place)
        time.sleep(0.02)
        return self.rows[place]


def test_reading_is_part_of_the_time_of_a_row(make_config: Make) -> None:
    from trimtab.data import SupervisedCollator
    from trimtab.run.load import load_processor, load_rows_of

    config = make_config()
    collate = SupervisedCollator(load_processor(config.model_name_or_path), empty_labels="count")
    rows = SlowRows(load_rows_of(config.data_files, config))
    found, batches, refused = read_timed(collate, rows, [5, 2, 0], seconds=0)
    assert rows.asked == list(batches) == [5, 2]  # the first pays for what is done once, so there is always a second
    assert refused == {}
    assert found.seconds_per_row >= 0.02
    assert found.seconds_per_row == found.rows[1]["seconds"]


@pytest.mark.parametrize("name", FAMILIES)
def test_kept_tokens_are_those_of_a_real_fast_step(name: str) -> None:
    family, images = FAMILIES[name], (1, 0, 2)
    model = family.build_model()
    batch = family.make_batch(model, images)
    found = RowTokens([{"images": count} for count in images])
    rows = [family.take_row(batch, images, row) for row in range(3)]
    count_kept(outline(name), SETTINGS, found, rows, CPU, seconds=100)
    handle = attach(model.train(), SETTINGS)
    with handle.force_mode("fast"):
        model(**batch)
    measured = handle.metrics()
    # Shares of joined images are fractions, whose sum may be off by rounding.
    assert sum(found.full) == pytest.approx(measured["visual_tokens_full"])
    assert sum(found.kept) == pytest.approx(measured["visual_tokens_kept"])
    assert len(found.full) == 3
    blocks = 2 if len(handle.chosen_tokens(batch)) == 3 and name in ("idefics3", "smolvlm") else 3
    assert found.isolator == pytest.approx(blocks / 3)


# models -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
def test_a_model_from_the_outline_computes_like_one_that_was_built(name: str) -> None:
    built, made = FAMILIES[name].build(), outline(name).eval()
    shallow.materialise(made, CPU)
    for (key, expected), (other, value) in zip(built.named_buffers(), made.named_buffers(), strict=True):
        assert key == other
        assert torch.equal(expected, value), key
    assert {name for name, p in made.named_parameters() if p.is_meta} == set()
    batch = FAMILIES[name].make_batch(made)
    built.load_state_dict(made.state_dict())
    with torch.no_grad():
        assert torch.equal(made(**batch).logits, built.eval()(**batch).logits)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_is_timed_when_cut(name: str) -> None:
    model = outline(name)
    tower = shallow.tower_stack(model)
    assert tower is not None
    few = shallow.least_tower_layers(model)
    chosen = probe.Plan(3, 1, 2, few, len(tower.layers))
    batch = FAMILIES[name].make_batch(FAMILIES[name].build())
    measured = probe.measure(model, batch, SETTINGS, chosen, ARGUMENTS, seconds=0)
    assert measured["layers"]["decoder_layers"] == 1
    assert measured["repeats"] == 1
    assert all(parts.seconds > 0 for parts in measured["steps"].values())


def test_tied_weights_stay_tied() -> None:
    with torch.device("meta"):
        model = FAMILIES["llava"].build()
        model.lm_head.weight = model.get_input_embeddings().weight
    shallow.materialise(model, CPU)
    assert model.lm_head.weight is model.get_input_embeddings().weight


def deep_llava() -> Any:
    """Return a tiny LLaVA with four blocks on either side, on the meta device."""
    config = FAMILIES["llava"].build().config
    config.text_config.num_hidden_layers = config.vision_config.num_hidden_layers = 4
    from transformers import LlavaForConditionalGeneration

    with torch.device("meta"):
        return LlavaForConditionalGeneration(config).train()


@pytest.mark.parametrize("tower_trained", [False, True])
def test_scaled_times_are_those_of_the_whole_model(monkeypatch: pytest.MonkeyPatch, tower_trained: bool) -> None:
    """With a made clock on which every block of a kind takes the same time, nothing may be lost by scaling."""
    clock = {"now": 0.0}

    def ticking(layer: Any, seconds: float) -> None:
        forward = layer.forward

        def run(self: Any, *args: Any, **kwargs: Any) -> Any:
            clock["now"] += seconds
            return forward(self, *args, **kwargs)

        monkeypatch.setattr(layer, "forward", run)

    def timed(calls: Mapping[str, Callable[[], object]], **_: Any) -> dict[str, Any]:
        found = {}
        for name, call in calls.items():
            before = clock["now"]
            call()
            fixed = 0.5 if name.startswith("tower") else 2.0
            found[name] = dict.fromkeys(("median", "low", "high"), clock["now"] - before + fixed)
        return {"steps": found}

    ticking(CLIPEncoderLayer, 3.0)
    ticking(LlamaDecoderLayer, 7.0)
    monkeypatch.setattr(probe, "time_steps", timed)
    monkeypatch.setattr(probe, "_update_seconds", lambda *_: 1.0)
    found = []
    for layers in ((4, 4), (1, 3), (2, 4), (4, 3)):
        model = deep_llava()
        model.model.vision_tower.requires_grad_(tower_trained)
        batch = FAMILIES["llava"].make_batch(model)
        chosen = probe.Plan(3, layers[0], 4, layers[1], 4)
        measured = probe.measure(model, batch, SETTINGS, chosen, ARGUMENTS, seconds=1)
        assert (measured["clamped"], measured["spread"]) == ([], dict.fromkeys(("plain", "fast", "slow"), 0))
        found.append(measured["steps"])
    whole = found[0]
    assert whole["plain"] == StepParts(tower=12.5, decoder=28.0, head=1.5, optimizer=1.0)
    # The made clock knows no lengths, but of four blocks of the tower no feature depends on the last.
    assert whole["fast"] == StepParts(tower=9.5, decoder=28.0, head=1.5, optimizer=1.0)
    assert whole["slow"] == StepParts(tower=9.5, decoder=56.0, head=1.5, optimizer=1.0)  # with the teacher
    assert found[1:] == [whole] * 3


def test_the_update_grows_with_the_trained_weights() -> None:
    model = FAMILIES["llava"].build()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    weights = sum(p.numel() for p in model.parameters())
    once = [probe._update_seconds(model, weights) for _ in range(5)]
    tenfold = [probe._update_seconds(model, 1000 * weights) for _ in range(5)]
    assert min(tenfold) > 10 * min(once)  # 1000 times as much; the rest is for a busy machine
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


# plans --------------------------------------------------------------------------------------------------------------


def plan(seconds: float = 1e9, memory: float = 1e12, rows: int = 8) -> tuple[probe.Plan | None, str, float]:
    """Plan for a model whose step takes 21 operations of the decoder, 10 of the tower and 1 of the head."""
    work = probe.Work(decoder=10.0, tower=10.0, head=1.0, steps=2.1, places=10.0, width=32, vocab=64)
    return probe.plan(deep_llava(), work, rows, seconds, speed=1.0, memory=memory, itemsize=4)


def test_what_fits_is_timed_whole() -> None:
    assert plan()[:2] == (probe.Plan(8, 4, 4, 4, 4), "")


def test_less_time_means_fewer_blocks_and_then_fewer_rows() -> None:
    found = []
    for seconds in (1e9, 2400, 2200, 1500, 600, 280):
        made, _, _ = plan(seconds)
        assert made is not None
        found.append((made.rows, made.decoder_layers, made.tower_layers))
    assert found[0] == (8, 4, 4)
    assert found == sorted(found, reverse=True)
    assert found[-1] == (1, 1, 4)
    assert any(rows == 8 and decoder < 4 for rows, decoder, _ in found)


def test_what_cannot_be_timed_says_why() -> None:
    made, reason, taken = plan(seconds=1)
    assert made is None
    assert "1 s of --seconds are left" in reason
    assert plan(seconds=taken)[0] is not None  # so much would do
    assert plan(seconds=0.99 * taken)[0] is None
    made, reason, taken = plan(memory=100)
    assert made is None
    assert "GiB" in reason
    assert taken == 0


def test_a_kind_of_block_that_comes_later_is_timed_too() -> None:
    model = deep_llava()
    model.config.get_text_config().layer_types = ["sliding_attention"] * 2 + ["full_attention"] * 2
    assert shallow.least_decoder_layers(model) == 3


def test_no_warning_of_attaching_reaches_the_user(make_config: Make, caplog: pytest.LogCaptureFixture) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check(make_config(), seconds=20)
    assert caplog.text == ""
