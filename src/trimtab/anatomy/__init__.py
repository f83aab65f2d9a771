"""The only code that knows the inside of other libraries' models.

For transformers: which models can train on pruned visual tokens (`check_model`), encoding images once
(`encode_images`), and giving a model fewer visual tokens than it expects (`assemble`) through its public
``mm_encoder_outputs`` argument.
"""

from trimtab.anatomy.assemble import RowLayout, assemble, full_inputs, read_rows
from trimtab.anatomy.encode import EncodedImages, Words, encode_images, has_images, question_embeddings, supplied_needs
from trimtab.anatomy.families import Host, Modality, SupportReport, check_model, open_host
from trimtab.anatomy.family_table import FAMILIES, REFUSED, Family

__all__ = [
    "FAMILIES",
    "REFUSED",
    "EncodedImages",
    "Family",
    "Host",
    "Modality",
    "RowLayout",
    "SupportReport",
    "Words",
    "assemble",
    "check_model",
    "encode_images",
    "full_inputs",
    "has_images",
    "open_host",
    "question_embeddings",
    "read_rows",
    "supplied_needs",
]
