"""Weights & Biases, beside the files of a run: whatever the service does, the run goes on.

The run's id lies in `wandb.json` of the run folder, so that a resumed run goes on there as well. Steps that are taken again
after a stop stand there twice: the service has no way to take records back. Its own files go to `wandb/` in a local run
folder; for one in a bucket, where its library would put them (`WANDB_DIR`, or `wandb/` here).
"""

from __future__ import annotations

import importlib
import json
import logging
import secrets
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from zoo import files
from zoo.errors import UserError

_log = logging.getLogger("zoo")
_CONNECT = 30  # seconds for the service to answer at the start
_FINISH = 60.0  # seconds for the last records to be sent


def library() -> Any:
    """The package; UserError when it is not there."""
    try:
        return importlib.import_module("wandb")
    except ImportError:
        raise UserError(
            "--wandb needs the package wandb; install it with the `wandb` extra: pip install -e '.[wandb]', or leave --wandb out"
        ) from None


class Tracker:
    """One run of a project (`PROJECT` or `ENTITY/PROJECT`); `file` keeps its id, `folder` takes the library's files.

    Nothing raises from here on: the first failure is told in one warning, and nothing more is sent.
    """

    def __init__(
        self, project: str, config: Mapping[str, Any], *, name: str, file: Path, folder: Path | None = None
    ) -> None:
        self._wandb, self._run = library(), None
        self._lost = False
        entity, _, project = project.rpartition("/")
        about = {
            "project": project,
            "entity": entity or None,
            "name": name,
            "id": _identity(file),
            "resume": "allow",
            "config": dict(config),
            "dir": None if folder is None else str(folder),
        }
        try:
            self._run = self._open(**about)
        except Exception as error:
            try:
                self._wandb.teardown(1)  # it holds the id that it could not open
                self._run = self._open(**about, mode="offline")
            except Exception:
                self._fail("start", error)
            else:
                _log.warning(
                    "Weights & Biases cannot be reached (%s); this session is kept in %s, send it later with `wandb sync`",
                    _words(error),
                    Path(getattr(self._run, "dir", "wandb/files")).parent,
                )
        self._call("define", lambda run: run.define_metric("*", step_metric="step"))

    def _open(self, **about: Any) -> Any:
        # it neither writes to the screen nor listens to it: the report has the bar there
        quiet = self._wandb.Settings(console="off", silent=True, init_timeout=_CONNECT)
        return self._wandb.init(settings=quiet, **about)

    @property
    def url(self) -> str | None:
        """Where to look at the run; None without the service."""
        return None if getattr(self._run, "offline", True) else getattr(self._run, "url", None)

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """Send one record."""
        # no step= of the library's own: it drops a step that is not above the last one
        self._call("log", lambda run: run.log({"step": step, **values}))

    def image(self, step: int, name: str, image: Any) -> None:
        """Send one picture."""
        self._call("log", lambda run: run.log({"step": step, name: self._wandb.Image(image)}))

    def close(self, failed: bool = False) -> None:
        """Send the rest, for a minute at most; may be called twice."""
        if self._run is None:
            return
        end = self._run.finish

        def finish() -> None:
            try:
                end(exit_code=int(failed))
            except Exception as error:
                self._fail("finish", error)

        thread = threading.Thread(target=finish, daemon=True)
        thread.start()
        thread.join(_FINISH)
        if thread.is_alive():
            self._fail("finish", TimeoutError(f"no answer for {_FINISH:.0f} seconds"))
        self._run = None

    def _call(self, what: str, call: Callable[[Any], Any]) -> None:
        if self._run is None or self._lost:
            return
        try:
            call(self._run)
        except Exception as error:
            self._fail(what, error)

    def _fail(self, what: str, error: Exception) -> None:
        if not self._lost:
            _log.warning(
                "Weights & Biases failed (%s: %s) and gets no more of this session; the run goes on, its records are in "
                "metrics.jsonl",
                what,
                _words(error),
            )
        self._lost = True


def _words(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def _identity(file: Path) -> str:
    """The id in `file`, or a new one that is put there."""
    try:
        return str(json.loads(file.read_text())["id"])
    except (OSError, ValueError, KeyError, TypeError):
        found = secrets.token_hex(8)
        with files.writing(file, "choose another workdir="):
            files.write(file, json.dumps({"id": found}) + "\n")
        return found
