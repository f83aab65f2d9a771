"""The only code that knows the inside of other libraries' models.

For transformers: which models can train on pruned visual tokens (`check_model`), encoding images once
(`encode_images`), and giving a model fewer visual tokens than it expects (`assemble`) through its public
``mm_encoder_outputs`` argument.
"""

from trimtab.anatomy.assemble import assemble, full_inputs
from trimtab.anatomy.encode import EncodedImages, Words, encode_images, has_images, question_embeddings, supplied_needs
from trimtab.anatomy.families import Host, Modality, SupportReport, check_model, open_host
from trimtab.anatomy.family_table import FAMILIES, REFUSED, Family
from trimtab.anatomy.row_layout import PlaceholderRule, RowLayout, RowNotes, note_rows, placeholder_rule, read_rows

__all__ = [
    "FAMILIES",
    "REFUSED",
    "EncodedImages",
    "Family",
    "Host",
    "Modality",
    "PlaceholderRule",
    "RowLayout",
    "RowNotes",
    "SupportReport",
    "Words",
    "assemble",
    "check_model",
    "encode_images",
    "full_inputs",
    "has_images",
    "note_rows",
    "open_host",
    "placeholder_rule",
    "question_embeddings",
    "read_rows",
    "supplied_needs",
]
