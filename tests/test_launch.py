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
from collections.abc import Callable
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from machines import GCLOUD, KUBECTL, NVIDIA, ROOT, SBATCH, SCANCEL, SRUN, Machine

from zoo.commands import train as train_command

LAUNCHERS = ("gpu.sh", "slurm.sh", "tpu_pod.sh", "gke.sh")
TPU = ("tpu_pod.sh", "tarflow/digits", "--tpu=t", "--zone=z")
POD = ("tpu_pod.sh", "--tpu=my-tpu", "--zone", "us-east5-b", "--bucket", "gs://bucket/")
GKE = ("gke.sh", "--image=a.b/c:1", "--accelerator", "tpu-v6e-slice", "--topology=4x4", "--bucket", "gs://bucket/")
HARD = [  # what a user may write and a shell may spoil
    'samples.options={"guidance": 2.0}',
    "data.path=/my images/it's $HOME",
    r"a=back\slash `date` $(HOSTNAME) ${ZOO_GRACE} 100% ~ * ? ; & | < > # !",
    "b=$$",
    "empty=",
]


def train(*words: str, config: str = "configs/tarflow/digits.py") -> list[str]:
    return ["train", config, *words]


# --- all of them ----------------------------------------------------------------------------------


def test_shellcheck() -> None:
    scripts = [*sorted((ROOT / "launch").glob("*.sh")), ROOT / ".ci/run"]
    assert len(scripts) == 8
    assert all(os.access(ROOT / "launch" / script, os.X_OK) for script in LAUNCHERS)
    found = subprocess.run(
        [Path(sys.executable).parent / "shellcheck", "--external-sources", *scripts],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert found.returncode == 0, found.stdout + found.stderr


@pytest.fixture
def bare(tmp_path: Path) -> Machine:
    """A machine with a shell and nothing else: what needs gcloud, srun, kubectl or git fails."""
    machine = Machine(tmp_path)
    for name in ("bash", "env", "sed", "cat", "dirname", "basename", "tr"):
        (machine.bin / name).symlink_to(shutil.which(name) or "")
    (machine.bin / "nvidia-smi").symlink_to(shutil.which("false") or "")  # a driver that does not answer
    machine.env["PATH"] = str(machine.bin)
    return machine


@pytest.mark.parametrize("script", LAUNCHERS)
def test_usage(script: str, bare: Machine) -> None:
    shown = bare.run(script)
    assert shown.returncode == 2
    assert all(word in shown.stdout for word in (f"launch/{script}", "CONFIG", "--dry-run"))
    assert "set -euo" not in shown.stdout
    assert bare.run(script, "--help").returncode == 0
    text = (ROOT / "launch" / script).read_text()
    valued, flags = re.search(r'^parse "(.*?)" "(.*?)" "\$@"', text, re.MULTILINE).groups()  # type: ignore[union-attr]
    known = {f"--{name}" for name in f"{valued} {flags} retries dry-run".split()}
    assert set(re.findall(r"^  (--[a-z-]+)", shown.stdout, re.MULTILINE)) == known


MISTAKES = {  # a command, and what its sentence must name
    ("gpu.sh", "--retires=3", "tarflow/digits"): "--retires",
    ("gpu.sh", "tarflow/digits", "--"): "--",
    ("gpu.sh", "--dry-run"): "CONFIG",
    ("gpu.sh", "optim.lr=1", "tarflow/digits"): "CONFIG optim.lr=1",
    ("gpu.sh", "tarflow/digits", "again"): "again",
    ("gpu.sh", "tarflow/digits", "--retries"): "--retries",
    ("gpu.sh", "tarflow/digits", "--retries", "many"): "--retries many",
    ("gpu.sh", "tarflow/digits"): "NVIDIA",
    ("slurm.sh", "tarflow/digits"): "sbatch",
    ("slurm.sh", "tarflow/digits", "--gpus=many"): "--gpus many",
    (*TPU, "--bucket=gs://b"): "gcloud",
    TPU: "--bucket gs://BUCKET",
    (*TPU, "--bucket=b"): "--bucket b",
    (*TPU, "--tpu=", "--bucket=gs://b"): "--tpu",
    ("tpu_pod.sh", "configs/tarflow/digit.py", *TPU[2:], "--bucket=gs://b"): "configs/tarflow/digit.py",
    ("tpu_pod.sh", "../mine.py", *TPU[2:], "--bucket=gs://b"): "mine.py outside",
    (*GKE, "tarflow/digits"): "kubectl",
    (*GKE, "tarflow/digits", "--topology=4"): "--topology '4'",
    (*GKE, "tarflow/digits", "--topology=2x2", "--chips=8"): "4 --chips 8",
    (*GKE, "tarflow/digits", "--chips=0"): "--chips 0",
    (*GKE, "tarflow/digits", "--name=Not_this"): "--name 'Not_this'",
    (*GKE, "tarflow/digits", "--image=a b"): "'a b'",
    (*GKE, "tarflow/digits", "--image="): "--image",
    (*GKE, "tarflow/digits", "a=two\nlines"): "line break",
}


@pytest.mark.parametrize("words", MISTAKES, ids=" ".join)
def test_a_mistake_is_one_line_that_names_it_and_starts_nothing(words: tuple[str, ...], bare: Machine) -> None:
    (bare.root.parent / "mine.py").touch()
    failed = bare.run(*words)
    assert (failed.returncode, failed.stdout) == (2, "")
    assert failed.stderr.startswith(f"launch/{words[0]}: ")
    assert failed.stderr.count("\n") == 1
    assert [word for word in MISTAKES[words].split() if word not in failed.stderr] == [], failed.stderr
    assert not bare.log()


def test_the_flags_of_train_pass() -> None:
    train_command.add(parser := argparse.ArgumentParser(add_help=False))
    flags = {f for action in parser._actions for f in action.option_strings}
    lines = re.findall(r'^train_(?:flags|valued)="(.*)"', (ROOT / "launch/lib.sh").read_text(), re.MULTILINE)
    assert {flag for line in lines for flag in line.split()} == flags


def test_no_hyper_parameter() -> None:
    from zoo.run import Checkpoint, Mesh, Run, Samples
    from zoo.train.optim import AdamW

    names = {f.name for c in (Run, AdamW, Mesh, Checkpoint, Samples) for f in dataclasses.fields(c)} - {"workdir"}
    for path in (p for p in (ROOT / "launch").iterdir() if p.suffix != ".md"):
        code = "\n".join(line for line in path.read_text().splitlines() if not line.lstrip().startswith("#"))
        assert not re.findall(rf"(?<![\w-])(?:\w+\.)*(?:{'|'.join(names)})=", code), path.name


# --- one node -------------------------------------------------------------------------------------


def test_gpu_dry_run(bare: Machine) -> None:
    shown = bare.run("gpu.sh", "configs/tarflow/digits.py", *HARD, "--quiet", "--dry-run", "--retries=3")
    local = str(bare.root / "launch/local.sh")
    expected = ["env", "EXTRAS=dev", local, "zoo", *train(*HARD, "--quiet")]
    assert [shlex.split(line) for line in shown.stdout.splitlines()] == [expected]
    assert (shown.returncode, shown.stderr) == (0, "")
    assert not bare.log()
    for given, words, extras in (
        ({}, ["workdir=gs://bucket/run"], "dev,gcs"),
        ({"EXTRAS": "dev,torch"}, ["workdir=gs://bucket/run"], "dev,torch,gcs"),
        ({"EXTRAS": "gcs"}, [], "gcs"),
    ):
        shown = bare.run("gpu.sh", "--dry-run", "tarflow/digits", *words, **given)
        assert shlex.split(shown.stdout)[1] == f"EXTRAS={extras}"


@pytest.fixture
def gpus(tmp_path: Path) -> Machine:
    return Machine(tmp_path, **{"nvidia-smi": NVIDIA})


@pytest.mark.parametrize(
    "codes, starts, code, words",
    [
        (["1", "137", "0"], 3, 0, []),
        (["2"], 1, 2, []),
        (["1", "2"], 2, 2, []),
        (["1"] * 12, 11, 1, []),
        (["1"] * 5, 1, 1, ["--retries=0"]),
    ],
)
def test_gpu_retries(codes: list[str], starts: int, code: int, words: list[str], gpus: Machine) -> None:
    gpus.plan(*codes)
    done = gpus.run("gpu.sh", "configs/tarflow/digits.py", *HARD, *words)
    assert done.returncode == code
    assert [e["argv"] for e in gpus.log("zoo")] == [train(*HARD)] * starts
    assert {e["stdin"] for e in gpus.log("zoo")} == {True}
    assert ("no retry is left" in done.stderr) == (code == 1)


@pytest.mark.parametrize(
    "kind, send",
    [(kind, os.kill) for kind in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)] + [(signal.SIGINT, os.killpg)],
)
def test_gpu_hands_on_a_stop(kind: signal.Signals, send: Callable[[int, int], None], gpus: Machine) -> None:
    """A terminal sends SIGINT to the whole process group; the training hears of it from the launcher alone."""
    process = gpus.waiting(["1", "wait", "0"], "gpu.sh", "tarflow/digits")
    send(process.pid, kind)
    gpus.after(process)
    assert len(gpus.log("zoo", saved=True)) == 1
    assert len(gpus.log("zoo")) == 2  # nothing starts after a stop


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
    slurm.plan("1", "0", hosts="0")
    slurm.plan("134", "0", hosts="1")
    assert slurm.run(script, *words).returncode == 0
    installs = (slurm.state / "local").read_text().splitlines()
    assert installs[0] == "dev true"
    assert installs.count("dev true") == 1
    assert sorted((e["host"], e["argv"]) for e in slurm.log("zoo")) == [
        (host, train(*HARD)) for host in ("0", "0", "1", "1")
    ]
    assert [e["argv"][:3] for e in slurm.log("srun")] == [["--ntasks=2", "--ntasks-per-node=1", "--cpu-bind=none"]] * 2
    assert not slurm.log("scontrol")  # done is done


