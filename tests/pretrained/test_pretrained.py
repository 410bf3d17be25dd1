"""load(): folders, files, names, and the hub, played by a server on the loopback interface."""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import yaml
from mlx.utils import tree_flatten
from safetensors.numpy import save_file
from support.models import WHISPER_SIZES, bert_tokenizer, options, sentence_modules, write_bert
from support.text import causal_lm_config as config
from support.text import write_folder

from mlx_xformer.converters.conversion import convert
from mlx_xformer.converters.families import htdemucs
from mlx_xformer.converters.rules import inverse_shapes
from mlx_xformer.models.families import FAMILIES, parameter_shapes
from mlx_xformer.models.htdemucs import Bag, HTDemucs, HTDemucsConfig
from mlx_xformer.pretrained import hub as pretrained_hub
from mlx_xformer.pretrained import loading, summary
from mlx_xformer.storage.checkpoint import read_checkpoint, save_checkpoint

CONFIG = HTDemucsConfig.from_dict(options("base") | {"channels": 2, "bottom_channels": 12, "t_layers": 1})
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def write_original(folder, signature, seed=0):
    rng = np.random.default_rng(seed)
    shapes = inverse_shapes(htdemucs.rules(CONFIG), parameter_shapes("htdemucs", CONFIG.to_dict()))
    state = {name: rng.normal(size=shape).astype(np.float16) for name, shape in shapes.items()}
    save_file(state, folder / f"{signature}.safetensors", htdemucs.metadata(CONFIG))


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MLX_XFORMER_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


# Folders and files


def test_a_checkpoint_folder(tmp_path, cache):
    write_original(tmp_path, "sig")
    convert(tmp_path / "sig.safetensors", tmp_path / "mlx")
    assert loading.resolve(tmp_path / "mlx") == tmp_path / "mlx"
    assert isinstance(loading.load(str(tmp_path / "mlx")), HTDemucs) and not cache.exists()
    text = summary.describe(tmp_path / "mlx")
    assert "sources     drums, voice, rest" in text and "F16" in text and "sig.safetensors (SHA-256 " in text
    assert "do not fit" not in text


def test_an_original_is_converted_once(tmp_path, cache):
    write_original(tmp_path, "sig")
    first = loading.resolve(tmp_path / "sig.safetensors")
    assert first.is_relative_to(cache) and isinstance(loading.load(tmp_path / "sig.safetensors"), HTDemucs)
    stamp = (first / "config.json").stat().st_mtime_ns
    assert loading.resolve(tmp_path / "sig.safetensors") == first
    assert (first / "config.json").stat().st_mtime_ns == stamp
    write_original(tmp_path, "sig", seed=1)
    assert loading.resolve(tmp_path / "sig.safetensors") != first
    (tmp_path / "one.yaml").write_text("models: [sig, sig]\n")
    assert isinstance(loading.load(tmp_path / "one.yaml"), Bag)


@pytest.mark.parametrize(
    ("name", "error", "reason"),
    [
        ("nowhere.th", FileNotFoundError, r"nowhere\.th: no such file or folder"),
        ("./nowhere", FileNotFoundError, "no such file or folder"),
        ("a/b/c", FileNotFoundError, "no such file or folder"),
        ("../htdemucs", FileNotFoundError, "no such file or folder"),
        ("someone/../x", FileNotFoundError, "no such file or folder"),
        ("htdemucs_x", ValueError, "model must be one of htdemucs, htdemucs_ft, htdemucs_6s, htdemucs_mini, a name"),
        ("mdx", ValueError, "got 'mdx'"),
        ("", ValueError, "must be"),
    ],
)
def test_what_is_no_model(tmp_path, monkeypatch, name, error, reason):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error, match=reason) as raised:
        loading.load(name)
    assert "\n" not in str(raised.value) and not any(tmp_path.iterdir())


