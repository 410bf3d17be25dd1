"""convert(): a checkpoint of another implementation into a checkpoint folder, and back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ..models.families import FAMILIES
from . import pipeline
from .precision import Precision
from .recognition import recognize
from .report import Report


def convert(
    source: str | Path,
    out: str | Path,
    *,
    family: str | None = None,
    to: str = "mlx",
    dry_run: bool = False,
    origin: Mapping[str, str] | None = None,
    quantize: int | None = None,
    group_size: int = 64,
    dtype: str | None = None,
    settings: Mapping[str, Any] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Report:
    """Converts another implementation's checkpoint into a checkpoint folder, or a checkpoint folder back.

    Tensors are read, changed and written one by one. They keep their bits and dtype unless `quantize` or `dtype` asks
    for others.

    Args:
        source: A file of tensors (.safetensors, .th, .pt, .pth, .ckpt, .bin, .npz), the .yaml of a bag of demucs, a
            GGUF file, a folder of Hugging Face or CTranslate2, or a folder that holds one model file; with
            `to="pytorch"`, a checkpoint folder.
        out: The folder to write: new, empty or, for `to="mlx"`, an older checkpoint.
        family: Refuses sources of other families than this.
        to: "mlx", or "pytorch" to lead a checkpoint back into the files that it was made from.
        dry_run: Reports what would be written, from the names, shapes and dtypes alone, and writes nothing.
        origin: More entries for the provenance, such as the repository.
        quantize: Of a language model only: 4 or 8 packs matrices in as many bits, 0 makes floats of packed ones.
        group_size: How many numbers share a scale: 32, 64 or 128.
        dtype: Of a language model only: float32, float16 or bfloat16, for its floats.
        settings: What a file of tensors leaves open about its model, such as num_heads; of a state dict of HTDemucs
            also `config`, the .yaml of Music-Source-Separation-Training that tells it.
        progress: Called as progress(done, total) with numbers of tensors, before each is written and at the end.

    Returns:
        What was done to each tensor.

    Raises:
        ValueError: The source cannot be read or does not fit; the message lists all that does not fit.
        OSError: A file is missing, or cannot be written. After any error nothing has been written.
    """
    if family is not None and family not in FAMILIES:
        raise ValueError(f"family must be one of {', '.join(FAMILIES)}, got {family!r}")
    if to not in ("mlx", "pytorch"):
        raise ValueError(f'to must be "mlx" or "pytorch", got {to!r}')
    source, out = Path(source), Path(out)
    precision = Precision(quantize, group_size, dtype)
    if to == "pytorch":
        if precision != Precision() or settings:
            raise ValueError(
                'quantize, group_size, dtype and settings must not be given with to="pytorch": nothing is changed'
            )
        return pipeline.convert_to_original(source, out, family=family, dry_run=dry_run)
    converter, original = recognize(source, settings or {})
    if precision != Precision() and not converter.quantizes:
        raise ValueError("quantize, group_size and dtype are for language models only")
    pipeline.check_family(source, family, converter.family)
    return pipeline.convert_to_mlx(
        original,
        out,
        converter,
        precision,
        source=source,
        dry_run=dry_run,
        origin=origin or {},
        progress=progress,
    )
