"""What every supported model family must hold; each check raises AssertionError where it does not.

Reference of the first checks: the stock model on the full sequence. Logits of the tiny models are of order one to
four, so two orders of summation of the same float32 numbers differ by a few 1e-6; 2e-5 leaves a margin, and
`tokens_matter` holds that another choice of tokens moves the logits by more than a hundred times that.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from tests.conformance.families import SUITE
from tests.dualspeed.common import training_arguments
from tests.tiny import IMAGE, VIDEO, Batch, TinyFamily
from torch import Tensor

import trimtab
from trimtab import DualSpeedConfig
from trimtab.anatomy import assemble, check_model, encode_images, full_inputs, open_host, read_rows
from trimtab.errors import SettingError

ROWS = (1, 0, 2)
VIDEO_ROWS = (0, 1, 1)
NO_IMAGES, BESIDE_VIDEOS = (0, 0, 0), (1, 0, 1)
TIGHT = 2e-5
SIDES = ("right", "left")


@functools.cache
def _built(name: str) -> Any:
    return SUITE[name].build_model()


def model_of(family: TinyFamily, fresh: bool = False) -> Any:
    """Return the family's model; a copy of its own where the caller will change it."""
    return copy.deepcopy(_built(family.name)) if fresh else _built(family.name)


def keep_some(blocks: Sequence[Tensor], share: float = 0.3, seed: int = 0) -> list[Tensor]:
    """Choose ascending tokens of every block at random; blocks without tokens keep none."""
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randperm(len(block), generator=generator)[: max(1, int(share * len(block))) if len(block) else 0]
        .sort()
        .values
        for block in blocks
    ]


def logits_of(model: Any, inputs: Batch) -> Tensor:
    """Return the logits of a forward without labels."""
    with torch.no_grad():
        logits: Tensor = model(**{name: value for name, value in inputs.items() if name != "labels"}).logits
    return logits


def survivors(model: Any, batch: Batch, kept: Sequence[Tensor], blocks: Sequence[Tensor]) -> Tensor:
    """Return the mask of the places of the full batch that stay."""
    encoded = encode_images(model, batch)
    layout = read_rows(model, batch, encoded)
    stays = [
        torch.zeros(len(block), dtype=torch.bool).index_fill(0, k, True) for block, k in zip(blocks, kept, strict=True)
    ]
    mask = batch["attention_mask"].bool().clone()
    mask.view(-1)[layout.place] = torch.cat(stays)
    return mask


def keep_all(family: TinyFamily) -> None:
    """Keeping every token is the normal forward."""
    model = model_of(family)
    for side in SIDES:
        for batch in batches(family, model, side):
            with torch.no_grad():  # as the reference runs; with gradients some convolutions sum in another order
                encoded = encode_images(model, batch)
            every = [torch.arange(len(block)) for block in encoded.blocks]
            inputs = assemble(model, batch, encoded, every, positions="original")
            real = batch["attention_mask"].bool()
            expected = logits_of(model, batch)[real]
            # With left padding transformers counts positions from the padding on where none are given.
            drift = 0 if side == "right" else 5e-6
            close(logits_of(model, inputs)[inputs["attention_mask"].bool()], expected, drift)
            close(logits_of(model, full_inputs(model, batch, encoded))[real], expected, 0)


def drop_is_mask(family: TinyFamily) -> None:
    """Dropping tokens equals masking them, or, in recurrent models, never having had them."""
    model = model_of(family)
    for side in SIDES:
        for batch in batches(family, model, side):
            encoded = encode_images(model, batch)
            kept = keep_some(encoded.blocks)
            inputs = assemble(model, batch, encoded, kept, positions="original")
            mask = survivors(model, batch, kept, encoded.blocks)
            real = inputs["attention_mask"].bool()
            assert torch.equal(inputs["input_ids"][real], batch["input_ids"][mask])
            assert torch.equal(inputs["labels"][real], batch["labels"][mask])
            found = logits_of(model, inputs)[real]
            masked = masked_logits(family, model, batch, mask)[mask]
            if not family.not_masking:
                close(found, masked, TIGHT)
                continue
            assert (found - masked).abs().max() > TIGHT, f"declared not to be masking ({family.not_masking}), but it is"
            rows = [embedded_row(model, inputs, row) for row in range(len(real))]
            close(found, torch.cat(rows), TIGHT)


def tokens_matter(family: TinyFamily) -> None:
    """Another choice of tokens gives other logits, so that the checks above can tell a wrong token."""
    model = model_of(family)
    batch = next(iter(batches(family, model, "right")))
    encoded = encode_images(model, batch)
    found = []
    for seed in (0, 1):
        inputs = assemble(model, batch, encoded, keep_some(encoded.blocks, seed=seed), positions="original")
        found.append(logits_of(model, inputs)[inputs["labels"] != -100])
    assert (found[0] - found[1]).abs().max() > 100 * TIGHT


