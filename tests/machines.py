"""Stand-ins for machines: a clone with a false `zoo`, and programs that log how they were called."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent

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

    def waiting(
        self, codes: list[str], script: str | Path, *words: str, hosts: Sequence[str] = ("",), **env: str
    ) -> subprocess.Popen[str]:
        """What has been started and waits on every host."""
        self.plan(*codes, hosts=hosts)
        process = self.start(script, *words, **env)
        self.until(len(hosts), waits=True)
        return process

    def after(self, process: subprocess.Popen[str], kind: signal.Signals | None = None) -> str:
        """What a process says until it ends well, having been sent a signal."""
        if kind:
            process.send_signal(kind)
        _, err = process.communicate(timeout=30)
        assert process.returncode == 0, err
        return err

    def log(self, name: str = "", **having: Any) -> list[dict[str, Any]]:
        path = self.state / "log"
        entries = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        if name == "zoo" and not having:
            entries = [e for e in entries if "extras" in e]  # its starts
        return [e for e in entries if not name or (e["name"] == name and having.items() <= e.items())]

    def plan(self, *codes: str, hosts: Sequence[str] = ("",)) -> None:
        for host in hosts:
            (self.state / f"plan{host}").write_text("\n".join(codes))

    def until(self, count: int, **having: Any) -> list[dict[str, Any]]:
        end = time.monotonic() + 30
        while len(found := self.log("zoo", **having)) < count:
            assert time.monotonic() < end, "nothing started"
            time.sleep(0.02)
        return found
