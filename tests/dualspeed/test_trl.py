"""TRL's SFTTrainer with images, from chat messages, with and without LoRA."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.tiny import IMAGE, tiny_llava, tiny_processor, weights

import trimtab
from trimtab import DualSpeedConfig

trl = pytest.importorskip("trl")
Image = pytest.importorskip("PIL.Image")

pytestmark = [
    # TRL 1.16 itself sets the name that transformers 5.23 has deprecated.
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning"),
    # TRL supervises every token of a conversation that has no assistant mask, the placeholders among them.
    pytest.mark.filterwarnings("ignore:(?s).*placeholder.*:trimtab.errors.TrimtabWarning"),
]


def conversations(rows: int = 8) -> Any:
    from datasets import Dataset

    colours = [("red", (200, 20, 20)), ("blue", (20, 20, 200))]
    made = []
    for number in range(rows):
        word, colour = colours[number % 2]
        question = [{"type": "image"}, {"type": "text", "text": "what colour is this"}]
        answer = [{"type": "text", "text": f"it is {word}"}]
        made.append(
            {
                "images": [Image.new("RGB", (24, 24), (*colour[:2], colour[2] + number))],
                "messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}],
            }
        )
    return Dataset.from_list(made)


def sft(out: Path, **changes: Any) -> Any:
    arguments = trl.SFTConfig(
        output_dir=str(out), max_steps=6, per_device_train_batch_size=2, report_to="none", use_cpu=True, bf16=False,
        max_length=None, save_strategy="no", logging_steps=1, disable_tqdm=True, learning_rate=1e-3,
    )  # fmt: skip
    settings = DualSpeedConfig(keep_ratio=0.2, slow_ratio=0.5, schedule="bernoulli", seed=1)
    model = tiny_llava()
    # The last layer of the tower has no gradient, and the method keeps the tower frozen.
    model.model.vision_tower.requires_grad_(False)
    return trimtab.with_dualspeed(trl.SFTTrainer)(
        model=model, args=arguments, train_dataset=conversations(), processing_class=tiny_processor(),
        dualspeed=settings, **changes,
    )  # fmt: skip


def test_sft_trains_in_both_modes_and_saves_an_ordinary_checkpoint(tmp_path: Path) -> None:
    from transformers import LlavaForConditionalGeneration

    trainer = sft(tmp_path)
    start = weights(trainer.model)
    rows = trainer.dualspeed.isolator.rows.detach().clone()
    trainer.train()
    metrics = trainer.dualspeed.metrics()
    assert metrics["steps_fast"] + metrics["steps_slow"] == 6
    assert metrics["steps_fast"]
    assert metrics["steps_slow"]
    assert not torch.equal(trainer.dualspeed.isolator.rows, rows)
    assert any(not torch.equal(start[key], value) for key, value in weights(trainer.model).items())
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 6
    assert losses[-1] < losses[0], "six steps on two answers go down"

    trainer.save_model(str(tmp_path / "final"))
    _, info = LlavaForConditionalGeneration.from_pretrained(tmp_path / "final", output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert (tmp_path / "final" / "dualspeed" / "isolator.safetensors").is_file()


def test_sft_with_lora_trains_adapter_and_isolator(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    trainer = sft(tmp_path, peft_config=peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    rows = trainer.dualspeed.isolator.rows.detach().clone()
    assert trainer.dualspeed.isolator.rows.requires_grad
    frozen = {n: p.detach().clone() for n, p in trainer.model.named_parameters() if not p.requires_grad}
    assert any("lm_head" in name for name in frozen)
    trainer.train()
    metrics = trainer.dualspeed.metrics()
    assert metrics["steps_slow"], "the adapter sits in the language model, so slow steps are taken"
    assert not torch.equal(trainer.dualspeed.isolator.rows, rows)
    for name, value in trainer.model.named_parameters():
        if name in frozen:
            assert torch.equal(value, frozen[name]), name
    trainer.save_model(str(tmp_path / "final"))
    saved = load_file(tmp_path / "final" / "adapter_model.safetensors")
    assert saved
    assert all("lora" in key for key in saved), "the adapter file holds the adapter only"
    assert (tmp_path / "final" / "dualspeed" / "isolator.safetensors").is_file()


def test_the_conversations_hold_one_image_each() -> None:
    """The other tests would show nothing if the processor left the placeholders out."""
    processor = tiny_processor()
    row = conversations(1)[0]
    text = processor.apply_chat_template(row["messages"], tokenize=False)
    ids = processor(text=[text], images=row["images"], return_tensors="pt")["input_ids"]
    assert int((ids == IMAGE).sum()) == 36
