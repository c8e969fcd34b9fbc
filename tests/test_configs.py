"""Every shipped config without a compilation: it is built, has a loss and samples of the promised shapes."""

import dataclasses
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest
from fresh import fresh
from jax.extend.core import Var
from smokes import CONFIGS, KINDS, RUNS, SMOKES, smoke

from zoo import config, dist, weights
from zoo.errors import UserError
from zoo.files import differences
from zoo.train import optim
from zoo.train.loop import train
from zoo.train.step import abstract_state, make_sampler, sampler_spec, split


@pytest.mark.parametrize("name", RUNS)
def test_full_config_is_built_abstractly_and_survives_json(name: str) -> None:
    run = config.load(name)
    run.mesh.build(jax.devices()[:1])  # one GPU is enough to start any of them
    mesh = dist.Mesh(data=2, fsdp=4).abstract(8)
    with dist.use(mesh, run.rules):
        state = abstract_state(run.task, optim.build(run.optim, run.steps), mesh, run.ema)
    assert sum(x.size for x in jax.tree.leaves(state.params)) > 1000
    assert config.undump(config.dump(run)) == run
    unlike = differences(config.dump(run.optim), config.dump(smoke(name).optim))
    assert all("warmup" in one for one in unlike)  # its smoke run is of the same recipe
    assert run.workdir == "runs/" + name.replace("/", "-")
    assert config.describe(name)


def unreached(task: Any, params: Any, batch: Any) -> list[str]:
    """Trained leaves whose gradient depends on nothing, and so is zero whatever the weights and the batch.

    One that a mask or a factor makes zero is not found.
    """
    slope = jax.grad(lambda trained, held, batch, rng: task.loss({**trained, **held}, batch, rng)[0])
    program = jax.make_jaxpr(slope)(*split(task, params), batch, jax.random.key(0)).jaxpr
    moved = {*program.invars}
    for line in program.eqns:
        if any(isinstance(x, Var) and x in moved for x in line.invars):
            moved |= {*line.outvars}
    found = [isinstance(x, Var) and x in moved for x in program.outvars]
    tree = jax.tree.structure(split(task, params)[0])
    return [name for name, reached in weights.flatten(tree.unflatten(found)).items() if not reached]


def test_leaves_that_nothing_reads_are_found() -> None:
    class Task:
        about = SimpleNamespace(held=("held",))

        def loss(self, params: Any, batch: Any, rng: Any) -> Any:
            carried, _ = jax.lax.scan(lambda x, leaf: (x * leaf["read"], leaf["unread"]), batch, params["layers"])
            return (carried * params["held"] + jax.lax.stop_gradient(params["stopped"])).sum(), {}

    layers = dict.fromkeys(("read", "unread"), np.ones(3, np.float32))
    params = {"layers": layers, "held": np.float32(1), "stopped": np.float32(1), "unused": np.float32(1)}
    assert unreached(Task(), params, np.float32(2)) == ["layers/unread", "stopped", "unused"]


@pytest.mark.parametrize("name", sorted({*CONFIGS} - {*KINDS.values()}))
def test_a_smoke_config_that_is_not_trained_has_a_loss_gradients_and_samples(name: str) -> None:
    run = smoke(name)
    params = weights.abstract(run.task)
    if name in SMOKES:  # these make every choice that a shipped config makes
        assert unreached(run.task, params, run.spec()) == []
    loss, _ = jax.eval_shape(run.task.loss, params, run.spec(), jax.random.key(0))
    assert loss.shape == ()
    batch = next(iter(run.batches()))
    assert {key: (x.shape, x.dtype) for key, x in run.spec().items()} == {
        k: (x.shape, x.dtype) for k, x in batch.items()
    }
    if run.samples.n:
        draw = make_sampler(run.task, run.samples.n, run.samples.options)
        assert jax.eval_shape(draw, params, jax.random.key(0), sampler_spec(run.task, run.samples.n))


@pytest.mark.parametrize("name", [name for kind, name in KINDS.items() if hasattr(kind, "remat")])
def test_remat_acts(name: str) -> None:  # of EDM's networks a transformer's; a U-Net's is `test_edm.py`'s
    run = smoke(name)
    given = weights.abstract(run.task), run.spec(), jax.random.key(0)
    tasks = (dataclasses.replace(run.task, remat=remat) for remat in ("none", "full"))
    plain, saving = (str(jax.make_jaxpr(task.loss)(*given)).count("remat") for task in tasks)
    assert plain < saving


@pytest.mark.parametrize("name", sorted({*RUNS} - {*CONFIGS}))
def test_what_is_made_of_trained_models_samples_and_says_that_it_does_not_train(name: str) -> None:
    run = smoke(name)
    label = {"label": np.zeros(4, np.int32)} if run.task.about.classes else None
    drawn = jax.jit(make_sampler(run.task, 4, {"nfe": 5}))(fresh(run.task), jax.random.key(0), label)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(drawn))
    with pytest.raises(UserError, match="nothing to train"):
        train(run, quiet=True)
