"""DualSpeed: fine-tune a multimodal LLM mostly on pruned visual tokens and lose nothing on full images.

Paper: Fast-Slow Efficient Training for Multimodal Large Language Models via Visual Token Pruning (arXiv 2602.03815)
Gets smaller: visual tokens per training step, and with them the time of fine-tuning
Goes in: a vision-language model of transformers and a data set of images with questions and answers
Comes out: an ordinary checkpoint of that model, to be used with full images
Cost: one short run instead of a long one; about one step in ten sees all tokens and a teacher pass besides
Entry: `with_dualspeed(Trainer)`, `attach(model, DualSpeedConfig())`, `trimtab train`
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from trimtab.dualspeed.attach import DualSpeedHandle, attach, detach
from trimtab.dualspeed.config import DualSpeedConfig
from trimtab.dualspeed.inference import PrunedInference, prune_for_inference
from trimtab.dualspeed.loader import BucketSampler, NumberedRows, PackSampler, collate_numbered
from trimtab.dualspeed.packs import SampleLength, bucket_batches, plan_packs
from trimtab.dualspeed.sample_lengths import load_lengths, measure_lengths, save_lengths
from trimtab.dualspeed.samples import Samples
from trimtab.dualspeed.schedule import Mode, mode_of_sample, mode_of_step
from trimtab.dualspeed.trainer import with_dualspeed

if TYPE_CHECKING:
    from trimtab.dualspeed.callback import DualSpeedCallback

__all__ = [
    "BucketSampler", "DualSpeedCallback", "DualSpeedConfig", "DualSpeedHandle", "Mode", "NumberedRows", "PackSampler",
    "PrunedInference", "SampleLength", "Samples", "attach", "bucket_batches", "collate_numbered", "detach",
    "load_lengths", "measure_lengths", "mode_of_sample", "mode_of_step", "plan_packs", "prune_for_inference",
    "save_lengths", "with_dualspeed",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    """Load the callback on first use: its base class brings the whole Trainer of transformers with it."""
    if name != "DualSpeedCallback":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from trimtab.dualspeed.callback import DualSpeedCallback

    return DualSpeedCallback
