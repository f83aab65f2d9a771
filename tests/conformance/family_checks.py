"""What every supported model family must hold; each check raises AssertionError where it does not.

Reference of the first checks: the stock model on the full sequence. Logits of the tiny models are of order one to
four, so two orders of summation of the same float32 numbers differ by a few 1e-6; 2e-5 leaves a margin, and
`tokens_matter` holds that another choice of tokens moves the logits by more than a hundred times that.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tests.conformance.family_tools import (
    BESIDE_VIDEOS,
    NO_IMAGES,
    ROWS,
    SIDES,
    TIGHT,
    VIDEO_ROWS,
    batches,
    block_sizes,
    close,
    embedded_row,
    frames_of,
    is_floating,
    keep_some,
    logits_of,
    longer,
    masked_logits,
    membership,
    model_of,
    positions_of_row,
    settings,
    survivors,
    watched_features,
)
from tests.conformance.packed_check import packed
from tests.dualspeed.common import training_arguments
from tests.tiny import IMAGE, VIDEO, TinyFamily
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

import trimtab
from trimtab.anatomy import assemble, check_model, encode_images, full_inputs, open_host, read_rows
from trimtab.errors import SettingError


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
            assert inputs["input_ids"].shape[1] == int(mask.sum(1).max()), "no column is padding in every row"
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


def half(family: TinyFamily) -> None:
    """In bfloat16 it trains on the pixels that the stock forward takes, float32 where that does."""
    model = model_of(family, fresh=True).bfloat16().eval()
    for name, parameter in model.named_parameters():  # as from_pretrained loads them
        if any(part in name for part in model._keep_in_fp32_modules_strict or ()):
            parameter.data = parameter.data.float()
    batch = family.make_batch(model, [1])
    try:
        expected = logits_of(model, batch)
    except RuntimeError:  # this forward leaves the type of the pixels to the user
        batch = {name: value.bfloat16() if is_floating(value) else value for name, value in batch.items()}
        expected = logits_of(model, batch)
    handle = trimtab.attach(model, settings(kl_weight=0.0))
    loss = {}
    for mode in ("fast", "slow"):
        with handle.force_mode(mode):
            loss[mode] = model.train()(**batch).loss
    loss["fast"].backward()
    handle.detach()
    assert loss["fast"].isfinite()
    if not any(isinstance(module, _BatchNorm) for module in model.modules()):  # these differ in training mode
        reference = torch.nn.functional.cross_entropy(
            expected[:, :-1].flatten(0, 1).float(), batch["labels"][:, 1:].flatten(), ignore_index=-100
        )
        # Eight bits of scores of order four are a few hundredths; the mean over the labels is closer.
        close(loss["slow"].detach(), reference, 3e-2)


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
        frames = frames_of(family, model, batch)
        apart = len(moving) > sum(VIDEO_ROWS)  # some encoders hand over every frame as a block of its own
        assert moving == ([[size] for video in frames for size in video] if apart else frames), "each frame is a tile"
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


def head(family: TinyFamily) -> None:
    """The loss scales the head's scores as the stock forward does, whatever the text configuration names."""
    config = copy.deepcopy(model_of(family).config)
    text = config.get_text_config()
    for name, value in (("logits_scaling", 1.5), ("logit_scale", 0.5), ("final_logit_softcapping", 1.0)):
        setattr(text, name, value)
    model = type(model_of(family))(config).eval()
    model.load_state_dict(model_of(family).state_dict())
    batch = family.make_batch(model, NO_IMAGES)
    host = open_host(model)
    with torch.no_grad():
        states = host.last_states({name: batch[name] for name in ("input_ids", "attention_mask")})
        # Words without a score have the smallest number there, or one that may still be divided by a temperature.
        close(host.head(states).clamp_min(-1e9), logits_of(model, batch).clamp_min(-1e9), TIGHT)


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
    "packed": packed,
    "head": head,
    "trains": trains,
    "half": half,
    "generates": generates,
    "infers": infers,
    "videos": videos,
}
"""All checks; `videos` is for families that take some."""
