"""The search for a layer: exactly what the naive one finds, for less; and what it says where there is nothing."""

from __future__ import annotations

import json
import math
import statistics
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.dualspeed.common import portrait
from tests.methods.vtw.models import DEPTH, NAMES, batch_of, deeper, fresh, from_ids, logits_of, model_of, words
from tests.tiny import BOS, IMAGE, Batch, llama_settings
from torch import Tensor

from trimtab import DataError, SettingError, TrimtabWarning, UnsupportedModelError, WrongOrderError
from trimtab.anatomy.drop_inside import drop_inside
from trimtab.anatomy.drop_stages import vtw_stages
from trimtab.methods.vtw import withdraw
from trimtab.methods.vtw.config import VTWConfig
from trimtab.methods.vtw.cost import kv_entries, prefill_flops, read_text_shape, withdrawal
from trimtab.methods.vtw.layer_choice import CurvePoint
from trimtab.methods.vtw.search import SearchReport, search_withdrawal_layer

ROWS = (1, 2, 1)
HUGE = 1e6
"""A threshold that every layer reaches."""


def batches_of(name: str, labels: bool = False, side: str = "left") -> list[Batch]:
    """Two batches of three rows and of one."""
    model, family = model_of(name), deeper(name)
    found = [family.make_batch(model, ROWS, seed=1, padding_side=side), family.make_batch(model, (2,), seed=2)]
    return found if labels else [{k: v for k, v in batch.items() if k != "labels"} for batch in found]


def wanted_places(batch: Batch, criterion: str) -> list[list[int]]:
    """Places whose next word is compared, row by row."""
    places = []
    for row, real in enumerate(batch["attention_mask"].bool()):
        answers = []
        if "labels" in batch:
            answers = [place - 1 for place in range(1, len(real)) if int(batch["labels"][row, place]) != -100]
        last = int(real.nonzero()[-1])
        places.append(answers if criterion == "answer" else [answers[0] if answers else last])
    return places


def naive_curve(
    model: Any, batches: list[Batch], criterion: str = "last_token", depth: int = DEPTH, **settings: Any
) -> list[list[float]]:
    """Divergences [layer][sample], running the model anew for every layer, from the definition in float64."""

    def scores(batch: Batch, layer: int) -> Tensor:
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        with withdraw(model, layer, **settings):
            return logits_of(model, inputs, use_cache=False).double()

    found: list[list[float]] = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TrimtabWarning)  # K = 0 never sees the image
        for layer in range(depth + 1):
            found.append([])
            for batch in batches:
                full, without = scores(batch, depth), scores(batch, layer)
                for row, places in enumerate(wanted_places(batch, criterion)):
                    q, p = (torch.log_softmax(one[row, places], -1) for one in (full, without))
                    found[-1].append(float((p.exp() * (p - q)).sum(-1).mean()))
    return found


def search(*args: Any, **settings: Any) -> SearchReport:
    return search_withdrawal_layer(*args, **{"threshold": HUGE, **settings})


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", NAMES)
def test_the_curve_is_that_of_a_run_for_every_layer(name: str, side: str) -> None:
    model, batches = model_of(name), batches_of(name, side=side)
    report = search(model, batches)
    expected = naive_curve(model, batches)
    assert [point.layer for point in report.curve] == list(range(DEPTH + 1))
    assert report.samples == 4
    for point, values in zip(report.curve, expected, strict=True):
        # The scores are equal bit by bit or to 1e-6 (one product of another shape); they are of order one.
        assert point.mean == pytest.approx(statistics.mean(values), abs=1e-5)
        assert point.stderr == pytest.approx(statistics.stdev(values) / 2, abs=1e-5)
        assert point.largest == pytest.approx(max(values), abs=1e-5)
    assert report.curve[DEPTH] == CurvePoint(DEPTH, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0)
    assert min(statistics.mean(values) for values in expected[:DEPTH]) > 1e-3, "differences that can be seen"


@pytest.mark.parametrize("criterion", ["last_token", "answer"])
@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_labels_say_where_the_answer_begins(name: str, criterion: Any) -> None:
    model, batches = model_of(name), batches_of(name, labels=True, side="right")
    report = search(model, batches, criterion=criterion)
    expected = naive_curve(model, batches, criterion)
    for point, values in zip(report.curve, expected, strict=True):
        assert point.mean == pytest.approx(statistics.mean(values), abs=1e-5)
    other = search(model, [{k: v for k, v in batch.items() if k != "labels"} for batch in batches])
    assert report.curve[1].mean != pytest.approx(other.curve[1].mean, abs=1e-3)
    ends = [places[0] + 1 for batch in batches for places in wanted_places(batch, "last_token")]
    assert report.places == pytest.approx(statistics.mean(ends))


