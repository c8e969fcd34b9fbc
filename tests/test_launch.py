"""The launchers: what they would run, quoted for two shells; retries, stops and requeues against stand-ins for the machines."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

ROOT = Path(__file__).parent.parent
LAUNCHERS = ("gpu.sh", "slurm.sh", "tpu_pod.sh", "gke.sh")
NEEDED = {
    "gpu.sh": [],
    "slurm.sh": [],
    "tpu_pod.sh": ["--tpu=my-tpu", "--zone", "us-east5-b", "--bucket", "gs://bucket/"],
    "gke.sh": ["--image=a.b/c:1", "--accelerator", "tpu-v6e-slice", "--topology=4x4", "--bucket", "gs://bucket/"],
}
HARD = [  # what a user may write and a shell may spoil
    'samples.options={"guidance": 2.0}',
    "data.path=/my images/it's $HOME",
    r"a=back\slash `date` $(HOSTNAME) ${ZOO_GRACE} 100% ~ * ? ; & | < > # !",
    "b=$$",
    "empty=",
]

# --- stand-ins ------------------------------------------------------------------------------------

PYTHON = f"#!{sys.executable} -IS\n"
LOG = """
import json, os, shutil, signal, subprocess, sys, time
from pathlib import Path
state = Path(os.environ["FAKES"])
def log(**entry):
    with open(state / "log", "a") as file:
        file.write(json.dumps({"name": Path(sys.argv[0]).name, "argv": sys.argv[1:], **entry}) + "\\n")
def pop(name, default):
    path = state / name
    lines = path.read_text().split("\\n") if path.exists() else []
    if lines:
        path.write_text("\\n".join(lines[1:]))
    return lines[0] if lines and lines[0] else default
"""
# Takes its exit codes from the file `plan`; "wait" waits for SIGTERM, which saves and exits 0.
ZOO = """
host = os.environ.get("HOST", "")
log(extras=os.environ["EXTRAS"], host=host, pid=os.getpid(), parent=os.getppid(), path=os.getcwd(),
    stdin=os.stat(0).st_rdev == os.stat("/dev/null").st_rdev)
todo = pop("plan" + host, "0")
if todo == "wait":
    signal.signal(signal.SIGTERM, lambda *_: (log(saved=True, host=host), os._exit(0)))
    signal.signal(signal.SIGINT, lambda *_: os._exit(9))
    log(waits=True, host=host)
    time.sleep(60)
    sys.exit(1)
sys.exit(int(todo))
"""
NVIDIA = "sys.exit(0)"
SBATCH = """
log()
script = next(i for i, word in enumerate(sys.argv[1:], 1) if not word.startswith("-"))
shutil.copy(sys.argv[script], state / "slurm_script")
(state / "job").write_text(json.dumps(sys.argv[script + 1:]))
print("Submitted batch job 7")
"""
# As the real one, it kills its tasks when it gets SIGTERM itself.
SRUN = """
log()
words = sys.argv[1:]
while words[0].startswith("-"):
    words.pop(0)
tasks = [subprocess.Popen(words, env={**os.environ, "HOST": str(i)}) for i in range(int(os.environ["SLURM_JOB_NUM_NODES"]))]
signal.signal(signal.SIGTERM, lambda *_: [task.kill() for task in tasks])
(state / "tasks").write_text(" ".join(str(task.pid) for task in tasks))
codes = [task.wait() for task in tasks]
sys.exit(max(code if code >= 0 else 128 - code for code in codes))
"""
SCANCEL = """
log()
for pid in (state / "tasks").read_text().split():
    os.kill(int(pid), signal.SIGTERM)
"""
# A pod of two hosts, whose homes are the folders host0 and host1.
GCLOUD = """
log()
verb = sys.argv[4]
hosts = [state / "host0", state / "host1"]
option = {word.partition("=")[0]: word.partition("=")[2] for word in sys.argv if word.startswith("--")}
if verb == "describe":
    print(pop("states", "ACTIVE" if "queued-resources" in sys.argv else "READY"))
elif verb == "scp":
    for host in hosts:
        host.mkdir(exist_ok=True)
        shutil.copy(sys.argv[5], host / sys.argv[6].partition(":")[2])
elif verb == "ssh":
    if "--inside" in option["--command"]:
        sent = pop("network", "")
        if sent:
            sys.exit(int(sent))
    running = [
        subprocess.Popen(["bash", "-c", option["--command"]], cwd=host, env={**os.environ, "HOME": str(host), "HOST": str(i)})
        for i, host in enumerate(hosts)
    ]
    codes = [one.wait() for one in running]
    sys.exit(next((code for code in codes if code), 0))
"""
KUBECTL = """
log(stdin=sys.stdin.read() if sys.argv[1] == "apply" else None)
if sys.argv[1] == "get":
    print((state / "conditions").read_text() if (state / "conditions").exists() else "")
