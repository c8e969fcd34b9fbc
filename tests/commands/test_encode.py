"""`zoo prepare latents` with a tiny autoencoder and text encoder, and what a run says of latents made by others."""

from __future__ import annotations

import json
import zlib
from dataclasses import replace
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fresh import exported, noise
from PIL import Image

from zoo import cli, models, weights
from zoo.commands.encode import _sizes, batch_for
from zoo.data.images import Images
from zoo.data.images.latents import Latents
from zoo.data.synthetic import Synthetic
from zoo.encoders import text as encoders_text
from zoo.encoders import tokenizer
from zoo.encoders.vae import AutoEncoder
from zoo.errors import UserError
from zoo.papers.starflow import DecoderTune, StarFlow
from zoo.run import Run
from zoo.task import About, Captions, Network
from zoo.train.loop import train
from zoo.train.provenance import check_encoders

VAE = AutoEncoder(image=8, channels=3, latent=2, widths=(4, 4), layers=1, groups=2, scale=20.0)
TEXT = encoders_text.T5(width=8, heads=2, head_dim=4, mlp=8, depth=1, vocab=50, tokens=3)


class Words:
    """A tokeniser without a model: every word is a number."""

    def __init__(self, path):
        self.path = path

    def check(self, vocab):
        assert vocab == TEXT.vocab

    def __call__(self, captions, length):
        ids, lost = np.zeros((len(captions), length), np.int32), []
        for row, caption in zip(ids, captions):
            words = [2 + zlib.crc32(w.encode()) % 40 for w in caption.split()]
            row[: len(words[: length - 1]) + 1] = [*words[: length - 1], 1]
            lost.append(max(0, len(words) - length + 1))
        return ids, lost


def export_of(folder, task):
    exported(folder, task, params := noise(task, 0.3), Synthetic())
    return params


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("encode")
    rng = np.random.default_rng(0)
    (root / "pairs").mkdir()
    for i in range(10):
        pixels = rng.integers(0, 256, (8, 8, 3), np.uint8)
        Image.fromarray(pixels).save(root / "pairs" / f"{i}.png")
        (root / "pairs" / f"{i}.txt").write_text("a b c d" if i == 3 else f"number{i}")
    export_of(root / "vae1", VAE)
    text = export_of(root / "text", TEXT)
    (root / "text" / "spiece.model").write_bytes(b"words")
    return SimpleNamespace(path=root, text=text)


@pytest.fixture(autouse=True)
def here(root, monkeypatch):
    monkeypatch.chdir(root.path)
    monkeypatch.setattr(tokenizer, "Tokenizer", Words)


def prepare(*words):
    return cli.main(["prepare", "latents", "pairs", *words, "size=8", "batch=8", "test_fraction=0"])


@pytest.fixture(scope="module")
def fitting(root):
    """The autoencoder with the scale that a first try is told; task and parameters."""
    from zoo.commands.encode import encode

    with pytest.raises(UserError, match=r"scale is likely wrong; task\.scale=") as error:
        encode(str(root.path / "pairs"), str(root.path / "no"), vae=str(root.path / "vae1"), size=8, batch=8)
    scale = float(str(error.value).split("task.scale=")[1].split()[0])
    assert not (root.path / "no").exists()
    task = AutoEncoder(**{**VAE.__dict__, "scale": scale})
    return task, export_of(root.path / "vae", task)


def test_latents_and_features_are_those_of_the_networks(root, fitting, caplog):
    task, params = fitting
    assert prepare("out", "vae=vae", "text=text", "features=true") == 0
    assert "1 captions were longer than the 3 tokens" in caplog.text
    data = Latents("out")
    made = data.made_with()
    assert made == {
        "vae": weights.encoder_digest(params),
        "vae_scale": str(task.scale),
        "text": weights.encoder_digest(root.text),
        "tokenizer": made["tokenizer"],
        "window": "3",
        "vae_sizes": made["vae_sizes"],
        "text_sizes": made["text_sizes"],
        "template": "plain",
    }
    assert ("groups=2" in made["vae_sizes"], "head_dim=4" in made["text_sizes"]) == (True, True)
    source = data.source("train")
    assert len(source) == 10
    encode, read = jax.jit(task.encode), jax.jit(TEXT.encode)
    for i in (0, 9):
        pixels = np.asarray(Image.open(f"pairs/{i}.png"), np.float32)[None] / 127.5 - 1
        mean, std = encode(params, pixels)
        np.testing.assert_allclose(source[i]["latent"], mean[0], rtol=0.01, atol=1e-3)
        np.testing.assert_allclose(source[i]["latent_std"], std[0], rtol=0.01, atol=1e-3)
        for key, caption in (("", f"number{i}"), ("null_", "")):
            tokens, _ = Words("")([caption], 3)
            np.testing.assert_array_equal(source[i][f"{key}tokens"], tokens[0])
            np.testing.assert_allclose(source[i][f"{key}text"], read(root.text, tokens)[0], rtol=0.01, atol=1e-3)
    squares = [np.square(source[i]["latent"]) + np.square(source[i]["latent_std"]) for i in range(10)]
    assert 0.9 < np.sqrt(np.mean(squares)) < 1.1


