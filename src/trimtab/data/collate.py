"""Rows in, a batch with labels out; and a wrapper that takes placeholders out of any collator's labels."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from trimtab.data.images import open_image
from trimtab.data.messages import to_messages
from trimtab.data.spans import lay_over, rendered_tokens, template_of
from trimtab.errors import DataError, SettingError, setting_error

TRAIN_ON = ("assistant", "last", "all")
EMPTY_LABELS = ("error", "count")
Row = Mapping[str, Any]


class SupervisedCollator:
    """Turn rows of conversations with images into a batch with labels.

    Each row passes through `to_messages`, so every known layout is taken. All rows go to the processor in one call
    and every image is processed once. Labels hold the answers and their end-of-turn tokens; where the chat template
    marks answers with ``{% generation %}``, exactly what it marks. Placeholders and padding are never supervised.

    Attributes:
        image_token_ids: The placeholder ids in use.
        unsupervised_rows: Rows without any supervised token so far (only with ``empty_labels="count"``). Worker
            processes of a DataLoader count in their own copy.
    """

    def __init__(
        self,
        processor: Any,
        *,
        image_token_ids: Iterable[int] | None = None,
        max_length: int | None = None,
        train_on: str = "assistant",
        ignore_index: int = -100,
        empty_labels: str = "error",
    ):
        """Check the settings.

        Args:
            processor: A transformers processor with a fast tokenizer and a chat template.
            image_token_ids: Placeholder ids; asked of the processor if None.
            max_length: Longest row in tokens, images included, or None. Text after the last image is cut on the
                right; a row that would be cut inside or before an image is an error.
            train_on: ``"assistant"`` (all answers), ``"last"`` (the last answer) or ``"all"`` (every token but
                placeholders and padding).
            ignore_index: Label of tokens that are not supervised.
            empty_labels: What to do with a row that has no supervised token left: ``"error"``, or ``"count"`` to
                keep it without labels.

        Raises:
            SettingError: A setting outside its range, or placeholder ids that the processor does not tell.
            DataError: The processor has no chat template.
        """
        owner = type(self).__name__
        if train_on not in TRAIN_ON:
            raise setting_error(owner, "train_on", f"one of {', '.join(TRAIN_ON)}", train_on)
        if empty_labels not in EMPTY_LABELS:
            raise setting_error(owner, "empty_labels", f"one of {', '.join(EMPTY_LABELS)}", empty_labels)
        if max_length is not None and (isinstance(max_length, bool) or max_length < 1):
            raise setting_error(owner, "max_length", "a whole number, at least 1, or None", max_length)
        if not getattr(processor.tokenizer, "is_fast", False):
            raise setting_error(owner, "processor", "one with a fast tokenizer", type(processor.tokenizer).__name__)
        template_of(processor)
        self.processor = processor
        self.image_token_ids = placeholder_ids(processor) if image_token_ids is None else tuple(image_token_ids)
        self.max_length = max_length
        self.train_on = train_on
        self.ignore_index = ignore_index
        self.empty_labels = empty_labels
        self.unsupervised_rows = 0

    def __call__(self, rows: Sequence[Row]) -> dict[str, Any]:
        """Build one batch.

        Args:
            rows: At least one row; an integer under ``"row"`` names it in error messages, else its place in the
                batch does.

        Returns:
            What the processor gives for the rows (``input_ids`` and ``attention_mask`` [batch, seq], the image
            inputs of the model) and ``labels`` [batch, seq].

        Raises:
            DataError: A row cannot be used, does not fit into `max_length`, or has no supervised token left.
        """
        if not rows:
            raise DataError("SupervisedCollator got no rows; a batch needs at least one.")
        names = [_name(row, place) for place, row in enumerate(rows)]
        clean = [to_messages(row, where=name) for row, name in zip(rows, names, strict=True)]
        images = [[_opened(image, name) for image in row["images"]] for row, name in zip(clean, names, strict=True)]
        texts = [self.processor.apply_chat_template(row["messages"], tokenize=False) for row in clean]
        batch = self._process(texts, images, names)
        labels = torch.full_like(batch["input_ids"], self.ignore_index)
        for place, (row, text, name) in enumerate(zip(clean, texts, names, strict=True)):
            real = batch["attention_mask"][place].nonzero().flatten()
            ids = batch["input_ids"][place, real]
            text_ids, mask = rendered_tokens(self.processor, row["messages"], text, self.train_on, name)
            chosen = torch.tensor(lay_over(ids.tolist(), text_ids, mask, set(self.image_token_ids), name))
            labels[place, real[chosen]] = ids[chosen]
        batch["labels"] = labels
        batch = self._shortened(batch, names)
        self._check_labels(batch["labels"], names)
        return batch

    def _process(self, texts: list[str], images: list[list[Any]], names: list[str]) -> dict[str, Any]:
        bos = self.processor.tokenizer.bos_token
        options: dict[str, Any] = {"add_special_tokens": False} if bos and texts[0].startswith(bos) else {}
        given = images if any(images) else None
        try:
            batch = self.processor(text=texts, images=given, padding=True, return_tensors="pt", **options)
        except (ValueError, TypeError, IndexError, RuntimeError, ZeroDivisionError) as cause:
            sizes = [[image.size for image in row] for row in images]
            raise DataError(
                f"{type(self.processor).__name__} cannot process the rows {', '.join(names)} ({cause}). "
                f"Image sizes (width, height) by row: {sizes}."
            ) from cause
        return dict(batch)

    def _shortened(self, batch: dict[str, Any], names: list[str]) -> dict[str, Any]:
        limit = self.max_length
        lengths = batch["attention_mask"].sum(1).tolist()
        if limit is None or max(lengths) <= limit:
            return batch
        holders = torch.tensor(self.image_token_ids)
        for place, (name, length) in enumerate(zip(names, lengths, strict=True)):
            ids = batch["input_ids"][place][batch["attention_mask"][place].bool()]
            marks = torch.isin(ids, holders).nonzero().flatten()
            if length > limit and marks.numel() and int(marks[-1]) >= limit:
                raise DataError(
                    f"{name} has {length} tokens, {marks.numel()} of them for images, the last at place "
                    f"{int(marks[-1]) + 1}; max_length={limit} would cut inside or before an image. "
                    f"Set max_length=None or at least {int(marks[-1]) + 1}, or use smaller or fewer images."
                )
        return cut_right(batch, limit, self._padding_values())

    def _padding_values(self) -> dict[str, int]:
        return {"input_ids": self.processor.tokenizer.pad_token_id or 0, "labels": self.ignore_index}

    def _check_labels(self, labels: Tensor, names: list[str]) -> None:
        empty = (labels == self.ignore_index).all(1).nonzero().flatten().tolist()
        if not empty:
            return
        if self.empty_labels == "count":
            self.unsupervised_rows += len(empty)
            return
        raise DataError(
            f"{names[empty[0]]} has no supervised token left (train_on={self.train_on!r}, "
            f"max_length={self.max_length}). Raise max_length or leave the row out; a collator of your own may count "
            "such rows with empty_labels='count'."
        )


def placeholder_ids(processor: Any) -> tuple[int, ...]:
    """Ask a processor for the ids of its image and video placeholders.

    Args:
        processor: A transformers processor.

    Returns:
        At least one id.

    Raises:
        SettingError: The processor tells none.
    """
    found: set[int] = set()
    for kind in ("image", "video"):
        number = getattr(processor, f"{kind}_token_id", None)
        token = getattr(processor, f"{kind}_token", None)
        if number is None and isinstance(token, str):
            number = processor.tokenizer.convert_tokens_to_ids(token)
        if isinstance(number, int) and number >= 0:
            found.add(number)
    if not found:
        raise SettingError(
            f"{type(processor).__name__} does not tell its placeholder id. "
            "Give image_token_ids, for example (model.config.image_token_id,)."
        )
    return tuple(sorted(found))


def cut_right(batch: Mapping[str, Any], limit: int, padding: Mapping[str, int]) -> dict[str, Any]:
    """Keep at most `limit` real tokens of every row, from its beginning, whichever side the padding is on.

    Args:
        batch: Model inputs with ``input_ids`` and ``attention_mask`` [batch, seq]. Every tensor of that shape is
            cut with them, others stay as they are.
        limit: Largest number of real tokens per row.
        padding: Value of padded places by tensor name, 0 where not named.

    Returns:
        A new batch, [batch, min(limit, longest row)] where it was [batch, seq]; padding on the side it was on.
    """
    mask = batch["attention_mask"].bool()
    lengths = mask.sum(1).clamp(max=limit)
    width = int(lengths.max())
    left = bool((~mask[:, 0]).any())
    cut: dict[str, Any] = dict(batch)
    for name, value in batch.items():
        if not isinstance(value, Tensor) or value.shape != mask.shape:
            continue
        cut[name] = value.new_full((len(mask), width), padding.get(name, 0))
        for place, length in enumerate(lengths.tolist()):
            start = width - length if left else 0
            cut[name][place, start : start + length] = value[place][mask[place]][:length]
    return cut


class MaskPlaceholders:
    """Wrap a collator so that no placeholder is supervised.

    Collators of other libraries may leave image placeholders in the labels; pruning would then change the loss.

    Attributes:
        masked: Labels taken out so far, in this process.
    """

    def __init__(
        self,
        collator: Callable[[Any], Mapping[str, Any]],
        image_token_ids: Iterable[int],
        ignore_index: int = -100,
    ):
        """Keep the collator and the ids.

        Args:
            collator: Any callable that returns a batch with ``input_ids`` and ``labels`` [batch, seq].
            image_token_ids: Placeholder ids, at least one.
            ignore_index: Label of tokens that are not supervised.

        Raises:
            SettingError: No id is given.
        """
        self.collator = collator
        self.image_token_ids = tuple(image_token_ids)
        if not self.image_token_ids:
            raise setting_error("MaskPlaceholders", "image_token_ids", "at least one token id", self.image_token_ids)
        self.ignore_index = ignore_index
        self.masked = 0

    def __call__(self, rows: Any) -> Any:
        """Collate, then set the labels of placeholders to `ignore_index`.

        Args:
            rows: Whatever the wrapped collator takes.

        Returns:
            Its batch, of the type it came in; a batch without ``labels`` is left alone.
        """
        batch: Any = self.collator(rows)
        if batch.get("labels") is None or batch.get("input_ids") is None:
            return batch
        labels, ids = batch["labels"], batch["input_ids"]
        holders = torch.tensor(self.image_token_ids, device=ids.device, dtype=ids.dtype)
        hit = torch.isin(ids, holders) & (labels != self.ignore_index)
        self.masked += int(hit.sum())
        batch["labels"] = labels.masked_fill(hit, self.ignore_index)
        return batch


def _name(row: Row, place: int) -> str:
    number = row.get("row") if isinstance(row, Mapping) else None
    return f"Row {number}" if isinstance(number, int) else f"Row {place} of the batch"


def _opened(source: Any, name: str) -> Any:
    try:
        return open_image(source)
    except DataError as cause:
        raise DataError(f"{name}: {cause}") from cause
