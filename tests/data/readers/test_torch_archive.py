"""PyTorch files read without PyTorch: the same numbers as torch.load, and nothing but ValueError from hostile ones."""

import argparse
import builtins
import json
import os
import pickle
import subprocess
import sys
import zipfile
from collections import OrderedDict
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pathflip_jax.data.readers import torch_archive
from pathflip_jax.data.readers.torch_archive import read_archive

torch = pytest.importorskip("torch", reason="PyTorch is not installed")

DTYPES = "float64 float32 float16 bfloat16 int64 int32 int16 int8 uint8 bool".split()


@pytest.fixture
def saved(tmp_path):
    """saved(content, ...) is a file of torch.save."""

    def save(content, **options) -> Path:
        torch.save(content, tmp_path / "weights.bin", **options)
        return tmp_path / "weights.bin"

    return save


def as_numpy(tensor) -> np.ndarray:
    tensor = tensor.detach()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


def assert_equal(ours, theirs) -> None:
    if isinstance(theirs, dict):
        assert list(ours) == list(theirs)
        for name, value in theirs.items():
            assert_equal(ours[name], value)
    elif isinstance(theirs, torch.Tensor):
        assert isinstance(ours, np.ndarray) and ours.dtype == as_numpy(theirs).dtype
        np.testing.assert_array_equal(ours, as_numpy(theirs))
    elif isinstance(theirs, list | tuple):
        assert type(ours) is type(theirs) and len(ours) == len(theirs)
        for one, other in zip(ours, theirs, strict=True):
            assert_equal(one, other)
    else:
        assert ours == theirs


def assert_refused(path: Path, *words: str) -> None:
    with pytest.raises(ValueError) as caught:
        read_archive(path)
    assert str(caught.value).startswith(f"{path}: ")
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize("name", DTYPES)
def test_every_dtype_is_read_bit_by_bit(saved, name):
    dtype = getattr(torch, name)
    tensor = (torch.randn(3, 4, 5) * 40).to(dtype)
    assert_equal(read_archive(saved({"x": tensor})), {"x": tensor})


def contents() -> dict:
    torch.manual_seed(0)
    base = torch.randn(6, 8)
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    return {
        "state dict": model.state_dict(),
        "nested": {"state_dict": model.state_dict(), "epoch": 3, "rate": 0.5, "name": "x", "none": None, "on": True},
        "parameters": OrderedDict(model.named_parameters()),
        "transposed": {"t": base.T, "back": base.flip(0).T, "strided": base[::2, 1::3], "row": base[3]},
        "shared": {"all": base, "part": base[2:4], "same": base, "view": base.view(48), "wide": base[:1].expand(5, 8)},
        "empty": {"none": torch.empty(0), "rows": torch.empty(0, 4), "columns": torch.empty(3, 0)},
        "scalars": {"half": torch.tensor(1.5).half(), "count": torch.tensor(7), "yes": torch.tensor(True)},
        "containers": [torch.ones(2), (torch.zeros(1), "text", 2**70), {"inner": [torch.arange(3)]}],
        "many": {f"layer.{number}": torch.full((2,), float(number)) for number in range(300)},
    }


@pytest.mark.parametrize("name", contents())
def test_content_is_that_of_torch_load(saved, name):
    path = saved(contents()[name])
    assert_equal(read_archive(path), torch.load(path, weights_only=True))


def test_what_shares_a_storage_shares_memory(saved):
    found = read_archive(saved(contents()["shared"]))
    assert all(np.shares_memory(found["all"], found[name]) for name in ("part", "same", "view", "wide"))
    assert not found["all"].flags.writeable


def test_options_of_a_training_script_do_no_harm(saved):
    options = argparse.Namespace(rate=0.1, layers=[1, 2])
    found = read_archive(saved({"args": options, "state_dict": {"x": torch.ones(2)}}))
    assert_equal(found["state_dict"], {"x": torch.ones(2)})
    assert vars(found["args"]) == vars(options)


def test_torch_is_not_imported(saved):
    path = saved({"x": torch.arange(4.0)})
    code = (
        "import sys; from pathlib import Path; from pathflip_jax.data.readers.torch_archive import read_archive; "
        "print(read_archive(Path(sys.argv[1]))['x'].tolist(), 'torch' in sys.modules)"
    )
    said = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True, check=True).stdout
    assert said.split("] ") == ["[0.0, 1.0, 2.0, 3.0", "False\n"]


def test_files_of_before_1_6_are_refused_with_the_cure(saved):
    path = saved({"x": torch.ones(2)}, _use_new_zipfile_serialization=False)
    assert_refused(path, "1.6", "torch.save(torch.load(")


@pytest.mark.parametrize("content", [b"", b"PK", b"\x00" * 100, b"PK\x05\x06" + b"\x00" * 18, b"<html>404</html>"])
def test_what_is_no_archive_is_refused(tmp_path, content):
    (tmp_path / "weights.bin").write_bytes(content)
    assert_refused(tmp_path / "weights.bin", "download it again")


