"""The collator: what is supervised, what is never, and where rows may be cut."""

import pickle

import pytest
import torch
from PIL import Image
from tests.data.tiny_processors import MARKED, PLAIN, VICUNA, tiny_bpe_llava, tiny_idefics3, tiny_llava

from trimtab.data.collate import MaskPlaceholders, SupervisedCollator, cut_right, placeholder_ids
from trimtab.errors import DataError, SettingError

IMAGE = Image.new("RGB", (20, 12), "red")
NO_PROMPT = PLAIN.split("{% if add_generation_prompt")[0]
BARE_END = PLAIN.replace("<end>\n", "\n")


def _row(pairs, images=0, system=None, **extra):
    turns = [{"role": "system", "content": system}] if system else []
    for question, answer in pairs:
        turns += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"messages": turns, "images": [IMAGE] * images, **extra}


ROWS = [
    _row([("<image>\nwhat is this ?", "a cat .")], 1),
    _row([("what is two ?", "yes")], system="be brief"),
    _row([("<image> what is this ?", "a cat ."), ("<image> <image> that ?", "a cat .")], 3),
]


def _answers(collator, batch):
    decode = collator.processor.tokenizer.decode
    return [decode(row[row != collator.ignore_index]) for row in batch["labels"]]


@pytest.mark.parametrize("make", [tiny_llava, tiny_idefics3])
@pytest.mark.parametrize("template", [PLAIN, MARKED, NO_PROMPT])
@pytest.mark.parametrize("side", ["left", "right"])
def test_answers_and_their_end_of_turn_are_supervised(make, template, side):
    collator = SupervisedCollator(make(template, side))
    batch = collator(ROWS)
    assert _answers(collator, batch) == ["a cat . <end>", "yes <end>", "a cat . <end> a cat . <end>"]
    kept = batch["labels"] != -100
    assert torch.equal(batch["labels"][kept], batch["input_ids"][kept])
    assert bool(batch["attention_mask"][kept].all())
    if side == "right":
        ends = (batch["input_ids"] == collator.processor.tokenizer.convert_tokens_to_ids("<end>")).sum(1)
        assert ends.tolist() == [2, 3, 4]


@pytest.mark.parametrize("template", [PLAIN, MARKED])
def test_supervised_answer_stands_where_the_answer_is(template):
    collator = SupervisedCollator(tiny_llava(template))
    batch = collator([_row([("a cat . <image>", "a cat ."), ("a cat .", "no")], 1)])
    tokens = collator.processor.tokenizer.convert_ids_to_tokens(batch["input_ids"][0])
    answer = tokens.index("assistant") + 2
    assert (batch["labels"][0] != -100).nonzero().flatten()[:4].tolist() == list(range(answer, answer + 4))


@pytest.mark.parametrize("template", [PLAIN, MARKED])
def test_train_on_last_takes_the_last_answer_only(template):
    collator = SupervisedCollator(tiny_llava(template), train_on="last")
    batch = collator(ROWS)
    assert _answers(collator, batch) == ["a cat . <end>", "yes <end>", "a cat . <end>"]
    first_kept = int((batch["labels"][2] != -100).nonzero()[0])
    last_image = int((batch["input_ids"][2] == collator.image_token_ids[0]).nonzero()[-1])
    assert first_kept > last_image


@pytest.mark.parametrize("make", [tiny_llava, tiny_idefics3])
def test_train_on_all_leaves_out_only_placeholders_and_padding(make):
    collator = SupervisedCollator(make(), train_on="all")
    batch = collator(ROWS)
    holder = batch["input_ids"] == collator.image_token_ids[0]
    assert torch.equal(batch["labels"] != -100, batch["attention_mask"].bool() & ~holder)


@pytest.mark.parametrize("template", [VICUNA, "<s>" + VICUNA])
@pytest.mark.parametrize("side", ["left", "right"])
def test_byte_level_tokens_and_a_begin_token(template, side):
    collator = SupervisedCollator(tiny_bpe_llava(template, side))
    batch = collator(ROWS)
    assert _answers(collator, batch) == [" a cat .</s>", " yes</s>", " a cat .</s> a cat .</s>"]
    begins = (batch["input_ids"] == collator.processor.tokenizer.bos_token_id).sum(1)
    assert begins.tolist() == [1, 1, 1]


def test_answer_that_occurs_in_the_header_is_found_at_its_own_place():
    collator = SupervisedCollator(tiny_llava(NO_PROMPT.replace("assistant", "a")))
    batch = collator([_row([("a a a", "a")])])
    assert _answers(collator, batch) == ["a <end>"]
    template = NO_PROMPT.replace("{{ m['role'] }} :", "{{ m['role'] }} : yes")
    collator = SupervisedCollator(tiny_llava(template))
    tokens = collator([_row([("yes", "yes")])])
    assert (tokens["labels"][0] != -100).nonzero().flatten().tolist()[0] == tokens["labels"].shape[1] - 3


def test_template_without_end_of_turn_supervises_the_answer_alone():
    collator = SupervisedCollator(tiny_llava(BARE_END))
    assert _answers(collator, collator(ROWS[:1])) == ["a cat ."]


def test_template_that_rewrites_answers_is_an_error():
    collator = SupervisedCollator(tiny_llava(PLAIN.replace("p['text']", "p['text'] | upper")))
    with pytest.raises(DataError, match=r"Row 7, turn 1: .*\{% generation %\}"):
        collator([_row([("what", "a cat .")], row=7)])