def rows_alone(family: TinyFamily) -> None:
    """A pruned row in a padded batch equals the same row alone."""
    model = model_of(family)
    for side in SIDES:
        batch = family.make_batch(model, ROWS, padding_side=side)
        encoded = encode_images(model, batch)
        kept = keep_some(encoded.blocks)
        together = assemble(model, batch, encoded, kept, positions="renumber")
        logits = logits_of(model, together)
        owners = read_rows(model, batch, encoded).block_rows
        for row in range(len(ROWS)):
            alone = family.take_row(batch, ROWS, row)
            if family.row_dependence and ROWS[row]:
                alone["position_ids"] = positions_of_row(family, model, batch, alone, row)
            if ROWS[row]:
                own = encode_images(model, alone)
                mine = [k for k, owner in zip(kept, owners, strict=True) if owner == row and len(k)]
                alone = assemble(model, alone, own, mine, positions="renumber")
            real = together["attention_mask"][row].bool()
            close(logits_of(model, alone)[0], logits[row, real], TIGHT)


def gradients(family: TinyFamily) -> None:
    """Gradients of a fast step reach isolator, kept features and projector, and no dropped feature."""
    model = model_of(family, fresh=True)
    batch = family.make_batch(model, ROWS)
    handle = trimtab.attach(model.train(), settings())
    kept = handle.chosen_tokens(batch)
    with watched_features(model) as features, handle.force_mode("fast"):
        model(**batch).loss.backward()
    assert handle.isolator is not None
    assert (handle.isolator.rows.grad.abs().sum(1) > 0).all(), "every row of the isolator learns"
    reached = torch.cat([one.grad.flatten(0, -2) for one in features]).abs().sum(1)
    start = 0
    for index, size in zip(kept, block_sizes(model, batch), strict=True):
        assert torch.equal(reached[start : start + size] > 0, membership(index, size)), (
            "gradients reach kept tokens and no other"
        )
        start += size
    assert start == len(reached)
    decoder = {id(p) for p in model.get_decoder().parameters()} | {
        id(p) for p in open_host(model).output_embeddings.parameters()
    }
    visual = [p for name, p in model.named_parameters() if id(p) not in decoder and "isolator" not in name]
    learns = any(p.grad is not None and p.grad.abs().sum() > 0 for p in visual)
    assert learns != bool(family.no_projector), f"the projector learns, or not: {family.no_projector}"
    handle.detach()
    if family.no_projector:
        words = {tuple(row) for row in model.get_input_embeddings().weight.tolist()}
        assert all(tuple(row) in words for one in features for row in one.flatten(0, -2).tolist())


def losses(family: TinyFamily) -> None:
    """A slow step's cross-entropy is the stock model's loss; rows without images and whole such batches train too."""
    model = model_of(family, fresh=True)
    for rows in (ROWS, (0, 0)):
        batch = family.make_batch(model, rows)
        expected = logits_of(model.train(), batch)  # some towers have batch norms
        handle = trimtab.attach(model.train(), settings(kl_weight=0.0))
        with handle.force_mode("slow"):
            loss = model(**batch).loss
        loss.backward()
        handle.detach()
        reference = torch.nn.functional.cross_entropy(
            expected[:, :-1].flatten(0, 1).float(), batch["labels"][:, 1:].flatten(), ignore_index=-100
        )
        close(loss.detach(), reference, TIGHT)


def trains(family: TinyFamily) -> None:
    """A Trainer takes a fast and a slow step; the checkpoint has the stock model's keys and loads without a miss."""
    from transformers import Trainer

    model = model_of(family, fresh=True).train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    rows = [family.make_batch(model, [1], seed=seed, text_lengths=[4]) for seed in range(2)]
    with tempfile.TemporaryDirectory() as folder:
        trainer = trimtab.with_dualspeed(Trainer)(
            model=model,
            args=training_arguments(Path(folder), max_steps=2, per_device_train_batch_size=1, optim="sgd"),
            train_dataset=rows,
            data_collator=lambda items: items[0],
            dualspeed=settings(slow_ratio=0.5, schedule="stratified"),
        )
        trainer.train()
        metrics = trainer.dualspeed.metrics()
        assert (metrics["steps_fast"], metrics["steps_slow"]) == (1, 1)
        assert metrics["kl"] > 0
        trainer.save_model(folder)
        assert any(not torch.equal(value, before[key]) for key, value in model.state_dict().items() if key in before)
        trainer.dualspeed.detach()
        assert model.state_dict().keys() == before.keys()
        loaded, info = type(model).from_pretrained(folder, output_loading_info=True)
        assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
        for key, value in loaded.state_dict().items():
            assert torch.equal(value, model.state_dict()[key]), key


