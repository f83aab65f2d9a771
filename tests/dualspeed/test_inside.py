"""Visual tokens that leave inside the language model in the fast mode."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.conformance.families import SUITE
from tests.dualspeed.common import ROWS, SUM_ORDER, attached, portrait, same_model
from tests.dualspeed.host_syncs import HostSyncs
from tests.dualspeed.inside_tools import AFTER, ALONE, DEPTH, WAYS, batch_of, deep_llava, queries_by_hand, settings
from tests.methods.vtw.models import deeper
from tests.tiny import FAMILIES, IMAGE, Batch, gradients, tiny_llava, weights
from torch import Tensor
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

import trimtab
from trimtab import DualSpeedConfig
from trimtab.anatomy import note_rows, placeholder_rule
from trimtab.anatomy.drop_inside import Rows, Stage, drop_inside
from trimtab.anatomy.drop_stages import vtw_stages
from trimtab.dualspeed import Samples, mode_of_sample
from trimtab.dualspeed.inside import InsideRows, query_places

ways = pytest.mark.parametrize("way", WAYS)
where = pytest.mark.parametrize("before", [ALONE, AFTER], ids=["alone", "after a pruner"])


@pytest.fixture
def llava() -> Any:
    return deep_llava()


def stock_loss(model: Any, view: Batch, stages: tuple[Stage, ...], visual: Tensor | None = None) -> Tensor:
    """Return the loss that the stock model computes while tokens leave."""
    with drop_inside(model, stages, owner="test", visual_mask=visual) as drop:
        drop.queries = queries_by_hand(view["labels"])
        loss: Tensor = model(**view).loss
    return loss


def fast_loss(model: Any, batch: Batch, **given: Any) -> tuple[Tensor, dict[str, Any], dict[str, Tensor]]:
    """Return the loss of a fast step, its metrics and its gradients."""
    model.zero_grad()
    with attached(model, **given) as handle, handle.force_mode("fast"):
        loss = model(**batch).loss
        loss.backward()
        return loss.detach(), handle.metrics(), {name: one.clone() for name, one in gradients(model).items()}


# off ------------------------------------------------------------------------------------------------------------------


def test_off_leaves_the_language_model_without_hooks(llava: Any) -> None:
    before = portrait(llava)["hooks"]
    with attached(llava, keep_ratio=0.3) as handle:
        hooks = portrait(llava)["hooks"]
        assert {name for name, count in before.items() if hooks[name] != count} <= {
            "._forward_pre_hooks", "._forward_hooks", "model._forward_hooks",
            "._forward_pre_hooks_with_kwargs", "._forward_hooks_with_kwargs", "._forward_hooks_always_called",
        }  # fmt: skip
        assert "visual_tokens_deep" not in handle.metrics()


@ways
def test_evaluation_and_slow_students_are_those_without_it(llava: Any, way: str) -> None:
    batch, found = batch_of(), []
    for given in (settings(way, AFTER), AFTER):
        with attached(llava, kl_weight=0.0, **given) as handle:
            with handle.force_mode("slow"):
                slow = llava(**batch).loss.detach()
            with torch.no_grad():
                loose = llava(**batch).logits
                evaluated = llava.eval()(**batch).logits
            llava.train()
            found.append((slow, loose, evaluated))
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


@ways
def test_detaching_gives_the_model_back(llava: Any, way: str, tmp_path: Path) -> None:
    llava.save_pretrained(tmp_path / "before")  # notes the class in the config
    before = portrait(llava), weights(llava)
    handle = trimtab.attach(llava, DualSpeedConfig(**settings(way, AFTER)))
    llava(**batch_of())
    llava.save_pretrained(tmp_path / "attached")
    handle.detach()
    same_model(llava, before)
    llava.zero_grad()
    assert weights(type(llava).from_pretrained(tmp_path / "attached")).keys() == before[1].keys()


def test_a_deep_copy_has_stages_of_its_own(llava: Any) -> None:
    batch = batch_of()
    with attached(llava, **settings("vtw")) as handle, handle.force_mode("fast"):
        twin = copy.deepcopy(llava)
        expected = llava(**batch).loss
        assert torch.equal(twin(**batch).loss, expected)
        trimtab.dualspeed.detach(twin)
        assert torch.equal(llava(**batch).loss, expected)
    assert portrait(twin)["hooks"] == portrait(deep_llava())["hooks"]


# the fast step --------------------------------------------------------------------------------------------------------


@ways
@pytest.mark.parametrize("padding_side", ["left", "right"])
def test_a_fast_step_that_drops_inside_only_is_the_stock_loss_with_the_stages(
    llava: Any, way: str, padding_side: str
) -> None:
    batch = batch_of(padding_side=padding_side)
    loss, metrics, found = fast_loss(llava, batch, **settings(way))
    llava.zero_grad()
    stages = WAYS[way][1]()
    expected = stock_loss(llava, batch, stages)
    expected.backward()
    full = llava(**batch).loss
    torch.testing.assert_close(loss, expected.detach(), **SUM_ORDER)
    assert (loss - full).abs() > 1e-3
    for name, one in gradients(llava).items():
        torch.testing.assert_close(found[name], one, atol=1e-5, rtol=1e-3)
    kept = stages[-1].kept
    assert kept is not None
    counts = {"visual_tokens_full": 108, "visual_tokens_kept": 108, "visual_tokens_deep": kept(36) + kept(72)}
    assert {name: metrics[name] for name in counts} == counts


def test_newline_rows_stay_where_they_are_asked_for() -> None:
    family = deeper("llava_next", DEPTH)
    model = family.build_model().train()
    batch = family.make_batch(model, (1, 2))
    stages = vtw_stages(2, keep_newlines=True)
    with drop_inside(model, stages, owner="test"):
        expected = model(**batch).loss
    loss, metrics, _ = fast_loss(model, batch, **settings("vtw", inside_options={"layer": 2, "keep_newlines": True}))
    torch.testing.assert_close(loss, expected.detach(), **SUM_ORDER)
    assert "visual_tokens_deep" not in metrics
    bare, _, _ = fast_loss(model, batch, **settings("vtw", inside_options={"layer": 2}))
    assert (bare - loss).abs() > 1e-3


def layer_by_hand(layer: Any, states: Tensor, angles: tuple[Tensor, Tensor]) -> Tensor:
    """Run one layer of Llama on one row, from its weights."""
    own, attention = layer, layer.self_attn
    width, size = states.shape[1], attention.head_dim
    normed = own.input_layernorm(states)
    query, key, value = (
        projection(normed).view(1, width, -1, size).transpose(1, 2)
        for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    query, key = apply_rotary_pos_emb(query, key, *angles)
    key, value = (one.repeat_interleave(query.shape[1] // one.shape[1], 1) for one in (key, value))
    logits = query @ key.transpose(2, 3) / size**0.5
    hidden = torch.ones(width, width, dtype=torch.bool).triu(1)
    paid = logits.masked_fill(hidden, float("-inf")).softmax(-1) @ value
    states = states + attention.o_proj(paid.transpose(1, 2).reshape(1, width, -1))
    added: Tensor = states + own.mlp(own.post_attention_layernorm(states))
    return added


def test_withdrawal_in_a_fast_step_equals_a_loop_over_the_layers(llava: Any) -> None:
    """Neither the stages nor the model's forward have a part in what is expected."""
    batch = batch_of((2,))
    loss, _, _ = fast_loss(llava, batch, **settings("vtw"))
    language, ids, labels = llava.model.language_model, batch["input_ids"], batch["labels"]
    with torch.no_grad():
        seen = llava.model.vision_tower(batch["pixel_values"], output_hidden_states=True).hidden_states[-2][:, 1:]
        states = llava.get_input_embeddings()(ids)
        states[ids == IMAGE] = llava.model.multi_modal_projector(seen).flatten(0, 1)
        angles = language.rotary_emb(states, torch.arange(ids.shape[1])[None])
        for number, layer in enumerate(language.layers):
            if number == 2:
                text = ids[0] != IMAGE
                states, angles, labels = states[:, text], tuple(one[:, text] for one in angles), labels[:, text]
            states = layer_by_hand(layer, states, angles)
        logits = llava.lm_head(language.norm(states))
        expected = torch.nn.functional.cross_entropy(logits[0, :-1], labels[0, 1:])
    torch.testing.assert_close(loss, expected, **SUM_ORDER)


