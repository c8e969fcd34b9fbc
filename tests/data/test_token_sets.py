"""Texts as tokens: vocabularies, files of every kind, the standard library, mistakes."""

from __future__ import annotations

import gzip
import json
import os
import sys
import zipfile
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from mistakes import told
from texts import files, prose, spec, whole

from zoo.data import documents
from zoo.data.documents import cuts, list_texts, pieces
from zoo.data.images import Digits
from zoo.data.pipeline import batches, epoch
from zoo.data.text import tokens
from zoo.data.text import vocabulary as vocabularies
from zoo.data.text.prepare import prepare_text
from zoo.data.text.tokens import Docstrings, Text, check_vocabulary
from zoo.data.text.vocabulary import normalise, open_vocabulary
from zoo.task import About, Captions
from zoo.train.provenance import check_data

# vocabularies


def test_the_rule_of_text8():
    assert normalise("It's 2 o'clock\tIN  Zürich – №10!\n") == "it s two o clock in z rich one zero"
    assert normalise(" 007 ") == "zero zero seven"
    assert normalise("...\n\u0130\u212a") == ""  # letters that only Unicode makes small ones of are none
    assert vocabularies.text8().encode("a z").tolist() == [1, 0, 26]
    raw = vocabularies.raw_bytes()  # bytes that make no character, and those of a terminal
    assert (raw.decode([104, 105, 0xC3]), raw.encode("\udcc3").tolist()) == ("hi\ufffd", [0xC3])


@pytest.mark.parametrize("kind", ["text8", "chars", "bytes", "hf", "spm"])
def test_a_vocabulary_decodes_what_it_encodes_and_comes_back_from_its_folder(kind, request, tmp_path):
    text = "the cat sat on the mat"
    name = str(request.getfixturevalue(kind)) if kind in ("hf", "spm") else kind
    vocabulary = vocabularies.named(name, prose() + "é☃")
    ids = vocabulary.encode(text)
    assert (ids.dtype, ids.ndim) == (np.int32, 1)
    assert 0 <= ids.min() <= ids.max() < vocabulary.size
    assert vocabulary.decode(ids) == vocabulary.decode(ids.tolist()) == text
    assert [x.tolist() for x in vocabulary.encode_all([text, ""])] == [ids.tolist(), []]
    assert open_vocabulary(tmp_path) is None
    vocabulary.save(tmp_path)
    again = open_vocabulary(tmp_path)
    assert (again, again.name, again.size, again.end) == (vocabulary, vocabulary.name, vocabulary.size, vocabulary.end)
    assert again.encode(text).tolist() == ids.tolist()
    if kind in ("chars", "bytes", "hf"):
        assert vocabulary.decode(vocabulary.encode("é☃\n")) == "é☃\n"
    assert vocabulary.decode([-1, *ids, -1, -7]) == f"\ufffd{text}\ufffd\ufffd"  # no token
    assert (vocabulary.decode(np.array([-1], np.int32)), vocabulary.decode([])) == ("\ufffd", "")
    own = [path for path in tmp_path.iterdir() if path.name.startswith("tokenizer")]
    assert len(own) == (kind in ("hf", "spm"))
    for path in own:
        path.write_bytes(path.read_bytes() + b" ")
        with told("is not the tokenizer that", "vocabulary.json names"):
            open_vocabulary(tmp_path)
        path.unlink()
        with told(f"{path.name} is missing", "vocabulary.json needs; restore it"):
            open_vocabulary(tmp_path)
    for damage in ("{", "[]", '{"format": "other"}', '{"format": "zoo-vocabulary", "version": 1, "name": "x"}'):
        (tmp_path / "vocabulary.json").write_text(damage)
        with told("vocabulary.json"):
            open_vocabulary(tmp_path)


def test_the_end_of_a_text_spelled_in_a_text_is_text(hf, tmp_path):
    saved, text = json.loads(hf.read_text()), "the <|endoftext|> cat"
    for special in (True, False):
        saved["added_tokens"][0]["special"] = special
        (tmp_path / "tokenizer.json").write_text(json.dumps(saved))
        vocabulary = vocabularies.named(str(tmp_path))
        (ids,) = vocabulary.encode_all([text])
        assert (vocabulary.end, 0 in ids, vocabulary.decode(ids)) == (0, False, text)
        assert vocabulary.decode([*ids, 0]) == text + "<|endoftext|>"


