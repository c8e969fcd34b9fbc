"""Published checkpoints: reading files that cannot run code, and the two-way mapping of names and layouts."""

from __future__ import annotations

import pickle
import re
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from safetensors import SafetensorError
from safetensors.numpy import save_file

from zoo import files
from zoo.errors import UserError
from zoo.task import Name, Params, Published, Renames, Task
from zoo.weights.export import AGAIN, read_safetensors
from zoo.weights.layout import abstract, differs, few, fill, flatten, matching, refuse, stacked, unflatten

TORCH_SUFFIXES = (".pth", ".pt", ".bin", ".ckpt")


def read_state_dict(path: str | Path) -> dict[str, np.ndarray]:
    """Tensors by name from `.safetensors`, `.npz` or a PyTorch file; no file can run code.

    A folder gives the tensors of all its `.safetensors` files, or else of its `pytorch_model*.bin` files. A dict nested
    under "state_dict", "model" or "model_state_dict" is unwrapped, and the prefixes "module." and
    "_orig_mod." (parallel and compiled PyTorch modules) are stripped where all names carry them. bfloat16 of a PyTorch
    file becomes float32, which is exact. Raises UserError for anything that is not a plain file of tensors.
    """
    path = Path(path)
    if path.is_dir():
        return _read_folder(path)
    if not path.is_file():
        raise UserError(f"{path} is no file; give a checkpoint in .safetensors, .npz or .pth format")
    if path.suffix in (".pkl", ".pickle"):
        raise UserError(
            f"{path} is a pickle, which may run code when it is read, and is refused; where you trust it, load it with the code "
            "that wrote it and save the network's tensors alone: safetensors.torch.save_file(loaded['ema'].state_dict(), "
            f"'{path.with_suffix('.safetensors').name}')"
        )
    if path.suffix == ".safetensors":
        state = read_safetensors(path)[0]
    elif path.suffix == ".npz":
        state = _read_npz(path)
    elif path.suffix in TORCH_SUFFIXES:
        state = _read_torch(path)
    else:
        known = ", ".join((".safetensors", ".npz", *TORCH_SUFFIXES))
        raise UserError(f"{path} ends in {path.suffix or 'nothing'!r}; a checkpoint ends in one of {known}")
    if not state:
        raise UserError(f"{path} holds no tensors; give the file that holds the model's state dict")
    prefixes = ("module.", "_orig_mod.")
    while prefix := next((p for p in prefixes if all(name.startswith(p) for name in state)), None):
        state = {name.removeprefix(prefix): array for name, array in state.items()}
    return state


