"""One small run, written once and copied for every test that changes it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.run.small_run import settings, write_run

from trimtab.run.config import RunConfig, load_config


@pytest.fixture(scope="session")
def small_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    write_run(folder)
    return folder


@pytest.fixture
def make_config(small_run: Path, tmp_path: Path) -> Callable[..., RunConfig]:
    """Return a function that makes settings whose output lies in the folder of the test."""

    def make(**changes: Any) -> RunConfig:
        path = tmp_path / "run.yaml"
        chosen = {**settings(small_run), "output_dir": str(tmp_path / "out"), **changes}
        path.write_text(yaml.safe_dump(chosen), encoding="utf-8")
        return load_config(path)

    return make


@pytest.fixture(scope="session")
def trained(small_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the output directory of a finished DualSpeed run; copy it before changing it."""
    from trimtab.run.config import build_config
    from trimtab.run.train import train

    folder = tmp_path_factory.mktemp("trained") / "out"
    train(build_config({**settings(small_run), "output_dir": str(folder)}))
    return folder


@pytest.fixture
def trained_copy(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "trained"))
