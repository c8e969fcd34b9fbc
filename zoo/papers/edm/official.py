"""The published layout of EDM's U-Nets (arXiv:2206.00364's code): `model.` and the names of its modules, PyTorch's shapes."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from zoo.papers.edm.networks import TAPS
from zoo.task import Name

LICENCE = (
    "the published EDM weights are under CC BY-NC-SA 4.0, which is non-commercial and also binds converted files: keep the "
    "attribution and the licence"
)
_EMBEDDINGS = {"embed0": "map_layer0", "embed1": "map_layer1", "label": "map_label", "augment": "map_augment"}


def names(params: Mapping[str, Any], side: int, kind: str) -> list[Name]:
    """Every tensor of an official state dict and its place among `params`, whose shapes alone count.

    The filters of blocks that resize are constants there.

    Args:
        side: of the image.
        kind: "ddpm++", "ncsn++" or "adm".
    """
    ends = {"norm": "out_norm", "out": "out_conv"}
    if kind != "adm":
        ends = {"norm": f"dec.{side}x{side}_aux_norm", "out": f"dec.{side}x{side}_aux_conv"}
    found = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        ours = [key.key for key in path]
        target, inner, last = "/".join(ours), ours[1:-1], ours[-1]
        if ours[0] == "buffers":
            found.append(Name({"frequencies": "model.map_noise.freqs", "levels": "u"}[last], target))
            continue
        first = {**_EMBEDDINGS, **ends}.get(inner[0]) or re.sub(r"(enc|dec)_(\d+)_", r"\1.\2x\2_", inner[0])
        source = ".".join(["model", first, *inner[1:], "bias" if last == "bias" else "weight"])
        layout = {1: None, 2: "o i -> i o", 4: "o i h w -> h w i o"}[len(leaf.shape)]
        if inner[-1] in ("qkv", "proj") and last == "kernel":  # convolutions of one pixel there
            layout = "o i 1 1 -> i o"
        found.append(Name(source, target, layout))
    modules = {match[0] for name in found if (match := re.match(r"model\.(enc|dec)\.\w+", name.source))}
    for module in sorted(modules):
        if module.endswith("_aux_residual"):
            found.append(_filter(module, kind))
        if module.endswith(("_down", "_up")):
            found += [_filter(f"{module}.{part}", kind) for part in ("conv0", "skip")]
    return found


def _filter(module: str, kind: str) -> Name:
    def value() -> np.ndarray:
        taps = np.asarray(TAPS[kind], np.float32) / sum(TAPS[kind])
        return np.outer(taps, taps)[None, None]

    return Name(f"{module}.resample_filter", None, value=value)