def write_state_dict(path: str | Path, state: Mapping[str, np.ndarray]) -> None:
    """Write tensors by name to `.safetensors`, `.npz` or `.pth`, whole or not at all."""
    path = Path(path)
    arrays = {name: np.asarray(array, order="C") for name, array in state.items()}
    # torch.save raises a RuntimeError when the disk is full
    with files.writing(path, "free some space or choose another place", SafetensorError, RuntimeError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with files.whole(path) as new, new.open("wb") as file:
            if path.suffix == ".npz":
                np.savez(file, **{n: x.astype(np.float32) if x.dtype.kind == "V" else x for n, x in arrays.items()})  # type: ignore[arg-type]
            elif path.suffix == ".safetensors":
                save_file(arrays, new)
            elif path.suffix in TORCH_SUFFIXES:
                torch = _torch(path)
                tensors = {
                    n: torch.tensor(x.astype(np.float32)).bfloat16() if x.dtype.kind == "V" else torch.tensor(x)
                    for n, x in arrays.items()
                }
                torch.save(tensors, file)
            else:
                raise UserError(f"{path} ends in {path.suffix or 'nothing'!r}; use .safetensors, .npz or .pth")


def from_official(task: Task, state_dict: Mapping[str, Any], given: Mapping[str, Params] | None = None) -> Params:
    """Parameters of `task` (float32 jax arrays, its own layout) from a published checkpoint of numpy or torch tensors.

    Applies `task.import_names()`, after `task.import_state` where the task has it. Raises one UserError that lists every
    tensor that is missing, unexpected or of another shape; constants may be absent.

    Args:
        given: whole trees by top-level key, such as frozen encoders, that are not taken from the checkpoint.
    """
    whole = abstract(task)
    held = _given(whole, given or {})
    own = {key: tree for key, tree in whole.items() if key not in held}
    names = [name for name in _import_names(task) if not name.target or name.target.split("/")[0] not in held]
    if isinstance(task, Renames):
        state_dict = task.import_state(state_dict)
    flat = {
        name: np.empty(leaf.shape, np.float32 if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf.dtype)
        for name, leaf in flatten(stacked(own)).items()
    }
    filled: dict[str, set[int | None]] = {}
    missing, shapes = [], []
    for name in names:
        if name.target is None:
            continue
        if name.target not in flat:
            raise ValueError(
                f"import_names of {type(task).__name__}: {name.target!r} is no parameter in stacked layout"
            )
        filled.setdefault(name.target, set()).add(name.layer)
        if name.source not in state_dict:
            missing.append(name.source)
            continue
        array = _numpy(state_dict[name.source], name.source)
        place = flat[name.target] if name.layer is None else flat[name.target][name.layer]
        theirs = _theirs(name, np.broadcast_to(np.zeros((), place.dtype), place.shape))
        if array.shape != theirs.shape:
            shapes.append(differs(name.source, array, theirs))
            continue
        place[...] = rearrange(array, name.layout, **name.sizes) if name.layout else array
    known = {name.source for name in names}
    unfilled = [
        target
        for target, array in flat.items()
        if None not in (layers := filled.get(target, set())) and len(layers) < (array.shape or (1,))[0]
    ]
    refuse(
        f"the checkpoint does not fit {type(task).__name__}",
        "check the fields of the task against the checkpoint",
        {
            "missing": missing,
            "unexpected": sorted(name for name in state_dict if name not in known),
            "wrong shape": shapes,
            "parameters that no tensor fills": unfilled,
        },
    )
    return jax.tree.map(jnp.asarray, {**matching(unflatten(flat), own), **held})


def _given(own: Params, given: Mapping[str, Params]) -> Params:
    """Trees that take the place of whole top-level keys of `own`; UserError where one does not fit."""
    return fill({key: own[key] for key in given if key in own}, given)[0]


def to_official(task: Task, params: Params) -> dict[str, np.ndarray]:
    """The published layout of `params`, constants included: the exact way back of `from_official`."""
    flat = flatten(stacked(jax.device_get(matching(params, abstract(task)))))
    state = {}
    for name in _import_names(task):
        if name.target is None:
            if name.value is not None:
                state[name.source] = np.asarray(name.value(), order="C")
            continue
        array = np.asarray(flat[name.target])
        state[name.source] = np.asarray(_theirs(name, array if name.layer is None else array[name.layer]), order="C")
    return state


def _import_names(task: Task) -> list[Name]:
    if not isinstance(task, Published):
        raise UserError(
            f"{type(task).__name__} knows no published layout; use `zoo export` and zoo.load, which need none"
        )
    return list(task.import_names())


def _theirs(name: Name, array: np.ndarray) -> np.ndarray:
    """One of our arrays in the published layout."""
    if name.layout is None:
        return array
    theirs, ours = name.layout.split("->")
    return rearrange(array, f"{ours}->{theirs}", **name.sizes)


def _numpy(tensor: Any, name: str) -> np.ndarray:
    """A numpy array of a numpy or torch tensor, without importing torch; bfloat16 of torch becomes float32."""
    if not hasattr(tensor, "detach"):
        return np.asarray(tensor)
    try:
        tensor = tensor.detach().cpu()
        return (tensor.float() if tensor.is_floating_point() and tensor.dtype.itemsize < 4 else tensor).numpy()
    except (TypeError, RuntimeError) as error:
        raise UserError(f"the tensor {name!r} is not a plain array ({error}); save it dense, as float32") from None


def _torch(path: Path) -> Any:
    try:
        import torch
    except ImportError:
        raise UserError(
            f"{path} is a PyTorch file, and PyTorch is not installed; install the extra `torch` "
            "(pip install -e '.[torch]'), or use .safetensors or .npz"
        ) from None
    return torch


def _read_folder(folder: Path) -> dict[str, np.ndarray]:
    """All tensors of a folder whose files are parts of one checkpoint."""
    files = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*pytorch_model*.bin"))
    if not files:
        raise UserError(f"{folder} holds neither .safetensors nor pytorch_model*.bin files; give a checkpoint's file")
    state: dict[str, np.ndarray] = {}
    for file in files:
        part = read_state_dict(file)
        if twice := [name for name in part if name in state]:
            raise UserError(
                f"{folder} holds the tensors {few(twice)} in {file.name} and in another file; give one of its files"
            )
        state |= part
    return state


def _read_npz(path: Path) -> dict[str, np.ndarray]:
    try:
        with np.load(path, allow_pickle=False) as file:
            state = {name: file[name] for name in file.files}
    except (
        ValueError,
        OSError,
        EOFError,
        AttributeError,
        TypeError,
        zipfile.BadZipFile,
        pickle.UnpicklingError,
    ) as error:
        raise UserError(f"{path} is not a plain .npz file of arrays ({error}); save it anew with numpy.savez") from None
    if odd := [name for name, array in state.items() if array.dtype.kind in "OVSU"]:
        raise UserError(
            f"{path} holds entries that are not numbers: {few(odd)}; save them as float32, or leave them out"
        )
    return state


def _read_torch(path: Path) -> dict[str, np.ndarray]:
    torch = _torch(path)
    try:
        with warnings.catch_warnings(action="ignore"):
            state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        asked = re.search(r"GLOBAL ([\w.]+)", str(error))
        why = f"asks for code to run ({asked[1]})" if asked else "is damaged, or more than a file of tensors"
        raise UserError(f"{path} {why} and is refused; save its state_dict() alone, or as .safetensors") from None
    except Exception as error:  # torch.load has no base class for what a damaged file may raise
        first = str(error).strip().partition("\n")[0]
        raise UserError(f"{path} cannot be read by PyTorch ({type(error).__name__}: {first}); {AGAIN}") from None
    while isinstance(state, Mapping) and not all(isinstance(x, torch.Tensor) for x in state.values()):
        inner = next(
            (k for k in ("state_dict", "model", "model_state_dict") if isinstance(state.get(k), Mapping)), None
        )
        if inner is None:
            odd = [str(name) for name, x in state.items() if not isinstance(x, torch.Tensor)]
            raise UserError(
                f"{path} holds entries that are not tensors: {few(odd)}; save the model's state_dict() alone"
            )
        state = state[inner]
    if not isinstance(state, Mapping):
        raise UserError(f"{path} holds a {type(state).__name__}, not tensors by name; save the model's state_dict()")
    return {str(name): _numpy(tensor, str(name)) for name, tensor in state.items()}
