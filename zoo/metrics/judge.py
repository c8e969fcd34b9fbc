"""Drawn texts judged by others: their perplexity under another language model, and a reward.

N texts, T tokens, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from zoo import hosts
from zoo.data.text.tokens import check_vocabulary
from zoo.diffusion.compare import image_of
from zoo.errors import UserError
from zoo.fields import Count
from zoo.metrics.samples import std_error
from zoo.metrics.text import _OfDrawn, check_texts, token_entropy
from zoo.rewards import LetterShare, Reward, rewarded
from zoo.task import Options, Params, Predicts, check_needs, options_of


@lru_cache(maxsize=4)
def _nats(task: Any) -> Any:
    """A jitted (params, tokens [B, T]) -> mean of -log p(token | those before it) [B]."""

    def nats(params: Params, tokens: jax.Array) -> jax.Array:
        logs = task.predict(params, tokens)
        return -jnp.take_along_axis(logs, tokens[..., None], -1)[..., 0].astype(jnp.float32).mean(1)

    return jax.jit(nats)


@dataclass(frozen=True)
class Judge(_OfDrawn):
    """Perplexity of drawn texts under another language model, `network`, beside the entropy of their tokens.

    Texts that repeat themselves are likely too: a perplexity says something at an entropy near that of the data alone. What
    starts with `data_` is the same of as many held-out texts. With `steps`, a row for each number of them and a picture.
    Samples that overflowed are counted as `not_finite` and left out.
    """

    network: str = ""  # a run or export that can `predict`
    steps: tuple[Count, ...] = ()  # of the sampler, each in turn; (): as its options say

    name = "judge"

    def opens(self) -> str:
        """The run or export that judges. UserError where none is named."""
        if not self.network:
            raise UserError(
                "the metric judge has no judge; set network=RUN_OR_EXPORT, a language model that can `predict`"
            )
        return self.network

    def check(self, task: Any) -> None:
        """UserError for a task that draws no texts, not with these options, or several times; asked before a run's first step."""
        if self.steps:
            raise UserError(
                "evals: steps of the metric judge make a table; leave them out, and run `zoo eval RUN judge network=RUN2 "
                f"steps={','.join(map(str, self.steps))}` after training"
            )
        self._options(task)

    def _options(self, task: Any) -> list[Options]:
        """Those of each row. UserError for a task that does not draw texts with them."""
        check_texts(task, self)
        found: list[Options] = [{**self.options, "steps": steps} for steps in self.steps]
        found = found or [self.options]
        for options in found:
            options_of(task, options, f"options of the metric {self.name}")
        return found

    def __call__(self, task: Any, params: Params, data: Any, rng: jax.Array, network: Any) -> dict[str, Any]:
        """The figures, of several `steps` as `judge`, a list of rows.

        Args:
            network: the judge, opened: anything with `task`, `params` and `vocabulary`.

        Raises:
            UserError: a judge that cannot predict, or of other texts.
        """
        each = self._options(task)
        self._check_judge(task, data, network)
        judge, weights = _nats(network.task), jax.tree.map(jnp.asarray, jax.device_get(network.params))

        def figures(tokens: np.ndarray) -> dict[str, float]:
            batches = -(-len(tokens) // self.batch)
            rows = np.resize(tokens, (batches * self.batch, tokens.shape[1]))  # one compiled shape
            parts = [hosts.fetch(judge(weights, part)) for part in np.split(rows, batches)]
            nats = np.concatenate(parts)[: len(tokens)].astype(np.float64)
            perplexity = math.exp(nats.mean())
            return {
                "perplexity": perplexity,
                "perplexity_std_error": perplexity * std_error(nats),
                "token_entropy": token_entropy(tokens),
            }

        rows = []
        for options in each:
            texts, lost = self.drawn(task, params, rng, options)
            found = figures(texts) if len(texts) else {}
            steps = {"steps": options["steps"]} if self.steps else {}
            rows.append({**steps, **found, "texts": len(texts), "not_finite": lost})
        real = {f"data_{k}": v for k, v in figures(self.held(task, data)).items()}
        about = {**real, "judge_network": self.network, "split": self.split}
        if not self.steps:
            return {**rows[0], **about}
        return {"judge": rows, **about, "pictures": {"judge": _picture(rows, real)}}

    def _check_judge(self, task: Any, data: Any, network: Any) -> None:
        where, other = f"network={self.network} of the metric judge", network.task
        check_needs(other, (Predicts,), where)
        check_texts(other, self)
        source = data.source(self.split, task.spec(1))
        check_vocabulary(task, source)
        ours, theirs = source.vocabulary, network.vocabulary
        if other.about.vocabulary != task.about.vocabulary or (ours and theirs and ours != theirs):
            raise UserError(
                f"{where} knows {theirs or other.about.vocabulary}, and the texts are of {ours or task.about.vocabulary}; name a "
                "judge that was trained on the same symbols"
            )
        length, wanted = (one.spec(1)["tokens"].shape[1] for one in (task, other))
        if length != wanted:
            raise UserError(
                f"{where} reads texts of {wanted} tokens, and these have {length}; name a judge of that length"
            )


def _picture(rows: Sequence[dict[str, Any]], real: dict[str, float]) -> Image.Image:
    """Perplexity and entropy by steps, each beside that of held-out texts."""
    from matplotlib.figure import Figure

    page = Figure(figsize=(7, 3.2), dpi=110, layout="constrained")
    drawn = [row for row in rows if "perplexity" in row]
    steps = [row["steps"] for row in drawn]
    words = {"perplexity": "perplexity under the judge", "token_entropy": "entropy of a text's tokens, nats"}
    for axes, (key, label) in zip(page.subplots(1, 2), words.items()):
        error = [2 * row[f"{key}_std_error"] for row in drawn] if key == "perplexity" else None
        axes.errorbar(steps, [row[key] for row in drawn], error, marker="o", ms=3, label="drawn")
        axes.axhline(real[f"data_{key}"], color="#888888", lw=1, ls="--", label="held-out")
        axes.set_xscale("log", base=2)
        axes.set(xlabel="steps", ylabel=label)
        axes.set_xticks(steps, [*map(str, steps)])
        axes.grid(color="#e4e4e4")
    axes.legend(fontsize=8)
    return image_of(page)


@dataclass(frozen=True)
class MeanReward(_OfDrawn):
    """The mean reward of drawn texts with its standard error, beside that of as many held-out ones."""

    reward: Reward = LetterShare()

    name = "reward"

    def __call__(self, task: Any, params: Params, data: Any, rng: jax.Array) -> dict[str, Any]:
        """`reward`, and `data_reward` of held-out texts. UserError for a reward that is no number for each text."""
        self.check(task)
        drawn, lost = self.drawn(task, params, rng, self.options)
        found: dict[str, Any] = {"texts": len(drawn), "not_finite": lost, "split": self.split}
        for name, texts in (("reward", drawn), ("data_reward", self.held(task, data))):
            values = rewarded(self.reward, texts, data.vocabulary()).astype(np.float64)
            if len(values):
                found |= {name: float(values.mean()), f"{name}_std_error": std_error(values)}
        return found
