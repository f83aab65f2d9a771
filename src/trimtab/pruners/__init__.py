"""Pruners: which visual tokens of an image stay.

A pruner sees tensors (`PrunerInput`) and returns kept indices in raster order (`Selection`); it never sees a model.
All run batched over images, without gradients, in float32, and read nothing back to the host.

========== ================ ====================== =========================================================
name       paper            needs beyond features  idea
========== ================ ====================== =========================================================
keep_all                                           every token, the baseline that prunes nothing
random                                             a uniform draw, the baseline without signal
grid_pool  arXiv 2405.17430                        an even lattice, or the means of its cells (``merge``)
cls_topk   arXiv 2412.01818 cls_attention          the most attended tokens
divprune   arXiv 2503.02175 (hidden)               tokens far apart; ``centered``, ``pre_projector``
dpp        arXiv 2506.10967 (text)                 a set of large volume; ``use_text``
vispruner  arXiv 2412.01818 cls_attention          attended tokens, then unlike ones; ``saliency_share``
scope      arXiv 2510.24214 cls_attention          saliency times coverage; ``alpha``
visionzip  arXiv 2412.04467 cls_attention, keys    attended tokens, the rest merged; ``contextual_share``
========== ================ ====================== =========================================================

Needs in brackets come with the option named. A new pruner is one class with one method, entered with
``@register_pruner("name")``; an installed package offers it by an entry point in the group ``trimtab.pruners``.
"""

# Imported for their effect: each enters its class in the table.
from trimtab.pruners import (  # noqa: F401
    cls_topk,
    divprune,
    dpp,
    grid_pool,
    keep_all,
    random,
    scope,
    visionzip,
    vispruner,
)
from trimtab.pruners.budget import kept_count, kept_counts
from trimtab.pruners.contract import Pruner, PrunerInput, Selection
from trimtab.pruners.registry import PRUNERS, build_pruner, pruner_names, register_pruner

__all__ = [
    "PRUNERS",
    "Pruner",
    "PrunerInput",
    "Selection",
    "build_pruner",
    "kept_count",
    "kept_counts",
    "pruner_names",
    "register_pruner",
]
