"""Files of arrays: what is written comes back, and what is damaged never does."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

from hf_pathology.errors import UserError
from hf_pathology.slides.store import DTYPES, load_arrays, save_arrays


METADATA = {"kind": "test", "slide": "ä/b.svs", "mpp": 0.1 + 0.2, "extent": [448.0, 448.0]}


def arrays() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        "valid": np.array([True, False, True]),
        "features": rng.normal(size=(3, 5)).astype(np.float16),
        "xy": rng.integers(0, 2**40, (3, 2)),
        "nothing": np.empty((0, 7), np.float32),
    }


def assert_same(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert (found[name].dtype, found[name].shape) == (array.dtype, array.shape), name
        assert found[name].tobytes() == array.tobytes(), name


@pytest.fixture
def path(tmp_path) -> Path:
    save_arrays(tmp_path / "a.safetensors", arrays(), METADATA)
    return tmp_path / "a.safetensors"


@pytest.mark.parametrize("options", [{}, {"mapped": True}, {"mapped": True, "verify": False}, {"verify": False}])
def test_arrays_and_metadata_come_back_the_same(path, options):
    found, metadata = load_arrays(path, **options)
    assert_same(found, arrays())
    assert metadata == METADATA
    assert all(array.flags.writeable != options.get("mapped", False) for array in found.values())


@pytest.mark.parametrize("dtype", DTYPES.values())
@pytest.mark.parametrize("shape", [(), (4,), (2, 3, 0), (3, 2)])
def test_every_dtype_and_shape_comes_back_the_same(tmp_path, dtype, shape):
    array = np.random.default_rng(0).integers(0, 2, shape).astype(dtype)
    swapped = array.astype(array.dtype.newbyteorder(">"))
    transposed = np.ones((3, 2), dtype).T
    save_arrays(tmp_path / "a", {"array": array, "swapped": swapped, "transposed": transposed}, {})
    assert_same(load_arrays(tmp_path / "a")[0], {"array": array, "swapped": array, "transposed": transposed.copy()})


def test_the_safetensors_library_reads_the_files(path):
    with safe_open(path, framework="numpy") as file:
        assert_same({name: file.get_tensor(name) for name in file.keys()}, arrays())  # noqa: SIM118
        assert json.loads(file.metadata()["meta"]) == METADATA


def test_only_the_arrays_that_are_named_are_read(path):
    assert load_arrays(path, ["xy"])[0].keys() == {"xy"}
    assert load_arrays(path, [])[0] == {}
    with pytest.raises(UserError, match="a.safetensors cannot be read .it has no array 'tissue', but"):
        load_arrays(path, ["tissue"])


def test_a_file_from_before_the_checksums_is_taken_as_it_is(tmp_path):
    save_file(arrays(), tmp_path / "old", metadata={"meta": json.dumps(METADATA)})
    found, metadata = load_arrays(tmp_path / "old")
    assert_same(found, arrays())
    assert metadata == METADATA


def test_mapped_arrays_cannot_be_written_to_and_outlive_the_file(path):
    found, _ = load_arrays(path, mapped=True)
    with pytest.raises(ValueError, match="read-only"):
        found["xy"][0] = 0
    with pytest.raises(ValueError, match="WRITEABLE"):
        found["xy"].flags.writeable = True
    save_arrays(path, {"other": np.zeros(1000)}, {})
    path.unlink()
    assert_same(found, arrays())


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs to see what is mapped")
def test_thousands_of_mapped_files_keep_no_file_descriptor(path):
    before = len(os.listdir("/proc/self/fd"))
    mappings = [load_arrays(path, mapped=True)[0] for _ in range(2000)]
    assert len(os.listdir("/proc/self/fd")) <= before + 1
    assert Path("/proc/self/maps").read_text().count(str(path)) == 2000
    del mappings
    assert str(path) not in Path("/proc/self/maps").read_text()


def test_a_mapped_file_that_is_not_verified_is_not_read(tmp_path):
    size = 2**40  # more than could be read, and none of it on the disk
    header = {"__metadata__": {"meta": "{}"}, "a": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}
    write(tmp_path / "a", header, size)
    found, _ = load_arrays(tmp_path / "a", mapped=True, verify=False)
    assert found["a"].shape == (size,) and found["a"][-1] == 0


def damaged(content: bytes, rng: np.random.Generator) -> bytes:
    """`content` with one bit flipped, or cut short."""
    place = int(rng.integers(len(content)))
    if rng.random() < 0.1:
        return content[:place]
    return content[:place] + bytes([content[place] ^ 1 << int(rng.integers(8))]) + content[place + 1 :]


def test_a_flipped_bit_or_a_lost_end_is_always_noticed(path):
    content, rng = path.read_bytes(), np.random.default_rng(0)
    for _ in range(1000):
        path.write_bytes(damaged(content, rng))
        with pytest.raises(UserError, match="a.safetensors cannot be read"):
            load_arrays(path)


def test_a_flipped_bit_of_the_header_is_noticed_without_reading_the_arrays(path):
    content = path.read_bytes()
    header = 8 + int.from_bytes(content[:8], "little")
    for place in range(header):
        path.write_bytes(content[:place] + bytes([content[place] ^ 4]) + content[place + 1 :])
        with pytest.raises(UserError, match="cannot be read"):
            load_arrays(path, mapped=True, verify=False)


def write(path: Path, header: dict | bytes, size: int = 16, length: int | None = None) -> None:
    """A file of this header, which says of itself to have `length` bytes, and `size` bytes of zeros."""
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(header) if length is None else length).to_bytes(8, "little") + header)
    os.truncate(path, 8 + len(header) + size)


def entry(dtype="F32", shape=(4,), data_offsets=(0, 16)) -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": data_offsets}


HOSTILE = {
    "another dtype": {"a": entry("F64")},
    "an unknown dtype": {"a": entry("F99")},
    "a dtype that is no text": {"a": entry(["F32"])},
    "a shape that does not fit": {"a": entry(shape=(5,))},
    "a negative shape": {"a": entry(shape=(-2, -2))},
    "a shape without end": {"a": entry(shape=[1] * 100_000)},
    "an empty shape too large": {"a": entry(shape=(0, 2**62, 2**62), data_offsets=(0, 0)), "b": entry()},
    "a huge shape": {"a": entry(shape=(2**200,))},
    "a shape of texts": {"a": entry(shape="ab")},
    "a shape of truth": {"a": entry(shape=(4, True))},
    "negative offsets": {"a": entry(data_offsets=(-16, 0))},
    "offsets the wrong way round": {"a": entry(data_offsets=(16, 0))},
    "offsets behind the end": {"a": entry(data_offsets=(2**64, 2**64 + 16))},
    "fractional offsets": {"a": entry(data_offsets=(0.0, 16.0))},
    "three offsets": {"a": entry(data_offsets=(0, 16, 16))},
    "overlapping arrays": {"a": entry(), "b": entry(data_offsets=(8, 24))},
    "the same place twice": {"a": entry(), "b": entry()},
    "a gap": {"a": entry("U8", (4,), (0, 4)), "b": entry("U8", (4,), (12, 16))},
    "an end that nobody speaks of": {"a": entry("U8", (4,), (0, 4))},
    "an array that is a number": {"a": 7},
    "no arrays at all": {},
}


@pytest.mark.parametrize("header", HOSTILE.values(), ids=HOSTILE)
def test_a_header_that_lies_about_the_arrays_is_refused(tmp_path, header):
    write(tmp_path / "a", {"__metadata__": {"meta": "{}"}, **header})
    with pytest.raises(UserError, match="a cannot be read") as refusal:
        load_arrays(tmp_path / "a")
    assert "\n" not in str(refusal.value)


NO_HEADERS = {
    "nothing": (b"", 0),
    "a list": (b"[1, 2]", None),
    "no JSON": (b"{'a': 1}", None),
    "no UTF-8": (b'{"\xff\xfe": 1}', None),
    "nested without end": (b"[" * 200_000, None),
    "a number without end": (b'{"a": ' + b"9" * 10_000 + b"}", None),
    "a header longer than the file": (b"{}", 10_000),
    "a header longer than any memory": (b"{}", 2**64 - 1),
    "no metadata": (json.dumps({"a": entry()}).encode(), None),
    "metadata of another program": (json.dumps({"__metadata__": {"format": "pt"}, "a": entry()}).encode(), None),
    "metadata that are a list": (json.dumps({"__metadata__": {"meta": "[1]"}, "a": entry()}).encode(), None),
    "metadata nested without end": (
        json.dumps({"__metadata__": {"meta": "[" * 200_000}, "a": entry()}).encode(),
        None,
    ),
}


@pytest.mark.parametrize(("header", "length"), NO_HEADERS.values(), ids=NO_HEADERS)
def test_what_is_no_header_is_refused(tmp_path, header, length):
    write(tmp_path / "a", header, length=length)
    with pytest.raises(UserError, match="a cannot be read"):
        load_arrays(tmp_path / "a")


def test_a_header_longer_than_any_of_ours_is_not_read(tmp_path):
    write(tmp_path / "a", b"{}", size=2**40, length=2**39)
    with pytest.raises(UserError, match="a cannot be read"):
        load_arrays(tmp_path / "a")


@pytest.mark.parametrize("name", ["missing", "", "a.safetensors/b"])
def test_a_file_that_is_not_there_is_named(path, name):
    with pytest.raises(UserError, match="does not exist"):
        load_arrays(path.parent / name)


def test_a_failed_write_leaves_the_file_as_it_was(path):
    with pytest.raises(TypeError):
        save_arrays(path, arrays(), {"not": object()})
    assert_same(load_arrays(path)[0], arrays())
    assert list(path.parent.iterdir()) == [path]
