"""Several processes that train one model: how they find each other, agree, and stop together.

Everything here is a no-op in a process of its own. JAX starts a small service beside process 0, through which messages go
that are not arrays: a config to compare, a reason to stop. A thread in every process looks for such a reason, and for
processes that no longer answer, so that nobody waits for ever in an exchange of arrays with a process that is gone.
"""

from __future__ import annotations

import contextlib
import glob
import json
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from zoo.errors import Retryable, UserError
from zoo.files import differences, first_line

_log = logging.getLogger("zoo")
_BEAT = 1.0  # seconds between two signs of life
_MEET = 300.0  # seconds that processes wait for each other where one may have more to do: to start, to look at data
_TIDY = 60.0  # seconds that a process which fails has to save its records before it is ended
_MISTAKE, _AGAIN = 2, 3  # exit codes: mend something first; start the same command again

_PEER_TIMEOUT = 60.0  # seconds of silence after which a process counts as lost; ZOO_PEER_TIMEOUT


class _Group:
    """This process among others."""

    def __init__(self, client: Any, index: int, count: int, timeout: float) -> None:
        self.client, self.index, self.count, self.timeout = client, index, count, timeout
        self.meetings = 0
        self.ours = False  # whether the reason that stands is this process's own error
        self.verdict: dict[str, Any] | None = None
        self.done = threading.Event()
        self.thread = threading.Thread(target=self._watch, daemon=True, name="zoo-hosts")
        self.thread.start()

    def get(self, key: str) -> str | None:
        try:
            return self.client.key_value_try_get(key)
        except Exception as error:
            if "NOT_FOUND" in str(error):
                return None
            raise

    def publish(self, code: int, text: str, by: int | None = None) -> None:
        """Tell every process to stop, and why: something that process `by` (this one) did; the first reason stands."""
        said = json.dumps({"code": code, "text": text, "by": self.index if by is None else by})
        with contextlib.suppress(Exception):
            self.client.key_value_set("zoo/stop", said)
            self.ours = by is None

    def _watch(self) -> None:
        seen: dict[int, tuple[str | None, float]] = {}
        answered = time.monotonic()
        others = range(1, self.count) if self.index == 0 else (0,)  # process 0 looks at all, all look at process 0
        while not self.done.wait(_BEAT):
            now = time.monotonic()
            try:
                self.client.key_value_increment(f"zoo/alive/{self.index}", 1)
                found = self.get("zoo/stop")
                if found is not None:
                    self.verdict = json.loads(found)
                    break
                for other in others:
                    beat = self.get(f"zoo/alive/{other}")
                    if other not in seen or seen[other][0] != beat:
                        seen[other] = (beat, now)
                    elif now - seen[other][1] > self.timeout:
                        self.publish(_AGAIN, _silent(other, self.timeout), by=other)
                answered = now
            except Exception:
                # the service lives in process 0
                if now - answered > min(self.timeout, 10):
                    self.verdict = {"code": _AGAIN, "text": _silent(0, now - answered), "by": 0}
                    break
        # A process that fails tidies up, but nothing that it does then may wait for the others for ever.
        if self.verdict is not None and not self.done.wait(_TIDY if self.ours else 0):
            self.leave()

    def leave(self) -> None:
        """End this process for the reason that stands: whatever waits for arrays of a lost process waits for ever."""
        assert self.verdict is not None
        print(f"zoo: process {self.index} stops: {self.verdict['text']}", file=sys.stderr)
        self.exit(self.verdict["code"])

    def exit(self, code: int) -> None:
        """End this process at once; process 0, in which the service lives, goes last: JAX aborts those that it leaves."""
        sys.stdout.flush()
        sys.stderr.flush()
        with contextlib.suppress(Exception):
            self.client.key_value_set(f"zoo/left/{self.index}", "1")
        if self.index == 0:
            end = time.monotonic() + 6 * _BEAT
            with contextlib.suppress(Exception):
                while time.monotonic() < end and len(self.client.key_value_dir_get("zoo/left")) < self.count:
                    time.sleep(_BEAT / 4)
        os._exit(code)


def _silent(other: int, seconds: float) -> str:
    return (
        f"process {other} has not answered for {seconds:.0f} seconds; its own log says why. Start the same command again on "
        "all hosts: it goes on from the last checkpoint"
    )


_group: _Group | None = None


