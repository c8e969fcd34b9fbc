"""Exports on disk: safetensors with a checksum per tensor, config, card, and what the model does as StableHLO."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from zoo.errors import UserError
from zoo.files import filled, sha256, sha256_of_file, sha256_of_json, writing
from zoo.task import Params
from zoo.weights.layout import few, flatten, matching, named_leaves, stacked, unflatten

FORMAT = 1  # of exports; a reader refuses any other

_PROGRAMS = ("sampler", "features", "denoiser", "energy")  # what a portable program gives; its files are named so
_STABLEHLO = tuple(f"{name}.{end}" for name in _PROGRAMS for end in ("bin", "json"))
_EXPORT = (
    "model.safetensors",
    "config.json",
    "README.md",
    "spiece.model",  # zoo.encoders.tokenizer.NAME, which may not be imported here
    *("vocabulary.json", "tokenizer.json", "tokenizer.model"),  # what zoo.data.text.vocabulary writes
    "stablehlo",
    *(f"stablehlo/{name}" for name in _STABLEHLO),
)
AGAIN = "download or export it again"


def save(
    folder: str | Path,
    params: Params,
    config: Mapping[str, Any],
    card: str,
    files: Mapping[str, bytes] | None = None,
) -> None:
    """Write an export: `model.safetensors` (stacked layout), `config.json`, `README.md` (the card) and further `files`.

    The safetensors metadata holds one sha256 per tensor and one of the config; the card gets the sha256 of the weights
    file as its last line. The folder appears whole or not at all, and replaces an earlier export, its portable program included;
    for the moment of the exchange the earlier one lies beside it as `.NAME.*.old`. UserError when the folder holds
    anything that is not an export, or cannot be written.
    """
    flat = {name: np.asarray(leaf, order="C") for name, leaf in flatten(stacked(jax.device_get(params))).items()}
    text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
    manifest = {
        "format": FORMAT,
        "config": sha256_of_json(json.loads(text)),
        "tensors": {name: _digest(array) for name, array in flat.items()},
    }
    with _replacing(folder, _EXPORT, needed=_EXPORT[:2]) as new:
        (new / "config.json").write_text(text, encoding="utf-8")
        for name, data in (files or {}).items():
            (new / name).write_bytes(data)
        # one metadata key only: several are written in random order, and equal weights should make equal files
        save_file(flat, new / "model.safetensors", metadata={"zoo": json.dumps(manifest)})
        shutil.copymode(new / "config.json", new / "model.safetensors")  # safetensors makes files for the owner alone
        whole = sha256_of_file(new / "model.safetensors")
        (new / "README.md").write_text(
            f"{card.rstrip()}\n\nsha256 of `model.safetensors`: `{whole}`\n", encoding="utf-8"
        )


def load(folder: str | Path) -> tuple[Params, dict[str, Any]]:
    """Parameters (nested numpy arrays, stacked layout) and config of an export, every sha256 verified.

    Raises UserError for a folder that is no export, and for a damaged file, naming the file and the tensor.
    """
    folder = Path(folder)
    for name in _EXPORT[:2]:
        if not (folder / name).is_file():
            raise UserError(f"{folder} is no export: it has no {name}; `zoo export RUN {folder}` makes one")
    path = folder / "model.safetensors"
    flat, metadata = read_safetensors(path)
    try:
        manifest = json.loads(metadata["zoo"])
        version, digests, config_digest = manifest["format"], dict(manifest["tensors"]), manifest["config"]
    except (KeyError, TypeError, ValueError):
        raise UserError(f"{path} was not written by `zoo export`, or is damaged; {AGAIN}") from None
    if version != FORMAT:
        raise UserError(f"{path} has export format {version}, but this zoo reads format {FORMAT}; update zoo")
    for name in sorted(digests.keys() | flat.keys()):
        if name not in flat or digests.get(name) != _digest(flat[name]):
            raise UserError(f"{path} is damaged: the sha256 of {name!r} is not the one it was written with; {AGAIN}")
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{folder / 'config.json'} cannot be read ({error}); {AGAIN}") from None
    if not isinstance(config, dict) or config_digest != sha256_of_json(config):
        raise UserError(f"{folder}: config.json was changed, or model.safetensors is of another export; {AGAIN}")
    return unflatten(flat), config


def card(
    *,
    task: str,
    paper: str,
    data: str,
    steps: int | None,
    metrics: Mapping[str, float | str],
    kind: str,
    parameters: int,
    precision: str = "float32",
    licence: str | None = None,
) -> str:
    """A short markdown card.

    Args:
        paper: title line of the paper's file.
        parameters: the count of numbers.
        precision: their dtypes.
        licence: terms of published weights that these come from.
    """
    known = f"{licence[0].upper()}{licence[1:]}.\n\n" if licence else ""
    rows = [
        ("Task", f"`{task}`"),
        ("Paper", paper),
        ("Data", data),
        ("Steps", "unknown" if steps is None else f"{steps:,}"),
        ("Weights", {"ema": "moving average (EMA)", "raw": "raw, of the last step"}.get(kind, kind)),
        ("Parameters", f"{parameters:,}"),
        ("Precision", precision),
        *((name, value if isinstance(value, str) else f"{value:.6g}") for name, value in metrics.items()),
    ]
    table = "\n".join(f"| {name} | {str(value).replace('|', chr(92) + '|')} |" for name, value in rows)
    return f"""# {task.rpartition(".")[2]}

