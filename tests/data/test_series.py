"""Chirps and the user's recordings: values, windows, splits that share nothing, and what is said about bad files."""

from __future__ import annotations

import os

import jax
import numpy as np
import pytest
from mistakes import told

from zoo.data.pipeline import batches
from zoo.data.series import Chirps, Series
from zoo.errors import UserError


def stacked(source):
    return np.stack([source[i]["series"] for i in range(len(source))])


def labels(source):
    return [int(source[i]["label"]) for i in range(len(source))]


# Chirps


def test_a_chirp_is_a_function_of_seed_split_and_index():
    many, few = Chirps(train=1100).source("train"), Chirps(train=5).source("train")
    assert (len(many), many.labels) == (1100, ("4", "9", "14", "19"))
    assert labels(few) == [0, 1, 2, 3, 0]
    np.testing.assert_array_equal(stacked(few), stacked(many)[:5])
    example = many[1099]
    assert example["series"].shape == (256, 1)
    assert (example["series"].dtype, example["label"].dtype) == (np.float32, np.int32)
    for other in (Chirps(test=5).source("test"), Chirps(train=5, seed=1).source("train")):
        assert np.abs(stacked(other) - stacked(few)).mean((1, 2)).min() > 0.3
    with pytest.raises(IndexError):
        few[5]


def test_a_chirp_is_a_tone_that_rises_at_the_rate_of_its_class():
    source, t = Chirps(train=24, length=512).source("train"), np.arange(512) / 512
    low = np.linspace(2, 5, 61)[:, None]
    for i in range(24):
        s, rates = source[i]["series"][:, 0], (4, 9, 14, 19)
        best = []
        for rate in rates:  # the share of energy that the best tone of each rate explains
            wave = np.exp(-2j * np.pi * (low * t + rate * t**2 / 2))
            best.append(np.abs(wave @ s).max())
        assert int(np.argmax(best)) == source[i]["label"] == i % 4
        amplitude = 2 * max(best) / 512
        assert 0.6 < amplitude < 1.4
        assert abs((s**2).mean() - amplitude**2 / 2 - 0.09) < 0.06  # what is left is the noise


# .npz


def save(path, **arrays):
    np.savez(path, **arrays)
    return str(path)


