"""`zoo prepare` twice at once, and killed at any moment (slow): the set is what a calm one makes, byte for byte."""

from __future__ import annotations

import time

import numpy as np
import pytest
from forks import ended, started
from test_latents import Fake, encode
from test_prepare import photo, run
from texts import files

from zoo.data.text.prepare import prepare_text


@pytest.fixture(params=["images", "text", "latents"])
def long(request, tmp_path):
    """What writes a set to a folder, for half a second; and waits drawn within the time of a calm run, and its files."""
    command, rng = commands(request.param, tmp_path), np.random.default_rng(0)
    began = time.perf_counter()
    command(tmp_path / "calm")
    span = time.perf_counter() - began
    return command, lambda: time.sleep(span * rng.random()), files(tmp_path / "calm")


def commands(kind, tmp_path):
    origin = tmp_path / "origin"
    if kind != "text":
        for i in range(300):
            (origin / str(i % 3)).mkdir(parents=True, exist_ok=True)
            photo(i, 64).save(origin / str(i % 3) / f"{i}.png")
        if kind == "images":
            return lambda dest: run(origin, dest, size=32, shard_examples=40)
        return lambda dest: encode(origin, dest, Fake(text=False), size=32, shard_examples=40)
    origin.mkdir()
    rng = np.random.default_rng(0)
    for i in range(4):
        (origin / f"{i}.txt").write_text(" ".join(map(str, rng.integers(0, 10**6, 200_000))))
    return lambda dest: prepare_text(str(origin), str(dest), "bytes", keep=100_000, progress=False)


@pytest.mark.slow
def test_two_writers_of_one_destination_leave_what_one_does(long, tmp_path):
    command, wait, whole = long
    refused = 0
    for i in range(20):
        dest = tmp_path / f"set{i}"
        first = started(lambda dest=dest: command(dest))
        wait()
        second = started(lambda dest=dest: command(dest))
        said = [ended(*first), ended(*second)]
        assert "done" in said
        assert all(one == "done" or "in use by another process" in one for one in said)
        assert files(dest) == whole
        refused += said != ["done", "done"]
    assert refused > 5


@pytest.mark.slow
def test_a_set_killed_at_any_moment_ends_as_if_it_had_not_been(long, tmp_path):
    command, wait, whole = long
    killed = 0
    for i in range(20):
        process, there = started(lambda i=i: command(tmp_path / f"set{i}"))
        wait()
        process.kill()
        killed += ended(process, there) is None
        command(tmp_path / f"set{i}")
        assert files(tmp_path / f"set{i}") == whole
    assert killed > 5
