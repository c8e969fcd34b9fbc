"""zoo: a JAX/Flax model zoo. `zoo.load(run, export or shipped name)` gives a task and its parameters."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from zoo.task import Params, Task

__version__ = "0.1.0"


def load(name: str, *, raw: bool = False, allow: tuple[str, ...] = ()) -> tuple[Task, Params]:
    """Task and parameters of a run folder, an export, or a shipped name such as `tarflow-digits`.

    Args:
        raw: the last weights of a run even where it keeps an average (the average is the default, and an export's
            config.json says which it holds).
        allow: packages besides zoo whose classes the config may name.

    Raises:
        zoo.errors.UserError: nothing of that name, or a damaged one.
    """
    from zoo.models import open_model  # jax is imported only now

    model: Any = open_model(name, raw=raw, allow=allow)
    return model.task, model.params
