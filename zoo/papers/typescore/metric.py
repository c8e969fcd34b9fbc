"""How well one text matches another: the pinned metric, and what is told from it.

All functions compare texts as they are given, by Unicode code points: `Normalisation` comes first, and a score is worth
nothing without the normalisation and the reader that it was made with. Distances are RapidFuzz's, intervals scipy's.
"""

from __future__ import annotations

import math
import unicodedata
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np

from zoo.errors import UserError

SPEC_VERSION = "1"  # of everything that changes a score: compare no two that differ in it
ErrorType: TypeAlias = Literal["none", "spelling", "missing", "surplus"]

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
    """The parts of one pair: what was asked for, and what was read."""
    from rapidfuzz.distance import LCSseq, Levenshtein

    longer = max(len(reference), len(read))
    if not longer:
        return Parts(1.0, 1.0, 1.0)
    edits, common = Levenshtein.distance(reference, read), LCSseq.similarity(reference, read)
    return Parts(1 - edits / longer, common / longer, local(reference, read) / max(2 * len(reference), 1))


def local(a: str, b: str) -> int:
    """H, the best local score of two texts (see `Parts`), row by row.

    A gap along the row costs 1 a character, so H_j = max over k <= j of (H_k - (j - k)): a running maximum of H_k + k.
    """
    codes, place = np.array([ord(c) for c in b]), np.arange(len(b) + 1)
    row, best = np.zeros(len(b) + 1, dtype=np.int64), 0
    for c in a:
        new = np.maximum(row - 1, 0)
        new[1:] = np.maximum(new[1:], row[:-1] + np.where(codes == ord(c), 2, -1))
        row = np.maximum.accumulate(new + place) - place
        best = max(best, int(row.max()))
    return best


def typescore(parts: Parts, weights: Sequence[float] = (1, 1, 1)) -> float:
    """The weighted mean of NED, NLCS and SW in 0..100. UserError for weights that make none."""
    if not math.isfinite(sum(weights)) or sum(weights) <= 0:
        raise UserError(f"weights={tuple(weights)} must not all be 0; give numbers such as (1, 1, 1)")
    score = 100 * float(np.dot(parts, weights)) / sum(weights)
    return min(max(score, 0.0), 100.0)  # rounding may leave the range


def align(reference: str, read: str) -> list[tuple[str, str, str]]:
    """The stretches that make `read` of `reference` by the fewest edits, in order: what is done, and both sides' text.

    It is "equal", "replace", "insert" (the reference has "") or "delete" (what was read has "").
    """
    from rapidfuzz.distance import Levenshtein

    return [
        (op.tag, reference[op.src_start : op.src_end], read[op.dest_start : op.dest_end])
        for op in Levenshtein.opcodes(reference, read)
    ]


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
        right = sum(len(same) for op, same, _ in align(reference, read) if op == "equal")
        if 20 * right >= 19 * len(read):
            return "missing"
    return "spelling"


def by_instruction(records: Iterable[Mapping[str, Any]], key: str = "score") -> dict[str, float]:
    """The mean over the pictures of each instruction of a number of their records, by the instructions' ids in order."""
    found: dict[str, list[float]] = {}
    for record in records:
        found.setdefault(record["id"], []).append(float(record[key]))
    return {name: float(np.mean(found[name])) for name in sorted(found)}


def mean_of(scores: Mapping[str, float], resamples: int = 1000, seed: int = 0) -> dict[str, float | None]:
    """The mean over instructions with its interval, in points; None where there are no scores."""
    if not scores:
        return {"score": None, "low": None, "high": None}
    values = np.array(list(scores.values()))
    low, high = interval(lambda pick: float(values[pick].mean()), len(values), resamples, seed)
    return {"score": round(float(values.mean()), 4), "low": round(low, 4), "high": round(high, 4)}


def interval(value: Callable[[np.ndarray], float], n: int, resamples: int, seed: int) -> tuple[float, float]:
    """The 95 % interval, by percentiles, of a value over resamples of n things, given as indices [n].

    Resamples of which the value is not finite are left out; NaN where all are. One thing has an interval of no width.
    """
    from scipy import stats

    if n < 2:
        return value(np.arange(n)), value(np.arange(n))
    with warnings.catch_warnings(), np.errstate(invalid="ignore"):
        warnings.simplefilter("ignore")  # scipy's on what is undefined or constant; percentiles are taken below
        made = stats.bootstrap(
            (np.arange(n),), value, n_resamples=resamples, vectorized=False, method="percentile", rng=seed
        )
    drawn = made.bootstrap_distribution[np.isfinite(made.bootstrap_distribution)]
    low, high = np.quantile(drawn, [0.025, 0.975]) if drawn.size else (math.nan, math.nan)
    return float(low), float(high)


def rank_agreement(kind: Literal["spearmanr", "kendalltau"], x: Any, y: Any) -> float:
    """scipy's rank correlation of two columns [N]; NaN where one is constant."""
    from scipy import stats

    return float(getattr(stats, kind)(x, y).statistic) if len(set(x)) > 1 < len(set(y)) else math.nan
