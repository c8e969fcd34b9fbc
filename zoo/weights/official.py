"""Published checkpoints: reading files that cannot run code, and the two-way mapping of names and layouts."""

from __future__ import annotations

import logging
import pickle
import re
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeAlias

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
PICKLES = (".pkl", ".pickle")


_RAW = ("state_dict", "model", "model_state_dict", "module", "net", "network", "online_model", "params")
_EMA = ("ema", "model_ema", "ema_model", "state_dict_ema", "ema_state_dict", "model_ema_state_dict", "params_ema")
_ENTRIES = {"raw": _RAW, "ema": _EMA}
Which: TypeAlias = Literal["raw", "ema"]
_log = logging.getLogger("zoo")


def read_state_dict(path: str | Path, which: Which | None = None) -> dict[str, np.ndarray]:
    """Tensors by name from `.safetensors`, `.npz` or a PyTorch file; no file can run code.

    A folder gives the tensors of all its `.safetensors` files, or else of its `pytorch_model*.bin` files. A dict nested
    under "state_dict", "model", "ema" or the like is unwrapped: where a file holds weights and their average, those that are
    asked for, else the weights, and a warning says so. The prefixes "module." and "_orig_mod." (parallel and compiled PyTorch
    modules, `AveragedModel`) are stripped where all names carry them. bfloat16 of a PyTorch
    file becomes float32, which is exact. Raises UserError for anything that is not a plain file of tensors.
    """
    path = Path(path)
    if path.is_dir():
        return _read_folder(path, which)
    if not path.is_file():
        raise UserError(f"{path} is no file; give a checkpoint in .safetensors, .npz or .pth format")
    with files.reading(path, "restore it, or remove it"), open(path, "rb") as file:
        files.check_head(path, file.read(64))
    state: Any
    if path.suffix == ".safetensors":
        state = read_safetensors(path)[0]
    elif path.suffix == ".npz":
        state = _read_npz(path)
    elif path.suffix in TORCH_SUFFIXES:
        state = _read_torch(path)
    elif path.suffix in PICKLES:
        raise UserError(
            f"{path} is a pickle, which runs code as it is opened, and is refused. Where you trust it, save its tensors with the "
            'code that it was made by, here of the entry `ema`: python -c "import pickle, numpy; '
            f"net = pickle.load(open('{path.name}', 'rb'))['ema']; numpy.savez('{path.stem}.npz', "
            '**{k: v.cpu().float().numpy() for k, v in net.state_dict().items()})"'
        )
    else:
        known = ", ".join((".safetensors", ".npz", *TORCH_SUFFIXES))
        raise UserError(f"{path} ends in {path.suffix or 'nothing'!r}; a checkpoint ends in one of {known}")
    if not state:
        raise UserError(f"{path} holds no tensors; give the file that holds the model's state dict")
    state = _chosen(path, state, which)
    averaged = state.pop("n_averaged", None)  # of torch.optim.swa_utils.AveragedModel
    if averaged is not None:
        _log.info("%s: the average of %d models", path, averaged)
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
    held = fill({key: whole[key] for key in given or {} if key in whole}, given or {})[0]
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
    why = task.about.lacks.get("import_names", "")
    if not isinstance(task, Published) or why:
        raise UserError(
            f"{type(task).__name__} knows no published layout{f' ({why})' if why else ''}; use `zoo export` and zoo.load, "
            "which need none"
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


def _read_folder(folder: Path, which: Which | None) -> dict[str, np.ndarray]:
    """All tensors of a folder whose files are parts of one checkpoint."""
    files = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*pytorch_model*.bin"))
    if not files:
        raise UserError(f"{folder} holds neither .safetensors nor pytorch_model*.bin files; give a checkpoint's file")
    state: dict[str, np.ndarray] = {}
    for file in files:
        part = read_state_dict(file, which)
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


def _read_torch(path: Path) -> Mapping[Any, Any]:
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
    if not isinstance(state, Mapping):
        raise UserError(f"{path} holds a {type(state).__name__}, not tensors by name; save the model's state_dict()")
    return state


def _chosen(path: Path, state: Mapping[Any, Any], which: Which | None) -> dict[str, np.ndarray]:
    """The tensors of a file, of the entry that is meant where it holds several."""

    def is_array(value: Any) -> bool:
        return isinstance(value, np.ndarray) or hasattr(value, "detach")

    taken: list[str] = []
    state = _nested(state)
    while True:
        entries = {
            kind: [key for key in keys if isinstance(state.get(key), Mapping)] for kind, keys in _ENTRIES.items()
        }
        odd = [str(name) for name, value in state.items() if not is_array(value)]
        if not odd or not any(entries.values()):
            break
        if not taken and not entries[which or "raw"]:
            there = next(key for keys in entries.values() for key in keys)
            raise UserError(
                f"{path} holds {'an average of the weights alone' if which is None else f'no {which} weights'} ({there!r}); "
                + ("take it with --weights ema" if which is None else f"leave --weights {which} out")
            )
        kind = which if which is not None and entries[which] else "raw" if entries["raw"] else "ema"
        taken.append(entries[kind][0])
        other = next(iter(entries["ema" if kind == "raw" else "raw"]), None)
        if other and which is None:
            _log.warning(
                "%s: the weights %r are taken; their average %r is beside them: --weights ema", path, taken[-1], other
            )
        state = state[taken[-1]]
    if which == "ema" and not taken:
        raise UserError(f"{path} holds one set of weights and no average beside it; leave --weights ema out")
    if odd:
        raise UserError(f"{path} holds entries that are not tensors: {few(odd)}; save the model's state_dict() alone")
    return {str(name): _numpy(tensor, str(name)) for name, tensor in state.items()}


def _nested(state: Mapping[Any, Any]) -> Mapping[Any, Any]:
    """A flat dict that holds weights and their average under prefixes ("online_model.", "ema_model."), as a nested one."""
    heads = {str(name).partition(".")[0] for name in state if "." in str(name)}
    both = heads <= {*_RAW, *_EMA} and heads & {*_RAW} and heads & {*_EMA}
    if not both:
        return state
    found: dict[str, Any] = {head: {} for head in heads}
    for name, value in state.items():
        head, dot, rest = str(name).partition(".")
        if dot:
            found[head][rest] = value
    return found
