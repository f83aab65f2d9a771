"""What differs from model family to model family, one row each; a new family is one more row."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Step = tuple[Literal["divide", "multiply", "cap", "first", "mute"], str]
"""What is done to the head's scores, and the name in the text configuration that says by how much."""

CAPPED: tuple[Step, ...] = (("cap", "final_logit_softcapping"),)
DIVIDED: tuple[Step, ...] = (("divide", "logits_scaling"),)
MUSE_LOGITS: tuple[Step, ...] = (("multiply", "output_multiplier"), *CAPPED)

SLICES = "Every slice of an image, and every frame of a video, is a block with an isolator of its own."
LINEAR = "Layers of linear attention carry a state along the sequence: dropping a token is not the same as masking it."
SLIDING = (
    "Its sliding window counts the tokens that are there, so that a pruned step sees farther back than a full one."
)
TILES = "Every tile of an image is a block with an isolator of its own."
QUERIES = (
    "Visual tokens are learned queries: grid_pool pools neighbours in their order, which are no neighbours in the "
    "picture."
)
NO_CAP = "transformers does not apply final_logit_softcapping here, so DualSpeed's loss does not either."
NO_SCALE = "transformers does not apply the text model's logit_scale here, so DualSpeed's loss does not either."
NO_BLANK = (
    "No blank image of it is known: with FSDP or ZeRO give every batch an image where other processes may have some."
)
TIMM = "Released models have a vision tower of timm, which must be installed; the tests have one of transformers."
CONVOLUTION = "Convolutions run along the sequence: dropping a token is not the same as masking it."
BLOCKS = "Where token types in the batch let tokens of an image see each other in both directions, kept ones still do."
DISTANCES = "Attention counts distances over the tokens that are there, so that positions='original' keeps none."
LINES = "Tokens that end a line of an image belong to the text and stay."
TIMM_MAP = "Released models have a vision tower of timm, which must be installed; the tests have a stand-in for it."
INDEXED = "Indexed layers look at a budget of best places: in longer sequences dropping a token makes room for another."
ONE_STATE = "its layers of linear attention, convolution or Mamba carry a state from row to row."
ONE_BUDGET = "its indexed layers choose the best places of all rows together."
ONE_CHUNK = "its chunks of attention are counted from the beginning of the pack, not of each row."
ONE_KIND = "Images and videos have one placeholder, so that a batch holds images or videos but not both."
SOUND = "Audio tokens are not pruned."
HUNYUAN_ROWS = (
    "transformers counts images through all rows of a batch and gives the count as a position, so that the logits of "
    "a row depend on how many images the rows before it have (HunYuanVLModel.get_rope_index)."
)


@dataclass(frozen=True)
class Family:
    """How one model family hands its visual features to its language model.

    Attributes:
        name: Class of transformers.
        tiles: ``"block"`` where one entry of the features is one image in raster order, ``"square"`` where an
            entry holds several square tiles of equal size one after another, ``"packed"`` where it holds a base
            view and a grid of tiles with a newline row after each line, ``"runs"`` where only the text tells where an
            image ends: placeholders side by side are one image, ``"views"`` where an entry holds local crops, then
            the whole image, then perhaps a separator, ``"lines"`` where an entry holds a first token, lines of one tile
            with a newline each, and a last token.
        features: Which part of the encoder's output goes to the language model. ``"deepstack_features"`` are pairs of
            a layer of it and the features added there; those of the first layer count as the visual tokens.
        width: Name in the vision configuration of the features' width where the model projects them after hand-over,
            or "" where they have the width of the language model.
        raster: Whether the tokens of a tile stand in raster order; not so behind a resampler.
        tower: Whether the vision tower is a plain transformer whose block of choice can be observed, so that
            class-token attention, keys and states before the projector can be supplied.
        recurrent: Whether layers carry a state along the sequence, so that dropping a token is not the same as
            masking it.
        logits: How the model's own forward turns the scores of the head into logits; most forwards leave them as they
            are, whatever the text configuration names. Names that it lacks are passed over.
        first_position: Position of a row's first token where the model counts them itself.
        unpackable: Why its rows cannot be put one behind the other into one, or "".
        packs_by_positions: Whether transformers keeps the rows of a pack apart where it finds them by their positions
            (eager and flex attention).
        video_placeholder: What stands for a token of a video: ``"own"`` for ``config.video_token_id``, ``"image"``
            for the placeholder of images, so that a batch holds images or videos but not both, ``"span"`` for the
            placeholder of images between ``config.video_start_token_id`` and ``config.video_end_token_id``,
            ``"none"`` where the stock model's videos fail.
        casts_pixels: Whether its forward gives the encoder pixels in the type of the embeddings, whatever type came.
        carried: More that the encoder returns for the language model, the same for every choice of tokens.
        notes: What a user should know about it, in sentences.
    """

    name: str
    tiles: Literal["block", "square", "packed", "lines", "runs", "views"] = "block"
    features: Literal["pooler_output", "last_hidden_state", "deepstack_features"] = "pooler_output"
    width: str = ""
    raster: bool = True
    tower: bool = False
    recurrent: bool = False
    logits: tuple[Step, ...] = ()
    first_position: int = 0
    unpackable: str = ""
    packs_by_positions: bool = True
    video_placeholder: Literal["own", "image", "span", "none"] = "own"
    casts_pixels: bool = False
    carried: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


