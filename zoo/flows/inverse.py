"""Inverses of autoregressive flows, and the guidance that bends affine ones. One jitted program each.

A block of an affine flow solves u_t = v_t s(u_<t) + b(u_<t) for u, with v known: token by token, or as the fixed point of a
map of all tokens at once, whose dependence on earlier tokens alone makes it exact after as many sweeps as tokens. Other
couplings differ in how one token is solved for (`Stepper.solve`) and in nothing else.
Order of this file: guidance, how a block is inverted, blocks and chains of them, sequential inverse, Jacobi sweeps.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeAlias, cast

import jax
import jax.numpy as jnp

from zoo.errors import UserError
from zoo.fields import Count, NonNegative, Positive, Some, T, Whole, check_fields
from zoo.flows.transforms import affine_inverse
from zoo.nn.attention import clear_cache, reaches, reaching

# (tokens [B, Q, D], cache, index of the first) -> what the tokens behind them are solved with, then the cache. Of an
# affine block scale and shift [B, Q, D] each.
Step = Callable[[jax.Array, Any, jax.Array], tuple[Any, ...]]
Rule: TypeAlias = Literal["linear", "linear_scale", "gaussian"]  # of guidance


@dataclass(frozen=True)
class Guidance:
    """How far scale and shift of a token are pushed away from those of a second, weaker pass.

    The second pass has no label and no caption, and divides its attention logits by `attention_temperature`. A weight of
    0 is no guidance (the usual guidance scale is 1 + weight).

    Rules, with scale s = exp(a), shift b, and w the weight:
      linear: a + w (a - a_weak) and b + w (b - b_weak) (TarFlow, arXiv:2412.06329).
      linear_scale: s + w (s - s_weak) in place of the log-scale (iTARFlow, arXiv:2604.20041, and STARFlow's
        first baseline, arXiv:2506.06276).
      gaussian: the Gaussian whose score is (1 + w) score - w score_weak (STARFlow, Proposition 2): with
        r = min(s / s_weak, 1)^2 and d = 1 + w - w r, scale s / sqrt(d) and shift b + w r / d (b - b_weak).
    """

    weight: NonNegative = 0.0
    what: Literal["ab", "a", "b"] = "ab"  # scale and shift, scale only, shift only
    attention_temperature: Positive = 1.0
    rule: Rule | None = None  # None: the paper's own
    annealed: bool | None = None  # True: the weight grows linearly with the position; None: as the paper does
    blocks: Literal["all", "first"] = "all"  # of those that see the condition, or only the first one in generation

    def __post_init__(self) -> None:
        check_fields(self, "guidance.")
        if self.rule == "gaussian" and self.what != "ab":
            raise UserError(
                f"guidance.what={self.what!r}: the gaussian rule moves scale and shift together; leave what out, or set "
                "guidance.rule=linear"
            )

    @classmethod
    def of(cls, value: float | Guidance, rule: Rule, annealed: bool) -> Guidance:
        """A weight or a guidance, with what it leaves open filled in."""
        asked = value if isinstance(value, Guidance) else cls(value)
        return dataclasses.replace(
            asked, rule=asked.rule or rule, annealed=annealed if asked.annealed is None else asked.annealed
        )

    def warn(self, conditioned: bool) -> None:
        """Say where guidance changes nothing; `conditioned`: whether samples have a class or a caption."""
        if not self.active and self.tempered:
            warnings.warn(
                "guidance.weight is 0: the other fields of guidance do nothing; set a weight such as 2", stacklevel=3
            )
        if self.active and not conditioned and not self.tempered:
            warnings.warn(
                "guidance without a label or caption and with attention_temperature=1 compares a pass with itself: it changes "
                "nothing and costs twice; give one of them, or an attention temperature such as 0.5",
                stacklevel=3,
            )

    @property
    def active(self) -> bool:
        """Whether there is a second pass at all; a traced weight counts as active."""
        return not isinstance(self.weight, (int, float)) or self.weight > 0

    @property
    def tempered(self) -> bool:
        """Whether the second pass has an attention temperature of its own; a traced one counts."""
        return not isinstance(self.attention_temperature, (int, float)) or self.attention_temperature != 1

    def apply(
        self, strong: tuple[jax.Array, jax.Array], weak: tuple[jax.Array, jax.Array], ramp: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """(log-scale, shift) of both passes -> guided (scale, shift).

        `ramp` in (0, 1] is the annealing at the token's place, broadcast over [..., D]. A scale made by `linear_scale` may
        be negative.
        """
        weight = self.weight * (ramp if self.annealed else jnp.ones_like(ramp))
        (a, b), (a_weak, b_weak) = strong, weak
        if self.rule == "gaussian":
            ratio = jnp.exp(2 * jnp.minimum(a - a_weak, 0.0))
            total = 1 + weight * (1 - ratio)
            return jnp.exp(a) * jax.lax.rsqrt(total), b + weight * ratio / total * (b - b_weak)
        if "b" in self.what:
            b = b + weight * (b - b_weak)
        if "a" not in self.what:
            return jnp.exp(a), b
        if self.rule == "linear_scale":
            return jnp.exp(a) + weight * (jnp.exp(a) - jnp.exp(a_weak)), b
        return jnp.exp(a + weight * (a - a_weak)), b


ByBlock: TypeAlias = T | Some[T]  # one for all blocks, or one for each
Method = Literal["auto", "sequential", "jacobi", "gs_jacobi"]  # names of `Jacobi.of`
_MODULES = 8  # of "gs_jacobi"
_BOUND = 1e6  # sweeps never leave it: a token that overflows would reach earlier ones, as 0 times infinity
FINEST = 1e-6  # tolerance that float32 still resolves for tokens of about 1


@dataclass(frozen=True)
class Jacobi:
    """Inverts blocks by sweeps over many tokens at once (Gauss-Seidel-Jacobi, arXiv:2505.12849; arXiv:2505.24791).

    The tokens of a block are cut into `modules`, one after the other; within a module all tokens are replaced by
    v s(u) + b(u) again and again, until none of a sample's numbers moves by more than `tol`, or `sweeps` times. One module
    is Jacobi's method, as many as tokens the sequential loop. A module of L tokens is exact after L sweeps. Each sample
    stops by itself, so it does not depend on the others of its batch: by the criterion "max", and with `refresh`, without
    which keys and values are renewed for as long as any sample moves.

    A field with several values has one for each block of the flow, block 0 (nearest the data) first.
    """

    modules: ByBlock[Whole] = 1  # 0: this block goes token by token
    sweeps: ByBlock[Count | None] = None  # in a module at most; None: until it is exact
    tol: ByBlock[NonNegative] = 1e-5  # 0: until nothing moves any more
    start: ByBlock[Literal["v", "zeros"]] = "v"  # the first guess: what goes in, or zeros
    clamp: Positive | None = (
        None  # numbers are kept within it between sweeps; a sample that still needs it has not converged
    )
    criterion: Literal["max", "relative"] = "max"  # relative: mean square change over mean square, of bounded samples
    refresh: bool = (
        True  # keys and values of finished modules follow from their last tokens, not from those a sweep before
    )
    unconverged: Literal["sequential", "keep"] = (
        "sequential"  # what becomes of samples that `sweeps` did not suffice for
    )

    def __post_init__(self) -> None:
        check_fields(self, "method.")

    @classmethod
    def of(cls, method: str | Jacobi) -> Jacobi:
        """What a name stands for: "sequential", "jacobi", "gs_jacobi"; "auto" is sequential where nobody has chosen."""
        named = {"auto": 0, "sequential": 0, "jacobi": 1, "gs_jacobi": _MODULES}
        if isinstance(method, Jacobi):
            return method
        if method not in named:
            raise UserError(f"method={method!r} is unknown; choose one of {', '.join(named)}")
        return cls(modules=named[method])

    def block(self, i: int, blocks: int) -> Jacobi:
        """The values of block i. UserError when a field does not have one for each of `blocks`."""
        own = {}
        for name in ("modules", "sweeps", "tol", "start"):
            value = getattr(self, name)
            if isinstance(value, tuple) and len(value) != blocks:
                raise UserError(
                    f"method.{name}={','.join(map(str, value))}: {len(value)} values for the {blocks} blocks of this model; "
                    "give one, or one for each block"
                )
            own[name] = value[i] if isinstance(value, tuple) else value
        return dataclasses.replace(self, **own)


class Stepper(NamedTuple):
    """What inverts one block on one batch: its network on new tokens, its caches, and what stands before the first token."""

    step: Step
    cache: Any  # empty, or filled with a prefix
    start: jax.Array | None = None  # [D], fed before the first token; None: the first token passes unchanged
    prefix: int = 0  # slots of the cache that are filled
    # (v [..., D'], what `step` gave [..., *]) -> u [..., D], token by token
    solve: Callable[..., jax.Array] = affine_inverse


class PreviousBlock(NamedTuple):
    """The block that was inverted just before: what it gave, and its caches, whose memory the next one may take over."""

    u: jax.Array
    cache: Any

    @staticmethod
    def memory(before: PreviousBlock | None, fresh: Callable[[], Any]) -> Any:
        """Caches to begin with: those of the block before where they fit, else fresh ones.

        What they hold is overwritten before it is looked at. Made fresh for every block, all of them may be there at once.
        """
        if before is not None:
            old, new = (jax.tree.map(lambda x: (x.shape, x.dtype), c) for c in (before.cache, jax.eval_shape(fresh)))
            if old == new:
                return before.cache
        return fresh()

    @staticmethod
    def then(before: PreviousBlock | None, tree: Any) -> Any:
        """Parameters, for use after the block before: else the compiler may cast and gather those of all blocks at once."""
        return tree if before is None else jax.lax.optimization_barrier((tree, before.u))[0]


@dataclass(frozen=True)
class Chain:
    """The blocks of a flow on one batch of B examples. Block 0 is nearest the data and inverted last."""

    blocks: int
    # Of a block, after another that was inverted before it where one was; made anew for every use.
    stepper: Callable[..., Stepper]  # (block, before=None)
    order: Callable[[jax.Array, int], jax.Array]  # [B, T, D] from raster order to that of a block, or back
    out: Callable[[int], jax.Array] | None = (
        None  # [W, D] or [W, 2 D], the kernel of log-scale and shift of affine block i
    )
    back: Callable[[jax.Array, int], jax.Array] | None = None  # the inverse of `order` where it is not its own


class Inverted(NamedTuple):
    """The way back through a chain."""

    states: list[jax.Array]  # [B, T, D] each: what went in, then the state after each inverted block, the data last
    # What a sampler gives beside its samples; empty where all blocks went token by token.
    #   sweeps [B, blocks] int32: those that a sample took in each block; 0: token by token.
    #   unconverged [B, blocks] bool: whether they did not suffice, so that it went token by token after all, or was kept.
    report: dict[str, jax.Array]


def invert(chain: Chain, x: jax.Array, method: str | Jacobi = "sequential") -> Inverted:
    """Noise to data, [B, T, D] in raster order, through all blocks, the last one first.

    Raises:
        UserError: an unknown method, or one with as many values as there are no blocks.
    """
    method, states = Jacobi.of(method), [x]
    plans = [method.block(i, chain.blocks) for i in range(chain.blocks)]
    by_sweeps = [swept(plan, x.shape[1]) for plan in plans]
    sweeps = jnp.zeros((len(x), chain.blocks), jnp.int32)
    failed = jnp.zeros((len(x), chain.blocks), bool)
    before: PreviousBlock | None = None
    for i in reversed(range(chain.blocks)):
        v, stepper, plan = chain.order(x, i), chain.stepper(i, before), plans[i]
        tol = cast("float", plan.tol)
        if plan.modules and 0 < tol < FINEST:
            warnings.warn(
                f"method.tol={tol:g} is below what float32 resolves: block {i} goes token by token; set method.tol to "
                f"{FINEST:g} or more, or to 0 for sweeps until nothing moves",
                stacklevel=2,
            )
        if by_sweeps[i]:
            u, count, bad, cache = jacobi(stepper, v, plan)
            sweeps, failed = sweeps.at[:, i].set(count), failed.at[:, i].set(bad)
        else:
            u, cache = sequential(stepper, v)
        before = PreviousBlock(u, reaching(cache, None))
        x = (chain.back or chain.order)(u, i)
        states.append(x)
    return Inverted(states, {"sweeps": sweeps, "unconverged": failed} if any(by_sweeps) else {})


def swept(plan: Jacobi, tokens: int) -> bool:
    """Whether a block of so many tokens is inverted by sweeps; else it goes token by token."""
    modules, tol = cast("int", plan.modules), cast("float", plan.tol)
    return 0 < modules < tokens - 1 and not 0 < tol < FINEST


def feed(stepper: Stepper, u: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(first, rest): what a block is fed before all else [B, D], and the tokens of [B, T, D] that follow from it."""
    if stepper.start is None:
        return u[:, 0], u[:, 1:]
    return jnp.broadcast_to(stepper.start, (len(u), *stepper.start.shape)).astype(u.dtype), u


