"""Weights & Biases, beside the files of a run: whatever the service does, the run goes on.

The run's id lies in `wandb.json` of the run folder, so that a resumed run goes on there as well. Steps that are taken again
after a stop stand there twice: the service has no way to take records back.
"""

from __future__ import annotations

import importlib
import json
import logging
import secrets
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from PIL import Image

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
        raise UserError("--wandb needs the package wandb: pip install -e '.[wandb]', or leave --wandb out") from None


class Tracker:
    """One run of a project (`PROJECT` or `ENTITY/PROJECT`); `file` keeps its id, `folder` takes the library's own files.

    Once the id is kept nothing raises: the first failure is told in one warning, and nothing more is sent.
    """

    def __init__(self, project: str, config: Mapping[str, Any], *, name: str, file: Path, folder: Path | None) -> None:
        self._wandb, self._lost = library(), False
        self._run: Any = None
        self.url: str | None = None
        with files.writing(file, "choose another workdir="):
            try:
                own = str(json.loads(file.read_text())["id"])
            except (FileNotFoundError, ValueError, KeyError, TypeError):  # none yet, or cut short
                own = secrets.token_hex(8)
                files.write(file, json.dumps({"id": own}) + "\n")
        entity, _, project = project.rpartition("/")
        about = {"entity": entity or None, "project": project, "name": name, "config": dict(config), "dir": folder}
        with self._passing():
            how = self._wandb.Settings(console="off", silent=True, init_timeout=_CONNECT)  # the report has the bar
            self._run = self._wandb.init(**about, id=own, resume="allow", settings=how)
            self._run.define_metric("*", step_metric="step")
            self.url = self._run.url

    @contextmanager
    def _passing(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            if not self._lost:
                _log.warning(
                    "Weights & Biases failed (%s: %s) and gets no more of this session; the run goes on, its records are in "
                    "metrics.jsonl",
                    type(error).__name__,
                    files.first_line(error),
                )
            self._lost = True

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """Send one record of numbers, texts and pictures."""
        if not self._lost:
            with self._passing():  # no step= of the library's own: it drops a step that is not above the last one
                shown = {k: self._wandb.Image(v) if isinstance(v, Image.Image) else v for k, v in values.items()}
                self._run.log({"step": step, **shown})

    def close(self, failed: bool) -> None:
        """Send the rest, for a minute at most."""

        def finish() -> None:
            with self._passing():
                self._run.finish(exit_code=int(failed))

        if self._run is not None:
            thread = threading.Thread(target=finish, daemon=True)
            thread.start()
            thread.join(_FINISH)
            if thread.is_alive():
                _log.warning("Weights & Biases has not taken the last records within %.0f seconds", _FINISH)