FAMILIES: dict[str, Family] = {
    "aria": Family("AriaForConditionalGeneration", raster=False, notes=(TILES, QUERIES)),
    "aya_vision": Family("AyaVisionForConditionalGeneration", notes=(TILES, NO_SCALE, SLIDING)),
    "chameleon": Family(
        "ChameleonForConditionalGeneration",
        logits=(("mute", "vocabulary_map"),),
        notes=(
            "Visual tokens are words of its vocabulary, found by a codebook; there is no projector to train.",
            "Its head gives these words no score, so a loss on them is not for DualSpeed.",
        ),
    ),
    "cohere2_vision": Family("Cohere2VisionForConditionalGeneration", notes=(TILES, NO_SCALE, SLIDING)),
    "cohere_compass": Family(
        "CohereCompassForConditionalGeneration", logits=(("multiply", "logit_scale"),), notes=(SLIDING,)
    ),
    "cosmos3_edge": Family("Cosmos3EdgeForConditionalGeneration"),
    "cosmos3_omni": Family("Cosmos3OmniForConditionalGeneration"),
    "deepseek_ocr2": Family(
        "DeepseekOcr2ForConditionalGeneration",
        tiles="views",
        raster=False,
        notes=(
            "Every crop, and the whole image behind them, is a tile; the separator is kept only with all tokens.",
            QUERIES,
        ),
    ),
    "deepseek_vl": Family("DeepseekVLForConditionalGeneration"),
    "deepseek_vl_hybrid": Family("DeepseekVLHybridForConditionalGeneration"),
    "dots3_note": Family(
        "Dots3NoteForConditionalGeneration",
        unpackable=ONE_BUDGET,
        notes=(
            "Full layers look at the index_topk best places (2048): in longer sequences dropping a token makes room "
            "for another.",
            SLIDING,
            SOUND,
        ),
    ),
    "emu3": Family(
        "Emu3ForConditionalGeneration",
        notes=(
            "Visual tokens are words of its vocabulary, found by a codebook; there is no projector to train.",
            "model.train() also switches the batch norms of its image tokenizer, which transformers means to be "
            "frozen (it calls eval() once, in Emu3VQVAE.__init__); the words of an image then depend on its batch.",
            "The words that end its lines count as visual tokens and are pruned like them.",
        ),
    ),
    "ernie4_5_vl_moe": Family("Ernie4_5_VLMoeForConditionalGeneration"),
    "exaone4_5": Family("Exaone4_5_ForConditionalGeneration", notes=(SLIDING,)),
    "fast_vlm": Family("FastVlmForConditionalGeneration", notes=(TIMM,)),
    "fuyu": Family(
        "FuyuForCausalLM",
        features="last_hidden_state",
        notes=("There is no vision tower: visual tokens are projected patches. The words that end a line stay.",),
    ),
    "gemma3": Family(
        "Gemma3ForConditionalGeneration",
        packs_by_positions=False,
        notes=(BLOCKS, SLIDING, NO_CAP),
    ),
    "gemma3n": Family("Gemma3nForConditionalGeneration", logits=CAPPED, notes=(SLIDING, TIMM_MAP, SOUND, NO_BLANK)),
    "gemma4": Family(
        "Gemma4ForConditionalGeneration", packs_by_positions=False, logits=CAPPED, notes=(BLOCKS, SLIDING, SOUND)
    ),
    "gemma4_unified": Family(
        "Gemma4UnifiedForConditionalGeneration",
        packs_by_positions=False,
        logits=CAPPED,
        notes=(
            "There is no vision tower: visual tokens are projected patches.",
            BLOCKS,
            SLIDING,
            SOUND,
        ),
    ),
    "glm46v": Family("Glm46VForConditionalGeneration", video_placeholder="image", notes=(ONE_KIND,)),
    "glm4v": Family("Glm4vForConditionalGeneration", video_placeholder="image", notes=(ONE_KIND,)),
    "glm4v_moe": Family("Glm4vMoeForConditionalGeneration", video_placeholder="image", notes=(ONE_KIND,)),
    "glm5_next": Family(
        "Glm5NextForConditionalGeneration",
        unpackable=ONE_STATE,
        video_placeholder="span",
        recurrent=True,
        notes=(LINEAR, INDEXED),
    ),
    "glm_ocr": Family("GlmOcrForConditionalGeneration", video_placeholder="image", notes=(ONE_KIND,)),
    "glmga": Family("Glm46VForConditionalGeneration", video_placeholder="image", notes=(ONE_KIND,)),
    "got_ocr2": Family("GotOcr2ForConditionalGeneration", casts_pixels=True, notes=(TILES,)),
    "granite4_vision": Family(
        "Granite4VisionForConditionalGeneration",
        tiles="packed",
        features="deepstack_features",
        logits=DIVIDED,
        notes=("Features enter at several layers of the language model; the pruner sees those of the first.",),
    ),
    "granite_docling": Family(
        "GraniteDoclingForConditionalGeneration",
        tiles="square",
        logits=DIVIDED,
        notes=(
            "Features enter at several layers of the language model; the pruner sees those of the first.",
            "The loss of its density router (router_labels) is not part of DualSpeed's loss.",
        ),
    ),
    "hunyuan_vl": Family(
        "HunYuanVLForConditionalGeneration", packs_by_positions=False, tiles="lines", notes=(HUNYUAN_ROWS,)
    ),
    "hyperclovax_vision_v2": Family(
        "HyperCLOVAXVisionV2ForConditionalGeneration", logits=(("multiply", "logits_scaling"),)
    ),
    "idefics2": Family("Idefics2ForConditionalGeneration", tiles="square", raster=False, notes=(QUERIES,)),
    "idefics3": Family("Idefics3ForConditionalGeneration", tiles="square"),
    "inkling2": Family(
        "Inkling2ForConditionalGeneration",
        unpackable=ONE_STATE,
        recurrent=True,
        logits=(*CAPPED, ("first", "unpadded_vocab_size")),
        notes=(CONVOLUTION, SLIDING, DISTANCES),
    ),
    "inkling_mm_model": Family(
        "InklingForConditionalGeneration",
        unpackable=ONE_STATE,
        tiles="runs",
        recurrent=True,
        logits=(("divide", "logits_mup_width_multiplier"), ("first", "unpadded_vocab_size")),
        notes=(
            CONVOLUTION,
            SLIDING,
            DISTANCES,
            "Only the text tells where an image ends, so placeholders side by side are taken for one image.",
            SOUND,
        ),
    ),
    "internvl": Family("InternVLForConditionalGeneration", notes=(TILES,)),
    "janus": Family(
        "JanusForConditionalGeneration",
        notes=("Only the images that it reads are pruned, not those that it generates.",),
    ),
    "kimi_k25": Family(
        "Kimi_K25ForConditionalGeneration",
        video_placeholder="none",
        notes=(
            "Images only: in transformers 5.23 the stock model fails on videos, since get_image_features splits their "
            "features as if the frames of a chunk were not merged.",
        ),
    ),
    "lfm2_vl": Family(
        "Lfm2VlForConditionalGeneration", unpackable=ONE_STATE, recurrent=True, notes=(TILES, CONVOLUTION)
    ),
    "lfm3_vl": Family(
        "Lfm3VlForConditionalGeneration", unpackable=ONE_STATE, recurrent=True, notes=(CONVOLUTION, SLIDING)
    ),
    "lighton_ocr": Family("LightOnOcrForConditionalGeneration", notes=(LINES,)),
    "llama4": Family(
        "Llama4ForConditionalGeneration",
        unpackable=ONE_CHUNK,
        features="last_hidden_state",
        width="vision_output_dim",
        notes=(
            TILES,
            "Its forward projects the features itself, so pruner and isolator work on them before the projector.",
            "Chunked attention and its temperature count places: in sequences longer than a chunk (8192 places by "
            "default), dropping a token is not the same as masking it.",
            "transformers cannot search by beams from its images: generation repeats a pooler_output only, and it has "
            "none.",
        ),
    ),
    "llava": Family("LlavaForConditionalGeneration", tower=True),
    "llava_next": Family("LlavaNextForConditionalGeneration", tiles="packed", tower=True),
    "llava_next_video": Family("LlavaNextVideoForConditionalGeneration", tiles="packed", tower=True),
    "llava_onevision": Family("LlavaOnevisionForConditionalGeneration", tiles="packed", tower=True),
    "minicpm_ocr": Family(
        "MiniCPMOcrForConditionalGeneration", unpackable=ONE_STATE, recurrent=True, notes=(SLICES, LINEAR)
    ),
    "minicpmv4_6": Family(
        "MiniCPMV4_6ForConditionalGeneration", unpackable=ONE_STATE, recurrent=True, notes=(SLICES, LINEAR)
    ),
    "minicpmv4_7": Family(
        "MiniCPMV4_7ForConditionalGeneration", unpackable=ONE_STATE, recurrent=True, notes=(SLICES, LINEAR)
    ),
    "minimax_m3_vl": Family(
        "MiniMaxM3SparseForConditionalGeneration",
        unpackable=ONE_BUDGET,
        notes=(
            "Sparse layers look at the best blocks of index_block_size places (128), counted over the tokens that are "
            "there: in sequences of more than index_topk_blocks of them, dropping a token is not the same as masking "
            "it.",
        ),
    ),
    "mistral3": Family("Mistral3ForConditionalGeneration", notes=(LINES,)),
    "mistral_large4": Family(
        "MistralLarge4ForConditionalGeneration",
        unpackable=ONE_BUDGET,
        logits=CAPPED,
        notes=(
            LINES,
            "Layers look at the index_topk best places (2048): in longer sequences dropping a token makes room for "
            "another.",
        ),
    ),
    "molmo2": Family(
        "Molmo2ForConditionalGeneration",
        packs_by_positions=False,
        video_placeholder="image",
        notes=(ONE_KIND, "The small view and the large view of an image are pruned each by itself.", NO_BLANK),
    ),
    "muse_glimmer": Family("MuseGlimmerForConditionalGeneration", logits=MUSE_LOGITS, notes=(SLIDING,)),
    "muse_spark": Family("MuseSparkForConditionalGeneration", logits=MUSE_LOGITS, notes=(SLIDING, SOUND)),
    "nemotron_h_omni": Family(
        "NemotronH_Omni_Reasoning_V3",
        unpackable=ONE_STATE,
        recurrent=True,
        video_placeholder="none",
        notes=(
            "Mamba layers carry a state along the sequence: dropping a token is not the same as masking it.",
            "Images only: in transformers 5.23 the stock model fails on videos, since its forward concatenates "
            "(torch.cat) the one tensor that get_video_features returns.",
            SOUND,
        ),
    ),
    "ovis2": Family(
        "Ovis2ForConditionalGeneration",
        carried=("visual_indicator_features",),
        notes=(TILES, "The indicator tokens around an image stay."),
    ),
    "paddleocr_vl": Family("PaddleOCRVLForConditionalGeneration"),
    "paligemma": Family(
        "PaliGemmaForConditionalGeneration",
        packs_by_positions=False,
        logits=CAPPED,
        first_position=1,
        notes=(
            "Image and question see each other in both directions, also what is kept of the image.",
            "The sliding window of PaliGemma 2 counts the tokens that are there, so that a pruned step sees farther "
            "back than a full one.",
        ),
    ),
    "perception_lm": Family("PerceptionLMForConditionalGeneration", notes=(TILES, TIMM)),
    "pp_chart2table": Family("GotOcr2ForConditionalGeneration", casts_pixels=True),
    "qianfan_ocr": Family("QianfanOCRForConditionalGeneration", notes=(TILES,)),
    "qwen2_5_omni_thinker": Family("Qwen2_5OmniThinkerForConditionalGeneration", notes=(SOUND,)),
    "qwen2_5_vl": Family("Qwen2_5_VLForConditionalGeneration"),
    "qwen2_vl": Family("Qwen2VLForConditionalGeneration"),
    "qwen3_5": Family("Qwen3_5ForConditionalGeneration", unpackable=ONE_STATE, recurrent=True, notes=(LINEAR,)),
    "qwen3_5_moe": Family("Qwen3_5MoeForConditionalGeneration", unpackable=ONE_STATE, recurrent=True, notes=(LINEAR,)),
    "qwen3_omni_moe_thinker": Family("Qwen3OmniMoeThinkerForConditionalGeneration", notes=(SOUND,)),
    "qwen3_vl": Family("Qwen3VLForConditionalGeneration"),
    "qwen3_vl_moe": Family("Qwen3VLMoeForConditionalGeneration"),
    "qwen4_exp": Family(
        "Qwen4ExpForConditionalGeneration", unpackable=ONE_STATE, recurrent=True, notes=(LINEAR, INDEXED)
    ),
    "smolvlm": Family("SmolVLMForConditionalGeneration", tiles="square"),
    "step3p7": Family(
        "Step3p7ForConditionalGeneration",
        tiles="views",
        notes=("Every crop, and the whole image behind them, is a tile.", SLIDING),
    ),
    "unlimited_ocr": Family(
        "UnlimitedOcrForConditionalGeneration",
        tiles="views",
        notes=("Crops and the whole image are one tile; line ends and the separator are kept only with all tokens.",),
    ),
    "video_llama_3": Family(
        "VideoLlama3ForConditionalGeneration",
        notes=("What its processor leaves out of a video is gone before pruning; ratios count what is left.",),
    ),
    "video_llava": Family(
        "VideoLlavaForConditionalGeneration",
        notes=(
            "Videos keep the class token of every frame: grid_pool pools neighbours in the order of the tokens there, "
            "which are no squares of the picture.",
        ),
    ),
    "vipllava": Family("VipLlavaForConditionalGeneration"),
}
"""Families whose identities the tests hold, by ``config.model_type``."""