def _wanted(environ: Mapping[str, str]) -> dict[str, Any] | None:
    """Arguments of `jax.distributed.initialize` for this environment; None for a process of its own."""
    names = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
    given = [name for name in names if environ.get(name)]
    cluster: dict[str, Any] | None = None
    if int(environ.get("SLURM_STEP_NUM_TASKS") or 1) > 1 and "SLURM_PROCID" in environ:  # inside srun
        cluster = {"cluster_detection_method": "slurm", "local_device_ids": _slurm_devices(environ)}
    elif environ.get("JAX_PLATFORMS") == "cpu":
        cluster = None
    elif (
        _tpu_hosts(environ) > 1
        or environ.get("MEGASCALE_COORDINATOR_ADDRESS")
        or os.path.exists("/dev/accel0")
        or os.path.exists("/dev/vfio/0")
    ):
        cluster = {}
    if not given or (given == ["JAX_COORDINATOR_ADDRESS"] and cluster is not None):
        return cluster
    missing = [name for name in names if name not in given]
    if missing:
        raise UserError(f"{', '.join(given)} set but not {', '.join(missing)}; set all three, or none of them")
    address = environ[names[0]]
    try:
        count, index = int(environ[names[1]]), int(environ[names[2]])
        port = int(address.rpartition(":")[2])
    except ValueError:
        raise UserError(
            f"JAX_COORDINATOR_ADDRESS={address} must be HOST:PORT, JAX_NUM_PROCESSES={environ[names[1]]} and "
            f"JAX_PROCESS_ID={environ[names[2]]} whole numbers"
        ) from None
    if not 0 <= index < count or not 0 < port < 2**16:
        raise UserError(
            f"JAX_PROCESS_ID={index} must be below JAX_NUM_PROCESSES={count}, and the port {port} below 65536"
        )
    return None if count == 1 else {"coordinator_address": address, "num_processes": count, "process_id": index}


def _tpu_hosts(environ: Mapping[str, str]) -> int:
    """How many hosts a TPU's variables name."""
    return len((environ.get("TPU_PROCESS_ADDRESSES") or environ.get("TPU_WORKER_HOSTNAMES") or "").split(","))


def _slurm_devices(environ: Mapping[str, str]) -> list[int] | None:
    """All devices of the node for the one task on it; None leaves JAX's rule, one device per task."""
    visible = environ.get("CUDA_VISIBLE_DEVICES", "")
    count = len(visible.split(",")) if visible else len(glob.glob("/dev/nvidia[0-9]*"))
    alone = environ.get("SLURM_STEP_TASKS_PER_NODE", "1").partition("(")[0] == "1"
    return list(range(count)) if count and (alone or count == 1) else None


def expected(environ: Mapping[str, str] | None = None) -> bool:
    """Whether the environment speaks of other processes."""
    environ = os.environ if environ is None else environ
    return bool(_wanted(environ)) or _tpu_hosts(environ) > 1


def start(environ: Mapping[str, str] | None = None) -> None:
    """Join the other processes of this run, where the environment says that there are any.

    Explicitly by JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID; else as Slurm, a TPU pod or GKE say. To be
    called before any device is used.

    Raises:
        UserError: half an address.
        Retryable: no answer. Where some never come, JAX ends those that wait after five minutes.
    """
    global _group
    environ = os.environ if environ is None else environ
    if _group is not None or jax.distributed.is_initialized():
        return
    wanted = _wanted(environ)
    if wanted is None:
        return
    text = environ.get("ZOO_PEER_TIMEOUT", "")
    try:
        timeout = float(text) if text else _PEER_TIMEOUT
    except ValueError:
        raise UserError(
            f"ZOO_PEER_TIMEOUT={text} is no number of seconds; leave it out for {_PEER_TIMEOUT:.0f}"
        ) from None
    try:
        # JAX's own watch ends a process without a word of ours: it comes second. A process gives JAX a sign of life in half of
        # this time, so it may end a process in the other half.
        jax.distributed.initialize(
            **wanted, initialization_timeout=int(_MEET), heartbeat_timeout_seconds=2 * int(timeout) + 20
        )
    except Exception as error:
        words = first_line(error)
        if not wanted and _tpu_hosts(environ) == 1:
            _log.warning("no other hosts are known here (%s): this process trains alone", words)
            return
        raise Retryable(
            f"the processes of this run did not find each other ({words}); look at the address and the network between "
            "hosts, and that every host runs the command"
        ) from error
    # The service's client has no public name. Asking jax itself would make devices, of which the mesh decides the number.
    joined = multihost_utils.distributed.global_state
    if (joined.num_processes or 1) > 1:
        _group = _Group(joined.client, joined.process_id, joined.num_processes or 1, timeout)
        _log.info("process %d of %d", _group.index, _group.count)


def main() -> bool:
    """Whether this process writes and speaks for all."""
    return _group is None or _group.index == 0