def test_unknown_characters_are_counted_and_the_first_are_named(book):
    with told("the prompt", "3 characters", "27", "'T' at 0", "'!' at 3", r"'\n' at 4", "normalise"):
        vocabularies.text8().encode("The!\n", "the prompt")
    with told("a character", "'☃' at 1"):
        vocabularies.characters("ab").encode("a☃")
    with told("book.txt", r"'\n' at", "..."):
        Text(str(book), normalise=False).source("train", spec())


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("no.json", None, "data.tokenizer=no.json text8"),
        ("char", None, "'chars'?"),
        ("a.txt", b"", "a.txt .json .model"),
        ("a.json", b"{}", "a.json tokenizers"),
        ("a.model", b"\x12nothing of the kind", "a.model sentencepiece"),
        ("a.model", b"", "a.model empty"),
    ],
)
def test_files_that_are_no_tokenizer(book, tmp_path, monkeypatch, name, content, words):
    monkeypatch.chdir(tmp_path)
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with told(*words.split()):
        Text(str(book), tokenizer=name).vocabulary()


def test_a_missing_package_is_told(hf, spm, book, monkeypatch):
    for package, tokenizer in (("tokenizers", hf), ("sentencepiece", spm)):
        monkeypatch.setitem(sys.modules, package, None)
        with told(package, "`text`"):
            Text(str(book), tokenizer=str(tokenizer)).vocabulary()


# texts by path


def test_windows_are_the_text_in_order(book):
    data = Text(str(book))
    train, valid, test = (data.source(split, spec()) for split in documents.SPLITS)
    words = normalise(prose())
    assert len(valid.tokens) == len(test.tokens) == round(len(words) * 0.05)
    assert "".join(whole(data)) == words
    assert len(train) == len(train.tokens) // 8
    assert (train[0]["tokens"].dtype, train[0]["tokens"].shape) == (np.int32, (8,))
    assert data.vocabulary().decode(np.concatenate([train[i]["tokens"] for i in range(len(train))])) in words
    assert train[3]["tokens"].tolist() == train.tokens[24:32].tolist()
    for wrong in (-1, len(train)):
        with pytest.raises(IndexError):
            train[wrong]
    assert (train.labels, train.vocabulary.size, train.characters_per_token) == ((), 27, 1.0)
    assert data.fingerprint("train") != data.fingerprint("test")
    batch = next(iter(batches(data, 4, spec=spec())))
    assert batch["tokens"].shape == (4, 8)
    assert next(iter(epoch(data, 4, spec=spec())))[0]["tokens"][0].tolist() == test[0]["tokens"].tolist()


def test_a_text_is_encoded_once_and_again_when_it_changes(book, monkeypatch):
    calls = []
    encode = tokens.encoded
    monkeypatch.setattr(tokens, "encoded", lambda *a: calls.append(1) or encode(*a))
    with ThreadPoolExecutor(4) as pool:
        for _ in range(4):
            pool.submit(Text(str(book), "bytes").source, "train", spec())
    assert len(calls) == 1
    before = Text(str(book), "bytes").fingerprint("test")
    book.write_text(prose(1))
    os.utime(book, ns=(1, 1))
    assert Text(str(book), "bytes").fingerprint("test") != before


def test_characters_per_token(hf, spm, book):
    for kind in ("chars", "bytes", str(hf), str(spm)):
        sources = [Text(str(book), kind).source(split, spec()) for split in documents.SPLITS]
        found = sum(source.characters for source in sources)
        assert abs(found - len(prose())) <= (0.01 * len(prose()) if kind == str(spm) else 0)
        assert sources[2].characters_per_token == (1 if kind in ("chars", "bytes") else pytest.approx(2.5, abs=1.5))


