"""Whether the data of a run are still those that it was begun on, of the classes, symbols and encoders that it knows."""

from __future__ import annotations

import ast
import dataclasses
import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from zoo import config, models, paths, weights
from zoo.data.documents import SPLITS as TEXT_SPLITS
from zoo.data.folders import SPLITS, some, tell
from zoo.data.pipeline import Data, named
from zoo.data.text.vocabulary import Vocabulary, open_vocabulary
from zoo.encoders import tokenizer
from zoo.errors import UserError
from zoo.paths import Folder
from zoo.run import Run
from zoo.task import Params, is_text

ENCODERS = {"vae": "autoencoder", "text": "text encoder"}


def check_encoders(run: Run, given: Mapping[str, Params]) -> None:
    """UserError when the data holds what other encoders made than those of this run, or made otherwise.

    Compared are the encoders in `given` (of `Run.weights`, or those restored), the units of `task.vae` and `task.template` with
    what the data says in `made_with`; also the tokeniser beside the text encoder, where there is one.
    """
    made, path, about = run.data.made_with(), run.data.place, run.task.about
    for key, name in ENCODERS.items():
        tree = given.get(key, given.get("", {}).get(key))
        if key not in made or tree is None:
            continue
        here = weights.encoder_digest(tree)
        if here != made[key]:
            field = f"weights.{key}={run.weights[key]}" if run.weights and key in run.weights else "the run's weights"
            raise UserError(
                f"data.path={path} holds latents made by another {name} (digest {made[key]}) than {field} (digest {here}); "
                f"encode the images again with `zoo prepare latents {key}=...`, or name that {name} in weights.{key}"
            )
    vae = about.networks.get("vae")
    for key, was in _units(made).items() if vae is not None else ():
        now = config.dump(vae.task).get(key)
        if now != was:
            value = str(was).strip("[]").replace(" ", "") or "()"
            raise UserError(
                f"task.vae.{key}={now}, but the latents in data.path={path} were made with {was}; set "
                f"task.vae.{key}={value}, or encode the images again"
            )
    if about.captions is None:
        return
    if "tokenizer" in made:
        _check_tokenizer(run, made["tokenizer"])
    if (template := about.captions.template) != made.get("template", template):
        aspects = "without" if made["template"] == "aspect" else "with"
        raise UserError(
            f"task.template={template!r}, but the captions in data.path={path} were encoded with {made['template']!r}; set "
            f"task.template={made['template']}, or encode them again {aspects} aspects=true"
        )


def check_classes(folder: Folder, before: Sequence[str], now: Sequence[str]) -> None:
    """UserError where the classes of a run's data are not those that it was begun with: its labels would change their meaning."""
    if [*before] == [*now]:
        return
    new, gone = [name for name in now if name not in before], [name for name in before if name not in now]
    said = [f"new: {some(new)}"] * bool(new) + [f"gone: {some(gone)}"] * bool(gone) or ["their order"]
    raise UserError(
        f"workdir={folder} belongs to a run on other classes ({'; '.join(said)}): it learned {some(before)}, and the data now have "
        f"{some(now) or 'none'}. Restore the data, or choose another workdir="
    )


def check_data(run: Run, folder: Folder) -> Callable[[], None]:
    """What is called to keep with a new run which data it is begun on: `data.json`, and of texts the vocabulary, for who samples
    where the data are not.

    UserError when the run was begun with another vocabulary (its tokens would change their meaning) or on other data. A folder of
    an earlier version has no `data.json`: it gets one.
    """
    vocabulary = vocabulary_of(run)
    before = None
    if vocabulary is not None:
        with paths.sentence(folder):
            before = open_vocabulary(folder)
        if before is not None and before.digest != vocabulary.digest:
            raise UserError(
                f"workdir={folder} belongs to a run of other tokens ({before}; the data now have {vocabulary}): the text or its "
                "tokenizer has changed. Choose another workdir=, or the old data"
            )
    now = _fingerprints(run.data, TEXT_SPLITS if is_text(run.task) else SPLITS)
    count = len(run.source("train"))
    known = check_kept(folder, run.data, now, count)

    def keep() -> None:
        if vocabulary is not None and before is None:
            with paths.sentence(folder, "write"):
                vocabulary.save(folder)
        if now and not known:
            about = {"format": "zoo-data", "version": 1, **now, "examples": count}
            paths.write(folder / "data.json", json.dumps(about, indent=1) + "\n")

    return keep