# Hostile files. A pickle is written by hand: every number in it, and every name, may be anything.


class Calls:
    """Object whose pickle calls a function."""

    def __init__(self, function, *arguments) -> None:
        self.call = function, arguments

    def __reduce__(self):
        return self.call

    def __str__(self) -> str:
        function, arguments = self.call
        return f"{function.__name__}{arguments}"  # without addresses: test processes must agree on the tests' names


class Stored(tuple):
    """Reference to a storage, as torch writes it."""


class _Pickler(pickle.Pickler):
    def persistent_id(self, value):
        return tuple(value) if isinstance(value, Stored) else None


def tensor(shape, strides, *, offset=0, storage=torch.FloatStorage, key="0", count=6, kind="storage"):
    reference = Stored((kind, storage, key, "cpu", count))
    return Calls(torch._utils._rebuild_tensor_v2, reference, offset, shape, strides, False, OrderedDict())


def archive(path: Path, content, *, compress=zipfile.ZIP_STORED, storages=None, **members) -> Path:
    """File of a pickled content and of one storage of six numbers."""
    with zipfile.ZipFile(path, "w", compress) as file:
        with file.open("archive/data.pkl", "w") as pickled:
            _Pickler(pickled, protocol=2).dump(content)
        for key, data in (storages or {"0": np.arange(6, dtype="<f4").tobytes()}).items():
            file.writestr(f"archive/data/{key}", data)
        for name, data in members.items():
            file.writestr(f"archive/{name}", data)
    return path


def test_the_hand_written_file_is_one_of_torch(tmp_path):
    path = archive(tmp_path / "weights.bin", {"x": tensor((2, 3), (3, 1))}, byteorder="little", version="3\n")
    np.testing.assert_array_equal(read_archive(path)["x"], np.arange(6).reshape(2, 3))
    np.testing.assert_array_equal(torch.load(path, weights_only=True)["x"], np.arange(6).reshape(2, 3))


@pytest.mark.parametrize(
    "call",
    [
        Calls(os.system, "touch harmed"),
        Calls(builtins.eval, "open('harmed', 'w')"),
        Calls(builtins.exec, "open('harmed', 'w')"),
        Calls(subprocess.Popen, ["touch", "harmed"]),
        Calls(builtins.getattr, OrderedDict(), "clear"),
        Calls(np._core.multiarray._reconstruct, np.ndarray, (0,), b"b"),
        Calls(torch.load, "weights.bin"),
        Calls(torch.storage._load_from_bytes, b"x"),
        Calls(builtins.bytearray, 10**12),
        np.float64(2),
        Path("x"),
        torch.float32,
    ],
)
@pytest.mark.parametrize("wrap", [lambda call: call, lambda call: {"state_dict": {"x": call}}])
def test_no_name_but_those_of_tensors_is_looked_up(tmp_path, monkeypatch, call, wrap):
    monkeypatch.chdir(tmp_path)
    path = archive(tmp_path / "weights.bin", wrap(call))
    assert_refused(path, "objects other than tensors", "torch.save(model.state_dict()")
    assert not (tmp_path / "harmed").exists()


@pytest.mark.parametrize(
    "call",
    [
        tensor((2, 3), (3, 1), key="1"),
        tensor((2, 3), (3, 1), key="../../../etc/passwd"),
        tensor((2, 3), (3, 1), key=("0",)),
        tensor((2, 3), (3, 1), key=["0"]),
        tensor((2, 3), (3, 1), count=7),
        tensor((2, 3), (3, 1), count=-1),
        tensor((2, 3), (3, 1), count=2**62),
        tensor((2, 3), (3, 1), count=6.0),
        tensor((2, 3), (3, 1), count="6"),
        tensor((2, 3), (3, 1), count=None),
        tensor((2, 3), (3, 1), kind="module"),
        tensor((2, 3), (3, 1), storage="FloatStorage"),
        tensor((2, 3), (3, 1), storage=torch.DoubleStorage),
        tensor((2, 3), (3, 1), storage=OrderedDict),
        tensor((2, 4), (3, 1)),
        tensor((2, 3), (4, 1)),
        tensor((2, 3), (3, 1), offset=1),
        tensor((2, 3), (3, 1), offset=-1),
        tensor((2, 3), (3, 1), offset=2**70),
        tensor((2, 3), (3, 1), offset=1.0),
        tensor((2, 3), (3, -1)),
        tensor((-2, -3), (3, 1)),
        tensor((2, 3), (3,)),
        tensor((2, 3), None),
        tensor(None, None),
        tensor(6, 1),
        tensor(("2", "3"), (3, 1)),
        tensor((2**40, 2**40), (0, 0)),
        tensor((2**63, 0), (1, 1)),
        tensor((0, 2**70), (2**70, 1)),
        tensor((1,) * 70, (1,) * 70),
        tensor((2, True), (3, 1)),
        Calls(torch._utils._rebuild_tensor_v2),
        Calls(torch._utils._rebuild_tensor_v2, 1, 0, (1,), (1,)),
        Calls(torch._utils._rebuild_parameter),
        Calls(OrderedDict, 3),
        Calls(OrderedDict, [(1, 2, 3)]),
        Calls(OrderedDict, [([], 2)]),
        Calls(torch.FloatStorage, 3),
        Calls(argparse.Namespace, 3),
        Stored(("storage",)),
        Stored(()),
    ],
    ids=str,
)
def test_numbers_beyond_the_storage_are_refused(tmp_path, call):
    assert_refused(archive(tmp_path / "weights.bin", {"x": call}), "download it again")


