"""Find the layer at which visual tokens may leave, keep it, and answer without them behind it.

On the command line this is `trimtab vtw search train.jsonl --model MODEL --to vtw.json`, then `trimtab vtw generate`.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import torch

from trimtab.data import SupervisedCollator
from trimtab.data.scenes import conversation, make_scenes, vocabulary
from trimtab.methods.vtw import SearchReport, search_withdrawal_layer, withdraw
from trimtab.quickstart.model import SmallLlava, build_model, build_processor


def main(folder: str, samples: int = 8) -> SearchReport:
    sizes = SmallLlava(tower_layers=2, tower_width=64, layers=6, width=64)
    processor = build_processor(sizes, vocabulary())
    model = build_model(sizes, processor.tokenizer).eval()  # random weights; take a trained model
    rows = [conversation(scene) for scene in make_scenes("train", samples)]
    collate = SupervisedCollator(processor)

    batches = [collate([row]) for row in rows]
    report = search_withdrawal_layer(model, batches, threshold=0.03, task="scenes")  # in nats; 0.003 in the paper
    for point in report.curve:
        print(f"layer {point.layer}: {point.mean:.1e} nats, {point.kv_saving:.0%} of the cache saved")
    file = Path(folder) / "vtw.json"
    report.save(file)

    question = rows[0]["messages"][0]
    text = processor.apply_chat_template([question], add_generation_prompt=True, tokenize=False)
    prompt = processor(text=text, images=rows[0]["images"], return_tensors="pt")
    with withdraw(model, settings=file) as handle:
        made = model.generate(**prompt, max_new_tokens=8, do_sample=False)
    before, behind = handle.counts
    answer = processor.tokenizer.decode(made[0, before:], skip_special_tokens=True)
    print(f"Layer {report.layer} of {report.depth}: {before} places before it, {behind} behind. Answer: {answer!r}")
    return report


if __name__ == "__main__":
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as place:
        main(sys.argv[1] if sys.argv[1:] else place)
