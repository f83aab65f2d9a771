"""Settings of the withdrawal of visual tokens, and the small file that carries them from a search to its use."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from trimtab.errors import DataError, OutputError, SettingError, near_miss, setting_error
from trimtab.files import read_json, write_json_atomic
from trimtab.records import versions

POSITIONS = ("keep", "reset")
MARK = "trimtab_vtw"
"""Key that tells such a file from any other JSON; its value is the version of the form."""
FORM = 1


@dataclass(frozen=True, kw_only=True)
class VTWConfig:
    """Where visual tokens leave, and what is known about that choice.

    Attributes:
        layer: Visual tokens leave at the input of this layer: layers 0 to ``layer - 1`` see them. The number of layers
            is the unmodified model, 0 the text alone.
        positions: ``"keep"`` leaves text at the positions it has (the paper), ``"reset"`` numbers it anew from 0 in the
            deep layers.
        sink_tokens: How many of the first visual tokens of every row stay for good; 0 is the paper.
        keep_newlines: Whether the rows that end a line of an image stay (LLaVA-NeXT's ``image_newline``).
        depth: Number of layers of the model that the choice was made for, or None where that is not known; another
            number of layers is then refused by `check`.
        model: Name of that model, for readers.
        task: What the search was made on, in the user's words.
        search: What the search found (threshold, criterion, samples, curve), or None where nothing was searched.
    """

    layer: int
    positions: str = "keep"
    sink_tokens: int = 0
    keep_newlines: bool = False
    depth: int | None = None
    model: str = ""
    task: str = ""
    search: Mapping[str, Any] | None = field(default=None, hash=False)

    def __post_init__(self) -> None:
        """Check every field; see the class for the ranges."""
        self._require("layer", int, lambda v: v >= 0, "a whole number, at least 0")
        self._require("positions", str, POSITIONS.__contains__, f"one of {', '.join(POSITIONS)}")
        self._require("sink_tokens", int, lambda v: v >= 0, "a whole number, at least 0")
        self._require("keep_newlines", bool, lambda v: True, "true or false")
        self._require("model", str, lambda v: True, "a name")
        self._require("task", str, lambda v: True, "a name")
        if self.search is not None:
            self._require("search", Mapping, lambda v: all(isinstance(k, str) for k in v), "a mapping by name, or None")
        if self.depth is not None:
            self._require("depth", int, lambda v: v >= 1, "a whole number, at least 1, or None")
            self._require_layer(self.depth)

    def _require(self, name: str, kind: Any, allowed: Any, words: str) -> None:
        value = getattr(self, name)
        wrong_bool = isinstance(value, bool) and kind is not bool
        if wrong_bool or not isinstance(value, kind) or not allowed(value):
            raise setting_error("VTWConfig", name, words, value)

    def _require_layer(self, depth: int) -> None:
        if self.layer > depth:
            raise setting_error(
                "VTWConfig", "layer", f"in 0..{depth}, for {depth} layers", self.layer,
                f"{depth} leaves the model as it is.",
            )  # fmt: skip

    def check(self, depth: int) -> None:
        """Say whether these settings belong to a model of so many layers.

        Args:
            depth: Number of decoder layers of the model.

        Raises:
            SettingError: They were made for another number of layers, or the layer lies behind the last.
        """
        if self.depth is not None and self.depth != depth:
            name = f" ({self.model})" if self.model else ""
            raise setting_error(
                "VTWConfig", "depth", f"{depth}, the number of layers of this model", self.depth,
                f"The settings were made for another model{name}: search anew, or give a layer by hand.",
            )  # fmt: skip
        self._require_layer(depth)

    def save(self, path: str | os.PathLike[str], *, overwrite: bool = False) -> None:
        """Write the settings to a small JSON file, whole or not at all.

        Args:
            path: The file; its directory is made when it is missing.
            overwrite: Whether a file that is there may be replaced.

        Raises:
            OutputError: There is a file and `overwrite` is off, or the place cannot be written.
        """
        if not overwrite and Path(path).exists():
            raise OutputError(f"{path} is there already. Choose another name, or replace it with overwrite=True.")
        search = None if self.search is None else dict(self.search)
        told = {one.name: getattr(self, one.name) for one in fields(self)}
        write_json_atomic(path, {MARK: FORM, **told, "search": search, "versions": versions()})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> VTWConfig:
        """Read what `save` wrote; ``layer`` must be there, other fields have their defaults.

        Raises:
            DataError: The file is missing, broken, no such file, of a newer form, or a field is unknown or wrong.
        """
        content = read_json(path)
        if not isinstance(content, Mapping) or not isinstance(content.get(MARK), int):
            raise DataError(f"{path} holds no settings of VTW (no {MARK!r} field). Give a file that a search saved.")
        if content[MARK] > FORM:
            raise DataError(f"{path} has form {content[MARK]}, but this trimtab knows up to {FORM}. Upgrade trimtab.")
        known = [one.name for one in fields(cls)]
        given = {name: value for name, value in content.items() if name not in (MARK, "versions")}
        for name in given:
            if name not in known:
                raise DataError(f"{path}: unknown field {name!r}. {near_miss(name, known)}")
        if "layer" not in given:
            raise DataError(f"{path}: the field 'layer' is missing. Search anew, or write the layer into the file.")
        try:
            return cls(**given)
        except SettingError as error:
            raise DataError(f"{path}: {error} Mend the file, or search anew.") from error

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as a plain dict that JSON can hold."""
        return asdict(self)
