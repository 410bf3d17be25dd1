"""Reading other people's files: sound ones bit for bit, hostile ones refused in one line with nothing run."""

import json
import struct
import zipfile
from fractions import Fraction

import mlx.core as mx
import numpy as np
import pytest
from safetensors.numpy import save_file
from support.oracle import (
    MARK,
    Opcodes,
    opcodes,
    pickle_call,
    pickle_global,
    pickle_program,
    pickle_storage,
    pickle_tensor,
    save_torch,
    write_torch_zip,
)

from mlx_xformer.converters.formats.demucs import find_member, read_bag
from mlx_xformer.converters.formats.source import check_plain_name, read_source, scan

HALVES = np.array([0, -0.0, 6e-8, -3e-5, 65504, np.inf, -np.inf, np.nan, 1.5, -2.25, 0.1, 7], np.float16)


def bits(x):
    """The raw integers of an array."""
    return np.array(mx.view(x, {1: mx.uint8, 2: mx.uint16, 4: mx.uint32, 8: mx.uint64}[x.dtype.size], stream=mx.cpu))


def refused(path, *parts):
    """A file is refused with one line that holds all the parts."""
    with pytest.raises(ValueError) as error:
        read_source(path)
    message = str(error.value)
    assert message.startswith(f"{path}: ") and "\n" not in message and len(message) < 400, message
    reason = message.removeprefix(f"{path}: ")  # the path holds the test's own name
    assert all(part in reason for part in parts), message


KLASS = pickle_global("demucs.htdemucs", "HTDemucs")

# Safetensors


