"""Pruned inference: keep pruner and isolator after training, for users who want cheap answers too.

DualSpeed trains for full images; this is the other choice. Two things are put on the model and taken off again by
`PrunedInference.detach`:

- hooks on the outermost module, for calls of the model itself;
- an attribute ``generate`` on the instance (the class keeps its own). Hooks alone cannot do this part: transformers
  encodes the images of `generate` before it calls the model, so a pruner could observe nothing of the vision tower,
  and it derives masks, positions, cache sizes and the cuts of speculative decoding from the length of the prompt,
  which would then be longer than what the cache holds. Shortening the prompt first keeps all of them in agreement.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import Cache

from trimtab.anatomy import Host, has_images, open_host
from trimtab.anatomy.drop_record import record_of
from trimtab.dualspeed.attach import SIDE_FILE, DualSpeedHandle
from trimtab.dualspeed.config import DualSpeedConfig
from trimtab.dualspeed.inside import DropsInside, InsideRows
from trimtab.dualspeed.isolator import ModeIsolator, fresh_isolator
from trimtab.dualspeed.view import FastView, by_name
from trimtab.errors import NotSupportedError, SettingError, WrongOrderError, setting_error
from trimtab.files import read_json
from trimtab.shapes import Int, Tensor

_LENGTHS = ("max_length", "min_length")
"""Settings of `generate` that count the prompt."""

_RECORD = "_trimtab_prompt"
"""Attribute of a cache that holds a pruned prompt."""


def prune_for_inference(
    model: Any,
    source: DualSpeedHandle | DualSpeedConfig | str | Path,
    isolator_from: str | Path | None = None,
) -> PrunedInference:
    """Let a model in evaluation mode see pruned visual tokens, behind the isolator that was trained with it.

    From now on ``model(**batch)`` and ``model.generate(**batch)`` with images use the fast view of the batch. In
    training mode, without images, and with ``mm_encoder_outputs`` (features that were encoded before) both are as
    they were. `generate` returns the whole prompt that came, then the new tokens, so that
    ``out[:, input_ids.shape[1]:]`` is the answer as always. With `inside` tokens leave inside the language model as
    well, by the attention of the last place of each prompt where attention decides.

    Args:
        model: A vision-language model of transformers, also inside PEFT or ``torch.compile``; give the module that is
            called.
        source: The handle of `attach` on the same model, whose isolator is then used as it is; or the directory of a
            finished run (or its ``dualspeed`` folder), with settings and isolator; or the settings alone.
        isolator_from: With settings alone the directory or file of the isolator; ``config.isolator_from`` by default.

    Returns:
        The handle, also a context manager; `PrunedInference.detach` gives the model back as it was.

    Raises:
        UnsupportedModelError: The model lacks what it takes.
        SettingError: No isolator is named though the settings have one, it does not fit, or the pruner needs what
            the model cannot supply.
        OutputError: There is no isolator at the place that was named.
        NotSupportedError: Tokens cannot leave inside this model.
        WrongOrderError: The model is pruned for inference already, or tokens leave inside it already.
    """
    # What torch.compile returns keeps no attributes itself: it hands them to the model inside, and calls its hooks.
    model = getattr(model, "_orig_mod", model)
    host = open_host(model)
    if isinstance(source, DualSpeedHandle):
        if source._host.model is not host.model:
            raise SettingError(
                "The handle belongs to another model. Give the model that it was attached to, or a DualSpeedConfig "
                "with isolator_from."
            )
        if isolator_from is not None:
            raise setting_error(
                "prune_for_inference", "isolator_from", "None beside a handle, whose own isolator is used",
                str(isolator_from),
            )  # fmt: skip
        return PrunedInference(model, host, source.config, source.isolator, source._view.inside)
    if isinstance(source, DualSpeedConfig):
        config, place = source, isolator_from or source.isolator_from
    elif isinstance(source, (str, Path)):
        config, folder = saved_settings(source)
        place = isolator_from or (folder if config.isolator_tokens else None)
    else:
        raise setting_error(
            "prune_for_inference",
            "source",
            "the handle of attach, a DualSpeedConfig, or the directory of a run",
            source,
        )
    return PrunedInference(model, host, config, _load_isolator(host, config, place))


def saved_settings(directory: str | Path) -> tuple[DualSpeedConfig, Path]:
    """Return the settings that a run was trained with, and the folder with its isolator.

    Args:
        directory: The output directory or a checkpoint in it, or its ``dualspeed`` folder.

    Raises:
        SettingError: There is no ``dualspeed.json``.
        DataError: It cannot be read.
    """
    folder = settings_folder(directory)
    if folder is not None:
        config = DualSpeedConfig.from_dict(read_json(folder / SIDE_FILE)["config"])
        return replace(config, isolator_from=None), folder
    raise SettingError(
        f"{str(directory)!r} holds no {SIDE_FILE}, neither itself nor in a folder 'dualspeed'. Give the output "
        "directory of a DualSpeed run, or a DualSpeedConfig."
    )


def settings_folder(directory: str | Path) -> Path | None:
    """Return where ``dualspeed.json`` lies, in the directory or in its folder ``dualspeed``; None for nowhere."""
    folders = (Path(directory), Path(directory) / "dualspeed")
    return next((folder for folder in folders if (folder / SIDE_FILE).is_file()), None)


class PrunedInference:
    """Pruned inference on one model; made by `prune_for_inference`, a context manager that ends with `detach`.

    While it lasts ``vars(model)`` holds ``generate``. ``save_pretrained`` and ``state_dict`` are untouched. A deep copy
    of the model is pruned by a copy of this handle, which nothing but the copy's own hooks refer to.

    Attributes:
        config: The settings; `pruner`, `keep_ratio`, `positions` and the like, not those of training.
        isolator: The rows in front of every pruned image, or None with ``isolator_tokens=0``.
    """

    def __init__(
        self,
        model: Any,
        host: Host,
        config: DualSpeedConfig,
        isolator: ModeIsolator | None,
        inside: DropsInside | None = None,
    ) -> None:
        if isinstance(getattr(vars(model).get("generate"), "__self__", None), PrunedInference):
            raise WrongOrderError(
                f"This {type(model).__name__} is pruned for inference already. Call detach() on its handle first."
            )
        self._model = model
        self._view = FastView(host, config)
        self._borrowed = inside
        self._view.inside = DropsInside(host, config) if inside is None and config.inside is not None else inside
        self._leaving: InsideRows | None = None
        """What may leave inside of the prompt that was shortened last, until it is used."""
        self._entered = False
        self.config = config
        self.isolator = isolator
        self._pending: _Prompt | None = None
        self._stock = model.generate
        self._own = vars(model).get("generate")
        self._hooks = [
            model.register_forward_pre_hook(self._before, with_kwargs=True),
            model.register_forward_hook(self._after, always_call=True),
        ]
        model.generate = self._generate

    def __enter__(self) -> PrunedInference:
        return self

    def __exit__(self, *error: object) -> None:
        self.detach()

    def detach(self) -> None:
        """Give the model back as it was before; calling it again does nothing."""
        if not self._hooks:
            return
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        if self._view.inside is not None and self._borrowed is None:
            self._view.inside.detach()
        vars(self._model).pop("generate", None)
        if self._own is not None:
            self._model.generate = self._own

    def prune_inputs(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Return the fast view of a batch: pruned features behind the isolator.

        Args:
            batch: Arguments of the model, with or without labels.

        Returns:
            Arguments of the model (and of its ``generate``), for whoever needs the shortened ``input_ids``, masks
            and positions. They pass the hooks as they are.
        """
        if not has_images(batch):
            return dict(batch)
        if batch.get("input_ids") is None:
            raise SettingError("input_ids must be given beside images: their placeholders show where the images stand.")
        cache = batch.get("past_key_values")
        if cache is not None and cache.get_seq_length():
            raise WrongOrderError(
                "Images came together with past_key_values that are filled already. Pruned inference takes images in "
                "the first call only: give the whole conversation with all its images, and no cache."
            )
        rows = None if self.isolator is None else self.isolator.rows.to(batch["input_ids"].device)
        short, self._leaving = self._view.prune(batch, rows, 0)
        return short

    # hooks ------------------------------------------------------------------------------------------------------

    def _before(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self._pending = None
        if module.training:
            return None
        inputs = by_name(self._view.host, args, kwargs)
        if has_images(inputs):
            short = self.prune_inputs(inputs)
            self._pending = _Prompt.of(inputs["input_ids"], short)
            self._enter(short)
            return (), short
        self._enter(inputs)
        prompt = _prompt_of(inputs.get("past_key_values"))
        return None if prompt is None else ((), prompt.follow(inputs))

    def _enter(self, inputs: Mapping[str, Any]) -> None:
        """Let tokens leave inside in a call with the prompt that was shortened last, or with a cache of such a one."""
        inside, ids = self._view.inside, inputs.get("input_ids")
        if inside is None:
            return
        rows = self._leaving
        if rows is not None and ids is not None and inputs.get("mm_encoder_outputs") is not None:
            copies, left = divmod(ids.shape[0], len(rows.counts))
            if copies and not left and ids.shape[1] == rows.visual.shape[1]:
                self._leaving, self._entered = None, True
                inside.enter(rows, None)  # which fits copies of the rows, as for beams
                return
        if record_of(inputs.get("past_key_values")) is not None:
            self._entered = True
            inside.drop.active = True

    def _after(self, module: Any, args: Any, output: Any) -> None:
        prompt, self._pending = self._pending, None
        if self._entered and self._view.inside is not None:
            self._entered = False
            self._view.inside.leave()
        if prompt is not None and output is not None:
            _remember(prompt, output.values() if isinstance(output, dict) else output)

    # generate ---------------------------------------------------------------------------------------------------

    def _generate(self, *args: Any, **kwargs: Any) -> Any:
        """Generate from the pruned prompt, and return the prompt that came with what was generated.

        Arguments and result are those of the model's own `generate`. Criteria, processors and streamers of the user
        see the shortened prompt; hidden states and attentions of the prompt are those of the shortened one.
        """
        # PEFT's own generate has no names for what comes by place, and hands it on.
        names = list(inspect.signature(type(self._view.host.model).generate).parameters)[1:]
        batch = {**dict(zip(names, args, strict=False)), **kwargs}
        if self._model.training:
            return self._stock(*args, **kwargs)
        if _prompt_of(batch.get("past_key_values")) is not None:
            raise WrongOrderError(
                "past_key_values came from pruned inference, so they hold fewer places than input_ids announce. Give "
                "the whole conversation with its images, and no cache."
            )
        if not has_images(batch):
            return self._stock(*args, **kwargs)
        generation_config = batch.pop("generation_config", None)
        if (inputs := batch.pop("inputs", None)) is not None:
            batch["input_ids"] = inputs
        if batch.get("attention_mask") is None and batch.get("input_ids") is not None and len(batch["input_ids"]) > 1:
            raise SettingError(
                "attention_mask must be given where several rows are generated from images: shortened rows differ in "
                "length, and the padding must be known. The processor returns it with padding=True."
            )
        if self._view.inside is not None and _chunks(batch, generation_config, self._view.host.model):
            raise NotSupportedError(
                f"{self._view.inside.owner} takes the prompt of generate() as a whole, but prefill_chunk_size is set. "
                "Leave it out, or set inside to None."
            )
        with torch.no_grad():
            short = self.prune_inputs(batch)
        ids, short_ids = batch["input_ids"], short["input_ids"]
        gap = ids.shape[1] - short_ids.shape[1]
        generation_config = self._count_without(gap, generation_config, short)
        if generation_config is not None:
            short["generation_config"] = generation_config
        made = self._stock(**short)
        _remember(_Prompt.of(ids, short), (batch.get("past_key_values"), getattr(made, "past_key_values", None)))
        if isinstance(made, Tensor):
            return _with_prompt(ids, made, short_ids.shape[1])
        made.sequences = _with_prompt(ids, made.sequences, short_ids.shape[1])
        return made

    def _count_without(self, gap: int, config: Any, arguments: dict[str, Any]) -> Any:
        """Lower the lengths that count the prompt by what it lost; returns the generation config to use."""
        own = getattr(self._view.host.model, "generation_config", None)
        given = copy.deepcopy(config)
        target = arguments if given is None else vars(given)
        places = [arguments, *(vars(one) for one in (given, own) if one is not None)]
        self._refuse_short(gap + arguments["input_ids"].shape[1], places)
        for name in _LENGTHS:
            place = next((place for place in places if place.get(name)), None)
            if place is not None:
                (arguments if place is arguments else target)[name] = max(place[name] - gap, 0)
        return given

    def _refuse_short(self, width: int, places: list[dict[str, Any]]) -> None:
        """Refuse a length that the prompt fills already, in the numbers of the prompt that came."""
        longest = next((place["max_length"] for place in places if place.get("max_length")), None)
        if longest is None or longest > width or any(place.get("max_new_tokens") for place in places):
            return
        raise setting_error(
            "generate", "max_length", f"above {width}, the tokens of the prompt, which it counts", longest,
            "Raise it, or give max_new_tokens instead.",
        )  # fmt: skip


@dataclass(frozen=True)
class _Prompt:
    """What a cache that holds a pruned prompt must know, so that later steps fit it.

    Attributes:
        width: Places of the prompt that came.
        mask: Real places of the shortened one, [row, seq].
        following: Position of the place after it, [row, 1] or [axis, row, 1]; None where the model counts itself.
    """

    width: int
    mask: Int[Tensor, "row seq"]
    following: Tensor | None

    @classmethod
    def of(cls, ids: Int[Tensor, "row full"], short: Mapping[str, Any]) -> _Prompt:
        mask, positions = short.get("attention_mask"), short.get("position_ids")
        return cls(
            width=ids.shape[1],
            mask=torch.ones_like(short["input_ids"]) if mask is None else mask,
            following=None if positions is None else positions[..., -1:] + 1,
        )

    def follow(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Return the arguments of a later step with a mask as long as the cache and positions that go on.

        A mask that counts the prompt that came is shortened; one of another length, and positions that were given,
        stay as they are.
        """
        step: dict[str, Any] = dict(inputs)
        name = "input_ids" if inputs.get("input_ids") is not None else "inputs_embeds"
        rows, new = inputs[name].shape[:2]
        short = self.mask.shape[1]
        later = int(inputs["past_key_values"].get_seq_length()) - short
        mask = inputs.get("attention_mask")
        if mask is None:
            mask = self.mask.new_ones(rows, self.width + later + new)
        if mask.dim() == 2 and mask.shape[1] == self.width + later + new:
            step["attention_mask"] = torch.cat((self.mask.to(mask), mask[:, self.width :]), 1)
        if self.following is not None and inputs.get("position_ids") is None:
            step["position_ids"] = self.following + torch.arange(later, later + new, device=self.following.device)
        return step


def _remember(prompt: _Prompt, parts: Iterable[Any]) -> None:
    """Note a prompt on the caches that hold it, so that their copies know it too."""
    for part in parts:
        if isinstance(part, Cache):
            vars(part)[_RECORD] = prompt


def _prompt_of(cache: Any) -> _Prompt | None:
    """Return the pruned prompt that a cache holds; one that was emptied since holds none, and forgets it."""
    prompt: _Prompt | None = vars(cache).get(_RECORD) if isinstance(cache, Cache) else None
    if prompt is None or cache.get_seq_length():
        return prompt
    del vars(cache)[_RECORD]
    return None


def _load_isolator(host: Host, config: DualSpeedConfig, place: str | Path | None) -> ModeIsolator | None:
    if config.isolator_tokens == 0:
        if place is not None:
            raise setting_error(
                "prune_for_inference", "isolator_from", "None with isolator_tokens=0, which puts no rows in front",
                str(place), "Set isolator_tokens to the number of its rows.",
            )  # fmt: skip
        return None
    if place is None:
        raise setting_error(
            "prune_for_inference", "isolator_from",
            f"the directory or file of a trained isolator with isolator_tokens={config.isolator_tokens}", None,
            "Rows that nobody trained would only disturb; for a model without an isolator set isolator_tokens=0.",
        )  # fmt: skip
    isolator = fresh_isolator(host, config.isolator_tokens, config.seed)
    isolator.load(Path(place))
    return isolator.requires_grad_(False)


def _chunks(arguments: Mapping[str, Any], config: Any, model: Any) -> bool:
    """Whether `generate` is to give the model a prompt in parts."""
    places = (arguments, *(vars(one) for one in (config, getattr(model, "generation_config", None)) if one is not None))
    return any(place.get("prefill_chunk_size") is not None for place in places)


def _with_prompt(ids: Int[Tensor, "row full"], made: Int[Tensor, "out seq"], short: int) -> Int[Tensor, "out longer"]:
    """Put the prompt that came in front of what was generated, for every sequence of a row."""
    prompt = ids.to(made.device).repeat_interleave(made.shape[0] // ids.shape[0], 0)
    return torch.cat((prompt, made[:, short:]), 1)
