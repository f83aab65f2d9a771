"""Adapters over a base in 4 or 8 bits (QLoRA). Needs bitsandbytes, which has a CPU backend."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.dualspeed.common import ROWS, training_arguments
from tests.tiny import FAMILIES, WIDTH, TinyRows, collate, tiny_llava
from torch import nn
from transformers import LlavaForConditionalGeneration, Trainer

import trimtab
from trimtab import DualSpeedConfig

peft = pytest.importorskip("peft")
SETTINGS = {"keep_ratio": 0.2, "slow_ratio": 0.5, "schedule": "bernoulli", "seed": 3}

# peft 0.21 asks for a name that transformers 5.23 has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")

PRECISIONS: dict[str, dict[str, Any]] = {
    "4 bits": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.float32},
    "4 bits, bf16": {"load_in_4bit": True, "bnb_4bit_use_double_quant": True,
                     "bnb_4bit_compute_dtype": torch.bfloat16},
    "8 bits": {"load_in_8bit": True},
}  # fmt: skip


@pytest.fixture(params=PRECISIONS)
def quantized(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    """The tiny LLaVA, loaded with packed weights, under a LoRA adapter."""
    pytest.importorskip("bitsandbytes", reason="needs bitsandbytes to pack the weights")
    from transformers import BitsAndBytesConfig

    settings = PRECISIONS[request.param]
    tiny_llava().save_pretrained(tmp_path / "base")
    base = LlavaForConditionalGeneration.from_pretrained(
        tmp_path / "base", quantization_config=BitsAndBytesConfig(**settings), device_map={"": "cpu"},
        dtype=settings.get("bnb_4bit_compute_dtype", torch.float32),
    )  # fmt: skip
    packed = {str(p.dtype) for p in base.model.language_model.parameters()}
    assert packed & {"torch.uint8", "torch.int8"}, "nothing is packed, so this would show nothing"
    return peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=r".*language_model.*\.(q_proj|v_proj)"))


def test_a_packed_base_trains_adapter_and_isolator(quantized: Any) -> None:
    handle = trimtab.attach(quantized.train(), DualSpeedConfig(**SETTINGS))
    rows = handle.isolator.rows
    compute = quantized.get_input_embeddings().weight.dtype
    assert rows.dtype == compute
    assert rows.dtype.is_floating_point
    batch = FAMILIES["llava"].make_batch(None, ROWS)
    for mode in ("fast", "slow"):
        quantized.zero_grad()
        with handle.force_mode(mode):
            loss = quantized(**batch).loss
            loss.backward()
        assert loss.isfinite()
        lora = {name: p for name, p in quantized.named_parameters() if "lora_B" in name}
        assert lora
        assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.any() for p in lora.values())
        assert bool(rows.grad.any()) == (mode == "fast"), "the student of a slow step does not see the isolator"
    assert handle.metrics()["kl"] > 0
    start = rows.detach().clone()
    optimizer = torch.optim.SGD([p for p in quantized.parameters() if p.requires_grad], lr=0.1)
    with handle.force_mode("fast"):
        quantized(**batch).loss.backward()
    optimizer.step()
    assert not torch.equal(rows, start)


def test_a_trainer_saves_the_adapter_of_a_packed_base_only(quantized: Any, tmp_path: Path) -> None:
    trainer = trimtab.with_dualspeed(Trainer)(
        model=quantized, args=training_arguments(tmp_path / "out", max_steps=4), train_dataset=TinyRows(),
        data_collator=collate, dualspeed=SETTINGS,
    )  # fmt: skip
    trainer.train()
    trainer.save_model(str(tmp_path / "final"))
    assert all("lora" in key for key in load_file(tmp_path / "final" / "adapter_model.safetensors"))
    assert load_file(tmp_path / "final" / "dualspeed" / "isolator.safetensors")["rows"].shape == (4, WIDTH)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 4
    assert all(0 < loss < 20 for loss in losses)


class PackedEmbedding(nn.Module):
    """Embeddings that keep their weight in 8 bits, as bitsandbytes and others do, and give float32."""

    def __init__(self, stock: nn.Embedding) -> None:
        super().__init__()
        self.scale = float(stock.weight.detach().abs().max() / 127)
        packed = (stock.weight.detach() / self.scale).round().to(torch.int8)
        self.weight = nn.Parameter(packed, requires_grad=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.weight[ids].float() * self.scale


def test_the_isolator_has_the_type_of_the_computation_not_of_packed_embeddings() -> None:
    model = tiny_llava()
    model.set_input_embeddings(PackedEmbedding(model.get_input_embeddings()))
    handle = trimtab.attach(model, DualSpeedConfig(**SETTINGS))
    assert handle.isolator.rows.dtype == torch.float32
    with handle.force_mode("fast"):
        model(**FAMILIES["llava"].make_batch(None, ROWS)).loss.backward()
    assert handle.isolator.rows.grad.any()
