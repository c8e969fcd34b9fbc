"""Energies of MNIST and products of them, pooled to 14x14 (minutes on two CPU cores) and whole (`large...`, for a GPU).

`configs/energy/README.md` has the lines that make mnist14.npz, mnist28.npz and those of some digits alone.

    zoo train energy/mnist:teacher
    zoo train energy/mnist                          # distilled; energy/mnist:dsm learns from the data
    zoo train energy/mnist:low
    zoo train energy/mnist:high
    zoo eval energy/mnist:product classes wanted=2,3 samples=16 batch=4

`large_teacher`, `large`, `large_dsm`, `large_low`, `large_high` and `large_product` are the same at 28x28.
"""

from dataclasses import replace

from zoo.data.images import Images
from zoo.data.synthetic import Synthetic
from zoo.metrics.denoising import Denoising
from zoo.papers import edm, energy
from zoo.run import Checkpoint, Run, Samples
from zoo.train.optim import AdamW


def family(name: str, side: int, network: edm.Transformer | edm.UNet, steps: int, batch: int) -> tuple[Run, ...]:
    """Teacher, distilled energy, that from the data, those of the digits 0 to 3 and 2 to 5, and their product."""
    denoiser = edm.Edm(image=side, channels=1, network=network)
    teacher = Run(
        task=denoiser,
        data=Images(f"mnist{side}.npz", size=side, channels=1),
        optim=AdamW(lr=1e-3, final_lr=1e-5, warmup=100, b2=0.99, weight_decay=0.0, clip=1.0),
        ema=0.998,
        steps=steps,
        batch=batch,
        checkpoint=Checkpoint(every=500, keep=2),
        samples=Samples(n=100, options={"nfe": 17}),
        evals=(Denoising(sigmas=(0.2, 0.5, 1.0), limit=2_000),),
        log_every=50,
    )
    run = f"runs/energy-mnist-{name}teacher"
    distilled = replace(
        teacher,
        task=energy.EnergyDistill(denoiser),
        weights={"teacher": run, "net": f"{run}:net"},
        steps=steps // 2,
    )
    part = energy.EnergyDistill(denoiser, target="data")
    dsm = replace(distilled, task=part, weights={"net": f"{run}:net"})
    low = replace(teacher, task=part, data=replace(teacher.data, path=f"mnist{side}-low.npz"))
    high = replace(low, data=replace(teacher.data, path=f"mnist{side}-high.npz"))
    product = replace(
        teacher,
        task=energy.EnergyProduct((part, part)),
        weights={f"part{i}": f"runs/energy-mnist-{name}{half}" for i, half in enumerate(("low", "high"))},
        steps=1,
        evals=(),
    )
    return teacher, distilled, dsm, low, high, product


# One patch is one token: a residual network that the noise modulates.
teacher, config, dsm, low, high, product = family(
    "", 14, edm.Transformer(width=128, depth=3, head_dim=128, patch=14), steps=2_000, batch=128
)
large_teacher, large, large_dsm, large_low, large_high, large_product = family(
    "large_",
    28,
    edm.UNet(width=32, multiples=(1, 2, 2), blocks=2, attention=(7,), dropout=0.0),
    steps=10_000,
    batch=256,
)

smoke = replace(
    config,
    task=energy.EnergyDistill(
        edm.Edm(image=4, channels=1, network=edm.Transformer(width=8, depth=1, head_dim=8, patch=4)), target="data"
    ),
    data=Synthetic(),
    weights=None,
    steps=4,
    batch=8,
    evals=(),
    samples=Samples(n=4, options={"nfe": 3}),
)
