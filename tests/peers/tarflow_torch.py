"""TarFlow in eager PyTorch: the yardstick of `zoo bench CONFIG --peer tests/peers/tarflow_torch.py` (arXiv:2412.06329).

Written from the paper's equations, with the parameter names of the published PyTorch checkpoints, so that an export in
that layout loads strictly. B images, S side, C channels, P patch, T tokens, D = C*P*P numbers per token, W width,
H heads, K head dim. Images go in and out as `[B, S, S, C]` in [-1, 1]; tokens are row-major, the numbers of one in
the order (channel, row, column).
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from itertools import pairwise
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Attention(nn.Module):
    """Pre-norm causal self-attention, `[B, T, W] -> [B, T, W]`; the residual is added by the caller."""

    def __init__(self, width: int, head_dim: int) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, h: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(h)).unflatten(-1, (3, -1, self.head_dim)).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    """Pre-norm MLP with exact GELU and hidden size 4W; the residual is added by the caller."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.main = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, h: Tensor) -> Tensor:
        return self.main(self.norm(h))


class Layer(nn.Module):
    """One transformer layer."""

    def __init__(self, width: int, head_dim: int) -> None:
        super().__init__()
        self.attention = Attention(width, head_dim)
        self.mlp = Mlp(width)

    def forward(self, h: Tensor) -> Tensor:
        h = h + self.attention(h)
        return h + self.mlp(h)


