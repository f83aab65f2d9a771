"""Host libraries that do not fit are named, with the remedy: torchvision built for another torch, other releases."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.version import Version
from tests.tiny import FAMILIES

from trimtab.anatomy import families, host_library, open_host
from trimtab.anatomy.host_library import NEWEST_TESTED, explain_import_errors, torchvision_trouble
from trimtab.errors import HostLibraryError, SettingError, TrimtabWarning

NMS = "operator torchvision::nms does not exist"


def set_release(monkeypatch: pytest.MonkeyPatch, release: str) -> None:
    """Let trimtab find another release; transformers imports itself twice, so that modules may hold either import."""
    for module in (families, host_library):
        monkeypatch.setattr(module.transformers, "__version__", release)


@pytest.fixture
def broken_torchvision(tmp_path: Path) -> Path:
    """Return a folder with a torchvision whose import fails as that of a build for another torch does."""
    (tmp_path / "torchvision").mkdir()
    (tmp_path / "torchvision" / "__init__.py").write_text(f"raise RuntimeError({NMS!r})\n")
    info = tmp_path / "torchvision-0.1.2.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: torchvision\nVersion: 0.1.2\n")
    return tmp_path


@pytest.fixture
def fresh_warning() -> Iterator[None]:
    """Let the warning that comes once per process come again."""
    host_library.warn_of_untested_release.cache_clear()
    yield
    host_library.warn_of_untested_release.cache_clear()


LOADING = """
from trimtab.errors import HostLibraryError
from trimtab.run.config import training_hints
from trimtab.run.load import RunConfig, load_model, load_processor, outline_model

config = RunConfig(model_name_or_path="somewhere", data_files=["x"], output_dir="y")
calls = ((training_hints, "trainer"), (load_processor, "somewhere"), (outline_model, config), (load_model, config))
for call, argument in calls:
    try:
        call(argument)
    except HostLibraryError as error:
        print(error)
"""


def test_a_torchvision_for_another_torch_is_explained(broken_torchvision: Path) -> None:
    (broken_torchvision / "somewhere").mkdir()
    (broken_torchvision / "somewhere" / "config.json").write_text('{"model_type": "llava"}')
    environment = {**os.environ, "PYTHONPATH": str(broken_torchvision)}
    done = subprocess.run(
        [sys.executable, "-c", LOADING],
        capture_output=True,
        text=True,
        check=True,
        cwd=broken_torchvision,
        env=environment,
    )
    told = done.stdout.splitlines()
    assert len(told) == 4
    for line in told:
        assert "torchvision 0.1.2" in line
        assert NMS in line
        assert "uninstall torchvision" in line


def test_the_first_cause_counts() -> None:
    outer = ImportError("Could not import module 'AutoProcessor'.")
    outer.__cause__ = RuntimeError(NMS)
    assert "torchvision" in torchvision_trouble(outer)
    assert torchvision_trouble(ImportError("cannot import name y")) == ""


def test_a_missing_torchvision_is_told_from_a_broken_one(monkeypatch: pytest.MonkeyPatch) -> None:
    known = host_library.version

    def found(name: str) -> str:
        if name == "torchvision":
            raise host_library.PackageNotFoundError(name)
        return known(name)

    error = ImportError("Video processors need torchvision.")
    monkeypatch.setattr(host_library, "version", found)
    assert "which is not installed" in torchvision_trouble(error)
    monkeypatch.setattr(host_library, "version", lambda name: "1.2.3")
    assert "torchvision 1.2.3 that is installed does not fit the torch 1.2.3" in torchvision_trouble(error)


def test_other_errors_pass_through() -> None:
    with pytest.raises(ImportError, match="name y") as caught, explain_import_errors("A model"):
        raise ImportError("cannot import name y")
    assert not isinstance(caught.value, HostLibraryError)
    with pytest.raises(SettingError), explain_import_errors("A model"):
        raise SettingError("torchvision")
    with pytest.raises(HostLibraryError, match=r"^A model cannot be loaded"), explain_import_errors("A model"):
        raise RuntimeError(NMS)


def test_the_pinned_release_is_the_newest_tested() -> None:
    pinned = [
        line
        for line in (Path(__file__).parents[2] / "constraints.txt").read_text().splitlines()
        if line.startswith("transformers==")
    ]
    assert Version(pinned[0].partition("==")[2]).release[:2] == Version(NEWEST_TESTED).release


@pytest.mark.usefixtures("fresh_warning")
@pytest.mark.parametrize(("release", "warned"), [("5.23.7", 0), ("5.24.0", 1), ("5.24.0.dev0", 1), ("6.0.0", 1)])
def test_a_newer_release_is_warned_of_once(monkeypatch: pytest.MonkeyPatch, release: str, warned: int) -> None:
    model = FAMILIES["llava"].build()
    set_release(monkeypatch, release)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        open_host(model)
        open_host(model)
    assert [one.category for one in seen] == [TrimtabWarning] * warned
    if warned:
        assert f"newer than {NEWEST_TESTED}" in str(seen[0].message)


def test_an_older_release_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = FAMILIES["llava"].build()
    set_release(monkeypatch, "5.17.0")
    with pytest.raises(HostLibraryError, match=r"needs transformers 5\.18\.0 or newer"):
        open_host(model)
