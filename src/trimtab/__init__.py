"""trimtab: train, compress and run multimodal and generative models for less.

The front door. `_PUBLIC` names everything public once, with the module that holds it; a name is loaded on first use,
so that ``import trimtab`` loads neither torch nor transformers.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trimtab.anatomy import check_model as check_model
    from trimtab.data import SupervisedCollator as SupervisedCollator
    from trimtab.data import load_rows as load_rows
    from trimtab.data import validate_rows as validate_rows
    from trimtab.dualspeed import BucketSampler as BucketSampler
    from trimtab.dualspeed import DualSpeedCallback as DualSpeedCallback
    from trimtab.dualspeed import DualSpeedConfig as DualSpeedConfig
    from trimtab.dualspeed import DualSpeedHandle as DualSpeedHandle
    from trimtab.dualspeed import PackSampler as PackSampler
    from trimtab.dualspeed import PrunedInference as PrunedInference
    from trimtab.dualspeed import SampleLength as SampleLength
    from trimtab.dualspeed import Samples as Samples
    from trimtab.dualspeed import attach as attach
    from trimtab.dualspeed import detach as detach
    from trimtab.dualspeed import load_lengths as load_lengths
    from trimtab.dualspeed import measure_lengths as measure_lengths
    from trimtab.dualspeed import prune_for_inference as prune_for_inference
    from trimtab.dualspeed import save_lengths as save_lengths
    from trimtab.dualspeed import with_dualspeed as with_dualspeed
    from trimtab.errors import DataError as DataError
    from trimtab.errors import HostLibraryError as HostLibraryError
    from trimtab.errors import MissingExtraError as MissingExtraError
    from trimtab.errors import NotSupportedError as NotSupportedError
    from trimtab.errors import OutputError as OutputError
    from trimtab.errors import RankDisagreementError as RankDisagreementError
    from trimtab.errors import SettingError as SettingError
    from trimtab.errors import TokenMismatchError as TokenMismatchError
    from trimtab.errors import TrimtabError as TrimtabError
    from trimtab.errors import TrimtabWarning as TrimtabWarning
    from trimtab.errors import UnsupportedModelError as UnsupportedModelError
    from trimtab.errors import WrongOrderError as WrongOrderError
    from trimtab.evaluate import exact_match as exact_match
    from trimtab.pruners import Pruner as Pruner
    from trimtab.pruners import PrunerInput as PrunerInput
    from trimtab.pruners import Selection as Selection
    from trimtab.pruners import build_pruner as build_pruner
    from trimtab.pruners import pruner_names as pruner_names
    from trimtab.pruners import register_pruner as register_pruner
    from trimtab.report import render_report as render_report

__version__ = "0.1.0"

_PUBLIC = {
    "BucketSampler": "trimtab.dualspeed",
    "DataError": "trimtab.errors",
    "DualSpeedCallback": "trimtab.dualspeed",
    "DualSpeedConfig": "trimtab.dualspeed",
    "DualSpeedHandle": "trimtab.dualspeed",
    "HostLibraryError": "trimtab.errors",
    "MissingExtraError": "trimtab.errors",
    "NotSupportedError": "trimtab.errors",
    "OutputError": "trimtab.errors",
    "PackSampler": "trimtab.dualspeed",
    "PrunedInference": "trimtab.dualspeed",
    "Pruner": "trimtab.pruners",
    "PrunerInput": "trimtab.pruners",
    "RankDisagreementError": "trimtab.errors",
    "SampleLength": "trimtab.dualspeed",
    "Samples": "trimtab.dualspeed",
    "Selection": "trimtab.pruners",
    "SettingError": "trimtab.errors",
    "SupervisedCollator": "trimtab.data",
    "TokenMismatchError": "trimtab.errors",
    "TrimtabError": "trimtab.errors",
    "TrimtabWarning": "trimtab.errors",
    "UnsupportedModelError": "trimtab.errors",
    "WrongOrderError": "trimtab.errors",
    "attach": "trimtab.dualspeed",
    "build_pruner": "trimtab.pruners",
    "check_model": "trimtab.anatomy",
    "detach": "trimtab.dualspeed",
    "exact_match": "trimtab.evaluate",
    "load_lengths": "trimtab.dualspeed",
    "load_rows": "trimtab.data",
    "measure_lengths": "trimtab.dualspeed",
    "prune_for_inference": "trimtab.dualspeed",
    "pruner_names": "trimtab.pruners",
    "register_pruner": "trimtab.pruners",
    "render_report": "trimtab.report",
    "save_lengths": "trimtab.dualspeed",
    "validate_rows": "trimtab.data",
    "with_dualspeed": "trimtab.dualspeed",
}
"""Every public name and the module that holds it."""


def __getattr__(name: str) -> Any:
    """Load a public name on first use (PEP 562)."""
    if name not in _PUBLIC:
        from trimtab.errors import near_miss

        raise AttributeError(f"module 'trimtab' has no attribute {name!r}. {near_miss(name, _PUBLIC)}")
    value = getattr(import_module(_PUBLIC[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """List the public names besides what is loaded."""
    return sorted({*globals(), *_PUBLIC})