def generates(family: TinyFamily) -> None:
    """generate() in evaluation mode gives the same with DualSpeed attached, and after it was detached, as before."""
    model = model_of(family, fresh=True)
    keys, hooks = list(model.state_dict()), len(model._forward_pre_hooks)
    batch = family.make_batch(model, [1], text_lengths=[3], turns=1)
    prompt = {name: value for name, value in batch.items() if name != "labels"}

    def answer() -> Tensor:
        with torch.no_grad():
            found: Tensor = model.eval().generate(**prompt, max_new_tokens=4, do_sample=False)
        return found

    expected = answer()
    handle = trimtab.attach(model, settings())
    assert torch.equal(answer(), expected)
    handle.detach()
    assert torch.equal(answer(), expected)
    assert (list(model.state_dict()), len(model._forward_pre_hooks)) == (keys, hooks)


def infers(family: TinyFamily) -> None:
    """generate() on pruned tokens, with a cache, gives what recomputing the pruned sequence for every token gives."""
    model = model_of(family, fresh=True)
    batch = family.make_batch(model, [1], text_lengths=[3], turns=1)
    prompt = {name: value for name, value in batch.items() if name != "labels"}
    never = list(open_host(model).image_token_ids)  # a random model would say them
    with trimtab.prune_for_inference(model, settings(isolator_tokens=0)) as pruned, torch.no_grad():
        made = model.generate(**prompt, max_new_tokens=4, do_sample=False, suppress_tokens=never)
        grown = dict(prompt)
        while grown["input_ids"].shape[1] < made.shape[1]:
            logits = logits_of(model, pruned.prune_inputs(grown))[:, -1]
            logits[:, never] = -torch.inf
            grown = longer(grown, logits.argmax(-1, keepdim=True))
    assert made.shape[1] > prompt["input_ids"].shape[1]
    assert torch.equal(made, grown["input_ids"])


def videos(family: TinyFamily) -> None:
    """Video tokens are pruned frame by frame, beside images and alone, and train."""
    model = model_of(family, fresh=True)
    if not family.mixed:
        both = family.make_batch(model, BESIDE_VIDEOS, videos_per_row=VIDEO_ROWS)
        with pytest.raises(ValueError, match=r"tokens|at the same time"):
            logits_of(model, both)  # why the family is declared so: the stock model refuses
        with pytest.raises(SettingError, match="one placeholder for images and videos"):
            read_rows(model, both, encode_images(model, both))
    for images in (NO_IMAGES, BESIDE_VIDEOS) if family.mixed else (NO_IMAGES,):
        batch = family.make_batch(model, images, videos_per_row=VIDEO_ROWS)
        encoded = encode_images(model, batch)
        assert encoded.counts["video"] >= 1
        moving = encoded.tiles[-encoded.counts["video"] :]
        apart = len(moving) > sum(VIDEO_ROWS)  # some encoders hand over every frame as a block of its own
        assert apart or all(len(frames) > 1 for frames in moving), "each frame is a tile"
        handle = trimtab.attach(model.train(), settings())
        with handle.force_mode("fast"):
            model(**batch).loss.backward()
        assert (handle.isolator.rows.grad.abs().sum(1) > 0).all()
        metrics = handle.metrics()
        assert metrics["visual_tokens_full"] == int(
            ((batch["input_ids"] == IMAGE) | (batch["input_ids"] == VIDEO)).sum()
        )
        assert metrics["visual_tokens_kept"] < metrics["visual_tokens_full"] / 2
        with handle.force_mode("slow"):
            model(**batch).loss.backward()
        assert handle.metrics()["kl"] > 0
        handle.detach()


def supported(family: TinyFamily) -> None:
    """check_model names the family as tested."""
    report = check_model(model_of(family))
    assert report.supported, report.reason
    assert report.tested, f"{family.name} is not in the table of families"
    host = open_host(model_of(family))
    assert host.family.name == report.model_class
    assert bool(host.family.recurrent) <= bool(family.not_masking)
    assert ("video" in [kind.name for kind in host.modalities]) == (family.videos is not None)


CHECKS: dict[str, Callable[[TinyFamily], None]] = {
    "supported": supported,
    "keep_all": keep_all,
    "drop_is_mask": drop_is_mask,
    "tokens_matter": tokens_matter,
    "rows_alone": rows_alone,
    "gradients": gradients,
    "losses": losses,
    "trains": trains,
    "generates": generates,
    "infers": infers,
    "videos": videos,
}
"""All checks; `videos` is for families that take some."""


def batches(family: TinyFamily, model: Any, side: str) -> list[Batch]:
    """Return the batches of the identities: images, and where the family takes videos images and videos together."""
    found = [family.make_batch(model, ROWS, padding_side=side)]
    if family.videos is not None:
        images = BESIDE_VIDEOS if family.mixed else NO_IMAGES
        found.append(family.make_batch(model, images, padding_side=side, videos_per_row=VIDEO_ROWS))
    return found


