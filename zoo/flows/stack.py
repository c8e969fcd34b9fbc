"""A stack of affine autoregressive blocks over tokens: data to noise and back, density, score and denoising.

What TarFlow (arXiv:2412.06329) and STARFlow (arXiv:2506.06276) have in common; a paper brings the networks of its blocks and
what they are conditioned on. B examples, T tokens, D numbers per token, Q of the tokens.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Protocol

import chex
import jax
import jax.numpy as jnp

from zoo.dist import constrain, gather_before_loop
from zoo.errors import UserError
from zoo.flows.inverse import Chain, Guidance, Inverted, Jacobi, PreviousBlock, Rule, Stepper, invert
from zoo.flows.transforms import LOG_2PI, affine
from zoo.nn.transformer import cast_trunk
from zoo.task import Params


class Net(Protocol):
    """The network of one block, a Flax module with a `Trunk` named `trunk` and a last layer named `out`.

    It is called with x [B, Q, D] in the block's own order, what it is conditioned on (a tree of arrays that lead with B, or
    None), a cache, the slot of the first x, and temperatures [B] or None. It returns log-scale and shift [B, Q, D] in
    float32, the cache, and whatever else its paper reads. Without a cache x are all tokens, and log-scale and shift belong to
    them; with one they belong to the tokens behind x. A parameter `start` [D] is what it puts in front of the first token;
    without one that token passes unchanged.
    """

    reverse: bool  # runs through the tokens backwards
    dtype: str
    prefix: int  # S, slots that the condition fills, with x None; 0: a condition is given at every call

    @property
    def guided(self) -> bool:
        """Whether guidance bends this block."""

    def apply(self, variables: Any, *inputs: Any) -> Any:
        """The call, for these parameters."""

    def fresh(self, rng: jax.Array) -> Params:
        """Fresh parameters."""

    def memory(self, rows: int) -> Any:
        """Empty caches for so many examples."""


def apply(net: Any, params: Params, *inputs: Any) -> Any:
    """What a Flax module gives for these parameters."""
    return net.apply({"params": params}, *inputs)


@dataclass(frozen=True)
class Stack:
    """Blocks, data first, and how they are guided. The parameters of block i lie under `block{i}`.

    `condition` is what the networks see, None where they see nothing or its absence; `weak` is its absence, for guidance.
    """

    nets: tuple[Net, ...]
    tokens: int  # T
    dims: int  # D
    rule: Rule  # of guidance, where none is named
    annealed: bool  # whether its weight grows with the place of a token, where nothing is said
    first: int  # place of the first token, as the paper counts; of the last one the weight is whole

    def guidance(self, value: float | Guidance) -> Guidance:
        """A weight or a guidance, with the paper's own rule where it names none."""
        return Guidance.of(value, self.rule, self.annealed)

    def order(self, x: jax.Array, i: int) -> jax.Array:
        """[B, T, D] from raster order to that of block i."""
        return x[:, ::-1] if self.nets[i].reverse else x

    def back(self, x: jax.Array, i: int) -> jax.Array:
        """The inverse of `order`."""
        return x[:, ::-1] if self.nets[i].reverse else x

    def length(self, i: int) -> int:
        """Tokens of block i."""
        return self.tokens

    def block(self, params: Params, i: int) -> Params:
        """The parameters of block i."""
        block: Params = params[f"block{i}"]
        return block

    def told(self, i: int, block: Params, condition: Any) -> Any:
        """What the network of block i is given of a condition, by the block's parameters: once, not at every token."""
        return condition

    def flow(self, params: Params, x: jax.Array, condition: Any = None) -> tuple[list[jax.Array], list[jax.Array]]:
        """Data to noise: [B, T, D] -> x and the output of every block (the last is z), and log-dets [B] per dimension."""
        chex.assert_shape(x, (None, self.tokens, self.dims))
        states, logdets = [x], []
        for i, net in enumerate(self.nets):
            u, block = self.order(states[-1], i), self.block(params, i)
            a, b, *_ = apply(net, block, u, self.told(i, block, condition))
            v, logdet = affine(u, a, b)
            states.append(constrain(self.back(v, i), "batch", "tokens", None))
            logdets.append(logdet)
        return states, logdets

    def forward(self, params: Params, x: jax.Array, condition: Any = None) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Data to noise.

        Args:
            x: [B, T, D], noise already added.

        Returns:
            z [B, T, D]; logdet [B], the mean over all T D dimensions (times T D: nats); and the sum over the inputs of all
            blocks of their mean square [B].
        """
        states, logdets = self.flow(params, x, condition)
        squares = [jnp.square(s).mean((1, 2)) for s in states[:-1]]
        return states[-1], sum(logdets[1:], logdets[0]), sum(squares[1:], squares[0])

    def chain(
        self,
        params: Params,
        batch: int,
        condition: Any = None,
        weak: Any = None,
        guidance: float | Guidance = 0.0,
        attention_temperature: float = 1.0,
    ) -> Chain:
        """The blocks as their inverse sees them, for `batch` examples; arguments as of `inverse`."""
        guidance = self.guidance(guidance)
        if guidance.active and not any(net.guided for net in self.nets):
            raise UserError(
                f"guidance={guidance.weight}: this model has no condition to be guided to; leave guidance out"
            )

        def stepper(i: int, before: PreviousBlock | None = None) -> Stepper:
            """Guided, both passes run as one batch of 2 B and see the same tokens (STARFlow section 3.3)."""
            net, rows, conditions, divide = self.nets[i], batch, condition, None
            guided = guidance.active and net.guided and (guidance.blocks == "all" or i == len(self.nets) - 1)
            if guided:
                rows, strong = 2 * batch, weak if condition is None else condition
                # what leads with 1 is the same for all, in both passes: a level of noise
                join = lambda x, y: jnp.concatenate([x, y]) if len(x) == batch else x  # noqa: E731
                conditions = jax.tree.map(join, strong, weak)
            tempered = not isinstance(attention_temperature, (int, float)) or attention_temperature != 1
            if tempered or (guided and guidance.tempered):
                divide = jnp.full((rows,), attention_temperature, jnp.float32)
                divide = divide.at[batch:].multiply(guidance.attention_temperature)
            cache = PreviousBlock.memory(before, lambda: net.memory(rows))
            mine = PreviousBlock.then(before, self.block(params, i))
            block = gather_before_loop(cast_trunk(mine, net.dtype), lambda: net.fresh(jax.random.key(0)))
            if net.prefix:
                chex.assert_shape(conditions, (rows, net.prefix, None))
                _, _, cache, *_ = apply(net, block, None, conditions, cache, 0, divide)
                conditions = None
            start, told = block.get("start"), self.told(i, block, conditions)

            def step(u: jax.Array, cache: Any, index: jax.Array) -> tuple[jax.Array, jax.Array, Any]:
                u = jnp.concatenate([u, u]) if guided else u
                a, b, cache, *_ = apply(net, block, u, told, cache, net.prefix + index, divide)
                if not guided:
                    return jnp.exp(a), b, cache
                place = self.first + index + jnp.arange(u.shape[1]) + (1 if start is None else 0)
                ramp = (place / (self.first + self.length(i) - 1))[:, None]
                return *guidance.apply((a[:batch], b[:batch]), (a[batch:], b[batch:]), ramp), cache

            return Stepper(step, cache, start, net.prefix)

        return Chain(len(self.nets), stepper, self.order, lambda i: params[f"block{i}"]["out"]["kernel"], self.back)

    def inverse(
        self,
        params: Params,
        z: jax.Array,
        condition: Any = None,
        weak: Any = None,
        guidance: float | Guidance = 0.0,
        *,
        attention_temperature: float = 1.0,
        method: str | Jacobi = "sequential",
    ) -> Inverted:
        """Noise to data, token by token with a key/value cache or by sweeps; jit it with a `Guidance` static.

        Args:
            z: [B, T, D] from N(0, I). Prior variances, where the parameters have some (`prior/var`), are multiplied in
                here, so the round trip reads inverse(forward(x) / sqrt(var)) = x.
            condition, weak: what to draw and its absence; `weak` is needed with guidance only.
            guidance: a weight w of the paper's own rule (0 is off; the usual scale is 1 + w), or a `Guidance`.
            attention_temperature: divides all attention logits.
            method: how blocks are inverted, see `zoo.flows.inverse.Jacobi.of`.

        Returns:
            the states on the way, z with its scaling first and the data last, the noise of training still in it.
        """
        chex.assert_shape(z, (None, self.tokens, self.dims))
        x = z * jnp.sqrt(params["prior"]["var"]) if "prior" in params else z
        return invert(self.chain(params, len(z), condition, weak, guidance, attention_temperature), x, method)

    def hidden(self, params: Params, x: jax.Array, condition: Any = None) -> jax.Array:
        """Mean over tokens of the middle block's last hidden layer, float32 [B, width], where its network gives that last."""
        middle = len(self.nets) // 2
        before = dataclasses.replace(self, nets=self.nets[:middle])
        x, block = self.order(before.flow(params, x, condition)[0][-1], middle), self.block(params, middle)
        *_, hidden = apply(self.nets[middle], block, x, self.told(middle, block, condition))
        return hidden.astype(jnp.float32).mean(1)

    def log_prob(self, params: Params, x: jax.Array, condition: Any = None) -> jax.Array:
        """log p(x) in nats [B] under N(0, I) on z, of noisy x [B, T, D] as it is."""
        z, logdet, _ = self.forward(params, x, condition)
        return self.tokens * self.dims * (logdet - 0.5 * jnp.square(z).mean((1, 2)) - 0.5 * LOG_2PI)

    def score(self, params: Params, x: jax.Array, condition: Any = None) -> jax.Array:
        """Gradient of log p (nats, whole example) with respect to each x, [B, T, D]."""
        return jax.grad(lambda x: self.log_prob(params, x, condition).sum())(x)

    def denoise(
        self, params: Params, x: jax.Array, sigma: float | jax.Array, condition: Any = None, strength: float = 1.0
    ) -> jax.Array:
        """One step of Tweedie's formula, x + strength sigma^2 score(x), for Gaussian noise of the level trained with."""
        return x + strength * sigma**2 * self.score(params, x, condition)