@ways
def test_after_a_pruner_the_isolator_stays_and_the_rest_leaves(llava: Any, way: str) -> None:
    """What is expected takes the rows of the isolator from the embeddings, not from counts."""
    batch = batch_of()
    with attached(llava, **settings(way, AFTER)) as handle:
        with handle.force_mode("fast"):
            loss = llava(**batch).loss.detach()
        found = handle.metrics()
        view = handle.prune_inputs(batch)
        caught: list[Tensor] = []
        hook = llava.model.language_model.register_forward_pre_hook(
            lambda module, args, kwargs: caught.append(kwargs["inputs_embeds"]), with_kwargs=True
        )
        llava.eval()
        with torch.no_grad():
            llava(**{**view, "mm_encoder_outputs": dict(view["mm_encoder_outputs"])})
        hook.remove()
        rows = handle.isolator.rows.detach()
    isolator = (caught[0][:, :, None] == rows).all(-1).any(-1)
    assert isolator.sum() == 3 * 2
    visual = (view["input_ids"] == IMAGE) & ~isolator
    expected = stock_loss(llava.train(), view, WAYS[way][1](), visual)
    torch.testing.assert_close(loss, expected.detach(), **SUM_ORDER)
    kept = WAYS[way][1]()[-1].kept
    assert kept is not None
    assert found["visual_tokens_deep"] == sum(kept(int(count)) for count in visual.sum(1))