@pytest.mark.parametrize("name", NAMES)
def test_branches_side_by_side_find_the_same(name: str) -> None:
    model, batches = model_of(name), batches_of(name)
    alone, stacked = search(model, batches), search(model, batches, stacked=True)
    for one, other in zip(alone.curve, stacked.curve, strict=True):
        assert other.mean == pytest.approx(one.mean, abs=1e-5)
        assert other.same_token == one.same_token
    assert (stacked.layer, stacked.layer_evaluations) == (alone.layer, alone.layer_evaluations)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("llava", {"positions": "reset"}),
        ("llava", {"sink_tokens": 5}),
        ("llava_next", {"keep_newlines": True, "sink_tokens": 2}),
    ],
)
def test_settings_are_those_of_withdraw(name: str, settings: dict[str, Any]) -> None:
    model, batches = model_of(name), batches_of(name)
    report, plain = search(model, batches, **settings), search(model, batches)
    for point, values in zip(report.curve, naive_curve(model, batches, **settings), strict=True):
        assert point.mean == pytest.approx(statistics.mean(values), abs=1e-5)
    assert report.curve[1].mean != pytest.approx(plain.curve[1].mean, abs=1e-4)
    told = report.settings()
    assert {name: getattr(told, name) for name in settings} == settings
    assert (report.left < plain.left) == ("sink_tokens" in settings)


def test_the_share_of_equal_first_choices() -> None:
    model, batches = model_of("llava"), batches_of("llava", labels=True, side="right")
    report = search(model, batches, criterion="answer")
    for layer in range(DEPTH):
        shares = []
        for batch in batches:
            inputs = {k: v for k, v in batch.items() if k != "labels"}
            with drop_inside(model, vtw_stages(layer), owner="test"):
                found = logits_of(model, inputs).argmax(-1)
            full = logits_of(model, inputs).argmax(-1)
            for row, places in enumerate(wanted_places(batch, "answer")):
                shares.append(float((found[row, places] == full[row, places]).double().mean()))
        assert report.curve[layer].same_token == pytest.approx(statistics.mean(shares))
    assert 0 < report.curve[1].same_token < 1


def test_the_head_takes_many_places_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batches = model_of("llava"), batches_of("llava", labels=True)
    whole = search(model, batches, criterion="answer")
    monkeypatch.setattr("trimtab.methods.vtw.search.HEAD_CHUNK", 3)
    parts = search(model, batches, criterion="answer")
    for one, other in zip(whole.curve, parts.curve, strict=True):
        assert other.mean == pytest.approx(one.mean, abs=1e-6)


def test_models_that_add_visual_features_later_have_a_shorter_curve() -> None:
    model, batches = model_of("qwen3_vl"), batches_of("qwen3_vl")
    report = search(model, batches)
    assert [point.layer for point in report.curve] == [2, 3, 4]
    assert (report.start_layer, report.layer) == (2, 2)
    with pytest.raises(SettingError, match=r"start_layer must be a whole number from 2 to 4, or None, but 1 came"):
        search(model, batches, start_layer=1)


# the work it takes ---------------------------------------------------------------------------------------------------


@contextmanager
def counted(model: Any) -> Iterator[list[int]]:
    """Rows times places of each call of a layer, as it is after all hooks that are there already."""
    found: list[int] = []
    hooks = [
        layer.register_forward_pre_hook(lambda _, args: found.append(math.prod(args[0].shape[:2])))
        for layer in model.get_decoder().layers
    ]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


@pytest.mark.parametrize("stacked", [False, True])
def test_the_work_is_as_told_and_five_times_less_than_that_of_the_naive_search(stacked: bool) -> None:
    model, family = model_of("llava", 32), deeper("llava", 32)
    batches = [family.make_batch(model, (2, 2), text_lengths=[1, 1], seed=seed, turns=1) for seed in range(2)]
    with counted(model) as ours:
        report = search(model, batches, stacked=stacked)
    naive = 0
    for batch in batches:
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        for layer in range(33):
            with drop_inside(model, vtw_stages(layer), owner="test"), counted(model) as work:
                logits_of(model, inputs, use_cache=False)
            naive += sum(work)
    unit = sum(batch["input_ids"].numel() for batch in batches)
    assert report.layer_evaluations == pytest.approx(sum(ours) / unit, rel=1e-12)
    assert report.naive_evaluations == pytest.approx(naive / unit, rel=1e-12)
    assert report.layer_evaluations == pytest.approx(32 + 8 / 80 * 32 * 33 / 2)  # 8 words of 80 places
    assert report.naive_evaluations >= 5 * report.layer_evaluations


