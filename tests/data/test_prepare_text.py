"""`zoo prepare --text`: sets of tokens, killed runs, damage, and places that are refused."""

from __future__ import annotations

import json
import os

import numpy as np
import pytest
from forks import die, ended, started
from mistakes import told
from PIL import Image
from texts import files, prose, spec

from zoo.data import documents
from zoo.data.documents import pieces
from zoo.data.images import Images
from zoo.data.images.latents import Latents
from zoo.data.prepare import prepare
from zoo.data.text import prepare as module
from zoo.data.text import vocabulary as vocabularies
from zoo.data.text.prepare import prepare_text
from zoo.data.text.tokens import Text


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


def prepared(source, dest, kind="text8", **kw):
    prepare_text(str(source), str(dest), str(kind), progress=False, **kw)
    return files(dest)


def test_texts_that_name_their_split_are_prepared_as_they_say(tmp_path):
    (tmp_path / "in").mkdir()
    for split in ("train", "test"):
        (tmp_path / "in" / f"{split}.txt").write_text(f"{split} ink " * 9)
    report = prepare_text(str(tmp_path / "in"), str(tmp_path / "out"), "text8", progress=False)
    assert report.counts == {"train": 89, "valid": 0, "test": 80}
    assert Text(str(tmp_path / "out")).source("test", spec()).characters == 80
    with told("out", "valid.txt"):
        Text(str(tmp_path / "out")).source("valid", spec())


def dying(source, dest, kind, notes):
    """`prepared` that is killed after so many notes."""
    note, left = module._note, [notes]

    def counted(*args):
        note(*args)
        left[0] -= 1
        if not left[0]:
            die()

    module._note = counted
    prepared(source, dest, kind, keep=500)


def test_a_killed_run_looks_unfinished_and_ends_with_the_same_bytes(library, tmp_path, hf, monkeypatch):
    monkeypatch.setattr(documents, "PIECE", 200)
    killed, whole = tmp_path / "killed", prepared(library, tmp_path / "whole", hf, keep=500)
    assert ended(*started(lambda: dying(library, killed, hf, 4))) is None
    with told("killed", "`zoo prepare`"):
        Text(str(killed)).source("train", spec())
    with open(killed / "train.tmp", "ab") as file:  # what came after the last mark, and a torn line
        file.write(b"torn")
    with open(killed / "progress.jsonl", "ab") as file:
        file.write(b'{"stream": "tr')
    encoded, kind = [], vocabularies._Tokenizer
    encode = kind.encode_all
    monkeypatch.setattr(kind, "encode_all", lambda self, some, *a: encoded.extend(some) or encode(self, some, *a))
    with told("test_fraction=0.05", "0.1"):
        prepared(library, killed, hf, test_fraction=0.1)
    assert prepared(library, killed, hf, keep=500) == whole
    assert sum(map(len, encoded)) < sum(len(text) for file in sorted(library.iterdir()) for text, _ in pieces(file))


@pytest.mark.parametrize("at", range(3))
def test_a_run_stopped_while_it_finishes_is_made_whole(library, tmp_path, monkeypatch, at):
    whole = prepared(library, tmp_path / "whole", keep=500)
    calls = {0: (module, "_copy"), 1: (vocabularies.Vocabulary, "save"), 2: (module.os, "replace")}
    replace = os.replace

    def stop(*args):
        if at == 2 and "info.json" not in str(args[1]):
            return replace(*args)
        raise KeyboardInterrupt

    with monkeypatch.context() as stopped:
        stopped.setattr(*calls[at], stop)
        with pytest.raises(KeyboardInterrupt):
            prepared(library, tmp_path / "cut", keep=500)
    assert not (tmp_path / "cut" / "info.json").exists()
    with told("not finished"):
        Text(str(tmp_path / "cut")).vocabulary()
    assert prepared(library, tmp_path / "cut", keep=500) == whole


def test_an_edit_that_keeps_the_size_makes_another_source(book, tmp_path):
    text, times = book.read_bytes(), book.stat()
    whole = prepared(book, tmp_path / "set")
    with pytest.MonkeyPatch.context() as stopped:
        stopped.setattr(module, "_finish", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            prepared(book, tmp_path / "half")
    half = len(text) // 2
    book.write_bytes(text[:half] + text[half:].replace(b"cat", b"cow", 1))
    os.utime(book, ns=(times.st_atime_ns, times.st_mtime_ns))
    for name in ("set", "half"):
        with told("other files"):
            prepared(book, tmp_path / name)
    book.write_bytes(text)  # a copy has another time
    for name in ("set", "half"):
        assert prepared(book, tmp_path / name) == whole


def test_a_damaged_set_is_refused_and_made_again(library, tmp_path, hf):
    made = tmp_path / "set"
    before, data = prepared(library, made, hf), Text(str(made))
    for name, damage, word in (
        ("train.bin", before["train.bin"][:-2], "bytes in place of"),
        ("test.bin", None, "0 bytes in place of"),
        ("train.bin", b"\xff" * len(before["train.bin"]), "65535"),
        ("vocabulary.json", None, "missing"),
        ("vocabulary.json", b"{", "damaged"),
        ("tokenizer.json", None, "missing"),
    ):
        (made / name).write_bytes(damage) if damage is not None else (made / name).unlink()
        with told(word, "set" if word == "65535" else name):
            data.source("train", spec())[0]
        assert prepared(library, made, hf) == before
    vocabularies.text8().save(made)
    with told("vocabulary.json"):
        data.source("train", spec())
    assert prepared(library, made, hf) == before
    (made / "info.json").write_text("{")
    with told("info.json"):
        data.source("train", spec())


def test_a_set_is_not_read_as_what_it_is_not_nor_written_where_it_must_not_be(library, book, tmp_path, hf):
    made, images = tmp_path / "set", tmp_path / "images"
    before = prepared(library, made)
    (tmp_path / "in").mkdir()
    for i in range(4):
        Image.new("RGB", (4, 4)).save(tmp_path / "in" / f"{i}.png")
    prepare(str(tmp_path / "in"), str(images), progress=False)
    for data, words in (
        (Text(str(made), "bytes"), "text8 data.tokenizer=bytes"),
        (Text(str(made), str(hf)), "data.tokenizer= tokenizer.json"),
        (Images(str(made), size=4), "set tokens images data=Text"),
        (Latents(str(made)), "set tokens latents data=Text"),
        (Text(str(images)), "images tokens data=Images"),
    ):
        with told(*words.split()):
            data.source("train", spec())
    with told("zoo-tokens", "new folder"):
        prepare(str(tmp_path / "in"), str(made), progress=False)
    for source, dest, kind, words in (
        (book, images, "text8", "zoo-images new folder"),
        (book, made, "text8", "other files"),
        (library, made, "chars", "'text8' 'chars'"),
        (made, tmp_path / "new", "text8", "SOURCE set"),
    ):
        with told(*words.split()):
            prepared(source, dest, kind)
    assert files(made) == before
    for content, kind, word in (("!", "text8", "letter"), ("", "chars", "empty")):
        book.write_text(content)
        with told("book.txt", word):
            prepared(book, tmp_path / "new", kind)
    assert not (tmp_path / "new").exists()
