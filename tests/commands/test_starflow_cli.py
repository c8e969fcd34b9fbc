"""A latent model with captions from the command line: in from published files, samples, and out again."""

import contextlib
import dataclasses
import json
from dataclasses import dataclass
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from fresh import noise
from PIL import Image

from zoo import cli, config, models, weights
from zoo.commands import bench
from zoo.commands.weights import _licence, export
from zoo.data.images.captions import template
from zoo.data.synthetic import Synthetic
from zoo.data.text.vocabulary import text8
from zoo.encoders import tokenizer
from zoo.encoders.text import T5
from zoo.encoders.tokenizer import NAME, Tokenizer
from zoo.encoders.vae import AutoEncoder
from zoo.errors import UserError
from zoo.papers.starflow import StarFlow
from zoo.papers.typescore.extractors import Extraction, Oracle
from zoo.run import Run, Samples
from zoo.task import About
from zoo.train import checks, watch
from zoo.train.report import Report
from zoo.weights.export import _EXPORT

sentencepiece = pytest.importorskip("sentencepiece")

VAE = AutoEncoder(image=8, channels=3, latent=2, widths=(4, 4), layers=1, groups=4, scale=1.0)
TEXT = T5(width=8, heads=2, head_dim=4, mlp=8, depth=1, vocab=60, tokens=24, scan=False)
TASK = StarFlow(
    latent=(4, 4),
    channels=2,
    width=24,
    depths=(1, 1),
    head_dim=24,
    text_tokens=24,
    text_width=8,
    reach=4.0,
    template="aspect",
    denoiser="decoder",  # without a step of the score, whose gradient takes longest to compile
    vae=VAE,
    text=TEXT,
    scan=False,
)
CONFIG = f"""
from zoo.data.synthetic import Synthetic
from zoo.encoders.text import T5
from zoo.encoders.vae import AutoEncoder
from zoo.papers.starflow import *
from zoo.run import Run
vae = {VAE!r}
text = {TEXT!r}
config = Run({TASK!r}, Synthetic(), steps=1, batch=8, weights={{"vae": "none", "text": "none"}})
"""


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Published files of a model and of its encoders, and the config that describes them; nothing imported yet."""
    root = tmp_path_factory.mktemp("published")
    (root / "config.py").write_text(CONFIG)
    weights.write_state_dict(root / "flow.safetensors", weights.to_official(TASK, noise(TASK, 0.2, 0)))
    weights.write_state_dict(root / "vae.npz", weights.to_official(VAE, noise(VAE, 0.2, 1)))
    state = weights.to_official(TEXT, noise(TEXT, 0.2, 2))
    (root / "t5").mkdir()
    for i in range(2):  # in two parts
        part = dict(list(state.items())[i::2])
        weights.write_state_dict(root / "t5" / f"model-0000{i + 1}-of-00002.safetensors", part)
    (root / "t5" / "model.safetensors.index.json").write_text("{}")
    words = [
        f"a {a} {b} in a {c}:{d} aspect ratio."
        for a in ("red", "blue")
        for b in ("cat", "dog")
        for c, d in ("11", "69")
    ]
    with (root / "t5" / "spiece.model").open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(words), model_writer=file, vocab_size=40, hard_vocab_limit=False, pad_id=0, eos_id=1,
            unk_id=2, bos_id=-1, minloglevel=2,
        )  # fmt: skip
    return root


@pytest.fixture(autouse=True)
def here(root, monkeypatch):
    monkeypatch.chdir(root)


@pytest.fixture(scope="module")
def model(root, request):
    """The whole model, imported once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        for config, file, out in (("vae", "vae.npz", "exports/vae"), ("text", "t5", "exports/t5")):
            assert cli.main(["import", f"config.py:{config}", file, out]) == 0
        fields = ["weights.vae=exports/vae", "weights.text=exports/t5"]
        assert cli.main(["import", "config.py", "flow.safetensors", "exports/flow", *fields]) == 0
    return root / "exports" / "flow"


def ran(capsys, *argv):
    capsys.readouterr()
    code = cli.main(argv)
    out, err = capsys.readouterr()
    assert code == 0, err
    return out


def refused(capsys, *argv):
    capsys.readouterr()
    assert cli.main(argv) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1, err
    return err


def images(folder):
    found = []
    for path in sorted(folder.glob("0*.png")):
        with Image.open(path) as image:
            found.append((np.asarray(image).copy(), dict(image.text)))
    return found


