"""Open a model of transformers for pruned visual tokens, or say why that cannot be.

All supported models take features that were encoded before (`mm_encoder_outputs`, public since transformers 5.18).
What differs from family to family stands in `trimtab.anatomy.family_table`.
"""

from __future__ import annotations

import difflib
import inspect
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import torch
import transformers
from packaging.version import Version

from trimtab.anatomy.family_table import FAMILIES, NEAREST, REFUSED, Family
from trimtab.anatomy.host_library import warn_of_untested_release
from trimtab.errors import HostLibraryError, TrimtabWarning, UnsupportedModelError

OLDEST_TRANSFORMERS = "5.18.0"


@dataclass(frozen=True)
class SupportReport:
    """Whether a model can train on pruned visual tokens.

    Attributes:
        supported: Whether it has what it takes.
        tested: Whether its family stands in `FAMILIES`, with tests that hold its identities.
        model_class: Name of its class.
        reason: Why (not), in one or two sentences.
        notes: What is special about the family.
    """

    supported: bool
    tested: bool
    model_class: str
    reason: str
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Modality:
    """One kind of visual input of a model.

    Attributes:
        name: ``"image"`` or ``"video"``, the key in ``mm_encoder_outputs``.
        encoder: Method of the base model that encodes it.
        arguments: Arguments of the model's forward that go to that method; batch entries of these names are visual
            input, not text.
        parameters: What the method calls each of them.
        token_ids: Placeholders in ``input_ids``, one per visual token.
        span: Tokens at the beginning and the end of this kind where it shares its placeholder with another, or None.
        mask: Entry of the batch that says which features the model itself keeps after encoding, or None.
    """

    name: str
    encoder: str
    arguments: tuple[str, ...]
    parameters: tuple[str, ...]
    token_ids: tuple[int, ...]
    span: tuple[int, int] | None = None
    mask: str | None = None

    @property
    def pixels(self) -> str:
        """The entry that a batch with this kind of input always has."""
        return self.arguments[0]


@dataclass(frozen=True)
class Host:
    """A supported model, opened.

    Attributes:
        model: The conditional-generation model of transformers (inside a PEFT wrapper where there is one).
        base: Its part without the language-model head.
        family: How its family differs.
        modalities: The kinds of visual input that it takes.
        forward_names: Arguments of its forward.
    """

    model: Any
    base: Any
    family: Family
    modalities: tuple[Modality, ...]
    forward_names: frozenset[str]

    @property
    def image_token_ids(self) -> tuple[int, ...]:
        """Ids that stand for one visual token each in ``input_ids``, of images and of videos."""
        return tuple(dict.fromkeys(token for modality in self.modalities for token in modality.token_ids))

    @property
    def encoder_names(self) -> frozenset[str]:
        """Arguments of the encoders; batch entries of these names are visual input, not text."""
        masks = (modality.mask for modality in self.modalities if modality.mask is not None)
        return frozenset(name for modality in self.modalities for name in modality.arguments).union(masks)

    @property
    def audio_names(self) -> frozenset[str]:
        """Arguments of the audio encoder, whose tensors have nothing to do with places in the text."""
        encoder = getattr(self.base, "get_audio_features", None)
        return frozenset() if encoder is None else frozenset(inspect.signature(encoder).parameters)

    @property
    def rotary(self) -> Literal["line", "multimodal"]:
        """``"line"`` for one position per token, ``"multimodal"`` for three coordinates per token."""
        return "multimodal" if hasattr(self.base, "compute_3d_position_ids") else "line"

    @property
    def width(self) -> int:
        """Width of the visual features that are handed over; most often that of the language model."""
        if self.family.width:
            return int(getattr(self.model.config.vision_config, self.family.width))
        embeddings = self.model.get_input_embeddings()
        if (named := getattr(embeddings, "embedding_dim", None)) is not None:  # the weight may be packed in few bits
            return int(named)
        weight = embeddings.weight
        return int(getattr(weight, "ds_shape", weight.shape)[1])  # in the hands of ZeRO-3 it is empty

    def features(self, output: Any) -> Any:
        """What of an encoder's output the language model takes for visual tokens, in the encoder's own container.

        Args:
            output: What `Modality.encoder` returned.

        Returns:
            A tensor or a list of them, or None where the output has none.
        """
        found = getattr(output, self.family.features, None)
        if found is None or self.family.features != "deepstack_features":
            return found
        return min(reversed(found), key=lambda pair: pair[0])[1]  # of two pairs of one layer the model takes the last

    @property
    def body(self) -> Any:
        """The module that returns the last hidden states.

        That is the base model; where a class has none, because its language model carries the head, it is the
        language model's own base.
        """
        if self.base is not self.model:
            return self.base
        decoder = self.model.get_decoder()
        # Llama 4's language model names a base that it does not have; its one model inside is meant.
        inside = [child for child in decoder.children() if isinstance(child, transformers.PreTrainedModel)]
        return inside[0] if decoder.base_model is decoder and len(inside) == 1 else decoder.base_model

    @property
    def output_embeddings(self) -> Any:
        """The language-model head."""
        return _output_embeddings(self.model)

    def last_states(self, inputs: Mapping[str, Any]) -> torch.Tensor:
        """Run the model up to its last hidden states.

        Args:
            inputs: Arguments of the base model.

        Returns:
            [row, seq, width].
        """
        if self.base is not self.model:
            states: torch.Tensor = self.base(**inputs).last_hidden_state
            return states
        caught: list[torch.Tensor] = []
        hook = self.body.register_forward_hook(lambda module, args, output: caught.append(output.last_hidden_state))
        try:
            self.model(**inputs, **({"logits_to_keep": 1} if "logits_to_keep" in self.forward_names else {}))
        finally:
            hook.remove()
        return caught[0]

    @property
    def decoder_trains(self) -> bool:
        """Whether any parameter of the language model (or of an adapter inside it) is being trained."""
        return any(parameter.requires_grad for parameter in self.model.get_decoder().parameters())

    def head(self, states: torch.Tensor) -> torch.Tensor:
        """Scores of the language-model head, scaled as the model's own forward does.

        Args:
            states: [label, width].

        Returns:
            [label, vocab].
        """
        scores: torch.Tensor = self.output_embeddings(states)
        text = self.model.config.get_text_config()
        for step, name in self.family.logits:
            if (value := getattr(text, name, None)) is not None:
                scores = _LOGITS[step](scores, value)
        return scores


