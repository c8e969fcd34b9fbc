"""TypeScore's metric against golden values and plain tables; alignments, error types, intervals."""

from __future__ import annotations

import itertools
import math
import random
import unicodedata

import numpy as np
import pytest
from mistakes import told

from zoo.papers.typescore import metric
from zoo.papers.typescore.metric import Normalisation, Parts, align, error_type, interval, parts, typescore


def test_golden_values() -> None:
    for reference, read, ned, nlcs, sw, average in (
        ("open daily", "open daily", 1.0, 1.0, 1.0, 1.0),
        ("open daily", "open dally", 0.9, 0.9, 0.85, 0.8833),
        ("open daily", "daily open", 0.0, 0.5, 0.5, 0.3333),
        ("open daily", "please open daily thanks", 0.4167, 0.4167, 1.0, 0.6111),
        ("open daily", "open", 0.4, 0.4, 0.4, 0.4),
        ("jazz night", "jazz jazz night", 0.6667, 0.6667, 1.0, 0.7778),
        ("open daily", "", 0.0, 0.0, 0.0, 0.0),
        ("", "", 1.0, 1.0, 1.0, 1.0),
        ("", "open", 0.0, 0.0, 0.0, 0.0),
    ):
        found = parts(reference, read)
        assert found == pytest.approx((ned, nlcs, sw), abs=5e-5)
        assert typescore(found) == pytest.approx(100 * average, abs=5e-3)
    assert typescore(Parts(0.5, 0.25, 1.0), weights=(2, 0, 2)) == pytest.approx(75)
    # weights that no float holds leave the range by rounding
    assert all(typescore(Parts(1, 1, 1), weights=(w, 0.1, 0.7)) <= 100 for w in np.linspace(0, 1, 50))
    with told("weights=", "(1, 1, 1)"):
        typescore(Parts(1, 1, 1), weights=(0, 0, 0))


def naive(r: str, h: str) -> tuple[int, int, int]:
    """Edit distance, longest common subsequence and best local score from the three tables of the definitions."""
    edit = [[i + j for j in range(len(h) + 1)] for i in range(len(r) + 1)]
    lcs = [[0] * (len(h) + 1) for _ in range(len(r) + 1)]
    local = [[0] * (len(h) + 1) for _ in range(len(r) + 1)]
    for i, j in itertools.product(range(1, len(r) + 1), range(1, len(h) + 1)):
        equal = r[i - 1] == h[j - 1]
        edit[i][j] = min(edit[i - 1][j - 1] + (not equal), edit[i - 1][j] + 1, edit[i][j - 1] + 1)
        lcs[i][j] = lcs[i - 1][j - 1] + 1 if equal else max(lcs[i - 1][j], lcs[i][j - 1])
        local[i][j] = max(0, local[i - 1][j - 1] + (2 if equal else -1), local[i - 1][j] - 1, local[i][j - 1] - 1)
    return edit[-1][-1], lcs[-1][-1], max(map(max, local))


def test_parts_and_alignments_are_those_of_the_plain_tables() -> None:
    """Of unrelated texts, and of texts with their corruptions, of all lengths from 0."""
    rng = random.Random(0)
    pairs = [("", ""), ("", "ab"), ("ab", ""), ("a" * 130, "ba" * 64), ("😀" * 65, "😀" * 64 + "x"), ("x", "😀" * 129)]
    for alphabet in ("ab", "abcdefgh ", "aä漢字 ", "x😀𝔘\U0010ffff", "e\u0301\u200d\ud800\x00\xff") * 30:
        left, right = ("".join(rng.choices(alphabet, k=rng.randint(0, 40))) for _ in range(2))
        changed = "".join(rng.choice(("", c, c, c, c, c + right[:2], rng.choice(alphabet))) for c in left)
        pairs.append((left, rng.choice((right, changed, changed))))
    for r, h in pairs:
        edit, lcs, local = naive(r, h)
        longer = max(len(r), len(h)) or 1
        wanted = (1 - edit / longer, lcs / longer, local / max(2 * len(r), 1)) if r or h else (1, 1, 1)
        assert parts(r, h) == pytest.approx(wanted, abs=1e-12)
        found = align(r, h)
        assert ("".join(left for _, left, _ in found), "".join(right for _, _, right in found)) == (r, h)
        assert sum(max(len(left), len(right)) for op, left, right in found if op != "equal") == edit
        for op, left, right in found:
            assert {
                "equal": left == right != "",
                "replace": len(left) == len(right) > 0 and all(a != b for a, b in zip(left, right)),
                "delete": bool(left) and not right,
                "insert": bool(right) and not left,
            }[op]