def test_a_name_outdoes_a_folder_of_stems(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "htdemucs_mini").mkdir()
    assert loading.resolve("htdemucs_mini") == loading.EMBEDDED["htdemucs_mini"]


def test_repositories():
    assert [
        pretrained_hub.name_repository("adefossez", name) for name in ("htdemucs", "htdemucs_ft", "htdemucs_6s")
    ] == [
        "adefossez/HTDemucs",
        "adefossez/HTDemucs-ft",
        "adefossez/HTDemucs-6s",
    ]
    assert pretrained_hub.name_repository("me", "other_one") == "me/Demucs-other_one"


# The hub


class Hub:
    """Imitates what a hub answers for files of repositories: commit, size, digest, content."""

    def __init__(self):
        self.files: dict[str, bytes] = {}
        self.digests: dict[str, str | None] = {}
        self.requests: list[str] = []
        self.commit = COMMIT
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                hub.requests.append(f"{self.command} {self.path}")
                hub.answer(self)

            do_HEAD = do_GET

            def log_message(self, *arguments):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"

    def add(self, path: str, content: bytes, *, large: bool = True) -> None:
        """`large` files carry their SHA-256, the others git's digest."""
        git = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
        self.files[path] = content
        self.digests[path] = hashlib.sha256(content).hexdigest() if large else git

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        repo, _, rest = request.path.lstrip("/").partition("/resolve/")
        revision, _, file = rest.partition("/")
        path = f"{repo}/{file}"
        if path not in self.files or revision not in ("main", self.commit):
            known = any(name.startswith(f"{repo}/") for name in self.files)
            request.send_response(404)
            request.send_header("X-Error-Code", "EntryNotFound" if known else "RepoNotFound")
            request.send_header("Content-Length", "0")
            request.end_headers()
            return
        content, digest = self.files[path], self.digests[path]
        request.send_response(200)
        request.send_header("X-Repo-Commit", self.commit)
        request.send_header("Content-Length", str(len(content)))
        if digest is not None:
            request.send_header("ETag", f'"{digest}"')
            if len(digest) == 64:
                request.send_header("X-Linked-ETag", f'"{digest}"')
                request.send_header("X-Linked-Size", str(len(content)))
        request.end_headers()
        if request.command == "GET":
            request.wfile.write(content)


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    folder = tmp_path_factory.mktemp("originals")
    for n in range(2):
        write_original(folder, f"sig{n}", n)
    return folder


@pytest.fixture
def hub(originals):
    hub = Hub()
    bag = {"models": ["sig0", "sig1"], "weights": [[1.0, 0.0, 0.5], [0.0, 1.0, 0.5]]}
    hub.add("adefossez/HTDemucs-ft/htdemucs_ft.yaml", yaml.safe_dump(bag).encode(), large=False)
    hub.add("me/HTDemucs/htdemucs.yaml", b"models: [sig0]\n", large=False)
    for repo, signatures in {"adefossez/HTDemucs-ft": ["sig0", "sig1"], "me/HTDemucs": ["sig0"]}.items():
        for signature in signatures:
            file = f"{signature}.safetensors"
            hub.add(f"{repo}/{file}", (originals / file).read_bytes())
    yield hub
    hub.server.shutdown()
    hub.server.server_close()


CHILD = """
import json, sys
from mlx_xformer.pretrained import loading as pretrained
try:
    folder = pretrained.resolve(sys.argv[1])
    kind = type(pretrained.load(sys.argv[1])).__name__
    print(json.dumps({"folder": str(folder), "kind": kind}))
except (ValueError, OSError) as error:
    print(json.dumps({"error": type(error).__name__, "message": str(error)}))
"""


def ask(name, url, home, **environment):
    """Loads a model in a process of its own, because the hub's client reads its settings when it is imported."""
    variables = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING"))}
    variables |= {"HF_ENDPOINT": url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", **environment}
    command = [sys.executable, "-c", CHILD, name]
    done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def files(folder: Path):
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()) if folder.exists() else []


