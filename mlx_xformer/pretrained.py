"""load(): a model by its checkpoint folder, by an original file or folder, or by name: the embedded one, or the hub's.

Conversions and downloads are kept in a cache folder, MLX_XFORMER_CACHE or ~/.cache/mlx-xformer; what lies there is used
without asking the hub again.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

from ._version import __version__
from .checkpoint import (
    EXTRAS,
    SENTENCES,
    is_checkpoint,
    load_model,
    parameter_count,
    parameter_shapes,
    read_checkpoint,
)
from .converters import folder as hugging_face
from .converters import language
from .converters.convert import convert
from .converters.originals import find_originals
from .converters.source import dtype_name, plain_name, read_bag

if TYPE_CHECKING:
    from .models.bert import Bert
    from .models.decoder import Decoder
    from .models.htdemucs import Bag, HTDemucs
    from .models.t5 import T5

NAMES = ("htdemucs", "htdemucs_ft", "htdemucs_6s", "htdemucs_mini")
EMBEDDED = {"htdemucs_mini": Path(__file__).parent / "data" / "htdemucs_mini"}
NAMESPACE = "adefossez"
_NAME = re.compile(r"([A-Za-z0-9]\w*)|([A-Za-z0-9][\w.-]*)/([A-Za-z0-9][\w.-]*)", re.ASCII)
# Layers, in the words of every family, encoders first; an attention layer alone has none.
_COUNTS = (
    *("num_layers", "num_stack", "encoder_layers", "num_encoder_layers"),
    *("decoder_layers", "num_decoder_layers"),
)
_SMALL = 1 << 26  # bytes up to which a file of a language model is known by its content
_T = TypeVar("_T")


def load(path_or_name: str | Path) -> HTDemucs | Bag | Decoder | Bert | T5:
    """The model, ready to run. Takes what `resolve` takes."""
    return cast("HTDemucs | Bag | Decoder | Bert | T5", load_model(resolve(path_or_name)))


def resolve(path_or_name: str | Path) -> Path:
    """The checkpoint folder of a model: of a folder itself; of an original file, bag or folder, a GGUF file, or a
    folder of Hugging Face, converted into the cache; of one of NAMES, or of "namespace/name" on the hub, downloaded on
    first use.

    ValueError or OSError, in one line, says what was tried.
    """
    if path_or_name == "":
        raise ValueError("model must be a name, a file or a folder, got nothing")
    path = Path(path_or_name)
    if path.exists() and (path_or_name not in NAMES or is_checkpoint(path)):  # a name outdoes a folder of stems
        return path if is_checkpoint(path) else _converted(path)
    if path_or_name in EMBEDDED:
        return EMBEDDED[str(path_or_name)]
    named = _NAME.fullmatch(path_or_name) if isinstance(path_or_name, str) else None
    if not named:
        raise FileNotFoundError(f"{path_or_name}: no such file or folder")
    known, namespace, name = named.groups()
    if namespace is None and known not in NAMES:
        raise ValueError(
            f"model must be one of {', '.join(NAMES)}, a name on the hub as NAMESPACE/NAME, or a file or folder, "
            f"got {known!r}"
        )
    if namespace is None:
        return _from_hub(NAMESPACE, known)
    if name.startswith("htdemucs"):
        return _from_hub(namespace, name)
    if found := _language_from_hub(f"{namespace}/{name}"):
        return found
    try:
        return _from_hub(namespace, name)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"the hub has no config.json in {namespace}/{name}, and {error}") from None


def describe(path_or_name: str | Path) -> str:
    """What a model is, in a few lines: its folder, family, configuration and provenance."""
    folder = resolve(path_or_name)
    checkpoint = read_checkpoint(folder)
    shapes = parameter_shapes(checkpoint.family, checkpoint.config)
    weights = checkpoint.weights
    dtypes = ", ".join(sorted({dtype_name(x.dtype) for x in weights.values()}))
    members = checkpoint.config.get("members", [checkpoint.config])
    count = parameter_count(checkpoint.family, checkpoint.config)
    lines = [
        f"{path_or_name}",
        f"  folder      {folder}",
        f"  family      {checkpoint.family}" + (f" of {len(members)}" if len(members) > 1 else ""),
        _made_of(checkpoint.family, members[0]),
        f"  weights     {len(weights)} tensors, {count:,} parameters, {dtypes}"
        + ("" if {n: x.shape for n, x in weights.items()} == shapes else " (they do not fit the configuration)"),
    ]
    for source in checkpoint.provenance.get("sources", []):
        lines.append(f"  from        {source.get('file')} (SHA-256 {source.get('sha256')})")
    if repository := checkpoint.provenance.get("repository"):
        lines.append(f"  repository  {repository} at {checkpoint.provenance.get('revision')}")
    return "\n".join(lines)


def _made_of(family: str, config: dict[str, Any]) -> str:
    """The line of what a model is about."""
    if "sources" in config:
        return f"  sources     {', '.join(config['sources'])}"
    if family != language.FAMILY:
        return f"  layers      {_layers(config)}"
    packed = config.get("quantization")
    bits = f", {packed['bits']} bits in groups of {packed['group_size']}" if packed else ""
    moe = config.get("moe")
    experts = f", {moe['num_experts']} experts, {moe['num_experts_per_tok']} a token" if moe else ""
    layers = f"{config['num_layers']} of width {config['embed_dim']}, {config['vocab_size']} tokens"
    return f"  layers      {layers}{experts}{bits}"


def _layers(config: dict[str, Any]) -> str:
    """How many layers there are, how wide they are, and the vocabulary if there is one."""
    vocabulary = config.get("vocab_size")
    config = {**config, **config.get("stack", {})}
    counts = [str(config[name]) for name in _COUNTS if config.get(name)]
    if config.get("model") == "encoder_decoder" and len(counts) == 1:  # as many again
        counts *= 2
    width = config.get("embed_dim", config.get("model_dim"))
    tokens = "" if vocabulary is None else f", {vocabulary} tokens"
    return f"{' + '.join(counts) or 1} of width {width}{tokens}"


def available() -> dict[str, str]:
    """The models that have a name, and where each is: embedded, kept from a download, or on the hub."""
    where = {}
    for name in NAMES:
        kept = _kept(repository(NAMESPACE, name), name)
        embedded = f"in this package, {EMBEDDED[name]}" if name in EMBEDDED else None
        where[name] = embedded or (str(kept) if kept else "on the hub, downloaded on first use")
    return where


def cache_folder() -> Path:
    """Where conversions and downloads are kept."""
    return Path(os.environ.get("MLX_XFORMER_CACHE") or Path.home() / ".cache" / "mlx-xformer")


def repository(namespace: str, name: str) -> str:
    """The hub repository of a model of demucs: `htdemucs_ft` is in HTDemucs-ft."""
    first, dash, rest = name.partition("_")
    return f"{namespace}/HTDemucs{'-' if dash else ''}{rest}" if first == "htdemucs" else f"{namespace}/Demucs-{name}"


def _converted(path: Path) -> Path:
    """The conversion of an original, kept under the digest of its files; a language model's large ones are known by
    their place, size and time."""
    digest = hashlib.sha256(__version__.encode())
    speaks = language.is_language(path)
    for file in language.all_files(path) if speaks else find_originals(path).all_files():
        facts = file.stat()
        if speaks and facts.st_size > _SMALL:
            known = f"{file.resolve()} {facts.st_size} {facts.st_mtime_ns}"
        else:
            known = _hash(file, hashlib.sha256)
        digest.update(f"\n{file.name} {known}".encode())
    folder = cache_folder() / "converted" / digest.hexdigest()[:16]
    if not is_checkpoint(folder):
        convert(path, folder)
    return folder


def _hash(path: Path, algorithm: Callable[[], Any], head: bytes = b"") -> str:
    digest = algorithm()
    digest.update(head)
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _from_hub(namespace: str, name: str) -> Path:
    """The conversion of a model of demucs: the one kept from before, or else downloaded, checked and converted."""
    repo = repository(namespace, name)
    if kept := _kept(repo, name):
        return kept
    bag_file = f"{name}.yaml"
    revision, staging = _latest(repo, bag_file)
    bag = _fetch(repo, bag_file, revision, staging)
    for signature in dict.fromkeys(read_bag(bag).signatures):
        _fetch(repo, f"{plain_name(signature)}.safetensors", revision, staging)
    folder = _hub_folder(repo, name) / revision
    convert(bag, folder, origin={"repository": repo, "revision": revision})
    shutil.rmtree(staging, ignore_errors=True)
    return folder


def _language_from_hub(repo: str) -> Path | None:
    """The same of a language model's repository; None where there is no config.json."""
    name = "model"
    if kept := _kept(repo, name):
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
    for file in [hugging_face.ONE] if index is None else hugging_face.shards(index):
        _fetch(repo, file, revision, staging)
    folder = _hub_folder(repo, name) / revision
    convert(staging, folder, origin={"repository": repo, "revision": revision})
    shutil.rmtree(staging, ignore_errors=True)
    return folder


