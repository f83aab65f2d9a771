"""The head of models that carry it inside their language model, or give some words no score."""

from __future__ import annotations

import torch
from tests.conformance.families import SUITE
from tests.conformance.family_tools import logits_of
from tests.tiny import VOCAB

from trimtab.anatomy import open_host
from trimtab.ops.label_head import label_losses


def test_muted_words_have_no_share_and_losses_stay_finite_when_it_is_cold() -> None:
    model = SUITE["chameleon"].build_model()
    host = open_host(model)
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, 5, host.width, generator=generator).unbind(0)
    with torch.no_grad():
        shares = host.head(student).softmax(-1)
        ce, kl = label_losses(student, teacher, torch.arange(3, 8), host.head, temperature=0.01)
        in_half = host.head(student.half()) if model.half() else None
    assert (shares[:, VOCAB:] == 0).all()  # the codes of images stand behind the words
    assert (shares[:, :VOCAB] > 0).all()
    assert ce.isfinite()
    assert kl.isfinite()
    assert kl > 0
    assert in_half is not None
    assert in_half.isfinite().all()


def test_states_of_a_model_whose_language_model_carries_the_head_give_its_logits() -> None:
    family = SUITE["nemotron_h_omni"]
    model = family.build_model()
    host = open_host(model)
    assert host.base is model
    batch = family.make_batch(model, (0, 0))
    hooks = len(host.body._forward_hooks)
    with torch.no_grad():
        states = host.last_states({name: batch[name] for name in ("input_ids", "attention_mask")})
        logits = host.head(states)
    assert states.shape == (*batch["input_ids"].shape, host.width)
    assert torch.equal(logits, logits_of(model, batch))
    assert len(host.body._forward_hooks) == hooks
    assert "logits_to_keep" in host.forward_names