def test_tokens_alone_need_no_weights_of_the_text_encoder(root, fitting, capsys):
    about = json.loads((root.path / "text" / "config.json").read_text())
    (root.path / "described").mkdir(exist_ok=True)
    (root.path / "described" / "config.json").write_text(json.dumps(about))
    assert prepare("tokens", "vae=vae", "text=described") == 2
    assert "holds no spiece.model, which makes tokens" in capsys.readouterr().err
    fields = ("vae=vae", "text=described", "tokenizer=text/spiece.model")
    assert prepare("tokens", *fields) == 0
    assert set(Latents("tokens").source("train")[0]) == {"latent", "latent_std", "tokens", "null_tokens"}


def test_what_weights_do_not_tell_of_an_encoder_is_part_of_a_set(root, fitting, capsys):
    fields = ("vae=vae", "text=text")
    assert prepare("sized", *fields) == 0
    export_of(root.path / "grouped", replace(fitting[0], groups=4))  # the same weights
    assert prepare("sized", "vae=grouped", "text=text") == 2
    assert "groups=4" in capsys.readouterr().err
    export_of(root.path / "short", replace(TEXT, tokens=2))
    assert prepare("sized", fields[0], "text=short", "tokenizer=text/spiece.model") == 2
    assert "'window': '2'" in capsys.readouterr().err


def test_buckets_may_be_multiples_of_more_than_the_factor(root, fitting, capsys):
    assert prepare("multiples", "vae=vae", "aspects=true", "multiple=4") == 0
    source = Latents("multiples", "mixed").source("train")
    assert source.aspects == ("1:1",)
    assert json.loads((root.path / "multiples" / "info.json").read_text())["settings"]["multiple"] == 4
    assert prepare("no", "vae=vae", "aspects=true", "multiple=3") == 2
    assert "multiple=3 is no multiple of 2, by which the autoencoder shrinks" in capsys.readouterr().err


def test_a_run_refuses_captions_of_another_tokenizer(root):
    made = {"tokenizer": tokenizer.digest(root.path / "text")}
    data = SimpleNamespace(place="out", made_with=lambda: made)
    run = SimpleNamespace(data=data, task=SimpleNamespace(about=About(captions=Captions(4))), weights={"text": "text"})
    check_encoders(run, {})
    made["tokenizer"] = "0"
    with pytest.raises(
        UserError, match=r"another tokeniser \(digest 0\) than text/spiece\.model .* weights\.text; enc"
    ):
        check_encoders(run, {})
    check_encoders(SimpleNamespace(data=data, task=run.task, weights={"text": "gone"}), {})


def test_a_run_refuses_latents_of_another_autoencoder(root, fitting):
    task, params = fitting
    made = {"vae": weights.encoder_digest(params), "vae_scale": str(task.scale), "tokenizer": "0"}
    data = SimpleNamespace(place="out", made_with=lambda: made)

    def run(vae, *given):
        return SimpleNamespace(
            data=data,
            task=SimpleNamespace(about=About(networks={"vae": Network(vae)})),
            weights=dict.fromkeys(given, "vae2"),
        )

    check_encoders(run(task), {})
    check_encoders(run(task), {"vae": params})
    check_encoders(run(task), {"": {"vae": params, "flow0": {}}})
    finer = {**params, "decoder": jax.tree.map(lambda x: x + 1, params["decoder"])}
    check_encoders(run(task), {"vae": finer})  # a decoder trained further makes no other latents
    other = {**params, "encoder": jax.tree.map(lambda x: x + 1, params["encoder"])}
    with pytest.raises(
        UserError, match=rf"made by another autoencoder \(digest {made['vae']}\) than weights\.vae=vae2"
    ):
        check_encoders(run(task, "vae"), {"vae": other})
    with pytest.raises(UserError, match=r"task\.vae\.scale=20\.0, but the latents in data\.path=out were made with"):
        check_encoders(run(VAE), {})
    check_encoders(SimpleNamespace(data=Synthetic(), task=run(task).task, weights=None), {})
    shifted = replace(VAE, mean=(1.0, -2.0), std=(1.0, 3.0), unit=True)
    made |= {"vae_scale": str(VAE.scale), "vae_sizes": _sizes(VAE)}
    check_encoders(run(VAE), {})
    for key, value in (("mean", "1.0,-2.0"), ("std", "1.0,3.0"), ("unit", "True")):
        made["vae_sizes"] = _sizes(replace(VAE, **{key: getattr(shifted, key)}))
        with pytest.raises(UserError, match=rf"data\.path=out were made with .*; set task\.vae\.{key}={value}, or enc"):
            check_encoders(run(VAE), {})
    made["vae_sizes"] = _sizes(shifted)
    check_encoders(run(replace(shifted, scale=20, mean=(1, -2), std=(1, 3))), {})  # equal, though said as whole numbers


