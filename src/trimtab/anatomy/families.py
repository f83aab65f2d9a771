"""Which models of transformers can train on pruned visual tokens, and how they differ.

All of them take features that were encoded before (`mm_encoder_outputs`, public since transformers 5.18). What
differs from family to family stands in one table; a new family is one more row.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any, Literal

import torch
import transformers
from packaging.version import Version
from torch import nn

from trimtab.errors import HostLibraryError, UnsupportedModelError, near_miss

OLDEST_TRANSFORMERS = "5.18.0"


@dataclass(frozen=True)
class Family:
    """How one model family hands its visual features to its language model.

    Attributes:
        name: Class of transformers.
        rotary: ``"line"`` for one position per token, ``"multimodal"`` for three coordinates per token.
        tiles: ``"block"`` where one entry of the features is one image in raster order, ``"square"`` where an
            entry holds several square tiles of equal size one after another, ``"packed"`` where it holds a base
            view and a grid of tiles with a newline row after each line.
        tower: Whether the vision tower is a plain transformer whose block of choice can be observed, so that
            class-token attention, keys and states before the projector can be supplied.
    """

    name: str
    rotary: Literal["line", "multimodal"] = "line"
    tiles: Literal["block", "square", "packed"] = "block"
    tower: bool = False


FAMILIES: dict[str, Family] = {
    "llava": Family("LlavaForConditionalGeneration", tower=True),
    "llava_next": Family("LlavaNextForConditionalGeneration", tiles="packed", tower=True),
    "idefics3": Family("Idefics3ForConditionalGeneration", tiles="square"),
    "smolvlm": Family("SmolVLMForConditionalGeneration", tiles="square"),
    "qwen2_vl": Family("Qwen2VLForConditionalGeneration", rotary="multimodal"),
    "qwen2_5_vl": Family("Qwen2_5_VLForConditionalGeneration", rotary="multimodal"),
    "qwen3_vl": Family("Qwen3VLForConditionalGeneration", rotary="multimodal"),
}
"""Families whose identities the tests hold, by ``config.model_type``."""


@dataclass(frozen=True)
class SupportReport:
    """Whether a model can train on pruned visual tokens.

    Attributes:
        supported: Whether it has what it takes.
        tested: Whether its family stands in `FAMILIES`, with tests that hold its identities.
        model_class: Name of its class.
        reason: Why (not), in one or two sentences.
    """

    supported: bool
    tested: bool
    model_class: str
    reason: str


@dataclass(frozen=True)
class Host:
    """A supported model, opened.

    Attributes:
        model: The conditional-generation model of transformers (inside a PEFT wrapper where there is one).
        base: Its part without the language-model head.
        family: How its family differs.
        image_token_ids: Ids that stand for one visual token each in ``input_ids``.
        forward_names: Arguments of its forward.
        encoder_names: Arguments of its image encoder; batch entries of these names are images, not text.
    """

    model: Any
    base: Any
    family: Family
    image_token_ids: tuple[int, ...]
    forward_names: frozenset[str]
    encoder_names: tuple[str, ...]

    @property
    def width(self) -> int:
        """Width of the language model."""
        return int(self.model.get_input_embeddings().weight.shape[1])

    @property
    def decoder_trains(self) -> bool:
        """Whether any parameter of the language model (or of an adapter inside it) is being trained."""
        visual = {id(p) for part in self._visual_parts() for p in part.parameters()}
        # Parameters of the base itself (the newline of LLaVA-NeXT) belong to the visual side too.
        visual |= {id(p) for p in self.base.parameters(recurse=False)}
        return any(p.requires_grad for p in self.base.parameters() if id(p) not in visual)

    def head(self, states: torch.Tensor) -> torch.Tensor:
        """Scores of the language-model head, with the scaling that the model applies to them.

        Args:
            states: [label, width].

        Returns:
            [label, vocab].
        """
        scores: torch.Tensor = self.model.get_output_embeddings()(states)
        text = self.model.config.get_text_config()
        if (divisor := getattr(text, "logits_scaling", None)) is not None:
            scores = scores / divisor
        if (factor := getattr(text, "logit_scale", None)) is not None:
            scores = scores * factor
        if (cap := getattr(text, "final_logit_softcapping", None)) is not None:
            scores = torch.tanh(scores / cap) * cap
        return scores

    def _visual_parts(self) -> list[nn.Module]:
        names = ("vision_tower", "vision_model", "visual", "multi_modal_projector", "connector", "embed_vision")
        return [part for name in names if isinstance(part := getattr(self.base, name, None), nn.Module)]


def check_model(model: Any) -> SupportReport:
    """Say whether a model can train on pruned visual tokens; never raises for a model that cannot.

    Args:
        model: Any model, also inside a PEFT wrapper.

    Returns:
        The verdict and its reason.
    """
    inner = _inside_peft(model)
    name = type(inner).__name__
    tested = _model_type(inner) in FAMILIES
    reason = _why_not(inner)
    if reason:
        return SupportReport(False, tested, name, reason)
    if tested:
        return SupportReport(True, True, name, f"{name} is among the families whose identities the tests hold.")
    return SupportReport(
        True, False, name, f"{name} has the public hook, but its family is not among those that the tests hold."
    )


def open_host(model: Any) -> Host:
    """Open a model for pruned visual tokens.

    Args:
        model: A conditional-generation model of transformers, also inside a PEFT wrapper; an opened one comes
            back as it is.

    Returns:
        The opened model.

    Raises:
        HostLibraryError: transformers is older than 5.18.
        UnsupportedModelError: The model lacks what it takes; the message says what.
    """
    if isinstance(model, Host):
        return model
    if Version(transformers.__version__) < Version(OLDEST_TRANSFORMERS):
        raise HostLibraryError(
            f"trimtab needs transformers {OLDEST_TRANSFORMERS} or newer (the public mm_encoder_outputs argument), but "
            f"{transformers.__version__} is installed. Run: pip install -U transformers"
        )
    inner = _inside_peft(model)
    if reason := _why_not(inner):
        raise UnsupportedModelError(reason)
    base = inner.base_model
    return Host(
        model=inner,
        base=base,
        family=FAMILIES.get(_model_type(inner), _guess(inner)),
        image_token_ids=_image_token_ids(inner),
        forward_names=frozenset(inspect.signature(type(inner).forward).parameters),
        encoder_names=tuple(
            name
            for name, argument in inspect.signature(base.get_image_features).parameters.items()
            if argument.kind is not inspect.Parameter.VAR_KEYWORD and not name.startswith("vision_feature")
        ),
    )


def _inside_peft(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _model_type(model: Any) -> str:
    return str(getattr(getattr(model, "config", None), "model_type", ""))


def _guess(model: Any) -> Family:
    rotary: Literal["line", "multimodal"] = (
        "multimodal" if hasattr(model.base_model, "compute_3d_position_ids") else "line"
    )
    return Family(type(model).__name__, rotary=rotary)


def _image_token_ids(model: Any) -> tuple[int, ...]:
    token = getattr(model.config, "image_token_id", None)
    return () if token is None else (int(token),)


def _why_not(model: Any) -> str:
    name = type(model).__name__
    tested = ", ".join(sorted(family.name for family in FAMILIES.values()))
    if not isinstance(model, transformers.PreTrainedModel):
        return f"{name} is not a model of transformers. Give one of: {tested}."
    if getattr(model.config, "is_encoder_decoder", False):
        return f"{name} is an encoder-decoder; visual tokens are pruned before a decoder only. Tested: {tested}."
    lacks = []
    if "mm_encoder_outputs" not in inspect.signature(type(model).forward).parameters:
        lacks.append("a forward that takes mm_encoder_outputs")
    if not hasattr(model.base_model, "get_image_features"):
        lacks.append("get_image_features")
    if not _image_token_ids(model):
        lacks.append("config.image_token_id")
    if model.get_output_embeddings() is None:
        lacks.append("a language-model head (load the ...ForConditionalGeneration class)")
    if not lacks:
        return ""
    known = near_miss(name, (family.name for family in FAMILIES.values()))
    return f"{name} lacks {' and '.join(lacks)}, so its visual tokens cannot be pruned. {known}"