@pytest.mark.parametrize("suffix", ["", ".txt.gz", ".zip", ".jsonl.gz", ".parquet"])
def test_every_kind_of_file_gives_the_same_text(suffix, tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "PIECE", 700)
    path, text = tmp_path / f"book{suffix}", prose().rstrip()
    raw = b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode()
    if "jsonl" in suffix:
        raw = json.dumps({"text": text}).encode() + b"\n\n"
    if suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.table({"id": [1, 2], "text": [text, None]}), path)
    elif suffix == ".zip":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as packed:
            packed.writestr("book", raw)
    else:
        path.write_bytes(gzip.compress(raw) if suffix.endswith(".gz") else raw)
    parts = [part for part, _ in pieces(path)]
    assert "".join(parts) == text
    assert len(parts) > 5
    assert max(map(len, parts)) <= 700
    assert [last for _, last in pieces(path) if last] == [True]
    assert "".join(whole(Text(str(path), "chars"))) == text
    assert "".join(whole(Text(str(path)))) == normalise(text)


def test_documents_are_told_apart(tmp_path, hf):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in ("One.", "", "Two 2", "!")))
    assert "".join(whole(Text(str(path), valid_fraction=0.3, test_fraction=0.3), 1)) == "one two two"
    assert "".join(whole(Text(str(path), "chars", valid_fraction=0.3, test_fraction=0.3), 1)) == "One.\nTwo 2\n!"
    data = Text(str(path), str(hf), valid_fraction=0.2, test_fraction=0.2)
    ids = np.concatenate([data.source(split, spec(1)).tokens for split in documents.SPLITS])
    assert ((ids == 0).sum(), ids[-1]) == (3, 0)
    for long in ("x" * 5000, "\n" * 5000):  # no place to cut at
        assert "".join(part for part, _ in documents._cut(iter([long]))) == long


def test_parts_end_where_documents_do_unless_these_are_too_long():
    assert cuts(np.arange(10, 1010, 10), 0.05, 0.05) == (900, 950)
    assert cuts(np.arange(9, 1000, 9), 0.05, 0.05) == (900, 945)
    assert cuts(np.array([600, 1000]), 0.05, 0.05) == (900, 950)
    assert cuts(np.array([1000]), 0.0, 0.1) == (900, 900)
    assert cuts(np.array([], np.int64), 0.1, 0.1) == (0, 0)


def test_words_of_splits_in_any_spelling(tmp_path):
    spelled = {
        "train": "Train/0.txt training.txt c4-train.00000-of-00001.txt a_train.txt train/of.txt",
        "valid": "eval.txt dev/0.txt c4-validation.00000-of-00001.txt Val.txt",
        "test": "Testing.txt wiki.test.tokens.txt",
    }
    for name in " ".join(spelled.values()).split():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("text")
    found = list_texts(tmp_path)
    assert {split: {*found[split]} for split in spelled} == {
        split: {tmp_path / name for name in names.split()} for split, names in spelled.items()
    }


def test_files_that_name_their_split(tmp_path):
    for name in ("wiki.train.txt", "wiki.valid.txt", "wiki.test.txt"):
        (tmp_path / name).write_text(f"{name.split('.')[1]} " * 9)
    assert whole(Text(str(tmp_path)), 4) == [" ".join([split] * 9) for split in documents.SPLITS]
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "val.txt").write_text("more")
    assert len(list_texts(tmp_path)["valid"]) == 2
    (tmp_path / "notes.txt").write_text("neither")
    with told("sub/val.txt", "notes.txt"):
        list_texts(tmp_path)
    for name in ("wiki.train.txt", "wiki.valid.txt", "notes.txt"):
        (tmp_path / name).unlink()
    with told("sub/val.txt", "valid", "train"):
        prepare_text(str(tmp_path), str(tmp_path.parent / "out"), "text8", progress=False)
    (tmp_path / "train.txt").write_text("x" * 99)
    (tmp_path / "sub/val.txt").unlink()
    with told("valid.txt"):
        Text(str(tmp_path)).source("valid", spec())
    with told("data.valid_fraction"):
        Text(str(tmp_path / "train.txt"), valid_fraction=0.0).source("valid", spec())
    with told("train", "more text"):
        Text(str(tmp_path / "train.txt"), valid_fraction=0.999, test_fraction=0.0).source("train", spec())


