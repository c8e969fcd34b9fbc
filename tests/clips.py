"""Folders of posed images, written out of made scenes, right or with one of the usual mistakes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from zoo.cameras import project, rays
from zoo.data.scenes import Scenes

OPENGL = np.diag([1.0, -1.0, -1.0, 1.0])


def posed(
    folder: Path, kind: str = "", frames: int = 8, size: int = 48, seed: int = 0, png: bool = False
) -> dict[str, Any]:
    """One scene in `folder`; returns the example it was made from. `kind` names what is wrong with it."""
    example = Scenes("open", frames, size, seed=seed, train=1, test=1).source("train")[0]
    camera = example["camera"].astype(np.float64)
    focal = np.broadcast_to(example["focal"], frames).astype(np.float64)
    _, depth = project(example["points"].astype(np.float64), camera, focal, size, size)
    k = np.array([[focal[0], 0, size / 2], [0, focal[0], size / 2], [0, 0, 1]])
    if kind == "ray length":
        depth = depth * np.linalg.norm(rays(focal, size, size), axis=-1)
    if kind == "y up":
        camera = camera @ OPENGL
    if kind == "inverse":
        camera = np.linalg.inv(camera)
    k[:2, 2] += {"half less": -0.5, "half more": 0.5}.get(kind, 0)
    k[:2] *= 2 if kind == "intrinsics" else 1
    listed = []
    for name in ("rgb", "depth"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for f in range(frames):
        image = np.rint((example["frames"][f] + 1) * 127.5).astype(np.uint8)
        Image.fromarray(image[: size // 2] if kind == "sizes" and f == 3 else image).save(folder / f"rgb/{f}.png")
        if png:
            Image.fromarray(np.rint(depth[f] * 1000).astype(np.uint16)).save(folder / f"depth/{f}.png")
        else:
            np.save(folder / f"depth/{f}.npy", np.zeros_like(depth[f]) if kind == "no depth" and f == 2 else depth[f])
        one = {"image": f"rgb/{f}.png", "depth": f"depth/{f}.{'png' if png else 'npy'}", "camera": camera[f].tolist()}
        listed.append(one)
    if kind == "missing":
        (folder / "depth/2.npy").unlink()
    if kind == "unit":
        listed = [{**one, "depth_unit": 1000} for one in listed]
    (folder / "cameras.json").write_text(json.dumps({"frames": listed, "K": k.tolist()}))
    return example
