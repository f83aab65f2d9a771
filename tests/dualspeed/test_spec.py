"""The fourteen numeric properties of DualSpeed, each against a reference written out here.

Numbers follow the list of unit tests in the specification of the method (arXiv 2602.03815 and what we hold beyond
it); number 9 stands in full in test_schedule.py and number 10 in test_distributed.py.
"""

from __future__ import annotations

import copy
import itertools
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.dualspeed.common import ROWS, SUM_ORDER, attached, training_arguments
from tests.tiny import FAMILIES, IMAGE, WIDTH, Batch, TinyFamily, TinyRows, collate, gradients, tiny_llava, weights
from torch import Tensor
from torch.nn import functional

import trimtab
from trimtab import DualSpeedConfig
from trimtab.dualspeed.schedule import mode_of_step
from trimtab.errors import SettingError
from trimtab.ops.divergence import kl_divergence
from trimtab.ops.label_head import label_losses, supervised_positions
from trimtab.pruners.budget import kept_count


@pytest.fixture(params=["llava", "llava_next", "idefics3", "qwen2_5_vl"])
def family(request: pytest.FixtureRequest) -> TinyFamily:
    return FAMILIES[request.param]


def stock_loss(logits: Tensor, labels: Tensor) -> tuple[Tensor, int]:
    """Return the summed next-token cross-entropy over supervised labels, and how many there are."""
    scores, targets = logits[:, :-1].reshape(-1, logits.shape[-1]), labels[:, 1:].reshape(-1)
    return functional.cross_entropy(scores.float(), targets, ignore_index=-100, reduction="sum"), int(
        (targets != -100).sum()
    )


