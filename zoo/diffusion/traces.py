"""How weighted particles fared on their way: what was lost, figures of each island, and a picture by level.

I islands of K particles, T levels, P potentials.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import jax
import numpy as np
from PIL import Image

from zoo.diffusion.compare import image_of
from zoo.errors import UserError


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Trace:
    """What happened on the way, by island and level; beside n samples, one of each of n islands, `zoo.task.Trace`."""

    sigma: jax.Array  # [I, T]
    ess: jax.Array  # [I, T] effective number of particles, as a share of K
    resampled: jax.Array  # [I, T] whether they were drawn anew
    roots: jax.Array  # [I, T] how many of the first particles have descendants
    # [I, T] -1: none; -2: no particle has weight; else j K + k: weight j (0: of the energies) of particle k is no number
    broken: jax.Array
    log_normaliser: jax.Array  # [I] of the target at the lowest level, with energies that are -log p
    potentials: tuple[str, ...] = field(metadata={"static": True})  # names [P]
    count: int = field(metadata={"static": True})  # K

    def check(self, rows: Sequence[int]) -> None:
        """UserError for an island that was lost; they are called `rows`. For arrays that are there, so outside of what is compiled."""
        for row, codes, sigma in zip(rows, np.asarray(self.broken), np.asarray(self.sigma)):
            for n in np.flatnonzero(codes != -1)[:1]:
                where = f"at level {n} (sigma {sigma[n]:.3g}) of island {row}"
                if codes[n] < -1:
                    raise UserError(
                        f"no particle has any weight left {where}; give more particles, more levels or a wider potential"
                    )
                part, particle = divmod(int(codes[n]), self.count)
                name = f"potential {self.potentials[part - 1]}" if part else "the energies"
                raise UserError(
                    f"{name}: the weight of particle {particle} is no finite number {where}; look at what it gives there"
                )

    def figures(self) -> dict[str, np.ndarray]:
        """[I] each: the least `ess`, at how many levels particles were `resampled`, `roots` at the end, `log_normaliser`."""
        return {
            "ess": np.asarray(self.ess).min(1),
            "resampled": np.asarray(self.resampled).sum(1),
            "roots": np.asarray(self.roots)[:, -1],
            "log_normaliser": np.asarray(self.log_normaliser),
        }

    def picture(self) -> Image.Image:
        """Effective particles and roots by level."""
        return chart({f"{len(self.ess)} islands of {self.count}": {"": self}})


def chart(panels: Mapping[str, Mapping[str, Trace]]) -> Image.Image:
    """A panel for each name, in it a colour for each trace: by level the share of K that is effective, dashed that of roots left.

    Lines are medians over islands.
    """
    from matplotlib.figure import Figure

    page = Figure(figsize=(1.2 + 3.4 * len(panels), 3.4), dpi=110, layout="constrained")
    grid = page.subplots(1, len(panels), squeeze=False, sharey=True)[0]
    for axes, (title, traces) in zip(grid, panels.items()):
        for i, (name, trace) in enumerate(traces.items()):
            sigma = np.asarray(trace.sigma)[0]
            shares = (trace.ess, "-", "effective"), (np.asarray(trace.roots) / trace.count, "--", "roots")
            for values, style, what in shares:
                axes.plot(sigma, np.median(values, 0), style, color=f"C{i}", lw=1.2, label=f"{name} {what}".strip())
        axes.set(xscale="log", yscale="log", xlabel="sigma", title=title)
        axes.invert_xaxis()  # as particles go
        axes.grid(color="#e4e4e4")
    grid[0].set_ylabel("share of an island's particles")
    grid[-1].legend(fontsize=6)
    return image_of(page)