@pytest.mark.parametrize("name", ["llava_next", "idefics3", "qwen2_5_vl", "internvl", "llava_onevision"])
@pytest.mark.parametrize("padding_side", ["left", "right"])
def test_the_isolator_is_found_in_every_layout(name: str, padding_side: str) -> None:
    """Rows of tiles with text in between, of newlines, of three coordinates."""
    family = SUITE[name]
    model = family.build_model().train()
    batch = family.make_batch(model, ROWS, padding_side=padding_side)
    given = settings("vtw", {"keep_ratio": 0.4, "isolator_tokens": 2}, inside_options={"layer": 1})
    with attached(model, **given) as handle, handle.force_mode("fast"):
        caught: list[Tensor] = []
        language = model.get_decoder()
        hook = language.register_forward_pre_hook(
            lambda module, args, kwargs: caught.append(kwargs["inputs_embeds"]), with_kwargs=True, prepend=True
        )
        inside = handle._view.inside
        assert inside is not None
        entered: list[InsideRows] = []
        enter = inside.enter

        def note(rows: InsideRows, labels: Tensor | None) -> None:
            entered.append(rows)
            enter(rows, labels)

        inside.enter = note  # type: ignore[method-assign]
        view = handle.prune_inputs(batch)
        model(**batch)
        hook.remove()
        rows = handle.isolator.rows.detach()
    isolator = (caught[0].detach()[:, :, None] == rows).all(-1).any(-1)
    assert isolator.any()
    placeholder = torch.isin(view["input_ids"], torch.tensor(handle.image_token_ids))
    assert torch.equal(entered[0].visual, placeholder & ~isolator)
    assert entered[0].counts == (placeholder & ~isolator).sum(1).tolist()
    mask = view.get("attention_mask")
    assert entered[0].lengths == (torch.ones_like(view["input_ids"]) if mask is None else mask).sum(1).tolist()


