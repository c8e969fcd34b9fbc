"""How well one text matches another: the pinned metric, and what is told from it.

All functions compare texts as they are given, by Unicode code points: `Normalisation` comes first, and a score is worth
nothing without the normalisation and the reader that it was made with.
"""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Literal, NamedTuple, TypeAlias, get_args, overload

import numpy as np

from zoo.errors import UserError, suggest

SPEC_VERSION = "1"  # of everything that changes a score: compare no two that differ in it
Kind: TypeAlias = Literal["similarity", "dissimilarity"]
ErrorType: TypeAlias = Literal["none", "spelling", "missing", "surplus"]
Op: TypeAlias = Literal["equal", "replace", "delete", "insert"]

_CELLS = 1 << 17  # of a diagonal, over the pairs swept at once: fewer pay for calls and more for memory (measured)

# Normalisation

_SINGLE = "`´‘’‚‛′‵‹›ʼ"
_DOUBLE = "“”„‟«»″‶〝〞〟"
_DASHES = "‐‑‒–—―−⁃"
_UNIFIED = str.maketrans({**dict.fromkeys(_SINGLE, "'"), **dict.fromkeys(_DOUBLE, '"'), **dict.fromkeys(_DASHES, "-")})


def _plain(text: str) -> str:
    # before NFKC, which splits the double prime and the acute accent; and after it, as it makes more dashes
    return unicodedata.normalize("NFKC", text.translate(_UNIFIED)).translate(_UNIFIED)


@dataclass(frozen=True)
class Normalisation:
    """A text as it is compared: NFKC, one kind of quotes and dashes, single spaces, none at the ends.

    Case is folded unless `case_sensitive`, since capitals are legitimate styling. `ignore_punct` drops punctuation
    (Unicode's categories P, so `%`, `&` and `@` too). Applying it twice changes nothing.
    """

    case_sensitive: bool = False
    ignore_punct: bool = False

    def __call__(self, text: str) -> str:
        text = _plain(text)
        if not self.case_sensitive:
            text = _plain(unicodedata.normalize("NFD", text).casefold())
        if self.ignore_punct:
            text = _plain("".join(c for c in text if not unicodedata.category(c).startswith("P")))
        return " ".join(text.split())


# The three parts


class Parts(NamedTuple):
    """Three similarities in [0, 1]: by edits, longest common subsequence, best local alignment (Smith-Waterman).

    NED = 1 - Lev(r, h) / max(|r|, |h|), NLCS = LCS(r, h) / max(|r|, |h|), SW = H / 2|r|, where H is the best score of a
    stretch of r against one of h with 2 for a match and -1 for a mismatch or a gap of one character. Two empty texts:
    all 1. One empty text: all 0.
    """

    ned: float
    nlcs: float
    sw: float


def parts(reference: str, read: str) -> Parts:
    """The parts of one pair: what was asked for, and what was read. Some milliseconds; `batch` is for many."""
    return Parts(*(float(part) for part in _similarities([reference], [read])[0]))


def batch(references: Sequence[str], reads: Sequence[str]) -> np.ndarray:
    """float32 [N, 3], the `Parts` of N pairs: tens of thousands of pairs of a line a second on one core.

    UserError where there are not as many of the ones as of the others.
    """
    if isinstance(references, str) or isinstance(reads, str):
        raise UserError("references and reads are sequences of texts here; `parts` compares two texts")
    if len(references) != len(reads):
        raise UserError(
            f"{len(references)} references and {len(reads)} reads make no pairs; give one read for each reference"
        )
    return _similarities(references, reads).astype(np.float32)


def _similarities(references: Sequence[str], reads: Sequence[str]) -> np.ndarray:
    wanted, found = (np.array([len(text) for text in texts], dtype=np.int64) for texts in (references, reads))
    edits, common, local = _tables(references, reads)
    longer = np.maximum(wanted, found)
    both_empty = longer == 0
    longer = np.maximum(longer, 1)
    out = np.stack([1 - edits / longer, common / longer, local / np.maximum(2 * wanted, 1)], axis=1)
    out[both_empty] = 1.0
    return out


