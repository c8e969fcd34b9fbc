"""The profile of a few steps: what host and devices do in them, for TensorBoard or Perfetto."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import jax

from zoo.errors import UserError
from zoo.run import Run
from zoo.train.report import Report

_log = logging.getLogger("zoo")


class Profile:
    """Records the steps of `span`, both included; waits for the devices at these borders alone.

    Raises:
        UserError: a span that no run or not this one has, or a run without a folder.
    """

    def __init__(self, span: tuple[int, int] | None, run: Run) -> None:
        self._run, self._asked, self._on = run, span is not None, False
        self._report: Report | None = None
        self._first, self._last = span or (0, 0)
        if self._asked and run.workdir is None:
            raise UserError(f"--profile {self._first}:{self._last} needs a run folder; set workdir=FOLDER")
        self.check(0)

    def check(self, start: int) -> None:
        """UserError when a run that goes on after step `start` does not take these steps."""
        steps = self._run.steps
        if self._asked and not start < self._first <= self._last <= steps:
            now = f"{start + 1} to {steps}" if start < steps else f"none: it is finished at {start}"
            raise UserError(
                f"--profile {self._first}:{self._last} is not among the steps that this run takes now ({now}); give others"
            )

    def before(self, step: int, state: Any, report: Report) -> None:
        """Called before each step."""
        if step == self._first and report.main:
            self._report = report
            with report.away(), self._failures():
                jax.block_until_ready(state)
                jax.profiler.start_trace(report.folder / "profile", create_perfetto_trace=True)
                self._on = True

    def after(self, step: int, state: Any) -> None:
        """Called after each step."""
        if step == self._last and self._on:
            jax.block_until_ready(state)
            self.close()

    def close(self) -> None:
        """Write what was recorded, where recording was on."""
        if self._on and self._report is not None:
            self._on = False
            with self._report.away(), self._failures():
                jax.profiler.stop_trace()
                self._report.push()
                self._report.note(
                    f"profile: {self._run.workdir}/profile (TensorBoard, or its perfetto_trace.json.gz in Perfetto)"
                )

    @contextmanager
    def _failures(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # a figure costs no step
            _log.warning("the profile could not be made (%s: %s); the run goes on", type(error).__name__, error)