class FlowBlock(nn.Module):
    """One autoregressive affine map over the tokens; `flip` runs it from the last token to the first."""

    def __init__(self, task: Any, tokens: int, dim: int, flip: bool) -> None:
        super().__init__()
        self.flip, self.scale = flip, task.scale
        self.proj_in = nn.Linear(dim, task.width)
        self.pos_embed = nn.Parameter(0.01 * torch.randn(tokens, task.width))
        if task.classes:
            self.class_embed = nn.Parameter(0.01 * torch.randn(task.classes, 1, task.width))
        self.attn_blocks = nn.ModuleList(Layer(task.width, task.head_dim) for _ in range(task.depth))
        self.proj_out = nn.Linear(task.width, 2 * dim if task.scale else dim)
        nn.init.zeros_(self.proj_out.weight)
        # a constant of published checkpoints; the causal kernel does not read it
        self.register_buffer("attn_mask", torch.ones(tokens, tokens).tril())

    def offsets(self, label: Tensor | None) -> Tensor:
        """What every token gets added after `proj_in`, in raster order: `[1 or B, T, W]`."""
        if not hasattr(self, "class_embed"):
            return self.pos_embed[None]
        dropped = self.class_embed.mean(0, keepdim=True)  # no separate null embedding: the mean over classes
        if label is None:
            return self.pos_embed + dropped
        return self.pos_embed + torch.where((label < 0)[:, None, None], dropped, self.class_embed[label.clamp(min=0)])

    def forward(self, x: Tensor, label: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Tokens `[B, T, D]` to the next block's, and the log-determinant per dimension `[B]` (None if it is zero)."""
        h, u = self.offsets(label), x
        if self.flip:
            h, u = h.flip(1), u.flip(1)
        h = self.proj_in(u) + h
        for layer in self.attn_blocks:
            h = layer(h)
        # the output at token i - 1 drives token i: token 0 stays as it is, the last output is not needed
        out = F.pad(self.proj_out(h[:, :-1]), (0, 0, 1, 0)).float()
        if self.scale:
            a, b = out.chunk(2, -1)
            v, logdet = (u - b) * torch.exp(-a), -a.mean((1, 2))
        else:
            v, logdet = u - out, None
        return (v.flip(1) if self.flip else v), logdet


class Flow(nn.Module):
    """The whole flow over tokens `[B, T, D]`."""

    var: Tensor

    def __init__(self, task: Any) -> None:
        super().__init__()
        tokens, dim = (task.image // task.patch) ** 2, task.channels * task.patch**2
        self.width, self.depth, self.head_dim, self.scale = task.width, task.depth, task.head_dim, task.scale
        self.register_buffer("var", torch.ones(tokens, dim))
        self.blocks = nn.ModuleList(FlowBlock(task, tokens, dim, flip=t % 2 == 1) for t in range(task.blocks))

    def forward(self, x: Tensor, label: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Latent `[B, T, D]` of tokens `[B, T, D]`, and the log-determinant per dimension `[B]`."""
        total = x.new_zeros(len(x))
        for block in self.blocks:
            x, logdet = block(x, label)
            total = total if logdet is None else total + logdet
        return x, total

    def loss(self, x: Tensor, label: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Mean negative log-likelihood per dimension in nats, without the constant 0.5 log(2 pi); and the latent."""
        z, logdet = self(x, label)
        return 0.5 * z.square().mean() - logdet.mean(), z

    @torch.inference_mode()
    def inverse(
        self,
        z: Tensor,
        label: Tensor | None = None,
        guidance: float = 0.0,
        attention_temperature: float = 1.0,
        annealed: bool = True,
        what: str = "ab",
        dtype: torch.dtype = torch.float32,
    ) -> Tensor:
        """Tokens `[B, T, D]` of a standard normal latent `[B, T, D]`: token by token, with keys and values kept.

        Guidance moves the log-scale ("a"), the shift ("b") or both away from a second pass, without label and with
        attention logits divided by `attention_temperature`; it rides in the same batch. Annealed, its weight grows
        linearly and reaches `guidance` at the last token. `dtype` is the network's; log-scale, shift and tokens stay
        float32.
        """
        tokens = list((z * self.var.sqrt()).unbind(1))
        batch, count, guided = len(z), len(tokens), guidance > 0
        rows, heads = (2 * batch if guided else batch), self.width // self.head_dim
        # One cache per layer serves every block: what a block has not written yet, it does not read.
        caches = [z.new_empty(rows, 2, heads, count, self.head_dim, dtype=dtype) for _ in range(self.depth)]
        slots = [[(c[:, :, :, i], c[:, 0, :, : i + 1], c[:, 1, :, : i + 1]) for c in caches] for i in range(count - 1)]
        heat = None
        if guided and attention_temperature != 1:
            heat = torch.ones(rows, 1, 1, 1, dtype=dtype, device=z.device)
            heat[batch:] /= attention_temperature
        for block in cast(list[FlowBlock], list(self.blocks))[::-1]:
            offsets = block.offsets(label)
            if guided:
                offsets = torch.cat([o.expand(batch, -1, -1) for o in (offsets, block.offsets(None))])
            added = (offsets + block.proj_in.bias).to(dtype).unbind(1)
            win, wout, bout = (p.to(dtype) for p in (block.proj_in.weight, *block.proj_out.parameters()))
            # gain, bias of norm; qkv; proj; norm; main.0; main.2
            layers = [[p.to(dtype) for p in layer.parameters()] for layer in block.attn_blocks]
            order = range(count)[:: -1 if block.flip else 1]
            for i, (now, then) in enumerate(pairwise(order)):
                x = tokens[now].to(dtype)
                h = added[now] + F.linear(torch.cat([x, x]) if guided else x, win)
                size = h.shape[1:]
                for (g1, c1, wqkv, bqkv, wo, bo, g2, c2, w1, b1, w2, b2), (slot, keys, values) in zip(layers, slots[i]):
                    qkv = F.linear(F.layer_norm(h, size, g1, c1), wqkv, bqkv).view(rows, 3, heads, self.head_dim)
                    q, kv = qkv.split((1, 2), 1)
                    slot.copy_(kv)
                    q = q.transpose(1, 2)
                    mixed = F.scaled_dot_product_attention(q if heat is None else q * heat, keys, values)
                    h = h + F.linear(mixed.flatten(1), wo, bo)
                    h = h + F.linear(F.gelu(F.linear(F.layer_norm(h, size, g2, c2), w1, b1)), w2, b2)
                out = F.linear(h, wout, bout).float()
                if guided:
                    out, other = out.chunk(2)
                    weight = guidance * (i + 1) / (count - 1) if annealed else guidance
                    names = "ab" if self.scale else "b"
                    parts = zip(names, out.chunk(len(names), -1), other.chunk(len(names), -1))
                    out = torch.cat([torch.lerp(o, p, -weight) if name in what else o for name, o, p in parts], -1)
                if self.scale:
                    a, b = out.chunk(2, -1)
                    tokens[then] = torch.addcmul(b, tokens[then], a.exp())
                else:
                    tokens[then] = tokens[then] + out
        return torch.stack(tokens, 1)


class Peer:
    """What the benchmark drives: the same task, batches and weights as ours, in PyTorch.

    Batches are dicts with `image` `[B, S, S, C]` float32 in [-1, 1] and, for a conditional task, `label` `[B]` integers
    (-1: dropped); arrays of numpy, or tensors from `place`.
    """

    def __init__(self, task: Any, device: str | None = None, seed: int = 0) -> None:
        torch.manual_seed(seed)
        self.task = task
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        # bf16 where our own task asks for it and the hardware has it; float32 otherwise
        half = getattr(task, "dtype", "float32") == "bfloat16" and self.device.type == "cuda"
        self.dtype = torch.bfloat16 if half else torch.float32
        self.model = Flow(task).to(self.device)
        self.generator = torch.Generator(self.device).manual_seed(seed)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=1e-4, fused=True
        )

    def autocast(self) -> AbstractContextManager[Any]:
        """Mixed precision where the peer runs in bfloat16, a no-op elsewhere."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16)

    def load(self, state_dict: Mapping[str, np.ndarray]) -> None:
        """Take over every tensor of a published-layout state dict; a missing, extra or misshapen one raises."""
        self.model.load_state_dict({k: torch.tensor(np.asarray(v)) for k, v in state_dict.items()}, strict=True)

    def place(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """A batch on the device, so that a timed step need not pay for the copy."""
        dtypes = {"image": torch.float32, "label": torch.int64}
        return {
            k: v.to(self.device) if isinstance(v, Tensor) else torch.tensor(v, dtype=dtypes[k], device=self.device)
            for k, v in batch.items()
            if k == "image" or (k == "label" and self.task.classes)
        }

    def patchify(self, image: Tensor) -> Tensor:
        """`[B, S, S, C]` to tokens `[B, T, D]`."""
        s, p, c = self.task.image, self.task.patch, self.task.channels
        return image.view(-1, s // p, p, s // p, p, c).permute(0, 1, 3, 5, 2, 4).reshape(-1, (s // p) ** 2, c * p * p)

    def unpatchify(self, x: Tensor) -> Tensor:
        """Tokens `[B, T, D]` to `[B, S, S, C]`."""
        s, p, c = self.task.image, self.task.patch, self.task.channels
        return x.view(-1, s // p, s // p, c, p, p).permute(0, 1, 4, 2, 5, 3).reshape(-1, s, s, c)

    def noisy(self, image: Tensor) -> Tensor:
        """The image as training sees it: Gaussian noise, or uniform dequantisation of its grey levels."""
        if self.task.noise_type == "uniform":
            levels = self.task.levels
            u = torch.rand(image.shape, generator=self.generator, device=self.device)
            return (((image + 1) * ((levels - 1) / 2)).round() + u) * (2 / levels) - 1
        return image + self.task.noise * torch.randn(image.shape, generator=self.generator, device=self.device)

    def train_step(self, batch: Mapping[str, Any], sync: bool = True) -> float | Tensor:
        """One AdamW step with noise and label dropping. Returns the loss, with `sync=False` as an unread tensor."""
        batch = self.place(batch)
        label = batch.get("label")
        if label is not None and self.task.drop:
            kept = torch.rand(label.shape, generator=self.generator, device=self.device) >= self.task.drop
            label = torch.where(kept, label, -1)
        with self.autocast():
            loss, z = self.model.loss(self.patchify(self.noisy(batch["image"])), label)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        if not self.task.scale:
            self.model.var.lerp_(z.detach().square().mean(0), 0.1)
        return loss.item() if sync else loss.detach()

    @torch.no_grad()
    def forward(self, image: Any, label: Any = None) -> tuple[np.ndarray, np.ndarray]:
        """Latents `[B, T, D]` and log-determinants per dimension `[B]` of images as they stand, without noise."""
        batch = self.place({"image": image} if label is None else {"image": image, "label": label})
        with self.autocast():
            z, logdet = self.model(self.patchify(batch["image"]), batch.get("label"))
        return z.cpu().numpy(), logdet.cpu().numpy()

    @torch.no_grad()
    def loss(self, batch: Mapping[str, Any]) -> float:
        """Loss of a batch as it stands, without noise."""
        batch = self.place(batch)
        with self.autocast():
            return self.model.loss(self.patchify(batch["image"]), batch.get("label"))[0].item()

    def inverse(self, z: Any, label: Any = None, guidance: float = 0.0, **options: Any) -> np.ndarray:
        """Images `[B, S, S, C]`, unclipped, of latents `[B, T, D]`; options as in `Flow.inverse`."""
        z = torch.as_tensor(z, dtype=torch.float32, device=self.device)
        label = None if label is None else torch.as_tensor(label, device=self.device)
        x = self.model.inverse(z, label, guidance, dtype=self.dtype, **options)
        return self.unpatchify(x).cpu().numpy()

    def sample(self, n: int) -> np.ndarray:
        """`[n, S, S, C]` images, unclipped; classes in turn where the task has any."""
        z = torch.randn((n, *self.model.var.shape), generator=self.generator, device=self.device)
        label = torch.arange(n, device=self.device) % self.task.classes if self.task.classes else None
        return self.inverse(z, label)

    def peak_memory(self) -> int | None:
        """Most bytes allocated on the GPU since the last call; None on a CPU."""
        if self.device.type != "cuda":
            return None
        peak = torch.cuda.max_memory_allocated(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        return peak


def build(task: Any) -> Peer:
    """The peer of a `tarflow.TarFlow` (read by attribute only), freshly initialised, on the GPU where there is one."""
    return Peer(task)
