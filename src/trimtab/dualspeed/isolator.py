"""The mode isolator: a few learned rows in front of every pruned image that tell the model it is pruned."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import nn

from trimtab.anatomy import Host
from trimtab.dualspeed.ranks import fill, whole
from trimtab.errors import OutputError, SettingError
from trimtab.files import write_bytes_atomic
from trimtab.shapes import Float, Tensor

FILE_NAME = "isolator.safetensors"
KEY = "rows"


class ModeIsolator(nn.Module):
    """A prefix of the visual block in fast mode; the full view never contains it.

    Args:
        tokens: Number of rows, at least 1.
        width: Width of the language model.
        seed: Of the first values, uniform in +-1/sqrt(width) as the released code draws them.
        device: Where the rows live.
        dtype: Their type.
    """

    def __init__(self, tokens: int, width: int, seed: int, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        uniform = torch.rand(tokens, width, generator=generator) * 2 - 1
        self.shape = (tokens, width)  # ZeRO-3 leaves the rows themselves empty
        self.rows = nn.Parameter((uniform / width**0.5).to(device=device, dtype=dtype))

    def forward(self) -> Float[Tensor, "prefix width"]:
        """Return the rows, as a copy: what gathers a sharded parameter for a module takes it back afterwards."""
        return self.rows.clone()

    def save(self, folder: Path, *, write: bool = True) -> None:
        """Write the rows to ``isolator.safetensors`` in a folder, whole or not at all.

        Args:
            folder: Where to.
            write: Whether this process writes; where the rows are sharded all processes must call this.

        Raises:
            OutputError: The file cannot be written.
        """
        rows = whole(self.rows)
        if write:
            write_bytes_atomic(folder / FILE_NAME, save({KEY: rows.cpu().contiguous()}))

    def load(self, source: Path) -> None:
        """Take over the rows of a file, or of the file in a folder (also in its ``dualspeed`` folder).

        Raises:
            OutputError: There is no such file.
            SettingError: The file holds no isolator, or one of another shape.
        """
        path = find_isolator(source)
        try:
            tensors = load(path.read_bytes())
        except (SafetensorError, ValueError) as error:
            raise SettingError(
                f"{path} is not a safetensors file ({error}). Give the file that training wrote."
            ) from error
        if KEY not in tensors:
            raise SettingError(f"{path} holds {', '.join(sorted(tensors)) or 'nothing'}, but no isolator ({KEY!r}).")
        rows = tensors[KEY]
        if rows.shape != self.shape:
            raise SettingError(
                f"The isolator in {path} has the shape {tuple(rows.shape)}, but this run needs "
                f"{self.shape} (isolator_tokens x width of the language model). Set "
                f"isolator_tokens={rows.shape[0]}, or start afresh with isolator_from=None."
            )
        fill(self.rows, rows)


def fresh_isolator(host: Host, tokens: int, seed: int) -> ModeIsolator:
    """Return an isolator for a model, on its device and of the type that its embeddings put out."""
    weight = host.model.get_input_embeddings().weight
    # Embeddings may be packed (4 or 8 bits); what comes out of them is of the type that the model computes in.
    dtype = weight.dtype if weight.is_floating_point() else host.model.dtype
    return ModeIsolator(tokens, host.width, seed, weight.device, dtype)


def find_isolator(source: Path) -> Path:
    """Return the isolator file that a path means.

    Args:
        source: The file itself, a folder with it, or a checkpoint with it in its ``dualspeed`` folder.

    Raises:
        OutputError: There is none.
    """
    for path in (source, source / FILE_NAME, source / "dualspeed" / FILE_NAME):
        if path.is_file():
            return path
    raise OutputError(
        f"isolator_from={str(source)!r}: no {FILE_NAME} there. Give a checkpoint, its dualspeed folder or the file."
    )