def test_padding_counts_as_work_but_saves_nothing() -> None:
    model, batches = model_of("llava"), batches_of("llava")[:1]
    with counted(model) as ours:
        report = search(model, batches)
    assert report.layer_evaluations == pytest.approx(sum(ours) / batches[0]["input_ids"].numel(), rel=1e-12)
    shape = read_text_shape(model)
    prompts = [
        (int(mask.sum()), int((ids == IMAGE).sum()))
        for ids, mask in zip(batches[0]["input_ids"], batches[0]["attention_mask"], strict=True)
    ]
    assert report.places == pytest.approx(statistics.mean(places for places, _ in prompts))
    assert report.left == pytest.approx(statistics.mean(visual for _, visual in prompts))
    for point in report.curve:
        drops = [(places, withdrawal(point.layer, places, visual)) for places, visual in prompts]
        flops = sum(prefill_flops(shape, *one) for one in drops), sum(prefill_flops(shape, one) for one, _ in drops)
        entries = sum(kv_entries(DEPTH, *one) for one in drops), sum(kv_entries(DEPTH, one) for one, _ in drops)
        assert point.flops_saving == pytest.approx(1 - flops[0] / flops[1], abs=1e-12)
        assert point.kv_saving == pytest.approx(1 - entries[0] / entries[1], abs=1e-12)


# the choice and what is made of it -----------------------------------------------------------------------------------


def test_the_choice_follows_threshold_start_and_margin() -> None:
    model, batches = model_of("llava"), batches_of("llava")
    curve = {point.layer: point for point in search(model, batches).curve}
    means = {layer: curve[layer].mean for layer in (1, 2, 3)}
    best = min(means, key=lambda layer: means[layer])
    report = search(model, batches, threshold=means[best] * (1 + 1e-9))
    assert (report.layer, report.start_layer, report.threshold) == (best, 1, means[best] * (1 + 1e-9))
    assert (report.flops_saving, report.kv_saving) == (curve[best].flops_saving, curve[best].kv_saving)
    assert search(model, batches, start_layer=3).layer == 3
    assert search(model, batches, start_layer=0).layer == 0
    with pytest.warns(TrimtabWarning, match="plus 1 standard errors"):
        assert search(model, batches, threshold=means[best] * (1 + 1e-9), margin=1.0).layer is None
    bound = curve[best].mean + curve[best].stderr
    assert search(model, batches, threshold=bound * (1 + 1e-9), margin=1.0, start_layer=best).layer == best


def test_no_layer_reaches_the_threshold() -> None:
    model, batches = model_of("llava"), batches_of("llava")
    with pytest.warns(TrimtabWarning) as caught:
        report = search(model, batches, threshold=1e-9)
    assert len(caught) == 1
    points = sorted(report.curve[1:DEPTH], key=lambda point: point.mean)
    told = ", ".join(f"{point.mean:.3g} at layer {point.layer}" for point in points)
    for part in ("No layer from 1 to 3", "at most 1e-09 nats", f"smallest means are {told}.", "larger threshold"):
        assert part in str(caught[0].message)
    assert caught[0].filename == __file__
    assert (report.layer, report.flops_saving, report.kv_saving) == (None, 0.0, 0.0)
    with pytest.raises(SettingError, match=r"SearchReport\.layer is None: no layer .* at most 1e-09\. Search with"):
        report.settings()


def test_where_there_is_no_layer_to_choose() -> None:
    with pytest.warns(
        TrimtabWarning, match=r"no layer to choose: the choice begins at layer 4, and there are 4\. With"
    ):
        assert search(model_of("llava"), batches_of("llava"), start_layer=DEPTH).layer is None


