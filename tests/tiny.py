"""Tiny models with random weights, and batches for them, built without processors.

Every family of `FAMILIES` makes a model of two layers and width 32 from its configuration and expands the image
placeholders itself, so that no tokenizer, no hub and no torchvision is needed. Weights are drawn wide enough that
logits are of order one and depend visibly on the images: with the stock scale of 0.02 a wrong image would hide
below the tolerances of the tests.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

PAD, BOS, EOS = 0, 1, 2
FIRST_WORD, LAST_WORD = 3, 50
TILE_START, TILE_END = 55, 56
VIDEO_START, VIDEO_END = 57, 58
VIDEO, IMAGE = 59, 60
VOCAB = 64
WIDTH = 32

Batch = dict[str, Any]
Runs = list[list[list[int]]]
"""Placeholders as ``runs[row][image][tile]``: how many stand side by side."""


@dataclass(frozen=True)
class TinyFamily:
    """One model family at toy size.

    Attributes:
        name: Key in `FAMILIES`.
        build: Seed -> configured model with the stock initialisation.
        images: Model, images per row, generator -> the visual inputs and the placeholder runs they need.
        visual_of_row: Batch, images per row, row -> the visual inputs of that row alone.
        mrope: Whether positions have three coordinates.
        fence: Whether runs are fenced by `TILE_START` and `TILE_END`.
        videos: As `images`, for videos; None where the family takes none.
        videos_of_row: As `visual_of_row`, for videos.
        types: Token ids -> what the family's processor adds for every token; by default ``mm_token_type_ids`` where
            positions have three coordinates.
        not_masking: Why dropping tokens is not the same as masking them, or "".
        video_token: Placeholder of videos.
        video_fence: Whether a whole video is fenced by `VIDEO_START` and `VIDEO_END`.
        mixed: Whether the stock model takes images and videos in one batch.
        row_dependence: Why the stock model gives a row other positions in a batch than alone, or "".
        no_projector: Why nothing between pixels and features can learn, or "".
    """

    name: str
    build: Callable[[], Any]
    images: Callable[[Any, Sequence[int], torch.Generator], tuple[Batch, Runs]]
    visual_of_row: Callable[[Batch, Sequence[int], int], Batch]
    mrope: bool = False
    fence: bool = False
    videos: Callable[[Any, Sequence[int], torch.Generator], tuple[Batch, Runs]] | None = None
    videos_of_row: Callable[[Batch, Sequence[int], int], Batch] | None = None
    types: Callable[[Tensor], Batch] | None = None
    not_masking: str = ""
    video_token: int = VIDEO
    video_fence: bool = False
    mixed: bool = True
    row_dependence: str = ""
    no_projector: str = ""

    def build_model(self, seed: int = 0) -> Any:
        """Return the model in float32, in eval mode, with wide random weights that depend on `seed` only."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = self.build()
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                fan_in = math.prod(parameter.shape[1:]) if parameter.dim() > 1 else 0
                if fan_in:
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) / math.sqrt(fan_in))
        return model.eval()

    def make_batch(
        self,
        model: Any,
        images_per_row: Sequence[int] = (1, 0, 2),
        text_lengths: Sequence[int] | None = None,
        padding_side: str = "right",
        seed: int = 0,
        turns: int = 2,
        videos_per_row: Sequence[int] | None = None,
    ) -> Batch:
        """Return inputs and labels of one batch.

        A row is a beginning, its images with a word after each, then `turns` questions with supervised answers
        of different lengths. Rows have different lengths, so that there is padding.

        Args:
            model: A model of this family.
            images_per_row: Images of each row; 0 makes a text-only row.
            text_lengths: Words of the questions of each row; different ones by default.
            padding_side: ``"left"`` or ``"right"``.
            seed: Seed of pixels and words.
            turns: Questions with answers per row.
            videos_per_row: Videos of each row, behind its images; none by default.
        """
        generator = torch.Generator().manual_seed(seed)
        visual, runs = self.images(model, images_per_row, generator) if sum(images_per_row) else ({}, None)
        videos: Runs | None = None
        if videos_per_row is not None and sum(videos_per_row):
            assert self.videos is not None
            moving, videos = self.videos(model, videos_per_row, generator)
            visual = {**visual, **moving}
        lengths = text_lengths or [3 + 2 * (row % 3) for row in range(len(images_per_row))]
        rows = [
            self._row(runs[row] if runs else [], length, turns, generator, videos[row] if videos else [])
            for row, length in enumerate(lengths)
        ]
        return {**pad_rows(rows, padding_side), **visual, **self._types(rows, padding_side, visual)}

    def take_row(
        self, batch: Batch, images_per_row: Sequence[int], row: int, videos_per_row: Sequence[int] | None = None
    ) -> Batch:
        """Return one row of a batch of `make_batch` as a batch of its own, without padding."""
        real = batch["attention_mask"][row].bool()
        shaped = [name for name in batch if name in ("input_ids", "attention_mask", "labels") or "type_ids" in name]
        alone = {name: batch[name][row : row + 1, real] for name in shaped}
        moving = videos_per_row is not None and videos_per_row[row] > 0
        if images_per_row[row]:
            alone |= self.visual_of_row(batch, images_per_row, row)
        if moving:
            assert self.videos_of_row is not None
            assert videos_per_row is not None
            alone |= self.videos_of_row(batch, videos_per_row, row)
        if not (images_per_row[row] or moving):
            alone.pop("mm_token_type_ids", None)
        return alone

    def _row(
        self,
        runs: list[list[int]],
        words: int,
        turns: int,
        generator: torch.Generator,
        videos: Sequence[list[int]] = (),
    ) -> tuple[Tensor, Tensor]:
        def text(count: int) -> list[int]:
            return torch.randint(FIRST_WORD, LAST_WORD + 1, (count,), generator=generator).tolist()

        ids, labels = [BOS, *text(2)], [-100] * 3
        kinds = [*((IMAGE, image, False) for image in runs)]
        kinds += [*((self.video_token, video, self.video_fence) for video in videos)]
        for token, visual, fenced in kinds:
            ids += [VIDEO_START] * fenced
            for run in visual:
                ids += [TILE_START] * self.fence + [token] * run + [TILE_END] * self.fence
            ids += [VIDEO_END] * fenced + text(1)
        labels += [-100] * (len(ids) - len(labels))
        for turn in range(turns):
            question, answer = text(words), [*text(1 + turn + words // 3), EOS]
            ids += question + answer
            labels += [-100] * len(question) + answer
        return torch.tensor(ids), torch.tensor(labels)

    def _types(self, rows: list[tuple[Tensor, Tensor]], padding_side: str, visual: Batch) -> Batch:
        ids = pad_rows(rows, padding_side)["input_ids"]
        if self.types is not None:
            return self.types(ids)
        return {"mm_token_type_ids": multimodal_types(ids)} if self.mrope and visual else {}


def multimodal_types(ids: Tensor) -> Tensor:
    """Return what the processors of transformers call ``mm_token_type_ids``: 1 for images, 2 for videos."""
    return (ids == IMAGE).int() + 2 * (ids == VIDEO).int()


def pad_rows(rows: Sequence[tuple[Tensor, Tensor]], padding_side: str = "right") -> Batch:
    """Stack rows of ids and labels with padding."""
    longest = max(len(ids) for ids, _ in rows)
    shape = (len(rows), longest)
    ids, labels = torch.full(shape, PAD), torch.full(shape, -100)
    mask = torch.zeros(shape, dtype=torch.long)
    for row, (row_ids, row_labels) in enumerate(rows):
        span = slice(longest - len(row_ids), None) if padding_side == "left" else slice(len(row_ids))
        ids[row, span], labels[row, span], mask[row, span] = row_ids, row_labels, 1
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def llama_settings(**changes: Any) -> dict[str, Any]:
    """Return the settings of the tiny language model that most families share."""
    return {
        "model_type": "llama", "vocab_size": VOCAB, "hidden_size": WIDTH, "intermediate_size": 48,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512,
        "attention_dropout": 0.0, "pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS, **changes,
    }  # fmt: skip


def clip_settings(image_size: int, patch_size: int = 4) -> dict[str, Any]:
    """Return the settings of a tiny CLIP tower."""
    return {
        "model_type": "clip_vision_model", "hidden_size": 24, "intermediate_size": 32, "projection_dim": 24,
        "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": image_size, "patch_size": patch_size,
        "attention_dropout": 0.0,
    }  # fmt: skip


def pixels(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """Return random pixels, none of them exactly zero."""
    return torch.randn(tuple(shape), generator=generator)


def _llava() -> Any:
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**clip_settings(24)), text_config=LlamaConfig(**llama_settings()),
        image_token_index=IMAGE, vision_feature_layer=-2, vision_feature_select_strategy="default",
    )  # fmt: skip
    return LlavaForConditionalGeneration(config)


def _llava_images(model: Any, images_per_row: Sequence[int], generator: torch.Generator) -> tuple[Batch, Runs]:
    runs = [[[36]] * count for count in images_per_row]
    return {"pixel_values": pixels((sum(images_per_row), 3, 24, 24), generator)}, runs


IMAGE_ENTRIES = ("pixel_values", "image_sizes", "image_position_ids", "spatial_shapes", "pixel_attention_mask")
"""Visual inputs that have one entry per image."""


def images_of_row(batch: Batch, images_per_row: Sequence[int], row: int) -> Batch:
    """Return the images of one row, where all images have one entry each."""
    first = sum(images_per_row[:row])
    span = slice(first, first + images_per_row[row])
    return {name: batch[name][span] for name in IMAGE_ENTRIES if name in batch}


def _llava_next() -> Any:
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaNextConfig, LlavaNextForConditionalGeneration

    config = LlavaNextConfig(
        vision_config=CLIPVisionConfig(**clip_settings(16)), text_config=LlamaConfig(**llama_settings()),
        image_token_index=IMAGE, vision_feature_layer=-2, vision_feature_select_strategy="default",
        image_grid_pinpoints=[[16, 32], [32, 16], [32, 32]],
    )  # fmt: skip
    return LlavaNextForConditionalGeneration(config)


NEXT_SIZES = ((20, 32), (32, 20), (12, 30))
"""Heights and widths of the LLaVA-NeXT images, in turn: two tile grids, all with rows that unpadding removes."""


def _llava_next_images(model: Any, images_per_row: Sequence[int], generator: torch.Generator) -> tuple[Batch, Runs]:
    sizes = [NEXT_SIZES[number % len(NEXT_SIZES)] for number in range(sum(images_per_row))]
    visual = {
        "pixel_values": pixels((len(sizes), 5, 3, 16, 16), generator),
        "image_sizes": torch.tensor(sizes),
    }
    with torch.no_grad():
        features = model.get_image_features(**visual, return_dict=True).pooler_output
    lengths = iter(len(rows) for rows in features)
    return visual, [[[next(lengths)] for _ in range(count)] for count in images_per_row]


def _idefics_settings() -> tuple[dict[str, Any], dict[str, Any]]:
    vision = {
        "hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
        "image_size": 24, "patch_size": 4, "attention_dropout": 0.0,
    }  # fmt: skip
    return vision, llama_settings()


def _idefics3() -> Any:
    from transformers import Idefics3Config, Idefics3ForConditionalGeneration

    vision, text = _idefics_settings()
    config = Idefics3Config(vision_config=vision, text_config=text, image_token_id=IMAGE, scale_factor=2)
    return Idefics3ForConditionalGeneration(config)


def _smolvlm() -> Any:
    from transformers import SmolVLMConfig, SmolVLMForConditionalGeneration

    vision, text = _idefics_settings()
    config = SmolVLMConfig(vision_config=vision, text_config=text, image_token_id=IMAGE, scale_factor=2)
    return SmolVLMForConditionalGeneration(config)


def _idefics_images(model: Any, images_per_row: Sequence[int], generator: torch.Generator) -> tuple[Batch, Runs]:
    tiles = [[3 if image % 2 == 0 else 2 for image in range(count)] for count in images_per_row]
    most = max(sum(row) for row in tiles)
    values = torch.zeros(len(tiles), most, 3, 24, 24)
    mask = torch.zeros(len(tiles), most, 24, 24, dtype=torch.bool)
    for row, counts in enumerate(tiles):
        values[row, : sum(counts)] = pixels((sum(counts), 3, 24, 24), generator)
        mask[row, : sum(counts)] = True
    return {"pixel_values": values, "pixel_attention_mask": mask}, [[[9] * n for n in row] for row in tiles]


def tiles_of_row(batch: Batch, images_per_row: Sequence[int], row: int) -> Batch:
    """Return the tiles of one row, where all rows have the same number after padding."""
    tiles = int(batch["pixel_attention_mask"][row].any(-1).any(-1).sum())
    return {name: batch[name][row : row + 1, :tiles] for name in ("pixel_values", "pixel_attention_mask")}


def qwen_text_settings() -> dict[str, Any]:
    """Return the settings of a tiny Qwen language model with three position coordinates."""
    return {
        "vocab_size": VOCAB, "hidden_size": WIDTH, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 512, "attention_dropout": 0.0,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]},
        "pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS,
    }  # fmt: skip


