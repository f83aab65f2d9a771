"""Exact match asks every question, batched as alone, and leaves the model as it was."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from tests.tiny import EOS, FAMILIES, IMAGE, PAD, VOCAB, weights
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import CLIPImageProcessorPil, LlavaProcessor, PreTrainedTokenizerFast

from trimtab.errors import DataError, SettingError
from trimtab.evaluate import exact_match
from trimtab.evaluate.exact_match import plain_answer

SPECIAL = {PAD: "<pad>", 1: "<s>", EOS: "</s>", IMAGE: "<image>"}
TEMPLATE = (
    "{% for m in messages %}{{ '<s>' if m.role == 'user' else '' }}{% for p in m.content %}"
    "{{ '<image>' if p.type == 'image' else ' ' + p.text }}{% endfor %} {% endfor %}"
    "{% if add_generation_prompt %}w3{% endif %}"
)


@pytest.fixture
def processor() -> LlavaProcessor:
    words = {SPECIAL.get(number, f"w{number}"): number for number in range(VOCAB)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w4"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="w4",
        extra_special_tokens={"image_token": "<image>"}, padding_side="right",
    )  # fmt: skip
    size = {"height": 24, "width": 24}
    images = CLIPImageProcessorPil(size=size, do_center_crop=False)
    return LlavaProcessor(
        images, fast, patch_size=4, vision_feature_select_strategy="default", image_token="<image>",
        num_additional_image_tokens=1, chat_template=TEMPLATE,
    )  # fmt: skip


@pytest.fixture
def model():
    return FAMILIES["llava"].build_model().train()


def picture(seed: int) -> Image.Image:
    pixels = torch.randint(0, 256, (24, 24, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())


@pytest.fixture
def rows():
    asked = [["w5 w6", "w7", "w8 w9 w10 w11"], ["w12"], ["w13 w14", "w15"]]
    return [
        {"image": picture(n), "questions": q, "answers": ["?"] * len(q), "families": ["a", "b", "b"][: len(q)]}
        for n, q in enumerate(asked)
    ]


def alone(model, processor, rows) -> list[str]:
    """Generate every answer by itself, without padding, from pixels, with the model's own loop."""
    answers = []
    model.eval()
    for row in rows:
        for question in row["questions"]:
            inputs = processor(text=[f"<s><image> {question} w3"], images=[row["image"]], return_tensors="pt")
            ids = inputs["input_ids"]
            for _ in range(4):
                logits = model(input_ids=ids, pixel_values=inputs["pixel_values"]).logits[:, -1]
                ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], dim=1)
                if ids[0, -1] == EOS:
                    break
            new = ids[0, inputs["input_ids"].shape[1] :]
            answers.append(processor.tokenizer.decode(new, skip_special_tokens=True))
    model.train()
    return answers


@pytest.mark.parametrize("batch_size", [1, 2, 16])
def test_batched_answers_equal_those_alone(model, processor, rows, batch_size):
    with torch.no_grad():
        wanted = alone(model, processor, rows)
    assert len(set(wanted)) > 3
    result = exact_match(model, processor, rows, batch_size=batch_size, max_new_tokens=4, predictions=True)
    assert result["predictions"] == wanted


def test_a_shared_image_is_encoded_once(model, processor, rows, monkeypatch):
    seen = []
    tower = model.model.vision_tower
    monkeypatch.setattr(
        tower, "forward", lambda *a, _old=tower.forward, **k: (seen.append(len(a[0])), _old(*a, **k))[1]
    )
    exact_match(model, processor, rows, max_new_tokens=2)
    assert seen == [3]


def test_counts_marks_families_and_wrong_answers(model, processor, rows):
    predicted = exact_match(model, processor, rows, max_new_tokens=4, predictions=True)["predictions"]
    for row, right in zip(rows, ([True, False, True], [False], [True, True]), strict=True):
        told = [predicted.pop(0) for _ in right]
        row["answers"] = [f" {word.upper()}." if hit else "never" for word, hit in zip(told, right, strict=True)]
    steps = []
    result = exact_match(
        model, processor, rows, max_new_tokens=4, batch_size=4, wrong_examples=1, progress=lambda *s: steps.append(s)
    )
    assert (result["correct"], result["number"], result["marks"]) == (4, 6, "101011")
    assert result["accuracy"] == pytest.approx(4 / 6)
    assert result["interval"][0] < 4 / 6 < result["interval"][1]
    assert {name: share["correct"] for name, share in result["families"].items()} == {"a": 2, "b": 2}
    assert [(w["row"], w["question"], w["answer"]) for w in result["wrong"]] == [(0, "w7", "never")]
    assert steps == [(2, 3), (3, 3)]
    assert "predictions" not in result