def raw_safetensors(path, header, data=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def entry(begin, end, dtype="F32", shape=(2,)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


def test_safetensors_bit_for_bit(tmp_path):
    rng = np.random.default_rng(0)
    raw = {
        "F64": (8, (3, 2)),
        "F32": (4, (2, 5)),
        "F16": (2, (7,)),
        "BF16": (2, (3, 1, 2)),
        "I64": (8, (2,)),
        "I32": (4, ()),
        "I16": (2, (0, 3)),
        "I8": (1, (5,)),
        "U8": (1, (3, 3)),
        "BOOL": (1, (4,)),
    }
    header, data, expected = {"__metadata__": {"a": "b"}}, b"", {}
    for dtype, (width, shape) in raw.items():
        block = rng.integers(0, 2 if dtype == "BOOL" else 256, int(np.prod(shape)) * width, np.uint8).tobytes()
        header[f"x.{dtype}"] = entry(len(data), len(data) + len(block), dtype, shape)
        data += block
        expected[f"x.{dtype}"] = np.frombuffer(block, f"u{width}").reshape(shape)
    source = read_source(raw_safetensors(tmp_path / "a.safetensors", header, data))
    assert source.metadata == {"a": "b"}
    assert source.tensors.keys() == expected.keys()
    for name, array in expected.items():
        assert np.array_equal(bits(source.tensors[name]), array) and source.tensors[name].shape == array.shape, name
    assert source.listing()[0] == ("x.BF16", (3, 1, 2), "BF16", 12)
    assert [row[0] for row in source.listing()] == sorted(expected)


def test_half_precision_keeps_every_value(tmp_path):
    every = np.arange(2**16, dtype=np.uint16)
    save_file({"x": every.view(np.float16)}, tmp_path / "a.safetensors")
    save_torch(tmp_path / "a.th", {"x": every.view(np.float16)})
    for name in ("a.safetensors", "a.th"):
        assert np.array_equal(bits(read_source(tmp_path / name).tensors["x"]), every)


def test_sha256_is_of_the_file(tmp_path):
    import hashlib

    save_file({"x": HALVES}, tmp_path / "a.safetensors")
    digest = hashlib.sha256((tmp_path / "a.safetensors").read_bytes()).hexdigest()
    assert read_source(tmp_path / "a.safetensors").sha256 == digest


@pytest.mark.parametrize(
    ("header", "data", "length"),
    [
        (b"", b"", 0),
        (b"{}", b"", 2**63),
        (b"{}", b"", 101 * 2**20),
        (b"{}", b"", 3),
        (b"\xff\xfe{}", b"", None),
        (b'{"a": ', b"", None),
        (b"[" * 5000, b"", None),
        ({"a": entry(0, 8)}, b"\0" * 7, None),
        ({"a": entry(0, 8)}, b"\0" * 9, None),
        ({"a": entry(0, 8), "b": entry(4, 12)}, b"\0" * 12, None),
        ({"a": entry(0, 8), "b": entry(12, 20)}, b"\0" * 20, None),
        ({"a": entry(8, 0)}, b"\0" * 8, None),
        ({"a": entry(0, 8, shape=(3,))}, b"\0" * 8, None),
        ({"a": entry(0, 8, shape=(2**62, 2**62))}, b"\0" * 8, None),
        ({"a": entry(0, 8, shape=(-2, -1))}, b"\0" * 8, None),
        ({"a": entry(0, 8, dtype="F99")}, b"\0" * 8, None),
        ({"a": {"dtype": "F32"}}, b"", None),
        ({"__metadata__": {"a": 1}}, b"", None),
    ],
)
def test_broken_safetensors(tmp_path, header, data, length):
    refused(raw_safetensors(tmp_path / "a.safetensors", header, data, length), "safetensors file")


def test_safetensors_of_other_dtypes_and_wrong_booleans(tmp_path):
    path = tmp_path / "a.safetensors"
    refused(raw_safetensors(path, {"a": entry(0, 2, "F8_E4M3")}, b"\0\0"), "a must have one of", "F8_E4M3")
    refused(raw_safetensors(path, {"a": entry(0, 2, "BOOL")}, b"\1\2"), "a must hold booleans, 0 or 1, got 2")
    path.write_bytes(b"")
    refused(path, "safetensors file")


# .npz


def test_npz(tmp_path):
    np.savez_compressed(tmp_path / "a.npz", x=HALVES.reshape(3, 4), n=np.int64(7))
    tensors = read_source(tmp_path / "a.npz").tensors
    assert np.array_equal(bits(tensors["x"]), HALVES.reshape(3, 4).view(np.uint16)) and tensors["n"].item() == 7


def test_npz_runs_nothing(tmp_path):
    class Hostile:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    np.savez(tmp_path / "a.npz", x=np.array([Hostile()], dtype=object))
    refused(tmp_path / "a.npz", "allow_pickle=False")
    np.savez(tmp_path / "b.npz", x=np.zeros(2, ">f4"))
    refused(tmp_path / "b.npz", "x must have one of the dtypes", ">f4")
    (tmp_path / "c.npz").write_bytes((tmp_path / "b.npz").read_bytes()[:60])
    refused(tmp_path / "c.npz", "not a whole .npz file")
    assert not (tmp_path / "ran").exists()


# PyTorch files


def test_torch_tensors_and_package(tmp_path):
    arrays = {
        "half": HALVES.reshape(4, 3),
        "single": np.arange(6, dtype=np.float32).reshape(2, 3),
        "double": np.array(1 / 3),
        "long": np.array([-(2**40), 5]),
        "bool": np.array([True, False]),
        "none": np.zeros((0, 4), np.float16),
    }
    source = read_source(save_torch(tmp_path / "a.pt", arrays))
    assert source.metadata == {} and source.tensors.keys() == arrays.keys()
    for name, array in arrays.items():
        raw = np.frombuffer(array.tobytes(), f"u{array.itemsize}").reshape(array.shape)
        assert np.array_equal(bits(source.tensors[name]), raw), name
    package = {
        "klass": KLASS,
        "args": (),
        "kwargs": {"names": ["a"], "segment": Fraction(39, 5), "depth": 4, "scale": 0.5, "no": None, "t": (1, 2)},
        "training_args": {1: "integer keys are fine", "x": [1, {"y": -5}]},
    }
    source = read_source(save_torch(tmp_path / "a.th", arrays, package))
    assert source.metadata["klass"] == "demucs.htdemucs.HTDemucs" and source.metadata["args"] == "[]"
    assert json.loads(source.metadata["kwargs"]) == {
        "names": ["a"],
        "segment": {"_type": "fraction", "numerator": 39, "denominator": 5},
        "depth": 4,
        "scale": 0.5,
        "no": None,
        "t": [1, 2],
    }


def test_torch_views_share_a_storage(tmp_path):
    values = np.arange(24, dtype=np.float16)
    stored = pickle_storage("0", 24)
    state = {
        "whole": pickle_tensor(stored, (2, 3, 4), (12, 4, 1)),
        "turned": pickle_tensor(stored, (4, 2, 3), (1, 12, 4)),
        "part": pickle_tensor(stored, (3, 2), (4, 2), 13),
    }
    # as a state dict: an OrderedDict that carries _metadata, with one tensor as a parameter
    ordered = pickle_call(pickle_global("collections", "OrderedDict"))
    state["part"] = pickle_call(pickle_global("torch._utils", "_rebuild_parameter"), state["part"], False, ordered)
    items = MARK + b"".join(opcodes(k) + v for k, v in state.items()) + b"u"
    pickle = b"\x80\x02" + ordered + items + opcodes({"_metadata": {"a": 1}}) + b"b."
    tensors = read_source(write_torch_zip(tmp_path / "a.pt", pickle, {"0": values.tobytes()})).tensors
    whole = values.reshape(2, 3, 4)
    assert np.array_equal(np.array(tensors["whole"]), whole)
    assert np.array_equal(np.array(tensors["turned"]), whole.transpose(2, 0, 1))
    assert np.array_equal(np.array(tensors["part"]), whole[1, :, 1::2])


GOOD = pickle_tensor(pickle_storage("0", 6), (2, 3), (3, 1))
DATA = {"0": np.arange(6, dtype=np.float16).tobytes()}


def system(marker):
    """A command that would leave a file behind."""
    return f"touch {marker}"


def stack_global(module, name):
    return Opcodes(opcodes(module) + opcodes(name) + b"\x93")


def hostile(marker):
    """Pickles that would run a command if anything unpickled them, and what each is refused for."""
    command = system(marker)
    return {
        "a __reduce__ to os.system": (pickle_call(pickle_global("os", "system"), command), "os.system"),
        "posix.system": (pickle_call(pickle_global("posix", "system"), command), "posix.system"),
        "STACK_GLOBAL eval": (
            pickle_call(stack_global("builtins", "eval"), f"open({str(marker)!r}, 'w')"),
            "builtins.eval",
        ),
        "getattr": (pickle_global("builtins", "getattr"), "builtins.getattr"),
        "a dotted way out": (pickle_global("fractions", "Fraction.__init__.__globals__"), "Fraction.__init__"),
        "torch.load": (pickle_global("torch", "load"), "torch.load"),
        "INST": (Opcodes(MARK + opcodes(command) + b"ios\nsystem\n"), "INST"),
        "OBJ": (
            Opcodes(MARK + pickle_global("os", "system") + opcodes(command) + b"o"),
            "OBJ",
        ),
        "OBJ of a known class": (
            Opcodes(MARK + pickle_global("fractions", "Fraction") + opcodes("1") + b"o"),
            "OBJ",
        ),
        "NEWOBJ": (Opcodes(pickle_global("fractions", "Fraction") + b")\x81"), "NEWOBJ"),
        "NEWOBJ_EX": (Opcodes(pickle_global("fractions", "Fraction") + b")}\x92"), "NEWOBJ_EX"),
        "EXT1": (Opcodes(b"\x82\x01"), "EXT1"),
        "EXT2": (Opcodes(b"\x83\x01\x00"), "EXT2"),
        "EXT4": (Opcodes(b"\x84\x01\x00\x00\x00"), "EXT4"),
        "PERSID": (Opcodes(b"Pstorage\n"), "PERSID"),
        "BUILD on a class": (
            Opcodes(pickle_global("demucs.htdemucs", "HTDemucs") + opcodes({"x": 1}) + b"b"),
            "fills",
        ),
        "BUILD with attributes": (
            Opcodes(pickle_call(pickle_global("collections", "OrderedDict")) + opcodes({"__class__": 1}) + b"b"),
            "BUILD",
        ),
        "calling the model": (
            pickle_call(pickle_global("demucs.htdemucs", "HTDemucs"), ["a"]),
            "demucs.htdemucs.HTDemucs",
        ),
        "calling a string": (pickle_call(opcodes("os.system"), command), "calls str"),
        "calling a call": (
            pickle_call(pickle_call(pickle_global("collections", "OrderedDict")), command),
            "calls Ordered",
        ),
        "calling with a list": (
            Opcodes(pickle_global("collections", "OrderedDict") + opcodes([]) + b"R"),
            "OrderedDict",
        ),
        "OrderedDict of pairs": (
            pickle_call(pickle_global("collections", "OrderedDict"), [("a", 1)]),
            "arguments",
        ),
        "numpy scalars": (pickle_global("numpy.core.multiarray", "scalar"), "numpy.core.multiarray.scalar"),
        "omegaconf": (pickle_global("omegaconf.dictconfig", "DictConfig"), "omegaconf.dictconfig.DictConfig"),
        "a byte array": (Opcodes(b"\x96" + struct.pack("<Q", 2**40)), "no whole pickle"),
        "a set": (Opcodes(b"\x8f"), "set, which weights do not need"),
        "an object of a class": (Opcodes(pickle_global("os", "system") + opcodes((command,)) + b"\x81"), "os.system"),
        "a result that is called": (pickle_call(pickle_call(pickle_global("os", "system"), command), 1), "os.system"),
        "a text integer": (Opcodes(b"I" + b"9" * 5000 + b"\n"), "no whole pickle"),
    }


@pytest.mark.parametrize("name", sorted(hostile("x")))
@pytest.mark.parametrize("place", ["top", "state", "kwargs"])
def test_hostile_pickles_are_refused_and_run_nothing(tmp_path, monkeypatch, name, place):
    monkeypatch.chdir(tmp_path)
    marker = tmp_path / "ran"
    payload, reason = hostile(marker)[name]
    package = {
        "klass": KLASS,
        "args": (),
        "kwargs": {"x": payload} if place == "kwargs" else {},
        "state": {"w": payload if place == "state" else GOOD},
    }
    pickle = pickle_program(payload if place == "top" else package)
    refused(write_torch_zip(tmp_path / "a.th", pickle, DATA), reason)
    assert not marker.exists() and [p.name for p in tmp_path.iterdir()] == ["a.th"]


# What no torch.save writes is refused wherever it stands.
NEVER_WRITTEN = {
    *("INST", "OBJ", "OBJ of a known class", "NEWOBJ", "NEWOBJ_EX", "EXT1", "EXT2", "EXT4", "PERSID"),
    *("BUILD on a class", "BUILD with attributes", "calling a string", "calling a call", "calling with a list"),
    *("OrderedDict of pairs", "a byte array", "a text integer"),
}


@pytest.mark.parametrize("name", sorted(hostile("x")))
def test_hostile_training_arguments_run_nothing(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    marker = tmp_path / "ran"
    payload, reason = hostile(marker)[name]
    package = {"klass": KLASS, "args": (), "kwargs": {}, "state": {"w": GOOD}, "training_args": payload}
    path = write_torch_zip(tmp_path / "a.th", pickle_program(package), DATA)
    if name in NEVER_WRITTEN:
        refused(path, reason)
    else:
        assert bits(read_source(path).tensors["w"]).tobytes() == DATA["0"]
    assert not marker.exists() and [p.name for p in tmp_path.iterdir()] == ["a.th"]


def test_the_marker_would_show_that_something_ran(tmp_path):
    import pickle

    payload, _ = hostile(tmp_path / "ran")["a __reduce__ to os.system"]
    pickle.loads(pickle_program(payload))  # what this package never does
    assert (tmp_path / "ran").exists()


LOOP = Opcodes(b"]q\x00h\x00a")  # a list that holds itself


def doubling(levels):
    """A value of 2 ** levels leaves in a few bytes each: every pair holds the one before it twice."""
    return Opcodes(b"K\x01" + b"q\x00h\x00\x86" * levels)


@pytest.mark.parametrize(
    ("pickle", "reason"),
    [
        (b"", "no whole pickle"),
        (b"\x80\x02", "no whole pickle"),
        (b"\x80\x02}", "no whole pickle"),
        (b"\x80\x02.", "empty stack"),
        (b"\x80\x02t.", "never opened"),
        (b"\x80\x02" + b"(" * 100, "nests deeper"),
        (b"\x80\x02h\x05.", "never kept"),
        (b"\x80\x02q\x05.", "is not there"),
        (b"\x80\x02K\x01K\x02a.", "fills a list"),
        (b"\x80\x02K\x01K\x02K\x03s.", "fills a dict"),
        (b"\x80\x02}(K\x01u.", "without a value"),
        (b"\x80\x02}())u.", "key that is a tuple"),
        (b"\x80\x02}(K\x01K\x01K\x01K\x02u.", "names 1 twice"),
        (b"\x80\x02K\x01K\x02\x93.", "not text"),
        (b"\xff\xfe", "no whole pickle"),
        (b"X\xff\xff\xff\xff.", "no whole pickle"),
        (pickle_program([1, 2]), "a dict of tensors"),
        (pickle_program({}), "nothing at all"),
        (pickle_program({"a": 1, "b": GOOD}), "must be a tensor, got a"),
        (pickle_program({1: GOOD}), "from names to tensors"),
        (pickle_program({"klass": 1, "args": (), "kwargs": {}, "state": {"a": GOOD}}), "must hold a class"),
        (pickle_program({"klass": KLASS, "args": (), "kwargs": {}, "state": [1]}), "the state must be a dict"),
        (pickle_program({"a": GOOD, "__quantized": True}), "DiffQ"),
    ],
)
def test_pickles_that_make_no_sense(tmp_path, pickle, reason):
    refused(write_torch_zip(tmp_path / "a.th", pickle, DATA), reason)


@pytest.mark.parametrize("value", [LOOP, doubling(60), doubling(7), [1] * 10_000])
def test_arguments_without_end(tmp_path, value):
    package = {"klass": KLASS, "args": (), "kwargs": {"x": value}}
    arrays = {"w": np.zeros(2, np.float16)}
    refused(save_torch(tmp_path / "a.th", arrays, package), "nested too deep or too many")


@pytest.mark.parametrize("text", ["1e999999999", "1/0", "9" * 19, " 1", "1_0", "0x1", "nan", "1/-2"])
def test_fractions_are_two_whole_numbers(tmp_path, text):
    value = pickle_call(pickle_global("fractions", "Fraction"), text)
    refused(write_torch_zip(tmp_path / "a.th", pickle_program({"a": value}), {}), "fraction")


@pytest.mark.parametrize(
    ("tensor", "reason"),
    [
        (pickle_tensor(pickle_storage("1", 6), (2, 3), (3, 1)), "storage 1, which the zip does not hold"),
        (
            pickle_tensor(pickle_storage("../0", 6), (2, 3), (3, 1)),
            "storage ../0, which the zip does not hold",
        ),
        (pickle_tensor(pickle_storage("0", 7), (2, 3), (3, 1)), "storage 0 must be 7 x 2 bytes, got 12"),
        (pickle_tensor(pickle_storage("0", 5), (2, 2), (2, 1)), "storage 0 must be 5 x 2 bytes, got 12"),
        (pickle_tensor(pickle_storage("0", -6), (2, 3), (3, 1)), "storage 0 must be -6 x 2 bytes"),
        (pickle_tensor(pickle_storage("0", 6, "FloatStorage"), (2, 3), (3, 1)), "must be 6 x 4 bytes"),
        (pickle_tensor(pickle_storage("0", 6, "UntypedStorage"), (2, 3), (3, 1)), "torch.UntypedStorage"),
        (pickle_tensor(pickle_storage("0", 6), (2, 3), (3, 1), 1), "reaches element 6 of the 6"),
        (pickle_tensor(pickle_storage("0", 6), (2, 3), (4, 1)), "reaches element 6 of the 6"),
        (pickle_tensor(pickle_storage("0", 6), (2, 3), (3, 1), -1), "at least 0"),
        (pickle_tensor(pickle_storage("0", 6), (2, -3), (3, 1)), "at least 0"),
        (pickle_tensor(pickle_storage("0", 6), (2, 3), (-3, 1)), "at least 0"),
        (pickle_tensor(pickle_storage("0", 6), (2, 3.0), (3, 1)), "whole numbers"),
        (pickle_tensor(pickle_storage("0", 6), (2, True), (3, 1)), "whole numbers"),
        (pickle_tensor(pickle_storage("0", 6), (2**60, 0), (3, 1)), "whole numbers"),
        (pickle_tensor(pickle_storage("0", 6), (2**40,), (0,)), "must fit its storage of 6"),
        (pickle_tensor(pickle_storage("0", 6), (2, 3), (1,)), "a stride for each"),
        (pickle_tensor(pickle_storage("0", 6), (1,) * 9, (1,) * 9), "at most 8 sizes"),
        (pickle_tensor(opcodes("storage"), (2, 3), (3, 1)), "not a storage"),
        (pickle_call(pickle_global("torch._utils", "_rebuild_tensor_v2")), "not a storage"),
        (pickle_call(pickle_global("torch._utils", "_rebuild_parameter"), 1, 2, 3), "not a tensor"),
        (Opcodes(opcodes(("module", 1)) + b"Q"), "persistent id"),
        (Opcodes(opcodes("0") + b"Q"), "persistent id"),
    ],
)
def test_tensors_outside_their_storage(tmp_path, tensor, reason):
    refused(write_torch_zip(tmp_path / "a.th", pickle_program({"w": tensor}), DATA), reason)


def test_wrong_booleans_and_endless_sharing(tmp_path):
    boolean = pickle_tensor(pickle_storage("0", 12, "BoolStorage"), (12,), (1,))
    refused(
        write_torch_zip(tmp_path / "a.th", pickle_program({"w": boolean}), DATA),
        "w must hold booleans, 0 or 1, got",
    )
    many = {f"w{i}": pickle_tensor(pickle_storage("0", 50000), (50000,), (1,)) for i in range(9)}
    refused(write_torch_zip(tmp_path / "b.th", pickle_program(many), {"0": b"\0" * 100000}), "share storage")


def test_zip_files_that_are_not_as_torch_writes_them(tmp_path):
    path, pickle = tmp_path / "a.th", pickle_program({"w": GOOD})
    whole = write_torch_zip(path, pickle, DATA).read_bytes()
    assert read_source(path).tensors["w"].shape == (2, 3)
    for cut in (3, 40, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:cut])
        refused(path, "zip")
    path.write_bytes(whole.replace(DATA["0"], DATA["0"][::-1]))
    refused(path, "truncated or damaged", "CRC")
    refused(write_torch_zip(path, pickle, DATA, compression=zipfile.ZIP_DEFLATED), "must be stored")
    refused(write_torch_zip(path, pickle, DATA, byteorder=b"big"), "byteorder must be little")
    refused(write_torch_zip(path, pickle, DATA, **{"data.pkl": None}), "a data.pkl, got 0")
    refused(write_torch_zip(path, b"\0" * (16 << 20) + b"\0", DATA), "at most 16777216 bytes")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/data.pkl", pickle)
        archive.writestr("b/data.pkl", pickle)
    refused(path, "a data.pkl, got 2")
    refused(write_torch_zip(path, pickle, DATA, **{"data.pkl": None, "dataxpkl": pickle}), "a data.pkl, got 0")
    path.write_bytes(b"")
    refused(path, "must be a zip")
    path.write_bytes(pickle)
    refused(path, "must be a zip")
    path.write_bytes(b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.more")
    refused(path, "no whole pickle")
    write_torch_zip(path, pickle, DATA, order=b"x")
    assert read_source(path).tensors.keys() == {"w"}


def test_a_zip_that_claims_more_than_the_file_holds(tmp_path):
    path = write_torch_zip(tmp_path / "a.th", pickle_program({"w": GOOD}), DATA)
    content = bytearray(path.read_bytes())
    at = content.rfind(b"PK\x01\x02")  # the last entry of the central directory: both of its sizes
    content[at + 20 : at + 28] = struct.pack("<II", 2**31, 2**31)
    path.write_bytes(bytes(content))
    refused(path, "claims 21")
    content[at + 20 : at + 28] = struct.pack("<II", 12, 13)
    path.write_bytes(bytes(content))
    refused(path, "must be stored")
    content[at + 20 : at + 28] = struct.pack("<II", 12, 12)
    for field in (8, 10):  # the flags say encrypted, then the method says deflated
        content[at + field] = {8: 1, 10: 8}[field]
        path.write_bytes(bytes(content))
        refused(path, "must be stored")
        content[at + field] = 0


def test_two_entries_of_one_name(tmp_path):
    path = write_torch_zip(tmp_path / "a.th", pickle_program({"w": GOOD}), DATA)
    with pytest.warns(UserWarning, match="Duplicate"), zipfile.ZipFile(path, "a") as archive:
        archive.writestr("archive/data/0", b"x" * 12)
    refused(path, "distinct entries")


# Everything else


def test_what_is_no_model_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file"):
        read_source(tmp_path / "a.th")
    with pytest.raises(FileNotFoundError, match="a folder, not a file"):
        read_source(tmp_path)
    (tmp_path / "a.wav").touch()
    refused(tmp_path / "a.wav", "must end in .safetensors", ".wav")


def test_scan_names_what_looks_wrong():
    tensors = {
        "nan": mx.array([1.0, float("nan"), float("inf")], dtype=mx.float16),
        "large": mx.array([-1001.0]),
        "fine": mx.array([1000.0]),
        "none": mx.zeros((0,)),
        "int": mx.array([5000]),
    }
    assert scan(tensors) == ["large: values up to 1001 in magnitude", "nan: 2 of 3 values are not finite"]


# Bags


def bag_refused(path, text, reason):
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError) as error:
        read_bag(path)
    assert reason in str(error.value).removeprefix(f"{path}: ") != str(error.value), str(error.value)
    assert "\n" not in str(error.value)


def test_bags(tmp_path):
    path = tmp_path / "name.yaml"
    path.write_text("models: ['955717e8', 04573f0d]\nweights: [\n  [1., 0.],\n  [0., 1.],\n]\nsegment: 7.5\n")
    bag = read_bag(path)
    assert (bag.name, bag.signatures, bag.segment) == ("name", ("955717e8", "04573f0d"), 7.5)
    assert bag.weights == [[1.0, 0.0], [0.0, 1.0]]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("models: ['../../etc/passwd']", "plain name"),
        ("models: ['/etc/passwd']", "plain name"),
        ("models: ['..']", "plain name"),
        ("models: ['.']", "plain name"),
        ("models: ['']", "plain name"),
        ("models: ['a/b']", "plain name"),
        ("models: ['a\\b']", "plain name"),
        ('models: ["a\\0b"]', "plain name"),
        ('models: ["a\\nb"]', "plain name"),
        ("models: ['C:x']", "plain name"),
        ("models: ['*']", "plain name"),
        (f"models: [{'a' * 200}]", "plain name"),
        ("models: [12345678]", "a signature must be text"),
        ("models: [[a]]", "a signature must be text"),
        ("models: []", "models must be a list"),
        ("models: abc", "models must be a list"),
        ("weights: []", "models must be a list"),
        ("models: [a]\nother: 1", "got other"),
        ("- models", "must be a mapping, got a list"),
        ("just text", "must be a mapping, got a str"),
        ("", "must be a mapping"),
        ("1: 2", "must be a mapping"),
        ("models: !!python/object/apply:os.system ['touch ran']", "not plain YAML"),
        ("models: !!python/name:os.system", "not plain YAML"),
        ("models: [a", "not plain YAML"),
        ("a: &a [x]\nmodels: *a", "aliases are refused"),
        (b"models: [\xff]", "not plain YAML"),
        ("[" * 5000, "not plain YAML"),
        ("models: [a] #" + "x" * 70000, "at most 65536 bytes"),
    ],
)
def test_bags_that_are_refused(tmp_path, monkeypatch, text, reason):
    monkeypatch.chdir(tmp_path)
    bag_refused(tmp_path / "name.yaml", text, reason)
    assert not (tmp_path / "ran").exists()


