"""A task that trains in seconds: few scenes, a narrow model, a handful of steps."""

from __future__ import annotations

from dataclasses import replace

from trimtab.data.scenes import SceneSettings, make_scenes
from trimtab.quickstart.model import SmallLlava
from trimtab.quickstart.task import Task
from trimtab.quickstart.tasks import scenes_task
from trimtab.quickstart.tower import TowerFit

SIZES = SmallLlava(
    image_size=64, patch_size=8, tower_layers=1, tower_width=32, tower_heads=2, layers=1, width=32, heads=2
)


def small_task(seed: int = 0) -> Task:
    """Return a task of 64 visual tokens, twelve training scenes and four steps."""
    canvas = SceneSettings(canvas=64)
    return replace(
        scenes_task(seed),
        train=make_scenes("train", 12, seed, settings=canvas),
        test=make_scenes("test", 8, seed, settings=canvas),
        sizes=SIZES,
        tower=TowerFit(steps=2, batch_size=4),
        steps=6,
        batch_size=4,
        dualspeed={"slow_ratio": 0.5},
    )
