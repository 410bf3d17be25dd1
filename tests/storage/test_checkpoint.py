"""Checkpoints: written whole or not at all, read strictly."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from support.models import options

from mlx_xformer.backend.threads import clear_streams_at_thread_end
from mlx_xformer.models import families
from mlx_xformer.models.families import load_model
from mlx_xformer.models.htdemucs import Bag, BagConfig, HTDemucs, HTDemucsConfig
from mlx_xformer.storage import checkpoint
from mlx_xformer.storage.checkpoint import read_checkpoint, save_checkpoint

CONFIG = HTDemucsConfig.from_dict(options("base") | {"channels": 2, "bottom_channels": 12, "t_layers": 2})
FAMILY = {"family": "htdemucs", "config": CONFIG.to_dict(), "provenance": {"name": "x", "sources": []}}


def drawn(module, dtype=mx.float16, seed=1):
    rng = np.random.default_rng(seed)
    parameters = tree_flatten(module.parameters())
    return {name: mx.array(rng.normal(size=x.shape).astype(np.float32)).astype(dtype) for name, x in parameters}


WEIGHTS = drawn(HTDemucs(CONFIG))


def save(folder, weights=WEIGHTS, **changes):
    save_checkpoint(folder, weights, **(FAMILY | changes))
    return folder


def edit(folder, **changes):
    """Changes entries of config.json; None takes them out."""
    content = json.loads((folder / "config.json").read_text()) | changes
    content = {key: value for key, value in content.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(content))


def entries(folder):
    return sorted(path.name for path in folder.iterdir())


def test_saved_and_read(tmp_path):
    save(tmp_path / "a")
    assert entries(tmp_path) == ["a"] and entries(tmp_path / "a") == ["config.json", "model.safetensors"]
    found = read_checkpoint(tmp_path / "a")
    assert (found.family, found.config, found.provenance) == ("htdemucs", CONFIG.to_dict(), FAMILY["provenance"])
    assert found.weights.keys() == WEIGHTS.keys()
    for name, x in WEIGHTS.items():
        assert found.weights[name].dtype == mx.float16
        assert mx.array_equal(found.weights[name].view(mx.uint16), x.view(mx.uint16)), name


def test_the_folder_is_as_readable_as_any(tmp_path):
    save(tmp_path / "a")
    (tmp_path / "plain").mkdir()
    assert (tmp_path / "a").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_a_model_computes_in_float32(tmp_path):
    model = load_model(save(tmp_path / "a"))
    assert isinstance(model, HTDemucs) and model.config == CONFIG and not model.training
    for name, x in tree_flatten(model.parameters()):
        assert x.dtype == mx.float32 and mx.array_equal(x, WEIGHTS[name].astype(mx.float32)), name


def in_a_thread(work):
    """What work() returns."""
    found = []

    def run():
        clear_streams_at_thread_end()
        found.append(work())

    worker = threading.Thread(target=run)
    worker.start()
    worker.join()
    return found[0]


def test_weights_in_another_thread(tmp_path):
    """Of a model, and of a bag that another thread has loaded, whose file is another by now."""
    config = BagConfig((CONFIG, CONFIG), ((1.0, 0.0, 0.5), (0.0, 1.0, 0.5)))
    weights = drawn(Bag(config))
    save(tmp_path / "a", weights, family="htdemucs_bag", config=config.to_dict())
    bag = in_a_thread(lambda: load_model(tmp_path / "a"))
    other = drawn(Bag(config), seed=5)
    save(tmp_path / "a", other, family="htdemucs_bag", config=config.to_dict())
    assert isinstance(bag, Bag) and bag.config == config
    one = load_model(save(tmp_path / "b"))

    def total(x):
        return mx.sum(x.astype(mx.float32)).item()

    name = "encoder.0.conv.weight"
    assert in_a_thread(lambda: total(one.encoder[0].conv.weight)) == total(WEIGHTS[name])
    assert in_a_thread(lambda: total(bag.models[1].encoder[0].conv.weight)) == total(weights[f"models.1.{name}"])
    assert total(bag.models[0].encoder[0].conv.weight) == total(weights[f"models.0.{name}"])


def test_unused_members_are_not_read(tmp_path):
    config = BagConfig((CONFIG, CONFIG))
    save(tmp_path / "a", drawn(Bag(config)), family="htdemucs_bag", config=config.to_dict())
    before = mx.get_active_memory()
    model = load_model(tmp_path / "a")
    size = sum(x.nbytes for _, x in tree_flatten(model.parameters()))
    assert mx.get_active_memory() - before < size / 20
    mx.eval(model.models[1].parameters())
    assert size / 3 < mx.get_active_memory() - before < 2 * size / 3


# Strictness


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"encoder.0.conv.weight": None}, "missing: encoder.0.conv.weight (2, 8, 4)"),
        ({"more": mx.zeros((3, 5))}, "unexpected: more (3, 5)"),
        (
            {"encoder.0.conv.weight": mx.zeros((2, 4, 8))},
            "misshapen: encoder.0.conv.weight must be (2, 8, 4), got (2, 4, 8)",
        ),
    ],
)
def test_weights_that_do_not_fit(tmp_path, change, line):
    weights = {name: x for name, x in (WEIGHTS | change).items() if x is not None}
    with pytest.raises(ValueError) as error:
        load_model(save(tmp_path / "a", weights))
    assert line in str(error.value) and str(error.value).startswith(str(tmp_path / "a"))


def test_everything_that_does_not_fit_is_one_error(tmp_path):
    weights = {f"other{i}": mx.zeros((1,)) for i in range(3)}
    with pytest.raises(ValueError) as error:
        load_model(save(tmp_path / "a", weights))
    lines = str(error.value).splitlines()
    assert f"{len(WEIGHTS)} missing, 3 unexpected" in lines[0] and lines[-1].startswith("  ... and")
    assert len(lines) == 22


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"family": "abacus"}, f"family must be one of {', '.join(families.FAMILIES)}, got 'abacus'"),
        ({"format": 2}, "format must be 1, got 2"),
        ({"format": None}, "names no format and family"),
        ({"config": [1]}, "must be objects"),
        ({"config": None}, "must be objects"),
        ({"config": {"sources": ["a"], "cac": False}}, "cac must be True"),
        ({"config": {"sources": ["a"], "colour": 1}}, "no option named colour"),
        ({"config": CONFIG.to_dict() | {"dconv_comp": 0}}, "makes no model|must be"),
        ({"config": CONFIG.to_dict() | {"t_hidden_scale": 1e9}}, "makes no model|must be"),
        ({"config": {"members": [1]}, "family": "htdemucs_bag"}, "makes no model|must be"),
        ({"config": {"members": 1}, "family": "htdemucs_bag"}, "makes no model|must be"),
        ({"config": {"members": [CONFIG.to_dict()], "weights": 1}, "family": "htdemucs_bag"}, "makes no model|must be"),
    ],
)
def test_configurations_that_are_refused(tmp_path, change, reason):
    edit(save(tmp_path / "a"), **change)
    with pytest.raises(ValueError, match=reason) as error:
        load_model(tmp_path / "a")
    assert str(tmp_path / "a") in str(error.value) and "\n" not in str(error.value)


def test_files_that_are_damaged_or_absent(tmp_path):
    folder = save(tmp_path / "a")
    weights, config = folder / "model.safetensors", folder / "config.json"
    whole = weights.read_bytes()
    for cut in (0, 5, 100, len(whole) - 1):
        weights.write_bytes(whole[:cut])
        with pytest.raises(ValueError, match="not a whole safetensors file") as error:
            read_checkpoint(folder)
        assert "\n" not in str(error.value)
    weights.unlink()
    with pytest.raises(FileNotFoundError, match=r"it has no model\.safetensors"):
        read_checkpoint(folder)
    weights.write_bytes(whole)
    for text in ("{", "[" * 100_000, '{"format": 1', "\udcff"):
        config.write_bytes(text.encode("utf-8", "surrogateescape"))
        with pytest.raises(ValueError, match="not JSON"):
            read_checkpoint(folder)
    config.write_text("[]")
    with pytest.raises(ValueError, match="not a checkpoint's"):
        read_checkpoint(folder)
    config.unlink()
    with pytest.raises(FileNotFoundError, match=r"it has no config\.json"):
        read_checkpoint(folder)
    with pytest.raises(FileNotFoundError, match="no such folder"):
        read_checkpoint(tmp_path / "b")
    with pytest.raises(FileNotFoundError, match="a file, not a checkpoint folder"):
        read_checkpoint(weights)


def test_what_cannot_be_saved(tmp_path):
    with pytest.raises(ValueError, match=r"weights must not be float64.*got wide"):
        save(tmp_path / "a", {"wide": mx.view(mx.zeros((2,), mx.int64), mx.float64, stream=mx.cpu)})
    with pytest.raises(TypeError):
        save(tmp_path / "a", provenance={"x": object()})
    assert entries(tmp_path) == []


# Whole or not at all


def fail_in_the_middle(monkeypatch, error):
    """The weights are written, and then comes `error`."""

    def broken(path, *arguments, **keywords):
        write(path, *arguments, **keywords)
        assert path.exists()
        raise error

    write = checkpoint.write_safetensors
    monkeypatch.setattr(checkpoint, "write_safetensors", broken)


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt(), MemoryError()])
def test_a_failure_leaves_nothing_behind(tmp_path, monkeypatch, error):
    fail_in_the_middle(monkeypatch, error)
    with pytest.raises(type(error)):
        save(tmp_path / "new" / "deep" / "a")
    assert entries(tmp_path) == []


def test_a_failure_leaves_the_older_checkpoint(tmp_path, monkeypatch):
    save(tmp_path / "a")
    before = (tmp_path / "a" / "model.safetensors").read_bytes()
    fail_in_the_middle(monkeypatch, OSError(28, "No space left on device"))
    with pytest.raises(OSError, match="No space left") as error:
        save(tmp_path / "a", {"x": mx.zeros((3,))})
    assert error.value.filename == str(tmp_path / "a")
    assert entries(tmp_path) == ["a"] and (tmp_path / "a" / "model.safetensors").read_bytes() == before


def test_a_failed_rename_puts_the_older_checkpoint_back(tmp_path, monkeypatch):
    save(tmp_path / "a")
    rename = Path.rename

    def broken(self, target):
        if self.name.endswith(".new"):
            raise PermissionError(13, "Permission denied", str(self))
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", broken)
    with pytest.raises(PermissionError) as error:
        save(tmp_path / "a", {"x": mx.zeros((3,))})
    assert error.value.filename == str(tmp_path / "a")
    assert entries(tmp_path) == ["a"] and load_model(tmp_path / "a")


def test_a_replaced_checkpoint(tmp_path):
    save(tmp_path / "a", {"x": mx.zeros((3,))})
    old = read_checkpoint(tmp_path / "a").weights["x"]
    save(tmp_path / "a")
    assert load_model(tmp_path / "a") and entries(tmp_path) == ["a"]
    assert old.tolist() == [0, 0, 0]  # opened before, read after
    mine = read_checkpoint(tmp_path / "a").weights
    save(tmp_path / "a", mine)  # a checkpoint may be rewritten from itself
    assert load_model(tmp_path / "a")


@pytest.mark.parametrize("name", ["notes.txt", ".hidden", "folder"])
def test_other_folders_are_not_written_over(tmp_path, name):
    folder = save(tmp_path / "a")
    if name == "folder":
        (folder / name).mkdir()
    else:
        (folder / name).write_text("mine")
    before = entries(folder)
    with pytest.raises(FileExistsError, match=f"it holds {name}"):
        save(folder)
    assert entries(folder) == before and entries(tmp_path) == ["a"]


def test_someone_else_s_config_json_is_not_written_over(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "config.json").write_text('{"model_type": "bert"}')
    (tmp_path / "a" / "model.safetensors").write_text("")
    with pytest.raises(FileExistsError, match=r"must be new or empty or a checkpoint, it holds config\.json"):
        save(tmp_path / "a")
    (tmp_path / "b").write_text("")
    with pytest.raises(FileExistsError, match="must be a folder or new, got a file"):
        save(tmp_path / "b")


def test_empty_folders_and_links_are_fine(tmp_path):
    (tmp_path / "a").mkdir()
    save(tmp_path / "a")
    (tmp_path / "link").symlink_to("a")
    save(tmp_path / "link", {"x": mx.zeros((3,))})
    assert (tmp_path / "link").is_symlink() and read_checkpoint(tmp_path / "a").weights.keys() == {"x"}


def test_a_place_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError) as error:
        save(tmp_path / "file" / "a")
    assert error.value.filename == str(tmp_path / "file" / "a")

    def read_only(self, *arguments, **keywords):  # tests may run as root, who may write anywhere
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "mkdir", read_only)
    with pytest.raises(PermissionError) as error:
        save(tmp_path / "a")
    assert error.value.filename == str(tmp_path / "a") and entries(tmp_path) == ["file"]


CHILD = """
import sys, mlx_xformer, mlx.core as mx, resource, signal
from mlx_xformer.storage.checkpoint import save_checkpoint, new_folder
if sys.argv[2] == "full":
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50000, 50000))
    save_checkpoint(sys.argv[1], {"x": mx.zeros((100000,))}, family="htdemucs", config={}, provenance={})
else:
    with new_folder(sys.argv[1], replace=True) as fresh:
        (fresh / "part").write_text("x")
        print("writing", flush=True)
        import time
        time.sleep(60)
"""


def test_a_full_disk_leaves_nothing_behind(tmp_path):
    done = subprocess.run([sys.executable, "-c", CHILD, tmp_path / "a", "full"], capture_output=True, text=True)
    assert done.returncode == 1 and "File too large" in done.stderr
    assert entries(tmp_path) == []


def test_ctrl_c_leaves_nothing_behind(tmp_path):
    command = [sys.executable, "-c", CHILD, tmp_path / "a", "wait"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as child:
        assert child.stdout.readline() == "writing\n" and len(entries(tmp_path)) == 1
        os.kill(child.pid, signal.SIGINT)
        start = time.monotonic()
        child.wait(30)
    assert time.monotonic() - start < 30 and entries(tmp_path) == []