_LOGITS: dict[str, Callable[[torch.Tensor, Any], torch.Tensor]] = {
    "divide": lambda scores, divisor: scores / divisor,
    "multiply": lambda scores, factor: scores * factor,
    "cap": lambda scores, cap: torch.tanh(scores / cap) * cap,
    "first": lambda scores, count: scores[..., :count],
    "mute": lambda scores, words: scores.index_fill(-1, _codes(words, scores.device), _lowest(scores.dtype)),
}


def _codes(words: Mapping[str, int], device: torch.device) -> torch.Tensor:
    """Ids of the codes of images in a vocabulary."""
    return torch.tensor([code for name, code in words.items() if name.startswith("IMGIMG")], device=device)


def _lowest(dtype: torch.dtype) -> float:
    """A score without any probability that may still be divided by a temperature."""
    return torch.finfo(dtype).min / 2**16


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
        why = f"{name} is among the families whose identities the tests hold."
        return SupportReport(True, True, name, why, FAMILIES[_model_type(inner)].notes)
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

    Warns:
        TrimtabWarning: Its family is not one that the tests hold, or transformers is newer than they know; once per
            process.
    """
    if isinstance(model, Host):
        return model
    if Version(transformers.__version__) < Version(OLDEST_TRANSFORMERS):
        raise HostLibraryError(
            f"trimtab needs transformers {OLDEST_TRANSFORMERS} or newer (the public mm_encoder_outputs argument), but "
            f"{transformers.__version__} is installed. Run: pip install -U transformers"
        )
    warn_of_untested_release()
    inner = _inside_peft(model)
    if reason := _why_not(inner):
        raise UnsupportedModelError(reason)
    if _model_type(inner) not in FAMILIES:
        _warn_of_untested_family(type(inner).__name__, _model_type(inner))
    return Host(
        model=inner,
        base=inner.base_model,
        family=FAMILIES.get(_model_type(inner), Family(type(inner).__name__)),
        modalities=_modalities(inner),
        forward_names=_forward_names(inner),
    )


@cache
def _warn_of_untested_family(name: str, model_type: str) -> None:
    warnings.warn(
        f"{name} ({model_type}) has what trimtab needs, but its family is not among those whose identities the tests "
        "hold. Compare a short run with keep_ratio=1, isolator_tokens=0, slow_ratio=1, kl_weight=0 to plain training "
        "before you trust it: the losses must be equal.",
        TrimtabWarning,
        stacklevel=3,
    )


def _forward_names(model: Any) -> frozenset[str]:
    names = set(inspect.signature(type(model).forward).parameters)
    if model.base_model is model:  # what the forward does not name goes on to the language model with its head
        names |= {"logits_to_keep"} & set(inspect.signature(type(model.get_decoder()).forward).parameters)
    return frozenset(names)


def _output_embeddings(model: Any) -> Any:
    own = model.get_output_embeddings()
    inside = model.get_decoder() if own is None and model.base_model is model else model
    return own if inside is model else inside.get_output_embeddings()


def _inside_peft(model: Any) -> Any:
    model = getattr(model, "_orig_mod", model)  # what torch.compile returns
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _model_type(model: Any) -> str:
    return str(getattr(getattr(model, "config", None), "model_type", ""))


def _modalities(model: Any) -> tuple[Modality, ...]:
    found = []
    for name in ("image", "video"):
        encoder = f"get_{name}_features"
        tokens = _token_ids(model, name)
        shared = name == "video" and not hasattr(model.base_model, encoder) and _takes(model, "pixel_values_videos")
        if shared:  # a family whose image encoder encodes videos too
            encoder = "get_image_features"
        if not (tokens and hasattr(model.base_model, encoder)):
            continue
        parameters = tuple(
            name
            for name, argument in inspect.signature(getattr(model.base_model, encoder)).parameters.items()
            if argument.kind is not inspect.Parameter.VAR_KEYWORD and not name.startswith("vision_feature")
        )
        arguments = tuple(f"{one}_videos" for one in parameters) if shared else parameters
        mask = f"{name}_compression_mask"
        known = mask if _takes(model, mask) else None
        found.append(Modality(name, encoder, arguments, parameters, tokens, _span(model, name), known))
    return tuple(found)


def _video_placeholder(model: Any) -> str:
    family = FAMILIES.get(_model_type(model))
    return "own" if family is None else family.video_placeholder


def _span(model: Any, modality: str) -> tuple[int, int] | None:
    if modality != "video" or _video_placeholder(model) != "span":
        return None
    return int(model.config.video_start_token_id), int(model.config.video_end_token_id)


def _takes(model: Any, argument: str) -> bool:
    return argument in inspect.signature(type(model).forward).parameters


def _token_ids(model: Any, modality: str) -> tuple[int, ...]:
    if modality == "video" and _video_placeholder(model) == "none":
        return ()
    if modality == "video" and _video_placeholder(model) != "own":
        modality = "image"
    for name in (f"{modality}_token_id", f"{modality}_token_index"):
        if (token := getattr(model.config, name, None)) is not None:
            return (int(token),)
    return ()


def _why_not(model: Any) -> str:
    name = type(model).__name__
    remedy = f"The nearest supported class is {_nearest(name, _model_type(model))}; trimtab.anatomy.FAMILIES has all."
    if not isinstance(model, transformers.PreTrainedModel):
        return f"{name} is not a model of transformers. {remedy}"
    if reason := REFUSED.get(_model_type(model)):
        return f"{name} is not supported: {reason} {remedy}"
    if getattr(model.config, "is_encoder_decoder", False):
        return f"{name} lacks a decoder that takes visual tokens: it is an encoder-decoder. {remedy}"
    lacks = []
    if "mm_encoder_outputs" not in inspect.signature(type(model).forward).parameters:
        lacks.append("a forward that takes mm_encoder_outputs")
    if not hasattr(model.base_model, "get_image_features"):
        lacks.append("get_image_features")
    if not _token_ids(model, "image"):
        lacks.append("config.image_token_id")
    if _output_embeddings(model) is None:
        lacks.append("a language-model head (load the ...ForConditionalGeneration class)")
    if not lacks:
        return ""
    return f"{name} lacks {' and '.join(lacks)}, so its visual tokens cannot be pruned. {remedy}"


def _nearest(name: str, model_type: str) -> str:
    """The supported class to take instead: the one that the table names, or the one with the most similar name."""
    stems = {family.name.split("For")[0]: family.name for family in FAMILIES.values()}
    close = difflib.get_close_matches(name.split("For")[0], sorted(stems), n=1)
    return NEAREST.get(model_type) or (stems[close[0]] if close else FAMILIES["llava"].name)
