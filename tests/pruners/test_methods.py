"""Each pruner against its one-image reference and its own objective."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
import torch
import torch.nn.functional as nnf
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.pruners import naive
from tests.pruners.cases import KINDS, make_inputs, tokens_of

from trimtab.errors import SettingError
from trimtab.ops.similarity import cosine_matrix
from trimtab.pruners import PrunerInput, build_pruner
from trimtab.pruners.dpp import relevance

REFERENCES = [
    ("cls_topk", {}, lambda p, k: naive.cls_topk(p["cls_attention"], k)),
    ("divprune", {}, lambda p, k: naive.divprune(p["features"], k)),
    ("divprune", {"centered": True}, lambda p, k: naive.divprune(p["features"], k, centered=True)),
    ("divprune", {"pre_projector": True}, lambda p, k: naive.divprune(p["hidden"], k)),
    ("dpp", {}, lambda p, k: naive.dpp(p["features"], k)),
    ("dpp", {"use_text": True}, lambda p, k: naive.dpp(p["features"], k, p["text"])),
    ("vispruner", {}, lambda p, k: naive.vispruner(p["features"], p["cls_attention"], k)),
    ("vispruner", {"saliency_share": 0.2}, lambda p, k: naive.vispruner(p["features"], p["cls_attention"], k, 0.2)),
    ("scope", {}, lambda p, k: naive.scope(p["features"], p["cls_attention"], k)),
    ("scope", {"alpha": 2}, lambda p, k: naive.scope(p["features"], p["cls_attention"], k, 2.0)),
]


def image_of(inputs, image):
    """The real tokens of one image as float64 arrays, and their indices in the full raster."""
    real = np.arange(inputs.features.shape[1])
    if inputs.valid is not None:
        real = real[inputs.valid[image].numpy()]
    per_token = ("features", "cls_attention", "hidden", "keys")
    part = {name: getattr(inputs, name)[image].double().numpy()[real] for name in per_token}
    return {**part, "text": inputs.text[image].double().numpy()}, real


@pytest.mark.parametrize(("name", "options", "reference"), REFERENCES, ids=[f"{n}-{o}" for n, o, _ in REFERENCES])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("some_invalid", [False, True])
def test_equals_the_reference(name, options, reference, kind, some_invalid):
    for seed, num_keep in [(0, 1), (1, 6), (2, 11)]:
        inputs = make_inputs(kind, tokens=36, width=32, seed=seed, some_invalid=some_invalid)
        chosen = build_pruner(name, options).select(inputs, num_keep)
        for image in range(3):
            part, real = image_of(inputs, image)
            assert chosen.index[image].tolist() == real[reference(part, num_keep)].tolist()


@pytest.mark.parametrize("some_invalid", [False, True])
@pytest.mark.parametrize("share", [0.0, 0.25, 0.5])
def test_visionzip_equals_the_reference(some_invalid, share):
    inputs = make_inputs(tokens=36, some_invalid=some_invalid)
    chosen = build_pruner("visionzip", {"contextual_share": share}).select(inputs, 8)
    for image in range(3):
        part, real = image_of(inputs, image)
        wanted = naive.visionzip(part["features"], part["keys"], part["cls_attention"], 8, int(8 * share))
        assert chosen.index[image].tolist() == real[[i for i, _, _ in wanted]].tolist()
        np.testing.assert_allclose(chosen.tokens[image], np.stack([t for _, t, _ in wanted]), atol=1e-5)
        assert chosen.weight[image].tolist() == [w for _, _, w in wanted]
        if share:
            assert chosen.weight[image].sum() == len(real)


@pytest.mark.parametrize("size", [1, 2, 3, 4, 6])
def test_grid_pool_is_adaptive_pooling_where_the_count_divides(size):
    inputs = PrunerInput(features=torch.randn(2, 144, 5), grid=(12, 12))
    chosen = build_pruner("grid_pool", {"merge": True}).select(inputs, size * size)
    picture = inputs.features.mT.reshape(2, 5, 12, 12)
    wanted = nnf.adaptive_avg_pool2d(picture, size).flatten(2).mT
    torch.testing.assert_close(chosen.tokens, wanted)
    assert (chosen.weight == 144 / size**2).all()


def test_grid_pool_lattice_of_four():
    inputs = PrunerInput(features=torch.randn(1, 36, 2), grid=(6, 6))
    assert build_pruner("grid_pool").select(inputs, 4).index.tolist() == [[7, 10, 25, 28]]
    assert build_pruner("grid_pool").select(replace(inputs, grid=None), 4).index.tolist() == [[4, 13, 22, 31]]


@settings(max_examples=60, derandomize=True, deadline=None)
@given(st.integers(1, 9), st.integers(1, 9), st.data())
def test_grid_pool_cells_cover_the_image(rows, columns, data):
    num_keep = data.draw(st.integers(1, rows * columns))
    real = data.draw(st.lists(st.booleans(), min_size=rows * columns, max_size=rows * columns))
    valid = torch.tensor([real, [True] * len(real)])
    features = torch.ones(2, rows * columns, 3)
    inputs = PrunerInput(features=features, valid=valid, grid=(rows, columns))
    chosen = build_pruner("grid_pool", {"merge": True}).select(inputs, num_keep)
    plain = build_pruner("grid_pool").select(inputs, num_keep)
    assert torch.equal(chosen.index, plain.index)
    assert torch.equal((chosen.weight * chosen.valid).sum(1), valid.sum(1).float())
    assert torch.equal(chosen.valid, chosen.weight > 0)
    torch.testing.assert_close(chosen.tokens[chosen.valid], torch.ones(int(chosen.valid.sum()), 3))
    for image in range(2):
        index = chosen.index[image][chosen.valid[image]]
        assert (index.diff() > 0).all()
        assert valid[image][index].all()


def test_grid_that_does_not_fit():
    inputs = PrunerInput(features=torch.randn(1, 10, 2), grid=(3, 3))
    with pytest.raises(SettingError, match=r"grid.*multiply to the 10 tokens.*\(3, 3\)"):
        build_pruner("grid_pool").select(inputs, 2)


def test_random_is_uniform_and_named_by_its_draw():
    pruner = build_pruner("random")
    features = torch.zeros(2000, 10, 1)
    index = pruner.select(PrunerInput(features=features, draw=(5, 1, 0)), 3).index
    share = torch.bincount(index.flatten(), minlength=10) / 2000
    assert ((share - 0.3).abs() < 0.05).all()
    pairs = {tuple(row) for row in index.tolist()}
    assert len(pairs) == 120
    again = pruner.select(PrunerInput(features=features, draw=(5, 1, 0)), 3).index
    assert torch.equal(index, again)
    for other in [(6, 1, 0), (5, 2, 0), (5, 1, 2000), (1, 5, 0)]:
        assert not torch.equal(index, pruner.select(PrunerInput(features=features, draw=other), 3).index)


def smallest_chord(x, picks):
    u = naive.unit(x)
    return min(float(np.linalg.norm(u[i] - u[j])) for i, j in combinations(picks, 2))


def test_divprune_picks_as_on_chords_and_within_half_of_the_best():
    for seed in range(20):
        inputs = PrunerInput(features=tokens_of("random", 1, 9, 3, seed))
        picks = build_pruner("divprune").select(inputs, 4).index[0].tolist()
        x = inputs.features[0].double().numpy()
        best = max(smallest_chord(x, choice) for choice in combinations(range(9), 4))
        assert smallest_chord(x, picks) >= best / 2
        u = naive.unit(x)
        chords = np.linalg.norm(u[:, None] - u[None], axis=-1)
        order = [int(np.argmax([min(np.delete(chords[i], i)) for i in range(9)]))]
        while len(order) < 4:
            order.append(int(np.argmax([-1 if i in order else min(chords[i, order]) for i in range(9)])))
        assert picks == sorted(order)


def test_objectives_beat_random_in_a_hundred_trials():
    inputs = make_inputs(images=100, tokens=48, width=24)
    similarity = cosine_matrix(inputs.features).double()
    by_chance = build_pruner("random").select(inputs, 8).index

    def block(index):
        return similarity.gather(1, index[:, :, None].expand(-1, -1, 48)).gather(2, index[:, None].expand(-1, 8, -1))

    def apart(index):
        return 1 - (block(index) - 3 * torch.eye(8)).amax((1, 2))

    def covered(index):
        return similarity.gather(1, index[:, :, None].expand(-1, -1, 48)).amax(1).clamp_min(0).sum(1)

    for name, options, measure in [
        ("divprune", {}, apart),
        ("dpp", {}, lambda index: torch.logdet(block(index))),
        ("scope", {"alpha": 0.0}, covered),
    ]:
        chosen = build_pruner(name, options).select(inputs, 8).index
        assert (measure(chosen) >= measure(by_chance)).all(), name


def test_relevance_is_scaled_per_image():
    inputs = make_inputs()
    features = inputs.features * torch.tensor([1.0, 2.0, 3.0])[:, None, None]
    score = relevance(features, inputs.text)
    for image in range(3):
        wanted = naive.relevance(features[image].numpy(), inputs.text[image].numpy())
        np.testing.assert_allclose(score[image], wanted, atol=1e-5)
    assert (relevance(features, inputs.text, text_valid=torch.zeros(3, 5, dtype=torch.bool)) == 1).all()


def test_dpp_survives_more_picks_than_dimensions():
    inputs = PrunerInput(features=torch.randn(2, 30, 4))
    picks = build_pruner("dpp").select(inputs, 10).index
    assert all(len(set(row)) == 10 for row in picks.tolist())


def test_scope_chunks_do_not_change_picks(monkeypatch):
    inputs = make_inputs(tokens=40)
    whole = build_pruner("scope").select(inputs, 9).index
    monkeypatch.setattr("trimtab.pruners.scope._CHUNK_ELEMENTS", {"cpu": 3 * 40 * 7})
    assert torch.equal(build_pruner("scope").select(inputs, 9).index, whole)


def test_divprune_at_full_size_has_no_repeats_and_equals_the_plain_loop():
    from trimtab.bench.pruners import bench_pruners

    record = bench_pruners(["divprune"], images=2, tokens=300, width=32, repeats=1)
    assert record["kept"] == 30
    assert record["pruners"]["divprune"]["same_picks"]
    assert record["pruners"]["divprune"]["plain_loop_same_picks"]