def at_labels(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the logits that predict supervised labels, row by row in a plain Python loop."""
    picked = [
        logits[row, place - 1]
        for row in range(labels.shape[0])
        for place in range(1, labels.shape[1])
        if labels[row, place] != -100
    ]
    return torch.stack(picked)


# 1: everything off is the identity ------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{"pruner": "keep_all"}, {"keep_ratio": 1.0}])
def test_01_everything_off_is_the_stock_loss_bit_for_bit(family: TinyFamily, settings: dict[str, Any]) -> None:
    stock, model = (family.build_model().train() for _ in range(2))
    batch = family.make_batch(stock, ROWS)
    expected = stock(**batch)
    expected.loss.backward()
    with attached(model, isolator_tokens=0, slow_ratio=0.0, **settings):
        out = model(**batch)
        out.loss.backward()
    assert torch.equal(out.loss, expected.loss)
    ours, theirs = gradients(model), gradients(stock)
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert torch.equal(ours[name], value), name


@pytest.mark.parametrize("mode", ["fast", "slow"])
def test_01_nothing_pruned_and_no_isolator_has_stock_loss_and_no_kl(family: TinyFamily, mode: str) -> None:
    stock, model = (family.build_model().train() for _ in range(2))
    batch = family.make_batch(stock, ROWS)
    expected = stock(**batch)
    expected.loss.backward()
    with attached(model, keep_ratio=1.0, isolator_tokens=0, slow_ratio=0.5) as handle, handle.force_mode(mode):
        loss = model(**batch).loss
        loss.backward()
        metrics = handle.metrics()
    torch.testing.assert_close(loss, expected.loss, **SUM_ORDER)
    assert not metrics["kl"]
    ours, theirs = gradients(model), gradients(stock)
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, **SUM_ORDER)


def run_trainer(out: Path, dualspeed: Any) -> Any:
    from transformers import Trainer

    chosen = {} if dualspeed == "plain" else {"dualspeed": dualspeed}
    kind = Trainer if dualspeed == "plain" else trimtab.with_dualspeed(Trainer)
    arguments = training_arguments(out, gradient_accumulation_steps=2)
    trainer = kind(model=tiny_llava(), args=arguments, train_dataset=TinyRows(), data_collator=collate, **chosen)
    trainer.train()
    return trainer


@pytest.mark.parametrize(
    "dualspeed",
    [DualSpeedConfig(pruner="keep_all", isolator_tokens=0, slow_ratio=0.0), None],
    ids=["all settings off", "no settings"],
)
def test_01_five_steps_of_the_trainer_are_those_of_the_plain_trainer(tmp_path: Path, dualspeed: Any) -> None:
    plain = run_trainer(tmp_path / "plain", "plain")
    ours = run_trainer(tmp_path / "ours", dualspeed)
    theirs = weights(plain.model)
    assert weights(ours.model).keys() == theirs.keys()
    for key, value in weights(ours.model).items():
        assert torch.equal(value, theirs[key]), key
    losses = [[entry["loss"] for entry in t.state.log_history if "loss" in entry] for t in (plain, ours)]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 5
    start = weights(tiny_llava())
    assert any(not torch.equal(start[key], value) for key, value in theirs.items()), "five steps changed the weights"


# 2, 3: the selection (its own tests stand beside the pruners) ------------------------------------------------------


def naive_picks(features: Tensor, count: int) -> list[int]:
    """Max-min diversity on cosine distance in float64, one image, one pick at a time."""
    unit = features.double()
    norms = unit.norm(dim=-1, keepdim=True)
    unit = torch.where(norms > 0, unit / norms, unit)
    distance = 1 - unit @ unit.T
    tokens = len(features)
    nearest = [min(float(distance[i, j]) for j in range(tokens) if j != i) for i in range(tokens)]
    picks = [max(range(tokens), key=lambda i: nearest[i])]
    while len(picks) < count:
        free = [i for i in range(tokens) if i not in picks]
        picks.append(max(free, key=lambda i: min(float(distance[i, j]) for j in picks)))
    return picks


def test_02_batched_selection_equals_the_naive_loop() -> None:
    from trimtab.pruners.contract import PrunerInput
    from trimtab.pruners.registry import build_pruner

    features = torch.randn(4, 30, 16, generator=torch.Generator().manual_seed(2))
    features[2, 7] = 0
    chosen = build_pruner("divprune").select(PrunerInput(features=features), 9)
    for image in range(4):
        assert chosen.index[image].tolist() == sorted(naive_picks(features[image], 9))
    doubled = features.clone()
    doubled[:, 15:] = doubled[:, :15]
    index = build_pruner("divprune").select(PrunerInput(features=doubled), 20).index
    assert all(len(set(row)) == 20 for row in index.tolist()), "no token is picked twice"


def test_03_greedy_keeps_half_of_the_best_spread() -> None:
    def spread(points: Tensor, chosen: tuple[int, ...]) -> float:
        return min(float((points[i] - points[j]).norm()) for i, j in itertools.combinations(chosen, 2))

    for seed in range(20):
        points = torch.randn(9, 5, generator=torch.Generator().manual_seed(seed)).double()
        points = points / points.norm(dim=-1, keepdim=True)
        picks = tuple(naive_picks(points, 4))
        chordal = torch.cdist(points, points)
        again = [picks[0]]
        while len(again) < 4:
            free = [i for i in range(9) if i not in again]
            again.append(max(free, key=lambda i: min(float(chordal[i, j]) for j in again)))
        assert tuple(again) == picks, "1 - cos and the chord grow together, so the picks are the same"
        best = max(spread(points, subset) for subset in itertools.combinations(range(9), 4))
        assert spread(points, picks) >= 0.5 * best


# 4: the gradient of a slow step ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("weight", "temperature"), [(1.0, 1.0), (0.5, 2.0)])
@pytest.mark.parametrize("side", ["right", "left"])
def test_04_slow_gradient_is_that_of_ce_plus_weighted_kl(
    family: TinyFamily, weight: float, temperature: float, side: str
) -> None:
    model = family.build_model().train()
    reference = copy.deepcopy(model)
    batch = family.make_batch(model, ROWS, padding_side=side)
    with attached(model, kl_weight=weight, temperature=temperature, keep_ratio=0.2) as handle:
        pruned = handle.prune_inputs(batch)
        with torch.no_grad():
            teacher = at_labels(reference(**detached(pruned)).logits, pruned["labels"])
        with handle.force_mode("slow"):
            loss = model(**batch).loss
            loss.backward()
        metrics = handle.metrics()
        isolator = handle.isolator.rows.grad

    logits = reference(**{k: v for k, v in batch.items() if k != "labels"}).logits
    ce, count = stock_loss(logits, batch["labels"])
    student = at_labels(logits, batch["labels"])
    p, log_p = (f(teacher / temperature, dim=-1) for f in (torch.softmax, torch.log_softmax))
    kl = (p * (log_p - torch.log_softmax(student / temperature, dim=-1))).sum()
    expected = ce / count + weight * temperature**2 * kl / count
    expected.backward()

    torch.testing.assert_close(loss, expected, **SUM_ORDER)
    assert kl / count > 1e-2, "teacher and student differ, or the test shows nothing"
    assert math.isclose(float(metrics["ce"]), float(ce.detach()) / count, rel_tol=1e-4)
    theirs, ours = gradients(reference), gradients(model)
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, **SUM_ORDER)
    assert isolator is not None, "touched on slow steps too, so that gradient reduction over processes never waits"
    assert torch.equal(isolator, torch.zeros_like(isolator))


def detached(inputs: Batch) -> Batch:
    """Return the inputs with visual features cut from the graph (they are shared by several passes)."""
    encoded = copy.copy(inputs["mm_encoder_outputs"]["image"])
    encoded.pooler_output = [rows.detach() for rows in encoded.pooler_output]
    return {**inputs, "mm_encoder_outputs": {"image": encoded}}


def test_04_fast_gradient_reaches_isolator_projector_and_language_model(family: TinyFamily) -> None:
    model = family.build_model().train()
    reference = copy.deepcopy(model)
    batch = family.make_batch(model, ROWS)
    with attached(model, keep_ratio=0.2) as handle:
        pruned = handle.prune_inputs(batch)
        with handle.force_mode("fast"):
            loss = model(**batch).loss
            loss.backward()
        isolator = handle.isolator.rows.grad
    with torch.no_grad():
        ce, count = stock_loss(reference(**{k: v for k, v in pruned.items() if k != "labels"}).logits, pruned["labels"])
    torch.testing.assert_close(loss.detach(), ce / count, **SUM_ORDER)
    assert (isolator.abs().sum(1) > 0).all()
    reached = gradients(model)
    assert any("lm_head" in name and value.any() for name, value in reached.items())
    visual = ("projector", "connector", "visual.merger")
    assert any(any(part in name for part in visual) and value.any() for name, value in reached.items())


# 5: teacher and student are compared at the same labels ---------------------------------------------------------


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("turns", [1, 3])
@pytest.mark.parametrize("cut", [0, 2])
def test_05_both_views_have_the_same_labels_in_the_same_order(
    family: TinyFamily, side: str, turns: int, cut: int
) -> None:
    model = family.build_model().train()
    batch = family.make_batch(model, (2, 0, 1, 1), padding_side=side, turns=turns)
    if cut and side == "right":
        for name in ("input_ids", "labels", "attention_mask", "mm_token_type_ids"):
            if name in batch:
                batch[name] = batch[name][:, :-cut]
    with attached(model, keep_ratio=0.2) as handle:
        pruned = handle.prune_inputs(batch)
    assert pruned["input_ids"].shape[1] < batch["input_ids"].shape[1]
    for labels, inputs in ((batch["labels"], batch), (pruned["labels"], pruned)):
        row, place = supervised_positions(labels)
        expected = [(r, p - 1) for r in range(len(labels)) for p in range(1, labels.shape[1]) if labels[r, p] != -100]
        assert list(zip(row.tolist(), place.tolist(), strict=True)) == expected
        assert torch.equal(labels[row, place + 1], inputs["input_ids"][row, place + 1])
    full, fewer = (supervised_positions(labels) for labels in (batch["labels"], pruned["labels"]))
    assert torch.equal(full[0], fewer[0])
    assert torch.equal(batch["labels"][full[0], full[1] + 1], pruned["labels"][fewer[0], fewer[1] + 1])
    before = batch["input_ids"][full], pruned["input_ids"][fewer]
    assert torch.equal(*before), "the token that predicts a label survives"


def test_05_a_row_that_starts_behind_padding_in_one_view_only_has_the_same_labels_in_both() -> None:
    """Every token supervised: the first one of a row has a place before it only where padding stands there."""
    family = FAMILIES["llava"]
    model = family.build_model().train()
    batch = family.make_batch(model, (1, 0), text_lengths=[2, 15], padding_side="left")
    labels = torch.where(batch["input_ids"] == IMAGE, -100, batch["input_ids"])
    batch["labels"] = labels.masked_fill(batch["attention_mask"] == 0, -100)
    found = {}
    with attached(model, keep_ratio=0.1, isolator_tokens=1) as handle:
        padded = (1 - handle.prune_inputs(batch)["attention_mask"]).sum(1)
        assert ((1 - batch["attention_mask"]).sum(1) > 0).tolist() == [False, True]
        assert (padded > 0).tolist() == [True, False]
        for mode in ("slow", "fast"):
            with handle.force_mode(mode):
                model(**batch).loss.backward()
                found[mode] = handle.metrics()
    assert found["slow"]["kl"] > 0
    # A label too many would show in the sum of the losses, which is that of the rows alone.
    alone = [family.take_row(batch, (1, 0), row) for row in (0, 1)]
    with attached(model, keep_ratio=0.1, isolator_tokens=1) as handle, handle.force_mode("slow"):
        for row in alone:
            row["labels"] = torch.where(row["input_ids"] == IMAGE, -100, row["input_ids"])
        sums = [model(**row, num_items_in_batch=1).loss.detach() for row in alone]
        together = model(**batch, num_items_in_batch=1).loss.detach()
    torch.testing.assert_close(together, sum(sums), **SUM_ORDER)


# 6, 7: divergence and gathered head --------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_06_divergence_is_the_definition_in_float64(temperature: float) -> None:
    generator = torch.Generator().manual_seed(6)
    teacher, student = (torch.randn(11, 37, generator=generator).double() * 3 for _ in range(2))
    ours = kl_divergence(teacher, student, temperature)
    for label in range(11):
        p, q = ([math.exp(v / temperature) for v in scores[label].tolist()] for scores in (teacher, student))
        p, q = [v / sum(p) for v in p], [v / sum(q) for v in q]
        exact = math.fsum(a * (math.log(a) - math.log(b)) for a, b in zip(p, q, strict=True))
        # float64 with 37 terms of order one: a few hundred ulp at most.
        assert math.isclose(float(ours[label]), exact, rel_tol=1e-12, abs_tol=1e-13)
    # 32-bit scores are accepted and agree to their own precision.
    narrow = kl_divergence(teacher.float(), student.float(), temperature)
    torch.testing.assert_close(narrow.double(), ours, atol=1e-5, rtol=1e-4)
    assert torch.equal(kl_divergence(teacher, teacher, temperature), torch.zeros(11, dtype=torch.float64))


@pytest.mark.parametrize("chunk", [1, 3, 1000])
def test_07_gathered_head_equals_full_logits(chunk: int) -> None:
    model = tiny_llava()
    batch = FAMILIES["llava"].make_batch(model, ROWS)
    out = model(**batch, output_hidden_states=True)
    states, labels = out.hidden_states[-1], batch["labels"]
    row, place = supervised_positions(labels)
    torch.testing.assert_close(model.lm_head(states[row, place]), out.logits[row, place], **SUM_ORDER)
    teacher = torch.randn(len(row), WIDTH, generator=torch.Generator().manual_seed(7))
    ce, kl = label_losses(states[row, place], teacher, labels[row, place + 1], model.lm_head, 2.0, chunk)
    expected, count = stock_loss(out.logits, labels)
    assert count == len(row)
    torch.testing.assert_close(ce, expected, **SUM_ORDER)
    with torch.no_grad():
        p = torch.log_softmax(model.lm_head(teacher).double() / 2, -1)
        q = torch.log_softmax(out.logits[row, place].double() / 2, -1)
    torch.testing.assert_close(kl.double(), (p.exp() * (p - q)).sum(), **SUM_ORDER)


@pytest.mark.parametrize("mode", ["fast", "slow"])
def test_07_the_chunk_size_changes_nothing_but_memory(mode: str) -> None:
    found = []
    for chunk in (1, 5, 1024):
        model = tiny_llava()
        batch = FAMILIES["llava"].make_batch(model, ROWS)
        with attached(model, head_chunk=chunk, keep_ratio=0.2) as handle, handle.force_mode(mode):
            loss = model(**batch).loss
            loss.backward()
        found.append((loss.detach(), gradients(model)))
    for loss, grads in found[:-1]:
        torch.testing.assert_close(loss, found[-1][0], **SUM_ORDER)
        for name, value in found[-1][1].items():
            torch.testing.assert_close(grads[name], value, **SUM_ORDER)


# 8: accumulation -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["fast", "slow"])
def test_08_one_batch_of_eight_equals_four_of_two(mode: str) -> None:
    rows = TinyRows(8)
    total = sum(int((rows[i]["labels"][1:] != -100).sum()) for i in range(8))
    found = []
    for size in (8, 2):
        model = tiny_llava()
        with attached(model, keep_ratio=0.2) as handle, handle.force_mode(mode):
            losses = []
            for start in range(0, 8, size):
                batch = collate([rows[i] for i in range(start, start + size)])
                loss = model(**batch, num_items_in_batch=torch.tensor(total)).loss
                loss.backward()
                losses.append(float(loss.detach()))
            found.append((sum(losses), gradients(model), handle.isolator.rows.grad.clone()))
    assert math.isclose(found[0][0], found[1][0], rel_tol=1e-5)
    torch.testing.assert_close(found[0][2], found[1][2], **SUM_ORDER)
    for name, value in found[0][1].items():
        torch.testing.assert_close(found[1][1][name], value, **SUM_ORDER)


# 9: the schedule (in full in test_schedule.py) ------------------------------------------------------------------------


def test_09_the_schedule_is_a_pure_function_with_an_exact_count() -> None:
    modes = [mode_of_step(step, kind="stratified", slow_ratio=0.1, seed=5) for step in range(1000)]
    assert modes.count("slow") == 100
    assert modes == [mode_of_step(step, kind="stratified", slow_ratio=0.1, seed=5) for step in range(1000)]


# 11: the export ------------------------------------------------------------------------------------------------


def test_11_the_export_is_the_ordinary_checkpoint(family: TinyFamily, tmp_path: Path) -> None:
    stock = family.build_model()
    model = family.build_model().train()
    batch = family.make_batch(model, ROWS)
    optimizer_input = []
    handle = trimtab.attach(model, DualSpeedConfig(keep_ratio=0.2, slow_ratio=0.5))
    optimizer_input = [p for p in model.parameters() if p.requires_grad]
    assert any(p is handle.isolator.rows for p in optimizer_input), "the isolator is among the model's parameters"
    optimizer = torch.optim.SGD(optimizer_input, lr=0.05)
    for _ in range(3):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    with torch.no_grad():
        expected = model(**batch).logits
    model.save_pretrained(tmp_path / "attached")
    handle.save_pretrained(tmp_path / "attached" / "dualspeed")
    handle.detach()
    model.save_pretrained(tmp_path / "detached")
    stock.save_pretrained(tmp_path / "stock")

    for name in ("attached", "detached"):
        again, info = type(model).from_pretrained(tmp_path / name, output_loading_info=True)
        assert not any(info.get(kind) for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        assert again.eval().state_dict().keys() == stock.state_dict().keys()
        with torch.no_grad():
            assert torch.equal(again(**batch).logits, expected)
        assert keys_on_disk(tmp_path / name) == keys_on_disk(tmp_path / "stock")
        assert {f.name for f in (tmp_path / name).iterdir() if f.is_file()} == {
            f.name for f in (tmp_path / "stock").iterdir()
        }
    assert {f.name for f in (tmp_path / "attached" / "dualspeed").iterdir()} == {
        "dualspeed.json",
        "isolator.safetensors",
    }
    assert json.loads((tmp_path / "attached" / "config.json").read_text()) == json.loads(
        (tmp_path / "stock" / "config.json").read_text()
    )


def keys_on_disk(folder: Path) -> set[str]:
    from safetensors import safe_open

    with safe_open(folder / "model.safetensors", framework="pt") as file:
        return set(file.keys())


# 12: no gradient to dropped tokens --------------------------------------------------------------------------------


def test_12_the_projector_gets_no_gradient_from_dropped_tokens() -> None:
    model = tiny_llava()
    batch = FAMILIES["llava"].make_batch(model, ROWS)
    seen: list[Tensor] = []

    def watch(module: Any, args: tuple[Tensor, ...]) -> None:
        args[0].retain_grad()
        seen.append(args[0])

    hook = model.model.multi_modal_projector.register_forward_pre_hook(watch)
    with attached(model, keep_ratio=0.25) as handle, handle.force_mode("fast"):
        model(**batch).loss.backward()
        kept = handle.metrics()["visual_tokens_kept"]
    hook.remove()
    assert len(seen) == 1, "images are encoded once"
    reached = seen[0].grad.abs().sum(-1) > 0
    assert reached.sum(1).tolist() == [9, 9, 9]
    assert kept == 27
    untouched = seen[0].grad[~reached]
    assert torch.equal(untouched, torch.zeros_like(untouched))


@pytest.mark.parametrize(
    ("mode", "images", "settings", "passes"),
    [
        ("slow", ROWS, {}, [False, True]),
        ("fast", ROWS, {}, [True]),
        ("slow", ROWS, {"kl_weight": 0.0}, [True]),
        ("slow", (0, 0), {}, [True]),
        ("slow", ROWS, {"keep_ratio": 1.0, "isolator_tokens": 0}, [True]),
    ],
    ids=["slow", "fast", "no KL", "no image", "nothing dropped"],
)
def test_12_images_are_encoded_once_and_the_teacher_runs_without_gradient_or_not_at_all(
    family: TinyFamily, mode: str, images: tuple[int, ...], settings: dict[str, Any], passes: list[bool]
) -> None:
    model = family.build_model().train()
    batch = family.make_batch(model, images)
    parts = dict(model.model.named_children())
    tower = next(parts[name] for name in ("vision_tower", "vision_model", "visual") if name in parts)
    text = next(parts[name] for name in ("language_model", "text_model") if name in parts)
    encoded, decoded = [], []
    hooks = [
        tower.register_forward_hook(lambda *_: encoded.append(1)),
        text.register_forward_hook(lambda *_: decoded.append(torch.is_grad_enabled())),
    ]
    with attached(model, **{"keep_ratio": 0.2, **settings}) as handle, handle.force_mode(mode):
        model(**batch)
    for hook in hooks:
        hook.remove()
    assert len(encoded) == bool(sum(images))
    assert decoded == passes, "gradients enabled, pass by pass of the language model"


# 13: padding changes nothing ------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["right", "left"])
def test_13_a_row_alone_has_the_loss_it_has_in_a_batch(family: TinyFamily, side: str) -> None:
    model = family.build_model().train()
    batch = family.make_batch(model, ROWS, padding_side=side)
    total = int((batch["labels"] != -100).sum())
    with attached(model, keep_ratio=0.2) as handle:
        for mode in ("fast", "slow"):
            with handle.force_mode(mode), torch.no_grad():
                together = model(**batch, num_items_in_batch=torch.tensor(total)).loss
                alone = [
                    model(**family.take_row(batch, ROWS, row), num_items_in_batch=torch.tensor(total)).loss
                    for row in range(len(ROWS))
                ]
            torch.testing.assert_close(torch.stack(alone).sum(), together, atol=1e-5, rtol=1e-5)


# 14: how many tokens stay -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tokens", "ratio", "rule", "kept"),
    [
        (576, 0.1, "released", 57), (2880, 0.1, "released", 287), (576, 0.1, "floor", 57), (2880, 0.1, "floor", 288),
        (10, 0.1, "floor", 1), (576, 0.098, "round", 56), (576, 0.1, "round", 58), (576, 0.1, "ceil", 58),
        (10, 0.1, "ceil", 1), (576, 1.0, "released", 576), (576, 1.0, "floor", 576), (1, 1.0, "round", 1),
        (576, 0.25, "released", 144), (256, 0.1, "floor", 25),
    ],
)  # fmt: skip
def test_14_kept_count_table(tokens: int, ratio: float, rule: str, kept: int) -> None:
    assert kept_count(tokens, ratio, rule) == kept


def test_14_the_released_rule_can_keep_nothing_and_says_so() -> None:
    with pytest.raises(SettingError, match=r"keeps 0 of 10 tokens"):
        kept_count(10, 0.1, "released")


@pytest.mark.parametrize("rule", ["floor", "round", "ceil", "released"])
def test_14_the_metrics_count_what_the_rule_says(rule: str) -> None:
    model = tiny_llava()
    batch = FAMILIES["llava"].make_batch(model, ROWS)
    with attached(model, keep_ratio=0.15, keep_rule=rule) as handle, handle.force_mode("fast"):
        model(**batch)
        metrics = handle.metrics()
    assert metrics["visual_tokens_full"] == 3 * 36
    assert metrics["visual_tokens_kept"] == 3 * kept_count(36, 0.15, rule)
    assert metrics["mode"] == "fast"
