"""TRL's SFTTrainer with images, from chat messages, with and without LoRA."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.dualspeed.common import SUM_ORDER
from tests.tiny import IMAGE, gradients, tiny_llava, tiny_processor, weights

import trimtab
from trimtab import DualSpeedConfig
from trimtab.errors import SettingError

trl = pytest.importorskip("trl")
Image = pytest.importorskip("PIL.Image")

pytestmark = [
    # TRL 1.16 itself sets the name that transformers 5.23 has deprecated.
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning"),
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


def frozen_tower_llava() -> Any:
    model = tiny_llava()
    # The last layer of the tower has no gradient, and the method keeps the tower frozen.
    model.model.vision_tower.requires_grad_(False)
    return model


def sft(out: Path, settings: Any = "usual", kind: Any = None, arguments: Any = None, **changes: Any) -> Any:
    """Return an SFTTrainer with DualSpeed; `kind` is another class, which is taken as it is."""
    options = {
        "output_dir": str(out), "max_steps": 6, "per_device_train_batch_size": 2, "report_to": "none", "use_cpu": True,
        "bf16": False, "max_length": None, "save_strategy": "no", "logging_steps": 1, "disable_tqdm": True,
        "learning_rate": 1e-3, **(arguments or {}),
    }  # fmt: skip
    if settings == "usual":
        settings = DualSpeedConfig(keep_ratio=0.2, slow_ratio=0.5, schedule="bernoulli", seed=1)
    if kind is None:
        kind, changes = trimtab.with_dualspeed(trl.SFTTrainer), {"dualspeed": settings, **changes}
    return kind(
        model=frozen_tower_llava(), args=trl.SFTConfig(**options), train_dataset=conversations(),
        processing_class=tiny_processor(), **changes,
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


class Recorder(trl.SFTTrainer):
    """An SFTTrainer that keeps what goes into its steps."""

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Any:
        seen = {name: value.clone() for name, value in inputs.items() if isinstance(value, torch.Tensor)}
        self.seen = [*getattr(self, "seen", []), (seen, num_items_in_batch)]
        return super().training_step(model, inputs, num_items_in_batch)


PLAIN_STEPS = {"max_steps": 2, "optim": "sgd", "learning_rate": 0.05, "max_grad_norm": 0.0, "lr_scheduler_type":
               "constant", "gradient_accumulation_steps": 2}  # fmt: skip


@pytest.mark.parametrize("slow_ratio", [0.5, 1.0])
def test_sft_takes_the_very_steps_of_the_plain_loop(tmp_path: Path, slow_ratio: float) -> None:
    """TRL computes its loss from log probabilities; with DualSpeed the one of the hooks counts, KL included."""
    settings = DualSpeedConfig(keep_ratio=0.2, slow_ratio=slow_ratio, schedule="bernoulli", seed=1)
    trainer = sft(tmp_path, kind=trimtab.with_dualspeed(Recorder), arguments=PLAIN_STEPS, dualspeed=settings)
    trainer.train()
    assert trainer.dualspeed.metrics()["steps_slow"]

    model = frozen_tower_llava()
    handle = trimtab.attach(model, settings, accumulation_steps=2)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
    for number, (batch, items) in enumerate(trainer.seen):
        model(**batch, num_items_in_batch=items).loss.backward()
        if number % 2:
            optimizer.step()
            optimizer.zero_grad()
    assert len(trainer.seen) == 4
    for key, value in weights(model).items():
        assert torch.equal(weights(trainer.model)[key], value), key
    assert handle.state_dict() == trainer.dualspeed.state_dict()


def test_the_kl_is_part_of_the_loss_and_of_the_gradients(tmp_path: Path) -> None:
    """Three weights of the KL on one batch: loss and gradients are linear in it, and the slope is the KL."""
    found = {}
    for weight in (0.0, 1.0, 3.0):
        settings = DualSpeedConfig(keep_ratio=0.2, slow_ratio=1.0, kl_weight=weight)
        trainer = sft(tmp_path, settings)
        trainer.model.train()
        batch = next(iter(trainer.get_train_dataloader()))
        labels = int((batch["labels"][:, 1:] != -100).sum())
        loss = trainer.compute_loss(trainer.model, batch, num_items_in_batch=torch.tensor(2 * labels))
        loss.backward()
        found[weight] = (loss.detach(), gradients(trainer.model), trainer.dualspeed.metrics()["kl"])
    kl = found[1.0][2]
    assert kl > 0.01
    # Half of the mean per label, since the count said that the update has twice as many.
    torch.testing.assert_close(found[1.0][0] - found[0.0][0], torch.tensor(kl / 2), **SUM_ORDER)
    torch.testing.assert_close(found[3.0][0] - found[0.0][0], torch.tensor(3 * kl / 2), **SUM_ORDER)
    for name, without in found[0.0][1].items():
        one, three = found[1.0][1][name] - without, found[3.0][1][name] - without
        torch.testing.assert_close(three, 3 * one, **SUM_ORDER)
    head = "lm_head.weight"
    assert (found[1.0][1][head] - found[0.0][1][head]).abs().max() > 1e-3, "the KL pulls at the head"


@pytest.mark.parametrize(
    "off",
    [None, DualSpeedConfig(keep_ratio=1.0, slow_ratio=0.0, isolator_tokens=0)],
    ids=["no settings", "all settings off"],
)
def test_without_the_method_the_numbers_are_those_of_sft(tmp_path: Path, off: Any) -> None:
    plain, ours = sft(tmp_path / "plain", kind=trl.SFTTrainer), sft(tmp_path / "ours", off)
    for trainer in (plain, ours):
        trainer.train()
    losses = [[entry["loss"] for entry in one.state.log_history if "loss" in entry] for one in (plain, ours)]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 6
    assert weights(ours.model).keys() == weights(plain.model).keys()
    for key, value in weights(plain.model).items():
        assert torch.equal(weights(ours.model)[key], value), key


def test_the_conversations_hold_one_image_each() -> None:
    """The other tests would show nothing if the processor left the placeholders out."""
    processor = tiny_processor()
    row = conversations(1)[0]
    text = processor.apply_chat_template(row["messages"], tokenize=False)
    ids = processor(text=[text], images=row["images"], return_tensors="pt")["input_ids"]
    assert int((ids == IMAGE).sum()) == 36


def test_a_loss_of_trls_own_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(SettingError, match=r"loss_type='dft' has no place .* Set it to 'nll'"):
        sft(tmp_path, arguments={"loss_type": "dft"})
    assert sft(tmp_path, arguments={"loss_type": "nll"}).dualspeed is not None
    assert sft(tmp_path, settings=None, arguments={"loss_type": "dft"}).dualspeed is None
