"""VTW: let all visual tokens leave the language model at one layer, chosen by how little the answer changes.

Paper: Boosting Multimodal Large Language Models with Visual Tokens Withdrawal for Rapid Inference (arXiv 2405.05803)
Gets smaller: the sequence in the deep layers, in compute and in the key-value cache
Goes in: a trained vision-language model and a few prompts of the task
Comes out: the same model, faster at inference while attached; a layer for the task
Cost: no training; one search of some twenty prompts per task; dense tasks may lose accuracy
Entry: `withdraw(model, layer=16)`, `trimtab vtw search`
"""

from trimtab.methods.vtw.apply import stack_layers, withdraw
from trimtab.methods.vtw.config import VTWConfig
from trimtab.methods.vtw.cost import (
    TextShape,
    kv_bytes,
    kv_entries,
    kv_saving,
    prefill_flops,
    prefill_saving,
    read_text_shape,
    withdrawal,
)
from trimtab.methods.vtw.layer_choice import CurvePoint, choose_layer, withdrawal_divergence
from trimtab.methods.vtw.peers import fastv, pyramid_drop, random_drop
from trimtab.methods.vtw.prefill import measure_prefill
from trimtab.methods.vtw.search import SearchReport, search_withdrawal_layer

__all__ = [
    "CurvePoint",
    "SearchReport",
    "TextShape",
    "VTWConfig",
    "choose_layer",
    "fastv",
    "kv_bytes",
    "kv_entries",
    "kv_saving",
    "measure_prefill",
    "prefill_flops",
    "prefill_saving",
    "pyramid_drop",
    "random_drop",
    "read_text_shape",
    "search_withdrawal_layer",
    "stack_layers",
    "withdraw",
    "withdrawal",
    "withdrawal_divergence",
]