def settings(**changes: Any) -> DualSpeedConfig:
    """Return settings whose choice does not depend on the features, so that small tiles keep something."""
    return DualSpeedConfig(**{"keep_ratio": 0.25, "isolator_tokens": 2, "keep_rule": "ceil", "seed": 1, **changes})


def longer(batch: Batch, token: Tensor) -> Batch:
    """Return a batch with one more word in every row; what a processor adds per word is that of the last one."""
    shape = batch["input_ids"].shape
    grown = {
        name: torch.cat((value, value[:, -1:]), 1) if getattr(value, "shape", None) == shape else value
        for name, value in batch.items()
    }
    return {**grown, "input_ids": torch.cat((batch["input_ids"], token), 1)}


def membership(index: Tensor, size: int) -> Tensor:
    """Return which of `size` places are in `index`."""
    return torch.zeros(size, dtype=torch.bool).index_fill(0, index, True)


def block_sizes(model: Any, batch: Batch) -> list[int]:
    """Return how many visual tokens each block has."""
    with torch.no_grad():
        return [len(block) for block in encode_images(model, batch).blocks]


def close(found: Tensor, expected: Tensor, tolerance: float) -> None:
    """Compare absolutely."""
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=0)


def full_positions(family: TinyFamily, model: Any, batch: Batch) -> Tensor:
    """Return the positions that the stock model gives the full sequence."""
    if family.mrope:
        names = inspect.signature(model.model.get_rope_index).parameters
        renamed = {"second_per_grids": "video_second_per_grid"}
        index = {name: batch[key] for name in names if (key := renamed.get(name, name)) in batch}
        positions: Tensor = model.model.get_rope_index(**index)[0]
        return positions
    rows, places = batch["input_ids"].shape
    return torch.arange(places).expand(rows, -1)


def positions_of_row(family: TinyFamily, model: Any, batch: Batch, alone: Batch, row: int) -> Tensor:
    """Return the positions that a row has in its batch, and hold that the last row has others alone."""
    mine = full_positions(family, model, batch)[:, row : row + 1, batch["attention_mask"][row].bool()]
    differ = not torch.equal(mine, full_positions(family, model, alone))
    assert differ == (row == len(ROWS) - 1), f"declared to depend on other rows ({family.row_dependence})"
    return mine


def masked_logits(family: TinyFamily, model: Any, batch: Batch, mask: Tensor) -> Tensor:
    """Run the stock model on the full sequence with the dropped tokens masked from attention."""
    positions = full_positions(family, model, batch)
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    if family.mrope:
        inputs.pop("mm_token_type_ids", None)
    return logits_of(model, {**inputs, "attention_mask": mask.long(), "position_ids": positions})


def embedded_row(model: Any, inputs: Batch, row: int) -> Tensor:
    """Run one row of assembled inputs through the stock model as embeddings, so that no placeholder is involved."""
    real = inputs["attention_mask"][row].bool()
    embedded = caught_embeddings(model, inputs)[row : row + 1, real]
    positions = inputs["position_ids"]
    place = positions[:, row : row + 1, real] if positions.dim() == 3 else positions[row : row + 1, real]
    decoder = model.get_decoder()
    ids = inputs["input_ids"][row : row + 1, real]
    # Some decoders need the tokens too and search the table for every embedding, in vain for visual ones.
    with torch.no_grad(), mock.patch.object(decoder, "reverse_embedding", create=True, return_value=ids):
        # Without a mask transformers would take gaps in the positions for the borders of packed sequences.
        mask = torch.ones_like(embedded[..., 0], dtype=torch.long)
        logits: Tensor = model(inputs_embeds=embedded, attention_mask=mask, position_ids=place).logits
    return logits[0]


def caught_embeddings(model: Any, inputs: Batch) -> Tensor:
    """Return what the decoder receives for assembled inputs."""
    caught: list[Tensor] = []
    hook = model.get_decoder().register_forward_pre_hook(
        lambda module, args, kwargs: caught.append(kwargs["inputs_embeds"]), with_kwargs=True
    )
    logits_of(model, inputs)
    hook.remove()
    return caught[0]


@contextlib.contextmanager
def watched_features(model: Any) -> Iterator[list[Tensor]]:
    """While active, collect the image features of the model's own encoder, with their gradients."""
    base, found = model.base_model, []

    def encode(*args: Any, **kwargs: Any) -> Any:
        output = stock(*args, **kwargs)
        whole = open_host(model).features(output)
        found.extend([whole] if isinstance(whole, Tensor) else whole)
        for features in found:
            features.retain_grad()
        return output

    stock = base.get_image_features
    with mock.patch.object(base, "get_image_features", encode):
        yield found
