"""Models from the Hugging Face hub, and conversions of originals, kept in a cache folder."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from .._version import __version__
from ..converters.conversion import convert
from ..converters.formats import hugging_face
from ..converters.formats.demucs import read_bag
from ..converters.formats.source import check_plain_name
from ..converters.recognition import list_files
from ..storage.checkpoint import EXTRAS, SENTENCES, is_checkpoint
from ..storage.files import hash_file

NAMESPACE = "adefossez"  # on the hub, whose models of demucs need no namespace here
NAME = re.compile(r"([A-Za-z0-9]\w*)|([A-Za-z0-9][\w.-]*)/([A-Za-z0-9][\w.-]*)", re.ASCII)
_T = TypeVar("_T")
_SMALL = 1 << 28  # bytes up to which a file is known by its content


def cache_folder() -> Path:
    """Where conversions and downloads are kept: MLX_XFORMER_CACHE, or ~/.cache/mlx-xformer."""
    return Path(os.environ.get("MLX_XFORMER_CACHE") or Path.home() / ".cache" / "mlx-xformer")


def name_repository(namespace: str, name: str) -> str:
    """The hub repository of a model of demucs: `htdemucs_ft` is in HTDemucs-ft."""
    first, dash, rest = name.partition("_")
    return f"{namespace}/HTDemucs{'-' if dash else ''}{rest}" if first == "htdemucs" else f"{namespace}/Demucs-{name}"


def convert_original(path: Path) -> Path:
    """The conversion of an original, kept under a digest of its files."""
    digest = hashlib.sha256(__version__.encode())
    for file in list_files(path):
        digest.update(f"\n{file.name} {_identify(file)}".encode())
    folder = cache_folder() / "converted" / digest.hexdigest()[:16]
    if not is_checkpoint(folder):
        convert(path, folder)
    return folder


def _identify(file: Path) -> str:
    """The digest of a file's content; of a large file, which takes long to read, its path, size and time of change."""
    facts = file.stat()
    if facts.st_size > _SMALL:
        return f"{file.resolve()} {facts.st_size} {facts.st_mtime_ns}"
    return hash_file(file)


def download_model(namespace: str, name: str) -> Path:
    """The conversion of a model of demucs, which is downloaded and checked unless it is in the cache already."""
    repo = name_repository(namespace, name)
    if kept := find_kept(repo, name):
        return kept
    bag_file = f"{name}.yaml"
    revision, staging = _latest(repo, bag_file)
    bag = _fetch(repo, bag_file, revision, staging)
    for signature in dict.fromkeys(read_bag(bag).signatures):
        _fetch(repo, f"{check_plain_name(signature)}.safetensors", revision, staging)
    folder = _hub_folder(repo, name) / revision
    convert(bag, folder, origin={"repository": repo, "revision": revision})
    shutil.rmtree(staging, ignore_errors=True)
    return folder


def download_folder(repo: str) -> Path | None:
    """The same for a repository of Hugging Face's layout; None where there is no config.json."""
    name = "model"
    if kept := find_kept(repo, name):
        return kept
    try:
        revision, staging = _latest(repo, "config.json")
    except FileNotFoundError:
        return None
    _fetch(repo, "config.json", revision, staging)
    for extra in EXTRAS:
        if extra not in SENTENCES[1:] or (staging / SENTENCES[0]).is_file():
            _fetch_if_there(repo, extra, revision, staging)
    index = _fetch_if_there(repo, hugging_face.INDEX, revision, staging)
    for file in [hugging_face.WEIGHTS] if index is None else hugging_face.list_shards(index):
        _fetch(repo, file, revision, staging)
    folder = _hub_folder(repo, name) / revision
    convert(staging, folder, origin={"repository": repo, "revision": revision})
    shutil.rmtree(staging, ignore_errors=True)
    return folder


def _latest(repo: str, file: str) -> tuple[str, Path]:
    """The latest commit of a repository, and the folder that its files are downloaded to."""
    revision = _ask(repo, file, lambda: _metadata(repo, file, None)).commit_hash
    if not revision or not re.fullmatch("[0-9a-f]{40}", revision):
        raise ValueError(f"hub repository {repo} must name the commit of {file}, got {revision!r}")
    return revision, cache_folder() / "downloads" / f"{repo.replace('/', '--')}-{revision}"


def _fetch_if_there(repo: str, file: str, revision: str, staging: Path) -> Path | None:
    try:
        return _fetch(repo, file, revision, staging)
    except FileNotFoundError:
        return None


def _hub_folder(repo: str, name: str) -> Path:
    return cache_folder() / "hub" / repo.replace("/", "--") / name


def find_kept(repo: str, name: str) -> Path | None:
    """The latest conversion of a hub model."""
    known = [p for p in _hub_folder(repo, name).glob("*") if is_checkpoint(p)]
    return max(known, key=lambda p: p.stat().st_mtime, default=None)


def _fetch(repo: str, file: str, revision: str, staging: Path) -> Path:
    """A file of a repository at a commit, checked against the digest that the hub reports for it."""
    from huggingface_hub import hf_hub_download

    expected = _ask(repo, file, lambda: _metadata(repo, file, revision)).etag or ""
    path = Path(_ask(repo, file, lambda: hf_hub_download(repo, file, revision=revision, local_dir=staging)))
    if re.fullmatch("[0-9a-f]{64}", expected):
        kind, actual = "SHA-256", hash_file(path)
    elif re.fullmatch("[0-9a-f]{40}", expected):  # a small file outside LFS has git's own digest
        kind, actual = "git SHA-1", hash_file(path, "sha1", b"blob %d\0" % path.stat().st_size)
    else:
        raise ValueError(f"the hub reports no digest for {file} of {repo}, got {expected!r}: not used")
    if actual != expected:
        shutil.rmtree(staging, ignore_errors=True)
        raise ValueError(
            f"{file} of {repo}: the {kind} must be {expected}, got {actual}: download thrown away, try again"
        )
    return path


def _metadata(repo: str, file: str, revision: str | None) -> Any:
    from huggingface_hub import get_hf_file_metadata, hf_hub_url

    return get_hf_file_metadata(hf_hub_url(repo, file, revision=revision))


def _ask(repo: str, file: str, question: Callable[[], _T]) -> _T:
    """The hub's answer. Any failure becomes one line: its client raises errors of whichever HTTP library it uses."""
    from huggingface_hub.errors import EntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError

    try:
        return question()
    except (EntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError) as error:
        if not isinstance(error, FileNotFoundError):  # that one is LocalEntryNotFoundError: nothing was reached
            raise FileNotFoundError(f"the hub has no {file} in {repo} (or it is private)") from None
        reason = str(error)
    except Exception as error:
        reason = str(error) or type(error).__name__
    raise ConnectionError(
        f"{file} of hub repository {repo} could not be downloaded ({' '.join(reason.split())[:160]}): connect once, or "
        f"copy the folder {cache_folder()} from a machine that has the model, or give a file of your own"
    )