def several() -> bool:
    """Whether there are other processes."""
    return _group is not None


@contextlib.contextmanager
def guarded() -> Iterator[None]:
    """What fails in here fails on every process: the others are told the reason and stop, instead of waiting.

    An error that another process caused (a connection it closed by dying) becomes the sentence that says so.
    """
    try:
        yield
    except BaseException as error:
        if _group is not None and not _group.ours:
            if isinstance(error, UserError):
                code = _AGAIN if isinstance(error, Retryable) else _MISTAKE
                _group.publish(code, f"process {_group.index} says: {error}")
            else:
                if isinstance(error, (RuntimeError, ValueError)):  # what an exchange with a lost process raises
                    _wait_for_verdict(_group)
                if _group.verdict is not None and not _group.ours:
                    _group.leave()
                _group.publish(_AGAIN, f"process {_group.index} failed ({type(error).__name__}); its own log says why")
        raise


def _wait_for_verdict(group: _Group) -> None:
    """Time enough to notice that another process is gone, which is how most exchanges of arrays fail."""
    end = time.monotonic() + group.timeout + 5
    while group.verdict is None and group.thread.is_alive() and time.monotonic() < end:
        time.sleep(_BEAT / 4)


def stop(code: int) -> None:
    """Leave the group at the end of a command: together, still watched, or at once after a failure."""
    global _group
    if _group is None:
        return
    group = _group
    if code:
        group.done.set()
        group.exit(code)
    try:  # one may still be sending its last files; the watch goes on meanwhile
        group.client.wait_at_barrier("zoo/done", 3_600_000)
    except Exception:
        _wait_for_verdict(group)
        if group.verdict is not None:
            group.leave()
    group.done.set()
    _group = None
    jax.distributed.shutdown()


def _meet(what: str, seconds: float = _MEET) -> None:
    assert _group is not None
    _group.meetings += 1
    try:
        _group.client.wait_at_barrier(f"zoo/meet/{_group.meetings}", int(seconds * 1000))
    except Exception as error:
        raise Retryable(
            f"the processes of this run waited in vain for each other ({what}); look at their logs"
        ) from error


def _from_main(value: Any, what: str) -> Any:
    """What process 0 gives, on every process: plain values that JSON has."""
    assert _group is not None
    key = f"zoo/said/{_group.meetings}"
    if _group.index == 0:
        _group.client.key_value_set(key, json.dumps(value))
    _meet(what)
    return json.loads(_group.client.blocking_key_value_get(key, int(_MEET * 1000)))


def same(about: Mapping[str, Any]) -> None:
    """UserError, on every process, unless all of them run the same thing; the fields that differ are named."""
    if _group is None:
        return
    differ = differences(_from_main(about, "to compare their configs"), json.loads(json.dumps(about)))
    if differ:
        raise UserError(
            f"process {_group.index} runs something else than process 0: {'; '.join(differ[:5])}; start the same command "
            "with the same files on every host"
        )
    _meet("after comparing their configs")


def run_on_main(action: Callable[[], Any]) -> Any:
    """The action's outcome on process 0; None on the others, which go on once it is done.

    It begins when all processes have come this far: none of them has found a mistake on its way.
    """
    if _group is None:
        return action()
    _meet("to get ready")
    outcome = action() if main() else None
    _meet("for process 0", 3_600)
    return outcome


def broadcast_from_main(action: Callable[[], Any]) -> Any:
    """What process 0 finds, on every process: plain values that JSON has."""
    return action() if _group is None else _from_main(action() if main() else None, "for what process 0 finds")


def all_agree(ok: bool, what: str, seconds: float = _MEET) -> bool:
    """Whether it went well on every process. Retryable where some do not answer within so many seconds."""
    if _group is None:
        return ok
    tag = f"zoo/agree/{_group.meetings}"
    _group.client.key_value_set(f"{tag}/{_group.index}", str(int(ok)))
    _meet(what, seconds)
    return all(text == "1" for _, text in _group.client.key_value_dir_get(tag))


def asked_to_stop(step: int) -> bool:
    """Whether some process got SIGTERM and all have agreed to stop after this step; to be asked once a step."""
    return _group is not None and multihost_utils.reached_preemption_sync_point(step)


def fetch(tree: Any) -> Any:
    """Numpy arrays of a tree of arrays, whole on every process."""

    def one(x: Any) -> Any:
        if isinstance(x, jax.Array) and not x.is_fully_addressable and not x.is_fully_replicated:
            return multihost_utils.process_allgather(x, tiled=True)
        return np.asarray(x)

    return jax.tree.map(one, tree)