QWEN_IDS = {
    "image_token_id": IMAGE, "video_token_id": VIDEO, "vision_start_token_id": TILE_START,
    "vision_end_token_id": TILE_END,
}  # fmt: skip


def _qwen2_5_vl() -> Any:
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    vision = {
        "depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "patch_size": 4,
        "spatial_merge_size": 2, "temporal_patch_size": 2, "window_size": 16, "out_hidden_size": WIDTH,
        "fullatt_block_indexes": [1],
    }  # fmt: skip
    config = Qwen2_5_VLConfig(vision_config=vision, text_config=qwen_text_settings(), **QWEN_IDS)
    return Qwen2_5_VLForConditionalGeneration(config)


def _qwen3_vl() -> Any:
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

    vision = {
        "depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "patch_size": 4,
        "spatial_merge_size": 2, "temporal_patch_size": 2, "out_hidden_size": WIDTH, "num_position_embeddings": 64,
        "deepstack_visual_indexes": [0, 1],
    }  # fmt: skip
    text = {**qwen_text_settings(), "head_dim": 16}
    return Qwen3VLForConditionalGeneration(Qwen3VLConfig(vision_config=vision, text_config=text, **QWEN_IDS))


Grid = tuple[int, int, int]
QWEN_GRIDS: tuple[Grid, ...] = ((1, 8, 12), (1, 6, 8), (1, 10, 10))
"""Patches of the Qwen images, in turn: frames, rows, columns; two by two of them make a token."""