@where
@ways
def test_a_slow_step_learns_from_the_view_that_drops_inside(llava: Any, way: str, before: dict[str, Any]) -> None:
    batch, given = batch_of(), settings(way, before)
    with attached(llava, temperature=2.0, kl_weight=0.5, **given) as handle:
        with handle.force_mode("slow"):
            loss = llava(**batch).loss
        found = handle.metrics()
        llava.zero_grad()
        loss.backward()
        teachers = teacher_logits(llava, handle, batch)
        if handle.isolator is not None:
            assert not handle.isolator.rows.grad.any()
    students = logits_at(llava(**batch).logits, batch["labels"])
    told, learnt = ((torch.cat(one) / 2).log_softmax(-1) for one in (teachers, students))
    kl = (told.exp() * (told - learnt)).sum() / len(told)
    assert kl > 1e-3
    torch.testing.assert_close(torch.tensor(found["kl"]), kl.detach(), atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(loss.detach(), (found["ce"] + 0.5 * 4 * kl).detach(), **SUM_ORDER)


def logits_at(logits: Tensor, labels: Tensor) -> list[Tensor]:
    supervised = labels[:, 1:] != -100
    return [logits[row, :-1][supervised[row]] for row in range(len(labels))]


def teacher_logits(model: Any, handle: Any, batch: Batch) -> list[Tensor]:
    """Return what the view says at the labels of each row, each row by itself."""
    found, inside = [], handle._view.inside
    for row in range(len(batch["labels"])):
        alone = FAMILIES["llava"].take_row(batch, ROWS, row)
        with torch.no_grad():
            if alone.get("pixel_values") is None:
                found.append(logits_at(model(**alone).logits, alone["labels"])[0])
                continue
            view, rows = handle._view.prune(alone, handle._isolator_rows(), handle.micro_step)
            with inside.active(rows, view["labels"]):
                found.append(logits_at(model(**view).logits, view["labels"])[0])
    return found


@where
@ways
def test_rows_of_two_modes_in_one_batch_are_those_of_their_modes(llava: Any, way: str, before: dict[str, Any]) -> None:
    batch = batch_of((1, 1, 1, 0), text_lengths=[3, 5, 4, 6])
    given = settings(way, before, schedule_unit="sample", slow_ratio=0.5, kl_weight=0.0)
    with attached(llava, **given) as handle:
        draws = [mode_of_sample(one, epoch=0, slow_ratio=0.5, seed=0) for one in range(50)]
        first = next(one for one in range(47) if sorted(draws[one : one + 3]) == ["fast", "fast", "slow"])
        mixed = llava(**batch, samples=Samples(ids=tuple(range(first, first + 4)))).loss
        assert handle.metrics()["mode"] == "mixed"
        counts, sums = [], []
        for row in range(4):
            alone = FAMILIES["llava"].take_row(batch, (1, 1, 1, 0), row)
            with handle.force_mode(draws[first + row]):
                sums.append(llava(**alone).loss)
            counts.append(int((alone["labels"][:, 1:] != -100).sum()))
    expected = sum(one * count for one, count in zip(sums, counts, strict=True)) / sum(counts)
    torch.testing.assert_close(mixed, expected, **SUM_ORDER)


def test_a_batch_of_text_only_is_left_alone(llava: Any) -> None:
    batch = batch_of((0, 0))
    expected = llava(**batch).loss.detach()
    loss, _, _ = fast_loss(llava, batch, **settings("vtw"))
    torch.testing.assert_close(loss, expected, **SUM_ORDER)


# gradients ------------------------------------------------------------------------------------------------------------


def test_tokens_that_leave_teach_the_projector_through_the_layers_before(llava: Any) -> None:
    batch = batch_of((1,))
    for layer in llava.model.language_model.layers:
        layer.requires_grad_(False)
    _, _, found = fast_loss(llava, batch, **settings("vtw"))
    assert found["model.multi_modal_projector.linear_1.weight"].abs().max() > 1e-4


@ways
def test_the_isolator_learns_in_fast_steps(llava: Any, way: str) -> None:
    _, _, found = fast_loss(llava, batch_of(), **settings(way, AFTER))
    assert found["dualspeed_isolator.rows"].abs().max() > 1e-4


@where
@ways
@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputed_activations_give_the_same_gradients(
    llava: Any, way: str, before: dict[str, Any], reentrant: bool
) -> None:
    batch, given = batch_of(), settings(way, before)
    loss, _, expected = fast_loss(llava, batch, **given)
    llava.activation_checkpointing_enable({"use_reentrant": reentrant})
    again, _, found = fast_loss(llava, batch, **given)
    assert torch.equal(loss, again)
    assert found.keys() == expected.keys()
    for name, one in expected.items():
        torch.testing.assert_close(found[name], one, atol=1e-7, rtol=1e-6)


@ways
def test_blocks_inside_a_checkpoint_wrapper_recompute_what_stayed(llava: Any, way: str) -> None:
    """As accelerate's FSDP puts them there: their hooks run again in the backward pass, when the step is over."""
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    batch = batch_of()
    _, _, expected = fast_loss(llava, batch, **settings(way))
    llava.zero_grad()
    with attached(llava, **settings(way)) as handle, handle.force_mode("fast"):
        layers = llava.model.language_model.layers
        for number in range(DEPTH):
            layers[number] = checkpoint_wrapper(layers[number])
        llava(**batch).loss.backward()
        found = {name.replace("_checkpoint_wrapped_module.", ""): one for name, one in gradients(llava).items()}
    for name, one in expected.items():
        torch.testing.assert_close(found[name], one, atol=1e-7, rtol=1e-6)


@ways
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_adapters_of_peft_train_in_the_layers_that_see_less(llava: Any, way: str) -> None:
    peft = pytest.importorskip("peft")
    batch = batch_of()
    lora = peft.LoraConfig(r=4, target_modules=["q_proj", "k_proj"], init_lora_weights=False)
    wrapped = peft.get_peft_model(llava, lora).train()
    loss, _, found = fast_loss(wrapped, batch, **settings(way))
    torch.testing.assert_close(loss, stock_loss(wrapped, batch, WAYS[way][1]()).detach(), **SUM_ORDER)
    adapters = [name for name in found if "language_model" in name and "lora" in name]
    assert len(adapters) == DEPTH * 4
    assert all(found[name].any() for name in adapters)


# query rows -----------------------------------------------------------------------------------------------------------


def rows_of(visual: list[list[int]], lengths: list[int], pad_left: bool = False) -> InsideRows:
    mask = torch.tensor(visual, dtype=torch.bool)
    return InsideRows(mask, mask.sum(1).tolist(), lengths, 1, pad_left)


def test_the_last_text_before_each_answer_asks() -> None:
    labels = torch.tensor([
        [-100, -100, -100, 5, 6, -100, -100, 7], [-100, -100, -100, 5, -100, -100, -100, -100],
        [-100, -100, -100, -100, -100, -100, -100, -100],
    ])  # fmt: skip
    visual = [[0, 1, 0, 0, 0, 0, 0, 0], [0, 1, 1, 0, 0, 0, 0, 0], [0, 1, 0, 0, 0, 0, 0, 0]]
    found = query_places(labels, rows_of(visual, [8, 5, 4]))
    assert found.nonzero().tolist() == [[0, 2], [0, 6], [1, 0], [2, 3]]
    left = query_places(labels, rows_of(visual, [8, 8, 4], pad_left=True))
    assert left[2].nonzero().tolist() == [[7]]


def choices(model: Any, batch: Batch, way: str, last: bool) -> list[Tensor]:
    """Return what stays at each stage of a fast step; with `last` the last place of each row asks."""
    chosen: list[Tensor] = []

    def watched(stage: Stage) -> Stage:
        def choose(rows: Rows) -> Tensor:
            chosen.append(stage.choose(rows))
            return chosen[-1]

        return replace(stage, choose=choose)

    with attached(model, **settings(way)) as handle, handle.force_mode("fast"):
        inside = handle._view.inside
        inside.drop.stages = tuple(watched(stage) for stage in inside.drop.stages)
        inside.scores = not last
        model(**batch)
    return chosen


@pytest.mark.parametrize("way", ["fastv", "pyramid_drop"])
def test_an_answer_has_no_say_in_what_it_is_learnt_from(llava: Any, way: str) -> None:
    batch = batch_of((1,), turns=1, text_lengths=[9])
    first = int((batch["labels"][0] != -100).nonzero()[0, 0])
    other = {**batch, "input_ids": batch["input_ids"].clone()}
    other["input_ids"][0, first:] = 7
    for last in (False, True):
        pairs = zip(*(choices(llava, one, way, last) for one in (batch, other)), strict=True)
        assert all(torch.equal(one, same) for one, same in pairs) is not last


# host waits -----------------------------------------------------------------------------------------------------------


@where
@ways
@pytest.mark.parametrize("mode", ["fast", "slow"])
def test_a_step_with_notes_waits_nowhere_in_trimtab(llava: Any, way: str, before: dict[str, Any], mode: str) -> None:
    batch = batch_of()
    batch = {**batch, "row_notes": note_rows(placeholder_rule(llava), batch)}
    with attached(llava, **settings(way, before)) as handle, handle.force_mode(mode):
        llava(**batch).loss.backward()
        with HostSyncs() as syncs:
            llava(**batch).loss.backward()
    assert syncs.of("trimtab") == []


def test_notes_count_answers() -> None:
    model = tiny_llava()
    batch = batch_of((1, 0, 2), turns=2)
    notes = note_rows(placeholder_rule(model), batch)
    assert notes is not None
    assert notes.answers == [2, 2, 2] == queries_by_hand(batch["labels"]).sum(1).tolist()
