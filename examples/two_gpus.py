"""Training on several GPUs: the same script as for one, started by accelerate.

    accelerate launch --config_file examples/accelerate/ddp.yaml examples/two_gpus.py

Without GPUs the two processes share the CPU:

    ACCELERATE_USE_CPU=true torchrun --nproc_per_node 2 examples/two_gpus.py
"""

from __future__ import annotations

import os
import sys

from transformers import Trainer, TrainingArguments

from trimtab import DualSpeedConfig, SupervisedCollator, with_dualspeed
from trimtab.data.scenes import conversation, make_scenes, vocabulary
from trimtab.quickstart.model import SmallLlava, build_model, build_processor


def main(output_dir: str = "runs/two_gpus", steps: int = 20) -> None:
    sizes = SmallLlava(tower_layers=2, tower_width=64, layers=2, width=64)
    processor = build_processor(sizes, vocabulary())
    model = build_model(sizes, processor.tokenizer)
    model.model.vision_tower.requires_grad_(False)
    rows = [conversation(scene) for scene in make_scenes("train", 64)]

    trainer = with_dualspeed(Trainer)(
        model=model,
        args=TrainingArguments(
            output_dir=output_dir,
            max_steps=steps,
            per_device_train_batch_size=4,  # of each process
            learning_rate=2e-3,
            logging_steps=5,
            save_strategy="no",
            use_cpu=os.environ.get("ACCELERATE_USE_CPU") == "true",
            remove_unused_columns=False,
        ),
        train_dataset=rows,
        data_collator=SupervisedCollator(processor),
        processing_class=processor,
        dualspeed=DualSpeedConfig(keep_ratio=0.1, slow_ratio=0.1, seed=0),
    )
    trainer.train()
    trainer.save_model()
    count = trainer.accelerator.num_processes
    trainer.accelerator.print(f"Saved an ordinary checkpoint to {output_dir}, trained by {count} processes.")


if __name__ == "__main__":
    main(*sys.argv[1:2])