@pytest.mark.parametrize("code, tries", [(2, 1), (3, 2)])
def test_slurm_tries_within_a_turn_what_is_no_mistake(code: int, tries: int, slurm: Machine) -> None:
    script, words = job(slurm, "tarflow/digits", "--retries=1")
    slurm.plan(*[str(code)] * 4, hosts="01")
    assert slurm.run(script, *words).returncode == code
    assert len(slurm.log("srun")) == tries
    assert not slurm.log("scontrol")


def test_slurm_saves_and_queues_up_again(slurm: Machine) -> None:
    """The warning reaches the training processes as SIGTERM, never srun, which would kill them."""
    script, words = job(slurm, "tarflow/digits")
    process = slurm.waiting(["wait"], script, *words, hosts="01")
    slurm.after(process, signal.SIGUSR1)
    assert [e["argv"] for e in slurm.log("scancel")] == [["--signal=TERM", "7"]]
    assert len(slurm.log("zoo", saved=True)) == 2
    assert [e["argv"] for e in slurm.log("scontrol")] == [["requeue", "7"]]
    assert len(slurm.log("srun")) == 1


def test_slurm_a_cancelled_job_stays_cancelled(slurm: Machine) -> None:
    script, words = job(slurm, "tarflow/digits")
    process = slurm.waiting(["wait"], script, *words, hosts="01")
    process.terminate()  # Slurm sends it to the tasks as well
    for entry in slurm.log("zoo"):
        os.kill(entry["pid"], signal.SIGTERM)
    slurm.after(process)
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
    done = pod.run(*POD, "--project", "p", "configs/tarflow/digits.py", *HARD, "--quiet")
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
    words = [*POD, "--setup", "echo 'set  up' >>\"$FAKES/setup\"", "configs/tarflow/digits.py", *HARD]
    shown = pod.run(*words, "--dry-run")
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
    assert pod.run(*words).returncode == 0
    assert calls() == first
    assert len(first) == 4
    assert (pod.state / "setup").read_text().splitlines() == ["set  up"] * 4