def once(stepper: Stepper, u: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Scale and shift [B, T, D] of all tokens of u at once, of an affine block; 1 and 0 for a first token that passes unchanged."""
    first, rest = feed(stepper, u)
    scale, shift, _ = stepper.step(jnp.concatenate([first[:, None], rest[:, :-1]], 1), stepper.cache, jnp.int32(0))
    if stepper.start is None:
        scale = jnp.pad(scale, ((0, 0), (1, 0), (0, 0)), constant_values=1)
        shift = jnp.pad(shift, ((0, 0), (1, 0), (0, 0)))
    return scale, shift


def sequential(stepper: Stepper, v: jax.Array) -> tuple[jax.Array, Any]:
    """Token by token: u_t = solve(v_t, step(u_{t-1})), of an affine block v_t s_t + b_t, in one `lax.scan`.

    Tokens leave the scan as outputs, so nothing of the size of the sequence is carried but the cache. On a TPU there are up
    to four scans, in which attention looks at no more of the cache than they will have filled.

    Args:
        v: [B, T, D] in the order of the flow, float32.

    Returns:
        u [B, T, D], and the caches as they are left.
    """

    def body(
        carry: tuple[jax.Array, Any], inputs: tuple[jax.Array, jax.Array]
    ) -> tuple[tuple[jax.Array, Any], jax.Array]:
        u, cache = carry
        index, v_next = inputs
        *outputs, cache = stepper.step(u[:, None], cache, index)
        u = stepper.solve(v_next, *(x[:, 0] for x in outputs))
        return (u, cache), u

    first, rest = feed(stepper, v)
    if not rest.shape[1]:
        return v, stepper.cache
    count, begin, parts = rest.shape[1], 0, []
    inputs, (last, cache) = (jnp.arange(count), rest.swapaxes(0, 1)), (first, stepper.cache)
    for end in reaches(count):
        cache = reaching(cache, stepper.prefix + end)
        (last, cache), part = jax.lax.scan(body, (last, cache), jax.tree.map(lambda x, b=begin, e=end: x[b:e], inputs))
        parts.append(part)
        begin = end
    u = (parts[0] if len(parts) == 1 else jnp.concatenate(parts)).swapaxes(0, 1)
    return u if stepper.start is not None else jnp.concatenate([v[:, :1], u], axis=1), cache


def jacobi(stepper: Stepper, v: jax.Array, plan: Jacobi) -> tuple[jax.Array, jax.Array, jax.Array, Any]:
    """One block by sweeps: a `lax.while_loop` over sweeps in a `lax.scan` over modules, all shapes static.

    Args:
        v: [B, T, D] in the order of the flow, float32.
        plan: with the values of this block.

    Returns:
        u [B, T, D]; the sweeps that each sample took, [B]; which samples did not converge, [B], for which u is the
        sequential result unless `plan.unconverged` keeps it as it is; and the caches as they are left.
    """
    first, target = feed(stepper, v)
    batch, count, _ = target.shape
    size = -(-count // min(cast("int", plan.modules), count))
    modules = -(-count // size)  # of 12 tokens, five modules of three would be one too many
    limit = size if plan.sweeps is None else min(cast("int", plan.sweeps), size)
    tol = cast("float", plan.tol)
    bound = _BOUND if plan.clamp is None else plan.clamp
    lost = ~jnp.isfinite(v).all((1, 2))  # samples that have overflowed before: there is nothing to find for them
    guess = jnp.clip(target, -bound, bound) if plan.start == "v" else jnp.zeros_like(target)

    class State(NamedTuple):
        """Of the sweeps over one module."""

        u: jax.Array  # [B, size, D]
        cache: Any
        sweep: jax.Array
        done: jax.Array  # [B], samples that move no more
        settled: jax.Array  # [B], whose keys and values follow from the tokens they ended with
        good: jax.Array  # [B], that converged or are exact
        sweeps: jax.Array  # [B]

    def module(carry: tuple[Any, ...], index: jax.Array) -> tuple[tuple[Any, ...], None]:
        u, cache, sweeps, good = carry
        # The last module reaches back over tokens that are done: they come out as they are.
        before = jnp.where(index > 0, jax.lax.dynamic_slice_in_dim(u, jnp.maximum(index - 1, 0), 1, 1)[:, 0], first)
        goal, seed = (jax.lax.dynamic_slice_in_dim(x, index, size, 1) for x in (target, guess))
        last = index >= count - size

        def sweep(state: State) -> State:
            *outputs, cache = stepper.step(jnp.concatenate([before[:, None], state.u[:, :-1]], 1), state.cache, index)
            found = stepper.solve(goal, *outputs)
            new = jnp.clip(jnp.where(jnp.isnan(found), seed, found), -bound, bound)
            sound = (new == found).all((1, 2))
            moves = ~state.done
            if plan.criterion == "max":
                still = jnp.abs(new - state.u).max((1, 2)) <= tol
            else:
                # what was clipped would make all else look small
                change, whole = (jnp.where(sound, jnp.square(x).mean((1, 2)), 0.0).mean() for x in (new - state.u, new))
                still = jnp.broadcast_to(change <= tol * whole, (batch,))
            exact = state.sweep + 1 >= size
            spent = state.sweep + 1 >= limit
            good = sound & (still | exact)
            return State(
                jnp.where(moves[:, None, None], new, state.u),
                cache,
                state.sweep + 1,
                state.done | (still & sound) | spent,
                state.done | exact | (not plan.refresh),
                jnp.where(moves, good, state.good),
                state.sweeps + moves,
            )

        def goes_on(state: State) -> jax.Array:
            return jnp.where(last, ~state.done, ~(state.done & state.settled)).any()

        part = jax.lax.dynamic_slice_in_dim(u, index, size, 1)
        end = jax.lax.while_loop(goes_on, sweep, State(part, cache, jnp.int32(0), lost, lost, lost, sweeps))
        return (jax.lax.dynamic_update_slice_in_dim(u, end.u, index, 1), end.cache, end.sweeps, good & end.good), None

    starts = jnp.minimum(jnp.arange(modules) * size, count - size)
    carry = (guess, stepper.cache, jnp.zeros((batch,), jnp.int32), jnp.ones((batch,), bool))
    (u, cache, sweeps, good), _ = jax.lax.scan(module, carry, starts)
    u = u if stepper.start is not None else jnp.concatenate([v[:, :1], u], axis=1)
    u = jnp.where(lost[:, None, None], jnp.nan, u)
    if plan.unconverged == "keep":
        return u, sweeps, ~good, cache

    def again(u: jax.Array, cache: Any) -> tuple[jax.Array, Any]:
        slow, cache = sequential(stepper._replace(cache=clear_cache(cache, stepper.prefix)), v)
        return jnp.where(good[:, None, None], u, slow), reaching(cache, None)

    u, cache = jax.lax.cond(good.all(), lambda u, cache: (u, cache), again, u, cache)
    return u, sweeps, ~good, cache