def test_storage_may_not_be_compressed(tmp_path):
    path = archive(tmp_path / "weights.bin", {"x": tensor((2, 3), (3, 1))}, compress=zipfile.ZIP_DEFLATED)
    assert_refused(path, "compressed", "download it again")


def test_the_other_byte_order_is_refused(tmp_path):
    path = archive(tmp_path / "weights.bin", {"x": tensor((2, 3), (3, 1))}, byteorder="big")
    assert_refused(path, "byte")


def test_a_bomb_of_a_pickle_is_refused(tmp_path):
    """A small file whose pickle would unpack to gigabytes."""
    path = tmp_path / "weights.bin"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file, file.open("a/data.pkl", "w") as pickled:
        pickled.write(b"\x80\x02" + b"N" * 10_000_000 + b".")
    assert_refused(path, "compressed")


@pytest.mark.parametrize(
    "pickled",
    [
        b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n(N}X\x01\x00\x00\x00aK\x01stb.",  # sets an attribute of a function
        b"\x80\x02ctorch\nFloatStorage\n(N}X\x05\x00\x00\x00dtypeK\x01stb.",
        b"\x80\x02cargparse\nNamespace\n}X\x01\x00\x00\x00aK\x01sb.",
        b"\x80\x02Nr\xff\xff\xff\x7f0.",  # place 2 ** 31 of the memory, and then nothing left to return
        b"\x80\x05\x96\x00\x00\x00\x00\x00\x01\x00\x00.",  # an array of a terabyte
        b"\x80\x02X\xff\xff\xff\x7fabc",
        b"\x80\x02h\x05.",
        b"\x80\x02.",
        b"\x80\x09N.",
        b"cos\nsystem\n(S'touch harmed'\ntR.",
        b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x0ctouch harmed\x85R.",
        b"\x80\x02(cos\nsystem\nX\x0c\x00\x00\x00touch harmedo.",
        b"\x80\x02(X\x0c\x00\x00\x00touch harmedios\nsystem\n.",
        b"\x80\x02\x82\x01.",
    ],
)
def test_instructions_that_torch_does_not_write_are_refused(tmp_path, monkeypatch, pickled):
    monkeypatch.chdir(tmp_path)
    with zipfile.ZipFile("weights.bin", "w") as file:
        file.writestr("a/data.pkl", pickled)
    before = vars(argparse.Namespace).copy()
    assert_refused(tmp_path / "weights.bin")
    assert not Path("harmed").exists() and vars(argparse.Namespace) == before and not vars(torch_archive._tensor)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> bytes:
    path = tmp_path_factory.mktemp("archive") / "weights.bin"
    torch.save({"state_dict": {"a": torch.arange(300.0), "b": torch.ones(3, 4).half()}, "epoch": 1}, path)
    return path.read_bytes()


@pytest.mark.parametrize("eighth", range(8))
def test_half_a_download_is_refused(tmp_path, whole, eighth):
    (tmp_path / "weights.bin").write_bytes(whole[: len(whole) * eighth // 8])
    assert_refused(tmp_path / "weights.bin", "download it again")


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(flips=st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 7)), min_size=1, max_size=4))
def test_flipped_bits_raise_value_error_or_nothing(tmp_path, whole, flips):
    """Of numbers, a flipped bit makes others; of anything else, it may at most be refused."""
    data = bytearray(whole)
    for place, bit in flips:
        data[place % len(data)] ^= 1 << bit
    path = tmp_path / "weights.bin"
    path.write_bytes(data)
    try:
        read_archive(path)
    except ValueError as error:
        assert str(error).startswith(f"{path}: ")


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_damaged_pickle_raises_value_error_or_nothing(tmp_path, whole, data):
    path = tmp_path / "weights.bin"
    path.write_bytes(whole)
    with zipfile.ZipFile(path) as file:
        members = {name: bytearray(file.read(name)) for name in file.namelist()}
    pickled = next(value for name, value in members.items() if name.endswith("data.pkl"))
    for _ in range(data.draw(st.integers(1, 3))):
        pickled[data.draw(st.integers(0, len(pickled) - 1))] = data.draw(st.integers(0, 255))
    with zipfile.ZipFile(path, "w") as file:
        for name, value in members.items():
            file.writestr(name, bytes(value))
    try:
        json.dumps(repr(read_archive(path)))
    except ValueError as error:
        assert str(error).startswith(f"{path}: ")
