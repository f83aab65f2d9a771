"""What every pruner of the registry promises, whoever wrote it."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest
import torch
from tests.pruners.cases import KINDS, make_inputs
from torch.utils._python_dispatch import TorchDispatchMode

from trimtab.errors import SettingError
from trimtab.pruners import PrunerInput, build_pruner, pruner_names
from trimtab.pruners.contract import NEEDS

OPTIONS = {
    "divprune": [{"centered": True}, {"pre_projector": True}, {"centered": True, "pre_projector": True}],
    "dpp": [{"use_text": True}],
    "grid_pool": [{"merge": True}],
    "scope": [{"alpha": 0.0}],
    "vispruner": [{"saliency_share": 0.0}, {"saliency_share": 1.0}],
    "visionzip": [{"contextual_share": 0.5}, {"contextual_share": 0.0}],
}
CASES = [(name, options) for name in pruner_names() for options in [{}, *OPTIONS.get(name, [])]]
EVERY = pytest.mark.parametrize(("name", "options"), CASES, ids=[f"{n}-{o}" for n, o in CASES])
PER_IMAGE = [f.name for f in fields(PrunerInput) if f.name not in ("grid", "draw")]


def kept_of(name: str, num_keep: int, tokens: int) -> int:
    return tokens if name == "keep_all" else num_keep


def images_of(inputs: PrunerInput, rows) -> PrunerInput:
    rows = torch.as_tensor(rows)
    values = {name: getattr(inputs, name) for name in PER_IMAGE}
    return replace(inputs, **{name: value[rows] for name, value in values.items() if value is not None})


def assert_same(left, right) -> None:
    assert torch.equal(left.valid, right.valid)
    assert torch.equal(left.index.masked_fill(~left.valid, -1), right.index.masked_fill(~right.valid, -1))
    assert (left.tokens is None) == (right.tokens is None)
    if left.tokens is not None:
        torch.testing.assert_close(left.tokens * left.valid[..., None], right.tokens * right.valid[..., None])
        assert torch.equal(left.weight * left.valid, right.weight * right.valid)


class HostReads(TorchDispatchMode):
    """Collects operators that read from the device or whose output size depends on data."""

    WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "item", "is_nonzero", "equal")

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        word = func._schema.name.split("::")[1]
        indexes_by_tensor = word in ("index", "index_put_", "index_put") and any(
            t is not None and (t.dtype == torch.bool or t.dim() == 0) for t in args[1]
        )
        if (indexes_by_tensor or word.startswith(self.WAITS)) and word not in ("index_select",):
            self.seen.append(word)
        return func(*args, **(kwargs or {}))


def test_host_reads_are_noticed():
    x = torch.arange(4.0)
    with HostReads() as reads:
        x[x > 1]
        x.argmax().item()
        x[x.argmax()]
    assert len(reads.seen) >= 3


@EVERY
def test_declares_needs_that_exist(name, options):
    assert build_pruner(name, options).needs <= NEEDS


@EVERY
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_keep", [1, 5, 23, 24])
@pytest.mark.parametrize("some_invalid", [False, True])
def test_keeps_exactly_that_many_distinct_ascending(name, options, kind, num_keep, some_invalid):
    inputs = make_inputs(kind, some_invalid=some_invalid)
    chosen = build_pruner(name, options).select(inputs, num_keep)
    images, tokens = inputs.features.shape[:2]
    kept = kept_of(name, num_keep, tokens)
    assert chosen.index.shape == chosen.valid.shape == (images, kept)
    assert chosen.index.dtype == torch.int64
    assert (chosen.index >= 0).all()
    assert (chosen.index < tokens).all()
    real = torch.ones(images, tokens, dtype=torch.bool) if inputs.valid is None else inputs.valid
    for image in range(images):
        count = min(kept, int(real[image].sum()))
        assert chosen.valid[image].tolist() == [True] * count + [False] * (kept - count)
        index = chosen.index[image, :count]
        assert (index.diff() > 0).all()
        assert real[image][index].all()


@EVERY
def test_one_real_token_and_none(name, options):
    valid = torch.zeros(3, 24, dtype=torch.bool)
    valid[0, 7] = True
    valid[1] = True
    chosen = build_pruner(name, options).select(replace(make_inputs(), valid=valid), 4)
    assert chosen.valid.sum(dim=1).tolist()[0] == 1
    assert chosen.index[0, 0] == 7
    assert chosen.valid.sum(dim=1).tolist()[2] == 0


@EVERY
@pytest.mark.parametrize("some_invalid", [False, True])
def test_what_unreal_tokens_hold_does_not_matter(name, options, some_invalid):
    inputs = make_inputs(some_invalid=some_invalid)
    if not some_invalid:
        inputs = replace(inputs, valid=torch.arange(24).expand(3, 24) < 20)
    pruner = build_pruner(name, options)
    before = pruner.select(inputs, 6)
    spoiled = {
        f: getattr(inputs, f).masked_fill(~inputs.valid[..., None], float("nan"))
        for f in ("features", "hidden", "keys")
    }
    assert_same(before, pruner.select(replace(inputs, **spoiled), 6))


@EVERY
def test_all_valid_is_no_mask(name, options):
    inputs = make_inputs()
    pruner = build_pruner(name, options)
    marked = replace(inputs, valid=torch.ones(3, 24, dtype=torch.bool))
    assert_same(pruner.select(inputs, 7), pruner.select(marked, 7))


@EVERY
@pytest.mark.parametrize("kind", KINDS)
def test_an_image_alone_equals_the_image_in_its_batch(name, options, kind):
    inputs = make_inputs(kind, images=4, some_invalid=kind == "random")
    pruner = build_pruner(name, options)
    together = pruner.select(inputs, 6)
    for image in range(4):
        seed, step, first = inputs.draw
        alone = replace(images_of(inputs, [image]), draw=(seed, step, first + image))
        row = type(together)(**{f.name: _row(getattr(together, f.name), image) for f in fields(together)})
        assert_same(pruner.select(alone, 6), row)


def _row(value, image):
    return None if value is None else value[image : image + 1]


@EVERY
def test_permuted_batch_permutes_the_result(name, options):
    if name == "random":
        pytest.skip("a random draw belongs to the image's position, by contract")
    inputs = make_inputs(images=4, some_invalid=True)
    pruner = build_pruner(name, options)
    chosen = pruner.select(inputs, 6)
    order = [2, 0, 3, 1]
    permuted = type(chosen)(
        **{f.name: None if (v := getattr(chosen, f.name)) is None else v[order] for f in fields(chosen)}
    )
    assert_same(pruner.select(images_of(inputs, order), 6), permuted)


@EVERY
@pytest.mark.parametrize("some_invalid", [False, True])
def test_reads_nothing_back(name, options, some_invalid):
    inputs = make_inputs(some_invalid=some_invalid)
    pruner = build_pruner(name, options)
    with HostReads() as reads:
        pruner.select(inputs, 6)
    assert reads.seen == []


@EVERY
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_picks_as_float32(name, options, dtype):
    inputs = make_inputs(some_invalid=True)
    floats = [f for f in PER_IMAGE if (v := getattr(inputs, f)) is not None and v.is_floating_point()]
    half = replace(inputs, **{f: getattr(inputs, f).to(dtype) for f in floats})
    full = replace(inputs, **{f: getattr(half, f).float() for f in floats})
    pruner = build_pruner(name, options)
    low, high = pruner.select(half, 6), pruner.select(full, 6)
    assert torch.equal(low.index, high.index)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(pruner.select(full, 6).index, high.index)
    if low.tokens is not None:
        assert low.tokens.dtype == dtype


@EVERY
def test_leaves_input_random_state_and_gradients_alone(name, options):
    inputs = make_inputs()
    features = inputs.features.clone().requires_grad_()
    before, state = inputs.features.clone(), torch.get_rng_state()
    chosen = build_pruner(name, options).select(replace(inputs, features=features), 6)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(features, before)
    assert not chosen.index.requires_grad
    if chosen.tokens is not None:
        chosen.tokens.sum().backward()
        assert features.grad is not None
        assert features.grad.abs().sum() > 0
        assert (chosen.weight >= 1).all()


@EVERY
@pytest.mark.parametrize("num_keep", [0, -1, 25])
def test_refuses_impossible_counts(name, options, num_keep):
    with pytest.raises(SettingError, match=rf"num_keep must be in 1\.\.24.*{num_keep} came"):
        build_pruner(name, options).select(make_inputs(), num_keep)


@EVERY
def test_refuses_missing_needs(name, options):
    pruner = build_pruner(name, options)
    for need in pruner.needs:
        with pytest.raises(SettingError, match=f"needs '{need}'"):
            pruner.select(replace(make_inputs(), **{need: None}), 3)
