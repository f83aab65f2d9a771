"""A model and data in, numbers for a record out."""

from trimtab.evaluate.compare import compare_accuracy
from trimtab.evaluate.exact_match import exact_match
from trimtab.evaluate.intervals import wilson_interval
from trimtab.evaluate.prompts import Prompt, prompts_of_row

__all__ = ["Prompt", "compare_accuracy", "exact_match", "prompts_of_row", "wilson_interval"]
