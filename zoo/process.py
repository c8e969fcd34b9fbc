"""The process of a command: Ctrl-C is one line, and what it prints to may be closed, full or ASCII.

It is imported before all else, since a Ctrl-C may come while Python still imports: it imports next to nothing.
"""

from __future__ import annotations

import errno
import os
import signal
import sys
import types

_running = False  # whether a command is under way, which tidies up after itself


def _interrupted(_: int, frame: object) -> None:
    """Ctrl-C: an exception in a command, the end where there is nothing to tidy up: modules half imported, a command that is done."""
    importing = False
    while isinstance(frame, types.FrameType) and not importing:
        importing, frame = frame.f_code.co_filename.startswith("<frozen importlib"), frame.f_back
    if _running and not importing:
        raise KeyboardInterrupt
    try:
        os.write(2, b"zoo: interrupted\n")
    finally:
        os._exit(130)


def begin() -> None:
    """A command begins."""
    global _running
    _running = True
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # halves of characters
    from importlib import util

    # where only a chip's compiler is installed and there is neither a TPU nor a GPU, JAX shall not look for one: it says a lot
    devices = ("/dev/accel0", "/dev/vfio/0", "/dev/nvidia0", "/dev/nvidiactl", "/dev/kfd", "/dev/dxg")
    compilers = any(util.find_spec(name) is not None for name in ("libtpu", "jax_cuda12_plugin"))
    if compilers and not any(map(os.path.exists, devices)):
        os.environ.setdefault("JAX_PLATFORMS", "cpu")


def explained(verb: str, error: Exception) -> int | None:
    """Says in a sentence what went wrong that is no fault of the program; the exit code, None where it may be one."""
    from zoo.errors import Retryable, UserError

    if isinstance(error, UserError):
        said = " ".join(str(error).split())
    elif isinstance(error, OSError) and error.filename is None and error.errno in (errno.ENOSPC, errno.EPIPE):
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # Python writes again what is left
        if error.errno == errno.EPIPE:  # who reads has had enough
            return 141
        said = f"what it prints cannot be written ({error.strerror}); free some space, or print to another place"
    elif (
        isinstance(error, RuntimeError)
        and (platforms := os.environ.get("JAX_PLATFORMS"))
        and "backend" in str(error)[:40]
    ):
        said = f"JAX_PLATFORMS={platforms} names what is not here ({str(error).partition('. ')[0].partition(' (set')[0]}); unset it"
    else:
        return None
    print(f"zoo {verb}: {said}", file=sys.stderr)
    return 3 if isinstance(error, Retryable) else 2


def end(code: int, verb: str) -> int:
    """The exit code of a command that is done, once what it said is out."""
    global _running
    try:
        sys.stdout.flush()
    except OSError as error:
        code = code or explained(verb, error) or 2
    _running = False
    return code


if "zoo.cli" in sys.orig_argv[1:6] or any(os.path.basename(word) == "zoo" for word in sys.orig_argv[:2]):
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _interrupted)
    # names, arguments and files are UTF-8
    if sys.getfilesystemencoding() != "utf-8" and os.environ.get("PYTHONUTF8") != "1":
        os.environ["PYTHONUTF8"] = "1"
        os.execv(sys.executable, sys.orig_argv)
    while os.open(os.devnull, os.O_RDWR) < 3:  # closed ones: files would take their numbers, and get what is printed
        pass
    sys.stdout, sys.stderr = sys.stdout or open(1, "w"), sys.stderr or open(2, "w")  # noqa: SIM115