def test_encoders_that_the_checkpoint_lacks_are_asked_for(capsys, root):
    def tried(*fields):
        return refused(capsys, "import", "config.py", "flow.safetensors", "new", *fields)

    assert "weights.vae: none is neither a folder" in (said := tried())
    assert "`zoo import starflow/sd_vae FILE OUT`" in said
    (root / "bare.py").write_text(CONFIG.replace(', weights={"vae": "none", "text": "none"}', ""))
    said = refused(capsys, "import", "bare.py", "flow.safetensors", "new")
    assert "weights.vae is missing: StarFlow holds this network" in said
    said = refused(capsys, "import", "bare.py", "flow.safetensors", "new", "weights={'vae': 'x'}")
    assert "weights.text is missing" in said
    assert "`zoo import starflow/flan_t5_xl FOLDER OUT`; then add weights.text=OUT" in said
    assert not (root / "new").exists()


def test_an_import_is_its_parts_and_goes_back_to_the_bit(capsys, root, model, tmp_path):
    opened = models.open_model(model)
    assert (opened.task, opened.kind) == (TASK, "imported")
    parts = {**noise(TASK, 0.2, 0), "vae": noise(VAE, 0.2, 1), "text": noise(TEXT, 0.2, 2)}
    wanted, found = weights.flatten(parts), weights.flatten(opened.params)
    assert set(wanted) == set(found)
    for name, array in wanted.items():
        np.testing.assert_array_equal(found[name], array, err_msg=name)
    assert "research-only, non-commercial licence" in (model / "README.md").read_text()
    assert models.open_model("exports/t5").data is None
    ran(capsys, "export", str(model), str(tmp_path / "back.safetensors"), "--format", "official")
    back, first = (weights.read_state_dict(p) for p in (tmp_path / "back.safetensors", root / "flow.safetensors"))
    assert set(back) == set(first)
    for name, array in first.items():
        np.testing.assert_array_equal(back[name], array, err_msg=name)
    ran(capsys, "export", str(model), str(tmp_path / "again"))
    assert NAME in _EXPORT  # an export that is written again may replace it
    for folder in (model, root / "exports" / "t5", tmp_path / "again"):
        assert (folder / "spiece.model").read_bytes() == (root / "t5" / "spiece.model").read_bytes()
    assert "research-only" in (tmp_path / "again" / "README.md").read_text()


def test_a_part_given_must_be_whole(root, model):
    state = weights.read_state_dict(root / "flow.safetensors")
    text = noise(TEXT, 0.2, 2)
    vae = {"encoder": noise(VAE, 0.2, 1)["encoder"]}
    with pytest.raises(ValueError, match=r"weights\.vae does not fit: missing \(\d+\): vae/decoder"):
        weights.from_official(TASK, state, {"vae": vae, "text": text})
    with pytest.raises(ValueError, match=r"parameters that no tensor fills \(\d+\): text/"):
        weights.from_official(TASK, state, {"vae": noise(VAE, 0.2, 1)})


def test_a_folder_that_holds_a_model_twice_is_refused(root, tmp_path):
    for name in ("one", "two"):
        weights.write_state_dict(tmp_path / f"{name}.safetensors", {"a": np.ones(2, np.float32)})
    with pytest.raises(ValueError, match=r"holds the tensors a in two\.safetensors and in another file"):
        weights.read_state_dict(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"holds neither \.safetensors nor"):
        weights.read_state_dict(tmp_path / "empty")


