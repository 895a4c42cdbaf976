"""Sources, near-duplicates, splits and what is kept on disk."""

import json

import numpy as np
import pytest

from minillm_jax.text.tokenizer import ByteTokenizer
from minillm_jax.training import corpus, near_duplicates, sources
from minillm_jax.training.errors import DataError
from minillm_jax.training.sources import Document


def read(source, vocab_size=256, eos=()):
    found = sources.documents(str(source), vocab_size=vocab_size, eos_token_ids=eos)
    return list(found)


def random_text(seed, length=2000):
    draw = np.random.default_rng(seed)
    return bytes(draw.integers(97, 123, length, np.uint8)).decode()


def make(folder, texts, **facts):
    found = [Document(str(i), text) for i, text in enumerate(texts)]
    return corpus.make(folder, found, ByteTokenizer(), vocab_size=256, facts=facts)


def test_a_folder_is_its_files_in_order_without_hidden_ones(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / ".git").mkdir()
    for name in ("b/x.txt", "a.txt", ".git/config", "b/.hidden"):
        (tmp_path / name).write_text(name)
    (tmp_path / "empty").write_text("")
    wanted = [Document(name, name) for name in ("a.txt", "b/x.txt")]
    assert read(tmp_path) == wanted


def test_jsonl_has_a_text_a_line(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "one"}\n\n{"text": "two", "id": 3}\n')
    assert [d.content for d in read(path)] == ["one", "two"]


@pytest.mark.parametrize("line", ["{", "[]", '{"text": 3}', "{}", "[" * 10**5])
def test_a_bad_line_is_named(tmp_path, line):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "one"}\n' + line)
    with pytest.raises(DataError, match=r"a\.jsonl:2: must be"):
        read(path)


