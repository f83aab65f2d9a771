"""Processors small enough to read: word tokens, 8x8 images, with and without the generation mark."""

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.idefics3.processing_idefics3 import Idefics3Processor
from transformers.models.llava.processing_llava import LlavaProcessor

TEXT = "user assistant system : what is this that cat dog yes no a the two three answer be brief . ?"
WORDS = [*TEXT.split(), "\n"]
VICUNA = (
    "{% for m in messages %}{% if m['role'] == 'user' %}USER: {% elif m['role'] == 'assistant' %}ASSISTANT: {% endif %}"
    "{% for p in m['content'] %}{% if p['type'] == 'image' %}<image>\n{% else %}{{ p['text'] }}{% endif %}{% endfor %}"
    "{{ '</s>' if m['role'] == 'assistant' else ' ' }}{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
SPECIALS = ["<pad>", "<unk>", "<s>", "</s>", "<image>", "<end>"]

PLAIN = (
    "{% for m in messages %}{{ m['role'] }} : "
    "{% for p in m['content'] %}{% if p['type'] == 'image' %}<image>{% else %}{{ p['text'] }}{% endif %}{% endfor %}"
    "<end>\n{% endfor %}{% if add_generation_prompt %}assistant :{% endif %}"
)
MARKED = (
    "{% for m in messages %}{{ m['role'] }} : {% if m['role'] == 'assistant' %}{% generation %}"
    "{{ m['content'][0]['text'] }}<end>{% endgeneration %}{% else %}"
    "{% for p in m['content'] %}{% if p['type'] == 'image' %}<image>{% else %}{{ p['text'] }}{% endif %}{% endfor %}"
    "<end>{% endif %}\n{% endfor %}{% if add_generation_prompt %}assistant : {% endif %}"
)


def tiny_tokenizer(side="right", extra=()):
    names = [*SPECIALS, *WORDS, *extra]
    words = Tokenizer(models.WordLevel({name: place for place, name in enumerate(names)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split("\n", "isolated"), pre_tokenizers.Split(" ", "removed")]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token="<pad>",
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=["<image>", "<end>"],
        padding_side=side,
    )


def tiny_llava(template=PLAIN, side="right"):
    images = CLIPImageProcessorPil(size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8})
    return LlavaProcessor(
        images, tiny_tokenizer(side), patch_size=4, vision_feature_select_strategy="full", chat_template=template
    )


def tiny_bpe_llava(template, side="right"):
    """A byte-level tokenizer that puts <s> in front, as LLaMA's does; blanks belong to the word after them."""
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=SPECIALS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    raw.train_from_iterator([TEXT] * 4, trainer)
    raw.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", SPECIALS.index("<s>"))])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw,
        pad_token="<pad>",
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=["<image>"],
        padding_side=side,
    )
    images = CLIPImageProcessorPil(size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8})
    return LlavaProcessor(
        images, tokenizer, patch_size=4, vision_feature_select_strategy="full", chat_template=template
    )


def tiny_idefics3(template=PLAIN, side="right"):
    rows = [f"<row_{r + 1}_col_{c + 1}>" for r in range(6) for c in range(6)]
    images = Idefics3ImageProcessorPil(size={"longest_edge": 32}, max_image_size={"longest_edge": 16})
    tokenizer = tiny_tokenizer(side, extra=[*rows, "<global-img>"])
    tokenizer.add_tokens([*rows, "<global-img>"])
    return Idefics3Processor(images, tokenizer, image_seq_len=4, chat_template=template)
