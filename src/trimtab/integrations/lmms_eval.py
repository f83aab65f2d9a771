"""lmms-eval on pruned tokens: a model class that lmms-eval finds by its entry point.

With both packages installed, ``lmms-eval --model trimtab_pruned --model_args pretrained=out --tasks mme`` evaluates the
DualSpeed run in ``out`` on the tokens that its fast mode sees. Full images need nothing from here: an exported
checkpoint is an ordinary one for lmms-eval's own ``huggingface`` model.

What lmms-eval asks of a plug-in, read in its version 0.7.2 (commit 75571cf, 6 August 2026): an entry point in the group
``lmms_eval.models`` that gives a ``ModelManifest`` with the dotted path of a class; the class derives from
``lmms_eval.api.model.lmms``, has ``is_simple = False`` for chat messages, takes ``batch_size``, ``max_batch_size`` and
``device`` beside its ``--model_args``, and answers ``generate_until`` for requests whose ``args`` are (context,
doc_to_messages, generation settings, doc_id, task, split). The document is ``self.task_dict[task][split][doc_id]``.

The class, `TrimtabPruned`, is made when it is asked for, so that nothing here needs lmms-eval to be installed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

from trimtab.dualspeed.config import DualSpeedConfig
from trimtab.errors import DataError, MissingExtraError, SettingError, UnsupportedModelError, near_miss, setting_error

MODEL_NAME = "trimtab_pruned"
CLASS_NAME = "TrimtabPruned"
_FEW_SHOT_DELIMITER = "\n\n"


def manifest() -> Any:
    """Return the ``ModelManifest`` of lmms-eval for this module; the entry point calls it."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(model_id=MODEL_NAME, chat_class_path=f"{__name__}.{CLASS_NAME}")


def __getattr__(name: str) -> Any:
    """Make the model class when it is asked for (PEP 562)."""
    if name != CLASS_NAME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return _model_class()


@cache
def _model_class() -> type:
    try:
        from lmms_eval.api.model import lmms
    except ImportError as error:
        raise MissingExtraError(
            f"{CLASS_NAME} needs the package lmms_eval ({error}). Install it in the environment that evaluates: pip "
            "install lmms-eval"
        ) from error

    class TrimtabPruned(_PrunedModel, lmms):
        """The pruned model as lmms-eval sees it; see `_PrunedModel`."""

    TrimtabPruned.__module__, TrimtabPruned.__qualname__ = __name__, CLASS_NAME
    return TrimtabPruned


