"""load(): a model by its checkpoint folder, by another implementation's file or folder, or by a name.

Conversions and downloads are kept in a cache folder, MLX_XFORMER_CACHE or ~/.cache/mlx-xformer, and used from there
without asking the hub again.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, cast

from ..models.families import load_model
from ..storage.checkpoint import is_checkpoint
from .hub import NAME, NAMESPACE, convert_original, download_folder, download_model

if TYPE_CHECKING:
    from ..models.bert import Bert
    from ..models.causal_lm.model import CausalLM
    from ..models.htdemucs import Bag, HTDemucs
    from ..models.t5 import T5

NAMES = ("htdemucs", "htdemucs_ft", "htdemucs_6s", "htdemucs_mini")
EMBEDDED = {"htdemucs_mini": Path(__file__).parents[1] / "data" / "htdemucs_mini"}


def load(path_or_name: str | Path) -> HTDemucs | Bag | CausalLM | Bert | T5:
    """Loads a model, ready to run.

    Args:
        path_or_name: What `resolve` takes.

    Returns:
        The model of the checkpoint's family.

    Raises:
        ValueError, OSError: As of `resolve`, or the checkpoint does not fit its configuration.
    """
    return cast("HTDemucs | Bag | CausalLM | Bert | T5", load_model(resolve(path_or_name)))


def resolve(path_or_name: str | Path) -> Path:
    """Finds the checkpoint folder of a model, and makes it if need be.

    Args:
        path_or_name: A checkpoint folder; a file or folder that convert() takes, which is converted into the cache; one
            of NAMES; or "namespace/name" on the Hugging Face hub. Models of the hub are downloaded on first use.

    Raises:
        ValueError, OSError: There is no such model, or it cannot be converted; one line says what was tried.
    """
    if path_or_name == "":
        raise ValueError("model must be a name, a file or a folder, got nothing")
    path = Path(path_or_name)
    if path.exists() and (path_or_name not in NAMES or is_checkpoint(path)):  # else it may be a folder of stems
        return path if is_checkpoint(path) else convert_original(path)
    if path_or_name in EMBEDDED:
        return EMBEDDED[str(path_or_name)]
    named = NAME.fullmatch(path_or_name) if isinstance(path_or_name, str) else None
    if not named:
        raise FileNotFoundError(f"{path_or_name}: no such file or folder")
    known, namespace, name = named.groups()
    if namespace is None and known not in NAMES:
        raise ValueError(
            f"model must be one of {', '.join(NAMES)}, a name on the hub as NAMESPACE/NAME, or a file or folder, "
            f"got {known!r}"
        )
    if namespace is None:
        return download_model(NAMESPACE, known)
    if name.startswith("htdemucs"):
        return download_model(namespace, name)
    if found := download_folder(f"{namespace}/{name}"):
        return found
    try:
        return download_model(namespace, name)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"the hub has no config.json in {namespace}/{name}, and {error}") from None
