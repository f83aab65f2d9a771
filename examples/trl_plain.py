"""Fine-tune a vision-language model with TRL. `trl_two_lines.py` is this script with DualSpeed.

Without arguments it makes a small random model and eight pictures to run on; name your own checkpoint and JSON lines.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import PIL.Image
import transformers
from datasets import Image, List, load_dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from trl import SFTConfig, SFTTrainer


def main(model: str, data_file: str, output_dir: str, steps: int = 20) -> None:
    data = load_dataset("json", data_files=data_file, split="train").cast_column("images", List(Image()))
    args = SFTConfig(
        output_dir=output_dir, max_steps=steps, per_device_train_batch_size=4, learning_rate=2e-3, logging_steps=5,
        max_length=None, save_strategy="no", report_to="none", use_cpu=True, bf16=False,
    )  # fmt: skip
    trainer = SFTTrainer(model=model, args=args, train_dataset=data)
    trainer.train()
    trainer.save_model()
    print(f"Saved an ordinary checkpoint to {output_dir}.")


def make_small(folder: Path) -> tuple[str, str]:
    """Write a LLaVA with random weights, its processor, and rows of pictures with questions and answers."""
    words = ["<pad>", "<s>", "</s>", "<unk>", "<image>", "USER", "ASSISTANT", "which", "colour", "red", "blue"]
    table = Tokenizer(models.WordLevel({word: place for place, word in enumerate(words)}, unk_token="<unk>"))
    table.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    extra = {"image_token": "<image>"}
    template = "{% for m in messages %}{{ m.role | upper + ' ' }}{% for part in m.content %}"
    template += "{{ ('<image>' if part.type == 'image' else part.text) + ' ' }}{% endfor %}{% endfor %}</s>"
    transformers.LlavaProcessor(
        transformers.CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}),
        transformers.PreTrainedTokenizerFast(tokenizer_object=table, extra_special_tokens=extra, **special),
        patch_size=4, vision_feature_select_strategy="default", num_additional_image_tokens=1, chat_template=template,
    ).save_pretrained(folder / "model")  # fmt: skip
    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision = transformers.CLIPVisionConfig(image_size=32, patch_size=4, projection_dim=32, **size)
    text = transformers.LlamaConfig(vocab_size=len(words), pad_token_id=0, **size)
    config = transformers.LlavaConfig(vision_config=vision, text_config=text, image_token_index=4)
    transformers.LlavaForConditionalGeneration(config).save_pretrained(folder / "model")
    with (folder / "rows.jsonl").open("w") as rows:
        for number, word in enumerate(["red", "blue"] * 4):
            PIL.Image.new("RGB", (32, 32), word).save(picture := folder / f"{number}.png")
            turns = [{"role": "user", "content": "which colour"}, {"role": "assistant", "content": word}]
            rows.write(json.dumps({"messages": turns, "images": [str(picture.resolve())]}) + "\n")
    return str(folder / "model"), str(folder / "rows.jsonl")


if __name__ == "__main__":
    main(*(sys.argv[1:] or make_small(Path("runs/trl_start"))), output_dir="runs/trl")
