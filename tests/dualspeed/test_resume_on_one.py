"""A run that two processes saved goes on in one, after DDP and after FSDP2, and its checkpoint is an ordinary one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.dualspeed.common import training_arguments
from tests.dualspeed.ranks import on_ranks
from tests.tiny import TinyRows, collate, tiny_llava

import trimtab
from trimtab import DualSpeedConfig

pytestmark = pytest.mark.slow

STEPS, SAVED_AT = 6, 4
SETTINGS: dict[str, Any] = {"keep_ratio": 0.2, "slow_ratio": 0.5, "seed": 2}


def train(wrap: str, out: Path, start: Path, resume: str | None = None, **changes: Any) -> dict[str, Any]:
    from transformers import LlavaForConditionalGeneration, Trainer

    class Recorder(Trainer):
        def create_accelerator_and_postprocess(self) -> None:
            super().create_accelerator_and_postprocess()
            if wrap == "fsdp2":
                use_fsdp2(self)

        def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
            loss = super().training_step(*args, **kwargs)
            modes.append((self.state.global_step, self.dualspeed.metrics()["mode"]))
            return loss

    modes: list[tuple[int, str]] = []
    arguments = {"max_steps": STEPS, "save_strategy": "steps", "save_steps": SAVED_AT, **changes}
    trainer = trimtab.with_dualspeed(Recorder)(
        model=LlavaForConditionalGeneration.from_pretrained(start), args=training_arguments(out, **arguments),
        train_dataset=TinyRows(), data_collator=collate, dualspeed=DualSpeedConfig(**SETTINGS),
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=resume)
    found = {name: whole(one) for name, one in trainer.model.state_dict().items()}
    return {"weights": found, "modes": modes, "micro_step": trainer.dualspeed.micro_step}


def use_fsdp2(trainer: Any) -> None:
    """Switch FSDP2 on as `examples/accelerate/fsdp2.yaml` does; accelerate itself would not do it on a CPU."""
    import accelerate.utils.fsdp_utils as fsdp
    from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

    state = trainer.accelerator.state
    state.fsdp_plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap", state_dict_type="FULL_STATE_DICT",
        transformer_cls_names_to_wrap=["LlamaDecoderLayer", "CLIPEncoderLayer"], reshard_after_forward=True,
        cpu_ram_efficient_loading=True,
    )  # fmt: skip
    state.distributed_type = DistributedType.FSDP
    trainer.is_fsdp_enabled = True
    gather, gather_for_resume = trainer.accelerator.get_state_dict, fsdp._get_model_state_dict
    trainer.accelerator.get_state_dict = lambda *args: {name: whole(one) for name, one in gather(*args).items()}
    fsdp._get_model_state_dict = lambda *args, **options: {
        name: whole(one) for name, one in gather_for_resume(*args, **options).items()
    }


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """What is gathered on the CPU may still be on its way; a copy waits for it."""
    full = getattr(tensor, "full_tensor", None)
    return (tensor if full is None else full()).detach().clone()


@pytest.mark.parametrize("wrap", ["ddp", "fsdp2"])
def test_saved_on_two_and_resumed_on_one(tmp_path: Path, wrap: str) -> None:
    start, out = tmp_path / "start", tmp_path / "two"
    tiny_llava().save_pretrained(start)
    ranks = on_ranks(tmp_path / "ranks", train_on_rank, wrap, out, start, group=False)
    for rank in ranks:
        assert "trace" not in rank, rank["trace"]
    checkpoint = out / f"checkpoint-{SAVED_AT}"
    assert load_file(checkpoint / "model.safetensors").keys() == load_file(start / "model.safetensors").keys()
    assert load_file(checkpoint / "dualspeed" / "isolator.safetensors")["rows"].shape == (4, 32)
    assert json.loads((checkpoint / "dualspeed" / "dualspeed.json").read_text())["micro_step"] == SAVED_AT

    # One process, two micro-batches per update in place of the two ranks. It goes on with their weights, moments,
    # schedule and isolator, so it ends where they ended, but for float32 sums in another order over two updates.
    alone = train(wrap="none", out=tmp_path / "one", start=start, resume=str(checkpoint), gradient_accumulation_steps=2)
    assert [mode for _, mode in alone["modes"][::2]] == [mode for _, mode in ranks[0]["modes"][SAVED_AT:]]
    assert alone["modes"][0][0] == SAVED_AT
    assert "dualspeed_isolator.rows" in alone["weights"]
    for name, value in ranks[0]["weights"].items():
        torch.testing.assert_close(alone["weights"][name], value, atol=2e-5, rtol=1e-4)
        assert torch.equal(value, ranks[1]["weights"][name])


def train_on_rank(wrap: str, out: Path, start: Path) -> dict[str, Any]:
    return train(wrap, out, start, ddp_backend="gloo")