def refused(answer, kind, *parts):
    assert answer.get("error") == kind, answer
    assert all(part in answer["message"] for part in parts) and "\n" not in answer["message"], answer


def test_a_bag_from_the_hub_and_then_without_it(tmp_path, cache, hub):
    answer = ask("htdemucs_ft", hub.url, tmp_path / "hf")
    folder = cache / "hub" / "adefossez--HTDemucs-ft" / "htdemucs_ft" / COMMIT
    assert answer == {"folder": str(folder), "kind": "Bag"}
    assert [f for f in files(cache) if "htdemucs_ft" not in f] == []  # the downloads are gone
    checkpoint = read_checkpoint(folder)
    assert checkpoint.config["weights"] == [[1.0, 0.0, 0.5], [0.0, 1.0, 0.5]]
    assert checkpoint.provenance["repository"] == "adefossez/HTDemucs-ft"
    assert checkpoint.provenance["revision"] == COMMIT
    assert {r.split("/resolve/")[1].split("/")[0] for r in hub.requests if "safetensors" in r} == {COMMIT}
    assert "repository  adefossez/HTDemucs-ft at 0123" in summary.describe("htdemucs_ft")
    count = len(hub.requests)
    hub.server.shutdown()
    assert ask("htdemucs_ft", "http://127.0.0.1:9", tmp_path / "hf") == answer
    assert len(hub.requests) == count


def test_somebody_else_s_repository(tmp_path, cache, hub):
    assert ask("me/htdemucs", hub.url, tmp_path / "hf")["kind"] == "HTDemucs"


@pytest.mark.parametrize("file", ["sig1.safetensors", "htdemucs_ft.yaml"])
def test_a_wrong_digest_is_refused_and_nothing_is_kept(tmp_path, cache, hub, file):
    path = f"adefossez/HTDemucs-ft/{file}"
    right = hub.digests[path]
    hub.digests[path] = right[:-1] + ("0" if right[-1] != "0" else "1")
    answer = ask("htdemucs_ft", hub.url, tmp_path / "hf")
    refused(answer, "ValueError", f"{file} of adefossez/HTDemucs-ft", "must be", right, "try again")
    assert files(cache) == []
    hub.digests[path] = right  # and the next attempt is not held back by the first
    assert ask("htdemucs_ft", hub.url, tmp_path / "hf")["kind"] == "Bag"


def test_a_file_without_a_digest_is_refused(tmp_path, cache, hub):
    hub.digests["me/HTDemucs/sig0.safetensors"] = "v1"
    refused(ask("me/htdemucs", hub.url, tmp_path / "hf"), "ValueError", "reports no digest for sig0.safetensors")


def test_what_the_hub_does_not_have(tmp_path, cache, hub):
    answer = ask("htdemucs_6s", hub.url, tmp_path / "hf")
    refused(answer, "FileNotFoundError", "no htdemucs_6s.yaml in adefossez/HTDemucs-6s")
    del hub.files["me/HTDemucs/sig0.safetensors"]
    refused(ask("me/htdemucs", hub.url, tmp_path / "hf"), "FileNotFoundError", "no sig0.safetensors in me/HTDemucs")
    assert not (cache / "hub").exists()


def test_offline_is_one_line(tmp_path, cache):
    line = ("htdemucs.yaml of hub repository adefossez/HTDemucs could not be downloaded", "connect once", str(cache))
    refused(ask("htdemucs", "http://127.0.0.1:9", tmp_path / "hf"), "ConnectionError", *line)
    refused(ask("htdemucs", "http://127.0.0.1:9", tmp_path / "hf", HF_HUB_OFFLINE="1"), "ConnectionError", *line)
    assert files(cache) == []