def test_members_lie_in_the_folder_itself(tmp_path):
    folder, outside = tmp_path / "bag", tmp_path / "outside.safetensors"
    folder.mkdir()
    outside.touch()
    (folder / "a.safetensors").symlink_to(outside)
    with pytest.raises(ValueError, match="must lie in the folder itself"):
        find_member(folder, "a")
    (folder / "b.th").symlink_to("../outside.safetensors")
    with pytest.raises(ValueError, match="must lie in the folder itself"):
        find_member(folder, "b")
    (folder / "c-01234567.th").touch()
    (folder / "inside.safetensors").symlink_to("c-01234567.th")
    assert find_member(folder, "c").name == "c-01234567.th" and find_member(folder, "inside").exists()
    (folder / "c-x-01234567.th").touch()
    assert find_member(folder, "c").name == "c-01234567.th"
    (folder / "c.th").touch()
    with pytest.raises(ValueError, match=r"one file must be member c, got c-01234567\.th, c\.th"):
        find_member(folder, "c")
    with pytest.raises(FileNotFoundError, match=r"no d\.safetensors or d-\*\.th"):
        find_member(folder, "d")
    for name in ("../outside", "..", "", "a/b"):
        with pytest.raises(ValueError, match="plain name"):
            find_member(folder, name)
        with pytest.raises(ValueError, match="plain name"):
            check_plain_name(name)
