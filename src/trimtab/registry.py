"""Name -> class, with near-miss hints and outside plugins by entry point."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from importlib.metadata import entry_points
from typing import Generic, TypeVar

from trimtab.errors import SettingError, near_miss

T = TypeVar("T")


class Registry(Generic[T]):
    """A table of named classes that others may add to.

    Args:
        kind: The word for one entry in messages, for example ``"pruner"``.
        base: Class that every entry must derive from.
        group: Entry-point group under which installed packages offer further entries; each entry point
            is named as the entry and loads to the class.
    """

    def __init__(self, kind: str, base: type[T], group: str) -> None:
        self.kind = kind
        self.base = base
        self.group = group
        self._classes: dict[str, type[T]] = {}
        self._outside_loaded = False

    def register(self, name: str) -> Callable[[type[T]], type[T]]:
        """Enter a class under a name (use as a decorator).

        Args:
            name: Lower-case letters, digits and underscores; not taken yet.

        Returns:
            The decorator; it returns the class unchanged.

        Raises:
            SettingError: The name is malformed or taken, the class does not derive from the base, an abstract
                method is missing, or a method's arguments differ from the base's.
        """

        def enter(cls: type[T]) -> type[T]:
            self._check(name, cls)
            self._classes[name] = cls
            return cls

        return enter

    def get(self, name: str) -> type[T]:
        """Return the class of that name.

        Raises:
            SettingError: No such entry; the message names the nearest.
        """
        self._load_outside()
        if name not in self._classes:
            raise SettingError(f"Unknown {self.kind} {name!r}. {near_miss(name, self._classes)}")
        return self._classes[name]

    def names(self) -> list[str]:
        """Return all names, sorted."""
        self._load_outside()
        return sorted(self._classes)

    def items(self) -> Iterator[tuple[str, type[T]]]:
        """Yield name and class, sorted by name."""
        for name in self.names():
            yield name, self._classes[name]

    def _check(self, name: str, cls: type[T]) -> None:
        here = f"{self.kind} {name!r} ({cls.__module__}.{cls.__qualname__})"
        if not (name.isidentifier() and name == name.lower()):
            raise SettingError(f"The name of {here} must be lower-case letters, digits and underscores.")
        if name in self._classes:
            raise SettingError(f"{here}: the name is taken by {self._classes[name].__qualname__}. Choose another.")
        if not issubclass(cls, self.base):
            raise SettingError(f"{here} must derive from {self.base.__module__}.{self.base.__qualname__}.")
        missing = sorted(getattr(cls, "__abstractmethods__", ()))
        if missing:
            raise SettingError(f"{here} must define {', '.join(missing)}.")
        for method in sorted(getattr(self.base, "__abstractmethods__", ())):
            wanted = list(inspect.signature(getattr(self.base, method)).parameters)
            came = list(inspect.signature(getattr(cls, method)).parameters)
            if wanted != came:
                raise SettingError(f"{here}: {method} must take ({', '.join(wanted)}), but takes ({', '.join(came)}).")

    def _load_outside(self) -> None:
        if self._outside_loaded:
            return
        self._outside_loaded = True
        for point in entry_points(group=self.group):
            if point.name not in self._classes:
                self.register(point.name)(point.load())