def test_a_run_refuses_captions_of_another_template():
    made = {"template": "aspect"}
    data = SimpleNamespace(place="out", made_with=lambda: made)

    def check(template):
        about = About(captions=None if template is None else Captions(4, template=template))
        check_encoders(SimpleNamespace(data=data, task=SimpleNamespace(about=about)), {})

    check("aspect")
    check(None)  # a model that sees no caption
    with pytest.raises(
        UserError, match=r"task\.template='plain', but .* data\.path=out were .*'aspect'; set task\.temp"
    ):
        check("plain")
    made["template"] = "plain"
    with pytest.raises(UserError, match=r"set task\.template=plain, or encode them again with aspects=true"):
        check("aspect")
    made.clear()
    check("aspect")


def test_latents_outlive_a_tuned_decoder(root, fitting, capsys, monkeypatch):
    one = jax.devices()[:1]  # compiles fastest
    monkeypatch.setattr(jax, "devices", lambda *_: one)
    task, params = fitting
    tune = DecoderTune(vae=task, width=4, stages=1, feature=0.0)
    run = Run(tune, Images("pairs", size=8), steps=1, batch=8, workdir="tune")
    with pytest.raises(
        UserError, match=r"weights\.encoder is missing: DecoderTune holds .*then add weights=\{'': 'OUT'\}"
    ):
        train(run, quiet=True)
    with pytest.raises(
        UserError, match=r"weights\[''\]: none is neither a folder .* `zoo import starflow/sd_vae FILE OUT`"
    ):
        train(replace(run, weights={"": "none"}), quiet=True)
    decoder = jax.tree.map(lambda x: x + 1, params["decoder"])
    exported(root.path / "tuned", tune, {**noise(tune), **params, "decoder": decoder})
    assert weights.encoder_digest(models.open_model("tuned").params) == weights.encoder_digest(params)

    flow = StarFlow(latent=(4, 4), channels=2, width=24, depths=(1, 1), head_dim=24, reach=4.0, vae=task, scan=False)
    assert prepare("before", "vae=vae") == 0
    run = Run(flow, Latents("before"), steps=1, batch=8, workdir="flow")
    with pytest.raises(UserError, match=r"weights\.vae is missing: StarFlow .* or set task\.vae=none"):
        train(run, quiet=True)
    assert not (root.path / "flow").exists()
    train(replace(run, weights={"vae": "tuned"}), quiet=True)
    made = {**Latents("before").made_with(), "vae": "0"}  # encoded anew by another one meanwhile
    with monkeypatch.context() as patch:
        patch.setattr(Latents, "made_with", lambda self: made)
        with pytest.raises(UserError, match=r"another autoencoder \(digest 0\)"):
            train(replace(run, weights={"vae": "tuned"}, steps=2), quiet=True)

    made = Latents("before").made_with()
    for name in ("tuned", "flow"):
        assert prepare(f"by-{name}", f"vae={name}") == 0
        assert Latents(f"by-{name}").made_with() == made
        for one, other in zip(Latents(f"by-{name}").source("train"), Latents("before").source("train")):
            np.testing.assert_array_equal(one["latent"], other["latent"])
    export_of(root.path / "bare", replace(flow, vae=None))
    assert prepare("by-bare", "vae=bare") == 2
    assert "vae=bare: StarFlow is no autoencoder; get the published one" in capsys.readouterr().err


def test_large_images_are_encoded_fewer_at_a_time():
    assert [batch_for(size) for size in (28, 256, 512, 1024, 4096)] == [64, 64, 16, 4, 1]


def test_digests_are_of_all_weights_in_either_layout(root):
    stacked = {"trunk": {"block": {"w": np.arange(6.0, dtype=np.float32).reshape(2, 3)}}}
    rows = {"trunk": {f"layer{i}": {"w": stacked["trunk"]["block"]["w"][i]} for i in range(2)}}
    assert weights.digest(stacked) == weights.digest(rows) == weights.digest(jax.tree.map(jnp.asarray, rows))
    assert weights.digest(stacked) == weights.digest(jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), stacked))
    others = [
        jax.tree.map(lambda x: x + (x == 5), stacked),
        {"trunk": {"block": {"v": stacked["trunk"]["block"]["w"]}}},
    ]
    assert len({weights.digest(stacked), weights.digest(stacked, "x"), *map(weights.digest, others)}) == 4
    assert len(weights.digest(stacked)) == 16
