"""zoo: a JAX/Flax model zoo. `zoo.load(run, export or shipped name)` gives a model: it samples and tells likelihoods."""

from __future__ import annotations

from typing import TYPE_CHECKING

from zoo import process as process  # isort: split  # before what takes long

if TYPE_CHECKING:
    from zoo.models import Model

__version__ = "0.1.0"


def load(name: str, *, raw: bool = False, ema: float | None = None, allow: tuple[str, ...] = ()) -> Model:
    """The model of a run folder, an export, a shipped name such as `tarflow-digits`, or a config whose weights are all given.

    `task, params = zoo.load(...)` takes it apart.

    Args:
        raw: the last weights of a run even where it keeps an average (the average is the default, and an export's
            config.json says which it holds).
        ema: the width of the average of a run, one that it keeps or one made of its snapshots; None: the first of those kept.
        allow: packages besides zoo whose classes the config may name.

    Raises:
        zoo.errors.UserError: nothing of that name, or a damaged one.
    """
    from zoo.models import open_model  # jax is imported only now

    return open_model(name, raw=raw, ema=ema, allow=allow)
