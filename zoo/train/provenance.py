"""Whether the encoders of a run are those that its data were made with, and networks of texts have their symbols."""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping
from typing import Any

from zoo import config, models, paths, weights
from zoo.data.vocabulary import open_vocabulary
from zoo.encoders import tokenizer
from zoo.errors import UserError
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
                f"encode the images again with `zoo prepare --encode {key}=...`, or name that {name} in weights.{key}"
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
            f"task.template={made['template']}, or encode them again {aspects} --aspects"
        )


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
            f"(digest {here}), beside weights.text; encode the captions again with `zoo prepare --encode text={found}`, or "
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