def test_pod_dry_run_needs_nothing(bare: Machine) -> None:
    shown = bare.run(*POD, "tarflow/digits", "--dry-run", EXTRAS="dev,torch")
    assert shown.returncode == 0, shown.stderr
    assert shown.stdout.replace("\\", "").count("EXTRAS=dev,torch,gcs launch/") == 2
    assert not bare.log()


def test_pod_retries(pod: Machine) -> None:
    (pod.state / "network").write_text("255\n")
    pod.plan("1", "0", hosts="0")
    pod.plan("134", "0", hosts="1")
    done = pod.run(*POD, "tarflow/digits")
    assert done.returncode == 0, done.stderr
    assert len(pod.log("zoo")) == 4
    assert "exit code 255; retry 1 of 10" in done.stderr
    assert "exit code 1; retry 2 of 10" in done.stderr
    pod.plan("2", hosts="01")  # a mistake
    assert pod.run(*POD, "tarflow/digits").returncode == 2
    assert len(pod.log("zoo")) == 6


def test_pod_a_stop_reaches_every_host(pod: Machine) -> None:
    process = pod.waiting(["wait", "0"], *POD, "tarflow/digits", hosts="01")
    pod.after(process, signal.SIGINT)
    assert {e["host"] for e in pod.log("zoo", saved=True)} == {"0", "1"}
    assert len(pod.log("zoo")) == 2


