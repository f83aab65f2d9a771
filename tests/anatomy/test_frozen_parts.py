"""Parts that train nothing keep no graph, whatever asks their inputs for gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.tiny import FAMILIES, gradients

from trimtab.anatomy import encode_images, open_host
from trimtab.anatomy.frozen_parts import without_frozen_gradients
from trimtab.bench import count_flops

LLAVA = FAMILIES["llava"]


def frozen_llava() -> Any:
    """A LLaVA whose tower is frozen, but asked for gradients by checkpointing, as a Trainer sets it up."""
    model = LLAVA.build_model().train()
    for parameter in model.model.vision_tower.parameters():
        parameter.requires_grad_(False)
    model.activation_checkpointing_enable({"use_reentrant": False})
    model.enable_input_require_grads()
    return model


def test_a_frozen_tower_has_no_graph_and_the_projector_learns_as_before() -> None:
    model = frozen_llava()
    batch = LLAVA.make_batch(model, (1, 2))
    plain = model.get_image_features(batch["pixel_values"]).pooler_output
    torch.cat(list(plain)).square().sum().backward()
    expected = gradients(model)
    model.zero_grad(set_to_none=True)

    tower_outputs = []
    hook = model.model.vision_tower.register_forward_hook(lambda module, args, output: tower_outputs.append(output))
    blocks = encode_images(model, batch).blocks
    hook.remove()
    torch.cat(blocks).square().sum().backward()
    assert not any(state.requires_grad for state in tower_outputs[0].hidden_states if state is not None)
    found = gradients(model)
    assert {name for name, one in found.items() if one is not None} >= {
        name for name in expected if "multi_modal_projector" in name
    }
    for name, one in expected.items():
        if "multi_modal_projector" in name:
            assert torch.equal(found[name], one), name


def test_less_is_computed() -> None:
    model = frozen_llava()
    batch = LLAVA.make_batch(model, (1, 2))

    def features(encode: Any) -> int:
        return count_flops(lambda: torch.cat(list(encode())).square().sum().backward())

    stock = features(lambda: model.get_image_features(batch["pixel_values"]).pooler_output)
    assert features(lambda: encode_images(model, batch).blocks) < 0.8 * stock


def test_a_trained_tower_is_left_alone() -> None:
    model = LLAVA.build_model().train()
    host = open_host(model)
    with without_frozen_gradients(host) as parts:
        assert model.model.vision_tower not in parts
        assert model.model.multi_modal_projector not in parts


def test_a_frozen_projector_behind_a_trained_tower_lets_gradients_through() -> None:
    model = LLAVA.build_model().train()
    for parameter in model.model.multi_modal_projector.parameters():
        parameter.requires_grad_(False)
    batch = LLAVA.make_batch(model, (1,))
    torch.cat(encode_images(model, batch).blocks).sum().backward()
    assert any(parameter.grad is not None for parameter in model.model.vision_tower.parameters())


def test_everything_is_back_after_an_exception() -> None:
    host = open_host(frozen_llava())
    with without_frozen_gradients(host) as parts:
        assert parts
        assert all("forward" in vars(part) for part in parts)
    assert not any("forward" in vars(part) for part in host.base.children())

    def fail() -> None:
        with without_frozen_gradients(host):
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert not any("forward" in vars(part) for part in host.base.children())
