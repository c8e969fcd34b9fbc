"""What the files of tests cost, and what they may: seconds of processor time, at the speed of a reference program of the same run."""

import gc
import time
from collections import Counter
from pathlib import Path

PAPERS = sorted(
    (p.stem for p in (Path(__file__).parent.parent / "zoo" / "papers").iterdir() if p.stem[0] != "_"),
    key=len,
    reverse=True,
)
# For all files of a paper; for the contract, which grows with the papers; for all the others. With a cold cache of compiled
# programs, which doubles what a warm one costs, the slowest paper costs 37, the contract 7 a paper, the house 240.
LIMITS = {"contract": 10.0 * len(PAPERS), "house": 360.0}
PAPER = 60.0
REFERENCE = 0.045  # seconds of `reference` where these limits were set


def reference() -> float:
    """Seconds of processor time of a program that makes many small objects, as compilers do; the garbage of others is left alone."""
    gc.disable()
    begin = time.process_time()
    for _ in range(4):
        sorted({str(i): [i] for i in range(40_000)})
    used = time.process_time() - begin
    gc.enable()
    return used


def part(file: str) -> str:
    """The paper that a file of tests is named after, "contract" or "house"."""
    name = Path(file).stem.removeprefix("test_")
    if name in ("contract", "configs"):
        return "contract"
    return next((paper for paper in PAPERS if name == paper or name.startswith(f"{paper}_")), "house")


def report(files: dict[str, float], speed: float) -> tuple[list[str], list[str]]:
    """(lines that say what each part costs and which files are the slowest, one line for each part above its limit).

    Args:
        files: seconds by file.
        speed: seconds of `reference` in the same run.
    """
    scaled = Counter({file: seconds * REFERENCE / speed for file, seconds in files.items()})
    parts: Counter[str] = Counter()
    for file, seconds in scaled.items():
        parts[part(file)] += seconds
    lines = [f"{seconds:6.0f} s  {name}" for name, seconds in parts.most_common()]
    lines += [f"{seconds:6.0f} s  {file}" for file, seconds in scaled.most_common(10)]
    over = []
    for name, seconds in parts.items():
        limit = LIMITS.get(name, PAPER)
        if seconds > limit:
            own = Counter({file: s for file, s in scaled.items() if part(file) == name}).most_common(5)
            slowest = ", ".join(f"{file} {s:.0f}" for file, s in own)
            over.append(f"the tests of {name} cost {seconds:.0f} s of at most {limit:.0f}; the slowest: {slowest}")
    return lines, over
