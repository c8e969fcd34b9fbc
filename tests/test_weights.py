"""Laws of zoo.weights: layouts, exports, published checkpoints, filling, StableHLO."""

import hashlib
import json
import os
import pickle
import sys
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from mistakes import Payload, told

from zoo import weights
from zoo.errors import UserError
from zoo.papers.tarflow_lm import DiscreteLM
from zoo.task import About, Name, Network
from zoo.weights import export

CONFIG = {"task": {"class": "zoo.papers.fake.Fake", "width": 3}, "noise": 0.05, "labels": ["nought", "naïve"]}


@dataclass(frozen=True)
class Fake:
    """A stack of layers between an embedding and a held buffer; `scan` chooses the layout of the stack."""

    depth: int = 3
    width: int = 4
    scan: bool = True
    about = About(buffers=("prior",))

    def init(self, rng: jax.Array) -> dict[str, Any]:
        def layer(key: jax.Array) -> dict[str, Any]:
            kernel = jax.random.normal(key, (self.width, 3, 2, self.width // 2))
            return {"qkv": {"kernel": kernel, "bias": jax.random.normal(key, (3, 2, self.width // 2))}}

        keys = jax.random.split(rng, self.depth)
        trunk = {"block": jax.vmap(layer)(keys)} if self.scan else {f"layer{i}": layer(k) for i, k in enumerate(keys)}
        embed = nn.LogicallyPartitioned(jax.random.normal(rng, (5, self.width)), (None, "embed"))
        return {
            "net": {"trunk": trunk, "embed": embed},
            "prior": {"var": jnp.ones(2), "count": jnp.zeros((), jnp.int32)},
        }

    def import_names(self) -> list[Name]:
        split = "(three h k) w -> w three h k"
        sizes = {"three": 3, "h": 2}
        qkv = "net/trunk/block/qkv"
        return [
            Name("class_embed", "net/embed", "n 1 w -> n w"),
            Name("var", "prior/var"),
            Name("count", "prior/count"),
            Name("mask", None, value=lambda: np.tril(np.ones((2, 2), np.float32))),
            *(Name(f"{i}.qkv.weight", f"{qkv}/kernel", split, sizes, layer=i) for i in range(self.depth)),
            *(Name(f"{i}.qkv.bias", f"{qkv}/bias", "(three h k) -> three h k", sizes, i) for i in range(self.depth)),
        ]


def fresh(seed: int = 0, **fields: Any) -> Any:
    """Random parameters of a Fake (drawn by numpy: jax would compile for each shape)."""
    rng = np.random.default_rng(seed)
    shapes = weights.abstract(Fake(**fields))
    return jax.tree.map(lambda x: jnp.asarray(rng.standard_normal(x.shape), x.dtype), shapes)


def official(seed: int = 0, depth: int = 3, width: int = 4) -> dict[str, np.ndarray]:
    """A random checkpoint in the published layout."""
    rng = np.random.default_rng(seed)
    state = {"class_embed": (5, 1, width), "var": (2,)}
    state |= {f"{i}.qkv.weight": (3 * width, width) for i in range(depth)}
    state |= {f"{i}.qkv.bias": (3 * width,) for i in range(depth)}
    arrays = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in state.items()}
    return arrays | {"mask": np.tril(np.ones((2, 2), np.float32)), "count": np.asarray(7, np.int32)}


def same(a: Any, b: Any) -> None:
    """Equal structure, dtype, shape and bits."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        x, y = np.asarray(x), np.asarray(y)
        assert (x.dtype, x.shape, x.tobytes()) == (y.dtype, y.shape, y.tobytes())


# layouts


def test_flatten_and_back():
    tree = {"b": {"c": 1, "a": {"x": 2}}, "a": 3}
    assert weights.flatten(tree) == {"a": 3, "b/a/x": 2, "b/c": 1}
    assert weights.unflatten(weights.flatten(tree)) == tree
    with pytest.raises(ValueError, match="'x/y'"):
        weights.flatten({"x/y": 1})


@pytest.mark.parametrize("convert", [lambda x: x, np.asarray], ids=["jax", "numpy"])
def test_unrolled_and_stacked_are_the_same_to_the_bit(convert):
    unrolled = jax.tree.map(convert, fresh(scan=False, depth=11))
    bias = weights.flatten(weights.stacked(unrolled))["net/trunk/block/qkv/bias"]
    assert bias.shape == (11, 3, 2, 2)
    np.testing.assert_array_equal(bias[10], unrolled["net"]["trunk"]["layer10"]["qkv"]["bias"])
    same(weights.matching(weights.stacked(unrolled), unrolled), unrolled)
    same(weights.matching(unrolled, weights.stacked(unrolled)), weights.stacked(unrolled))
    same(weights.stacked(weights.stacked(unrolled)), weights.stacked(unrolled))
    assert isinstance(jax.tree.leaves(weights.stacked(unrolled))[0], type(jax.tree.leaves(unrolled)[0]))


def test_optimiser_states_convert_like_their_parameters():
    def kernels(params: Any) -> Any:
        return jax.tree_util.tree_map_with_path(lambda path, _: "kernel" in jax.tree_util.keystr(path), params)

    unrolled = {"net": fresh(scan=False)["net"], "head": {"w": jnp.ones(3)}}
    optimizer = optax.partition(
        {"net": optax.adamw(1e-3, mask=kernels), "head": optax.sgd(0.1, momentum=0.9)}, {"net": "net", "head": "head"}
    )

    @jax.jit
    def step(params: Any) -> Any:
        updates, state = optimizer.update(jax.tree.map(jnp.sin, params), optimizer.init(params), params)
        return optax.apply_updates(params, updates), state, None, [params]

    small, large = step(unrolled), step(weights.stacked(unrolled))
    assert jax.tree.structure(large) != jax.tree.structure(small)
    same(weights.stacked(small), large)
    same(weights.matching(large, small), small)
    same(weights.matching(small, large), large)


def test_layouts_nest_and_other_keys_stay():
    inner = lambda i: {"layer0": np.full(2, i), "layer1": np.full(2, -i), "norm": np.full((), i)}  # noqa: E731
    tree = {"t": {"layer0": {"trunk": inner(1)}, "layer1": {"trunk": inner(2)}, "out": np.zeros(1)}}
    flat = weights.flatten(weights.stacked(tree))
    assert {name: x.shape for name, x in flat.items()} == {
        "t/block/trunk/block": (2, 2, 2), "t/block/trunk/norm": (2,), "t/out": (1,)
    }  # fmt: skip
    same(weights.matching(weights.unflatten(flat), tree), tree)
    same(weights.matching(tree, weights.unflatten(flat)), weights.unflatten(flat))
    # unequal layers and gaps are no stack
    for tree in ({"layer0": np.zeros(2), "layer1": np.zeros(3)}, {"layer1": np.zeros(2), "layer2": np.zeros(2)}):
        same(weights.stacked(tree), tree)
        same(weights.matching(tree, tree), tree)


def test_matching_names_what_differs():
    params = fresh()
    with told("trunk/block", "3 layers", "2"):
        weights.matching(params, fresh(scan=False, depth=2))
    with told("missing (1): prior/var", "unexpected (1): net/new", "wrong shape (1): prior/count"):
        weights.matching({"net": {**params["net"], "new": jnp.zeros(1)}, "prior": {"count": jnp.zeros(3)}}, params)


# exports


def test_export_round_trip_to_the_bit(tmp_path):
    unrolled = fresh(scan=False)
    unrolled["half"] = jnp.linspace(-3, 3, 7).astype(jnp.bfloat16)
    unrolled["turned"] = np.arange(6.0).reshape(2, 3).T  # not contiguous
    weights.save(tmp_path / "new" / "out", unrolled, CONFIG, "# card")
    params, config = weights.load(tmp_path / "new" / "out")
    assert config == CONFIG
    same(params, jax.device_get(weights.stacked(unrolled)))
    same(weights.matching(params, unrolled), unrolled)
    about = {"task": "zoo.papers.tarflow.TarFlow", "metrics": {"bpd": 2.2034567}, "parameters": 407328, "steps": 2600}
    text = weights.card(**about, paper="TarFlow (arXiv:2412.06329)", data="digits, 1,500 scans", kind="raw")
    for fact in ("# TarFlow", "arXiv:2412.06329", "1,500 scans", "2,600", "2.20346", "407,328", "raw", "No licence"):
        assert fact in text
    assert sorted(os.listdir(tmp_path / "new")) == ["out"]
    modes = {path.stat().st_mode & 0o777 for path in (tmp_path / "new" / "out").iterdir()}
    assert len(modes) == 1, "the weights are as readable as the config"


def test_equal_weights_make_equal_files_and_the_card_names_the_sum(tmp_path):
    for name in ("a", "b"):
        weights.save(tmp_path / name, fresh(), CONFIG, "# card")
    for file in ("model.safetensors", "config.json", "README.md"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    whole = hashlib.sha256((tmp_path / "a" / "model.safetensors").read_bytes()).hexdigest()
    assert whole in (tmp_path / "a" / "README.md").read_text()


def test_save_replaces_an_export_and_nothing_else(tmp_path):
    out = tmp_path / "out"
    weights.save(out, fresh(0), CONFIG, "old")
    weights.save(out, fresh(1), {"x": 1}, "new")
    same(weights.load(out)[0], jax.device_get(fresh(1)))
    (out / "thesis.tex").write_text("dear")
    (run := tmp_path / "run").mkdir()
    (run / "config.json").write_text("{}")
    for place, word in (
        (out, "thesis.tex"),
        (run, "no model.safetensors"),
        (run / "config.json", "is a file"),
        (run / "config.json" / "below", "cannot write"),
    ):
        with told(str(place), word):
            weights.save(place, fresh(2), CONFIG, "")
    assert weights.load(out)[1] == {"x": 1}
    assert sorted(os.listdir(tmp_path)) == ["out", "run"]


def test_a_failed_save_leaves_the_earlier_export(tmp_path, monkeypatch):
    weights.save(tmp_path / "out", fresh(0), CONFIG, "")

    def fail(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(export, "save_file", fail)
    with told("(No space left on device)"):
        weights.save(tmp_path / "out", fresh(1), CONFIG, "")
    monkeypatch.undo()
    assert os.listdir(tmp_path) == ["out"]
    same(weights.load(tmp_path / "out")[0], jax.device_get(fresh(0)))


@pytest.mark.parametrize("file", ["model.safetensors", "config.json"])
def test_every_flipped_byte_is_detected_and_the_file_named(tmp_path, file):
    params = {"a": {"w": jnp.arange(4.0)}, "h": jnp.ones((2, 2), jnp.bfloat16)}
    weights.save(tmp_path, params, CONFIG, "")
    want = weights.load(tmp_path)
    whole = (tmp_path / file).read_bytes()
    refused, silent = [], 0
    for place in range(len(whole)):
        for bits in (0x0F, 0xFF):  # 0x0F turns the dtype F32 into I32
            broken = bytearray(whole)
            broken[place] ^= bits
            (tmp_path / file).write_bytes(broken)
            try:
                params, config = weights.load(tmp_path)
            except UserError as error:
                refused.append(str(error))
                continue
            same(params, want[0])  # a flip in white space may pass when nothing came of it
            assert config == want[1]
            silent += 1
    assert all(file in said for said in refused)
    assert silent < 0.1 * len(whole)


def test_truncated_missing_and_foreign_exports_are_refused(tmp_path):
    with told("nowhere", "no model.safetensors"):
        weights.load(tmp_path / "nowhere")
    weights.save(tmp_path / "out", fresh(), CONFIG, "")
    path = tmp_path / "out" / "model.safetensors"
    whole = path.read_bytes()
    for length in (0, 4, 100, len(whole) - 1):
        path.write_bytes(whole[:length])
        with told("not a whole"):
            weights.load(tmp_path / "out")
    weights.write_state_dict(path, {"w": np.zeros(2)})
    with told("`zoo export`"):
        weights.load(tmp_path / "out")


# published checkpoints


def test_official_round_trip_is_exact():
    for scan in (True, False):
        task, state = Fake(scan=scan), official()
        params = weights.from_official(task, state)
        same(jax.tree.map(jnp.shape, params), jax.tree.map(jnp.shape, fresh(scan=scan)))
        kernel = weights.stacked(params)["net"]["trunk"]["block"]["qkv"]["kernel"]
        assert kernel[2, 1, 0, 1, 0] == state["2.qkv.weight"][2, 1]  # [layer, w, q, head, k] is row (q h k), column w
        back = weights.to_official(task, params)
        assert back.keys() == state.keys()
        for name, array in state.items():
            same(back[name], array)
        del state["mask"]
        same(weights.from_official(task, state), params)


def test_official_takes_torch_tensors_and_any_float():
    torch = pytest.importorskip("torch")
    state = official()
    half = {name: torch.tensor(x).bfloat16() if x.dtype.kind == "f" else torch.tensor(x) for name, x in state.items()}
    params = weights.from_official(Fake(), half)
    same(params, weights.from_official(Fake(), {n: x.float().double().numpy() for n, x in half.items()}))
    assert params["net"]["embed"].dtype == jnp.float32


def test_official_lists_every_mismatch():
    state = official(depth=9)
    state["extra"], state["class_embed"] = np.zeros(1), np.zeros((6, 1, 4))
    del state["var"], state["0.qkv.bias"]
    with told(
        "missing (2): var, 0.qkv.bias",
        "unexpected (13): 3.qkv.bias, 3.qkv.weight, 4.qkv.bias, 4.qkv.weight, 5.qkv.bias, and 8 more",
        "wrong shape (1): class_embed is 6x1x4 (expected 5x1x4)",
    ):
        weights.from_official(Fake(depth=3), state)


def test_official_wants_a_complete_table():
    class Partial(Fake):
        def import_names(self) -> list[Name]:
            return [name for name in super().import_names() if name.source not in ("count", "1.qkv.bias")]

    state = {name: x for name, x in official().items() if name not in ("count", "1.qkv.bias")}
    with told("(2): net/trunk/block/qkv/bias, prior/count"):
        weights.from_official(Partial(), state)
    with told("DiscreteLM knows no published layout", "zoo export"):
        weights.from_official(DiscreteLM(vocab=3, length=4, width=8, depth=1, head_dim=8), state)


@pytest.mark.parametrize("suffix", [".safetensors", ".npz", ".pth"])
def test_state_dict_files_round_trip(tmp_path, suffix):
    if suffix == ".pth":
        pytest.importorskip("torch")
    state = official() | {"half": np.asarray(jnp.linspace(-1, 1, 5, dtype=jnp.bfloat16))}
    path = tmp_path / "deep" / f"model{suffix}"
    weights.write_state_dict(path, {f"module._orig_mod.{name}": x for name, x in state.items()})
    read = weights.read_state_dict(path)
    assert read.keys() == state.keys()
    half = read.pop("half")
    np.testing.assert_array_equal(half.astype(np.float32), state.pop("half").astype(np.float32))
    same({n: read[n] for n in sorted(read)}, {n: state[n] for n in sorted(state)})
    assert os.listdir(path.parent) == [path.name]
    weights.write_state_dict(path, {"module.a": np.zeros(1), "b": np.ones(1)})
    assert set(weights.read_state_dict(path)) == {"module.a", "b"}  # prefixes go where all names carry them
    path.write_bytes(path.read_bytes()[:-40])
    with told(path.name):
        weights.read_state_dict(path)


def test_nested_torch_checkpoints_are_unwrapped(tmp_path):
    torch = pytest.importorskip("torch")
    path = tmp_path / "a.pth"
    tensor = torch.nn.Parameter(torch.linspace(0, 1, 3).bfloat16())
    torch.save({"epoch": 3, "model": {"state_dict": {"w": tensor}, "step": 4}, "optimizer": {"lr": 0.1}}, path)
    read = weights.read_state_dict(path)
    assert list(read) == ["w"]
    np.testing.assert_array_equal(read["w"], tensor.detach().float().numpy())
    torch.save({"model": torch.zeros(2)}, path)
    assert list(weights.read_state_dict(path)) == ["model"]
    for held, word in (({"w": torch.zeros(2), "epoch": 3}, "epoch"), ([torch.zeros(2)], "list")):
        torch.save(held, path)
        with told(word):
            weights.read_state_dict(path)


def test_weights_beside_their_average_are_told_apart(tmp_path, monkeypatch, caplog):
    raw, average = ({"a.w": np.full(2, x, np.float32), "b": np.full((), x, np.float32)} for x in (1, 2))
    pre = {f"module._orig_mod.{k}": v for k, v in raw.items()}
    files = {
        "nested": {"model": pre, "ema": average, "optimizer": {"lr": 0.1}, "step": 3},
        "timm": {"state_dict": raw, "state_dict_ema": average, "epoch": 3},
        "deep": {"model": {"state_dict": raw}, "model_ema": {"state_dict": average}},
        "flat": {f"online_model.{k}": v for k, v in raw.items()}
        | {f"ema_model.{k}": v for k, v in average.items()}
        | {"step": np.array(3)},
        "only": {"ema": average, "step": 3},
        "swa": {"n_averaged": np.array(7), **{f"module.{k}": v for k, v in raw.items()}},
        "plain": raw,
    }  # fmt: skip
    monkeypatch.setattr("zoo.weights.official._read_torch", lambda path: files[path.stem])
    for name in files:
        (tmp_path / f"{name}.pth").write_bytes(b"")

    def read(name, which=None):
        return {k: float(v.max()) for k, v in weights.read_state_dict(tmp_path / f"{name}.pth", which).items()}

    for name in ("nested", "timm", "deep", "flat"):
        assert read(name) == read(name, "raw") == {"a.w": 1, "b": 1}
        assert f"{name}.pth: the weights" in caplog.text
        assert read(name, "ema") == {"a.w": 2, "b": 2}
    assert "--weights ema" in caplog.text
    assert read("only", "ema") == {"a.w": 2, "b": 2}
    assert read("swa") == read("plain") == {"a.w": 1, "b": 1}
    for name, which, words in (
        ("only", None, "--weights ema"),
        ("only", "raw", "no raw"),
        ("plain", "ema", "no average"),
    ):
        with told(words):
            read(name, which)
    (tmp_path / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    with told("Git LFS pointer", "git lfs pull"):
        weights.read_state_dict(tmp_path / "model.safetensors")


@pytest.mark.parametrize("name", ["zip.pth", "plain.pth", "array.npz", "plain.safetensors"])
def test_a_malicious_pickle_is_refused_and_does_not_run(tmp_path, name):
    mark, path = tmp_path / "ran", tmp_path / name
    payload = {"w": Payload(mark)}
    if path.suffix == ".pth":
        pytest.importorskip("torch")
    if name == "zip.pth":
        sys.modules["torch"].save(payload, path)
    elif name == "array.npz":
        np.savez(path, w=np.array([payload["w"]], object))
    else:
        path.write_bytes(pickle.dumps(payload, protocol=2))
    with told(name, *([f"asks for code to run ({os.name}.mkdir) and is refused"] if name == "zip.pth" else [])):
        weights.read_state_dict(path)
    assert not mark.exists()
    pickle.loads(pickle.dumps(payload))
    assert mark.exists(), "the payload would have worked"


def test_unreadable_state_dicts_end_in_a_sentence(tmp_path, monkeypatch):
    for name in ("a.txt", "b", "c.npz", "d.pth"):
        (tmp_path / name).write_bytes(b"hello")
    np.savez(tmp_path / "words.npz", w=np.zeros(1), names=np.array(["a"]))
    for name, word in (
        ("a.txt", ".npz"),
        ("b", "'nothing'"),
        ("c.npz", "plain"),
        ("words.npz", "names"),
        ("no.pth", ""),
    ):
        with told(name, word):
            weights.read_state_dict(tmp_path / name)
    with told("cannot write", "b.npz"):
        weights.write_state_dict(tmp_path / "a.txt" / "b.npz", {"w": np.zeros(2)})
    monkeypatch.setitem(sys.modules, "torch", None)
    with told("`torch`"):
        weights.read_state_dict(tmp_path / "d.pth")


# filling


@pytest.mark.parametrize("scan", [True, False])
def test_fill_puts_trees_where_they_belong_and_reports(scan):
    params, base = fresh(0, scan=scan), jax.device_get(fresh(1))
    base["prior"]["old"] = np.zeros(3)
    filled, report = weights.fill(params, {"net": base["net"]})
    same(filled["net"], jax.tree.map(jnp.asarray, weights.matching(base["net"], params["net"])))
    same(filled["prior"], params["prior"])
    count = 3 if scan else 7
    assert report == [f"filled: net ({count} tensors)", "left fresh: prior (2 tensors)"]

    base["head"] = {"w": np.zeros(1)}
    filled, report = weights.fill(params, {"": base, "prior": {"var": np.full(2, 5.0), "count": np.zeros((), int)}})
    assert report == [f"filled: net ({count} tensors), prior (2 tensors)", "not used: head (1 tensor)"]
    np.testing.assert_array_equal(filled["prior"]["var"], [5, 5])  # the explicit key wins
    assert filled["prior"]["var"].dtype == jnp.float32


def test_fill_refuses_what_does_not_fit():
    params = fresh()
    net = fresh(depth=2, scan=False)["net"]
    for into, given, words in (
        (params, {"nett": {}}, ["'nett'", "'net'"]),
        (params, {"": fresh(width=6)}, ["net/embed is 5x6 (expected 5x4)"]),
        (params, {"": {"net": net}}, ["qkv/kernel is 2x4x3x2x2 (expected 3x4x3x2x2)"]),
        (fresh(scan=False), {"": {"net": weights.stacked(net)}}, ["net/trunk/block", "2 layers", "3"]),
        (params, {"net": {"w": np.zeros(1)}}, ["'net'", "net/w"]),
    ):
        with told(*words):
            weights.fill(into, given)


def test_a_part_of_another_depth_is_refused():
    for depth, ours, theirs in ((2, True, True), (4, True, False), (2, False, True), (4, False, False)):
        params, tree = fresh(scan=ours), fresh(scan=theirs, depth=depth)["net"]
        with told("weights.net=RUN:net", f"task.depth={depth}", "3"):
            weights.fill(params, {"net": tree}, {"net": "RUN:net"}, Fake())
        with told("weights.net", f"{depth} layers", "3"):
            weights.fill(params, {"net": tree})


def test_the_field_for_the_depth_is_that_of_the_network():
    @dataclass(frozen=True)
    class Holder:
        net: Any = Fake()
        depth: int = 3
        head_depth: int = 3

        @property
        def about(self) -> About:
            return About(networks={"net": Network(self.net)})

    params, tree = {"net": fresh()["net"]}, fresh(depth=2)["net"]
    with told("task.net.depth=2"):
        weights.fill(params, {"net": tree}, task=Holder())
    with told("this task has 3; use"):
        weights.fill(params, {"net": tree}, task=Holder(net=Fake(depth=9)))
    for key, field in (("head", "head_depth"), ("body", "depth")):
        with told(f"task.{field}=2"):
            weights.fill({key: params["net"]}, {key: tree}, task=Holder())


def test_what_is_given_by_name_is_whole_and_nothing_is_left_over():
    params = fresh()
    net = jax.device_get(fresh(1)["net"])
    for tree, said in (
        ({"trunk": net["trunk"]}, "missing (1): net/embed;"),
        ({**net, "trunk": {**net["trunk"], "norm": np.zeros(2)}}, "left over (1): net/trunk/norm;"),
        ({"trunk": net["trunk"], "embed": np.zeros(3)}, "wrong shape (1): net/embed is 3 (expected 5x4)"),
    ):
        for reference in ("RUN:net", "RUN"):
            with told(f"weights.net={reference}", said):
                weights.fill(params, {"net": tree}, {"net": reference})
    more = {**net, "discriminator": {"w": np.zeros(2)}}  # a model that holds the part and something beside it
    filled, report = weights.fill(params, {"net": more}, {"net": "RUN"})
    same(filled["net"], jax.tree.map(jnp.asarray, net))
    assert report[-1] == "not used: net (1 tensor)"
    with told("weights.net=RUN:net", "left over (1): net/discriminator/w;"):
        weights.fill(params, {"net": more}, {"net": "RUN:net"})


def test_a_model_in_the_place_of_its_part_is_told_how_to_be_written():
    params = fresh()
    for tree in (fresh(1), {**fresh(1, depth=2), "embed": np.zeros((5, 4))}):  # nothing fits, or little does
        with told("weights.net=runs/a is a whole model", "weights.net=runs/a:net"):
            weights.fill(params, {"net": tree}, {"net": "runs/a"})
    tree = {**fresh(1)["net"], "net": {"w": np.zeros(1)}}  # its own part of that name is another thing
    assert weights.fill(params, {"net": tree}, {"net": "runs/a"})[1][-1] == "not used: net (1 tensor)"


# StableHLO


def sampler(params: Any, rng: jax.Array, guidance: jax.Array) -> dict[str, jax.Array]:
    """A toy with a scan over the unrolled layers' kernels and a draw."""
    x = jax.random.normal(rng, (2, 4)) @ params["net"]["embed"].T
    for layer in params["net"]["trunk"].values():
        x = jnp.tanh(x * layer["qkv"]["bias"].sum() + guidance)
    return {"image": x}


def test_stablehlo_sampler_equals_the_jitted_one(tmp_path):
    params = fresh(scan=False)
    with told("first"):
        weights.export_stablehlo(tmp_path, {"sampler": weights.Program(sampler)}, params)
    weights.save(tmp_path / "out", params, CONFIG, "")
    arguments = (jax.random.key(3), jnp.float32(0.5))
    shapes = jax.eval_shape(lambda: (params, *arguments))
    programs = {"sampler": weights.Program(sampler, shapes[1:], {"options": {"steps": 3}})}
    weights.export_stablehlo(tmp_path / "out", programs, shapes[0])
    stored, _ = weights.load(tmp_path / "out")
    call = weights.load_stablehlo(tmp_path / "out")
    same(call(stored, *arguments), jax.jit(sampler)(params, *arguments))

    about = json.loads((tmp_path / "out" / "stablehlo" / "sampler.json").read_text())
    assert about["platforms"] == ["cpu", "cuda", "tpu"]
    assert about["results"] == {"image": {"shape": [2, 5], "dtype": "float32"}}
    assert about["arguments"][0].keys() == weights.flatten(stored).keys()
    assert about["arguments"][1] == {"shape": [], "dtype": "key<fry>"}
    assert about["options"] == {"steps": 3}
    with told("no readable denoiser"):
        weights.load_stablehlo(tmp_path / "out", "denoiser")

    blob = tmp_path / "out" / "stablehlo" / "sampler.bin"
    broken = bytearray(blob.read_bytes())
    broken[200] ^= 1
    blob.write_bytes(broken)
    with told("damaged"):
        weights.load_stablehlo(tmp_path / "out")
    weights.export_stablehlo(tmp_path / "out", programs, shapes[0], platforms=("tpu",))
    with told("tpu", "cpu"):
        weights.load_stablehlo(tmp_path / "out")
    weights.save(tmp_path / "out", params, CONFIG, "")  # new weights take the earlier sampler with them
    with told("no readable sampler"):
        weights.load_stablehlo(tmp_path / "out")
