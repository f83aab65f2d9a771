"""Scores of query rows against the attention map of an eager model, and that taking them leaves no trace."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest
import torch
from tests.conformance.families import SUITE
from tests.dualspeed.host_syncs import HostSyncs
from tests.tiny import llama_settings
from torch import Tensor, nn

from trimtab.anatomy.decoder import open_decoder
from trimtab.anatomy.drop_inside import Rows
from trimtab.anatomy.layer_scores import attention_scores, project_layer
from trimtab.errors import NotSupportedError, TrimtabError, UnsupportedModelError

CORE = ("llava", "llava_next", "qwen2_5_vl", "qwen3_vl", "internvl", "smolvlm")


def rows_at(model: Any, batch: dict[str, Any], layer: int, queries: Tensor | None = None, **more: Any) -> Rows:
    """What a chooser sees at the input of a layer, taken from a stock forward."""
    part = open_decoder(model).layers[layer]
    caught: list[Any] = []
    hook = part.register_forward_pre_hook(lambda module, args, kwargs: caught.append((args, kwargs)), with_kwargs=True)
    with torch.no_grad():
        model(**{name: value for name, value in batch.items() if name != "labels"}, use_cache=False, **more)
    hook.remove()
    (args, kwargs), *_ = caught
    states = args[0] if args else kwargs["hidden_states"]
    real = batch["attention_mask"].bool()
    visual = torch.zeros_like(real)
    for token in open_decoder(model).token_ids:
        visual |= batch["input_ids"] == token
    return Rows(
        states=states, visual=visual, real=real, source=torch.arange(real.shape[1]).expand(real.shape),
        rank=visual.long().cumsum(1) - visual.long(), marks=torch.zeros_like(visual), total=visual.sum(1),
        queries=last_places(real) if queries is None else queries, layer=part,
        arguments={name: value for name, value in kwargs.items() if name != "hidden_states"},
    )  # fmt: skip


def last_places(real: Tensor) -> Tensor:
    places = torch.arange(real.shape[1])
    return (places == (places * real).amax(1, keepdim=True)) & real


def several_queries(real: Tensor) -> Tensor:
    """Different numbers of query rows in different rows; none in the second."""
    queries = last_places(real)
    queries[0] |= queries[0].roll(-2) | queries[0].roll(-5)
    queries[1] = False
    return queries


def take(rows: Rows, index: Tensor) -> Rows:
    """The rows with some places only, arguments included; [row, kept] ascending."""
    names = ("visual", "real", "source", "rank", "marks", "queries")
    cut = {name: getattr(rows, name).gather(1, index) for name in names}
    width = rows.states.shape[2]
    arguments = dict(rows.arguments)
    angles = [one.expand(len(index), -1, -1) for one in rows.arguments["position_embeddings"]]
    deep = index[..., None]
    arguments["position_embeddings"] = tuple(one.gather(1, deep.expand(-1, -1, one.shape[2])) for one in angles)
    arguments["attention_mask"] = None
    states = rows.states.gather(1, deep.expand(-1, -1, width))
    return dataclasses.replace(rows, states=states, arguments=arguments, **cut)


@pytest.mark.parametrize("padding_side", ["left", "right"])
@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("name", CORE)
def test_scores_are_rows_of_the_attention_map(name: str, layer: int, padding_side: str) -> None:
    model = SUITE[name].build_model()
    model.set_attn_implementation("eager")
    batch = SUITE[name].make_batch(model, [1, 0, 2], padding_side=padding_side)
    queries = several_queries(batch["attention_mask"].bool())
    assert queries.sum(1).tolist() == [3, 0, 1]
    found = attention_scores(rows_at(model, batch, layer, queries))
    del batch["labels"]
    with torch.no_grad():
        maps = model(**batch, output_attentions=True).attentions[layer].mean(1)
    for row, wanted in enumerate(maps):
        mean = wanted[queries[row]].mean(0) if queries[row].any() else torch.zeros(len(wanted))
        torch.testing.assert_close(found[row], mean, atol=1e-6, rtol=1e-5)
    assert found[0].max() > 1.5 / batch["attention_mask"][0].sum()  # not the same everywhere


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(set(SUITE) - set(CORE)))
def test_scores_are_rows_of_the_attention_map_in_every_family(name: str) -> None:
    model = SUITE[name].build_model()
    try:
        open_decoder(model)
    except TrimtabError as error:
        pytest.skip(str(error)[:100])
    model.set_attn_implementation("eager")
    batch = SUITE[name].make_batch(model, [1])
    found = attention_scores(rows_at(model, batch, 1))
    del batch["labels"]
    with torch.no_grad():
        maps = model(**batch, output_attentions=True).attentions[1].mean(1)
    torch.testing.assert_close(found, maps[:, -1], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("name", CORE)
def test_places_that_left_take_no_share(name: str) -> None:
    model = SUITE[name].build_model()
    model.set_attn_implementation("eager")
    batch = SUITE[name].make_batch(model, [1, 0, 2], padding_side="left")
    whole = rows_at(model, batch, 1, several_queries(batch["attention_mask"].bool()))
    index = torch.stack([torch.randperm(whole.real.shape[1])[:20].sort().values for _ in range(3)])
    index[:, -1] = whole.real.shape[1] - 1
    rows = take(whole, index)
    found = attention_scores(rows)
    # The definition: the layer itself, run on these places with a mask written out by hand.
    seen = (rows.source[:, None] <= rows.source[:, :, None]) & rows.real[:, None]
    mask = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)[:, None]
    maps: list[Tensor] = []
    hook = rows.layer.self_attn.register_forward_hook(lambda module, args, output: maps.append(output[1]))
    with torch.no_grad():
        rows.layer(rows.states, **{**rows.arguments, "attention_mask": mask})
    hook.remove()
    for row in (0, 2):
        wanted = maps[0].mean(1)[row][rows.queries[row]].mean(0)
        torch.testing.assert_close(found[row], wanted, atol=1e-6, rtol=1e-5)
        assert found[row].sum().item() == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("name", CORE)
def test_a_row_alone_scores_as_in_its_batch(name: str) -> None:
    family = SUITE[name]
    model = family.build_model()
    batch = family.make_batch(model, [1, 0, 2], padding_side="left")
    together = attention_scores(rows_at(model, batch, 1))
    for row in range(3):
        alone = attention_scores(rows_at(model, family.take_row(batch, [1, 0, 2], row), 1))
        real = batch["attention_mask"][row].bool()
        torch.testing.assert_close(together[row, real], alone[0], atol=1e-6, rtol=1e-5)
        assert together[row, ~real].eq(0).all()


def test_the_number_of_query_rows_may_be_told() -> None:
    model = SUITE["llava"].build_model()
    batch = SUITE["llava"].make_batch(model)
    rows = rows_at(model, batch, 1, several_queries(batch["attention_mask"].bool()))
    found = attention_scores(rows)
    for most in (3, 7, 10_000):
        assert torch.equal(attention_scores(dataclasses.replace(rows, most_queries=most)), found)


@pytest.mark.parametrize("name", CORE)
def test_the_host_waits_only_to_count_query_rows(name: str) -> None:
    model = SUITE[name].build_model()
    rows = rows_at(model, SUITE[name].make_batch(model), 1)
    with HostSyncs() as syncs:
        attention_scores(dataclasses.replace(rows, most_queries=1))
    assert not syncs.waits
    with HostSyncs() as syncs:
        attention_scores(rows)
    assert [wait.kind for wait in syncs.waits] == ["item"]


def test_the_model_keeps_its_attention_and_its_mode() -> None:
    model = SUITE["llava"].build_model().train()
    batch = SUITE["llava"].make_batch(model)
    rows = rows_at(model, batch, 1)
    rows.layer.mlp.eval()
    before = {name: (part.training, vars(part).get("config"), list(vars(part))) for name, part in model.named_modules()}
    called: list[object] = []
    hook = rows.layer.register_forward_hook(lambda *given: called.append(given))
    attention_scores(rows)
    hook.remove()
    after = {name: (part.training, vars(part).get("config"), list(vars(part))) for name, part in model.named_modules()}
    assert after.keys() == before.keys()
    for name, (training, config, attributes) in before.items():
        assert after[name][0] == training
        assert after[name][1] is config
        assert after[name][2] == attributes
    assert model.config.get_text_config()._attn_implementation == "sdpa"
    assert not called


def test_only_what_stands_before_attention_is_run() -> None:
    model = SUITE["llava"].build_model()
    rows = rows_at(model, SUITE["llava"].make_batch(model), 1)
    ran: list[str] = []
    for name, part in rows.layer.named_modules():
        part.register_forward_pre_hook(lambda module, args, name=name: ran.append(name))
    attention_scores(rows)
    assert ran == ["input_layernorm", "self_attn", "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"]


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")  # asked for by PEFT itself
@pytest.mark.parametrize("reentrant", [True, False])
def test_lora_with_dropout_under_recomputation(reentrant: bool) -> None:
    peft = pytest.importorskip("peft")
    model = SUITE["llava"].build_model()
    model.config.get_text_config().attention_dropout = 0.3
    settings = peft.LoraConfig(target_modules=["q_proj", "k_proj"], lora_dropout=0.5, init_lora_weights=False, r=2)
    wrapped = peft.get_peft_model(model, settings)
    batch = SUITE["llava"].make_batch(model)
    rows = rows_at(model, batch, 1)
    calm = attention_scores(rows)
    wrapped.disable_adapter_layers()
    assert not torch.allclose(attention_scores(rows), calm, atol=1e-3)
    wrapped.enable_adapter_layers()

    wrapped.train()
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": reentrant})
    wrapped.enable_input_require_grads()
    drawn = torch.get_rng_state()
    found = attention_scores(dataclasses.replace(rows, states=rows.states.clone().requires_grad_()))
    assert torch.equal(found, calm)
    assert torch.equal(torch.get_rng_state(), drawn)
    assert not found.requires_grad
    wrapped(**batch, use_cache=False).loss.backward()
    assert all(
        one.grad is not None for name, one in model.named_parameters() if "language" in name and "lora_A" in name
    )


@pytest.mark.parametrize("name", CORE)
def test_half_precision_is_scored_in_float32(name: str) -> None:
    model = SUITE[name].build_model().bfloat16()
    batch = SUITE[name].make_batch(model, padding_side="left")
    rows = rows_at(model, {**batch, "pixel_values": batch["pixel_values"].bfloat16()}, 1)
    assert rows.states.dtype == torch.bfloat16
    found = attention_scores(rows)
    assert found.dtype == torch.float32
    for row in range(3):
        torch.testing.assert_close(found[row], by_hand(rows, row), atol=1e-6, rtol=1e-5)


def test_autocast_does_not_reach_the_scores() -> None:
    model = SUITE["llava"].build_model()
    rows = rows_at(model, SUITE["llava"].make_batch(model, padding_side="left"), 1)
    sharp = project_layer(rows.layer, rows.states, rows.arguments)
    with torch.autocast("cpu", torch.bfloat16):
        found = attention_scores(rows)
        projected = project_layer(rows.layer, rows.states, rows.arguments)
        assert not torch.allclose(projected.query, sharp.query, atol=1e-4)  # the projections are the layer's own
        with torch.autocast("cpu", enabled=False):
            wanted = torch.stack([by_hand(rows, row, projected) for row in range(3)])
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, wanted, atol=1e-6, rtol=1e-5)


def by_hand(rows: Rows, row: int, projected: Any = None) -> Tensor:
    """Mean over heads of the attention of a row's last place, head by head."""
    projected = projected or project_layer(rows.layer, rows.states, rows.arguments)
    heads, groups = projected.query.shape[1], projected.key.shape[1]
    total = torch.zeros(rows.real.shape[1])
    for head in range(heads):
        key = projected.key[row, head // (heads // groups)].float()
        logits = key @ projected.query[row, head, -1].float() * projected.scaling
        total += logits.masked_fill(~rows.real[row], float("-inf")).softmax(0) / heads
    return total


def test_a_filled_cache_neither_counts_nor_grows() -> None:
    from transformers import DynamicCache

    family = SUITE["llava"]
    model = family.build_model()
    batch = family.make_batch(model, [1])
    rows = rows_at(model, batch, 1)
    cache = DynamicCache()
    with torch.no_grad():
        model(input_ids=batch["input_ids"][:, :3], past_key_values=cache)
    given = {**rows.arguments, "past_key_values": cache, "use_cache": True}
    found = attention_scores(dataclasses.replace(rows, arguments=given))
    assert torch.equal(found, attention_scores(rows))
    assert [cache.get_seq_length(layer) for layer in (0, 1)] == [3, 3]


def test_soft_bounds_of_the_logits_are_followed() -> None:
    from transformers import Gemma2Config, Gemma2ForCausalLM

    settings = llama_settings(model_type="gemma2", head_dim=8, sliding_window=4, attn_logit_softcapping=1.5)
    model = Gemma2ForCausalLM(Gemma2Config(**settings)).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.5)
    model.set_attn_implementation("eager")
    ids = torch.randint(3, 50, (2, 12))
    assert model.config.layer_types == ["sliding_attention", "full_attention"]
    caught: list[Any] = []
    model.model.layers[1].register_forward_pre_hook(lambda m, a, k: caught.append((a[0], k)), with_kwargs=True)
    with torch.no_grad():
        wanted = model(ids, output_attentions=True).attentions[1].mean(1)[:, -1]
    real = torch.ones(2, 12, dtype=torch.bool)
    places = torch.arange(12).expand(2, 12)
    (states, arguments) = caught[0]
    rows = Rows(
        states, ~real, real, places, places, ~real, real.sum(1), last_places(real), model.model.layers[1], arguments
    )
    torch.testing.assert_close(attention_scores(rows), wanted, atol=1e-6, rtol=1e-5)
    with pytest.raises(NotSupportedError, match=r"Gemma2DecoderLayer depends on sliding_window.*\(withdraw\)"):
        attention_scores(dataclasses.replace(rows, layer=model.model.layers[0]))