def test_a_bag_on_the_hub_cannot_name_a_path(tmp_path, cache, hub):
    hub.add("me/HTDemucs/htdemucs.yaml", b"models: ['../../escaped']\n", large=False)
    refused(ask("me/htdemucs", hub.url, tmp_path / "hf"), "ValueError", "plain name")
    assert not any("escaped" in request for request in hub.requests)


def test_a_commit_that_is_no_commit(tmp_path, cache, hub):
    hub.commit = "../../escaped"
    refused(ask("me/htdemucs", hub.url, tmp_path / "hf"), "ValueError", "must name the commit", "escaped")
    assert files(cache) == []


def test_a_download_that_was_interrupted_goes_on(tmp_path, cache, hub):
    content = hub.files.pop("adefossez/HTDemucs-ft/sig1.safetensors")
    refused(ask("htdemucs_ft", hub.url, tmp_path / "hf"), "FileNotFoundError", "sig1.safetensors")
    shutil.rmtree(tmp_path / "hf", ignore_errors=True)
    hub.files["adefossez/HTDemucs-ft/sig1.safetensors"] = content
    before = len(hub.requests)
    assert ask("htdemucs_ft", hub.url, tmp_path / "hf")["kind"] == "Bag"
    assert not any(r.startswith("GET") and "sig0" in r for r in hub.requests[before:])


# Language models


def share(hub, repo, folder):
    """Puts the files of a folder on the hub."""
    for path in folder.iterdir():
        hub.add(f"{repo}/{path.name}", path.read_bytes(), large=path.suffix == ".safetensors")


@pytest.mark.parametrize("shards", [1, 3])
def test_a_language_model_from_the_hub_and_then_without_it(tmp_path, cache, hub, shards):
    state = write_folder(tmp_path / "llama", config("llama"), shards=shards)
    (tmp_path / "llama" / "tokenizer.json").write_text("{}")
    (tmp_path / "llama" / "pytorch_model.bin").write_text("not asked for")
    share(hub, "Some-one/Llama-3.2-1B", tmp_path / "llama")
    answer = ask("Some-one/Llama-3.2-1B", hub.url, tmp_path / "hf")
    folder = cache / "hub" / "Some-one--Llama-3.2-1B" / "model" / COMMIT
    assert answer == {"folder": str(folder), "kind": "CausalLM"}
    assert files(cache / "downloads") == [] and "tokenizer.json" in files(folder)
    assert not any("pytorch_model" in request for request in hub.requests)
    checkpoint = read_checkpoint(folder)
    assert (checkpoint.provenance["repository"], checkpoint.provenance["revision"]) == ("Some-one/Llama-3.2-1B", COMMIT)
    assert sum(x.size for x in checkpoint.weights.values()) == sum(x.size for x in state.values())
    hub.server.shutdown()
    assert ask("Some-one/Llama-3.2-1B", "http://127.0.0.1:9", tmp_path / "hf") == answer


def test_a_language_model_that_the_hub_has_in_part(tmp_path, cache, hub):
    write_folder(tmp_path / "llama", config("llama"), shards=3)
    share(hub, "me/llama", tmp_path / "llama")
    gone = "model-00002-of-00003.safetensors"
    content = hub.files.pop(f"me/llama/{gone}")
    refused(ask("me/llama", hub.url, tmp_path / "hf"), "FileNotFoundError", f"no {gone} in me/llama")
    hub.files[f"me/llama/{gone}"] = content
    right = hub.digests[f"me/llama/{gone}"]
    hub.digests[f"me/llama/{gone}"] = "0" * 64
    refused(ask("me/llama", hub.url, tmp_path / "hf"), "ValueError", f"{gone} of me/llama", "must be 0000", "try again")
    hub.digests[f"me/llama/{gone}"] = right
    assert ask("me/llama", hub.url, tmp_path / "hf")["kind"] == "CausalLM"