def test_pod_a_host_taken_away_is_no_end(pod: Machine) -> None:
    """One host is shut down, all save and exit 0: the run is not done, so all start again."""
    process = pod.waiting(["wait", "0"], *POD, "tarflow/digits", hosts="01")
    one, two = sorted(pod.log("zoo"), key=lambda e: e["host"])
    os.kill(two["parent"], signal.SIGTERM)
    os.kill(one["pid"], signal.SIGTERM)
    assert "exit code 143; retry 1 of 10" in pod.after(process)
    assert len(pod.log("zoo")) == 4


def test_pod_a_process_left_over_ends_first(pod: Machine) -> None:
    process = pod.waiting(["wait", "0"], *POD, "tarflow/digits", hosts="0")
    process.kill()  # the launcher's machine goes down; the hosts go on
    done = pod.run(*POD, "tarflow/digits")
    assert done.returncode == 0, done.stderr
    entries = [e for e in pod.log() if e.get("host") == "0"]
    assert ["saved" in e for e in entries] == [False, False, True, False]  # a start, its wait, its save, a start
    process.communicate(timeout=30)


def test_pod_waits_for_repairs_and_names_what_is_gone(pod: Machine) -> None:
    (pod.state / "states").write_text("REPAIRING\nREPAIRING\nREADY\nPREEMPTED")
    pod.plan("1", hosts="0")
    done = pod.run(*POD, "tarflow/digits")
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


def test_where_a_run_is_saved_and_configs_lie(bare: Machine) -> None:
    shown = bare.run(*TPU, "--dry-run", "workdir=gs://mine/here")
    assert shown.stdout.rstrip().endswith("workdir=gs://mine/here")
    path = f"{bare.root}/configs/tarflow/digits.py:smoke"
    shown = bare.run("tpu_pod.sh", path, *TPU[2:], "--bucket=gs://b", "--dry-run")
    words = shown.stdout.replace("\\", "")
    assert "train configs/tarflow/digits.py:smoke workdir=gs://b/runs/tarflow-digits-smoke" in words


# --- GKE ------------------------------------------------------------------------------------------


def expanded(text: str, env: dict[str, str]) -> str:
    """What Kubernetes makes of an argument: $(NAME) becomes its value where there is one, $$ becomes $."""
    return re.sub(r"\$\$|\$\(([^)]*)\)", lambda m: "$" if m[0] == "$$" else env.get(m[1], m[0]), text)


