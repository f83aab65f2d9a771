"""Where features do not stand one per image, a shared image is encoded as often as it is asked about."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from tests.conformance.families import SUITE

from trimtab.evaluate.exact_match import _share_images


@pytest.mark.parametrize(
    ("name", "visual"),
    [
        ("fuyu", {"pixel_values": torch.randn(2, 24, 48)}),  # its encoder stands on the base model only
        (
            "deepseek_ocr2",  # as many crops as images, but both belong to the first
            {
                "pixel_values": torch.randn(2, 3, 64, 64),
                "pixel_values_local": torch.randn(2, 3, 48, 48),
                "num_local_patches": torch.tensor([2, 0]),
            },
        ),
    ],
)
def test_what_is_not_one_per_image_is_left_as_it_is(name: str, visual: dict[str, torch.Tensor]) -> None:
    picture = object()
    prompts = [SimpleNamespace(images=[picture]), SimpleNamespace(images=[picture])]
    inputs = {"input_ids": torch.zeros(2, 3, dtype=torch.long), **visual}
    with torch.no_grad():
        assert _share_images(SUITE[name].build_model(), inputs, prompts) is inputs