def test_no_rows_is_an_error(model, processor):
    with pytest.raises(DataError, match="no rows came"):
        exact_match(model, processor, [])


def test_images_are_let_go_once_their_questions_are_answered(model, processor, rows):
    import gc
    import weakref

    alive = []
    most = 0

    class Lazy(Sequence):
        def __len__(self):
            return 12

        def __getitem__(self, index):
            if index >= len(self):
                raise IndexError(index)
            image = rows[index % 3]["image"].copy()
            alive.append(weakref.ref(image))
            return {"image": image, "questions": ["w1"], "answers": ["w2"]}

    def count(*_):
        nonlocal most
        gc.collect()
        most = max(most, sum(ref() is not None for ref in alive))

    result = exact_match(model, processor, Lazy(), batch_size=2, max_new_tokens=2, progress=count)
    assert result["number"] == 12
    assert most <= 4, "at most the batch just answered and the one being gathered"


def test_message_rows_and_text_only_rows(model, processor, rows):
    asked = [{"type": "image"}, {"type": "text", "text": rows[1]["questions"][0]}]
    messages = [{"role": "user", "content": asked}, {"role": "assistant", "content": "x"}]
    mixed = [
        {"image": None, "questions": ["w5"], "answers": ["x"]},
        {"messages": messages, "images": [rows[1]["image"]]},
        rows[1],
    ]
    result = exact_match(model, processor, mixed, max_new_tokens=4, predictions=True)
    assert result["number"] == 3
    assert result["predictions"][1] == result["predictions"][2]
    assert result["predictions"][0] != result["predictions"][1]


def test_prepare_swaps_the_inputs(model, processor, rows):
    def blind(batch):
        assert "pixel_values" in batch
        ids, mask = batch["input_ids"], batch["attention_mask"]
        kept = ids != IMAGE
        longest = int(kept.sum(1).max())
        short = torch.full((len(ids), longest), PAD)
        shown = torch.zeros_like(short)
        for row in range(len(ids)):
            words = ids[row][kept[row] & mask[row].bool()]
            short[row, longest - len(words) :], shown[row, longest - len(words) :] = words, 1
        return {"input_ids": short, "attention_mask": shown}

    blinded = exact_match(model, processor, rows, max_new_tokens=4, prepare=blind, predictions=True)["predictions"]
    unseen = [{**row, "image": None} for row in rows]
    assert blinded == exact_match(model, processor, unseen, max_new_tokens=4, predictions=True)["predictions"]
    assert blinded != exact_match(model, processor, rows, max_new_tokens=4, predictions=True)["predictions"]


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_as_before_also_after_an_error(model, processor, rows, fails):
    model.model.vision_tower.eval()
    model.generation_config.do_sample = True
    model.generation_config.temperature = 0.3
    before, config = weights(model), model.generation_config.to_dict()
    modes = [module.training for module in model.modules()]

    def broken(batch):
        raise RuntimeError("broken")

    if fails:
        with pytest.raises(RuntimeError, match="broken"):
            exact_match(model, processor, rows, prepare=broken)
    else:
        first, second = (exact_match(model, processor, rows, predictions=True)["predictions"] for _ in range(2))
        assert first == second
    assert [module.training for module in model.modules()] == modes
    assert processor.tokenizer.padding_side == "right"
    assert model.generation_config.to_dict() == config
    assert all(torch.equal(value, before[key]) for key, value in weights(model).items())
    assert torch.is_grad_enabled()


def test_bad_settings_and_bad_images_are_named(model, processor, rows):
    with pytest.raises(SettingError, match=r"exact_match\.batch_size must be at least 1, but 0 came"):
        exact_match(model, processor, rows, batch_size=0)
    with pytest.raises(SettingError, match="max_new_tokens"):
        exact_match(model, processor, rows, max_new_tokens=0)
    rows[1]["image"] = SimpleNamespace(not_an="image")
    with pytest.raises(DataError, match="processor cannot read rows 0 to 2"):
        exact_match(model, processor, rows)


def test_answers_are_compared_plainly():
    assert plain_answer("  Two  Dogs. ") == "two dogs"
    assert plain_answer("3.5") == "3.5"
