"""Texts as tokens: vocabularies, files of every kind, the standard library, prepared sets and killed runs, mistakes."""

from __future__ import annotations

import gzip
import io
import json
import os
import signal
import subprocess
import sys
import threading
import zipfile
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from zoo.data import documents, tokens
from zoo.data import vocabulary as vocabularies
from zoo.data.documents import cuts, list_texts, pieces
from zoo.data.images import Digits, Images
from zoo.data.latents import Latents
from zoo.data.pipeline import batches, epoch
from zoo.data.prepare import prepare
from zoo.data.prepare_text import prepare_text
from zoo.data.tokens import Docstrings, Text, check_vocabulary
from zoo.data.vocabulary import normalise, open_vocabulary
from zoo.errors import UserError
from zoo.task import About
from zoo.train.loop import _keep_vocabulary

WORDS = ["the", "cat", "sat", "on", "the", "mat", "and", "a", "dog", "ran", "to", "1", "red", "house,", "slept.", ""]


def spec(length=8, batch=4):
    return {"tokens": jax.ShapeDtypeStruct((batch, length), "int32")}


def prose(seed=0, words=2000):
    rng = np.random.default_rng(seed)
    picked = rng.choice(WORDS, words)
    return "\n".join(" ".join(picked[i : i + 10]) for i in range(0, words, 10)) + "\n"


