"""A small LLaVA from scratch: the stock transformers classes, few and narrow layers, a tokenizer of whole words.

Nothing here is special to trimtab: model and processor are written by `save_pretrained` and read back by
`LlavaForConditionalGeneration.from_pretrained` and `AutoProcessor.from_pretrained`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from trimtab.errors import DataError, setting_error

if TYPE_CHECKING:
    import torch
    from transformers import LlavaForConditionalGeneration, LlavaProcessor, PreTrainedTokenizerFast

PAD, UNKNOWN, START, END, USER, ASSISTANT, IMAGE = "<pad>", "<unk>", "<s>", "</s>", "<user>", "<assistant>", "<image>"
SPECIAL_TOKENS = (PAD, UNKNOWN, START, END, USER, ASSISTANT, IMAGE)
MARKS = "?,.!"
NEIGHBOURS = ((0, 1), (1, 0), (0, -1), (-1, 0))  # rows and columns from a patch to the one beside it

CHAT_TEMPLATE = (
    "{{ '<s>' }}"
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}"
    "{{ ' <assistant> ' }}"
    "{% generation %}"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}{{ part['text'] }}{% endfor %}{% endif %}"
    "{{ ' </s>' }}"
    "{% endgeneration %}"
    "{% else %}"
    "{{ ' <user> ' }}"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ '<image> ' }}{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}"
    "{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ ' <assistant>' }}{% endif %}"
)
"""Chat template of the small model; the answer and the closing token are what training supervises."""


@dataclass(frozen=True, kw_only=True)
class SmallLlava:
    """Sizes of a small LLaVA.

    Attributes:
        image_size: Width and height that images are resized to, in pixels; a multiple of `patch_size`.
        patch_size: Width and height of one patch, in pixels. There are ``(image_size / patch_size)**2`` visual tokens.
        tower_layers: Layers of the vision tower.
        tower_width: Width of the vision tower, a multiple of `tower_heads`.
        tower_heads: Attention heads of the vision tower.
        layers: Layers of the language model.
        width: Width of the language model, a multiple of twice `heads`.
        heads: Attention heads of the language model.
        mlp_ratio: Width of the hidden layer of every MLP, as a multiple of the width around it.
        image_mean: Value of a pixel channel (0..1) that becomes 0; best that of the images' ground.
        image_std: Distance in a pixel channel that becomes 1.
        tower_locality: How sharply the first attention of the tower looks at the neighbours of a patch; 0 for the
            stock initialisation.
        init_scale: Standard deviation of the first weights of language model and projector. Small models want wider
            ones than the 0.02 of large models.
    """

    image_size: int = 128
    patch_size: int = 8
    tower_layers: int = 4
    tower_width: int = 128
    tower_heads: int = 4
    layers: int = 4
    width: int = 160
    heads: int = 4
    mlp_ratio: float = 2.0
    image_mean: float = 0.88
    image_std: float = 0.25
    tower_locality: float = 3.0
    init_scale: float = 0.05

    def __post_init__(self) -> None:
        """Check every field; see the class for the ranges."""
        for name in ("image_size", "patch_size", "tower_layers", "tower_heads", "layers", "heads"):
            if getattr(self, name) < 1:
                raise setting_error("SmallLlava", name, "at least 1", getattr(self, name))
        if self.image_size % self.patch_size:
            allowed = f"a multiple of patch_size={self.patch_size}"
            raise setting_error("SmallLlava", "image_size", allowed, self.image_size)
        if self.tower_width < 1 or self.tower_width % self.tower_heads:
            allowed = f"a multiple of tower_heads={self.tower_heads}"
            raise setting_error("SmallLlava", "tower_width", allowed, self.tower_width)
        if self.width < 1 or self.width % (2 * self.heads):
            raise setting_error("SmallLlava", "width", f"a multiple of twice heads={self.heads}", self.width)
        for name in ("mlp_ratio", "init_scale"):
            if not getattr(self, name) > 0:
                raise setting_error("SmallLlava", name, "above 0", getattr(self, name))

    @property
    def visual_tokens(self) -> int:
        """Visual tokens of one image."""
        return (self.image_size // self.patch_size) ** 2


def split_words(text: str) -> list[str]:
    """Split a text as the tokenizer does: lower case, at white space, every mark of ``?,.!`` on its own."""
    return re.findall(rf"[^\s{re.escape(MARKS)}]+|[{re.escape(MARKS)}]", text.lower())


def collect_words(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """Return the words of all questions and answers of the rows, sorted.

    Args:
        rows: Rows with ``questions`` and ``answers``; images are not looked at.
    """
    texts = (text for row in rows for key in ("questions", "answers") for text in row[key])
    return sorted({word for text in texts for word in split_words(text)})


def build_tokenizer(words: Iterable[str]) -> PreTrainedTokenizerFast:
    """Make a tokenizer that knows whole words only.

    Args:
        words: The vocabulary, as `split_words` gives them; what else comes becomes ``<unk>``.

    Returns:
        A tokenizer that pads on the right, with the special tokens of `SPECIAL_TOKENS` and the chat template.

    Raises:
        DataError: There is no word, or one that `split_words` would take apart or lower.
    """
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = [*SPECIAL_TOKENS, *sorted(set(words) - set(SPECIAL_TOKENS))]
    broken = next((word for word in vocabulary[len(SPECIAL_TOKENS) :] if split_words(word) != [word]), None)
    if broken is not None or len(vocabulary) == len(SPECIAL_TOKENS):
        came = "none came" if broken is None else f"{broken!r} came"
        raise DataError(f"build_tokenizer: words must be at least one, in lower case, without spaces or marks; {came}.")
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(vocabulary)}, unk_token=UNKNOWN))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.WhitespaceSplit(),
            pre_tokenizers.Split(Regex(f"[{re.escape(MARKS)}]"), behavior="isolated"),
        ]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        unk_token=UNKNOWN,
        bos_token=START,
        eos_token=END,
        additional_special_tokens=[USER, ASSISTANT, IMAGE],
        padding_side="right",
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def build_processor(sizes: SmallLlava, words: Iterable[str]) -> LlavaProcessor:
    """Make the processor of a small LLaVA.

    Args:
        sizes: Sizes of the model; images are resized to `image_size`.
        words: The vocabulary, see `build_tokenizer`.

    Returns:
        A stock `LlavaProcessor` that expands every image to ``sizes.visual_tokens`` placeholders.
    """
    from transformers import CLIPImageProcessorPil, LlavaProcessor

    side = {"height": sizes.image_size, "width": sizes.image_size}
    images = CLIPImageProcessorPil(
        size=side, crop_size=side, image_mean=[sizes.image_mean] * 3, image_std=[sizes.image_std] * 3
    )
    return LlavaProcessor(
        image_processor=images,
        tokenizer=build_tokenizer(words),
        patch_size=sizes.patch_size,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,  # the class token, which "default" takes out again
        image_token=IMAGE,
        chat_template=CHAT_TEMPLATE,
    )


def build_model(sizes: SmallLlava, tokenizer: PreTrainedTokenizerFast, seed: int = 0) -> LlavaForConditionalGeneration:
    """Make a small LLaVA with first weights drawn from a seed.

    Args:
        sizes: Sizes of the model.
        tokenizer: Tokenizer of `build_tokenizer`; gives the size of the vocabulary and the special tokens.
        seed: Seed of the weights. The global random state of torch stays as it was.

    Returns:
        The model in float32 on CPU, in training mode. The language model sees the last layer of the vision tower
        without its class token.
    """
    import torch
    from transformers import LlavaForConditionalGeneration

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlavaForConditionalGeneration(_config(sizes, tokenizer))
        waves = _place_patches(model.model.vision_tower.embeddings.position_embedding.weight)
        for layer in model.model.vision_tower.encoder.layers:
            _look_at_neighbours(layer.self_attn, waves, sizes.tower_locality)
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.bos_token_id = tokenizer.bos_token_id
    model.train()
    return model


def _config(sizes: SmallLlava, tokenizer: PreTrainedTokenizerFast) -> Any:
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig

    special = {
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    vision = CLIPVisionConfig(
        hidden_size=sizes.tower_width,
        intermediate_size=round(sizes.tower_width * sizes.mlp_ratio),
        num_hidden_layers=sizes.tower_layers,
        num_attention_heads=sizes.tower_heads,
        image_size=sizes.image_size,
        patch_size=sizes.patch_size,
        projection_dim=sizes.tower_width,
    )
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=sizes.width,
        intermediate_size=round(sizes.width * sizes.mlp_ratio),
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.heads,
        num_key_value_heads=sizes.heads,
        max_position_embeddings=2048,
        initializer_range=sizes.init_scale,
        tie_word_embeddings=True,
        **special,
    )
    whole: dict[str, Any] = {  # a dict, since the class does not declare every name that it takes
        "image_token_id": tokenizer.convert_tokens_to_ids(IMAGE),
        "image_seq_length": sizes.visual_tokens,
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "default",
        "tie_word_embeddings": True,
        "initializer_range": sizes.init_scale,
        **special,
    }
    return LlavaConfig(vision_config=vision, text_config=text, **whole)


def _place_patches(weight: torch.Tensor) -> torch.Tensor:
    """Start the position embeddings of the patches as sines and cosines of row and column (the class token at 0).

    Args:
        weight: Position embeddings, [1 + token, channel]; the channels hold, in quarters, sine and cosine of the row
            and sine and cosine of the column.

    Returns:
        The angular frequencies of one quarter, per patch.
    """
    import torch

    places, width = weight.shape
    side = round((places - 1) ** 0.5)
    quarter = width // 4
    waves = torch.exp(-torch.arange(quarter) / max(1, quarter) * math.log(4.0 * side))
    rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    angles = [place.reshape(-1, 1) * waves for place in (rows, columns)]
    with torch.no_grad():
        weight.zero_()
        weight[1:, : 4 * quarter] = 0.5 * torch.cat(
            [wave(angle) for angle in angles for wave in (torch.sin, torch.cos)], 1
        )
    return waves


def _look_at_neighbours(attention: Any, waves: torch.Tensor, sharpness: float) -> None:
    """Add to query and key maps what makes each head look at one neighbour of a patch (right, below, left, above).

    A head's score for a patch at offset p is then the sum of ``sharpness**2 cos(wave * (p - neighbour))`` over some
    of the waves, as the angle-addition formulas give it from the sines and cosines of `_place_patches`. Attention that
    starts local spares the tower most of the long time in which attention from noise learns nothing.
    """
    import torch

    quarter, size = len(waves), attention.head_dim
    used = torch.linspace(0, 0.6 * quarter, max(1, size // 4)).long().clamp(max=quarter - 1)[: size // 4]
    count, place = len(used), torch.arange(len(used))
    for head in range(attention.num_heads):
        query, key = torch.zeros(size, 4 * quarter), torch.zeros(size, 4 * quarter)
        for axis, offset in enumerate(NEIGHBOURS[head % len(NEIGHBOURS)]):
            sine, cosine = 2 * axis * quarter + used, (2 * axis + 1) * quarter + used
            first, second, turn = 2 * axis * count + place, (2 * axis + 1) * count + place, waves[used] * offset
            query[first, sine], query[first, cosine] = turn.cos(), turn.sin()
            query[second, cosine], query[second, sine] = turn.cos(), -turn.sin()
            key[first, sine] = key[second, cosine] = 1.0
        rows = slice(head * size, (head + 1) * size)
        with torch.no_grad():
            attention.q_proj.weight[rows, : 4 * quarter] += sharpness * query
            attention.k_proj.weight[rows, : 4 * quarter] += sharpness * key
