"""From a user's batch to the arguments of a step's student, with the pass of its teacher on the way."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from trimtab.anatomy import full_inputs, has_images, read_rows
from trimtab.anatomy.blank import encode_blank
from trimtab.anatomy.encode import EncodedImages
from trimtab.anatomy.packed_attention import inside_pack
from trimtab.anatomy.row_layout import NOTES, RowLayout, clean_labels
from trimtab.dualspeed.cache_keys import ENTRY
from trimtab.dualspeed.fast_view import KeptTokens
from trimtab.dualspeed.inside import INSIDE
from trimtab.dualspeed.ranks import share_step
from trimtab.dualspeed.schedule import Mode
from trimtab.dualspeed.step import Step, values_of_rows
from trimtab.dualspeed.view import FastView
from trimtab.errors import TrimtabWarning
from trimtab.ops.label_head import IGNORED, states_at_labels
from trimtab.shapes import Float, Tensor

Prefix = Callable[[], "Float[Tensor, 'prefix width'] | None"]
NO_IMAGES = EncodedImages(outputs={}, counts={}, blocks=[], tiles=[], grid=None, filler=[])


class StepMaker:
    """Makes the steps of one model under one config.

    Args:
        view: The pruned view.
        isolator: Returns the isolator's rows, or None where there is no isolator; to be called once per view.
        has_isolator: Whether it returns any.
    """

    def __init__(self, view: FastView, isolator: Prefix, has_isolator: bool) -> None:
        self.view = view
        self.host = view.host
        self.config = view.config
        self.isolator = isolator
        self.has_isolator = has_isolator
        self.lockstep = False
        """Whether all processes must call the same modules."""
        self._warned_labels = False

    def make(self, modes: Sequence[Mode], inputs: dict[str, Any], draw: int, *, mixed: bool) -> dict[str, Any]:
        """Turn the user's arguments into those of the student.

        Args:
            modes: The mode of each row.
            inputs: Arguments of the model, by name; changed.
            draw: Number of the step, for pruners that draw.
            mixed: Whether modes are drawn row by row.

        Returns:
            Arguments of the student, and under ``"step"`` what the loss will need (`Step`).
        """
        every: Mode = "slow" if "slow" in modes else "fast"
        step = Step("mixed" if mixed else every, items=inputs.pop("num_items_in_batch", None))
        step.tokens_full = step.tokens_kept = 0
        step.as_tuple = inputs.pop("return_dict", None) is False
        inputs.setdefault("use_cache", False)
        if "logits_to_keep" in self.host.forward_names:
            inputs["logits_to_keep"] = 1
        slow = [row for row, mode in enumerate(modes) if mode == "slow"]
        if self.lockstep:
            step.shared, step.slow_rows = self._share(inputs, slow), slow
        if has_images(inputs):
            student = self._with_images(step, inputs, slow, draw)
        else:
            student = self._text_only(step, inputs, slow)
        step.labels, step.inside = student["labels"], student.pop(INSIDE, None)
        if self.view.inside is not None:
            self._note_deep(step)
        return {**student, "labels": None, "step": step}

    def _with_images(self, step: Step, inputs: dict[str, Any], slow: list[int], draw: int) -> dict[str, Any]:
        encoded, layout = self.view.encode(inputs, slow)
        inputs.pop(ENTRY, None)
        inputs["labels"] = self._clean(inputs["labels"], layout)
        step.label_counts = layout.labels
        sizes = [block.shape[0] for block in encoded.blocks]
        step.tokens_full = step.tokens_kept = sum(sizes)
        every = len(slow) == len(layout.lengths)
        teaches = self._teaches(step, slow)
        # In step with processes that have fast rows, a batch of slow ones takes the same way.
        joins = step.shared is not None and step.mode == "mixed"
        kept = None
        if not every or teaches or joins:
            kept = self.view.choose(inputs, encoded, layout, draw)
        if step.shared is None:
            step.slow_rows = slow if kept is None else self._rows_that_lose(slow, kept, sizes, layout)
        if teaches:
            assert kept is not None
            step.teacher = self._teach(step, inputs, encoded, layout, kept)
        if every and not self.config.packing and not joins:
            return full_inputs(self.host, inputs, encoded)
        shown = _whole(encoded, layout, slow, kept)
        step.tokens_kept = shown.count
        return self.view.shorten(inputs, encoded, layout, shown, self.isolator(), whole=slow)

    def _note_deep(self, step: Step) -> None:
        """Note how many visual tokens reach the last layer."""
        assert self.view.inside is not None
        counts = [] if step.inside is None else step.inside.counts
        deep = self.view.inside.deep_count(counts)
        step.tokens_deep = None if deep is None or step.tokens_kept is None else step.tokens_kept - sum(counts) + deep

    def _text_only(self, step: Step, inputs: dict[str, Any], slow: list[int]) -> dict[str, Any]:
        layout = read_rows(self.host, inputs, None)
        inputs["labels"] = self._clean(inputs["labels"], layout)
        inputs.pop(NOTES, None)
        inputs.pop(ENTRY, None)
        step.label_counts = layout.labels
        if step.shared is not None and step.shared.visual:
            self._keep_pace(step, inputs, layout, slow)
        if not self.config.packing:
            return inputs
        return self.view.shorten(inputs, NO_IMAGES, layout, KeptTokens([], []), None)

    # the teacher ----------------------------------------------------------------------------------------------------

    def _teaches(self, step: Step, slow: list[int]) -> bool:
        if self.config.kl_weight == 0:
            return False
        return bool(slow) if step.shared is None else step.shared.slow

    def _rows_that_lose(self, slow: list[int], kept: KeptTokens, sizes: list[int], layout: RowLayout) -> list[int]:
        """The slow rows whose pruned view differs from the full one."""
        inside = self.view.inside is not None
        cut = {
            row
            for row, size, index in zip(layout.block_rows, sizes, kept.index, strict=True)
            if index.shape[0] < size or (inside and size)
        }
        return [row for row in slow if row in cut]

    def _teach(
        self, step: Step, inputs: dict[str, Any], encoded: EncodedImages, layout: RowLayout, kept: KeptTokens
    ) -> Tensor | None:
        """Return the states of the pruned view at the labels of the slow rows, or None where it would teach nothing."""
        rows = [row for row in step.slow_rows if layout.lengths[row]]
        if not rows and step.shared is None:
            return None
        # A process without slow rows goes along with the others, and learns nothing from its first row that is not
        # empty. Audio cannot be shared out over some rows of a batch.
        first = next((row for row, length in enumerate(layout.lengths) if length), 0)
        every = list(range(len(layout.lengths)))
        heard = any(inputs.get(name) is not None for name in self.host.audio_names)
        seen = every if heard else rows or [first]
        with torch.set_grad_enabled(self.config.distillation == "two_way"):
            chosen = None if seen == every else seen
            view = self.view.shorten(inputs, encoded, layout, kept, self.isolator(), rows=chosen)
            states = self._states(view, sum(layout.labels[row] for row in seen))
        # Under a caller's autocast, older releases of torch keep the weights that were cast without gradients, and the
        # student would train none of them.
        torch.clear_autocast_cache()
        if seen == rows:
            return states
        return values_of_rows(states, [layout.labels[row] for row in seen], [seen.index(row) for row in rows])

    def _states(self, view: dict[str, Any], count: int) -> Tensor:
        """Return the states of a view at its labels, of which there are so many."""
        labels, rows = view.pop("labels"), view.pop(INSIDE, None)
        view.pop("logits_to_keep", None)
        inside = contextlib.nullcontext() if self.view.inside is None else self.view.inside.active(rows, labels)
        with inside_pack(self.config.packing), inside:
            hidden = self.host.last_states(view)
        return states_at_labels(hidden, labels, count)[0]

    # parts ----------------------------------------------------------------------------------------------------------

    def _share(self, inputs: Mapping[str, Any], slow: list[int]) -> Any:
        kinds = [inputs.get(kind.pixels) is not None for kind in self.host.modalities]
        per_row = (inputs["labels"] != IGNORED).sum(1)
        return share_step(kinds, per_row, slow)

    def _keep_pace(self, step: Step, inputs: dict[str, Any], layout: RowLayout, slow: list[int]) -> None:
        """Call the modules that other processes call for their images, though this batch has none."""
        embeddings = self.host.model.get_input_embeddings()
        with self.view.serving():
            blank = encode_blank(self.host, inputs["input_ids"].device)
        teaches = self._teaches(step, slow)
        chooses = teaches or step.mode != "slow"
        if "text" in self.view.pruner.needs and chooses:
            with torch.no_grad():
                embeddings(inputs["input_ids"])
        if teaches:
            view = self.view.shorten(inputs, NO_IMAGES, layout, KeptTokens([], []), None)
            with torch.no_grad():
                self.isolator()  # gathered here, as for a view with images
                step.teacher = values_of_rows(self._states(view, sum(layout.labels)), layout.labels, slow)
        if step.mode != "slow" and self.has_isolator:  # behind the teacher's pass, as for a view with images
            prefix = self.isolator()
            assert prefix is not None
            blank = blank + prefix.sum()
        # With weight zero the blank image enters where features do, so that the backward pass goes the same way too.
        step.pace = embeddings.register_forward_hook(lambda module, args, output: output + 0 * blank.to(output.dtype))

    def _clean(self, labels: Tensor, layout: RowLayout) -> Tensor:
        if layout.labelled and not self._warned_labels:
            self._warned_labels = True
            warnings.warn(
                f"{layout.labelled} labels of this batch stand on image placeholders. They are ignored (-100) in every "
                "step, since pruning would change their number; mask them in the collator so that token counts agree "
                "(trimtab.data.MaskPlaceholders does).",
                TrimtabWarning,
                stacklevel=2,
            )
        return clean_labels(labels, layout.real, layout.placeholder)


def _whole(encoded: EncodedImages, layout: RowLayout, slow: list[int], kept: KeptTokens | None) -> KeptTokens:
    """What a student sees whose slow rows keep everything."""
    if kept is not None and not slow:
        return kept
    rows = set(slow)
    full = [row in rows for row in layout.block_rows]
    every = [torch.arange(block.shape[0], device=block.device) for block in encoded.blocks]
    if kept is None:
        return KeptTokens(every, list(encoded.blocks))
    return replace(
        kept,
        index=[every[b] if whole else kept.index[b] for b, whole in enumerate(full)],
        tokens=[encoded.blocks[b] if whole else kept.tokens[b] for b, whole in enumerate(full)],
    )