"""
NEVER = "log(); sys.exit(99)"


def _heard() -> None:
    """Signals that whoever runs the tests ignores (nohup, a job in the background) could not be caught by a shell either."""
    for name in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM):
        signal.signal(name, signal.SIG_DFL)


class Machine:
    """A clone with a stand-in for local.sh, and programs that log how they were called."""

    def __init__(self, folder: Path, **programs: str) -> None:
        self.root, self.bin, self.state = folder / "a clone", folder / "bin", folder / "state"
        self.state.mkdir()
        self.bin.mkdir()
        shutil.copytree(ROOT / "launch", self.root / "launch")
        local = self.root / "launch/local.sh"
        local.write_text('#!/usr/bin/env bash\necho "$EXTRAS $*" >>"$FAKES/local"\nexec "$@"\n')
        for path in ("configs/tarflow/digits.py", "zoo/old.py"):
            (self.root / path).parent.mkdir(parents=True)
            (self.root / path).touch()
        for name, body in {"zoo": ZOO, **programs}.items():
            (self.bin / name).write_text(PYTHON + LOG + body)
            (self.bin / name).chmod(0o755)
        self.env = {
            "PATH": f"{self.bin}:/usr/local/bin:/usr/bin:/bin",
            "HOME": str(folder),
            "TMPDIR": str(folder),
            "FAKES": str(self.state),
            "ZOO_RETRY_PAUSE": "0",
            "ZOO_TPU_POLL": "0",
        }

    def start(self, script: str | Path, *words: str, **env: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            ["bash", self.root / "launch" / script, *words],
            cwd=self.root,
            env={**self.env, **env},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            preexec_fn=_heard,
        )

    def run(self, script: str | Path, *words: str, **env: str) -> subprocess.CompletedProcess[str]:
        process = self.start(script, *words, **env)
        out, err = process.communicate(timeout=60)
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)

    def log(self, name: str = "", **having: Any) -> list[dict[str, Any]]:
        path = self.state / "log"
        entries = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        if name == "zoo" and not having:
            entries = [e for e in entries if "extras" in e]  # its starts
        return [e for e in entries if not name or (e["name"] == name and having.items() <= e.items())]

    def plan(self, *codes: str, host: str = "") -> None:
        (self.state / f"plan{host}").write_text("\n".join(codes))

    def until(self, count: int, **having: Any) -> list[dict[str, Any]]:
        end = time.monotonic() + 30
        while len(found := self.log("zoo", **having)) < count:
            assert time.monotonic() < end, "nothing started"
            time.sleep(0.02)
        return found


def train(*words: str, config: str = "configs/tarflow/digits.py") -> list[str]:
    return ["train", config, *words]


# --- all of them ----------------------------------------------------------------------------------


def test_shellcheck() -> None:
    scripts = [*sorted((ROOT / "launch").glob("*.sh")), ROOT / ".ci/run"]
    assert len(scripts) == 8
    found = subprocess.run(
        [Path(sys.executable).parent / "shellcheck", "--external-sources", *scripts],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert found.returncode == 0, found.stdout + found.stderr


@pytest.mark.parametrize("script", LAUNCHERS)
def test_launchers_can_be_started(script: str) -> None:
    assert os.access(ROOT / "launch" / script, os.X_OK)


@pytest.fixture
def bare(tmp_path: Path) -> Machine:
    """A machine with a shell and nothing else: what needs gcloud, srun, kubectl or git fails."""
    machine = Machine(tmp_path)
    for name in ("bash", "env", "sed", "cat", "dirname", "basename", "tr"):
        (machine.bin / name).symlink_to(shutil.which(name) or "")
    machine.env["PATH"] = str(machine.bin)
    return machine


@pytest.mark.parametrize("script", LAUNCHERS)
def test_usage_and_mistakes(script: str, bare: Machine) -> None:
    shown = bare.run(script)
    assert shown.returncode == 2
    assert f"launch/{script}" in shown.stdout
    assert "CONFIG" in shown.stdout
    assert "--dry-run" in shown.stdout
    assert "set -euo" not in shown.stdout
    assert bare.run(script, "--help").returncode == 0
    for words, said in {
        ("--retires=3", "tarflow/digits"): "no option --retires",
        ("tarflow/digits", "--nope"): "no option --nope",
        ("tarflow/digits", "--"): "no option --",
        ("--dry-run",): "which CONFIG?",
        ("optim.lr=1", "tarflow/digits"): "CONFIG must come before optim.lr=1",
        ("tarflow/digits", "again"): "again is neither field=value nor --flag",
        ("tarflow/digits", "--retries"): "--retries needs a value",
        ("tarflow/digits", "--retries", "many"): "--retries many is no number",
    }.items():
        failed = bare.run(script, *NEEDED[script], *words)
        assert failed.returncode == 2, words
        assert said in failed.stderr
        assert failed.stderr.startswith(f"launch/{script}: ")
        assert failed.stderr.count("\n") == 1
        assert not failed.stdout
    assert not bare.log()


@pytest.mark.parametrize("script", LAUNCHERS)
def test_every_option_is_in_the_usage(script: str, bare: Machine) -> None:
    text = (ROOT / "launch" / script).read_text()
    valued, flags = re.search(r'^parse "(.*?)" "(.*?)" "\$@"', text, re.MULTILINE).groups()  # type: ignore[union-attr]
    known = {f"--{name}" for name in f"{valued} {flags} retries dry-run".split()}
    assert set(re.findall(r"^  (--[a-z-]+)", bare.run(script).stdout, re.MULTILINE)) == known


def test_the_flags_of_train_pass() -> None:
    from zoo.cli import _parser

    verbs = next(a for a in _parser()._actions if isinstance(a, argparse._SubParsersAction))
    flags = {f for a in verbs.choices["train"]._actions for f in a.option_strings} - {"-h", "--help"}
    lines = re.findall(r'^train_(?:flags|valued)="(.*)"', (ROOT / "launch/lib.sh").read_text(), re.MULTILINE)
    assert {flag for line in lines for flag in line.split()} == flags


def test_no_hyper_parameter() -> None:
    from zoo.run import Checkpoint, Mesh, Run, Samples
    from zoo.train.optim import AdamW

    names = {f.name for c in (Run, AdamW, Mesh, Checkpoint, Samples) for f in dataclasses.fields(c)} - {"workdir"}
    for path in (ROOT / "launch").iterdir():
        code = "\n".join(line for line in path.read_text().splitlines() if not line.lstrip().startswith("#"))
        assert not re.findall(rf"(?<![\w-])(?:\w+\.)*(?:{'|'.join(names)})=", code), path.name


# --- one node -------------------------------------------------------------------------------------


def test_gpu_dry_run(bare: Machine) -> None:
    shown = bare.run("gpu.sh", "configs/tarflow/digits.py", *HARD, "--quiet", "--dry-run", "--retries=3")
    local = str(bare.root / "launch/local.sh")
    expected = ["env", "EXTRAS=dev", local, "zoo", *train(*HARD, "--quiet")]
    assert [shlex.split(line) for line in shown.stdout.splitlines()] == [expected]
    assert shown.returncode == 0
    assert not shown.stderr
    assert not bare.log()
    shown = bare.run("gpu.sh", "--dry-run", "tarflow/digits", "workdir=gs://bucket/run")
    assert shlex.split(shown.stdout)[1] == "EXTRAS=dev,gcs"
    shown = bare.run("gpu.sh", "--dry-run", "tarflow/digits", "workdir=gs://bucket/run", EXTRAS="dev,torch")
    assert shlex.split(shown.stdout)[1] == "EXTRAS=dev,torch,gcs"
    shown = bare.run("gpu.sh", "--dry-run", "tarflow/digits", EXTRAS="gcs")
    assert shlex.split(shown.stdout)[1] == "EXTRAS=gcs"


def test_gpu_needs_a_driver(bare: Machine, tmp_path: Path) -> None:
    failed = bare.run("gpu.sh", "tarflow/digits")
    assert failed.returncode == 2
    assert "no NVIDIA driver" in failed.stderr
    (bare.bin / "nvidia-smi").write_text("#!/usr/bin/env bash\nexit 9\n")  # a driver that does not answer
    (bare.bin / "nvidia-smi").chmod(0o755)
    assert bare.run("gpu.sh", "tarflow/digits").returncode == 2
    assert not bare.log()


@pytest.fixture
def gpus(tmp_path: Path) -> Machine:
    return Machine(tmp_path, **{"nvidia-smi": NVIDIA})


@pytest.mark.parametrize(
    "codes,starts,code",
    [
        (["1", "137", "0"], 3, 0),
        (["2"], 1, 2),
        (["1", "2"], 2, 2),
        (["0"], 1, 0),
        (["1"] * 12, 11, 1),
    ],
)
def test_gpu_retries(codes: list[str], starts: int, code: int, gpus: Machine) -> None:
    gpus.plan(*codes)
    done = gpus.run("gpu.sh", "configs/tarflow/digits.py", *HARD)
    assert done.returncode == code
    assert [e["argv"] for e in gpus.log("zoo")] == [train(*HARD)] * starts
    assert {e["stdin"] for e in gpus.log("zoo")} == {True}
    assert ("no retry is left" in done.stderr) == (starts == 11)


def test_gpu_retries_as_often_as_asked(gpus: Machine) -> None:
    gpus.plan(*["1"] * 5)
    assert gpus.run("gpu.sh", "tarflow/digits", "--retries", "0").returncode == 1
    assert len(gpus.log("zoo")) == 1


@pytest.mark.parametrize("kind", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_gpu_hands_on_a_stop(kind: signal.Signals, gpus: Machine) -> None:
    gpus.plan("1", "wait", "0")
    process = gpus.start("gpu.sh", "tarflow/digits")
    gpus.until(1, waits=True)
    process.send_signal(kind)
    process.communicate(timeout=30)
    assert process.returncode == 0
    assert len(gpus.log("zoo", saved=True)) == 1
    assert len(gpus.log("zoo")) == 2  # nothing starts after a stop


def test_gpu_control_c_comes_as_a_stop(gpus: Machine) -> None:
    """A terminal sends SIGINT to the whole process group; the training hears of it from the launcher alone."""
    gpus.plan("wait")
    process = gpus.start("gpu.sh", "tarflow/digits")
    gpus.until(1, waits=True)
    os.killpg(process.pid, signal.SIGINT)
    process.communicate(timeout=30)
    assert process.returncode == 0
    assert len(gpus.log("zoo", saved=True)) == 1


def test_gpu_a_stop_ends_the_pause(gpus: Machine) -> None:
    gpus.plan("3", "0")
    process = gpus.start("gpu.sh", "tarflow/digits", ZOO_RETRY_PAUSE="600")
    assert process.stderr is not None
    assert "retry 1 of 10 in 600 seconds" in process.stderr.readline()
    time.sleep(0.1)
    process.terminate()
    process.communicate(timeout=30)
    assert process.returncode == 3
    assert len(gpus.log("zoo")) == 1


# --- Slurm ----------------------------------------------------------------------------------------


@pytest.fixture
def slurm(tmp_path: Path) -> Machine:
    machine = Machine(tmp_path, sbatch=SBATCH, srun=SRUN, scancel=SCANCEL, scontrol="log()")
    machine.env |= {"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "2"}
    return machine


def job(slurm: Machine, *words: str) -> tuple[Path, list[str]]:
    """Submits, and gives the copy that Slurm runs with its arguments."""
    done = slurm.run("slurm.sh", *words)
    assert done.returncode == 0, done.stderr
    return slurm.state / "slurm_script", json.loads((slurm.state / "job").read_text())


def test_slurm_dry_run(bare: Machine) -> None:
    shown = bare.run("slurm.sh", "--nodes=2", "configs/tarflow/digits.py", *HARD, "--dry-run", "--quiet")
    assert shown.returncode == 0
    lines = [shlex.split(line.removeprefix("#")) for line in shown.stdout.splitlines()]
    script = str(bare.root / "launch/slurm.sh")
    local = str(bare.root / "launch/local.sh")
    command = ["zoo", *train(*HARD, "--quiet")]
    assert lines[0][lines[0].index(script) :] == [script, "--inside", str(bare.root), "dev", "0", "10", *command]
    assert set(lines[0][: lines[0].index(script)]) == {
        "sbatch", "--job-name=tarflow-digits", "--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=8", "--time=24:00:00",
        "--exclusive", "--mem=0", "--signal=B:USR1@120", "--requeue", "--open-mode=append",
    }  # fmt: skip
    assert lines[2] == ["env", "EXTRAS=dev", local, "true"]
    assert lines[3] == [
        "srun", "--ntasks=2", "--ntasks-per-node=1", "--cpu-bind=none", "env", "EXTRAS=dev", local, *command
    ]  # fmt: skip
    assert not bare.log()
    failed = bare.run("slurm.sh", "tarflow/digits")
    assert failed.returncode == 2
    assert "sbatch is not here" in failed.stderr


def test_slurm_options(slurm: Machine) -> None:
    slurm.run(
        "slurm.sh", "--cpus=32", "--gpus", "h100:4", "--partition=p", "--grace=600", "--sbatch=--qos=long",
        "--sbatch", "--constraint=h100", "tarflow/digits:smoke", "workdir=gs://b/r",
        ZOO_SLURM_NODES="4", ZOO_SLURM_TIME="1-0", ZOO_SLURM_ACCOUNT="a", ZOO_SLURM_PARTITION="other",
    )  # fmt: skip
    words = slurm.log("sbatch")[0]["argv"]
    assert {
        "--job-name=tarflow-digits-smoke", "--cpus-per-task=32", "--gpus-per-node=h100:4", "--partition=p", "--qos=long",
        "--signal=B:USR1@600", "--constraint=h100", "--nodes=4", "--time=1-0", "--account=a",
    } <= set(words)  # fmt: skip
    assert "--exclusive" not in words
    assert words[words.index("--inside") + 2 : words.index("zoo")] == ["dev,gcs", "32", "10"]


def test_slurm_runs_one_process_per_node(slurm: Machine) -> None:
    script, words = job(slurm, "configs/tarflow/digits.py", *HARD)
    slurm.plan("1", "0", host="0")
    slurm.plan("134", "0", host="1")
    assert slurm.run(script, *words).returncode == 0
    installs = (slurm.state / "local").read_text().splitlines()
    assert installs[0] == "dev true"
    assert installs.count("dev true") == 1
    assert sorted((e["host"], e["argv"]) for e in slurm.log("zoo")) == [
        (host, train(*HARD)) for host in ("0", "0", "1", "1")
    ]
    assert [e["argv"][:3] for e in slurm.log("srun")] == [["--ntasks=2", "--ntasks-per-node=1", "--cpu-bind=none"]] * 2
    assert not slurm.log("scontrol")  # done is done


def test_slurm_a_mistake_is_not_tried_again(slurm: Machine) -> None:
    script, words = job(slurm, "tarflow/digits")
    slurm.plan("2", host="0")
    slurm.plan("2", host="1")
    assert slurm.run(script, *words).returncode == 2
    assert len(slurm.log("srun")) == 1
    assert not slurm.log("scontrol")


def test_slurm_gives_up_within_a_turn(slurm: Machine) -> None:
    script, words = job(slurm, "tarflow/digits", "--retries=1")
    slurm.plan(*["3"] * 4, host="0")
    assert slurm.run(script, *words).returncode == 3
    assert len(slurm.log("srun")) == 2
    assert not slurm.log("scontrol")


def test_slurm_saves_and_queues_up_again(slurm: Machine) -> None:
    """The warning reaches the training processes as SIGTERM, never srun, which would kill them."""
    script, words = job(slurm, "tarflow/digits")
    slurm.plan("wait", host="0")
    slurm.plan("wait", host="1")
    process = slurm.start(script, *words)
    slurm.until(2, waits=True)
    process.send_signal(signal.SIGUSR1)
    process.communicate(timeout=30)
    assert process.returncode == 0
    assert [e["argv"] for e in slurm.log("scancel")] == [["--signal=TERM", "7"]]
    assert len(slurm.log("zoo", saved=True)) == 2
    assert [e["argv"] for e in slurm.log("scontrol")] == [["requeue", "7"]]
    assert len(slurm.log("srun")) == 1


def test_slurm_a_cancelled_job_stays_cancelled(slurm: Machine) -> None:
    script, words = job(slurm, "tarflow/digits")
    slurm.plan("wait", host="0")
    slurm.plan("wait", host="1")
    process = slurm.start(script, *words)
    slurm.until(2, waits=True)
    process.terminate()  # Slurm sends it to the tasks as well
    for entry in slurm.log("zoo"):
        os.kill(entry["pid"], signal.SIGTERM)
    process.communicate(timeout=30)
    assert process.returncode == 0
    assert len(slurm.log("srun")) == 1
    assert not slurm.log("scontrol")


# --- a TPU pod ------------------------------------------------------------------------------------


@pytest.fixture
def pod(tmp_path: Path) -> Machine:
    machine = Machine(tmp_path, gcloud=GCLOUD)
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b", "-c", "init.defaultBranch=main"]
    for words in (["init", "-q"], ["add", "--all"], ["commit", "-qm", "all"]):
        subprocess.run([*git, *words], cwd=machine.root, check=True, env=machine.env)
    return machine


def pod_train(*words: str) -> list[str]:
    return train(*words, "workdir=gs://bucket/runs/tarflow-digits")


def test_pod_trains_on_all_hosts(pod: Machine) -> None:
    (pod.root / "configs/tarflow/new.py").touch()  # not yet added
    (pod.root / "configs/tarflow/digits.py").write_text("changed")
    (pod.root / "zoo/old.py").unlink()
    (pod.root / "notes.txt").touch()
    status = subprocess.run(["git", "status", "--short"], cwd=pod.root, capture_output=True, check=True, env=pod.env)
    done = pod.run("tpu_pod.sh", *NEEDED["tpu_pod.sh"], "--project", "p", "configs/tarflow/digits.py", *HARD, "--quiet")
    assert done.returncode == 0, done.stderr
    starts = pod.log("zoo")
    assert sorted(e["host"] for e in starts) == ["0", "1"]
    for entry in starts:
        clone = pod.state / f"host{entry['host']}/zoo-launch"
        assert entry["argv"] == pod_train(*HARD, "--quiet")
        assert entry["extras"] == "dev,gcs"
        assert entry["path"] == str(clone)
        assert (clone / "configs/tarflow/digits.py").read_text() == "changed"
        assert (clone / "configs/tarflow/new.py").exists()
        assert not (clone / "zoo/old.py").exists()
        assert not (clone / "notes.txt").exists()
    assert (pod.state / "local").read_text().splitlines()[:2] == ["dev,gcs true"] * 2
    for entry in pod.log("gcloud"):
        assert {"my-tpu", "--zone=us-east5-b", "--project=p"} <= {w.partition(":")[0] for w in entry["argv"]}
        assert entry["argv"][3] == "describe" or "--worker=all" in entry["argv"]
    after = subprocess.run(["git", "status", "--short"], cwd=pod.root, capture_output=True, check=True, env=pod.env)
    assert after.stdout == status.stdout  # the user's index is untouched
    assert not list(pod.bin.parent.glob("zoo-launch-*"))


def test_pod_dry_run_is_what_would_run(pod: Machine) -> None:
    """The lines that are shown, run by a shell, do the same as the launcher."""
    words = [*NEEDED["tpu_pod.sh"], "--setup", "echo 'set  up' >>\"$FAKES/setup\"", "configs/tarflow/digits.py", *HARD]
    shown = pod.run("tpu_pod.sh", *words, "--dry-run")
    assert shown.returncode == 0
    assert not pod.log()
    commands = [shlex.split(line) for line in shown.stdout.splitlines()]
    inner = next(w for w in commands[-1] if w.startswith("--command=")).removeprefix("--command=")
    assert shlex.split(inner)[-len(HARD) - 4 :] == ["zoo", *pod_train(*HARD)]

    def calls() -> list[list[str]]:
        return [[re.sub(r"zoo-launch-\d+", "zoo-launch-N", w) for w in e["argv"]] for e in pod.log("gcloud")]

    subprocess.run(["bash", "-ec", shown.stdout], cwd=pod.root, env=pod.env, check=True, timeout=60)
    first = calls()
    (pod.state / "log").unlink()
    assert pod.run("tpu_pod.sh", *words).returncode == 0
    assert calls() == first
    assert len(first) == 4
    assert (pod.state / "setup").read_text().splitlines() == ["set  up"] * 4


def test_pod_dry_run_needs_nothing(bare: Machine) -> None:
    shown = bare.run("tpu_pod.sh", *NEEDED["tpu_pod.sh"], "tarflow/digits", "--dry-run", EXTRAS="dev,torch")
    assert shown.returncode == 0, shown.stderr
    assert shown.stdout.replace("\\", "").count("EXTRAS=dev,torch,gcs launch/") == 2
    assert not bare.log()
    failed = bare.run("tpu_pod.sh", *NEEDED["tpu_pod.sh"], "tarflow/digits")
    assert failed.returncode == 2
    assert "gcloud is not here" in failed.stderr


def test_pod_retries(pod: Machine) -> None:
    (pod.state / "network").write_text("255\n")
    pod.plan("1", "0", host="0")
    pod.plan("134", "0", host="1")
    done = pod.run("tpu_pod.sh", *NEEDED["tpu_pod.sh"], "tarflow/digits")
    assert done.returncode == 0, done.stderr
    assert len(pod.log("zoo")) == 4
    assert "exit code 255; retry 1 of 10" in done.stderr
    assert "exit code 1; retry 2 of 10" in done.stderr


def test_pod_a_mistake_is_not_tried_again(pod: Machine) -> None:
    pod.plan("2", host="0")
    pod.plan("2", host="1")
    assert pod.run("tpu_pod.sh", *NEEDED["tpu_pod.sh"], "tarflow/digits").returncode == 2
    assert len(pod.log("zoo")) == 2


def test_pod_a_stop_reaches_every_host(pod: Machine) -> None:
    pod.plan("wait", "0", host="0")
    pod.plan("wait", "0", host="1")
    process = pod.start("tpu_pod.sh", *NEEDED["tpu_pod.sh"], "tarflow/digits")
    pod.until(2, waits=True)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 0, err
    assert {e["host"] for e in pod.log("zoo", saved=True)} == {"0", "1"}
    assert len(pod.log("zoo")) == 2


def test_pod_a_host_taken_away_is_no_end(pod: Machine) -> None:
    """One host is shut down, all save and exit 0: the run is not done, so all start again."""
    pod.plan("wait", "0", host="0")
    pod.plan("wait", "0", host="1")
    process = pod.start("tpu_pod.sh", *NEEDED["tpu_pod.sh"], "tarflow/digits")
    pod.until(2, waits=True)
    one, two = sorted(pod.log("zoo"), key=lambda e: e["host"])
    os.kill(two["parent"], signal.SIGTERM)
    os.kill(one["pid"], signal.SIGTERM)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 0, err
    assert "exit code 143; retry 1 of 10" in err
    assert len(pod.log("zoo")) == 4


def test_pod_a_process_left_over_ends_first(pod: Machine) -> None:
    pod.plan("wait", "0", host="0")
    process = pod.start("tpu_pod.sh", *NEEDED["tpu_pod.sh"], "tarflow/digits")
    pod.until(1, waits=True)
    process.kill()  # the launcher's machine goes down; the hosts go on
    done = pod.run("tpu_pod.sh", *NEEDED["tpu_pod.sh"], "tarflow/digits")
    assert done.returncode == 0, done.stderr
    entries = [e for e in pod.log() if e.get("host") == "0"]
    assert ["saved" in e for e in entries] == [False, False, True, False]  # a start, its wait, its save, a start
    process.communicate(timeout=30)


def test_pod_waits_for_repairs_and_names_what_is_gone(pod: Machine) -> None:
    (pod.state / "states").write_text("REPAIRING\nREPAIRING\nREADY\nPREEMPTED")
    pod.plan("1", host="0")
    done = pod.run("tpu_pod.sh", *NEEDED["tpu_pod.sh"], "tarflow/digits")
    assert done.returncode == 2
    assert done.stderr.count("my-tpu is REPAIRING; waiting") == 1
    assert "my-tpu is PREEMPTED; make it anew and start the same line again" in done.stderr


def test_pod_of_several_slices(pod: Machine) -> None:
    done = pod.run(
        "tpu_pod.sh", "--queued", "--internal-ip", "tarflow/digits", "--name=mine",
        ZOO_TPU_NAME="q", ZOO_TPU_ZONE="z", ZOO_TPU_PROJECT="p", ZOO_BUCKET="gs://b",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert {e["argv"][-1] for e in pod.log("zoo")} == {"workdir=gs://b/runs/mine"}
    for entry in pod.log("gcloud"):
        assert entry["argv"][:3] == ["compute", "tpus", "queued-resources"]
        assert {"--zone=z", "--project=p"} <= set(entry["argv"])
        if entry["argv"][3] != "describe":
            assert {"--node=all", "--worker=all", "--batch-size=all", "--internal-ip"} <= set(entry["argv"])


def test_where_a_run_is_saved_and_configs_lie(bare: Machine, tmp_path: Path) -> None:
    words = ["--tpu=t", "--zone=z", "--dry-run"]
    failed = bare.run("tpu_pod.sh", *words, "tarflow/digits")
    assert failed.returncode == 2
    assert "--bucket gs://BUCKET" in failed.stderr
    failed = bare.run("tpu_pod.sh", *words, "--bucket=b", "tarflow/digits")
    assert "--bucket b is no bucket" in failed.stderr
    shown = bare.run("tpu_pod.sh", *words, "tarflow/digits", "workdir=gs://mine/here")
    assert shown.stdout.rstrip().endswith("workdir=gs://mine/here")
    assert "runs/" not in shown.stdout
    failed = bare.run("tpu_pod.sh", *words, "--bucket=gs://b", "configs/tarflow/digit.py")
    assert "no config file configs/tarflow/digit.py" in failed.stderr
    (tmp_path / "mine.py").touch()
    failed = bare.run("tpu_pod.sh", *words, "--bucket=gs://b", str(tmp_path / "mine.py"))
    assert "outside the repository" in failed.stderr
    shown = bare.run("tpu_pod.sh", *words, "--bucket=gs://b", str(bare.root / "configs/tarflow/digits.py") + ":smoke")
    assert "train configs/tarflow/digits.py:smoke workdir=gs://b/runs/tarflow-digits-smoke" in shown.stdout.replace(
        "\\", ""
    )
    failed = bare.run("tpu_pod.sh", "--zone=z", "tarflow/digits")
    assert "which TPU?" in failed.stderr
    failed = bare.run("tpu_pod.sh", "--tpu=t", "tarflow/digits")
    assert "in which zone" in failed.stderr


# --- GKE ------------------------------------------------------------------------------------------


def thing(required: list[str] | None = None, **properties: Any) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": properties,
        "required": required or list(properties),
        "additionalProperties": False,
    }


TEXT = {"type": "string"}
WORDS = {"type": "array", "items": TEXT, "uniqueItems": True}
COUNT = {"type": "integer", "minimum": 0, "maximum": 2**31 - 1}
ANYTHING = {"type": "object"}

# The fields of jobset.x-k8s.io/v1alpha2 as its custom resource definition has them; a misspelt one would be dropped silently.
JOBSET = thing(
    apiVersion={"const": "jobset.x-k8s.io/v1alpha2"},
    kind={"const": "JobSet"},
    metadata=thing(
        ["name"],
        name={"type": "string", "pattern": "^[a-z]([-a-z0-9]*[a-z0-9])?$", "maxLength": 40},
        annotations={"type": "object", "additionalProperties": TEXT},
        labels={"type": "object", "additionalProperties": TEXT},
    ),
    spec=thing(
        ["replicatedJobs"],
        replicatedJobs={
            "type": "array",
            "minItems": 1,
            "items": thing(
                ["name", "template"],
                name=TEXT,
                groupName=TEXT,
                replicas=COUNT,
                template=thing(["spec"], metadata=ANYTHING, spec=ANYTHING),
                dependsOn={"type": "array", "items": thing(name=TEXT, status={"enum": ["Ready", "Complete"]})},
            ),
        },
        network=thing(
            [],
            enableDNSHostnames={"type": "boolean"},
            subdomain=TEXT,
            publishNotReadyAddresses={"type": "boolean"},
        ),
        successPolicy=thing(["operator"], operator={"enum": ["All", "Any"]}, targetReplicatedJobs=WORDS),
        failurePolicy=thing(
            [],
            maxRestarts=COUNT,
            restartStrategy={"enum": ["Recreate", "BlockingRecreate", "InPlaceRestart"]},
            rules={
                "type": "array",
                "items": thing(
                    ["name", "action"],
                    name={"type": "string", "pattern": "^[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?$"},
                    action={"enum": ["FailJobSet", "RestartJobSet", "RestartJobSetAndIgnoreMaxRestarts"]},
                    onJobFailureReasons={
                        "type": "array",
                        "items": {
                            "enum": [
                                "BackoffLimitExceeded",
                                "DeadlineExceeded",
                                "FailedIndexes",
                                "MaxFailedIndexesExceeded",
                                "PodFailurePolicy",
                            ]
                        },
                    },
                    onJobFailureMessagePatterns=WORDS,
                    targetReplicatedJobs=WORDS,
                ),
            },
        ),
        startupPolicy=thing(startupPolicyOrder={"enum": ["AnyOrder", "InOrder"]}),
        suspend={"type": "boolean"},
        coordinator=thing(["replicatedJob"], replicatedJob=TEXT, jobIndex=COUNT, podIndex=COUNT),
        managedBy=TEXT,
        ttlSecondsAfterFinished=COUNT,
        volumeClaimPolicies={"type": "array"},
    ),
)


def expanded(text: str, env: dict[str, str]) -> str:
    """What Kubernetes makes of an argument: $(NAME) becomes its value where there is one, $$ becomes $."""

    def value(match: re.Match[str]) -> str:
        if match[0] == "$$":
            return "$"
        return env.get(match[1], match[0])

    return re.sub(r"\$\$|\$\(([^)]*)\)", value, text)


def checked(text: str) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """The JobSet, its one replicated job and the one container, after both schemas."""
    jobset = yaml.safe_load(text)
    jsonschema.validate(jobset, JOBSET)
    (replicated,) = jobset["spec"]["replicatedJobs"]
    as_job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "slice"}, **replicated["template"]}
    kubernetes_validate.validate(as_job, kubernetes_validate.latest_version(), strict=True)
    (container,) = replicated["template"]["spec"]["template"]["spec"]["containers"]
    return jobset, replicated, container


def test_gke_manifest(bare: Machine) -> None:
    shown = bare.run(
        "gke.sh", *NEEDED["gke.sh"], "configs/tarflow/digits.py", *HARD, "--quiet", "--dry-run",
        "--retries=7", "--grace=600", "--slices=2", "--service-account=writer",
    )  # fmt: skip
    assert shown.returncode == 0, shown.stderr
    assert shown.stdout.startswith("# kubectl apply -f -\n")
    assert "${" not in shown.stdout.replace("$${ZOO_GRACE}", "")
    jobset, replicated, container = checked(shown.stdout)
    assert jobset["metadata"]["name"] == "tarflow-digits"
    spec = replicated["template"]["spec"]
    pod = spec["template"]["spec"]
    assert replicated["replicas"] == 2
    assert (spec["completions"], spec["parallelism"], spec["completionMode"]) == (4, 4, "Indexed")
    assert pod["terminationGracePeriodSeconds"] == 600
    assert pod["serviceAccountName"] == "writer"
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v6e-slice",
        "cloud.google.com/gke-tpu-topology": "4x4",
    }
    assert container["image"] == "a.b/c:1"
    assert container["resources"] == {"limits": {"google.com/tpu": 4}}
    assert container["command"] == ["/zoo/launch/gke.sh", "--inside"]
    env = {e["name"]: e["value"] for e in container["env"]}
    assert env == {"EXTRAS": "dev,gcs"}
    words = [expanded(word, {**env, "HOSTNAME": "spoilt"}) for word in container["args"]]
    assert words == ["zoo", *train(*HARD, "--quiet", "workdir=gs://bucket/runs/tarflow-digits")]
    assert not bare.log()

    # A mistake fails the Job with the reason PodFailurePolicy, and that the JobSet; all else starts again.
    (rule,) = spec["podFailurePolicy"]["rules"]
    assert rule["action"] == "FailJob"
    assert rule["onExitCodes"] == {"containerName": container["name"], "operator": "In", "values": [2]}
    assert (pod["restartPolicy"], spec["backoffLimit"]) == ("Never", 0)
    policy = jobset["spec"]["failurePolicy"]
    assert policy["maxRestarts"] == 7
    assert [(r["action"], r["onJobFailureReasons"]) for r in policy["rules"]] == [("FailJobSet", ["PodFailurePolicy"])]


def test_the_schemas_are_strict(bare: Machine) -> None:
    text = bare.run("gke.sh", *NEEDED["gke.sh"], "tarflow/digits", "--dry-run").stdout
    for word, wrong in {
        "maxRestarts:": "maxRestart:",
        "FailJobSet": "Fail",
        "replicas: 1": "replicas: one",
        "onJobFailureReasons: [PodFailurePolicy]": "onJobFailureReasons: [PodFailure]",
        "completionMode:": "completionmode:",
        "terminationGracePeriodSeconds: 300": "terminationGracePeriodSeconds: long",
        "onExitCodes:": "onExitCode:",
    }.items():
        assert text.count(word) == 1
        with pytest.raises((jsonschema.ValidationError, kubernetes_validate.ValidationError)):
            checked(text.replace(word, wrong))


@pytest.mark.skipif(not shutil.which("envsubst"), reason="envsubst is missing here")
def test_gke_manifest_by_hand(bare: Machine) -> None:
    text = bare.run("gke.sh", *NEEDED["gke.sh"], "tarflow/digits", "--dry-run").stdout
    values = {
        "ZOO_NAME": "tarflow-digits",
        "ZOO_IMAGE": "a.b/c:1",
        "ZOO_ARGS": '["zoo", "train", "tarflow/digits", "workdir=gs://bucket/runs/tarflow-digits"]',
        "ZOO_TPU_ACCELERATOR": "tpu-v6e-slice",
        "ZOO_TPU_TOPOLOGY": "4x4",
        "ZOO_TPU_CHIPS": "4",
        "ZOO_HOSTS": "4",
        "ZOO_SLICES": "1",
        "ZOO_RETRIES": "10",
        "ZOO_GRACE": "300",
        "ZOO_SERVICE_ACCOUNT": "default",
    }
    template = (ROOT / "launch/gke.yaml").read_text()
    assert set(re.findall(r"\$\{(\w+)\}", template)) == set(values)
    assert set(re.findall(r"^#   (ZOO_\w+)", template, re.MULTILINE)) == set(values)
    filled = subprocess.run(["envsubst"], input=template, env=values, capture_output=True, text=True, check=True)
    assert yaml.safe_load(filled.stdout) == yaml.safe_load(text)


@pytest.mark.parametrize(
    "words,hosts,chips",
    [
        (["--topology=2x2x2"], 2, 4),
        (["--topology=16x16"], 64, 4),
        (["--topology=2x4", "--chips=8"], 1, 8),
        (["--topology=1x1", "--chips=1"], 1, 1),
    ],
)
def test_gke_counts_hosts(words: list[str], hosts: int, chips: int, bare: Machine) -> None:
    shown = bare.run("gke.sh", *NEEDED["gke.sh"], *words, "tarflow/digits", "--dry-run")
    _, replicated, container = checked(shown.stdout)
    assert replicated["template"]["spec"]["completions"] == hosts
    assert container["resources"]["limits"]["google.com/tpu"] == chips


def test_gke_mistakes(bare: Machine) -> None:
    for words, said in {
        ("--topology=4",): "--topology '4' is none",
        ("--topology=2x2", "--chips=8"): "has 4 chips, which --chips 8 per host do not divide",
        ("--chips=0",): "do not divide",
        ("--slices=0",): "--slices 0",
        ("--name=Not_this",): "--name 'Not_this' is no name",
        ("--image=a b",): "holds characters",
        ("--bucket=there",): "is no bucket",
        ("--image=",): "which image?",
        ("--accelerator=",): "which TPU?",
        ("a=two\nlines",): "line break",
    }.items():
        failed = bare.run("gke.sh", *NEEDED["gke.sh"], "tarflow/digits", *words, "--dry-run")
        assert failed.returncode == 2, words
        assert said in failed.stderr
        assert failed.stderr.count("\n") == 1
        assert not failed.stdout
    assert "kubectl is not here" in bare.run("gke.sh", *NEEDED["gke.sh"], "tarflow/digits").stderr


@pytest.mark.parametrize("conditions", ["", "StartupPolicyCompleted", "StartupPolicyCompleted Completed", "Failed"])
def test_gke_applies(conditions: str, tmp_path: Path) -> None:
    """A JobSet that has ended makes room for the same run; one that is at work is left alone."""
    machine = Machine(tmp_path, kubectl=KUBECTL)
    (machine.state / "conditions").write_text(conditions)
    done = machine.run("gke.sh", *NEEDED["gke.sh"], "tarflow/digits")
    assert done.returncode == 0, done.stderr
    calls = machine.log("kubectl")
    ended = conditions.rpartition(" ")[2] in ("Completed", "Failed")
    assert [e["argv"][0] for e in calls] == ["get", *["delete"] * ended, "apply"]
    shown = machine.run("gke.sh", *NEEDED["gke.sh"], "tarflow/digits", "--dry-run")
    assert shown.stdout.partition("\n")[2].rstrip() == calls[-1]["stdin"].rstrip()


@pytest.mark.parametrize("code", ["0", "2", "1"])
def test_gke_container_hands_on_the_exit_code(code: str, gpus: Machine) -> None:
    gpus.plan(code)
    done = gpus.run("gke.sh", "--inside", "zoo", "train", "tarflow/digits", *HARD, EXTRAS="dev,gcs")
    assert done.returncode == int(code)
    assert [e["argv"] for e in gpus.log("zoo")] == [train(*HARD, config="tarflow/digits")]


def test_gke_container_stopped_is_no_success(gpus: Machine) -> None:
    gpus.plan("wait")
    process = gpus.start("gke.sh", "--inside", "zoo", "train", "tarflow/digits", EXTRAS="dev,gcs")
    gpus.until(1, waits=True)
    process.terminate()
    process.communicate(timeout=30)
    assert process.returncode == 143
    assert len(gpus.log("zoo", saved=True)) == 1