| | |
|---|---|
{table}

```python
import zoo
model = zoo.load("this/folder")
print(model)
```

## Licence

{known}No licence is granted by this card. The weights are subject to the terms of the data they were trained on and to what
their publisher chooses; state it here before sharing them.
"""


@contextmanager
def _replacing(folder: str | Path, ours: Sequence[str], needed: Sequence[str]) -> Iterator[Path]:
    """A new folder to fill, which then takes the place of `folder`; on any error nothing has changed."""
    folder = Path(folder).resolve()
    with writing(folder, "free some space or choose another folder", SafetensorError):
        if folder.exists():
            if not folder.is_dir():
                raise UserError(f"{folder} is a file; give a folder that does not exist yet")
            found = (path.relative_to(folder).as_posix() for path in folder.rglob("*"))
            names = list(islice(found, len(ours) + 1))
            foreign = [name for name in names if name not in ours]
            lost = [name for name in needed if name not in names] if names else []
            if foreign or lost:
                why = f"it holds {few(sorted(foreign))}" if foreign else f"it is not empty and has no {lost[0]}"
                raise UserError(f"{folder} is not an export: {why}; choose a folder that does not exist yet")
        with filled(folder) as new:
            yield new


def _digest(array: np.ndarray) -> str:
    """sha256 of dtype, shape and bytes: F32 read as I32 has the same bytes but is not the same tensor."""
    return sha256(f"{array.dtype.name} {array.shape} ", np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)


def read_safetensors(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Tensors and metadata of a file; UserError when it is missing, cut short or malformed."""
    try:
        with safe_open(path, framework="np") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is not a whole safetensors file ({error}); {AGAIN}") from None
    except (AttributeError, TypeError) as error:
        raise UserError(f"{path} holds a dtype that numpy lacks ({error}); convert it to float32 or bfloat16") from None


@dataclass(frozen=True)
class Program:
    """What a model does, (params, *arguments) -> arrays by name, as `export_stablehlo` writes it."""

    call: Callable[..., Mapping[str, Any]]
    arguments: tuple[Any, ...] = ()  # trees of arrays or ShapeDtypeStructs
    about: Mapping[str, Any] = field(default_factory=dict)  # what else NAME.json says of it