def _latest(repo: str, file: str) -> tuple[str, Path]:
    """The commit that a repository is at, and where its files are downloaded to."""
    revision = _asked(repo, file, lambda: _metadata(repo, file, None)).commit_hash
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


def _kept(repo: str, name: str) -> Path | None:
    """The latest conversion of a hub model."""
    known = [p for p in _hub_folder(repo, name).glob("*") if is_checkpoint(p)]
    return max(known, key=lambda p: p.stat().st_mtime, default=None)


def _fetch(repo: str, file: str, revision: str, staging: Path) -> Path:
    """A file of a repository at a commit, checked against the digest that the hub reports for it."""
    from huggingface_hub import hf_hub_download

    expected = _asked(repo, file, lambda: _metadata(repo, file, revision)).etag or ""
    path = Path(_asked(repo, file, lambda: hf_hub_download(repo, file, revision=revision, local_dir=staging)))
    if re.fullmatch("[0-9a-f]{64}", expected):
        kind, actual = "SHA-256", _hash(path, hashlib.sha256)
    elif re.fullmatch("[0-9a-f]{40}", expected):  # a small file outside LFS has git's own digest
        kind, actual = "git SHA-1", _hash(path, hashlib.sha1, b"blob %d\0" % path.stat().st_size)
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


def _asked(repo: str, file: str, question: Callable[[], _T]) -> _T:
    """Asks the hub; what goes wrong becomes one line. Its client raises errors of whichever HTTP library it uses."""
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