def test_samples_have_captions(capsys, root, model, tmp_path):
    out = tmp_path / "out"
    said = ran(capsys, "sample", str(model), "prompt=a red cat", "n=2", "seed=3", "guidance=1.5", "--out", str(out))
    assert "2 samples in" in said
    first = images(out)
    assert [image.shape for image, _ in first] == [(8, 8, 3)] * 2
    assert [about["prompt"] for _, about in first] == ["a red cat"] * 2
    settings = json.loads((out / "settings.json").read_text())
    assert (settings["prompt"], settings["guidance"], "label" in settings) == ("a red cat", 1.5, False)
    assert np.abs(first[0][0].astype(int) - first[1][0]).max() > 1

    # they are those of the sampler, captions and none of them under the template that names the shape
    tokens = Tokenizer(root / "t5")([template(text, aspect="1:1") for text in ("a red cat", "")], 24)[0]
    given = {"tokens": tokens[[0, 0]], "null_tokens": tokens[[1, 1]]}
    image = models.open_model(model).sample(2, seed=3, conditions=given, guidance=1.5)["image"]
    for (found, _), wanted in zip(first, np.asarray(image)):
        assert np.abs(found - (wanted + 1) * 127.5).max() <= 1.5

    # in turn from a file: sample i has caption i, the second one of before stays what it was
    (tmp_path / "lines.txt").write_text("a blue dog\n\na red cat\n")
    other = tmp_path / "other"
    arguments = ["seed=3", "guidance=1.5", "--out", str(other)]
    ran(capsys, "sample", str(model), f"prompts={tmp_path}/lines.txt", *arguments)
    found = images(other)
    assert [about["prompt"] for _, about in found] == ["a blue dog", "a red cat"]
    assert np.abs(found[1][0].astype(int) - first[1][0]).max() <= 1
    assert np.abs(found[0][0].astype(int) - first[0][0]).max() > 1
    assert json.loads((other / "settings.json").read_text())["prompts"].startswith("lines.txt (sha256 ")
    (tmp_path / "lines.txt").write_text("a blue dog\na red dog\n")
    said = refused(capsys, "sample", str(model), f"prompts={tmp_path}/lines.txt", *arguments)
    assert "holds samples drawn with other settings (prompts:" in said

    # another tokeniser would make other tokens of the same captions
    settings["tokenizer"] = "0"
    (out / "settings.json").write_text(json.dumps(settings))
    said = refused(capsys, "sample", str(model), "prompt=a red cat", "n=2", "seed=3", "guidance=1.5", "--out", str(out))
    assert "holds samples drawn with other settings (tokenizer:" in said


def test_samples_of_other_shapes_and_without_captions(capsys, root, model, tmp_path, caplog):
    out = tmp_path / "wide"
    tokenizer = ["--tokenizer", str(root / "t5" / "spiece.model")]
    ran(capsys, "sample", str(model), "aspect=2:3", "n=1", "--out", str(out), *tokenizer)
    assert images(out)[0][0].shape == (10, 6, 3)
    settings = json.loads((out / "settings.json").read_text())
    assert (settings["prompt"], settings["aspect"], settings["grid"]) == (None, "2:3", [5, 3])
    assert "no prompt=: samples are drawn without a caption" in caplog.messages


def test_a_config_whose_weights_are_all_given_needs_no_training(capsys, root, model, tmp_path):
    """It is the export whose parts it names, to every command; what it does not name is told."""
    parts = '"vae": "exports/vae", "text": "exports/t5"'
    (root / "whole.py").write_text(CONFIG.replace('"vae": "none", "text": "none"', f'{parts}, "": "exports/flow"'))
    opened, whole = models.open_model("whole.py"), models.open_model(model)
    assert (opened.task, opened.step, opened.run.batch) == (TASK, None, 8)
    assert opened.kind == "vae=exports/vae, text=exports/t5, exports/flow"
    for name, array in weights.flatten(whole.params).items():
        np.testing.assert_array_equal(weights.flatten(opened.params)[name], array, err_msg=name)
    assert bench.open_weights(TASK, "whole.py").kind == opened.kind

    arguments = ["prompt=a red cat", "n=2", "seed=3", "guidance=1.5", "--out"]
    for i, name in enumerate((str(model), "whole.py")):
        ran(capsys, "sample", name, *arguments, str(tmp_path / f"{i}"))
    first, found = images(tmp_path / "0"), images(tmp_path / "1")
    drawn = opened.sample(2, seed=3, prompt="a red cat", guidance=1.5)["image"]
    for (a, _), (b, _), image in zip(first, found, drawn):
        np.testing.assert_array_equal(a, b)
        assert np.abs(b - (image + 1) * 127.5).max() <= 1.5
    # an override makes another model, which does not fill the same folder
    again = [*arguments, str(tmp_path / "1"), "task.noise=0.2"]
    assert "other settings (task:" in refused(capsys, "sample", "whole.py", *again)

    lines = [json.loads(ran(capsys, "eval", name, "bpd", "limit=8", "batch=8")) for name in (str(model), "whole.py")]
    assert lines[0] | {"weights": opened.kind} == lines[1]
    ran(capsys, "export", "whole.py", str(tmp_path / "out"))
    exported = models.open_model(tmp_path / "out")
    assert (exported.task, exported.kind) == (TASK, opened.kind)
    assert weights.digest(exported.params) == weights.digest(whole.params)
    assert (tmp_path / "out" / "spiece.model").is_file()

    fields = ["weights.vae=exports/vae", "weights.text=exports/t5"]
    said = refused(capsys, "sample", "config.py", "n=1", *fields)
    assert "weights[''] is missing: this StarFlow is not trained here, and block0 (" in said
    assert "would stay random; add weights={'': 'OUT'}" in said
    (root / "less.py").write_text(CONFIG.replace('"vae": "none", "text": "none"', '"text": "exports/t5"'))
    for verb in (["eval", "less.py", "bpd"], ["export", "less.py", "lost"]):
        said = refused(capsys, *verb)
        assert "weights.vae is missing: StarFlow holds this network, and block0 (" in said
        assert "vae (" in said
        assert "`zoo import starflow/sd_vae FILE OUT`, or train a small one" in said
    assert not (root / "lost").exists()
    assert "--raw is for runs" in refused(capsys, "export", "whole.py", "lost", "--raw")
    assert "did you mean 'whole.py'" not in refused(capsys, "sample", "hole.py")
    assert "less.py:text holds a T5, not a Run" in refused(capsys, "sample", "less.py:text")