def export_stablehlo(
    folder: str | Path,
    programs: Mapping[str, Program],
    params: Params,
    platforms: Sequence[str] = ("cpu", "cuda", "tpu"),
) -> None:
    """Write portable programs to `folder/stablehlo`, beside the weights, in the place of earlier ones.

    `params` are arrays or ShapeDtypeStructs. A program takes the parameters in stacked layout, just as `model.safetensors`
    holds them, so no weights are baked into it. `NAME.json` says how to call `NAME.bin`. Programs may stop loading with later
    versions of jax; weights and config are what lasts. UserError when `folder` is no export yet.

    Args:
        programs: by name, "sampler", "features", "denoiser" or "energy".
    """
    if not (Path(folder) / "model.safetensors").is_file():
        raise UserError(
            f"{folder} has no model.safetensors for the programs to lie beside; export the weights there first"
        )
    made = {name: _exported(name, program, params, platforms) for name, program in programs.items()}
    with _replacing(Path(folder) / "stablehlo", _STABLEHLO, needed=()) as new:
        for name, (blob, about) in made.items():
            (new / f"{name}.bin").write_bytes(blob)
            (new / f"{name}.json").write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")


def _exported(name: str, made: Program, params: Params, platforms: Sequence[str]) -> tuple[bytes, dict[str, Any]]:
    from jax import export

    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(np.shape(x), x.dtype), (params, *made.arguments))

    def call(stacked_params: Params, *rest: Any) -> dict[str, Any]:
        return dict(made.call(matching(stacked_params, shapes[0]), *rest))

    inputs = (stacked(shapes[0]), *shapes[1:])
    program = export.export(jax.jit(call), platforms=tuple(platforms))(*inputs)
    blob = bytes(program.serialize())
    outputs = jax.eval_shape(call, *inputs)
    return blob, {
        "format": FORMAT,
        "program": f"{name}.bin",
        "sha256": sha256(blob),
        "jax": jax.__version__,
        "calling_convention": program.calling_convention_version,
        "platforms": list(program.platforms),
        "call": "jax.export.deserialize(bytearray(program)).call(params, ...), or zoo.weights.load_stablehlo(folder, name); "
        "params: the tensors of ../model.safetensors as nested dicts, names split at '/'",
        "arguments": [_describe(x) for x in inputs],
        "results": _describe(outputs),
        **made.about,
    }


def load_stablehlo(folder: str | Path, name: str | None = None) -> Callable[..., dict[str, jax.Array]]:
    """A program that `export_stablehlo` wrote: a function of the parameters of `load` and the other arguments.

    Args:
        name: "sampler", "features", "denoiser" or "energy"; None: the first of these that is there.
    """
    from jax import export

    folder = Path(folder) / "stablehlo"
    name = name or next((name for name in _PROGRAMS if (folder / f"{name}.json").exists()), _PROGRAMS[0])
    try:
        about = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
        blob = (folder / f"{name}.bin").read_bytes()
        digest, platforms = about["sha256"], about["platforms"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{folder} holds no readable {name} ({error}); `zoo export RUN OUT --format stablehlo` makes one"
        ) from None
    if sha256(blob) != digest:
        raise UserError(f"{folder / f'{name}.bin'} is damaged: its sha256 is not the one it was written with; {AGAIN}")
    here = {"gpu": "cuda"}.get(jax.default_backend(), jax.default_backend())
    if here not in platforms:
        raise UserError(
            f"{folder} was exported for {', '.join(platforms)}, not for {here}; export it for {here} as well"
        )
    try:
        return jax.jit(export.deserialize(bytearray(blob)).call)
    except ValueError as error:
        raise UserError(
            f"{folder} was exported by jax {about.get('jax')}, which jax {jax.__version__} cannot load ({error}); "
            "export it again from the weights"
        ) from None


def _describe(tree: Any) -> Any:
    """Shape and dtype of each leaf, by name; a lone leaf without a name."""
    leaves = {n: {"shape": list(leaf.shape), "dtype": str(leaf.dtype)} for n, leaf in named_leaves(tree).items()}
    return leaves.get("", leaves)
