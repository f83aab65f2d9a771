"""Two changed lines turn a Trainer script into one that trains mostly on pruned visual tokens.

The model is small and random so that this runs on a CPU in seconds; put your own in its place.
"""

from __future__ import annotations

import sys

from transformers import Trainer, TrainingArguments

from trimtab import DualSpeedConfig, SupervisedCollator, with_dualspeed
from trimtab.data.scenes import conversation, make_scenes, vocabulary
from trimtab.quickstart.model import SmallLlava, build_model, build_processor


def main(output_dir: str, steps: int = 20) -> None:
    sizes = SmallLlava(tower_layers=2, tower_width=64, layers=2, width=64)
    processor = build_processor(sizes, vocabulary())
    model = build_model(sizes, processor.tokenizer)
    model.model.vision_tower.requires_grad_(False)
    rows = [conversation(scene) for scene in make_scenes("train", 64)]

    trainer = with_dualspeed(Trainer)(  # was: Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=output_dir,
            max_steps=steps,
            per_device_train_batch_size=8,
            learning_rate=2e-3,
            logging_steps=5,
            save_strategy="no",
            use_cpu=True,
            remove_unused_columns=False,
        ),
        train_dataset=rows,
        data_collator=SupervisedCollator(processor),
        processing_class=processor,
        dualspeed=DualSpeedConfig(keep_ratio=0.1, slow_ratio=0.1),  # new
    )
    trainer.train()
    trainer.save_model()
    print(f"Saved an ordinary checkpoint to {output_dir}; side files are in {output_dir}/dualspeed.")


if __name__ == "__main__":
    main(*sys.argv[1:2] or ["runs/trainer_two_lines"])
