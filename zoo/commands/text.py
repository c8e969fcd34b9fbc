"""Texts as samples: the vocabulary of a model, what is to be rewritten, files and what the terminal shows of them."""

from __future__ import annotations

import difflib
import logging
import os
import re
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import numpy as np

from zoo import paths
from zoo.data.text.vocabulary import UNKNOWN, Vocabulary
from zoo.errors import UserError
from zoo.models import Model
from zoo.paths import Folder
from zoo.train.report import printable, save_text, spelled

_log = logging.getLogger("zoo")
SHOWN = 8  # texts that are printed at most, and drawn where nothing says how many
HOLE = "_"  # in a given text, one token that is to be filled in
_MARKED = 0.5  # share of a pass that must have stayed for the rest to be marked


def files(vocabulary: Vocabulary) -> dict[str, bytes]:
    """The files that a vocabulary is kept in, by name."""
    with tempfile.TemporaryDirectory(prefix="zoo-") as folder:
        vocabulary.save(Path(folder))
        return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def rewritten(
    model: Model, vocabulary: Vocabulary | None, texts: Sequence[str] | None, n: int
) -> tuple[dict[str, np.ndarray] | None, list[str] | None]:
    """`tokens` [n, T] of the texts that samples shall be made from, and the texts; sample i has text i modulo their number.

    For a model that fills holes in, `_` is one, and what is missing of a text at its end are more: tokens of -1.

    Raises:
        UserError: the model has no vocabulary, does not know a character, a text is shorter than its texts are, or of a model that
            fills holes in longer, or the vocabulary has `_` for a symbol.
    """
    if texts is None:
        return None, None
    if vocabulary is None:
        raise UserError(
            f"{model.folder} has no vocabulary.json, so that no text can be given to it; copy it there from the folder of the "
            "run, with the tokenizer's own file where there is one"
        )
    length, holes, rows = model.task.spec(1)["tokens"].shape[1], model.task.about.holes, []
    for i, text in enumerate(texts):
        name = "prompt=" if len(texts) == 1 else f"text {i + 1} of prompts="
        if holes and HOLE in text and not len(vocabulary.foreign(HOLE)):
            raise UserError(
                f"{name} has {HOLE}, which marks a token to fill in, and {vocabulary} has it for a symbol; leave it out, or give "
                "ids with -1 in its place: zoo.load(RUN).sample(1, conditions={'tokens': ids})"
            )
        pieces = _pieces(vocabulary, text) if holes else [vocabulary.normalise(text)]
        plain = HOLE.join(pieces)
        if plain != text:
            _log.info("%s is read as %s", name, plain if len(plain) <= 60 else f"{plain[:60]} ...")
        parts = [vocabulary.encode(piece, name) for piece in pieces]
        ids = np.concatenate([x for part in parts for x in (np.full(1, -1, np.int32), part)][1:])
        if holes and len(ids) > length:
            raise UserError(
                f"{name} has {len(ids)} tokens, and this model fills in texts of {length}; take {len(ids) - length} out"
            )
        if holes:
            ids = np.pad(ids, (0, length - len(ids)), constant_values=-1)
        if len(ids) < length:
            raise UserError(
                f"{name} has {len(ids)} tokens, and this model rewrites texts of {length}; give {length - len(ids)} more"
            )
        if len(ids) > length:
            _log.info("%s has %d tokens; the first %d are rewritten", name, len(ids), length)
        rows.append(ids[:length])
    turn = np.arange(n) % len(rows)
    shown = [
        vocabulary.decode(row).replace(UNKNOWN, HOLE) if (row < 0).any() else vocabulary.decode(row) for row in rows
    ]
    return {"tokens": np.stack(rows)[turn]}, [shown[i] for i in turn.tolist()]


def _pieces(vocabulary: Vocabulary, text: str) -> list[str]:
    """What stands between the holes of a text, normalised; blanks beside a hole stay."""
    pieces, found = text.split(HOLE), []
    for i, piece in enumerate(pieces):
        before, behind = int(i > 0), int(i < len(pieces) - 1)
        plain = vocabulary.normalise(
            "x" * before + piece + "x" * behind
        )  # letters, which the rule of text8 leaves alone
        found.append(plain[before : len(plain) - behind])
    return found


# --- files and the terminal -----------------------------------------------------------------------


