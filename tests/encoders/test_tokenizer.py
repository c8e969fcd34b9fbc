"""Captions to ids, with a small model trained on the spot."""

import logging
import sys

import numpy as np
import pytest
from mistakes import told

from zoo.encoders.tokenizer import Tokenizer
from zoo.errors import UserError

sentencepiece = pytest.importorskip("sentencepiece")

COLOURS, THINGS, PLACES = ("red green blue small", "cat dog house tree", "table grass roof river")


def model(path, pad=0, end=1):
    sentences = [
        f"a photo of a {a} {b} on the {c}" for a in COLOURS.split() for b in THINGS.split() for c in PLACES.split()
    ]
    with path.open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(sentences),
            model_writer=file,
            vocab_size=60,
            hard_vocab_limit=False,
            pad_id=pad,
            eos_id=end,
            unk_id=2,
            bos_id=-1,
            minloglevel=2,
        )
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("encoder")
    model(path / "spiece.model")
    return path


@pytest.fixture
def own(folder):
    return sentencepiece.SentencePieceProcessor(model_file=str(folder / "spiece.model"))


@pytest.fixture
def warned(caplog):
    caplog.set_level(logging.WARNING, "zoo")
    return caplog


def test_rows_end_in_one_and_are_filled_with_zeros(folder, own, warned):
    captions = ["a red cat", "", "a photo of a small dog on the roof"]
    tokenizer = Tokenizer(folder)
    ids, lost = tokenizer(captions, 40)
    assert ids.shape == (3, 40)
    assert ids.dtype == np.int32
    for row, caption in zip(ids, captions):
        pieces = own.encode(caption)
        np.testing.assert_array_equal(row, [*pieces, 1, *[0] * (39 - len(pieces))])
    assert lost == [0, 0, 0]
    assert not warned.records
    assert len(tokenizer) == own.get_piece_size()


def test_long_captions_lose_their_end_and_say_so(folder, own, warned):
    caption = "a photo of a red cat on the table"
    pieces = own.encode(caption)
    first = len(own.encode("a photo of a red"))  # words are whole pieces or more, so that the rest begins with "cat"
    ids, lost = Tokenizer(folder / "spiece.model")(["a cat", caption], first + 1, names=["a/0.jpg", "a/1.jpg"])
    np.testing.assert_array_equal(ids[1], [*pieces[:first], 1])
    assert lost == [0, len(pieces) - first]
    (record,) = warned.records
    assert record.name == "zoo"
    message = record.getMessage()
    assert message.startswith("caption of a/1.jpg has ")
    assert "lost from 'cat on the table' on" in message
    assert repr(caption) in message


def test_a_caption_that_just_fits_is_whole(folder, own, warned):
    caption = "a red cat on the roof"
    pieces = own.encode(caption)
    ids, lost = Tokenizer(folder)([caption], len(pieces) + 1)
    np.testing.assert_array_equal(ids, [[*pieces, 1]])
    assert lost == [0]
    assert not warned.records
    ids, lost = Tokenizer(folder)([caption], len(pieces))
    np.testing.assert_array_equal(ids, [[*pieces[:-1], 1]])
    assert lost == [1]
    assert len(warned.records) == 1


def test_a_missing_file_says_where_it_belongs(tmp_path):
    for path in (tmp_path, tmp_path / "spiece.model"):
        with pytest.raises(
            UserError, match=r"spiece\.model is missing.*published text encoder.*put spiece\.model there"
        ):
            Tokenizer(path)


def test_a_missing_package_says_what_to_install(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    with pytest.raises(UserError, match=r'pip install -e "\.\[text\]"'):
        Tokenizer(folder)


def test_other_files_are_refused(tmp_path):
    (tmp_path / "spiece.model").write_text("no model")
    with told("no sentencepiece model"):
        Tokenizer(tmp_path)
    (tmp_path / "other").mkdir()
    model(tmp_path / "other" / "spiece.model", pad=1, end=0)
    with pytest.raises(UserError, match="no model of T5: padding is 1 and the end of a caption 0"):
        Tokenizer(tmp_path / "other")