class Plain(nn.Module):
    """A layer that attends by itself."""

    def forward(self, states: Tensor, **arguments: Any) -> Tensor:
        return states


def test_attention_of_its_own_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match=r"Plain does not call its attention through .*AttentionInterface"):
        project_layer(Plain(), torch.zeros(1, 2, 3), {})


def test_other_queries_than_those_of_the_places_are_refused() -> None:
    model = SUITE["llava"].build_model()
    rows = rows_at(model, SUITE["llava"].make_batch(model), 1)

    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = rows.layer

        def forward(self, states: Tensor, **arguments: Any) -> Tensor:
            angles = tuple(one[:, :2] for one in arguments.pop("position_embeddings"))
            found: Tensor = self.inner(states[:, :2], position_embeddings=angles, **arguments)
            return found

    message = r"Half attends with queries \[3, 4, 2, 8\] and keys \[3, 2, 2, 8\] for states \[3, .*expected"
    with pytest.raises(UnsupportedModelError, match=message):
        attention_scores(dataclasses.replace(rows, layer=Half()))


def test_packed_rows_are_refused() -> None:
    model = SUITE["llava"].build_model()
    rows = rows_at(model, SUITE["llava"].make_batch(model), 1)
    packed = {**rows.arguments, "cu_seq_lens_q": torch.tensor([0, 2, 4])}
    with pytest.raises(NotSupportedError, match=r"LlamaDecoderLayer depends on cu_seq_lens_q.*rows without packing"):
        attention_scores(dataclasses.replace(rows, arguments=packed))


def test_a_layer_that_fails_is_as_before() -> None:
    model = SUITE["llava"].build_model().train()
    rows = rows_at(model, SUITE["llava"].make_batch(model), 1)
    config = rows.layer.self_attn.config
    broken = {**rows.arguments, "position_embeddings": None}
    with pytest.raises(TypeError):
        attention_scores(dataclasses.replace(rows, arguments=broken))
    assert rows.layer.self_attn.config is config
    assert config._attn_implementation == "sdpa"
    assert all(part.training for part in rows.layer.modules())


def test_a_copy_made_while_scoring_is_not_needed_for_the_next() -> None:
    model = SUITE["llava"].build_model()
    batch = SUITE["llava"].make_batch(model)
    first = attention_scores(rows_at(model, batch, 1))
    assert torch.equal(attention_scores(rows_at(copy.deepcopy(model), batch, 1)), first)
