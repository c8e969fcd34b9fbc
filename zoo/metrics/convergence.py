"""How hard the blocks of an affine flow are to invert by sweeps, and by which method each is inverted fastest here.

B examples, T tokens, D numbers per token, W width of the network.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from zoo import dist, hosts
from zoo.data.pipeline import epoch
from zoo.errors import UserError
from zoo.fields import Count, NonNegative, Some
from zoo.flows.inverse import FINEST, Chain, Jacobi, Stepper, invert, jacobi, once, sequential, swept
from zoo.flows.transforms import affine_inverse
from zoo.task import Inverts, Metric

_GAIN = 0.95  # share of the sequential time from which sweeps are worth it: what is nearer is noise


@dataclass(frozen=True)
class Convergence(Metric):
    """Statistics of every block (GS-Jacobi, arXiv:2505.12849), and a strategy for each batch size, timed on this device.

    For each block, from `samples` examples: `crm`, the convergence ranking metric ||mean(u / s)|| ||W_a|| + ||W_b||, as a
    share of all blocks, and `igm`, the initial guessing metric ||mean(F(start) - u)|| of both first guesses; norms are
    spectral, u [T, D] is what the block maps to v, s its scale, F(x) = v s(x) + b(x), W_a and W_b the halves of its output
    kernel. A large crm tells of a block that needs many sweeps; the guess with the smaller igm is the one used.

    Then latents of held-out examples go back through each block token by token and by sweeps, and what takes least time
    is the block's part of the strategy, which `zoo eval` keeps in `convergence.json` of the run for `zoo sample`.
    """

    samples: Count = 1_000  # examples of the statistics
    split: str = "train"
    batches: Some[Count] = (1, 16)  # batch sizes that strategies are timed for
    modules: Some[Count] = (1, 4)  # numbers of modules that are tried
    tol: NonNegative = 1e-5
    guidance: NonNegative = 0.0  # of the sampler
    rounds: Count = 5

    name = "convergence"
    needs = (Inverts,)
    saves = "convergence.json"
    every = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if 0 < self.tol < FINEST:
            raise UserError(
                f"tol={self.tol:g} of the metric convergence is below what float32 resolves, so that every block would go "
                f"token by token; give {FINEST:g} or more, or 0"
            )

    def check(self, task: Any) -> None:
        """UserError: it times a sampler on a machine, so it is no evaluation of a run while that trains."""
        raise UserError(
            "evals: the metric convergence times the sampler; take it out, and run `zoo eval RUN convergence` after training"
        )

    @property
    def shares(self) -> int:
        """The batch that a CPU's cores shall share, as those of `zoo sample` do."""
        return max(self.batches)

    def __call__(self, task: Any, params: Any, data: Any, rng: jax.Array) -> dict[str, Any]:
        """`blocks`, one dict of statistics each, and `strategies`, one for each batch size.

        Raises:
            UserError: several processes, or no examples in the split.
        """
        if jax.process_count() > 1:
            raise UserError("the metric convergence times one process; run `zoo eval` on one host")
        blocks = self._statistics(task, params, data, rng)
        starts = ["v" if b["igm_v"] <= b["igm_zeros"] else "zeros" for b in blocks]
        # What overflows has no number that JSON could hold.
        told = [{k: x if math.isfinite(x) else None for k, x in b.items()} for b in blocks]
        strategies = [self._strategy(task, params, data, rng, n, starts) for n in self.batches]
        return {"blocks": told, "samples": self.samples, "split": self.split, "strategies": strategies}

    def _statistics(self, task: Any, params: Any, data: Any, rng: jax.Array) -> list[dict[str, float]]:
        batch = min(self.samples, max(self.batches))

        @jax.jit
        def means(params: Any, rows: Any, count: jax.Array, rng: jax.Array) -> Any:
            x, chain = task.chain(params, rows, rng)
            assert chain.out is not None
            kernels = [chain.out(i) for i in range(chain.blocks)]
            kept = (jnp.arange(batch) < count)[:, None, None]

            def total(y: jax.Array) -> jax.Array:
                return jnp.where(kept, y, 0).sum(0)

            found = []
            for u, v, scale, stepper in walk(chain, x):
                zeros = jnp.zeros_like(v) if stepper.start is not None else v.at[:, 1:].set(0)
                off = [affine_inverse(v, *once(stepper, guess)) - u for guess in (v, zeros)]
                found.append([total(u / scale), *map(total, off)])
            return found, kernels

        count, sums, kernels, spec = 0, None, [], task.spec(batch)
        for rows, n in epoch(data, batch, split=self.split, spec=spec, limit=self.samples):
            new, kernels = means(params, rows, n, jax.random.fold_in(rng, count))
            sums = new if sums is None else jax.tree.map(jnp.add, sums, new)
            count += n
        if sums is None:
            raise UserError(f"split={self.split!r} of the metric convergence has no examples; choose another")
        found = []
        for kernel, (drift, *guesses) in zip(
            hosts.fetch(kernels), jax.tree.map(lambda s: hosts.fetch(s) / count, sums)
        ):
            halves = np.split(kernel, 2, axis=1) if kernel.shape[1] == 2 * drift.shape[1] else [0 * kernel, kernel]
            w_a, w_b = (_norm(half) for half in halves)
            igm = [_norm(g) for g in guesses]
            found.append({"crm": _norm(drift) * w_a + w_b, "igm_v": igm[0], "igm_zeros": igm[1]})
        total = sum(b["crm"] for b in found if math.isfinite(b["crm"])) or 1.0  # fresh output kernels are zero
        return [{**b, "crm": b["crm"] / total} for b in found]

    def _strategy(
        self, task: Any, params: Any, data: Any, rng: jax.Array, n: int, starts: Sequence[Any]
    ) -> dict[str, Any]:
        mesh, params = dist.spread(params, n, jax.eval_shape(task.init, rng))
        rows = next(iter(epoch(data, n, split=self.split, spec=task.spec(n), limit=n)))[0]
        with dist.use(mesh):
            return self._timed(task, params, rows, rng, n, starts) | {
                "device": jax.devices()[0].device_kind,
                "batch": n,
                "devices": mesh.size,
                "guidance": self.guidance,
                "tol": self.tol,
            }

    def _timed(
        self, task: Any, params: Any, rows: Any, rng: jax.Array, n: int, starts: Sequence[Any]
    ) -> dict[str, Any]:
        def chain(params: Any) -> tuple[jax.Array, Chain]:
            return task.chain(params, rows, rng, guidance=self.guidance)

        @jax.jit
        def way_back(params: Any) -> list[jax.Array]:
            x, blocks = task.chain(params, rows, rng)  # noise is that of real examples, whatever the guidance
            last = blocks.blocks - 1
            z = blocks.order(list(walk(blocks, dist.constrain(x, "batch")))[-1][1], last)
            states = invert(chain(params)[1], z).states
            return [dist.constrain(blocks.order(x, i), "batch") for x, i in zip(states, range(last, -1, -1))]

        states = way_back(params)[::-1]  # of block i, in its own order
        tokens, chosen = states[0].shape[1], []
        for i, v in enumerate(states):
            plans = [Jacobi(modules=m, tol=self.tol, start=starts[i]) for m in self.modules]
            plans = [plan for plan in plans if swept(plan, tokens)]

            def run(plan: Jacobi | None, i: int, params: Any, v: jax.Array) -> tuple[jax.Array, jax.Array]:
                stepper = chain(params)[1].stepper(i)
                if plan is None:
                    return sequential(stepper, v)[0], jnp.zeros(1, jnp.int32)
                u, sweeps, bad, _ = jacobi(stepper, v, plan)
                return u, jnp.where(bad, -1, sweeps)

            jitted = [jax.jit(partial(run, plan, i)) for plan in (None, *plans)]
            sweeps = [np.asarray(hosts.fetch(f(params, v)[1])) for f in jitted]
            seconds = _medians([partial(f, params, v) for f in jitted], self.rounds)
            slow, *fast = seconds
            best = int(np.argmin(seconds)) if min(fast, default=slow) < _GAIN * slow else 0
            chosen.append(
                {
                    "modules": plans[best - 1].modules if best else 0,
                    "start": starts[i],
                    "sequential_ms": 1e3 * slow,
                    **{f"modules_{p.modules}_ms": 1e3 * s for p, s in zip(plans, fast)},
                    # of the sample that takes most; -1: some did not converge and went token by token
                    **{
                        f"modules_{p.modules}_sweeps": int(-1 if (k < 0).any() else k.max())
                        for p, k in zip(plans, sweeps[1:])
                    },
                }
            )
        return {
            "modules": [block["modules"] for block in chosen],
            "start": [block["start"] for block in chosen],
            "blocks": chosen,
        }


def walk(chain: Chain, x: jax.Array) -> Iterator[tuple[jax.Array, jax.Array, jax.Array, Stepper]]:
    """Data to noise: (u, v, scale, stepper) of every block, in its own order; x [B, T, D] in raster order."""
    for i in range(chain.blocks):
        stepper, u = chain.stepper(i), chain.order(x, i)
        scale, shift = once(stepper, u)
        v = (u - shift) / scale
        yield u, v, scale, stepper
        x = chain.order(v, i)


def _norm(x: np.ndarray) -> float:
    """Spectral norm; infinite for what overflowed, as the map of a first guess far from the data may."""
    return float(np.linalg.norm(np.asarray(x, np.float64), 2)) if np.isfinite(x).all() else float("inf")


def _medians(calls: Sequence[Callable[[], Any]], rounds: int) -> list[float]:
    """Seconds of each call, which take turns; each has been compiled before."""
    found: list[list[float]] = [[] for _ in calls]
    for _ in range(rounds):
        for seconds, call in zip(found, calls):
            begin = time.perf_counter()
            jax.block_until_ready(call())
            seconds.append(time.perf_counter() - begin)
    return [statistics.median(s) for s in found]
