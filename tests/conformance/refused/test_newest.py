"""What new models are refused for, and the facts of transformers behind it."""

from __future__ import annotations

import pytest
import torch
from tests.conformance.families import SUITE
from tests.tiny import VIDEO

from trimtab.anatomy import check_model, encode_images
from trimtab.errors import SettingError


def test_videos_of_kimi_fail_in_the_stock_model_and_are_refused_here() -> None:
    model = SUITE["kimi_k25"].build_model()
    grid = torch.tensor([[2, 4, 6]])  # two frames become one, of 2 x 3 tokens
    videos = {
        "pixel_values_videos": torch.randn(48, 3, 4, 4),
        "video_grid_thw": grid,
        "input_ids": torch.full((1, 6), VIDEO),
    }
    with torch.no_grad(), pytest.raises(RuntimeError, match="split_sizes"):
        model(**videos)
    with pytest.raises(SettingError, match=r"videos .* are not supported"):
        encode_images(model, videos)
    assert any("Images only" in note for note in check_model(model).notes)