@pytest.fixture(scope="module")
def hf(tmp_path_factory):
    """A tokenizer.json of byte pairs, without any special token but the end of a text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    model = Tokenizer(models.BPE())
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    model.train_from_iterator([prose()], trainer)
    path = tmp_path_factory.mktemp("hf") / "tokenizer.json"
    model.save(str(path))
    return path


@pytest.fixture(scope="module")
def spm(tmp_path_factory):
    import sentencepiece

    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(prose().splitlines()),
        model_writer=out,
        vocab_size=60,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    path = tmp_path_factory.mktemp("spm") / "words.model"
    path.write_bytes(out.getvalue())
    return path


@pytest.fixture
def book(tmp_path):
    path = tmp_path / "book.txt"
    path.write_text(prose())
    return path


def whole(data, length=8):
    """The text of all windows of all splits, in order."""
    return [data.vocabulary().decode(data.source(split, spec(length)).tokens) for split in documents.SPLITS]


def files(folder):
    return {p.name: p.read_bytes() for p in Path(folder).iterdir()}


# vocabularies


def test_the_rule_of_text8():
    assert normalise("It's 2 o'clock\tIN  Zürich – №10!\n") == "it s two o clock in z rich one zero"
    assert normalise(" 007 ") == "zero zero seven"
    assert normalise("...\n\u0130\u212a") == ""  # letters that only Unicode makes small ones of are none
    assert vocabularies.text8().encode("a z").tolist() == [1, 0, 26]


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
    own = [path for path in tmp_path.iterdir() if path.name.startswith("tokenizer")]
    assert len(own) == (kind in ("hf", "spm"))
    for path in own:
        path.write_bytes(path.read_bytes() + b" ")
        with pytest.raises(UserError, match=r"is not the tokenizer that .*vocabulary.json names"):
            open_vocabulary(tmp_path)
        path.unlink()
        with pytest.raises(UserError, match=rf"{path.name} is missing, which .*vocabulary.json needs; restore it"):
            open_vocabulary(tmp_path)
    for damage in ("{", "[]", '{"format": "other"}', '{"format": "zoo-vocabulary", "version": 1, "name": "x"}'):
        (tmp_path / "vocabulary.json").write_text(damage)
        with pytest.raises(UserError, match=r"vocabulary.json (is damaged|was not written by this program)"):
            open_vocabulary(tmp_path)


def test_bytes_that_make_no_character_and_those_of_a_terminal():
    raw = vocabularies.raw_bytes()
    assert raw.decode([104, 105, 0xC3]) == "hi\ufffd"
    assert raw.encode("\udcc3").tolist() == [0xC3]


@pytest.mark.parametrize("kind", ["text8", "chars", "bytes", "hf", "spm"])
def test_no_token_is_the_replacement_character(kind, request):
    vocabulary = vocabularies.named(str(request.getfixturevalue(kind)) if kind in ("hf", "spm") else kind, prose())
    ids = vocabulary.encode("cat").tolist()
    assert vocabulary.decode([-1, *ids, -1, -7, *ids]) == "\ufffdcat\ufffd\ufffdcat"
    assert vocabulary.decode(np.array([-1], np.int32)) == "\ufffd"
    assert vocabulary.decode([]) == ""


@pytest.mark.parametrize("special", [True, False])
def test_the_end_of_a_text_spelled_in_a_text_is_text(special, hf, tmp_path):
    saved = json.loads(hf.read_text())
    saved["added_tokens"][0]["special"] = special
    (tmp_path / "tokenizer.json").write_text(json.dumps(saved))
    vocabulary = vocabularies.named(str(tmp_path))
    text = "the <|endoftext|> cat"
    (ids,) = vocabulary.encode_all([text])
    assert vocabulary.end == 0
    assert 0 not in ids
    assert vocabulary.decode(ids) == text
    assert vocabulary.decode([*ids, 0]) == text + "<|endoftext|>"


def test_unknown_characters_are_counted_and_the_first_are_named(book, tmp_path):
    with pytest.raises(
        UserError,
        match=r"the prompt has 3 characters that are none of the 27 symbols \(space and a to z\): 'T' at 0, '!' at 3, "
        r"'\\n' at 4; normalise it",
    ):
        vocabularies.text8().encode("The!\n", "the prompt")
    with pytest.raises(
        UserError, match=r"the text has a character that is none .* it was made from\): '☃' at 1; leave"
    ):
        vocabularies.characters("ab").encode("a☃")
    with pytest.raises(
        UserError, match=r"book.txt has [0-9,]+ characters .*'\\n' at .*, \.\.\.; normalise it \(data\."
    ):
        Text(str(book), normalise=False).source("train", spec())
    (tmp_path / "plain.txt").write_text(normalise(prose()))
    assert "".join(whole(Text(str(tmp_path / "plain.txt"), normalise=False))) == normalise(prose())


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "no.json",
            None,
            r"data.tokenizer=no.json: there is no file .*no.json, and it is none of text8, chars, bytes; give",
        ),
        ("char", None, r"did you mean 'chars'\? give one of these, a tokenizer.json or a sentencepiece .model"),
        ("a.txt", b"", r"ends neither in .json .* nor in .model .*, so that its kind cannot be told"),
        ("a.json", b"{}", r"a.json is no tokenizer of the package tokenizers \(.*\); give the file tokenizer.json"),
        ("a.json", b"\xff", r"a.json is no tokenizer of the package tokenizers"),
        ("a.model", b"\x12nothing of the kind", r"a.model is no sentencepiece model"),
        ("a.model", b"", r"a.model is no sentencepiece model \(it is empty\)"),
    ],
)
def test_files_that_are_no_tokenizer(book, tmp_path, monkeypatch, name, content, message):
    monkeypatch.chdir(tmp_path)
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        Text(str(book), tokenizer=name).vocabulary()


@pytest.mark.parametrize("kind", ["hf", "spm"])
def test_a_missing_package_is_told(kind, request, book, monkeypatch):
    package = {"hf": "tokenizers", "spm": "sentencepiece"}[kind]
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=rf"needs the package {package}, .*install the extra `text`"):
        Text(str(book), tokenizer=str(request.getfixturevalue(kind))).vocabulary()


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
    threads = [threading.Thread(target=Text(str(book), "bytes").source, args=("train", spec())) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(calls) == 1
    before = Text(str(book), "bytes").fingerprint("test")
    book.write_text(prose(1))
    os.utime(book, ns=(1, 1))
    assert Text(str(book), "bytes").fingerprint("test") != before


@pytest.mark.parametrize("kind", ["chars", "bytes", "hf", "spm"])
def test_characters_per_token(kind, request, book):
    data = Text(str(book), str(request.getfixturevalue(kind)) if kind in ("hf", "spm") else kind)
    sources = [data.source(split, spec()) for split in documents.SPLITS]
    found = sum(source.characters for source in sources)
    assert abs(found - len(prose())) <= (0.01 * len(prose()) if kind == "spm" else 0)
    assert sources[2].characters_per_token == (1 if kind in ("chars", "bytes") else pytest.approx(2.5, abs=1.5))


@pytest.mark.parametrize("suffix", ["", ".txt", ".gz", ".txt.gz", ".zip", ".jsonl", ".jsonl.gz", ".parquet"])
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
    ids = np.concatenate([
        Text(str(path), str(hf), valid_fraction=0.2, test_fraction=0.2).source(split, spec(1)).tokens
        for split in documents.SPLITS
    ])  # fmt: skip
    assert (ids == 0).sum() == 3
    assert ids[-1] == 0
    for long in ("x" * 5000, "\n" * 5000):  # no place to cut at
        assert "".join(part for part, _ in documents._cut(iter([long]))) == long


def test_parts_end_where_documents_do_unless_these_are_too_long():
    assert cuts(np.arange(10, 1010, 10), 0.05, 0.05) == (900, 950)
    assert cuts(np.arange(9, 1000, 9), 0.05, 0.05) == (900, 945)
    assert cuts(np.array([600, 1000]), 0.05, 0.05) == (900, 950)
    assert cuts(np.array([1000]), 0.0, 0.1) == (900, 900)
    assert cuts(np.array([], np.int64), 0.1, 0.1) == (0, 0)


def test_files_that_name_their_split(tmp_path):
    for name in ("wiki.train.txt", "wiki.valid.txt", "wiki.test.txt"):
        (tmp_path / name).write_text(f"{name.split('.')[1]} " * 9)
    assert whole(Text(str(tmp_path)), 4) == [" ".join([split] * 9) for split in documents.SPLITS]
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "val.txt").write_text("more")
    assert len(list_texts(tmp_path)["valid"]) == 2
    (tmp_path / "notes.txt").write_text("neither")
    with pytest.raises(
        UserError, match=r"sub/val.txt names its split and notes.txt names none|and notes.txt names none"
    ):
        list_texts(tmp_path)
    for name in ("wiki.train.txt", "wiki.valid.txt"):
        (tmp_path / name).unlink()
    with pytest.raises(
        UserError,
        match=r"sub/val.txt names the split valid, and no file names train \(notes.txt names none\); call the text to train on "
        r"train.txt or put it into a folder train, or give sub/val.txt another name where it is no such part",
    ):
        list_texts(tmp_path)
    (tmp_path / "notes.txt").unlink()
    with pytest.raises(UserError, match=r"sub/val.txt names the split valid, and no file names train; call the text"):
        prepare_text(str(tmp_path), str(tmp_path.parent / "out"), "text8", progress=False)
    (tmp_path / "train.txt").write_text("x" * 99)
    (tmp_path / "sub/val.txt").unlink()
    with pytest.raises(UserError, match=r"has no valid part; add a file valid.txt, or choose another split"):
        Text(str(tmp_path)).source("valid", spec())
    with pytest.raises(
        UserError, match=r"has no valid part; set a larger data.valid_fraction, or choose another split"
    ):
        Text(str(tmp_path / "train.txt"), valid_fraction=0.0).source("valid", spec())
    with pytest.raises(UserError, match=r"has no train part; give more text, or choose another split"):
        Text(str(tmp_path / "train.txt"), valid_fraction=0.999, test_fraction=0.0).source("train", spec())


@pytest.mark.parametrize("pair", [("a.txt", "a.txt.gz"), ("a.txt", "a.zip"), ("s/a.jsonl", "s/a.jsonl.gz")])
def test_a_text_that_lies_packed_beside_itself_is_refused(pair, tmp_path):
    (tmp_path / "s").mkdir()
    for name in pair:
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(
        UserError, match=rf"holds {pair[0]} and {pair[1]}, which differ in their packing alone, .*remove"
    ):
        list_texts(tmp_path)
    (tmp_path / pair[1]).rename(tmp_path / f"b{pair[1][pair[1].index('a') + 1 :]}")
    assert len(list_texts(tmp_path)[None]) == 2


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"", r"a.txt has no letter and no digit, so that nothing"),
        ("a.txt", b" \n\xe2\x98\x83!", r"a.txt has no letter and no digit, so that nothing"),
        ("a.txt", b"abc\xff", r"a.txt is no text in UTF-8 \(byte 3 is 0xff\); if it is a text, write it again"),
        ("a.txt", b"abc\xc3", r"a.txt is no text in UTF-8 \(byte 3 is 0xc3\)"),
        ("a.txt", b"ab\0c", r"a.txt is no text but a binary file \(it has bytes of value 0\)"),
        ("a.gz", b"abc", r"a.gz cannot be read \(Not a gzipped file"),
        (
            "a.gz",
            gzip.compress(b"abc" * 99, mtime=0)[:20],
            r"a.gz cannot be unpacked \(.*; restore it, or unpack it first",
        ),
        ("a.zip", b"abc", r"a.zip cannot be unpacked \(File is not a zip file\)"),
        ("a.parquet", b"abc", r"a.parquet is no parquet file that can be read"),
        ("a.jsonl", b'{"text": "a"}\n{\n', r"a.jsonl, line 2 is no JSON"),
        (
            "a.jsonl",
            b'{"text": "a"}\n' + b"[" * 200_000,
            r"a.jsonl, line 2 is JSON nested too deep .*; mend or remove it",
        ),
        ("a.jsonl", b'{"txt": "a"}\n', r'a.jsonl, line 1 has no text under "text"; mend or remove it'),
        (
            "a.txt",
            b"hello",
            r"a.txt has 1 tokens in its test part, fewer than the 8 of one sequence; set task.length=1 or",
        ),
    ],
)
def test_texts_that_cannot_be_used(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        Text(str(tmp_path / name), test_fraction=0.2).source("test", spec())


@pytest.mark.parametrize("kind", ["chars", "bytes", "hf", "spm"])
def test_half_a_character_is_the_replacement_character(kind, request, tmp_path):
    name = str(request.getfixturevalue(kind)) if kind in ("hf", "spm") else kind
    (tmp_path / "a.jsonl").write_text(r'{"text": "the \ud800cat \ud83d\ude00 sat"}' + "\n")
    (tmp_path / "b.jsonl").write_text('{"text": "the \ufffdcat \U0001f600 sat"}\n')
    found = [
        Text(str(tmp_path / f"{part}.jsonl"), name, valid_fraction=0, test_fraction=0).source("train", spec(1)).tokens
        for part in "ab"
    ]
    assert found[0].tolist() == found[1].tolist()
    if kind in ("hf", "spm"):  # and of a prompt
        model = vocabularies.named(name)
        assert model.encode("cat\udcc3").tolist() == model.encode("cat\ufffd").tolist()


def test_an_error_far_into_a_file_has_its_place(tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "PIECE", 10)
    (tmp_path / "a.txt").write_bytes("é".encode() * 20 + b"\xc3(")  # a character across two blocks comes before
    with pytest.raises(UserError, match=r"byte 40 is 0xc3"):
        Text(str(tmp_path / "a.txt"), "bytes").vocabulary()


def test_other_mistakes(book, tmp_path):
    with pytest.raises(UserError, match=r"boo.txt does not exist; did you mean .*book.txt\?"):
        Text(str(tmp_path / "boo.txt")).vocabulary()
    with pytest.raises(UserError, match=r"split='dev' is unknown; choose 'train', 'valid' or 'test'"):
        Text(str(book)).source("dev", spec())
    with pytest.raises(UserError, match=r"Text cuts a text into sequences .* pass spec=task.spec\(batch\)"):
        Text(str(book)).source("train")
    with pytest.raises(UserError, match=r"data=Text gives 'tokens', and the task wants 'image', 'label'; use a task"):
        Text(str(book)).source("train", {"image": None, "label": None})
    with pytest.raises(UserError, match=r"valid_fraction=0.5 and test_fraction=0.5 leave nothing to train on"):
        Text(str(book), valid_fraction=0.5, test_fraction=0.5).source("train", spec())
    book.write_text("")
    with pytest.raises(UserError, match=r"book.txt is empty; give a text"):
        Text(str(book), "chars").vocabulary()
    (tmp_path / "none").mkdir()
    with pytest.raises(UserError, match=r"none holds no text; expected files that end in .txt"):
        list_texts(tmp_path / "none")
    (tmp_path / "b.jsonl").write_text("{}")
    with pytest.raises(UserError, match=r"holds files of several kinds \(b.jsonl beside book.txt\)"):
        list_texts(tmp_path)
    with zipfile.ZipFile(tmp_path / "two.zip", "w") as packed:
        packed.writestr("a", "a")
        packed.writestr("b", "b")
    with pytest.raises(UserError, match=r"two.zip holds 2 files in place of one; unpack it"):
        Text(str(tmp_path / "two.zip")).vocabulary()
    for table, message in (
        ({"txt": ["a"]}, "no column 'text' (it has txt)"),
        ({"text": [1]}, "holds int64 and no text"),
    ):
        pyarrow.parquet.write_table(pyarrow.table(table), tmp_path / "c.parquet")
        with pytest.raises(UserError, match=message.replace("(", r"\(").replace(")", r"\)")):
            Text(str(tmp_path / "c.parquet")).vocabulary()


def test_the_vocabulary_of_a_task_must_be_that_of_the_data(book):
    source = Text(str(book)).source("train", spec())

    def task(vocab):
        return SimpleNamespace(about=About(vocabulary=vocab))

    check_vocabulary(task(27), source)
    check_vocabulary(task(None), source)
    check_vocabulary(task(5), Digits().source("train"))
    with pytest.raises(UserError, match=r"^the data has 27 symbols, task.vocab=50257; set task.vocab=27$"):
        check_vocabulary(task(50257), source)


def test_a_run_does_not_go_on_with_another_text(book, tmp_path):
    task = SimpleNamespace(spec=lambda batch: spec(batch=batch), about=About())

    def keep(data):
        _keep_vocabulary(SimpleNamespace(task=task, data=data, source=lambda split: data.source(split, spec())), run)

    run, data = tmp_path / "run", Text(str(book))
    run.mkdir()
    keep(data)
    assert json.loads((run / "data.json").read_text())["train"] == data.fingerprint("train")
    before = files(run)
    book.rename(tmp_path / "moved.txt")  # the same text may lie elsewhere, or be prepared by now
    prepare_text(str(tmp_path / "moved.txt"), str(tmp_path / "set"), "text8", progress=False)
    (tmp_path / "set" / "train.bin").write_bytes(bytes((tmp_path / "set" / "train.bin").stat().st_size))  # is not read
    for same in (Text(str(tmp_path / "moved.txt")), Text(str(tmp_path / "set"))):
        keep(same)
    assert files(run) == before
    book.write_text(prose(1))
    with pytest.raises(
        UserError, match=r"workdir=.*run belongs to a run on another text: the train split of data.path=.*book.txt has "
    ):
        keep(data)
    assert files(run) == before
    (run / "data.json").write_text("{}")
    with pytest.raises(UserError, match=r"data.json is damaged; remove it where the text is still that of the run"):
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
    text = data.vocabulary().decode(train.tokens)
    assert set(text) == set(" abcdefghijklmnopqrstuvwxyz")
    assert "return a copy of" in text
    assert "  " not in text
    long = [text[i : i + 400] for i in range(0, len(text), 4000)]
    held = data.vocabulary().decode(test.tokens)
    assert not [part for part in long if part in held]
    monkeypatch.setattr(tokens, "_MODULES", "json logging turtle")
    found = set()
    for _ in range(2):
        tokens._docstrings.cache_clear()
        found.add(data.fingerprint("train"))
    tokens._docstrings.cache_clear()
    assert len(found) == 1


# prepared sets


@pytest.fixture
def library(tmp_path):
    """Forty documents in two files of JSON lines."""
    folder = tmp_path / "library"
    folder.mkdir()
    for part in range(2):
        lines = [json.dumps({"text": prose(20 * part + i, 50 + 5 * i)}) for i in range(20)]
        (folder / f"{part}.jsonl").write_text("\n".join(lines) + "\n")
    return folder


@pytest.mark.parametrize("kind", ["text8", "chars", "bytes", "hf"])
def test_a_prepared_set_gives_the_same_as_the_texts_themselves(kind, request, library, tmp_path):
    name = str(request.getfixturevalue(kind)) if kind == "hf" else kind
    report = prepare_text(str(library), str(tmp_path / "set"), name, progress=False)
    assert {"info.json", "vocabulary.json", "train.bin", "valid.bin", "test.bin"} <= set(files(tmp_path / "set"))
    assert not [name for name in files(tmp_path / "set") if "tmp" in name or "progress" in name]
    made, plain = Text(str(tmp_path / "set")), Text(str(library), name)
    assert made.vocabulary() == plain.vocabulary()
    for split in documents.SPLITS:
        ours, theirs = made.source(split, spec()), plain.source(split, spec())
        assert isinstance(ours.tokens, np.memmap)
        assert ours.tokens.tolist() == theirs.tokens.tolist()
        assert ours.characters == theirs.characters
        assert ours[0]["tokens"].dtype == np.int32
        assert report.counts[split] == len(ours.tokens)
        if kind == "hf":  # documents go whole to a split
            assert ours.tokens[-1] == ours.vocabulary.end
    assert f"{plain.vocabulary()}, 40 documents" in str(report)
    made.source("train", spec())
    Text(str(tmp_path / "set"), name).source("train", spec())
    before = files(tmp_path / "set")
    prepare_text(str(library), str(tmp_path / "set"), name, progress=False)  # is done already
    assert files(tmp_path / "set") == before


def test_texts_that_name_their_split_are_prepared_as_they_say(tmp_path):
    (tmp_path / "in").mkdir()
    for split in ("train", "test"):
        (tmp_path / "in" / f"{split}.txt").write_text(f"{split} ink " * 9)
    report = prepare_text(str(tmp_path / "in"), str(tmp_path / "out"), "text8", progress=False)
    assert report.counts == {"train": 89, "valid": 0, "test": 80}
    assert Text(str(tmp_path / "out")).source("test", spec()).characters == 80
    with pytest.raises(
        UserError, match=r"out has no valid part; prepare it anew from files of which one is valid.txt, or"
    ):
        Text(str(tmp_path / "out")).source("valid", spec())


KILL = """
import os, signal, sys
from zoo.data import prepare_text as module