def test_brackets_make_no_json_and_a_text_that_lies_packed_beside_itself_is_refused(tmp_path):
    for plain in ("{{Infobox}} text", "[[link]] text", "{curly}", "[1] cited"):
        (tmp_path / "plain").write_text(plain)
        assert [text for text, _ in pieces(tmp_path / "plain")] == [plain]
    for name in ("s/a.jsonl", "s/a.jsonl.gz"):
        (tmp_path / "s").mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    with told("s/a.jsonl", "s/a.jsonl.gz", "packing"):
        list_texts(tmp_path)
    (tmp_path / "s/a.jsonl.gz").rename(tmp_path / "s/b.jsonl.gz")
    assert len(list_texts(tmp_path)[None]) == 2


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.txt", b" \n\xe2\x98\x83!", "letter"),
        ("a.txt", b"abc\xff", "UTF-8 3 0xff"),
        ("a.txt", b"ab\0c", "binary"),
        ("a.txt", b"hello", "1 8 task.length=1"),
        ("a.gz", b"abc", "read"),
        ("a.gz", gzip.compress(b"abc" * 99, mtime=0)[:20], "unpack"),
        ("a.zip", b"abc", "unpack"),
        ("a.parquet", b"abc", "parquet"),
        ("a.jsonl", b'{"text": "a"}\n{\n', "line 2 JSON"),
        ("a.jsonl", b'{"text": "a"}\n' + b"[" * 200_000, "line 2 JSON deep"),
        ("a", b'{"txt": "a"}\n', 'line 1 "text"'),
        ("a.json", b'[{"text": "a"}, {"text": 1}]', 'element 2 "text"'),
        ("a.json", b'{\n "text": "a"\n}', "JSON one object a line"),
        ("a.txt", "abc".encode("utf-16"), "UTF-16 iconv utf-16"),
        ("a.csv", b"id,text\n1,abc\n", "table"),
        ("a", gzip.compress(b"PAR1abc", mtime=0), "parquet unpack"),
        ("a.txt", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "LFS pull"),
    ],
)
def test_texts_that_cannot_be_used(tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    with told(name, *words.split()):
        Text(str(tmp_path / name), test_fraction=0.2).source("test", spec())


def test_half_a_character_is_the_replacement_character(hf, spm, tmp_path):
    (tmp_path / "a.jsonl").write_text(r'{"text": "the \ud800cat \ud83d\ude00 sat"}' + "\n")
    (tmp_path / "b.jsonl").write_text('{"text": "the \ufffdcat \U0001f600 sat"}\n')
    for name in ("bytes", str(hf), str(spm)):
        both = [Text(str(tmp_path / f"{part}.jsonl"), name, valid_fraction=0, test_fraction=0) for part in "ab"]
        first, second = (data.source("train", spec(1)).tokens.tolist() for data in both)
        assert first == second
        if name != "bytes":  # and of a prompt
            model = vocabularies.named(name)
            assert model.encode("cat\udcc3").tolist() == model.encode("cat\ufffd").tolist()


def test_other_mistakes(book, tmp_path, monkeypatch):
    with monkeypatch.context() as short, told("40", "0xc3"):  # an error far into a file has its place
        short.setattr(documents, "PIECE", 10)
        (tmp_path / "far").write_bytes("é".encode() * 20 + b"\xc3(")  # a character across two blocks comes before
        Text(str(tmp_path / "far"), "bytes").vocabulary()
    (tmp_path / "far").unlink()
    with told("boo.txt", "book.txt"):
        Text(str(tmp_path / "boo.txt")).vocabulary()
    with told("split='dev'", "'valid'"):
        Text(str(book)).source("dev", spec())
    with told("spec="):
        Text(str(book)).source("train")
    with told("data=Text", "'tokens'", "'image'"):
        Text(str(book)).source("train", {"image": None, "label": None})
    with told("valid_fraction=0.5", "test_fraction=0.5"):
        Text(str(book), valid_fraction=0.5, test_fraction=0.5).source("train", spec())
    (tmp_path / "none").mkdir()
    with told("none", ".txt"):
        list_texts(tmp_path / "none")
    (tmp_path / "b.jsonl").write_text("{}")
    with told("b.jsonl", "book.txt"):
        list_texts(tmp_path)
    with zipfile.ZipFile(tmp_path / "two.zip", "w") as packed:
        for name in "ab":
            packed.writestr(name, name)
    with told("two.zip", "2"):
        Text(str(tmp_path / "two.zip")).vocabulary()
    for table, words in (({"txt": ["a"]}, ("'text'", "txt")), ({"text": [1]}, ("int64",))):
        pyarrow.parquet.write_table(pyarrow.table(table), tmp_path / "c.parquet")
        with told("c.parquet", *words):
            Text(str(tmp_path / "c.parquet")).vocabulary()


def test_the_vocabulary_of_a_task_must_be_that_of_the_data(book):
    source = Text(str(book)).source("train", spec())

    def task(vocab):
        return SimpleNamespace(about=About(vocabulary=vocab))

    check_vocabulary(task(27), source)
    check_vocabulary(task(None), source)
    check_vocabulary(task(5), Digits().source("train"))
    with told("27 symbols", "task.vocab=50257", "task.vocab=27"):
        check_vocabulary(task(50257), source)
    letters = SimpleNamespace(about=About(vocabulary=29, captions=Captions(8)))  # captions without an encoder
    with told("27 letters", "task.text_width=30", "set task.text_width=28"):
        check_vocabulary(letters, source)
    with told("task.captions='letters'", "Captioned(Digits())"):  # as those of a prepared set are a tokeniser's
        check_vocabulary(letters, Digits().source("train"))


def test_a_run_does_not_go_on_with_another_text(book, tmp_path):
    task = SimpleNamespace(spec=lambda batch: spec(batch=batch), about=About(vocabulary=27))

    def keep(data):
        check_data(SimpleNamespace(task=task, data=data, source=lambda split: data.source(split, spec())), run)()

    run, data = tmp_path / "run", Text(str(book))
    run.mkdir()
    keep(data)
    told_apart = {split: data.fingerprint(split) for split in documents.SPLITS}
    assert told_apart.items() <= json.loads((run / "data.json").read_text()).items()
    before = files(run)
    book.rename(tmp_path / "moved.txt")  # the same text may lie elsewhere, or be prepared by now
    prepare_text(str(tmp_path / "moved.txt"), str(tmp_path / "set"), "text8", progress=False)
    (tmp_path / "set" / "train.bin").write_bytes(bytes((tmp_path / "set" / "train.bin").stat().st_size))  # is not read
    for same in (Text(str(tmp_path / "moved.txt")), Text(str(tmp_path / "set"))):
        keep(same)
    assert files(run) == before
    book.write_text(prose(1))
    with told(f"workdir={run}", "train", "book.txt"):
        keep(data)
    assert files(run) == before
    (run / "data.json").write_text("{}")
    with told("data.json", "damaged"):
        keep(data)
    (run / "data.json").unlink()  # as in a folder of an earlier version
    keep(data)
    keep(data)


# the standard library


def test_the_standard_library_is_a_text_of_a_million_characters(monkeypatch):
    data = Docstrings()
    train, valid, test = (data.source(split, spec(64)) for split in documents.SPLITS)
    assert len(train.tokens) + len(valid.tokens) + len(test.tokens) > 1_000_000
    assert len(valid.tokens) == len(test.tokens) > 50_000
    text, held = (data.vocabulary().decode(source.tokens) for source in (train, test))
    assert set(text) == set(" abcdefghijklmnopqrstuvwxyz")
    assert "return a copy of" in text
    assert "  " not in text
    assert not [part for part in (text[i : i + 400] for i in range(0, len(text), 4000)) if part in held]
    monkeypatch.setattr(tokens, "_MODULES", "json logging turtle")
    found = set()
    for _ in range(2):
        tokens._docstrings.cache_clear()
        found.add(data.fingerprint("train"))
    tokens._docstrings.cache_clear()
    assert len(found) == 1
