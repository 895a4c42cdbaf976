"""JSON files: an object, none, or an error that names the file."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minillm_jax.json_files import read_object


class FileError(ValueError):
    """As a caller may have its own."""


SCALARS = st.none() | st.booleans() | st.integers() | st.text()
OBJECTS = st.dictionaries(st.text(), SCALARS | st.lists(SCALARS))


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return tmp_path_factory.mktemp("folder") / "file.json"


@settings(max_examples=50, deadline=None)
@given(OBJECTS, st.sampled_from(["utf-8", "utf-8-sig", "utf-16"]), st.booleans())
def test_an_object_is_read_as_it_was_written(file, values, encoding, ascii_only):
    file.write_text(json.dumps(values, ensure_ascii=ascii_only), encoding=encoding)
    assert read_object(file, FileError) == values


@pytest.mark.parametrize("name", ["nosuch.json", "nosuch/file.json", ""])
def test_no_file_is_an_empty_object(tmp_path, name):
    assert read_object(tmp_path / name, FileError) == {}


@pytest.mark.parametrize(
    "content",
    [
        *(b"", b"{", b'{"a": }', b"{}x", b"\xff\xfe{}", b"\0", b'{"a": "\xff"}'),
        *(b"[]", b"3", b"null", b'"text"', b"true"),
        b'{"a":' * 10**5,
        b'{"a": ' + b"1" * 10**4 + b"}",
    ],
    ids=lambda content: repr(content[:12]),
)
def test_what_is_no_object_is_the_callers_error_with_the_files_name(tmp_path, content):
    file = tmp_path / "file.json"
    file.write_bytes(content)
    with pytest.raises(FileError) as caught:
        read_object(file, FileError)
    assert str(caught.value).startswith(f"{file}: ")