def _tables(lefts: Sequence[str], rights: Sequence[str]) -> np.ndarray:
    """int64 [3, N]: edit distances, lengths of longest common subsequences, best local scores. Symmetric in the
    texts."""
    pairs = [(a, b) if len(a) >= len(b) else (b, a) for a, b in zip(lefts, rights, strict=True)]
    lengths = np.array([(len(a), len(b)) for a, b in pairs], dtype=np.int64).reshape(-1, 2)
    out = np.zeros((3, len(pairs)), dtype=np.int64)
    order = np.lexsort((lengths[:, 1], lengths[:, 0] // 16))[
        ::-1
    ]  # pairs of like lengths are swept together, the longest first
    start = 0
    while start < len(order):
        count = max(1, _CELLS // (int(lengths[order[start], 0]) + 1))
        some = order[start : start + count]
        out[:, some] = _sweep([pairs[i] for i in some], lengths[some])
        start += count
    return out


def _sweep(pairs: list[tuple[str, str]], lengths: np.ndarray) -> np.ndarray:
    """`_tables` of pairs (longer text first), by anti-diagonals of the three tables and over all pairs at once.

    The cells (i, j) with i + j = d need only those with d - 1 and d - 2, so a diagonal is a handful of whole-array
    operations and no gap has to be carried along a row. A diagonal lies in an array [i, N]. What fills up shorter texts
    equals nothing: it cannot raise a local score, and the corner of a pair's own tables comes before it.
    """
    rows, columns = (int(n) for n in lengths.max(axis=0))
    a, b = _codes(pairs, lengths)
    b = b[::-1]  # so that the b_j of a diagonal lie in the order of its a_i
    kind = np.min_scalar_type(2 * rows + 2)  # unsigned, and one byte per cell up to 126 characters
    shape = (rows + 1, len(pairs))
    edit, edit1, edit2 = (np.zeros(shape, kind) for _ in range(3))  # of d, d - 1, d - 2
    lcs, lcs1, lcs2 = (np.zeros(shape, kind) for _ in range(3))
    local, local1, local2 = (np.zeros(shape, kind) for _ in range(3))
    best = np.zeros(shape, kind)
    same, spare = np.zeros(shape, bool), np.zeros(shape, kind)
    ends = lengths.sum(axis=1)
    out = np.zeros((3, len(pairs)), dtype=np.int64)
    for d in range(1, rows + columns + 1):
        low, high = max(1, d - columns), min(rows, d - 1) + 1
        here, above = slice(low, high), slice(low - 1, high - 1)  # i and i - 1
        if low < high:
            equal = np.equal(a[above], b[columns - d + low : columns - d + high], out=same[here])
            one, now = equal.view(np.uint8), spare[here]

            new = np.minimum(edit1[above], edit1[here], out=edit[here])
            new += 1
            np.add(edit2[above], np.logical_not(equal, out=now), out=now)
            np.minimum(new, now, out=new)

            new = np.add(lcs2[above], one, out=lcs[here])
            np.maximum(new, lcs1[above], out=new)
            np.maximum(new, lcs1[here], out=new)

            # max(0, H2 + (2 if equal else -1), H1 - 1, H1 - 1) = max(1, H2 + 3 equal, H1, H1) - 1: never below 0
            new = np.multiply(one, kind.type(3), out=local[here])
            new += local2[above]
            np.maximum(new, local1[above], out=new)
            np.maximum(new, local1[here], out=new)
            np.maximum(new, 1, out=new)
            new -= 1
            np.maximum(best[here], new, out=best[here])
        if d <= columns:
            edit[0] = d
        if d <= rows:
            edit[d] = d
        done = np.flatnonzero(ends == d)
        if done.size:
            corner = lengths[done, 0]
            out[0, done], out[1, done] = edit[corner, done], lcs[corner, done]
        edit, edit1, edit2 = edit2, edit, edit1
        lcs, lcs1, lcs2 = lcs2, lcs, lcs1
        local, local1, local2 = local2, local, local1
    out[2] = best.max(axis=0)
    return out


def _codes(pairs: list[tuple[str, str]], lengths: np.ndarray) -> Iterator[np.ndarray]:
    """Code points [longest, N] of the first and of the second texts, filled up with two numbers that are in neither."""
    # halves of characters come out of JSON, and count as characters
    flat = [np.frombuffer("".join(texts).encode("utf-32-le", "surrogatepass"), "<u4") for texts in zip(*pairs)]
    top = max(int(codes.max(initial=0)) for codes in flat)
    kind = np.min_scalar_type(top + 2)
    for side, codes in enumerate(flat):
        longest = int(lengths[:, side].max())
        table = np.full((len(pairs), longest), top + 1 + side, kind)
        table[np.arange(longest) < lengths[:, side, None]] = codes
        yield np.ascontiguousarray(table.T)


@overload
def typescore(parts: Parts, weights: Sequence[float] = ..., kind: Kind = ...) -> float: ...
@overload
def typescore(parts: np.ndarray, weights: Sequence[float] = ..., kind: Kind = ...) -> np.ndarray: ...
def typescore(
    parts: Parts | np.ndarray, weights: Sequence[float] = (1, 1, 1), kind: Kind = "similarity"
) -> float | np.ndarray:
    """The weighted mean of NED, NLCS and SW in 0..100: a float of `Parts`, [N] of what `batch` gives.

    `weights` are in the order of `Parts`. "dissimilarity" is 100 less the similarity. UserError for weights or a kind
    that make no score.
    """
    if len(weights) != 3 or not all(math.isfinite(w) and w >= 0 for w in weights) or sum(weights) == 0:
        raise UserError(
            f"weights={tuple(weights)} must be three numbers of at least 0 for NED, NLCS and SW, not all 0, such as (1, 1, 1)"
        )
    if kind not in get_args(Kind):
        raise UserError(f"kind={kind!r} is unknown; {suggest(str(kind), get_args(Kind))}")
    score = 100 * (np.asarray(parts, dtype=np.float64) @ np.asarray(weights, dtype=np.float64)) / sum(weights)
    score = np.clip(score if kind == "similarity" else 100 - score, 0, 100)  # rounding may leave the range
    return float(score) if score.ndim == 0 else score


# Telling errors apart


class Segment(NamedTuple):
    """A stretch of an alignment: `reference` is "" of an "insert", `read` of a "delete"; of a "replace" both are
    equally long."""

    op: Op
    reference: str
    read: str


def align(reference: str, read: str) -> list[Segment]:
    """The segments that make `read` of `reference` by the fewest edits; joined, each side gives its text.

    No two neighbours have one op. Equal beginnings and ends stay whole. Memory is |reference| |read| / 4 bytes.
    """
    limit = min(len(reference), len(read))
    head = next((i for i in range(limit) if reference[i] != read[i]), limit)
    tail = next((i for i in range(limit - head) if reference[-1 - i] != read[-1 - i]), limit - head)
    middle = _path(reference[head : len(reference) - tail], read[head : len(read) - tail])
    start, end = reference[:head], reference[len(reference) - tail :]
    steps: list[Segment] = [Segment("equal", start, start), *middle, Segment("equal", end, end)]
    merged = []
    for op, group in groupby((step for step in steps if step.reference or step.read), key=lambda step: step.op):
        left, right = zip(*((step.reference, step.read) for step in group))
        merged.append(Segment(op, "".join(left), "".join(right)))
    return merged


def _path(a: str, b: str) -> list[Segment]:
    """An alignment by single characters.

    Columns of the table of edit distances are whole numbers (Myers 1999, in Hyyrö's form of 2001): bit i of `rise` says
    that the distance grows by one from row i to i + 1, of `fall` that it shrinks; `step` says that it has grown since
    the column before.
    """
    full = (1 << len(a)) - 1
    where: dict[str, int] = {}
    for i, c in enumerate(a):
        where[c] = where.get(c, 0) | 1 << i
    rise, fall = full, 0
    rises, steps = [], []
    for c in b:
        equal = where.get(c, 0)
        vertical = equal | fall
        horizontal = ((((equal & rise) + rise) ^ rise) | equal) & full
        step = fall | (full & ~(horizontal | rise))
        back = horizontal & rise
        steps.append(step)
        step = (step << 1) | 1  # the first row grows by one with each column
        rise = ((back << 1) | ~(vertical | step)) & full
        fall = step & vertical & full
        rises.append(rise)
    i, j = len(a), len(b)
    path: list[Segment] = []
    while i or j:
        if i and j and a[i - 1] == b[j - 1]:
            op: Op = "equal"
        elif not j or (i and rises[j - 1] >> (i - 1) & 1):
            op = "delete"
        elif not i or steps[j - 1] >> (i - 1) & 1:
            op = "insert"
        else:
            op = "replace"
        left, right = op != "insert", op != "delete"
        path.append(Segment(op, a[i - 1] if left else "", b[j - 1] if right else ""))
        i, j = i - left, j - right
    return path[::-1]


def error_type(reference: str, read: str) -> ErrorType:
    """The main kind of error of one pair, by the pinned rule.

    "surplus" where SW - NED > 0.2; else "missing" where fewer than 70 % of the characters were read and 95 % of these
    are right; else "spelling". Equal texts: "none". Text where none was asked for: "surplus".
    """
    if reference == read:
        return "none"
    if not reference:
        return "surplus"
    ned, _, sw = parts(reference, read)
    if sw - ned > 0.2 + 1e-9:  # 0.9 - 0.7 is above 0.2 in floating point
        return "surplus"
    if 10 * len(read) < 7 * len(reference):
        right = sum(len(segment.read) for segment in align(reference, read) if segment.op == "equal")
        if 20 * right >= 19 * len(read):
            return "missing"
    return "spelling"


def assign(pieces: Sequence[str], reads: Sequence[str]) -> list[str]:
    """Lines that were read in the order of the pieces that were asked for, whatever their order in the image.

    The result has one text for each of `pieces` ("" where nothing fits), then the lines that fit none: joined by spaces
    without the empty ones, it is what to compare with the joined pieces. First each piece gets at most one line, such
    that the local scores (see `Parts`) have the greatest sum. Then, line by line, a piece takes a further one where
    that raises its score: pieces may be wrapped.
    """
    from scipy.optimize import linear_sum_assignment

    lines = [line for line in reads if line]
    if not pieces or not lines:
        return ["" for _ in pieces] + lines
    fit = _tables([piece for piece in pieces for _ in lines], lines * len(pieces))[2].reshape(len(pieces), len(lines))
    taken: list[list[int]] = [[] for _ in pieces]
    best = np.zeros(len(pieces), dtype=np.int64)
    for piece, line in zip(*linear_sum_assignment(fit, maximize=True)):
        if fit[piece, line]:
            taken[piece].append(line)
            best[piece] = fit[piece, line]
    free = sorted(set(range(len(lines))) - {line for group in taken for line in group})
    surplus = []
    for line in free:
        tried = [sorted([*group, line]) for group in taken]
        gain = _tables(pieces, [" ".join(lines[i] for i in group) for group in tried])[2] - best
        piece = int(gain.argmax())
        if gain[piece] > 0:
            taken[piece] = tried[piece]
            best[piece] += gain[piece]
        else:
            surplus.append(lines[line])
    return [" ".join(lines[i] for i in group) for group in taken] + surplus


# Over an instruction set


def mean(scores: Mapping[str, Sequence[float]]) -> float:
    """A model's score from those of its images: over the images of each instruction first, then over instructions."""
    return float(_by_instruction(scores).mean())


def bootstrap(
    scores: Mapping[str, Sequence[float]], resamples: int = 1000, seed: int = 0, level: float = 0.95
) -> tuple[float, float]:
    """The interval (low, high) of `mean` by percentiles over resampled instructions, `level` of the resamples within.

    The same scores and seed give the same interval, in whatever order the instructions come. Differences of two models
    by instruction give a paired interval. UserError where there are no scores or one is not finite.
    """
    if resamples < 1:
        raise UserError(f"resamples={resamples} must be at least 1, such as 1000")
    if not 0 < level < 1:
        raise UserError(f"level={level} must lie between 0 and 1, such as 0.95")
    values = _by_instruction(scores)
    return interval(lambda pick: float(values[pick].mean()), len(values), resamples, seed, level)


def interval(
    value: Callable[[np.ndarray], float], n: int, resamples: int, seed: int, level: float = 0.95
) -> tuple[float, float]:
    """Percentiles of a value over resamples of n things, given as indices [n]; NaN where it is never finite."""
    rng = np.random.default_rng(seed)
    drawn = np.array([value(rng.integers(n, size=n)) for _ in range(resamples)])
    drawn = drawn[np.isfinite(drawn)]
    if not drawn.size:
        return math.nan, math.nan
    low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _by_instruction(scores: Mapping[str, Sequence[float]]) -> np.ndarray:
    if not scores:
        raise UserError("there are no scores to average: no image was read; see the errors of the records")
    for name, values in scores.items():
        if not len(values) or not np.isfinite(values).all():
            raise UserError(
                f"scores of instruction {name!r} are {list(values)}; leave out failed images, and instructions without images"
            )
    return np.array([np.mean(scores[name]) for name in sorted(scores)])
