"""Which model families can lose tokens between their layers, and why the others cannot."""

from __future__ import annotations

from tests.conformance.families import SUITE

WINDOWS = "sliding_attention"
STATES = "linear_attention|hybrid|conv"
BUDGETS = "indexed_attention|minimax_m3_sparse"
WHY = {
    WINDOWS: "Sliding windows count places, and a cache cut to a window holds as many in every layer.",
    STATES: "Layers of linear attention, convolution or Mamba carry a state from place to place.",
    BUDGETS: "Indexed or sparse layers look at a budget of best places.",
    "No decoder layers": "The language model carries the head and hides its layers.",
}
"""Reason of the refusal by what the message of `open_decoder` must name."""
DROP_REFUSED: dict[str, str] = {
    **dict.fromkeys(
        ("step3p7", "unlimited_ocr", "gemma3", "gemma3n", "gemma4", "gemma4_unified", "paligemma", "cohere_compass",
         "exaone4_5", "aya_vision", "cohere2_vision", "muse_glimmer", "muse_spark"), WINDOWS),
    **dict.fromkeys(
        ("minicpm_ocr", "minicpmv4_6", "minicpmv4_7", "inkling2", "inkling_mm_model", "lfm2_vl", "lfm3_vl", "qwen3_5",
         "qwen3_5_moe"), STATES),
    **dict.fromkeys(("glm5_next", "minimax_m3_vl", "mistral_large4", "qwen4_exp", "dots3_note"), BUDGETS),
    **dict.fromkeys(("llama4", "nemotron_h_omni"), "No decoder layers"),
}  # fmt: skip
"""What the message must name, by family."""
DROP_OPEN = sorted(set(SUITE) - set(DROP_REFUSED))
