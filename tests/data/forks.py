"""What is done in a process of its own, a copy of this one, which may be killed."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import warnings

from tqdm import tqdm

from zoo.errors import UserError


def started(call):
    """`call` in a process of its own, and the pipe on which it says how it ended."""
    context = multiprocessing.get_context("fork")
    there, here = context.Pipe(duplex=False)

    def work():
        tqdm.set_lock(threading.RLock())  # that of tqdm is shared by all processes, and one that is killed may hold it
        try:
            call()
            here.send("done")
        except UserError as error:
            here.send(str(error))

    process = context.Process(target=work)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the threads of JAX, which is not called there
        process.start()
    here.close()
    return process, there


def ended(process, there):
    """ "done", the sentence of the user's mistake, or None: it was killed."""
    process.join(120)
    hangs = process.is_alive()
    process.kill()
    assert not hangs
    try:
        return there.recv()
    except EOFError:
        assert process.exitcode == -signal.SIGKILL  # and nothing else that ends a process before its time
        return None


def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)