note, left = module._note, [int(sys.argv[3])]
def counted(*args):
    note(*args)
    left[0] -= 1
    if not left[0]:
        os.kill(os.getpid(), signal.SIGKILL)
module._note = counted
module.prepare_text(sys.argv[1], sys.argv[2], sys.argv[4], keep=500, progress=False)
"""


def test_a_killed_run_looks_unfinished_and_ends_with_the_same_bytes(library, tmp_path, hf, monkeypatch):
    monkeypatch.setattr(documents, "PIECE", 200)
    whole_set, killed = tmp_path / "whole", tmp_path / "killed"
    prepare_text(str(library), str(whole_set), str(hf), keep=500, progress=False)
    code = KILL.replace(
        "note, left",
        "module.documents_of.__globals__; from zoo.data import documents; documents.PIECE = 200\nnote, left",
    )
    found = subprocess.run([sys.executable, "-c", code, str(library), str(killed), "4", str(hf)], check=False)
    assert found.returncode == -signal.SIGKILL
    with pytest.raises(UserError, match=r"killed is not finished; run the same `zoo prepare` again"):
        Text(str(killed)).source("train", spec())
    with open(killed / "train.tmp", "ab") as file:  # what came after the last mark, and a torn line
        file.write(b"torn")
    with open(killed / "progress.jsonl", "ab") as file:
        file.write(b'{"stream": "tr')
    encoded = []
    encode = vocabularies._Tokenizer.encode_all
    monkeypatch.setattr(
        vocabularies._Tokenizer, "encode_all", lambda self, some, *a: encoded.extend(some) or encode(self, some, *a)
    )
    with pytest.raises(UserError, match=r"was prepared differently: test_fraction=0.05 there, 0.1 now"):
        prepare_text(str(library), str(killed), str(hf), test_fraction=0.1, progress=False)
    prepare_text(str(library), str(killed), str(hf), keep=500, progress=False)
    assert files(killed) == files(whole_set)
    assert sum(map(len, encoded)) < sum(len(text) for file in sorted(library.iterdir()) for text, _ in pieces(file))


@pytest.mark.parametrize("at", range(3))
def test_a_run_stopped_while_it_finishes_is_made_whole(library, tmp_path, monkeypatch, at):
    from zoo.data import prepare_text as module

    prepare_text(str(library), str(tmp_path / "whole"), "text8", keep=500, progress=False)
    calls = {0: (module, "_copy"), 1: (vocabularies.Vocabulary, "save"), 2: (module.os, "replace")}
    replace = os.replace

    def stop(*args):
        if at == 2 and "info.json" not in str(args[1]):
            return replace(*args)
        raise KeyboardInterrupt

    with monkeypatch.context() as stopped:
        stopped.setattr(*calls[at], stop)
        with pytest.raises(KeyboardInterrupt):
            prepare_text(str(library), str(tmp_path / "cut"), "text8", keep=500, progress=False)
    assert not (tmp_path / "cut" / "info.json").exists()
    with pytest.raises(UserError, match="is not finished"):
        Text(str(tmp_path / "cut")).vocabulary()
    prepare_text(str(library), str(tmp_path / "cut"), "text8", keep=500, progress=False)
    assert files(tmp_path / "cut") == files(tmp_path / "whole")


def test_an_edit_that_keeps_the_size_makes_another_source(book, tmp_path):
    from zoo.data import prepare_text as module

    text, times = book.read_bytes(), book.stat()
    prepare_text(str(book), str(tmp_path / "set"), "text8", progress=False)
    with pytest.MonkeyPatch.context() as stopped:
        stopped.setattr(module, "_finish", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            prepare_text(str(book), str(tmp_path / "half"), "text8", progress=False)
    half = len(text) // 2
    book.write_bytes(text[:half] + text[half:].replace(b"cat", b"cow", 1))
    os.utime(book, ns=(times.st_atime_ns, times.st_mtime_ns))
    for name in ("set", "half"):
        with pytest.raises(
            UserError, match=r"was prepared differently: the source has other files, or others of the same"
        ):
            prepare_text(str(book), str(tmp_path / name), "text8", progress=False)
    book.write_bytes(text)  # a copy has another time
    for name in ("set", "half"):
        prepare_text(str(book), str(tmp_path / name), "text8", progress=False)
    assert files(tmp_path / "half") == files(tmp_path / "set")


def test_a_damaged_set_is_refused_and_made_again(library, tmp_path, hf):
    made = tmp_path / "set"

    def again():
        prepare_text(str(library), str(made), str(hf), progress=False)
        return files(made)

    before = again()
    data = Text(str(made))
    for name, damage, message in (
        (
            "train.bin",
            before["train.bin"][:-2],
            r"train.bin has [0-9]+ bytes in place of [0-9]+; run the same `zoo prepare`",
        ),
        ("test.bin", None, r"test.bin has 0 bytes in place of"),
        ("train.bin", b"\xff" * len(before["train.bin"]), r"set is damaged: window 0 has the token 65535, and its voc"),
        ("vocabulary.json", None, r"vocabulary.json is missing; run the same"),
        ("vocabulary.json", b"{", r"vocabulary.json is damaged"),
        ("tokenizer.json", None, r"tokenizer.json is missing, which"),
    ):
        (made / name).write_bytes(damage) if damage is not None else (made / name).unlink()
        with pytest.raises(UserError, match=message):
            data.source("train", spec())[0]
        assert again() == before
    vocabularies.text8().save(made)
    with pytest.raises(UserError, match=r"vocabulary.json is not the one that the set was made with"):
        data.source("train", spec())
    assert again() == before
    (made / "info.json").write_text("{")
    with pytest.raises(UserError, match=r"info.json is damaged"):
        data.source("train", spec())


def test_a_set_is_not_read_as_what_it_is_not(library, book, tmp_path, hf):
    made = tmp_path / "set"
    prepare_text(str(library), str(made), "text8", progress=False)
    with pytest.raises(UserError, match=r"was prepared with text8 \(27 symbols\), and data.tokenizer=bytes is another"):
        Text(str(made), "bytes").source("train", spec())
    with pytest.raises(UserError, match=r"data.tokenizer=.*tokenizer.json is another one; leave data.tokenizer out"):
        Text(str(made), str(hf)).source("train", spec())
    with pytest.raises(UserError, match=r"data.tokenizer=other.json: there is no file"):
        Text(str(made), "other.json").source("train", spec())
    with pytest.raises(UserError, match=r"set holds tokens of texts, not images; read it with data=Text\(path\)"):
        Images(str(made), size=4).source("train")
    with pytest.raises(UserError, match=r"set holds tokens of texts, not latents; read it with data=Text"):
        Latents(str(made)).source("train")
    (tmp_path / "in").mkdir()
    for i in range(4):
        Image.new("RGB", (4, 4)).save(tmp_path / "in" / f"{i}.png")
    prepare(str(tmp_path / "in"), str(tmp_path / "images"), progress=False)
    with pytest.raises(UserError, match=r"images holds images, not tokens of texts; read it with data=Images"):
        Text(str(tmp_path / "images")).source("train", spec())
    with pytest.raises(UserError, match=r"holds a set of another kind \(zoo-images\); choose a new folder"):
        prepare_text(str(book), str(tmp_path / "images"), "text8", progress=False)
    with pytest.raises(UserError, match=r"holds a set of another kind \(zoo-tokens\); choose a new folder"):
        prepare(str(tmp_path / "in"), str(made), progress=False)


def test_places_that_cannot_be_written_to_or_prepared(library, book, tmp_path):
    made = tmp_path / "set"
    prepare_text(str(library), str(made), "text8", progress=False)
    before = files(made)
    for source, dest, kind, message in (
        (book, made, "text8", r"was prepared differently: .*the source has other files"),
        (library, made, "chars", r"was prepared differently: vocabulary='text8' there, 'chars' now; choose a new"),
        (made, tmp_path / "new", "text8", r"SOURCE .*set is a prepared set; give the texts it was made from"),
        (library, library / "in", "text8", r"lies inside SOURCE"),
        (library, book, "text8", r"DEST .*book.txt is a file; choose a new folder"),
        (library, library.parent, "text8", r"DEST .* is not empty and no prepared set; choose a new folder"),
        (library, book / "new", "text8", r"cannot write .*book.txt/new \(Not a directory\); mend that and run"),
    ):
        with pytest.raises(UserError, match=message):
            prepare_text(str(source), str(dest), kind, progress=False)
    assert files(made) == before
    book.write_text("!")
    with pytest.raises(UserError, match=r"book.txt has no letter and no digit"):
        prepare_text(str(book), str(tmp_path / "new"), "text8", progress=False)
    book.write_text("")
    with pytest.raises(UserError, match=r"book.txt is empty; give a text"):
        prepare_text(str(book), str(tmp_path / "new"), "chars", progress=False)
    assert not (tmp_path / "new").exists()