@pytest.mark.parametrize(
    "text, wanted, options",
    [
        ("  Open\tDAILY\n", "open daily", {}),
        ("open\u00a0\u3000\u2028daily", "open daily", {}),
        ("ＯＰＥＮ　９", "open 9", {}),
        ("“It’s” — ‘now’", "\"it's\" - 'now'", {}),
        ("don´t", "don't", {}),  # NFKC alone makes a space and an accent of it
        ("5″ x 3′", "5\" x 3'", {}),
        ("a‑b﹘c−d", "a-b-c-d", {}),
        ("Straße ﬁne cafe\u0301 ½…", "strasse fine café 1⁄2...", {}),
        ("  Open “DAILY” ", 'Open "DAILY"', {"case_sensitive": True}),
        ("Don’t stop — 50% off, $5!", "dont stop 50 off $5", {"ignore_punct": True}),
        ("e.\u0301", "é", {"ignore_punct": True}),
    ],
)
def test_normalisation(text: str, wanted: str, options: dict[str, bool]) -> None:
    assert Normalisation(**options)(text) == wanted


@pytest.mark.parametrize("rule", [Normalisation(*options) for options in itertools.product((False, True), repeat=2)])
def test_normalising_twice_changes_nothing(rule: Normalisation) -> None:
    rng = random.Random(7)
    odd = [chr(c) for c in range(0x3400) if unicodedata.category(chr(c)) != "Cn"] + list("ﬀﷺ︱﹘＇𝔘😀\ud800")
    for text in [c + "a" for c in odd] + ["".join(rng.choices(odd, k=8)) for _ in range(300)]:
        once = rule(text)
        assert rule(once) == once, ascii(text)


@pytest.mark.parametrize(
    "reference, read, kind",
    [
        ("open daily", "open daily", "none"),
        ("open daily", "open dally", "spelling"),
        ("open daily", "open da", "spelling"),  # exactly 70 % are there
        ("open daily", "oqen", "spelling"),  # short, and wrong as well
        ("open daily", "open daily ab", "surplus"),
        ("abcdefgh", "abcdefghxy", "spelling"),  # SW - NED = 0.2 and no more
        ("bbcdbabcccccaab", "xxyxzbbcxbabcccccaab", "spelling"),  # 0.9 - 0.7, more than 0.2 in floating point
        ("the ferry leaves at noon from pier nine", "the ferry at noon pier", "missing"),
        ("the ferry leaves at noon from pier nine", "thq fexry leives ad noon frxm piar nime", "spelling"),
        ("", "open", "surplus"),
    ],
)
def test_error_types(reference: str, read: str, kind: str) -> None:
    assert error_type(reference, read) == kind


def test_the_mean_is_over_instructions() -> None:
    records = [{"id": "b", "score": 100.0}, *({"id": "a", "score": 0.0} for _ in range(4))]
    assert metric.by_instruction(records) == {"a": 0, "b": 100}
    assert metric.mean_of(metric.by_instruction(records))["score"] == 50
    assert metric.mean_of({}) == {"score": None, "low": None, "high": None}
    assert metric.mean_of({"a": 50.0}) == {"score": 50, "low": 50, "high": 50}  # one instruction: no width


def test_intervals_are_those_of_a_plain_bootstrap() -> None:
    values = np.random.default_rng(0).normal(70, 10, 40)

    def mean(pick: np.ndarray) -> float:
        return float(values[pick].mean())

    rng = np.random.default_rng(7)
    drawn = [mean(rng.integers(40, size=40)) for _ in range(500)]
    assert interval(mean, 40, 500, 7) == pytest.approx(np.quantile(drawn, [0.025, 0.975]))
    assert interval(mean, 40, 500, 7) == interval(mean, 40, 500, 7) != interval(mean, 40, 500, 8)
    low, high = interval(mean, 40, 500, 7)
    assert high - low == pytest.approx(2 * 1.96 * 10 / 40**0.5, rel=0.25)
    some = interval(lambda pick: math.nan if 0 in pick else mean(pick), 40, 500, 7)  # undefined ones are left out
    assert all(map(math.isfinite, some))
    assert math.isnan(interval(lambda pick: math.nan, 40, 9, 7)[0])