@dataclass(frozen=True)
class Texts:
    """Samples that are texts, as `zoo.commands.draw.Form` has them: `000000.txt` ..., and `000000.passes.txt` on demand."""

    vocabulary: Vocabulary | None  # None: numbers are written
    starts: Sequence[str] | None = None  # what each is made from

    key = "tokens"
    suffix = ".txt"

    def save(self, out: Folder, i: int, drawn: Mapping[str, np.ndarray], about: Mapping[str, str]) -> None:
        """Write sample i; its passes first, so that where the text is all is there."""
        if "passes" in drawn:
            save_text(out / f"{i:06d}.passes.txt", told_passes(drawn["passes"], self.vocabulary))
        save_text(out / f"{i:06d}.txt", spelled(drawn["tokens"], self.vocabulary))

    def show(self, out: Folder, n: int) -> str:
        """Print the first texts, with their passes where these were kept; where the rest is."""
        there = set(paths.names(out))
        for i in range(min(n, SHOWN)):
            name = f"{i:06d}.passes.txt" if f"{i:06d}.passes.txt" in there else f"{i:06d}.txt"
            with paths.sentence(out / name):
                text = printable((out / name).read_bytes().decode("utf-8", "replace").removesuffix("\n"))
            start = "" if self.starts is None else f", made from: {printable(self.starts[i])}"
            print(f"--- {name}{start}\n{_coloured(text) if name.endswith('.passes.txt') else text}")
        if n > SHOWN:
            print(f"--- and {n - SHOWN} more")
        return "000000.txt" if n == 1 else f"000000.txt to {n - 1:06d}.txt"


def told_passes(passes: np.ndarray, vocabulary: Vocabulary | None) -> str:
    """The passes [L + 1, T] of a text under each other, with what each has changed.

    Marks are those of wdiff, `[-old-]{+new+}`, of characters where these are the tokens and of words elsewhere; where less
    than half has stayed nothing is marked.
    """
    texts, count = [spelled(ids, vocabulary) for ids in passes], passes.shape[1]
    parts = [f"pass 0 of {len(texts) - 1}: noise\n{texts[0]}"]
    aligned = {len(text) for text in texts} == {count}  # a token is a character
    for k in range(1, len(texts)):
        changed = int((passes[k] != passes[k - 1]).sum())
        told = marked(texts[k - 1], texts[k], aligned)
        parts.append(f"pass {k} of {len(texts) - 1}: {changed} of {count} tokens changed\n{told}")
    return "\n\n".join(parts)


def marked(before: str, after: str, aligned: bool = False) -> str:
    """`after` with what differs from `before` marked; as it is where less than half of it has stayed.

    Args:
        aligned: characters are compared place by place, not words in their order.
    """
    if aligned:
        old, new = list(before), list(after)
        runs = [(same, list(pairs)) for same, pairs in groupby(zip(old, new), lambda pair: pair[0] == pair[1])]
        edits = [(same, "".join(a for a, _ in pairs), "".join(b for _, b in pairs)) for same, pairs in runs]
        stayed = sum(len(come) for same, _, come in edits if same)
    else:  # a word with the blanks before it
        old, new = (re.findall(r"\s*\S+|\s+", text) for text in (before, after))
        match = difflib.SequenceMatcher(None, old, new, autojunk=False)
        edits = [(tag == "equal", "".join(old[a:b]), "".join(new[c:d])) for tag, a, b, c, d in match.get_opcodes()]
        stayed = sum(block.size for block in match.get_matching_blocks())
    if stayed < _MARKED * len(new):
        return after
    out = []
    for same, gone, come in edits:
        if same:
            out.append(come)
            continue
        if not aligned:  # blanks stay outside
            whole = come or gone
            out.append(whole[: len(whole) - len(whole.lstrip())])
            gone, come = gone.strip(), come.strip()
        out.append((f"[-{gone}-]" if gone else "") + (f"{{+{come}+}}" if come else ""))
    return "".join(out)


def _coloured(text: str) -> str:
    """Marks as colours, on a terminal that has them."""
    if not sys.stdout.isatty() or "NO_COLOR" in os.environ:
        return text
    text = re.sub(r"\[-(.*?)-\]", "\x1b[9;31m\\1\x1b[0m", text, flags=re.DOTALL)
    return re.sub(r"\{\+(.*?)\+\}", "\x1b[32m\\1\x1b[0m", text, flags=re.DOTALL)
