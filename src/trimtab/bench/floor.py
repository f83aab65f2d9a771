"""The arithmetic of one step, row by row: what each way of training has to compute, and so how fast it could be.

`trimtab.bench.SpeedModel` counts a mean sample. Padding, packs of samples in both modes and recomputation depend on
which rows meet, so here every pass is counted with the lengths of its own rows. With P parameters in the matrices of
the decoder blocks, width d, L layers, a row of S places and a batch padded to M:

    matrices of a pass      2 P (sum of S, or rows * M)
    its attention           4 d L (sum of S^2, or rows * M^2), half of that where the kernel leaves the masked half out
    training                3 matrices + 3.5 attention (its backward pass computes the scores anew), and both once more
                            with recomputation, but for the last matrix of each block, whose result nobody asks for
    head                    2 d vocab n forward, 3 times that in training, 4 with several chunks
    pruner                  2 N^2 d per tile of N tokens (the cosines)
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from trimtab.bench.shapes import TrainingShape

HEAD_CHUNK = 1024
"""Labels that pass the head at once, as `DualSpeedConfig` has it."""

PARTS = ("tower", "pruner", "decoder", "head")


@dataclass(frozen=True)
class Work:
    """Floating-point operations by part; one multiplication with its addition counts as two.

    Attributes:
        tower: Vision tower and projector.
        pruner: Choosing the tokens.
        decoder: The decoder's blocks, all passes.
        head: The language-model head.
    """

    tower: float = 0.0
    pruner: float = 0.0
    decoder: float = 0.0
    head: float = 0.0

    @property
    def total(self) -> float:
        """All parts."""
        return self.tower + self.pruner + self.decoder + self.head

    def __add__(self, other: Work) -> Work:
        return Work(*(getattr(self, part) + getattr(other, part) for part in PARTS))


@dataclass(frozen=True, kw_only=True)
class Way:
    """How an arm trains; what it does is `trimtab.run.bench_arms`, what that costs is `FloorModel.work`.

    Attributes:
        name: Key of the arm.
        view: What the rows look like: ``"full"``, ``"fast"``, ``"slow"`` (full rows and a teacher), or ``"mixed"``
            (each sample in its own mode).
        style: ``"public"`` (the stock model), ``"released"`` (the step written after the released code) or
            ``"trimtab"``.
        packing: Whether rows stand behind each other; otherwise they are padded to the longest of the batch.
        recompute: Whether activation checkpointing runs the forward pass of the blocks twice.
        remedies: Of a released-style step, which of its costs are mended (`REMEDIES`).
    """

    name: str
    view: str
    style: str
    packing: bool = False
    recompute: bool = True
    remedies: frozenset[str] = field(default_factory=frozenset)

    @property
    def label_head(self) -> bool:
        """Whether the head runs where labels are, and only there."""
        return self.style == "trimtab" or "label_head" in self.remedies

    @property
    def tower_once(self) -> bool:
        """Whether a slow step encodes its images once."""
        return self.style == "trimtab" or "tower_once" in self.remedies


REMEDIES = ("batched", "tower_once", "label_head")
"""Costs of the released step that can be mended one by one: picks and label places read by the host one at a time,
images encoded twice in slow steps, the head over every place."""


@dataclass(frozen=True)
class Rows:
    """What the arithmetic has to know of the rows of a batch.

    Attributes:
        text: Text tokens of each.
        labels: Supervised tokens of each.
        slow: Which of them are slow where samples have modes of their own.
    """

    text: Sequence[int]
    labels: Sequence[int]
    slow: Sequence[bool]

    def only(self, places: Sequence[int]) -> Rows:
        """Return some of the rows."""
        return Rows(
            [self.text[one] for one in places],
            [self.labels[one] for one in places],
            [self.slow[one] for one in places],
        )


class FloorModel:
    """Counts operations of batches of one shape.

    Args:
        shape: Model and data.
        keep_ratio: Share of visual tokens that the fast mode keeps.
        isolator_tokens: Isolator rows per tile.
        masked_half: Whether unpadded attention computes the half that causality masks; torch's own counter counts
            it, its kernels leave it out.
        tower_stops: Whether trimtab stops the tower behind the block that feeds the features.
    """

    def __init__(
        self,
        shape: TrainingShape,
        *,
        keep_ratio: float = 0.1,
        isolator_tokens: int = 4,
        masked_half: bool = False,
        tower_stops: bool = True,
    ) -> None:
        self.shape = shape
        self.short = shape.tiles * (shape.keep(keep_ratio) + isolator_tokens)
        self.prunes = keep_ratio < 1
        self.masked_half = masked_half
        self.tower_stops = tower_stops

    def lengths(self, view: str, rows: Rows) -> list[int]:
        """Return the places of each row in a view."""
        whole = self.shape.visual_tokens
        mixed = [whole if slow else self.short for slow in rows.slow]
        visual = {"full": [whole] * len(rows.text), "slow": [whole] * len(rows.text), "mixed": mixed}
        return [text + seen for text, seen in zip(rows.text, visual.get(view, [self.short] * len(mixed)), strict=True)]

    def work(self, way: Way, batches: Iterable[Rows]) -> Work:
        """Return the operations of an arm on some batches.

        Args:
            way: How it trains.
            batches: Its micro-batches or packs.
        """
        return sum((self._batch(way, rows) for rows in batches), Work())

    def _batch(self, way: Way, rows: Rows) -> Work:
        lengths = self.lengths(way.view, rows)
        taught = [row for row, slow in enumerate(rows.slow) if way.view == "slow" or (way.view == "mixed" and slow)]
        total = self._blocks(lengths, way, train=True) + self._head(lengths, rows.labels, way, train=True)
        if taught:
            known = rows.only(taught)
            short = self.lengths("fast", known)
            total += self._blocks(short, way, train=False) + self._head(short, known.labels, way, train=False)
        tiles = len(lengths) * self.shape.tiles
        twice = bool(taught) and not way.tower_once
        vision = self._tower(tiles, way, train=True) + (self._tower(tiles, way, train=False) if twice else 0.0)
        chosen = tiles if way.view in ("fast", "mixed", "slow") and self.prunes else 0
        return total + Work(tower=vision, pruner=chosen * 2.0 * self.shape.tile_tokens**2 * self.shape.width)

    def _blocks(self, lengths: Sequence[int], way: Way, *, train: bool) -> Work:
        shape, again = self.shape, int(way.recompute)
        padded = [max(lengths)] * len(lengths)
        seen = list(lengths) if way.packing else padded
        masked = not way.packing and padded != list(lengths)
        matrices = 2.0 * shape.block_parameters * sum(seen)
        square = 4.0 * shape.width * shape.layers * sum(length**2 for length in seen)
        square *= 1.0 if masked or self.masked_half else 0.5
        if not train:
            return Work(decoder=matrices + square)
        repeated = matrices - 2.0 * shape.layers * shape.width * shape.mlp * sum(seen)
        return Work(decoder=3 * matrices + 3.5 * square + again * (repeated + square))

    def _head(self, lengths: Sequence[int], labels: Sequence[int], way: Way, *, train: bool) -> Work:
        count = sum(labels) if way.label_head else sum(lengths) if way.packing else max(lengths) * len(lengths)
        chunked = way.label_head and count > HEAD_CHUNK
        times = (4 if chunked else 3) if train else (2 if chunked else 1)
        return Work(head=times * 2.0 * self.shape.width * self.shape.vocab * count)

    def _tower(self, tiles: int, way: Way, *, train: bool) -> float:
        shape, tokens, places = self.shape, self.shape.tile_tokens, self.shape.tile_tokens + 1
        again, learns = int(way.recompute), train and shape.tower_trained
        matrices = 2.0 * shape.tower_width * (4 * shape.tower_width + 2 * shape.tower_mlp) * places
        square = 4.0 * shape.tower_width * places**2
        patches = 2.0 * 3 * shape.patch_size**2 * shape.tower_width * tokens
        repeated = matrices - 2.0 * shape.tower_width * shape.tower_mlp * places
        block = 3 * matrices + 3.5 * square + again * (repeated + square) if learns else matrices + square
        # Nothing reads what the last block puts out, so no gradient comes to it.
        last = 0.0 if way.style == "trimtab" and self.tower_stops else matrices + square
        tower = (shape.tower_layers - 1) * block + last + (2 if learns else 1) * patches
        first, second = 2.0 * tokens * shape.tower_width * shape.width, 2.0 * tokens * shape.width**2
        projector = (3 if learns else 2) * first + 3 * second if train else first + second
        return tiles * (tower + projector)