def test_a_lone_surrogate_is_a_question_mark(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a\\ud83db"}\n{"text": "another one"}\n')
    found = corpus.make(
        tmp_path / "c", read(path), ByteTokenizer(), vocab_size=256, facts={}
    )
    assert bytes(found.tokens[:3].tolist()) == b"a?b"
    assert found.num_bytes.tolist() == [3, 11]


def test_of_few_documents_the_smallest_is_validation(tmp_path):
    texts = [random_text(seed, length) for seed, length in enumerate((900, 3000, 50))]
    assert make(tmp_path / "c", texts).split(validation=True).tolist() == [2]


def test_what_a_killed_process_left_is_removed(tmp_path):
    (tmp_path / ".making-c-1").mkdir()
    make(tmp_path / "c", [random_text(0), random_text(1)])
    assert [path.name for path in tmp_path.iterdir()] == ["c"]


def test_token_ids_end_with_eos(tmp_path):
    path = tmp_path / "a.bin"
    np.asarray([5, 6, 0, 7, 0, 8], "<u2").tofile(path)
    found = [d.content.tolist() for d in read(path, eos=(0,))]
    assert found == [[5, 6, 0], [7, 0], [8]]
    with pytest.raises(DataError, match="id 8 is not below vocab_size=8"):
        read(path, vocab_size=8)
    path.write_bytes(b"odd")
    with pytest.raises(DataError, match="3 bytes are not ids"):
        read(path)


def test_what_cannot_be_read_is_named(tmp_path):
    with pytest.raises(DataError, match="no such file or folder; 'python'"):
        read(tmp_path / "none")
    (tmp_path / "a.txt").write_bytes(b"ab\xff")
    with pytest.raises(DataError, match=r"a\.txt: not UTF-8 at byte 2"):
        read(tmp_path / "a.txt")


def test_the_standard_library_is_there_without_its_tests():
    names = [document.name for document in read("python")]
    assert names == sorted(names, key=lambda name: name.split("/"))
    assert {"dataclasses.py", "json/decoder.py"} <= set(names)
    assert not [n for n in names if "/test/" in n or n.startswith("test/")]
    assert not [n for n in names if "site-packages" in n]


@pytest.mark.parametrize("edits", [1, 5])
def test_near_duplicates_are_one_group_and_others_are_not(edits):
    text = np.frombuffer(random_text(0).encode(), np.uint8)
    edited = text.copy()
    edited[np.linspace(100, 1900, edits).astype(int)] = 65
    other = np.frombuffer(random_text(1).encode(), np.uint8)
    both = np.concatenate([other[:900], text[:400]])  # a quarter is shared
    found = [near_duplicates.sketch(x) for x in (text, other, edited, both)]
    assert near_duplicates.groups(found) == [0, 1, 0, 3]


def test_similarity_estimates_the_share_of_runs():
    text = np.frombuffer(random_text(0, 20_000).encode(), np.uint8)
    for share in (0.25, 0.5, 0.75):
        shared = int(share * len(text) * 2 / (1 + share))
        a = near_duplicates.sketch(text[:shared])
        other = np.frombuffer(random_text(1, len(text)).encode(), np.uint8)
        b = near_duplicates.sketch(np.concatenate([text[:shared], other[:100]]))
        assert near_duplicates.similarity(a, b) > 0.8
        c = near_duplicates.sketch(np.concatenate([text[: shared // 2], other]))
        wanted = (shared / 2) / (shared + len(other))
        assert near_duplicates.similarity(a, c) == pytest.approx(wanted, abs=0.15)


def test_what_is_made_is_what_is_loaded(tmp_path):
    texts = [random_text(seed, 50 + seed) for seed in range(60)] + ["é"]
    made = make(tmp_path / "c", texts, source="x")
    for found in (made, corpus.load(tmp_path / "c")):
        assert found.tokens.astype(np.uint8).tobytes() == "".join(texts).encode()
        assert np.diff(found.starts).tolist() == [len(t.encode()) for t in texts]
        assert found.num_bytes.tolist() == np.diff(found.starts).tolist()
        assert found.facts["source"] == "x"
        assert 0 < found.validation.sum() < 15
    assert [file.name for file in tmp_path.iterdir()] == ["c"]


def test_the_split_of_a_document_depends_on_no_other(tmp_path):
    texts = [random_text(seed) for seed in range(80)]
    both = [
        dict(zip(given, make(tmp_path / "c", given).validation, strict=True))
        for given in (texts, texts[::-1][:60])
    ]
    differing = [t for t in both[1] if both[0][t] != both[1][t]]
    assert len(differing) <= 1  # the smallest hash of all is always in validation


def test_near_duplicates_are_on_one_side(tmp_path):
    texts = [random_text(seed) for seed in range(40)]
    texts += [text[:1000] + "CHANGED" + text[1000:] for text in texts]
    found = make(tmp_path / "c", texts).validation
    np.testing.assert_array_equal(found[:40], found[40:])


def test_a_single_document_is_cut(tmp_path):
    text = random_text(0)
    found = make(tmp_path / "c", [text])
    assert found.validation.tolist() == [False, True]
    assert found.starts.tolist() == [0, 1900, 2000]


@pytest.mark.parametrize("texts", [[], [""], ["a"]])
def test_nothing_to_train_on_is_told_and_leaves_nothing(tmp_path, texts):
    with pytest.raises(DataError, match="no document of two tokens"):
        make(tmp_path / "c", texts)
    assert not list(tmp_path.iterdir())


def test_an_id_beyond_the_vocabulary_is_told(tmp_path):
    with pytest.raises(DataError, match=r"a: the tokenizer has id 122.*=100"):
        corpus.make(
            tmp_path / "c",
            [Document("a", "az")],
            ByteTokenizer(),
            vocab_size=100,
            facts={},
        )


def test_a_damaged_corpus_is_told(tmp_path):
    make(tmp_path / "c", [random_text(0)])
    with (tmp_path / "c/tokens.bin").open("ab") as file:
        file.truncate(100)
    with pytest.raises(DataError, match="cut off"):
        corpus.load(tmp_path / "c")
    facts = json.loads((tmp_path / "c/corpus.json").read_text())
    (tmp_path / "c/corpus.json").write_text(json.dumps(facts | {"dtype": "object"}))
    with pytest.raises(DataError, match="not a corpus"):
        corpus.load(tmp_path / "c")