@dataclass(frozen=True)
class Nothing:
    pass


@dataclass(frozen=True)
class Echo:
    """A task whose samples are pictures of the captions' tokens."""

    about = About(conditions=("tokens", "null_tokens"))

    def spec(self, batch):
        return {key: jax.ShapeDtypeStruct((batch, 3), "int32") for key in (*self.about.conditions, "other")}

    Sampling = Nothing

    def init(self, rng):
        return {}

    def loss(self, params, batch, rng):
        return 0.0, {}

    def sample(self, params, rng, n, conditions=None, options=None):
        assert isinstance(conditions["null_tokens"], jax.core.Tracer)  # else they would be part of the program
        return {"image": conditions["tokens"].astype("float32").reshape(n, 1, 3, 1)}


@dataclass(frozen=True)
class Spelled(Synthetic):
    """Whose tokens are letters."""

    def source(self, split, spec=None):
        source = super().source(split, spec)
        source.vocabulary = text8()
        return source


def test_sheets_show_captions_of_the_held_out_part(monkeypatch):
    for data, spelled in ((Synthetic(examples=3, values=99), False), (Spelled(examples=3, values=27), True)):
        run = Run(Echo(), data, steps=1, batch=8, samples=Samples(n=4))
        drawn = []
        monkeypatch.setattr(watch, "grid", lambda *of, drawn=drawn: drawn.extend(of))
        report = SimpleNamespace(away=contextlib.nullcontext, curve=lambda: None, picture=lambda *_, **__: None)
        watch.Watch(run, report, ()).look(1, SimpleNamespace(params={}, ema={}))
        tokens = [run.source("test")[i]["tokens"] for i in (0, 1, 2, 0)]
        np.testing.assert_array_equal(drawn[0][:, 0, :, 0], tokens)
        assert drawn[1] == ([text8().decode(ids).rstrip() for ids in tokens] if spelled else None)


def test_what_a_run_names_gives_the_tokeniser(root, model, tmp_path):
    opened = models.open_model(model)
    for given in ({"text": "exports/t5"}, {"": "exports/flow"}, {"vae": "lost", "text": "exports/t5"}):
        run = Run(TASK, Synthetic(), steps=1, batch=8, weights=given)
        asked = dataclasses.replace(opened, folder=tmp_path, run=run, step=1)
        assert tokenizer.find(asked.task, asked.homes)[0](["a red cat"], 24)[0].any()
    export(asked, tmp_path / "out", "zoo", 1)
    assert (tmp_path / "out" / "spiece.model").read_bytes() == (root / "t5" / "spiece.model").read_bytes()
    with pytest.raises(UserError, match=r"--format stablehlo: .* takes captions, .*; use --format zoo"):
        export(asked, tmp_path / "program", "stablehlo", 1)
    assert not (tmp_path / "program").exists()
    lost = dataclasses.replace(asked, run=dataclasses.replace(run, weights={"text": "lost"}))
    with pytest.raises(UserError, match=rf"there is none in {tmp_path} or lost; copy it there .* --tokenizer FILE"):
        tokenizer.find(lost.task, lost.homes)
    small = dataclasses.replace(asked, task=dataclasses.replace(TASK, text=dataclasses.replace(TEXT, vocab=9)))
    with pytest.raises(UserError, match=r"pieces, and the text encoder knows 9 \(task.text.vocab\)"):
        tokenizer.find(small.task, small.homes)