def qwen_images(
    model: Any, images_per_row: Sequence[int], generator: torch.Generator, shapes: Sequence[Grid] = QWEN_GRIDS
) -> tuple[Batch, Runs]:
    """Return images of different shapes as flat patches."""
    grids = [shapes[number % len(shapes)] for number in range(sum(images_per_row))]
    patches = sum(math.prod(grid) for grid in grids)
    lengths = iter(math.prod(grid) // 4 for grid in grids)
    visual = {"pixel_values": pixels((patches, 3 * 2 * 4 * 4), generator), "image_grid_thw": torch.tensor(grids)}
    return visual, [[[next(lengths)] for _ in range(count)] for count in images_per_row]


def patches_of_row(batch: Batch, images_per_row: Sequence[int], row: int) -> Batch:
    """Return the images of one row."""
    first = sum(images_per_row[:row])
    grids = batch["image_grid_thw"]
    patches = grids.prod(-1)
    span = slice(int(patches[:first].sum()), int(patches[: first + images_per_row[row]].sum()))
    return {
        "pixel_values": batch["pixel_values"][span],
        "image_grid_thw": grids[first : first + images_per_row[row]],
    }


VIDEO_GRIDS: tuple[Grid, ...] = ((2, 8, 12), (3, 6, 8))
"""Patches of the Qwen videos, in turn: frames (pairs of them, before the encoder), rows, columns."""


def qwen_videos(
    model: Any, videos_per_row: Sequence[int], generator: torch.Generator, shapes: Sequence[Grid] = VIDEO_GRIDS
) -> tuple[Batch, Runs]:
    """Return videos whose placeholders stand side by side."""
    grids = [shapes[number % len(shapes)] for number in range(sum(videos_per_row))]
    patches = sum(math.prod(grid) for grid in grids)
    visual = {"pixel_values_videos": pixels((patches, 3 * 2 * 4 * 4), generator), "video_grid_thw": torch.tensor(grids)}
    lengths = iter(math.prod(grid) // 4 for grid in grids)
    return visual, [[[next(lengths)] for _ in range(count)] for count in videos_per_row]


def qwen_timed_videos(
    model: Any, videos_per_row: Sequence[int], generator: torch.Generator, shapes: Sequence[Grid] = VIDEO_GRIDS
) -> tuple[Batch, Runs]:
    """Return videos with one fenced run of placeholders per frame."""
    visual, _ = qwen_videos(model, videos_per_row, generator, shapes)
    frames = iter([rows * columns // 4] * count for count, rows, columns in visual["video_grid_thw"].tolist())
    return visual, [[next(frames) for _ in range(count)] for count in videos_per_row]


def qwen_videos_of_row(batch: Batch, videos_per_row: Sequence[int], row: int) -> Batch:
    """Return the videos of one row."""
    renamed = {"pixel_values": batch["pixel_values_videos"], "image_grid_thw": batch["video_grid_thw"]}
    found = patches_of_row(renamed, videos_per_row, row)
    return {"pixel_values_videos": found["pixel_values"], "video_grid_thw": found["image_grid_thw"]}


FAMILIES: dict[str, TinyFamily] = {
    family.name: family
    for family in (
        TinyFamily("llava", _llava, _llava_images, images_of_row),
        TinyFamily("llava_next", _llava_next, _llava_next_images, images_of_row),
        TinyFamily("idefics3", _idefics3, _idefics_images, tiles_of_row, fence=True),
        TinyFamily("smolvlm", _smolvlm, _idefics_images, tiles_of_row, fence=True),
        TinyFamily(
            "qwen2_5_vl",
            _qwen2_5_vl,
            qwen_images,
            patches_of_row,
            mrope=True,
            fence=True,
            videos=qwen_videos,
            videos_of_row=qwen_videos_of_row,
        ),
        TinyFamily(
            "qwen3_vl",
            _qwen3_vl,
            qwen_images,
            patches_of_row,
            mrope=True,
            fence=True,
            videos=qwen_timed_videos,
            videos_of_row=qwen_videos_of_row,
        ),
    )
}


def tiny_llava(seed: int = 0) -> Any:
    """Return the LLaVA of `FAMILIES`, in training mode."""
    return FAMILIES["llava"].build_model(seed).train()


class TinyRows(torch.utils.data.Dataset[Batch]):
    """A data set of LLaVA rows, one image each (none at every seventh row), each a function of its number.

    Args:
        rows: How many rows.
        seed: Seed of words and pixels.
    """

    def __init__(self, rows: int = 64, seed: int = 0) -> None:
        self.rows, self.seed = rows, seed

    def __len__(self) -> int:
        return self.rows

    def __getitem__(self, number: int) -> Batch:
        images = 0 if number % 7 == 6 else 1
        made = FAMILIES["llava"].make_batch(
            None, [images], text_lengths=[2 + number % 4], seed=1000 * self.seed + number, turns=1 + number % 2
        )
        values = made.get("pixel_values", torch.empty(0, 3, 24, 24))
        return {"input_ids": made["input_ids"][0], "labels": made["labels"][0], "pixel_values": values}


def collate(items: Sequence[Batch], padding_side: str = "right") -> Batch:
    """Make one batch of the rows of `TinyRows`."""
    batch = pad_rows([(item["input_ids"], item["labels"]) for item in items], padding_side)
    values = torch.cat([item["pixel_values"] for item in items])
    return {**batch, "pixel_values": values} if len(values) else batch


def weights(model: Any) -> dict[str, Tensor]:
    """Return a copy of a model's tensors by key."""
    return {key: value.detach().clone() for key, value in model.state_dict().items()}


def gradients(model: Any) -> dict[str, Tensor]:
    """Return a copy of a model's gradients by name; parameters without one are left out."""
    return {name: p.grad.detach().clone() for name, p in model.named_parameters() if p.grad is not None}


CHAT = (
    "{% for message in messages %}{{ 'USER: ' if message['role'] == 'user' else 'ASSISTANT: ' }}"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}"
    "{{ '<image>' if part['type'] == 'image' else part['text'] }}{{ ' ' }}"
    "{% endfor %}{% endif %}{{ ' </s> ' if message['role'] == 'assistant' else ' ' }}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT: {% endif %}"
)
"""A chat template with one word per role."""


def tiny_processor() -> Any:
    """Return a LLaVA processor for `tiny_llava`: a table of words and the PIL image processor."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import CLIPImageProcessorPil, LlavaProcessor, PreTrainedTokenizerFast

    text = "<unk> USER: ASSISTANT: what colour digit is this it a red blue one two three yes no"
    names = text.split(" ")
    table = {"<pad>": PAD, "<s>": BOS, "</s>": EOS, "<image>": IMAGE}
    table.update({name: FIRST_WORD + place for place, name in enumerate(names)})
    words = Tokenizer(models.WordLevel(table, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>",
        extra_special_tokens={"image_token": "<image>"},
    )  # fmt: skip
    return LlavaProcessor(
        image_processor=CLIPImageProcessorPil(size={"shortest_edge": 24}, crop_size={"height": 24, "width": 24}),
        tokenizer=tokenizer, patch_size=4, vision_feature_select_strategy="default", chat_template=CHAT,
        image_token="<image>", num_additional_image_tokens=1,
    )  # fmt: skip