def test_settings_are_saved_and_used(tmp_path: Path) -> None:
    model, batches = model_of("llava"), batches_of("llava")
    report = search(model, batches, sink_tokens=3, positions="reset", task="questions", margin=0.5)
    path = tmp_path / "vtw.json"
    report.save(path)
    config = VTWConfig.load(path)
    assert config == report.settings()
    assert (config.layer, config.depth, config.task) == (report.layer, DEPTH, "questions")
    assert config.model == "LlavaForConditionalGeneration"
    assert config.search is not None
    assert config.search["samples"] == 4
    assert [point["layer"] for point in config.search["curve"]] == list(range(DEPTH + 1))
    assert config.search["curve"][1]["mean"] == report.curve[1].mean
    batch = batches[0]
    with withdraw(model, settings=path):
        found = logits_of(model, batch)
    with withdraw(model, report.layer, sink_tokens=3, positions="reset"):
        assert torch.equal(found, logits_of(model, batch))
    with pytest.raises(SettingError, match=r"VTWConfig\.depth must be 6"):
        withdraw(model_of("llava", 6), settings=path)
    json.dumps(report.to_dict(), allow_nan=False)
    assert report.to_dict()["curve"][1]["layer"] == 1


def test_two_searches_give_one_result_and_the_model_back() -> None:
    model = fresh("llava").train()
    model.model.vision_tower.eval()
    model.config.text_config.attention_dropout = 0.5
    for layer in model.get_decoder().layers:
        layer.self_attn.attention_dropout = 0.5
    logits_of(model, batches_of("llava")[1])  # transformers puts hooks of its own on a model at its first call
    before = portrait(model)
    batches, calls = batches_of("llava"), []
    report = search(model, iter(batches), progress=lambda done, total: calls.append((done, total)))
    assert portrait(model) == before
    assert calls == [(1, 1), (2, 2)]
    again = search(model, batches, progress=lambda done, total: calls.append((done, total)))
    assert calls[2:] == [(1, 2), (2, 2)]
    assert again == report
    assert all(parameter.grad is None for parameter in model.parameters())


def test_one_sample_has_no_standard_error() -> None:
    model, batches = model_of("llava"), batches_of("llava")[1:]
    report = search(model, batches)
    assert report.samples == 1
    assert math.isnan(report.curve[1].stderr)
    assert report.to_dict()["curve"][1]["stderr"] is None
    assert report.settings().search is not None
    with pytest.raises(SettingError, match=r"margin must be 0 with 1 sample, .* but 1\.0 came"):
        search(model, batches, margin=1.0)


def test_a_language_model_with_a_mask_in_the_batch() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**llama_settings(num_hidden_layers=3, initializer_range=0.3))).eval()
    mask = torch.zeros(2, 12, dtype=torch.bool)
    mask[:, 2:8] = True
    report = search(model, [{"input_ids": words(12, rows=2), "visual_mask": mask}])
    assert (report.samples, report.left, len(report.curve)) == (2, 6, 4)
    assert report.curve[1].mean > 1e-3


def test_a_model_of_unknown_arithmetic_has_its_curve_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(model: Any) -> None:
        raise UnsupportedModelError("experts")

    monkeypatch.setattr("trimtab.methods.vtw.search.read_text_shape", refuse)
    report = search(model_of("llava"), batches_of("llava"))
    assert {point.flops_saving for point in report.curve} == {None}
    assert report.flops_saving is None
    assert report.kv_saving > 0


# bad input -----------------------------------------------------------------------------------------------------------


def test_prompts_that_end_with_the_image_are_told_once() -> None:
    model = model_of("llava")
    ends = from_ids("llava", [BOS, 5, 6, *[IMAGE] * 36], 1)
    with pytest.warns(TrimtabWarning) as caught:
        report = search(model, [*batches_of("llava"), ends, ends])
    assert len(caught) == 1
    for part in ("2 of 6 prompts end with an image", "Put the question behind the image"):
        assert part in str(caught[0].message)
    expected = naive_curve(model, [ends])
    assert search_of_ends(model, ends) == pytest.approx([values[0] for values in expected], abs=1e-5)
    assert report.samples == 6