PROMPTED = """
from dataclasses import replace
from config import *
from zoo.metrics.prompted import Prompted
from zoo.papers.typescore import TypeScore
from zoo.papers.typescore.extractors import Oracle

metric = Prompted(TypeScore(extractor=Oracle(), wanted="wanted.jsonl"), images=2, batch=4, every=1)
run = replace(config, weights={"vae": "exports/vae", "text": "exports/t5"}, workdir="typed", evals=(metric,))
"""


def test_a_run_is_measured_by_typescore_while_it_trains_and_after(capsys, root, model, monkeypatch, caplog):
    monkeypatch.syspath_prepend(str(root))
    (root / "prompted.py").write_text(PROMPTED)
    (root / "wanted.jsonl").write_text(
        "".join(
            json.dumps({"id": f"{i}", "instruction": f'a {c} cat "says {i}"'}) + "\n"
            for i, c in enumerate(("red", "blue"))
        )
    )
    read = []

    answers = [Extraction("says 0"), Extraction(""), Extraction("says 1"), Extraction("", error="no answer")]

    def extract(self, pictures, keep=None):
        read.extend(pictures)
        return [answers[(len(read) - 1) % 4]]

    monkeypatch.setattr(Oracle, "extract", extract)
    run = config.load("prompted.py:run")
    checks.check_looks(run)
    params = {**noise(TASK, 0.2, 0), "vae": noise(VAE, 0.2, 1), "text": noise(TEXT, 0.2, 2)}
    with Report(root / "typed", total=1, start=0, batch=8, quiet=True) as report:
        (measured,) = watch.Watch(run, report, ()).look(1, SimpleNamespace(params=params, ema={}))
    (found,) = [json.loads(line) for line in (root / "typed" / "metrics.jsonl").read_text().splitlines()]
    assert measured["typescore"] == found["typescore"]
    assert found["typescore"] == pytest.approx(75)
    assert found["step"] == 1
    assert (found["typescore_read"], found["failed"], found["prompted_images"]) == (3, 1, 4)
    assert found["typescore_failure"] == "no answer"
    assert found["typescore_extractor"].startswith("oracle ")
    # an imported model, of whose data nothing is known
    assert cli.main(["eval", str(model), "prompted.py:metric"]) == 1  # an image was not read
    said = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (said["typescore"], said["prompted_left_out"], said["typescore_style"]) == (found["typescore"], 0, None)
    for some in (read[:4], read[4:]):
        first = np.stack([np.asarray(picture, int) for picture in some])
        assert first.shape == (4, 8, 8, 3)
        assert (first[0] != first[1]).any()
        assert (first[0] != first[2]).any()
    said = refused(capsys, "eval", str(model), "prompted.py:metric", "tokenizer=no.model")
    assert "no.model is missing: it comes with the published text encoder" in said


def test_show_tells_the_memory_of_the_caches(capsys):
    said = ran(capsys, "show", "config.py", "task.latent=512,512", "samples.n=4")
    tokens, width = 512 * 512, 24  # keys and values of one layer, float32, the deep block also of the unguided half
    deep, shallow = (2 * rows * (tokens + seen) * width * 4 / 2**30 for rows, seen in ((8, 24), (4, 0)))
    assert f"while 4 samples are drawn with guidance, one block at a time: {deep:.3g} GiB for the deep block" in said
    assert f"{shallow:.3g} GiB for the shallow block" in said
    assert "while 16 samples" in ran(capsys, "show", "config.py")
    assert "key/value" not in ran(capsys, "show", "tarflow/digits:smoke")


def test_terms_follow_what_a_run_started_from(model):
    for given, told in (({"vae": "x"}, False), ({"": "x"}, True), ({"block0": "x"}, True)):
        run = Run(TASK, Synthetic(), steps=1, batch=8, weights=given)
        opened = dataclasses.replace(models.open_model(model), kind="raw", run=run)
        assert (_licence(opened) is not None) == told
