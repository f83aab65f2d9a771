"""Settings of DualSpeed, checked when they are made."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from trimtab.dualspeed.inside_options import INSIDE, checked_options
from trimtab.errors import SettingError, near_miss, setting_error
from trimtab.pruners.budget import RULES

SCHEDULES = ("stratified", "bernoulli", "annealed")
STEP_UNITS = ("optimizer", "micro", "sample")
POSITIONS = ("auto", "renumber", "original")
OVERSIZE = ("error", "own")
RECOMPUTE = ("model", "slow")
KEEP_SPREADS = ("fixed", "random", "content")
DISTILLATIONS = ("one_way", "two_way")


@dataclass(frozen=True, kw_only=True)
class DualSpeedConfig:
    """Settings of DualSpeed; the defaults are the paper's (arXiv 2602.03815) unless a line says otherwise.

    Attributes:
        pruner: Name of the pruner of the fast mode, see ``trimtab.pruner_names()``.
        pruner_options: Keyword arguments of that pruner, for example ``{"centered": True}``.
        keep_ratio: Share of each image's visual tokens that the fast mode keeps, in (0, 1]. The papers'
            "pruning ratio" is one minus this.
        keep_rule: How the share becomes a count: ``"floor"``, ``"round"``, ``"ceil"``, or ``"released"`` for the
            arithmetic of the released code.
        slow_ratio: Share of slow steps, in [0, 1].
        isolator_tokens: Rows of the mode isolator in front of every pruned image; 0 for none.
        isolator_from: Directory or file with the isolator of an earlier stage, or None for a fresh one.
        kl_weight: Weight of the KL term of slow steps (alpha), at least 0; 0 skips the teacher.
        temperature: Temperature T of the KL term, above 0; the term is multiplied by its square.
        schedule: ``"stratified"`` (one slow step in every block of 1/slow_ratio; same mean as the paper's draw,
            less variance, our default), ``"bernoulli"`` (independent draws, as the paper) or ``"annealed"``
            (few slow steps early, many late, same total; needs `total_steps`).
        schedule_unit: ``"optimizer"`` gives all micro-batches of an update one mode (our default), ``"micro"``
            draws per forward call, as the released code, ``"sample"`` draws for every sample by itself from seed, epoch
            and the sample's number, so that fast and slow samples meet in one batch (``schedule`` then has no say).
        total_steps: Number of steps, in `schedule_unit`, that ``"annealed"`` spreads over; the Trainer fills it in.
        positions: ``"renumber"`` closes the gaps that dropped tokens leave (the paper), ``"original"`` keeps every
            token's position of the full sequence, ``"auto"`` renumbers models with one position per token and
            keeps the coordinates of models with multimodal rotary positions.
        seed: Seed of the schedule, of the isolator's first values and of random pruners.
        head_chunk: Supervised places that pass through the language-model head at once, at least 1; bounds memory.
        check_features: Look for NaN and infinity in visual features at every step (waits for the device).
        packing: Put the rows of a batch one behind the other into one sequence without padding; attention stays
            within each row. With ``pruner="keep_all"``, ``isolator_tokens=0`` and ``slow_ratio=0`` plain training is
            packed the same way.
        pack_tokens: Most tokens of one pack, after pruning; a Trainer then chooses the samples of every batch by this
            budget in place of ``per_device_train_batch_size``. None packs the batches as they come. Needs `packing`.
        oversize: What to do with a sample of more than `pack_tokens`: ``"error"``, or ``"own"`` for a pack of its own.
        bucket_pool: A Trainer then makes batches of ``per_device_train_batch_size`` rows of like length, cut from pools
            of this many batches for each process, at least 2; 50 is a good value. For models that cannot be packed; not
            together with `pack_tokens`. What counts is the length in a row's mode with ``schedule_unit="sample"``, else
            that after pruning. None leaves the Trainer's own sampling.
        recompute: Of a model with gradient checkpointing, ``"model"`` recomputes in every step, as the model says,
            ``"slow"`` in steps with slow samples only: faster, with the memory of a fast step without checkpointing.
        keep_spread: ``"fixed"`` keeps `keep_ratio` of every image (the paper), ``"random"`` another share of every
            image, drawn with this mean, ``"content"`` more of images with more in them, with this mean over the batch.
        distillation: ``"one_way"`` teaches the full view by the pruned one (the paper), ``"two_way"`` also the pruned
            view by the full one.
        cache_from: Folder with a cache of the frozen vision tower, made by ``trimtab cache``, or None for none.
        inside: Where the fast mode drops visual tokens inside the language model, beside or instead of the pruner
            before it: ``"vtw"`` all at one layer (arXiv 2405.05803), ``"fastv"`` some by attention at one layer
            (arXiv 2403.06764), ``"pyramid_drop"`` some by attention at several (arXiv 2410.17247). The isolator stays
            in all layers. To drop inside only, set ``pruner="keep_all"`` and ``isolator_tokens=0``, which has no place
            among tokens that are all kept. None drops nothing there. Not together with `packing`.
        inside_options: Settings of `inside`, where "at layer K" means that layers 0 to K - 1 see the tokens. For
            ``"vtw"`` ``layer`` (half of the layers by default), ``sink_tokens`` (first visual tokens of each row that
            stay, 0) and ``keep_newlines`` (whether rows that end a line of an image stay, false); for ``"fastv"``
            ``layer`` (2) and ``keep_ratio`` (0.5); for ``"pyramid_drop"`` ``layers`` (a quarter, a half and three
            quarters of the layers by default) and ``keep_ratios`` (0.5, 0.25 and 0.125), shares of the tokens that
            enter the language model.
    """

    pruner: str = "divprune"
    pruner_options: Mapping[str, Any] = field(default_factory=dict)
    keep_ratio: float = 0.1
    keep_rule: str = "floor"
    slow_ratio: float = 0.1
    isolator_tokens: int = 4
    isolator_from: str | None = None
    kl_weight: float = 1.0
    temperature: float = 1.0
    schedule: str = "stratified"
    schedule_unit: str = "optimizer"
    total_steps: int | None = None
    positions: str = "auto"
    seed: int = 0
    head_chunk: int = 1024
    check_features: bool = False
    packing: bool = False
    pack_tokens: int | None = None
    oversize: str = "error"
    bucket_pool: int | None = None
    recompute: str = "model"
    keep_spread: str = "fixed"
    distillation: str = "one_way"
    cache_from: str | None = None
    inside: str | None = None
    inside_options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Check every field; see the class for the ranges."""
        number = (int, float)
        self._require("keep_ratio", number, lambda v: 0 < v <= 1, "a number in (0, 1]")
        self._require("slow_ratio", number, lambda v: 0 <= v <= 1, "a number in [0, 1]")
        self._require("isolator_tokens", int, lambda v: v >= 0, "a whole number, at least 0")
        self._require("kl_weight", number, lambda v: 0 <= v < float("inf"), "a finite number, at least 0")
        self._require("temperature", number, lambda v: 0 < v < float("inf"), "a finite number above 0")
        self._require("seed", int, lambda v: 0 <= v < 2**63, "a whole number in 0..2^63-1")
        self._require("head_chunk", int, lambda v: v >= 1, "a whole number, at least 1")
        self._require("keep_rule", str, lambda v: v in RULES, f"one of {', '.join(RULES)}")
        self._require("schedule", str, lambda v: v in SCHEDULES, f"one of {', '.join(SCHEDULES)}")
        self._require("schedule_unit", str, lambda v: v in STEP_UNITS, f"one of {', '.join(STEP_UNITS)}")
        self._require("positions", str, lambda v: v in POSITIONS, f"one of {', '.join(POSITIONS)}")
        self._require("pruner", str, bool, "the name of a pruner")
        self._require("pruner_options", Mapping, lambda v: all(isinstance(k, str) for k in v), "a mapping by name")
        self._require("check_features", bool, lambda v: True, "true or false")
        self._require("packing", bool, lambda v: True, "true or false")
        for name, allowed in (
            ("oversize", OVERSIZE), ("recompute", RECOMPUTE), ("keep_spread", KEEP_SPREADS),
            ("distillation", DISTILLATIONS),
        ):  # fmt: skip
            self._require(name, str, allowed.__contains__, f"one of {', '.join(allowed)}")
        if self.pack_tokens is not None:
            self._require("pack_tokens", int, lambda v: v >= 1, "a whole number, at least 1, or None")
            if not self.packing:
                raise setting_error("DualSpeedConfig", "pack_tokens", "None without packing=True", self.pack_tokens)
            if self.keep_spread != "fixed":
                raise setting_error(
                    "DualSpeedConfig", "keep_spread", "'fixed' with pack_tokens, for which lengths must be known "
                    "beforehand", self.keep_spread,
                )  # fmt: skip
        elif self.oversize != "error":
            raise setting_error("DualSpeedConfig", "oversize", "'error' without pack_tokens", self.oversize)
        if self.bucket_pool is not None:
            self._require("bucket_pool", int, lambda v: v >= 2, "a whole number, at least 2, or None")
            if self.pack_tokens is not None:
                raise setting_error("DualSpeedConfig", "bucket_pool", "None with pack_tokens", self.bucket_pool)
        if self.schedule == "annealed" and self.schedule_unit == "sample":
            raise setting_error(
                "DualSpeedConfig", "schedule", "'stratified' or 'bernoulli' with schedule_unit='sample', where the "
                "schedule has no say", self.schedule,
            )  # fmt: skip
        if self.cache_from is not None:
            self._require("cache_from", str, bool, "a path, or None")
        if self.inside is not None:
            self._require("inside", str, INSIDE.__contains__, f"one of {', '.join(INSIDE)}, or None")
            if self.packing:
                raise setting_error(
                    "DualSpeedConfig", "inside", "None with packing=True, whose rows share one sequence", self.inside,
                    "Set packing=False; bucket_pool puts rows of like length together without it.",
                )  # fmt: skip
        self._require("inside_options", Mapping, lambda v: all(isinstance(k, str) for k in v), "a mapping by name")
        # As JSON has them, so that settings that were read back equal those that were written.
        object.__setattr__(self, "inside_options", checked_options(self.inside, self.inside_options))
        if self.total_steps is not None:
            self._require("total_steps", int, lambda v: v >= 1, "a whole number, at least 1, or None")
        if self.isolator_from is not None:
            self._require("isolator_from", str, bool, "a path, or None")
        if self.schedule == "annealed" and self.slow_ratio > 0.5:
            raise setting_error(
                "DualSpeedConfig",
                "slow_ratio",
                "at most 0.5 with schedule='annealed' (the share climbs to twice the mean)",
                self.slow_ratio,
            )

    def _require(self, name: str, kind: Any, allowed: Any, words: str) -> None:
        value = getattr(self, name)
        wrong_bool = isinstance(value, bool) and kind is not bool
        if wrong_bool or not isinstance(value, kind) or not allowed(value):
            raise setting_error("DualSpeedConfig", name, words, value)

    @property
    def prunes_nothing(self) -> bool:
        """Whether these settings leave every training step as the model has it without trimtab."""
        return self.drops_nothing and self.isolator_tokens == 0 and self.slow_ratio == 0 and not self.packing

    @property
    def keeps_all(self) -> bool:
        """Whether all visual tokens enter the language model in the fast mode."""
        return self.pruner == "keep_all" or self.keep_ratio == 1

    @property
    def drops_nothing(self) -> bool:
        """Whether the fast mode drops no token, neither before nor inside the language model."""
        return self.keeps_all and self.inside is None

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as a plain dict that JSON and YAML can hold."""
        options = {"pruner_options": dict(self.pruner_options), "inside_options": dict(self.inside_options)}
        return {**asdict(self), **options}

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any]) -> DualSpeedConfig:
        """Build the settings from a mapping, for example the ``dualspeed:`` block of a run file.

        Raises:
            SettingError: An unknown key (the nearest is named) or a value outside its range.
        """
        known = [f.name for f in fields(cls)]
        for key in settings:
            if key not in known:
                raise SettingError(f"Unknown setting {key!r} of DualSpeedConfig. {near_miss(str(key), known)}")
        return cls(**settings)


def read_config(value: DualSpeedConfig | Mapping[str, Any] | None, owner: str, setting: str) -> DualSpeedConfig | None:
    """Return the settings that a caller gave as such or as a mapping, or None for None.

    Raises:
        SettingError: Something else came, or a field is wrong.
    """
    return (
        None
        if value is None
        else require_config(value, owner, setting, "a DualSpeedConfig, a mapping of its fields, or None")
    )


def require_config(
    value: DualSpeedConfig | Mapping[str, Any],
    owner: str,
    setting: str,
    allowed: str = "a DualSpeedConfig or a mapping of its fields",
) -> DualSpeedConfig:
    """Return the settings that a caller gave as such or as a mapping.

    Raises:
        SettingError: Something else came, or a field is wrong.
    """
    if isinstance(value, DualSpeedConfig):
        return value
    if isinstance(value, Mapping):
        return DualSpeedConfig.from_dict(value)
    raise setting_error(owner, setting, allowed, value)