def search_of_ends(model: Any, batch: Batch) -> list[float]:
    with pytest.warns(TrimtabWarning, match="1 of 1 prompts"):
        return [point.mean for point in search(model, [batch]).curve]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"threshold": 0}, ["threshold must be a finite number above 0", "0 came", "0.003"]),
        ({"threshold": math.nan}, ["threshold must be a finite number above 0", "nan came"]),
        ({"threshold": -1.0}, ["threshold must be a finite number above 0", "-1.0 came"]),
        ({"margin": -0.5}, ["margin must be a finite number, at least 0", "-0.5 came"]),
        ({"criterion": "mean"}, ["criterion must be one of last_token, answer", "'mean' came"]),
        ({"positions": "original"}, ["positions must be 'keep' or 'reset'", "'original' came"]),
        ({"sink_tokens": -1}, ["sink_tokens must be a whole number", "-1 came"]),
        ({"keep_newlines": 1}, ["keep_newlines must be", "1 came"]),
        ({"keep_newlines": True}, ["keep_newlines must be False for LlavaFor", "image_newline", "True came"]),
        ({"start_layer": 5}, ["start_layer must be a whole number from 0 to 4, or None", "5 came"]),
        ({"start_layer": -1}, ["start_layer must be a whole number from 0 to 4, or None", "-1 came"]),
        ({"start_layer": True}, ["start_layer must be a whole number", "True came"]),
        ({"criterion": "answer"}, ["criterion='answer' needs labels", "batch 0 has none", "or criterion='last_token'"]),
    ],
)
def test_settings_out_of_range(settings: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(SettingError) as caught:
        search(model_of("llava"), batches_of("llava"), **settings)
    for part in ("search_withdrawal_layer", *words):
        assert part in str(caught.value)


@pytest.mark.parametrize("batches", [{"input_ids": words(3)}, "batches", None])
def test_batches_that_are_none(batches: Any) -> None:
    with pytest.raises(
        SettingError, match=r"batches must be an iterable of batches, .* Put a single batch into a list"
    ):
        search(model_of("llava"), batches)
    with pytest.raises(DataError, match=r"batch 1 must be a mapping .* but a list came\. Give what the processor"):
        search(model_of("llava"), [batches_of("llava")[0], [1, 2]])


def test_an_empty_set() -> None:
    with pytest.raises(DataError, match=r"batches held 0 samples, at least 1 is needed\. Give some prompts"):
        search(model_of("llava"), [])


def test_sinks_that_leave_nothing_to_withdraw_are_refused() -> None:
    with pytest.raises(SettingError, match=r"sink_tokens must be less than the visual tokens of a prompt, but 10000"):
        search(model_of("llava"), batches_of("llava"), sink_tokens=10_000)


def test_samples_without_an_image_are_counted() -> None:
    model = model_of("llava")
    with pytest.raises(DataError) as caught:
        search(model, [batches_of("llava")[0], batch_of("llava", (1, 0, 2, 0))])
    for part in ("2 of 4 samples in batch 1 have no image (rows 1, 3)", "Give batches whose rows all have images"):
        assert part in str(caught.value)
    with pytest.raises(DataError, match=r"2 of 2 samples in batch 0 have no image \(rows 0, 1\)"):
        search(model, [batch_of("llava", (0, 0))])
    with counted(model) as work, pytest.raises(DataError):
        search(model, [batch_of("llava", (1, 0))])
    assert work == [], "nothing was run for nothing"


def test_labels_that_are_of_no_use() -> None:
    model, batch = model_of("llava"), batches_of("llava", labels=True)[0]
    batch["labels"][1] = -100
    with pytest.raises(DataError, match=r"1 of 3 samples in batch 0 have no supervised label \(rows 1\)\. Labels must"):
        search(model, [batch], criterion="answer")
    assert search(model, [batch]).samples == 3, "the last real place will do for the other criterion"
    batch["labels"] = batch["labels"][:, 1:]
    places = batch["input_ids"].shape[1]
    with pytest.raises(
        SettingError, match=rf"labels must be of shape \(3, {places}\), one per place, but \(3, {places - 1}\)"
    ):
        search(model, [batch])


def test_scores_that_are_nan() -> None:
    model, batches = model_of("llava"), batches_of("llava")
    batches[0]["pixel_values"][1] = math.nan
    with pytest.raises(DataError, match=r"scores of sample 1 of batch 0 are NaN\. Check its pixels, .* bfloat16"):
        search(model, batches)


def test_tokens_that_leave_already() -> None:
    model = fresh("llava")
    with withdraw(model, 2), pytest.raises(WrongOrderError, match="search_withdrawal_layer cannot be attached"):
        search(model, batches_of("llava"))
    assert search(model, batches_of("llava")).samples == 4


def test_a_model_whose_weights_are_elsewhere_until_they_are_needed() -> None:
    """As after ``device_map="auto"`` on a small device: accelerate brings the weights of a part when it is called."""
    from accelerate import cpu_offload

    model, batches = fresh("llava_next"), batches_of("llava_next")
    expected = search(model, batches, threshold=HUGE, keep_newlines=True)
    cpu_offload(model, execution_device="cpu")
    assert model.get_input_embeddings().weight.device.type == "meta"
    assert search(model, batches, threshold=HUGE, keep_newlines=True) == expected
