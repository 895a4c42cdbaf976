"""Fuzzed safetensors: a load, or one CheckpointError; little memory either way."""

import collections
import json
import pathlib
import random
import shutil
import struct

import jax
import numpy as np
import pytest

import minillm_jax as mj
from minillm_jax.model import transformer
from minillm_jax.weights import files, load

FOLDER = pathlib.Path(__file__).parents[1] / "goldens" / "tinyllama"
CONTENT = (FOLDER / files.SINGLE).read_bytes()
START = 8 + struct.unpack("<Q", CONTENT[:8])[0]  # of the data
HEADER, DATA = json.loads(CONTENT[8:START]), CONTENT[START:]
TENSORS = sorted(HEADER.keys() - {"__metadata__"})
FIRST = min(TENSORS, key=lambda name: HEADER[name]["data_offsets"])
END = len(DATA)
LENGTHS = [0, 1, START - 9, START - 7, len(CONTENT), 10**8 + 1]
LENGTHS += [2**31, 2**32, 2**40, 2**62, 2**63 - 1, 2**63, 2**64 - 8, 2**64 - 1]
FIELDS = {
    "data_offsets": [
        *([-8, 8184], [8192, 0], [0, 8188], [4, 8196], [1, 8193], [END, END + 8192]),
        *([0, 2**40], [0, 2**63], [2**64 - 8192, 2**64], [0, 10**30], [2**63, 2**63]),
        *([0], [0, 1, 2], [0.0, 8192.0], ["0", "8192"], [None, None], 5, "0", {}, None),
        *([[0, 8192]], [float("nan"), 8192], [True, False], []),
    ],
    "shape": [
        *([], [0], [64, 31], [65, 32], [-64, -32], [64.0, 32.0], [1e3, 32], ["64", 32]),
        *([float("nan"), 32], [float("inf")], [2**32, 2**32], [2**63, 2], [2**64], {}),
        *([2**33, 2**33, 0], [None], None, 2048, "64", [[64], [32]], [10**30], [True]),
    ],
    "dtype": [
        *("F31", "", "f32", "float32", "F32\0", "é", None, 32, 3.5, True, ["F32"], {}),
        *("F64", "F16", "I8", "U8", "BOOL", "F8_E4M3", "F4", "C64"),
    ],
}
TEXTS = {
    "no text": b"",
    "not utf-8": b'{"\xff\xfe": {}}',
    "a lone surrogate": json.dumps(HEADER).replace(FIRST, "\\ud800").encode(),
    "half": json.dumps(HEADER).encode()[: START // 2],
    "more behind it": json.dumps(HEADER).encode() + b"}",
    "zeros behind it": json.dumps(HEADER).encode() + b"\0" * 8,
    "a list": b"[]",
    "null": b"null",
    "a number": b"1e999",
    "no tensors": b"{}",
    "deep lists": b"[" * 10**5,
    "deep objects": b'{"a":' * 10**5,
    "deep shape": json.dumps(HEADER).replace("[64, 32]", "[" * 10**4, 1).encode(),
    "a long number": json.dumps(HEADER).replace("8192", "1" * 10**5, 1).encode(),
    "a list of metadata": json.dumps({**HEADER, "__metadata__": [1]}).encode(),
    "metadata of numbers": json.dumps({**HEADER, "__metadata__": {"a": 1}}).encode(),
    "a hole": json.dumps({k: v for k, v in HEADER.items() if k != FIRST}).encode(),
    "an overlap": json.dumps({**HEADER, "copy": HEADER[FIRST]}).encode(),
    "a field too few": json.dumps({**HEADER, FIRST: {"dtype": "F32"}}).encode(),
    "a name twice": json.dumps(HEADER)[:-1].encode()
    + b', "copy": {"dtype": "F32", "shape": [2048], "data_offsets": [0, 8192]}'
    + b', "copy": {"dtype": "F32", "shape": [2048], "data_offsets": [0, 8192]}}',
}


def with_header(header):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + DATA


def edited(name, field, value):
    return with_header({**HEADER, name: {**HEADER[name], field: value}})


def flipped(rng, end):
    content = bytearray(CONTENT)
    for _ in range(rng.choice([1, 1, 2, 8])):
        content[rng.randrange(end)] ^= 1 << rng.randrange(8)
    return bytes(content)


def edited_at_random(rng):
    """One to three fields of some tensors."""
    header = dict(HEADER)
    for _ in range(rng.choice([1, 1, 2, 3])):
        name, field = rng.choice(TENSORS), rng.choice(sorted(FIELDS))
        header[name] = {**header[name], field: rng.choice(FIELDS[field])}
    return with_header(header)


def spliced(rng):
    """A part of the file a second time, or not at all."""
    start, end, to = sorted(rng.randrange(len(CONTENT)) for _ in range(3))
    return rng.choice([CONTENT[:end] + CONTENT[start:], CONTENT[:start] + CONTENT[to:]])


def other_text(rng):
    """JSON's own characters anywhere in the header, whose length is right."""
    text = bytearray(CONTENT[8:START])
    for _ in range(rng.choice([1, 2, 4])):
        text[rng.randrange(len(text))] = rng.choice(b'{}[]:,"0919-+eE.\\ \0\xff')
    return with_header(bytes(text))


MUTATIONS = {
    "flips in the length": (200, lambda rng: flipped(rng, 8)),
    "flips in the header": (500, lambda rng: flipped(rng, START)),
    "flips anywhere": (200, lambda rng: flipped(rng, len(CONTENT))),
    "other text": (300, other_text),
    "edits": (500, edited_at_random),
    "truncated": (250, lambda rng: CONTENT[: rng.randrange(len(CONTENT))]),
    "extended": (50, lambda rng: CONTENT + rng.randbytes(rng.randrange(1, 9999))),
    "splices": (150, spliced),
}


def attempt(read, *arguments):
    """What a call returns, or its CheckpointError."""
    try:
        return read(*arguments), None
    except mj.CheckpointError as error:
        return None, error


class Reader:
    """Puts contents in the place of a folder's weights, and reads them."""

    def __init__(self, folder):
        self.folder = folder
        config, self.family = load.read_config(folder)
        model = mj.create_model(config)
        self.config = model.config
        self.shapes = jax.tree.map(np.shape, transformer.param_shapes(model))

    def __call__(self, content):
        """ "loads", or what kind of a CheckpointError, which names what it is of."""
        file = self.folder / files.SINGLE
        file.write_bytes(content)
        _, error = attempt(files.read_headers, self.folder)
        if error is not None:
            assert str(error).startswith(f"{file}: is damaged: ")
            assert len(error.problems) == 1
            return "damaged"
        params, error = attempt(load.read_params, self.folder, self.config, self.family)
        if error is not None:
            assert str(error).startswith(f"{self.folder}: ")
            return "another model"
        assert jax.tree.map(np.shape, params) == self.shapes
        return "loads"


@pytest.fixture
def reader(tmp_path):
    return Reader(pathlib.Path(shutil.copytree(FOLDER, tmp_path / "model")))


def memory(name):
    """VmRSS or VmHWM, the most since the last reset, bytes."""
    status = pathlib.Path("/proc/self/status").read_text()
    line = next(line for line in status.splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024


@pytest.fixture
def little_memory():
    """The most memory of the test is little more than before it."""
    reset = pathlib.Path("/proc/self/clear_refs")
    if not reset.exists():
        pytest.skip("this system does not tell the most memory that was used")
    reset.write_text("5")
    before = memory("VmRSS")
    yield
    assert memory("VmHWM") - before < 50e6


def test_mutated_files_load_or_are_one_error_and_take_little_memory(
    reader, little_memory
):
    rng = random.Random(0)
    assert reader(CONTENT) == "loads"
    seen = collections.Counter()
    for count, mutation in MUTATIONS.values():
        seen.update(reader(mutation(rng)) for _ in range(count))
    assert seen.total() >= 2000
    assert min(seen["damaged"], seen["another model"], seen["loads"]) >= 50, seen


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 21))
def test_mutated_files_load_or_are_one_error_deep(reader, little_memory, seed):
    rng = random.Random(seed)
    for count, mutation in MUTATIONS.values():
        for _ in range(count):
            reader(mutation(rng))


def test_a_file_cut_anywhere_is_damaged(reader):
    cuts = [*range(9), *range(9, START, 11), START - 1, START, START + 1]
    cuts += [(START + len(CONTENT)) // 2, len(CONTENT) - 1]
    assert {reader(CONTENT[:cut]) for cut in cuts} == {"damaged"}


@pytest.mark.parametrize("extra", [1, 8, 10**6])
def test_a_file_with_bytes_behind_its_tensors_is_damaged(reader, extra):
    assert reader(CONTENT + b"\0" * extra) == "damaged"


@pytest.mark.parametrize("length", LENGTHS)
def test_another_length_of_the_header_is_damage_and_takes_no_memory(
    reader, little_memory, length
):
    assert reader(struct.pack("<Q", length) + CONTENT[8:]) == "damaged"


@pytest.mark.parametrize("field", FIELDS)
def test_no_other_field_of_a_tensor_is_taken(reader, little_memory, field):
    for value in FIELDS[field]:
        assert reader(edited(FIRST, field, value)) == "damaged", value


@pytest.mark.parametrize("name", TEXTS)
def test_a_header_that_is_no_table_of_tensors_is_damaged(reader, little_memory, name):
    assert reader(with_header(TEXTS[name])) == "damaged"
