"""The features of a split in a file, for other libraries to work with. N examples, D features."""

from __future__ import annotations

import contextlib
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from zoo import files
from zoo.data.pipeline import epoch
from zoo.errors import UserError
from zoo.fields import Count
from zoo.metrics.probe import finite
from zoo.task import Encodes, Maps, Metric, Params, call, check_needs


@lru_cache(maxsize=8)
def _extractor(task: Any, maps: bool) -> Any:
    """A jitted (params, batch) -> float32 `features` and, asked for, `feature_map`."""
    names = ("features", "feature_map") if maps else ("features",)
    return jax.jit(lambda params, batch: {n: call(task, n, params, batch).astype(jnp.float32) for n in names})


@dataclass(frozen=True)
class Features(Metric):
    """Writes `features` float32 [N, D] of a split, in its order, to an .npz file; of labelled data `label` [N] as well.

    With `maps` also `feature_map`, one vector for each place: [N, H, W, D] of images. Maps go to the file batch by batch,
    so that they need no memory; whoever opens them with numpy needs it.
    """

    out: str = ""  # the file, FILE.npz; never one that exists
    split: str = "test"
    maps: bool = False  # True: `feature_map` as well
    limit: Count | None = None  # examples at most, the first ones
    batch: Count = 256

    name = "features"
    needs = (Encodes,)

    def check(self, task: Any) -> None:
        """UserError: while training there is nothing to write."""
        raise UserError(
            "evals has the metric features, which writes a file and gives no figure; leave it out and use "
            "`zoo eval RUN features out=FILE.npz`"
        )

    def __call__(self, task: Any, params: Params, data: Any, rng: jax.Array) -> dict[str, Any]:
        """`path` of the file, `count` of examples, `dims` of their features; with maps `map_shape`.

        Raises:
            UserError: no file to write, one that exists, a task without maps, an empty split, or features that are not
                finite; no file is left then.
        """
        out = self._file()
        if self.maps:
            check_needs(task, (Maps,), "maps=true of the metric features")
        spec = task.spec(self.batch)
        source = data.source(self.split, spec)
        groups = source.groups
        size = len(source if not groups else groups[0])  # what `epoch` goes through
        if not size:
            raise UserError(
                f"split={self.split} of the metric features: the data have no such examples; give another split"
            )
        spec = {key: leaf for key, leaf in spec.items() if key != "label"}
        extract = _extractor(task, self.maps)
        shapes = jax.eval_shape(extract, params, spec)
        label = source[0 if not groups else int(groups[0][0])].get("label")
        if label is not None:
            spec["label"] = jax.ShapeDtypeStruct((self.batch, *np.shape(label)), np.asarray(label).dtype)
        features: list[np.ndarray] = []
        labels: list[np.ndarray] = []

        def rows() -> Iterator[np.ndarray]:
            """The maps of every batch; what else it has goes to the lists."""
            for batch, count in epoch(data, self.batch, split=self.split, spec=spec, limit=self.limit):
                if label is not None:
                    labels.append(batch.pop("label")[:count])
                found = finite(extract(params, batch), "features", task, self)
                features.append(found["features"][:count])
                yield found.get("feature_map", found["features"])[:count]

        size = size if self.limit is None else min(self.limit, size)
        with _whole(out) as archive:
            if self.maps:
                _stream(archive, "feature_map", (size, *shapes["feature_map"].shape[1:]), rows())
            else:
                for _ in rows():
                    pass
            arrays = {"features": np.concatenate(features)}
            if label is not None:
                arrays["label"] = np.concatenate(labels)
            for name, array in arrays.items():
                _stream(archive, name, array.shape, iter([array]), array.dtype)
        about = {"path": str(out), "count": size, "dims": int(shapes["features"].shape[-1]), "split": self.split}
        return {**about, "map_shape": list(shapes["feature_map"].shape[1:])} if self.maps else about

    def _file(self) -> Path:
        if not self.out:
            raise UserError("the metric features has no file to write; add out=FILE.npz")
        if "://" in self.out:
            raise UserError(f"out={self.out} of the metric features: it is written here; give a local file and copy it")
        out = Path(self.out)
        if out.suffix != ".npz":
            raise UserError(f"out={self.out} of the metric features ends in {out.suffix!r}; give a name in .npz")
        if out.exists():
            raise UserError(f"out={self.out} of the metric features exists; remove it first, or give another file")
        if not out.absolute().parent.is_dir():
            raise UserError(
                f"out={self.out} of the metric features: its folder does not exist; make it, or give another"
            )
        return out


@contextlib.contextmanager
def _whole(out: Path) -> Iterator[zipfile.ZipFile]:
    """An archive that lies at `out` once it is whole; on any error nothing is left."""
    with (
        files.writing(out, "choose another place with out= of the metric features, or fewer examples with limit="),
        files.whole(out) as new,
        zipfile.ZipFile(new, "w") as archive,
    ):
        yield archive


def _stream(
    archive: zipfile.ZipFile,
    name: str,
    shape: tuple[int, ...],
    parts: Iterator[np.ndarray],
    dtype: Any = np.float32,
) -> None:
    """Write an array, as `np.savez` does, from its parts along the first axis."""
    with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
        about = {"descr": np.lib.format.dtype_to_descr(np.dtype(dtype)), "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, about)
        for part in parts:
            file.write(np.ascontiguousarray(part, dtype).data)