Q_FORMER = (
    "Q-Former has cut every image to a few learned queries (config.num_query_tokens) already, which are no places of "
    "the picture, and its forward takes no batch without images. Train it without DualSpeed."
)

REFUSED: dict[str, str] = {
    "blip-2": f"its {Q_FORMER}",
    "diffusion_gemma": (
        "it fills in a canvas of tokens by denoising and has no next-token loss, which the training is made for. Take "
        "an autoregressive model, such as Gemma 4."
    ),
    "instructblip": f"its {Q_FORMER}",
    "instructblipvideo": f"its {Q_FORMER}",
    "shieldgemma2": (
        "transformers saves it under names that it does not find again when it loads the class, so that a trained "
        "checkpoint would be lost. Load the weights with Gemma3ForConditionalGeneration.from_pretrained and set "
        "model.config.model_type to 'gemma3'."
    ),
}
"""Why a family with the public hook is refused, by ``config.model_type``."""

NEAREST: dict[str, str] = {
    "blip": "LlavaForConditionalGeneration",
    "blip-2": "LlavaForConditionalGeneration",
    "evolla": "LlavaForConditionalGeneration",
    "florence2": "PaliGemmaForConditionalGeneration",
    "git": "LlavaForConditionalGeneration",
    "idefics": "Idefics2ForConditionalGeneration",
    "instructblip": "LlavaForConditionalGeneration",
    "instructblipvideo": "VideoLlavaForConditionalGeneration",
    "kosmos-2": "Qwen2_5_VLForConditionalGeneration",
    "kosmos-2.5": "GotOcr2ForConditionalGeneration",
    "mistral4": "MistralLarge4ForConditionalGeneration",
    "mllama": "Llama4ForConditionalGeneration",
    "pi0": "PaliGemmaForConditionalGeneration",
    "pix2struct": "GotOcr2ForConditionalGeneration",
    "pp_formulanet": "GotOcr2ForConditionalGeneration",
    "t5gemma2": "Gemma3ForConditionalGeneration",
    "udop": "GotOcr2ForConditionalGeneration",
    "vision-encoder-decoder": "LlavaForConditionalGeneration",
}
"""The supported class for the work of a model that cannot be supported, by ``config.model_type``."""
