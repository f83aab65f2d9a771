"""DualSpeed: fine-tune a multimodal LLM mostly on pruned visual tokens and lose nothing on full images.

Paper: Fast-Slow Efficient Training for Multimodal Large Language Models via Visual Token Pruning (arXiv 2602.03815)
Gets smaller: visual tokens per training step, and with them the time of fine-tuning
Goes in: a vision-language model of transformers and a data set of images with questions and answers
Comes out: an ordinary checkpoint of that model, to be used with full images
Cost: one short run instead of a long one; about one step in ten sees all tokens and a teacher pass besides
Entry: `with_dualspeed(Trainer)`, `attach(model, DualSpeedConfig())`, `trimtab train`
"""

from trimtab.dualspeed.attach import DualSpeedHandle, attach
from trimtab.dualspeed.config import DualSpeedConfig
from trimtab.dualspeed.schedule import Mode, mode_of_step
from trimtab.dualspeed.trainer import with_dualspeed

__all__ = ["DualSpeedConfig", "DualSpeedHandle", "Mode", "attach", "mode_of_step", "with_dualspeed"]