def check_kept(
    folder: Folder,
    data: Any,
    now: Mapping[str, str] | None = None,
    count: int | None = None,
    splits: Sequence[str] = TEXT_SPLITS,
) -> bool:
    """Whether a run folder says on which data it was begun. UserError where these have changed since.

    Args:
        now: their fingerprints by split, where they are known.
        count: of the examples to train on.
        splits: that are compared.
    """
    record = folder / "data.json"
    try:
        with paths.sentence(folder):
            known = json.loads(record.read_text())
        before = {split: str(known[split]) for split in TEXT_SPLITS if split == "train" or split in known}
    except (FileNotFoundError, NotADirectoryError):  # it may be an export or a config
        return False
    except UserError:
        raise
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{record} is damaged; remove it where the data are still those of the run") from None
    before = {split: before[split] for split in before if split in splits}
    now = _fingerprints(data, [*before]) if now is None else now
    if changed := [split for split in before if before[split] != now.get(split)]:
        where, were = f"data.path={data.place}" if data.place else f"data={type(data).__name__}", known.get("examples")
        counts = f": {were:,} examples to train on became {count:,}" if count and were and were != count else ""
        raise UserError(
            f"workdir={folder} belongs to a run on other data: the {' and the '.join(changed)} split of {where} was changed since it "
            f"was begun (files added, removed or replaced{counts}). Restore them; or choose another workdir=, to measure data=PATH"
        )
    return True


def _fingerprints(data: Any, splits: Sequence[str]) -> dict[str, str]:
    found = {split: data.fingerprint(split) for split in splits}
    return {split: digest for split, digest in found.items() if digest is not None}


def vocabulary_of(run: Run) -> Vocabulary | None:
    """What the tokens of the training data mean, where these are texts or captions without an encoder."""
    return run.source("train").vocabulary if is_text(run.task) or run.task.about.vocabulary else None


def by_name(metric: Any, data: Any, labels: tuple[str, ...]) -> tuple[Any, Any]:
    """A metric and data to measure on, label k of which is the class `labels[k]` of the model, whatever its number there."""
    if not labels or not metric.by_class:
        return metric, data
    if isinstance(metric.path, Data):
        metric = dataclasses.replace(metric, path=named(metric.path, labels))
    return metric, data if data is None else named(data, labels)


def check_numbers(run: Run, labels: Sequence[str]) -> None:
    """UserError when a held network of `Run.weights` numbers the run's classes otherwise; a warning for weights to begin with."""
    for key, where in (run.weights or {}).items() if labels else ():
        about = models.read_config(models.locate(weights.parts_of(where)[0]))
        theirs = about.get("labels", []) if about.get("run", about).get("task", {}).get("classes") else []
        if moved := [name for k, name in enumerate(labels) if name in theirs[:k] + theirs[k + 1 :]]:
            said = f"weights.{key}={where} learned other numbers for the classes {some(moved)} than the data have"
            if key in run.task.about.networks:
                raise UserError(
                    f"{said}; give data of the same classes in the same order ({some(theirs)}), or another model"
                )
            tell(f"{said}: what it knows of a class goes to another one")


def check_vocabularies(run: Run) -> None:
    """UserError when a network of `Run.weights` was trained on texts of other symbols than those of the data."""
    ours = run.data.vocabulary() if is_text(run.task) and run.weights else None
    for key, where in (run.weights or {}).items() if ours is not None else ():
        folder = models.locate(weights.parts_of(where)[0])
        with paths.sentence(folder):
            theirs = open_vocabulary(folder)
        if theirs is not None and theirs != ours:
            raise UserError(
                f"weights.{key}={where} was trained on other tokens ({theirs}) than the data have ({ours}); give the data that "
                "tokenizer, or name another model"
            )


def _check_tokenizer(run: Run, made: str) -> None:
    """UserError when the tokeniser beside the run's text encoder is another than that of the data's captions."""
    try:
        found = next((home for home in models.homes(None, run.weights) if tokenizer.held(home)), None)
        here = None if found is None else tokenizer.digest(found)
    except UserError:  # a resumed run does without the folder
        return
    if here not in (None, made):
        raise UserError(
            f"data.path={run.data.place} holds captions of another tokeniser (digest {made}) than {found}/{tokenizer.NAME} "
            f"(digest {here}), beside weights.text; encode the captions again with `zoo prepare latents text={found}`, or "
            "put the file there that they were encoded with"
        )


def _units(made: Mapping[str, str]) -> dict[str, Any]:
    """What of an autoencoder its weights do not tell and its latents depend on, as they were when a set was made."""
    found = {"scale": made["vae_scale"]} if "vae_scale" in made else {}
    if "vae_sizes" in made:  # which leaves out what is off
        for key, off in (("mean", "[]"), ("std", "[]"), ("unit", "False")):
            said = re.search(rf"(?:^|, ){key}=(\[[^]]*\]|\w+)", made["vae_sizes"])
            found[key] = said[1] if said else off
    return {key: ast.literal_eval(value) for key, value in found.items()}  # of which 20 equals 20.0