def test_every_image_is_processed_once(monkeypatch):
    collator = SupervisedCollator(tiny_llava())
    seen = []
    real = type(collator.processor.image_processor).preprocess

    def counting(self, images, *args, **kwargs):
        seen.append(sum(len(row) if isinstance(row, list) else 1 for row in images))
        return real(self, images, *args, **kwargs)

    monkeypatch.setattr(type(collator.processor.image_processor), "preprocess", counting)
    batch = collator(ROWS)
    assert seen == [4]
    assert batch["pixel_values"].shape[0] == 4


def test_text_only_batch_has_no_pixels():
    batch = SupervisedCollator(tiny_llava())([ROWS[1]])
    assert "pixel_values" not in batch


@pytest.mark.parametrize("side", ["left", "right"])
def test_max_length_cuts_text_after_the_last_image(side):
    rows = [_row([("<image> what is this ?", "a cat . a cat .")], 1), _row([("what", "yes")])]
    whole = SupervisedCollator(tiny_llava(side=side))(rows)
    length = int(whole["attention_mask"][0].sum())
    cut = SupervisedCollator(tiny_llava(side=side), max_length=length - 4)(rows)
    assert cut["input_ids"].shape == (2, length - 4)
    for place in range(2):
        full = whole["input_ids"][place][whole["attention_mask"][place].bool()]
        rest = cut["input_ids"][place][cut["attention_mask"][place].bool()]
        assert torch.equal(rest, full[: length - 4])
    assert (cut["labels"][0] != -100).sum() == (whole["labels"][0] != -100).sum() - 3
    padded = cut["attention_mask"][1] == 0
    assert bool(padded[0] if side == "left" else padded[-1])
    assert torch.equal(cut["pixel_values"], whole["pixel_values"])


def test_max_length_never_cuts_inside_an_image():
    with pytest.raises(DataError, match=r"Row 5 has 21 tokens, 4 of them for images.*max_length=5.*at least 6"):
        SupervisedCollator(tiny_llava(), max_length=5)([_row([("<image> what is this ? what ?", "a cat .")], 1, row=5)])


def test_row_without_supervised_tokens_is_an_error_or_counted():
    rows = [_row([("what is this ?", "a cat .")]), _row([("what", "yes")])]
    with pytest.raises(DataError, match="Row 0 of the batch has no supervised token left"):
        SupervisedCollator(tiny_llava(), max_length=9)(rows)
    collator = SupervisedCollator(tiny_llava(), max_length=9, empty_labels="count")
    batch = collator(rows)
    assert collator.unsupervised_rows == 1
    assert (batch["labels"] != -100).any(1).tolist() == [False, True]


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"train_on": "answers"}, "train_on must be one of assistant, last, all, but 'answers' came"),
        ({"max_length": 0}, "max_length must be"),
        ({"empty_labels": "skip"}, "empty_labels must be"),
    ],
)
def test_wrong_settings_name_what_is_allowed(setting, message):
    with pytest.raises(SettingError, match=message):
        SupervisedCollator(tiny_llava(), **setting)


def test_absent_template_and_empty_batch_are_named():
    with pytest.raises(DataError, match="has no chat template"):
        SupervisedCollator(tiny_llava(template=None))
    with pytest.raises(DataError, match="got no rows"):
        SupervisedCollator(tiny_llava())([])


def test_row_error_names_the_row():
    with pytest.raises(DataError, match=r"Row 3: the turns mark 1 image"):
        SupervisedCollator(tiny_llava())([_row([("<image> what", "yes")], 2, row=3)])
    with pytest.raises(DataError, match=r"Row 1 of the batch: .*absent\.png is missing"):
        SupervisedCollator(tiny_llava())([ROWS[1], {**_row([("<image>", "yes")]), "images": ["absent.png"]}])


def test_collator_survives_pickling():
    collator = pickle.loads(pickle.dumps(SupervisedCollator(tiny_llava())))
    assert _answers(collator, collator(ROWS[:1])) == ["a cat . <end>"]


def test_placeholder_ids_come_from_the_processor():
    processor = tiny_llava()
    assert placeholder_ids(processor) == (processor.tokenizer.convert_tokens_to_ids("<image>"),)
    processor.image_token_id = processor.image_token = None
    with pytest.raises(SettingError, match="Give image_token_ids"):
        placeholder_ids(processor)


def test_cut_right_carries_every_sequence_shaped_tensor():
    mask = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]])
    batch = {
        "input_ids": torch.tensor([[0, 5, 6, 7], [1, 2, 3, 4]]),
        "attention_mask": mask,
        "token_type_ids": mask * 3,
        "pixel_values": torch.ones(2, 4, 1),
    }
    cut = cut_right(batch, 2, {"input_ids": 9})
    assert cut["input_ids"].tolist() == [[5, 6], [1, 2]]
    assert cut["token_type_ids"].tolist() == [[3, 3], [3, 3]]
    assert cut["pixel_values"].shape == (2, 4, 1)


def test_mask_placeholders_cleans_any_collators_labels():
    def leaky(rows):
        ids = torch.tensor(rows)
        return {"input_ids": ids, "labels": ids.masked_fill(ids == 5, -100)}

    collator = MaskPlaceholders(leaky, [4, 5])
    batch = collator([[1, 4, 4], [4, 2, 3]])
    assert batch["labels"].tolist() == [[1, -100, -100], [-100, 2, 3]]
    assert collator.masked == 3
    collator([[4, 5, 1]])
    assert collator.masked == 4
    assert pickle.loads(pickle.dumps(MaskPlaceholders(max, [4]))).image_token_ids == (4,)
    with pytest.raises(SettingError, match="at least one token id"):
        MaskPlaceholders(leaky, [])
