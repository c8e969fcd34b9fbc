"""T5's encoder: parity with published code's numbers, and what padding may not do."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fresh import fresh

from zoo import dist, weights
from zoo.encoders import text
from zoo.encoders.tokenizer import END, PAD
from zoo.errors import UserError
from zoo.task import abilities

GOLDEN = Path(__file__).parent.parent / "golden" / "encoders"
TINY = text.T5(width=16, heads=2, head_dim=4, mlp=24, depth=2, vocab=50, tokens=8)


def first_layers(task, params, depth):
    """The task and parameters of the first layers alone."""
    block = jax.tree.map(lambda x: x[:depth], params["trunk"]["block"])
    return dataclasses.replace(task, depth=depth), {**params, "trunk": {"block": block}}


class Case:
    """A golden file, our task and parameters for it, and everything computed in one program."""

    def __init__(self, name):
        f = self.f = np.load(GOLDEN / f"{name}.npz")
        c = json.loads(str(f["config"]))
        self.task = text.T5(
            width=c["d_model"],
            heads=c["num_heads"],
            head_dim=c["d_kv"],
            mlp=c["d_ff"],
            depth=c["num_layers"],
            vocab=c["vocab_size"],
            gated=c["feed_forward_proj"] == "gated-gelu",
            buckets=c["relative_attention_num_buckets"],
            distance=c["relative_attention_max_distance"],
            tokens=f["input_ids"].shape[1],
        )
        self.state = {k.removeprefix("w:"): v for k, v in f.items() if k.startswith("w:")}
        self.params = weights.from_official(self.task, self.state)
        self.tokens = jnp.asarray(f["input_ids"], jnp.int32)
        self.mask = jnp.asarray(f["attention_mask"])
        self.out = jax.device_get(jax.jit(self._everything)(self.params))

    def _everything(self, params):
        task, tokens, mask = self.task, self.tokens, self.mask.astype(bool)
        streams = [params["tokens"]["table"][tokens]]
        for depth in range(1, task.depth + 1):
            part, some = first_layers(task, params, depth)
            last, stream = text.TextNet(part).apply({"params": some}, tokens, mask)
            streams.append(stream)
        return {
            "hidden_states": jnp.stack([*streams[:-1], last]),
            "last_hidden_state": last,
            "features": task.encode(params, tokens),
            "masked": task.encode(params, tokens, self.mask),
            "unmasked": task.encode(params, tokens, jnp.ones_like(tokens)),
        }


@pytest.fixture(scope="module", params=["t5", "t5_relu"])
def case(request):
    return Case(request.param)


def test_equals_the_published_numbers(case):
    names = {k for k in case.f if not k.startswith("w:")} - {"config", "input_ids", "attention_mask"}
    assert names == {"hidden_states", "last_hidden_state", "features"}
    for name in names:
        np.testing.assert_allclose(case.out[name], case.f[name], rtol=0, atol=2e-5, err_msg=name)


def test_the_mask_follows_from_the_tokens(case):
    np.testing.assert_array_equal(case.out["features"], case.out["masked"])
    assert np.all(case.out["features"][np.asarray(case.tokens) == 0] == 0)
    assert np.abs(case.out["unmasked"] - case.out["features"])[:, 0].max() > 1e-2


def test_the_published_layout_comes_back_to_the_bit(case):
    back = weights.to_official(case.task, case.params)
    assert set(case.state) - set(back) == {"encoder.embed_tokens.weight"}
    assert set(back) <= set(case.state)
    for name, array in back.items():
        np.testing.assert_array_equal(array, case.state[name], err_msg=name)


def test_whole_models_and_files_with_one_embedding_are_read(case):
    shared, repeated = "shared.weight", "encoder.embed_tokens.weight"
    extra = {"decoder.block.0.layer.0.SelfAttention.q.weight": np.ones((2, 2)), "lm_head.weight": np.ones((3, 2))}
    for state in (
        {**case.state, **extra},
        {k: v for k, v in case.state.items() if k != repeated},
        {k: v for k, v in case.state.items() if k != shared},
    ):
        jax.tree.map(np.testing.assert_array_equal, weights.from_official(case.task, state), case.params)
    with pytest.raises(UserError, match=r"missing \(1\): shared\.weight"):
        weights.from_official(case.task, {k: v for k, v in case.state.items() if k not in (shared, repeated)})
    with pytest.raises(UserError, match=r"unexpected \(1\): lm_body"):
        weights.from_official(case.task, {**case.state, "lm_body": np.ones(1)})


# --- laws, with random weights ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny():
    """Parameters of TINY, its tokens (one row without padding), and the features of these."""
    params = fresh(TINY)
    tokens = np.random.default_rng(0).integers(2, TINY.vocab, (8, 8)).astype(np.int32)
    for row in range(1, 8):
        tokens[row, row] = END
        tokens[row, row + 1 :] = PAD
    tokens = jnp.asarray(tokens)
    return params, tokens, jax.jit(TINY.encode)(params, tokens)


def test_padding_says_nothing_to_the_other_tokens(tiny):
    params, tokens, features = tiny
    mask = tokens != PAD
    noise = jnp.where(mask, tokens, 7)  # other tokens in place of padding, where the mask hides them
    encode = jax.jit(TINY.encode)
    np.testing.assert_allclose(encode(params, noise, mask), features, atol=1e-6)
    assert np.abs(encode(params, noise) - features)[1:, 0].max() > 1e-2
    longer = encode(params, jnp.pad(tokens, ((0, 0), (0, 3))))
    np.testing.assert_allclose(longer[:, :8], features, atol=1e-5)
    assert np.all(longer[:, 8:] == 0)
    assert np.all(np.asarray(encode(params, jnp.zeros_like(tokens))) == 0)  # a caption of padding alone


def test_scanned_and_unrolled_agree(tiny):
    params, tokens, features = tiny
    task = dataclasses.replace(TINY, scan=False)
    params = weights.matching(params, weights.abstract(task))
    assert {"layer0", "layer1"} == set(params["trunk"])
    np.testing.assert_allclose(jax.jit(task.encode)(params, tokens), features, atol=1e-6)


@pytest.mark.devices8
def test_eight_devices_agree_with_one(tiny):
    params, tokens, features = tiny
    boxed = jax.eval_shape(TINY.init, jax.random.key(0))
    mesh = dist.Mesh(data=2, fsdp=2, tensor=2).build()
    with dist.use(mesh):
        placed = jax.device_put(params, dist.shardings(boxed, mesh))
        got = jax.jit(TINY.encode)(placed, jax.device_put(tokens, dist.batch_sharding(mesh)))
    np.testing.assert_allclose(got, features, atol=1e-5)


def test_bfloat16_keeps_float32_where_it_matters(tiny):
    params, tokens, features = tiny
    task = dataclasses.replace(TINY, dtype="bfloat16")
    encode = jax.jit(task.encode)
    want = encode(params, tokens)
    assert want.dtype == jnp.float32
    np.testing.assert_allclose(want, features, atol=0.1)
    assert np.abs(want - features).max() > 0
    for name in ("q", "k", "v", "out", "gate", "up", "down"):
        block = params["trunk"]["block"]
        rounded = block[name]["kernel"].astype(jnp.bfloat16).astype(jnp.float32)
        changed = {**params, "trunk": {"block": {**block, name: {"kernel": rounded}}}}
        difference = np.abs(encode(changed, tokens) - want).max()
        assert (difference > 0) == (name == "down"), name  # the others are rounded anyway


def test_fresh_kernels_start_as_published():
    task = dataclasses.replace(TINY, width=64, head_dim=16, mlp=128)
    block = fresh(task)["trunk"]["block"]
    for name, std in {"q": 1024**-0.5, "k": 64**-0.5, "out": 32**-0.5, "gate": 64**-0.5, "down": 128**-0.5}.items():
        np.testing.assert_allclose(np.std(block[name]["kernel"]), std, rtol=0.1, err_msg=name)


# --- relative positions -----------------------------------------------------------------------------


def test_relative_buckets_grow_by_equal_factors():
    got = text.relative_buckets(200, 32, 128)
    assert got.dtype == np.int32
    first = [*range(8), 8, 12, 16, 23, 32, 46, 64, 91]  # the smallest distance of each bucket: 8 2^(k/2), rounded up
    distances = np.arange(200)
    want = np.searchsorted(first, distances, side="right") - 1
    np.testing.assert_array_equal(got[:, 0], want)  # keys before the query
    np.testing.assert_array_equal(got[0, 1:], want[1:] + 16)  # keys after it
    for offset in (-150, -3, 0, 5, 90):
        assert len(set(np.diagonal(got, offset))) == 1


# --- the task ---------------------------------------------------------------------------------------


def test_the_published_size():
    task = text.xl(tokens=64)
    assert task == text.T5(tokens=64)
    params = weights.abstract(task)
    count = sum(x.size for x in jax.tree.leaves(params))
    assert count == 24 * (4 * 2048**2 + 3 * 2048 * 5120 + 2 * 2048) + 32128 * 2048 + 32 * 32 + 2048
    assert {name.target for name in task.import_names()} - {None} == set(weights.flatten(params))
    assert abilities(task) == ["import_names", "import_state"]
    assert task.about.held == ()


def test_distances_begin_where_exact_ones_end():
    with pytest.raises(UserError, match=r"task\.distance=8 .* task\.distance=128"):
        dataclasses.replace(TINY, distance=8)