class _PrunedModel:
    """Answers of a model that sees pruned visual tokens.

    Args:
        pretrained: Output directory of a run, an exported checkpoint, or a hub name.
        dualspeed: Directory with ``dualspeed.json`` and the isolator; by default that of `pretrained` where it has one.
        keep_ratio: Share of visual tokens to keep, in place of the run's; needed where there is no run.
        pruner: Name of the pruner, in place of the run's.
        batch_size: Prompts per batch, at least 1. Within one, prompts with equally many images are answered together.
        device: Where the model lives; by default where accelerate puts it.
        dtype: Number format of the weights, as in a run file.
        attn_implementation: Attention of transformers, or None.
        system_prompt: Text, or a file with it, in front of every conversation.
        max_batch_size: Taken because lmms-eval may give it; batches have `batch_size` prompts.
        others: Nothing else is taken.

    Raises:
        SettingError: A name or value that is not taken, or no settings of pruning.
    """

    is_simple = False

    def __init__(
        self,
        pretrained: str,
        dualspeed: str | None = None,
        keep_ratio: float | None = None,
        pruner: str | None = None,
        batch_size: int | str = 1,
        device: str | None = None,
        dtype: str = "auto",
        attn_implementation: str | None = None,
        system_prompt: str | None = None,
        max_batch_size: int | None = None,
        **others: Any,
    ) -> None:
        super().__init__()
        known = ("pretrained", "dualspeed", "keep_ratio", "pruner", "dtype", "attn_implementation", "system_prompt")
        for name in others:
            raise SettingError(f"{MODEL_NAME} has no model_args {name!r}. {near_miss(name, known)}")
        if not str(batch_size).isdecimal() or int(batch_size) < 1:
            raise setting_error(MODEL_NAME, "batch_size", "a whole number, at least 1", batch_size)
        from accelerate import Accelerator

        from trimtab.dualspeed import prune_for_inference
        from trimtab.run.load import load_to_use

        config, isolator = _settings(pretrained, dualspeed, {"keep_ratio": keep_ratio, "pruner": pruner})
        self.accelerator = Accelerator()
        self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
        self.device = self.accelerator.device if device is None or self._world_size > 1 else device
        self.batch_size = int(batch_size)
        self._system_prompt = system_prompt and type(self)._resolve_system_prompt(system_prompt)  # type: ignore[attr-defined]
        model, self.processor = load_to_use(pretrained, dtype=dtype, attn_implementation=attn_implementation)
        self.model = model.to(self.device).eval()
        self.pruned = prune_for_inference(self.model, config, isolator)
        self.tokenizer = getattr(self.processor, "tokenizer", self.processor)
        self.tokenizer.padding_side = "left"

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """Answer every request; documents are read, and their images let go, batch by batch.

        Answers end at the texts in ``until``, except at an empty line alone: that is the delimiter lmms-eval sets
        where a task names none, and its own chat models do not end there.
        """
        from rich.progress import track

        answers = [""] * len(requests)
        for numbers in track(
            _batches(requests, self.batch_size), "Answering on pruned tokens", disable=self._rank != 0
        ):
            prompts = {number: self._read(requests[number]) for number in numbers}
            for count in sorted({len(prompt["images"]) for prompt in prompts.values()}):
                alike = [number for number in numbers if len(prompts[number]["images"]) == count]
                for number, answer in zip(alike, self._answer([prompts[number] for number in alike]), strict=True):
                    answers[number] = answer
        return answers

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """Refuse: as lmms-eval's own chat models, this one generates only."""
        raise NotImplementedError(
            f"{MODEL_NAME} answers generate_until only, no loglikelihood (multiple_choice) task. Choose the generating "
            "variant of the task."
        )

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[str]:
        """Refuse: there is one round only."""
        raise NotImplementedError(f"{MODEL_NAME} answers one round only. Choose a task of output_type generate_until.")

    def clean(self) -> None:
        """Take the pruning off, then free the model as lmms-eval does."""
        self.pruned.detach()
        del self.pruned
        super().clean()  # type: ignore[misc]

    def _read(self, request: Any) -> dict[str, Any]:
        from lmms_eval.protocol import ChatMessages

        _, to_messages, settings, doc_id, task, split = request.args
        messages = to_messages(self.task_dict[task][split][doc_id])  # type: ignore[attr-defined]
        if self._system_prompt:
            messages = self._apply_system_prompt(messages, self._system_prompt)  # type: ignore[attr-defined]
        chat = ChatMessages(messages=messages)
        images, videos, audios = chat.extract_media()
        if videos or audios:
            raise UnsupportedModelError(
                f"Document {doc_id} of the task {task!r} holds video or audio, but {MODEL_NAME} takes images only. "
                "Choose an image task."
            )
        text = self.processor.apply_chat_template(chat.to_hf_messages(), tokenize=False, add_generation_prompt=True)
        return {"text": text, "images": images, "settings": settings}

    def _answer(self, batch: list[dict[str, Any]]) -> list[str]:
        images = {"images": [one["images"] for one in batch]} if batch[0]["images"] else {}
        given = self.processor(text=[one["text"] for one in batch], **images, padding=True, return_tensors="pt")
        given = given.to(self.device, self.model.dtype)
        settings = batch[0]["settings"]
        made = self.model.generate(**given, generation_config=self._generation(settings))
        said = self.tokenizer.batch_decode(made[:, given["input_ids"].shape[1] :], skip_special_tokens=True)
        answers = [_cut(one, settings.get("until")) for one in said]
        for one, answer in zip(batch, answers, strict=True):
            self.cache_hook.add_partial("generate_until", (one["text"], settings), answer)  # type: ignore[attr-defined]
        return answers

    def _generation(self, settings: dict[str, Any]) -> Any:
        from transformers import GenerationConfig

        temperature = settings.get("temperature") or 0
        end = self.model.generation_config.eos_token_id
        end = self.tokenizer.eos_token_id if end is None else end
        pad = self.tokenizer.pad_token_id
        chosen = {"temperature": float(temperature), "top_p": settings.get("top_p") or 1.0} if temperature > 0 else {}
        return GenerationConfig(
            **{"temperature": 1.0, "top_p": 1.0, "top_k": 50, **chosen},
            do_sample=temperature > 0,
            num_beams=settings.get("num_beams") or 1,
            max_new_tokens=settings.get("max_new_tokens") or 1024,
            eos_token_id=end,
            pad_token_id=pad if pad is not None else (end[0] if isinstance(end, list) else end),
        )


def _settings(pretrained: str, dualspeed: str | None, overrides: dict[str, Any]) -> tuple[DualSpeedConfig, Path | None]:
    """Return the settings of pruning and the place of the isolator, or None for none."""
    from trimtab.dualspeed.inference import saved_settings, settings_folder

    given = {name: value for name, value in overrides.items() if value is not None}
    if dualspeed is not None or settings_folder(pretrained) is not None:
        config, folder = saved_settings(pretrained if dualspeed is None else dualspeed)
        return replace(config, **given), folder if config.isolator_tokens else None
    if "keep_ratio" not in given:
        raise SettingError(
            f"{pretrained!r} holds no settings of DualSpeed, so {MODEL_NAME} needs dualspeed=DIRECTORY of the run, or "
            "keep_ratio=0.1 to prune a model without an isolator."
        )
    return DualSpeedConfig(isolator_tokens=0, **given), None


def _batches(requests: Sequence[Any], size: int) -> list[list[int]]:
    """Part the numbers of requests into batches with the same generation settings."""
    kinds: dict[str, list[int]] = {}
    for number, request in enumerate(requests):
        kinds.setdefault(repr(sorted(request.args[2].items())), []).append(number)
    return [kind[first : first + size] for kind in kinds.values() for first in range(0, len(kind), size)]


def _cut(answer: str, until: str | Sequence[str] | None) -> str:
    """End an answer where the first of some texts begins."""
    if until is not None and not isinstance(until, (str, list, tuple)):
        raise DataError(f"until must be a text or a list of texts, but {until!r} came. Look at the task's settings.")
    for text in [until] if isinstance(until, str) else until or []:
        if text and text != _FEW_SHOT_DELIMITER:
            answer = answer.partition(text)[0]
    return answer