def checked(text: str) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """The JobSet, its one replicated job, which Kubernetes' own schema allows, and the one container."""
    jobset = yaml.safe_load(text)
    (replicated,) = jobset["spec"]["replicatedJobs"]
    as_job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "slice"}, **replicated["template"]}
    kubernetes_validate.validate(as_job, kubernetes_validate.latest_version(), strict=True)
    (container,) = replicated["template"]["spec"]["template"]["spec"]["containers"]
    return jobset, replicated, container


def test_gke_manifest(bare: Machine) -> None:
    shown = bare.run(
        *GKE, "configs/tarflow/digits.py", *HARD, "--quiet", "--dry-run",
        "--retries=7", "--grace=600", "--slices=2", "--service-account=writer",
    )  # fmt: skip
    assert shown.returncode == 0, shown.stderr
    assert shown.stdout.startswith("# kubectl apply -f -\n")
    assert "${" not in shown.stdout.replace("$${ZOO_GRACE}", "")
    jobset, replicated, container = checked(shown.stdout)
    spec = replicated["template"]["spec"]
    pod = spec["template"]["spec"]
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
    assert jobset == {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": {
            "name": "tarflow-digits",
            "annotations": {"alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"},
        },
        "spec": {
            "failurePolicy": {
                "maxRestarts": 7,
                "restartStrategy": "BlockingRecreate",
                "rules": [
                    {"name": "mistake", "action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]},
                ],
            },
            "replicatedJobs": [{"name": "slice", "replicas": 2, "template": {"spec": spec}}],
        },
    }


@pytest.mark.skipif(not shutil.which("envsubst"), reason="envsubst is missing here")
def test_gke_manifest_by_hand(bare: Machine) -> None:
    text = bare.run(*GKE, "tarflow/digits", "--dry-run").stdout
    with pytest.raises(kubernetes_validate.ValidationError):  # a misspelt field is found
        checked(text.replace("completionMode:", "completionmode:"))
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
    shown = bare.run(*GKE, *words, "tarflow/digits", "--dry-run")
    _, replicated, container = checked(shown.stdout)
    assert replicated["template"]["spec"]["completions"] == hosts
    assert container["resources"]["limits"]["google.com/tpu"] == chips


@pytest.mark.parametrize("conditions", ["", "StartupPolicyCompleted", "StartupPolicyCompleted Completed", "Failed"])
def test_gke_applies(conditions: str, tmp_path: Path) -> None:
    """A JobSet that has ended makes room for the same run; one that is at work is left alone."""
    machine = Machine(tmp_path, kubectl=KUBECTL)
    (machine.state / "conditions").write_text(conditions)
    done = machine.run(*GKE, "tarflow/digits")
    assert done.returncode == 0, done.stderr
    calls = machine.log("kubectl")
    ended = conditions.rpartition(" ")[2] in ("Completed", "Failed")
    assert [e["argv"][0] for e in calls] == ["get", *["delete"] * ended, "apply"]
    shown = machine.run(*GKE, "tarflow/digits", "--dry-run")
    assert shown.stdout.partition("\n")[2].rstrip() == calls[-1]["stdin"].rstrip()


@pytest.mark.parametrize("code", ["0", "2", "1"])
def test_gke_container_hands_on_the_exit_code(code: str, gpus: Machine) -> None:
    gpus.plan(code)
    done = gpus.run("gke.sh", "--inside", "zoo", "train", "tarflow/digits", *HARD, EXTRAS="dev,gcs")
    assert done.returncode == int(code)
    assert [e["argv"] for e in gpus.log("zoo")] == [train(*HARD, config="tarflow/digits")]


def test_gke_container_stopped_is_no_success(gpus: Machine) -> None:
    process = gpus.waiting(["wait"], "gke.sh", "--inside", "zoo", "train", "tarflow/digits", EXTRAS="dev,gcs")
    process.terminate()
    process.communicate(timeout=30)
    assert process.returncode == 143
    assert len(gpus.log("zoo", saved=True)) == 1