def test_an_index_on_the_hub_cannot_name_a_path(tmp_path, cache, hub):
    write_folder(tmp_path / "llama", config("llama"))
    share(hub, "me/llama", tmp_path / "llama")
    index = {"weight_map": {"model.norm.weight": "../../escaped.safetensors"}}
    hub.add("me/llama/model.safetensors.index.json", json.dumps(index).encode(), large=False)
    refused(ask("me/llama", hub.url, tmp_path / "hf"), "ValueError", "plain name")
    assert not any("escaped" in request for request in hub.requests)


def test_a_repository_that_is_neither(tmp_path, cache, hub):
    answer = ask("me/nothing", hub.url, tmp_path / "hf")
    refused(answer, "FileNotFoundError", "no config.json in me/nothing", "no nothing.yaml in me/Demucs-nothing")
    write_folder(tmp_path / "other", config("llama"), model_type="mamba")
    share(hub, "me/other", tmp_path / "other")
    answer = ask("me/other", hub.url, tmp_path / "hf")
    refused(answer, "ValueError", "model_type must be one of llama, ", ", bert, t5, whisper, got mamba")
    assert not (cache / "hub").exists()


# Encoders


@pytest.mark.parametrize("listed", [True, False])
def test_an_encoder_of_sentences_from_the_hub_and_then_without_it(tmp_path, cache, hub, listed):
    """With the files of sentence-transformers beside it, which are asked for where modules.json is there."""
    write_bert(tmp_path / "bert")
    bert_tokenizer(tmp_path / "bert")
    sentence_modules(tmp_path / "bert")
    pooling = tmp_path / "bert" / "1_Pooling"
    content = (pooling / "config.json").read_bytes()
    shutil.rmtree(pooling)
    if not listed:
        (tmp_path / "bert" / "modules.json").unlink()
    share(hub, "some/sentences", tmp_path / "bert")
    hub.add("some/sentences/1_Pooling/config.json", content, large=False)
    answer = ask("some/sentences", hub.url, tmp_path / "hf")
    folder = cache / "hub" / "some--sentences" / "model" / COMMIT
    assert answer == {"folder": str(folder), "kind": "Bert"} and files(cache / "downloads") == []
    assert {"tokenizer.json", "model.safetensors"} < set(files(folder))
    assert ("1_Pooling/config.json" in files(folder)) == listed
    assert "layers      2 of width 21, 31 tokens" in summary.describe("some/sentences")
    hub.server.shutdown()
    assert ask("some/sentences", "http://127.0.0.1:9", tmp_path / "hf") == answer


SEQUENCE = {"input_dim": 3, "output_dim": 2, "embed_dim": 10, "num_layers": 2, "num_heads": 5}


@pytest.mark.parametrize(
    ("family", "config", "line"),
    [
        ("whisper", WHISPER_SIZES, "2 + 3 of width 22, 53 tokens"),
        ("transformer", {"vocab_size": None, "embed_dim": 16, "num_decoder_layers": 0}, "6 of width 16"),
        ("transformer", {"vocab_size": 31, "embed_dim": 8, "num_encoder_layers": 2}, "2 + 6 of width 8, 31 tokens"),
        ("llm_prep", {"model": "regression", **SEQUENCE}, "2 of width 10"),
        ("llm_prep", {"model": "encoder_decoder", **SEQUENCE}, "2 + 2 of width 10"),
        ("scratch", {"model_dim": 10, "key_dim": 3, "hidden_dim": 7, "num_stack": 3}, "3 of width 10"),
        ("ferrotorch", {"embed_dim": 10, "num_heads": 5}, "1 of width 10"),
    ],
)
def test_what_a_model_is_made_of(tmp_path, family, config, line):
    """Whatever a family calls its layers."""
    full = FAMILIES[family][0].from_dict(config)
    weights = dict(tree_flatten(FAMILIES[family][1](full).parameters()))
    save_checkpoint(tmp_path / "model", weights, family=family, config=full.to_dict(), provenance={})
    assert re.search(rf"^  layers +{re.escape(line)}", summary.describe(tmp_path / "model"), re.M)