def test_arrays_by_split_are_cut_into_windows(tmp_path):
    rng = np.random.default_rng(0)
    train, test = rng.normal(5, 3, (4, 11, 2)), rng.normal(5, 3, (2, 11, 2))
    splits = {"train_series": train, "train_labels": [0, 2, 1, 0], "test_series": test, "test_labels": np.uint8([1, 0])}
    path = save(tmp_path / "a.npz", **splits)
    plain = Series(path, length=4, hop=3, standardise=False)
    source = plain.source("train")
    assert (len(source), source.labels) == (12, ("0", "1", "2"))
    assert labels(source) == [0, 0, 0, 2, 2, 2, 1, 1, 1, 0, 0, 0]
    want = [train[i // 3, i % 3 * 3 : i % 3 * 3 + 4].astype(np.float32) for i in range(12)]
    np.testing.assert_array_equal(stacked(source), want)
    assert source[0]["series"].dtype == np.float32
    with pytest.raises(IndexError):
        source[12]
    mean, std = train.reshape(-1, 2).mean(0), train.reshape(-1, 2).std(0)
    for split, raw in (("train", train), ("test", test)):  # the test split by the numbers of the training split
        scaled = stacked(Series(path, length=11).source(split))
        np.testing.assert_allclose(scaled, (raw - mean) / std, rtol=1e-5, atol=1e-6)
    assert len(Series(path, length=5).source("train")) == 8  # windows side by side
    assert Series(path, length=11, classes=("a", "b", "c")).source("train").labels == ("a", "b", "c")
    unlabelled = Series(path, length=11, labels="").source("train")
    assert (set(unlabelled[0]), unlabelled.labels) == ({"series"}, ())
    with told("names 1 classes, but the labels go up to 2"):
        Series(path, length=11, classes=("a",)).source("train")


def test_a_share_of_the_series_is_held_out_whole(tmp_path):
    series = np.arange(20)[:, None] * 100 + np.arange(6)  # int, [N, T]
    path = save(tmp_path / "a.npz", all=series, y=np.arange(20) % 3)
    data = Series(path, length=3, series="all", labels="y", standardise=False, test_fraction=0.2)
    train, test = data.source("train"), data.source("test")
    owners = [{int(s) // 100 for s in stacked(source)[:, 0, 0]} for source in (train, test)]
    assert (len(train), len(test)) == (32, 8)
    assert owners[0] | owners[1] == set(range(20))
    assert not owners[0] & owners[1]
    for source in (train, test):
        assert labels(source) == [int(w[0, 0]) // 100 % 3 for w in stacked(source)]
    assert owners[1] == {int(s) // 100 for s in stacked(data.source("test"))[:, 0, 0]}
    with told("no window of data.length=3 time steps in its test split; ", "test_fraction"):
        Series(path, length=3, series="all", labels="", test_fraction=0).source("test")


def test_a_single_recording_gives_its_end_to_the_test_split(tmp_path):
    path = save(tmp_path / "a.npz", all=np.arange(100.0)[None])
    data = Series(path, length=8, hop=1, series="all", labels="", standardise=False, test_fraction=0.2)
    train, test = (stacked(data.source(split))[..., 0] for split in ("train", "test"))
    assert (train.min(), train.max(), test.min(), test.max()) == (0, 79, 80, 99)
    assert (len(train), len(test)) == (73, 13)
    # at least one window each; two to test on where there are four windows, however few time steps the share is
    for length, hop, share, counts in (
        (30, None, 0.01, [2, 1]),
        (30, None, 0.99, [1, 2]),
        (25, None, 0.01, [2, 2]),
        (25, 10, 0.01, [5, 2]),
        (40, 10, 0.01, [2, 2]),
        (48, 5, 0.01, [1, 1]),
    ):
        few = Series(path, length, hop, series="all", labels="", test_fraction=share)
        assert [len(few.source(split)) for split in ("train", "test")] == counts
    short = Series(path, length=51, series="all", labels="")
    assert len(short.source("train")) == 1
    with told("in its test split"):
        short.source("test")


def test_a_constant_channel_is_centred_and_large_offsets_keep_their_detail(tmp_path):
    t = np.arange(4000.0).reshape(2, 2000)
    series = np.stack([np.full_like(t, 0.1), 1.7e9 + np.sin(t)], -1)
    path = save(tmp_path / "a.npz", train_series=series, test_series=series + np.array([0.5, 0]))
    data = Series(path, length=2000, labels="")
    train = stacked(data.source("train"))
    assert (train[..., 0] == 0).all()
    np.testing.assert_allclose(stacked(data.source("test"))[..., 0], 0.5, atol=1e-6)
    want = np.sin(t)
    np.testing.assert_allclose(train[..., 1], (want - want.mean()) / want.std(), atol=1e-5)
    series = np.random.default_rng(0).normal(3, 2, (700, 2100, 1)).astype(np.float32)  # in pieces of 499 series
    series[600:] += 50
    data = Series(save(tmp_path / "b.npz", train_series=series), length=2100, labels="")
    got, want = data.source("train")[650]["series"], (series[650] - series.mean(dtype=float)) / series.std(dtype=float)
    np.testing.assert_allclose(got, want, rtol=1e-5)


def test_a_file_that_is_rewritten_is_read_again(tmp_path):
    data = Series(save(tmp_path / "a.npz", train_series=np.arange(12.0).reshape(3, 4)), length=4, labels="")
    first, known = data.source("train")[0]["series"], data.fingerprint("train")
    assert known == data.fingerprint("train") != data.fingerprint("test")
    save(tmp_path / "a.npz", train_series=np.arange(12.0).reshape(3, 4)[::-1])
    os.utime(tmp_path / "a.npz", ns=(1, 1))
    np.testing.assert_allclose(data.source("train")[2]["series"], first)
    assert data.fingerprint("train") != known


@pytest.mark.parametrize(
    "arrays, text",
    [
        ({"series": np.zeros((4, 3))}, r"4 series of 3 time steps, fewer than data\.length=4; set data\.length=3 or less"),
        ({"series": np.where(np.arange(40).reshape(4, 5, 2) == 25, np.nan, 0)}, r"'series' has nan in row 2 \(time step 2, channel 1\)"),
        ({"series": np.where(np.arange(20).reshape(4, 5) == 7, -np.inf, 0)}, r"'series' has -inf in row 1 \(time step 2, channel 0"),
        ({"series": np.full((1, 9), 1e300)}, r"'series' has 1e\+300 in row 0 .*float32"),
        ({"series": np.zeros(9)}, r"'series' is float64\[9\]; expected numbers \[N, T\]"),
        ({"series": np.zeros((4, 9), complex)}, "'series' is complex128"),
        ({"series": np.zeros((4, 9, 0))}, r"'series' is float64\[4, 9, 0\]"),
        ({"other": np.zeros((4, 9))}, r"has no array 'series', it has other; set data\.series"),
        ({"series": np.zeros((0, 9))}, "no window of .* in its train split"),
        ({"series": np.zeros((4, 9)), "labels": np.zeros((4, 9), int)}, r"int64\[4, 9\]; expected one integer per series: \[4\]"),
    ],
)  # fmt: skip
def test_bad_arrays_are_named(tmp_path, arrays, text):
    path = save(tmp_path / "a.npz", **arrays)
    with pytest.raises(UserError, match=text):
        Series(path, length=4, series="series", labels="labels" if "labels" in arrays else "").source("train")


def test_missing_labels_say_how_to_do_without_and_splits_have_the_same_channels(tmp_path):
    path = save(tmp_path / "a.npz", train_series=np.zeros((4, 9)))
    with told("'train_labels'", "(set data.labels='' for unlabelled series)"):
        Series(path, length=4).source("train")
    save(path, train_series=np.zeros((4, 9)), test_series=np.zeros((4, 9, 2)))
    with told("1 channels in its train split and 2 in its test split"):
        Series(path, length=4, labels="").source("test")


# CSV


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def rows(values, separator=","):
    return "".join(separator.join(f"{v:g}" for v in row) + "\n" for row in values)


VALUES = np.random.default_rng(3).normal(size=(12, 2)).round(3)


@pytest.mark.parametrize(
    "text, delimiter",
    [
        (rows(VALUES), ","),
        ("# made by hand\n# 1,2\n\nleft,right\n" + rows(VALUES[:5]) + "\n   \n" + rows(VALUES[5:]), ","),
        ("\ufeffleft;right\r\n" + rows(VALUES, " ; ").replace("\n", "\r\n"), ";"),
        ("µV\tµA\n".encode("latin-1") + rows(VALUES, "\t").encode(), "\\t"),
        (rows(VALUES, "\t"), "\t"),
        ("  " + rows(VALUES, "   "), " "),
        ('"a, b","c"\n' + "".join(f'"{x:g}","{y:g}"\n' for x, y in VALUES), ","),
    ],
    ids=["plain", "comments and gaps", "semicolons", "latin", "tabs", "blanks", "quotes"],
)
def test_a_csv_file_in_many_dialects(tmp_path, text, delimiter):
    path = write(tmp_path / "a.CSV", text)
    data = Series(str(path), length=2, delimiter=delimiter, standardise=False, test_fraction=1 / 3)
    np.testing.assert_array_equal(stacked(data.source("train")).reshape(-1, 2), VALUES[:8].astype(np.float32))
    np.testing.assert_array_equal(stacked(data.source("test")).reshape(-1, 2), VALUES[8:].astype(np.float32))
    assert data.source("test").labels == ()
    scaled = stacked(Series(str(path), length=2, delimiter=delimiter, test_fraction=1 / 3).source("test"))
    want = (VALUES[8:] - VALUES[:8].mean(0)) / VALUES[:8].std(0)  # nothing of the test split is in mean and deviation
    np.testing.assert_allclose(scaled.reshape(-1, 2), want, rtol=1e-4)


@pytest.mark.parametrize(
    "text, message",
    [
        ("a,b\n1,2\n\n3,nan\n5,6\n", "line 4, column 2: 'nan' is no number that float32 can hold"),
        ("1,2\n-inf,4\n", "line 2, column 1: '-inf' is no number that"),
        ("a,b\n1,2\n3,x\n", "line 3, column 2: 'x' is no number; write numbers"),
        ("a,b\n1,2\n3,\n", "line 3, column 2: '' is no number; write numbers"),
        ("0,1,2\n5,7,3\n9,2,8\n", "first row 0, 1, 2 may be the numbers of channels or a time step"),
        ("0\n0.5\n0.25\n", "first row 0 may be the numbers of channels or a time step; .* 0.0 where"),
        ("a,b\nc,d\n1,2\n", "line 2, column 1: 'c' is no number"),
        ("1,2\n3,4,5\n", "line 2 has 3 cells, but line 1 has 2"),
        ("a;b\n1,5;2,5\n", r"line 2, column 2: '5;2' is no number; set data\.delimiter=';'"),
        ("a\tb\n1\t2\n", r"set data\.delimiter='\\t'"),
        ("a b\n1 2\n", r"set data\.delimiter=' '"),
        ("", "holds no row of numbers"),
        ("a,b\n1,2\n".encode("utf-16"), "is UTF-16; write it again as UTF-8"),
    ],
)
def test_bad_csv_files_are_named_with_the_line(tmp_path, text, message):
    path = write(tmp_path / "a.csv", text)
    with pytest.raises(UserError, match=message) as error:
        Series(str(path), length=1).source("train")
    assert str(path) in str(error.value)


@pytest.mark.parametrize(
    ("head", "index", "words"),
    [("0,1,2", "", "numbers of channels"), ("1,3,9", "", "numbers of channels"), (",0,1,2", "n", "1 column is an index"),
     (",a,b,c", "n", "1 column is an index"), ("", "", ""), ("0.5,0.25,1.0", "", ""), ("0,0.1,0.2", "", "")],
)  # fmt: skip
def test_numbers_of_channels_and_indices_are_no_time_steps(tmp_path, caplog, head, index, words):
    values = np.random.default_rng(0).normal(size=(9, 3)).round(3)
    body = "".join((f"{i}," if index else "") + ",".join(map(str, row)) + "\n" for i, row in enumerate(values.tolist()))
    path = write(tmp_path / f"{len(head)}{index}.csv", f"{head}\n{body}" if head else body)
    found = Series(str(path), length=1, standardise=False, test_fraction=0.0).part("train").series[0]
    if "." in head:
        values = np.vstack([[float(x) for x in head.split(",")], values])
    np.testing.assert_array_equal(found, values)
    assert (words in caplog.text) if words else not caplog.text
    whole = np.arange(12).reshape(4, 3)  # integers that go on are data
    path = write(tmp_path / "whole.csv", "".join(",".join(map(str, row)) + "\n" for row in whole.tolist()))
    np.testing.assert_array_equal(
        Series(str(path), length=1, standardise=False, test_fraction=0.0).part("train").series[0], whole
    )


def test_a_folder_of_recordings_holds_out_whole_files(tmp_path):
    for i in range(10):
        write(tmp_path / "eeg" / f"{i}.csv", rows(np.full((7 + i, 1), i + 0.5) + np.arange(7 + i)[:, None] / 100))
    data = Series(str(tmp_path / "eeg"), length=3, hop=2, standardise=False, test_fraction=0.3)
    windows = {split: stacked(data.source(split))[..., 0] for split in ("train", "test")}
    owners = {split: set(w[:, 0].astype(int)) for split, w in windows.items()}
    assert owners["train"] | owners["test"] == set(range(10))
    assert len(owners["test"]) == 3
    assert len(owners["train"]) == 7
    for split, w in windows.items():
        assert len(w) == sum((7 + i - 3) // 2 + 1 for i in owners[split])
        assert (w.astype(int) == w[:, :1].astype(int)).all()  # no window spans two recordings
        np.testing.assert_allclose(np.diff(w), 0.01, atol=1e-6)


def test_folders_by_class_hold_out_some_of_every_class(tmp_path):
    for kind, count in (("rest", 5), ("move", 1), ("blink", 2)):
        for i in range(count):
            write(tmp_path / kind / f"{i}.csv", rows(np.arange(20.0)[:, None] + 100 * i))
    data = Series(str(tmp_path), length=4, standardise=False)
    train, test = data.source("train"), data.source("test")
    assert train.labels == test.labels == ("blink", "move", "rest")
    assert [labels(train).count(c) for c in range(3)] == [5, 3, 20]
    assert [labels(test).count(c) for c in range(3)] == [5, 2, 5]
    both = [(int(e["label"]), e["series"].tobytes()) for s in (train, test) for e in (s[i] for i in range(len(s)))]
    assert len(set(both)) == len(both) == 40  # nothing is in both splits
    end = [test[i]["series"][0, 0] for i in range(len(test)) if test[i]["label"] == 1]
    assert end == [12, 16]  # the only file of its class gives its end
    with told("data.classes names the labels of an .npz"):
        Series(str(tmp_path), length=4, classes=("a", "b", "c")).source("train")


def test_train_and_test_folders(tmp_path):
    for split, kind, level in (("train", "a", 2), ("train", "b", 4), ("val", "b", 6)):
        write(tmp_path / split / kind / "x.tsv", rows(level + np.array([[-1.0], [1], [-1], [1]])))
    data = Series(str(tmp_path), length=2)
    assert [len(data.source(s)) for s in ("train", "test")] == [4, 2]
    assert labels(data.source("test")) == [1, 1]
    np.testing.assert_allclose(data.source("test")[0]["series"][:, 0], (np.array([5, 7]) - 3) / np.sqrt(2), rtol=1e-6)
    known = data.fingerprint("train"), data.fingerprint("test")
    assert known == (data.fingerprint("train"), data.fingerprint("test"))
    assert known[0] != known[1]
    assert known[0] != Series(str(tmp_path), length=2, hop=1).fingerprint("train")
    write(tmp_path / "val" / "b" / "x.tsv", rows(np.zeros((4, 2))))
    assert data.fingerprint("test") != known[1]
    with told("1 channels in its train split and 2 in its test split"):
        data.source("test")


def test_places_that_are_wrong(tmp_path):
    a, b = write(tmp_path / "some" / "a.csv", "1,2\n3,4\n"), write(tmp_path / "some" / "b.csv", "1\n2\n3\n")
    some = str(tmp_path / "some")
    with told(f"{b} has 1 columns, but {a} has 2"):
        Series(some, length=1).source("train")
    b.write_text("1,2\n")
    with told(f"{b} has 1 time steps, fewer than data.length=2; set data.length=1 or less"):
        Series(some, length=2).source("train")
    with told("somme does not exist; did you mean"):
        Series(some[:-1] + "me", length=1).source("train")
    (tmp_path / "empty").mkdir()
    with told("holds no recordings; expected recording files (.csv, .tsv)"):
        Series(str(tmp_path / "empty"), length=1).source("train")
    np.save(tmp_path / "a.npy", np.zeros((2, 9)))
    with told("data.path=", "a.npy is no kind of series that is known; give an .npz file"):
        Series(str(tmp_path / "a.npy"), length=1).source("train")
    for delimiter in ("::", "1"):
        with told(f"data.delimiter='{delimiter}' separates no numbers"):
            Series(str(a), length=1, delimiter=delimiter).source("train")


def test_series_that_do_not_fit_the_task_say_what_to_set(tmp_path):
    spec = {"series": jax.ShapeDtypeStruct((2, 128, 2), np.float32)}
    text = "'series': the data gives float32[256, 1], the task wants float32[128, 2]; "
    with told(text + "set task.channels=1, and task.length=256 (or data.length=128)"):
        next(batches(Chirps(train=4), 2, spec=spec))
    path = save(tmp_path / "a.npz", all=np.arange(300.0).reshape(2, 75, 2))
    data = Series(path, length=64, series="all", labels="")
    with told("set task.length=64 (or data.length=128)"):
        next(batches(data, 1, spec=spec))
    with told("set task.channels=1"):
        next(batches(Chirps(train=4, length=128), 2, spec=spec))
    fits = {"series": jax.ShapeDtypeStruct((2, 64, 2), np.float32)}
    assert next(batches(data, 2, spec=fits))["series"].shape == (2, 64, 2)
