"""TerDiT from scratch: a diffusion transformer whose weights are -1, 0 and +1.

The whole method of *TerDiT: Ternary Diffusion Models with Transformers* (arXiv 2405.14854) in the paper's order:

    1. Config, SIZES                what a model is made of
    2. ternarize, TernaryLinear     ternary weights, and how gradients get past the rounding  (paper 3.1)
    3. DiT                          the transformer, with an RMS Norm behind each adaLN       (paper 3.2, figure 3)
    4. GaussianDiffusion            what it is trained on and how it samples                  (DDPM, DDIM)
    5. pack_ternary, pack_model     four weights in a byte                                    (paper 3.3)
    6. save_checkpoint, load_model  our files, and the released TerDiT and Large-DiT folders

Letters in the shape comments: N batch, C channels, H W height and width, T tokens, D width of the model.
"""

import ctypes
import math
import os
import shlex
import subprocess
import tempfile
import threading
import warnings
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import Optional

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

# ----------------------------------------------------------------------------------------------------------------------
# 1. What a model is made of


@dataclass
class Config:
    """Everything needed to rebuild a model, and what a sampler must know of its data. JSON-able.

    `ternary=False, adaln_norm=False` is Large-DiT, the full-precision model that TerDiT quantizes.
    """

    input_size: int = 32  # height = width of what the model sees: latents of a 256x256 image are 32x32
    patch_size: int = 2
    in_channels: int = 4
    dim: int = 1536
    n_layers: int = 16
    n_heads: int = 32
    multiple_of: int = 256  # the FFN's width is 8/3 dim rounded up to this
    num_classes: int = 1000  # the null label of classifier-free guidance is num_classes itself
    class_dropout_prob: float = 0.1
    learn_sigma: bool = True
    prediction: str = "eps"  # "eps" is the paper; "v" learns large shapes sooner (GaussianDiffusion)
    qk_norm: bool = False
    norm_eps: float = 1e-5
    label_std: float = 0.02  # initial spread of the label embeddings
    pos_embed: bool = False  # add learned 2-D positions; the paper has rotary ones alone, along the raster
    ternary: bool = True
    adaln_norm: bool = True  # the paper's RMS Norm behind the adaLN projection
    class_names: list | None = None
    vae: str | None = None  # None: the model works on pixels in [-1, 1]
    latent_scale: float = 0.18215  # latents are multiplied by it to have a variance of about 1 (SD VAE)

    def __post_init__(self):
        for name in "input_size patch_size in_channels dim n_layers n_heads multiple_of num_classes".split():
            if not (isinstance(getattr(self, name), int) and getattr(self, name) > 0):
                raise ValueError(f"{name}={getattr(self, name)!r}, expected a whole number above 0")
        if self.dim % (2 * self.n_heads):
            raise ValueError(f"dim={self.dim} must split into n_heads={self.n_heads} heads of even width")
        if self.input_size % self.patch_size:
            raise ValueError(f"image size {self.input_size} is not a multiple of the patch size {self.patch_size}")
        if self.prediction not in ("eps", "v"):
            raise ValueError(f"prediction={self.prediction!r}, expected 'eps' or 'v'")
        if self.class_names is not None and len(self.class_names) != self.num_classes:
            raise ValueError(f"{len(self.class_names)} class names for {self.num_classes} classes")

    @property
    def cond_dim(self):
        """Width of the conditioning vector (Large-DiT caps it at 1024)."""
        return min(self.dim, 1024)

    @property
    def ffn_dim(self):
        hidden = int(2 * 4 * self.dim / 3)
        return -(-hidden // self.multiple_of) * self.multiple_of


_DIGITS = dict(input_size=24, patch_size=4, in_channels=3, multiple_of=64, num_classes=10, learn_sigma=False,
               prediction="v", label_std=0.5, pos_embed=True)  # fmt: skip
SIZES = {  # ternary weights: 2.7M, 7.2M, 33M, 132M, 604M, 4.2B
    "tiny": dict(**_DIGITS, dim=192, n_layers=4, n_heads=6),
    "small": dict(**_DIGITS, dim=256, n_layers=6, n_heads=8),
    "S": dict(dim=384, n_layers=12, n_heads=6),
    "B": dict(dim=768, n_layers=12, n_heads=12),
    "600M": dict(dim=1536, n_layers=16, n_heads=32),
    "4.2B": dict(dim=3072, n_layers=32, n_heads=32),
}  # fmt: skip

# ----------------------------------------------------------------------------------------------------------------------
# 2. Ternary weights


class _Ternarize(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weight, eps):
        # One buffer, four passes over memory: this runs on every weight at every step.
        codes = weight.abs()
        gamma = codes.mean() + eps
        return torch.div(weight, gamma, out=codes).round_().clamp_(-1, 1)

    @staticmethod
    def backward(ctx, grad_codes):
        return grad_codes, None


def ternarize(weight, eps=1e-6):
    """Round to -1, 0, +1 by the absmean rule (TerDiT eq. 1, from BitNet b1.58); gradients pass straight through.

    weight (N, K) float -> same shape and dtype: clip(round(weight / (mean|weight| + eps)), -1, 1), halves to even.
    Rounding has no useful derivative, so the backward is the identity (the straight-through estimator): the latent
    weight drifts as if it were used itself, and its code flips when it has drifted far enough.
    """
    return _Ternarize.apply(weight, eps)


class _TernaryWeight(torch.autograd.Function):
    """ternarize(weight) * alpha, cast to `dtype`: the fast path of TernaryLinear.

    Keeps one tensor for the backward (which the matmul keeps anyway) where the plain expression keeps two, and makes
    fewer passes over it: tests/bench_qat.py prints what is left of the cost.
    """

    @staticmethod
    def forward(ctx, weight, alphas, dtype):
        out = _Ternarize.forward(None, weight, 1e-6).mul_(alphas).to(dtype)
        ctx.save_for_backward(out, alphas)
        return out

    @staticmethod
    def backward(ctx, grad):
        out, alphas = ctx.saved_tensors
        # d/dalpha = <grad, codes> = <grad, out> / alpha. An alpha of exactly 0 gets no gradient.
        # In place, for the fresh pages of a copy cost more than the arithmetic. No one else holds `grad`, which F.linear's
        # backward has just made for this node alone, unless there is to be a second derivative (create_graph).
        if grad.dtype == torch.float32:
            scale = torch.mul if torch.is_grad_enabled() else torch.Tensor.mul_
            dot, grad = torch.dot(grad.flatten(), out.flatten()), scale(grad, alphas)
        else:
            dot, grad = torch.linalg.vecdot(grad, out).sum(dtype=torch.float32), grad.float().mul_(alphas)
        return grad, torch.where(alphas == 0, alphas, dot / alphas), None


class TernaryLinear(nn.Module):
    """A linear layer whose weight is ternary in the forward pass and full precision in the optimizer.

    `weight` (N, K) latent, `alphas` (1,) the layer's one learned scale, `bias` (N,) or None.  x (..., K) -> (..., N)
    """

    def __init__(self, in_features, out_features, bias=False):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.alphas = nn.Parameter(torch.empty(1))
        self.bias = nn.Parameter(torch.zeros(out_features)) if bias else None
        nn.init.xavier_uniform_(self.weight)
        with torch.no_grad():
            self.alphas.copy_(self.weight.abs().mean())

    def forward(self, x):
        # The plain form is F.linear(x, ternarize(self.weight) * self.alphas, self.bias).
        autocast = not x.is_meta and torch.is_autocast_enabled(x.device.type)
        dtype = torch.get_autocast_dtype(x.device.type) if autocast else x.dtype
        return F.linear(x, _TernaryWeight.apply(self.weight, self.alphas, dtype), self.bias)


# ----------------------------------------------------------------------------------------------------------------------
# 3. The model: Large-DiT with ternary linears and a normed adaLN


def modulate(x, shift, scale):
    return x * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)  # (N, T, D), (N, D), (N, D)


class RMSNorm(nn.RMSNorm):
    """In its own dtype: autocast hands it bf16, but what it normalizes steers whole layers."""

    def forward(self, x):
        return super().forward(x.to(self.weight.dtype))


def timestep_embedding(t, dim=256, max_period=10000):
    """Sinusoids of t (N,), fractions allowed -> (N, dim): the cosines, then the sines (ADM's order)."""
    half = dim // 2
    exponents = -math.log(max_period) * torch.arange(half, dtype=torch.float32, device=t.device) / half
    # exp in fp64: one rounding of fp32's, which differs between machines, turns the angle at t=999 by 6e-5.
    freqs = exponents.double().exp().float()
    args = t[:, None].float() * freqs
    return torch.cat([args.cos(), args.sin()], dim=-1)


class TimestepEmbedder(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(256, dim), nn.SiLU(), nn.Linear(dim, dim))

    def forward(self, t):
        return self.mlp(timestep_embedding(t).to(self.mlp[0].weight.dtype))


class LabelEmbedder(nn.Module):
    """One row a class, and a last row for "no class", which guidance needs (classifier-free guidance)."""

    def __init__(self, num_classes, dim):
        super().__init__()
        # Not nn.Embedding's own constructor: on the meta device its normal_ makes torch import its compiler, 100 MB.
        self.embedding_table = nn.Embedding.from_pretrained(torch.empty(num_classes + 1, dim), freeze=False)

    def forward(self, y):
        return self.embedding_table(y)


def rotary_table(n_tokens, head_dim, device=None, theta=10000.0):
    """exp(i * angle) (T, head_dim / 2) complex64: raster position times a frequency for each pair of channels."""
    freqs = 1.0 / theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32, device=device) / head_dim)
    angles = torch.outer(torch.arange(n_tokens, dtype=torch.float32, device=device), freqs)
    return torch.polar(torch.ones_like(angles), angles)


def rotate(x, freqs_cis):
    """Turn each pair (2i, 2i+1) of x (N, heads, T, head_dim) by its angle, in fp32 (RoFormer; Large-DiT)."""
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))  # (N, heads, T, head_dim / 2)
    return torch.view_as_real(pairs * freqs_cis).flatten(-2).to(x.dtype)


class Attention(nn.Module):
    def __init__(self, cfg, linear):
        super().__init__()
        self.n_heads = cfg.n_heads
        self.wq, self.wk, self.wv, self.wo = (linear(cfg.dim, cfg.dim, bias=False) for _ in range(4))
        # Over all heads together, before the rotation (Large-DiT).
        self.q_norm = nn.LayerNorm(cfg.dim, eps=cfg.norm_eps) if cfg.qk_norm else nn.Identity()
        self.k_norm = nn.LayerNorm(cfg.dim, eps=cfg.norm_eps) if cfg.qk_norm else nn.Identity()

    def forward(self, x, freqs_cis):
        heads = lambda z: z.unflatten(-1, (self.n_heads, -1)).transpose(1, 2)  # (N, T, D) -> (N, heads, T, head_dim)
        q = rotate(heads(self.q_norm(self.wq(x))), freqs_cis)
        k = rotate(heads(self.k_norm(self.wk(x))), freqs_cis)
        v = heads(self.wv(x))
        if x.device.type == "cpu" and torch.is_grad_enabled():
            # What SDPA computes. Its bf16 backward on a CPU takes 13 times as long as these two matmuls.
            out = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1).to(v.dtype) @ v
        else:
            out = F.scaled_dot_product_attention(q, k, v)
        return self.wo(out.transpose(1, 2).flatten(-2))  # (N, T, D)


class FeedForward(nn.Module):
    """SwiGLU: w2(silu(w1 x) * w3 x)."""

    def __init__(self, cfg, linear):
        super().__init__()
        self.w1 = linear(cfg.dim, cfg.ffn_dim, bias=False)
        self.w2 = linear(cfg.ffn_dim, cfg.dim, bias=False)
        self.w3 = linear(cfg.dim, cfg.ffn_dim, bias=False)

    def forward(self, x):
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class TransformerBlock(nn.Module):
    """Attention and SwiGLU, each shifted, scaled and gated by the timestep and the label (adaLN).

    Ternary weights are large next to trained full-precision ones, so the ternary adaLN projection puts out values
    that a small change of a few codes moves a lot. The paper's cure is one RMS Norm over all six vectors at once
    (paper 3.2, figures 3 and 4).
    """

    def __init__(self, cfg, linear):
        super().__init__()
        self.attention = Attention(cfg, linear)
        self.feed_forward = FeedForward(cfg, linear)
        self.attention_norm = RMSNorm(cfg.dim, eps=cfg.norm_eps)
        self.ffn_norm = RMSNorm(cfg.dim, eps=cfg.norm_eps)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), linear(cfg.cond_dim, 6 * cfg.dim, bias=True))
        if cfg.adaln_norm:
            self.adaLN_modulation.append(RMSNorm(6 * cfg.dim, eps=cfg.norm_eps))

    def forward(self, x, c, freqs_cis, modulation=None):
        modulation = self.adaLN_modulation(c) if modulation is None else modulation  # (N, 6 * D)
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = modulation.chunk(6, dim=1)
        attended = self.attention(modulate(self.attention_norm(x), shift_msa, scale_msa), freqs_cis)
        x = x + gate_msa.unsqueeze(1) * attended
        return x + gate_mlp.unsqueeze(1) * self.feed_forward(modulate(self.ffn_norm(x), shift_mlp, scale_mlp))


class FinalLayer(nn.Module):
    """Full precision: the last layer's errors are the image's errors (paper 3.1)."""

    def __init__(self, cfg, out_channels):
        super().__init__()
        self.norm_final = nn.LayerNorm(cfg.dim, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(cfg.dim, cfg.patch_size**2 * out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(cfg.cond_dim, 2 * cfg.dim))

    def forward(self, x, c):
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=1)
        return self.linear(modulate(self.norm_final(x), shift, scale))


class DiT(nn.Module):
    """The diffusion transformer. Parameter names are upstream's, so released checkpoints load.

    packed=True builds the inference model, whose ternary layers hold 2 bits a weight (see pack_model).
    """

    def __init__(self, config, packed=False):
        super().__init__()
        if packed and not config.ternary:
            raise ValueError("a full-precision model (ternary=False) has no ternary layers to pack")
        self.config = cfg = config
        self.out_channels = cfg.in_channels * (2 if cfg.learn_sigma else 1)
        linear = PackedTernaryLinear if packed else TernaryLinear if cfg.ternary else nn.Linear
        self.x_embedder = nn.Linear(cfg.patch_size**2 * cfg.in_channels, cfg.dim)
        self.t_embedder = TimestepEmbedder(cfg.cond_dim)
        self.y_embedder = LabelEmbedder(cfg.num_classes, cfg.cond_dim)
        n_tokens = (cfg.input_size // cfg.patch_size) ** 2
        self.pos_embed = nn.Parameter(torch.empty(n_tokens, cfg.dim)) if cfg.pos_embed else None
        self.layers = nn.ModuleList([TransformerBlock(cfg, linear) for _ in range(cfg.n_layers)])
        self.final_layer = FinalLayer(cfg, self.out_channels)
        if not (packed or self.x_embedder.weight.is_meta):
            self.init_weights()

    def init_weights(self):
        """The start of training. Two things differ from upstream, whose checkpoints never saw this code.

        alpha starts at mean|W|, so a ternary layer puts out about what its latent weights would. And the block starts
        as the identity (adaLN-Zero) through the RMS Norm's gain instead of a zero weight: a weight of zeros is +-1 as
        soon as it moves at all, and opens the gate to full in a single step.
        """
        cfg = self.config
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for linear in (self.t_embedder.mlp[0], self.t_embedder.mlp[2]):
            nn.init.normal_(linear.weight, std=0.02)
        nn.init.normal_(self.y_embedder.embedding_table.weight, std=cfg.label_std)
        if cfg.pos_embed:
            nn.init.normal_(self.pos_embed, std=0.5)
        for block in self.layers:
            if cfg.adaln_norm:
                nn.init.zeros_(block.adaLN_modulation[2].weight)
            elif not cfg.ternary:
                nn.init.zeros_(block.adaLN_modulation[1].weight)
        for linear in (self.final_layer.adaLN_modulation[1], self.final_layer.linear):
            nn.init.zeros_(linear.weight)

    def patchify(self, x):
        p = self.config.patch_size
        x = x.unflatten(3, (-1, p)).unflatten(2, (-1, p))  # (N, C, H/p, p, W/p, p)
        return x.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)  # (N, T, C * p * p)

    def unpatchify(self, x, height):
        p = self.config.patch_size
        # The order within a patch is (p, p, C) here and (C, p, p) in patchify: DiT's habit, which checkpoints keep.
        x = x.unflatten(2, (p, p, -1)).unflatten(1, (height // p, -1))  # (N, H/p, W/p, p, p, C)
        return x.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)  # (N, C, H, W)

    def condition(self, t, y):
        """All that depends on t (N,) and y (N,) alone -> c (N, cond_dim) and each layer's adaLN output (N, 6 * D).

        A sampler computes it for many steps at once: one row or a hundred cost a packed layer nearly the same.
        """
        c = self.t_embedder(t) + self.y_embedder(y)
        return c, [layer.adaLN_modulation(c) for layer in self.layers]

    def forward(self, x, t, y, condition=None):
        """Predict the noise (or v) in x.

        x (N, C, H, W) noisy images or latents; t (N,) in 0..999, fractions allowed; y (N,) classes, num_classes: none.
        -> (N, 2C, H, W): prediction, then the sigma channels; (N, C, H, W) if not learn_sigma.
        condition: self.condition(t, y) where it is known already; t and y are not looked at then.
        """
        height = x.shape[2]
        dtype = self.x_embedder.weight.dtype  # of the residual stream, under autocast too
        h = self.x_embedder(self.patchify(x).to(dtype)).to(dtype)  # (N, T, D)
        if self.pos_embed is not None:
            h = h + self.pos_embed
        c, modulations = condition or (self.t_embedder(t) + self.y_embedder(y), [None] * len(self.layers))
        freqs_cis = rotary_table(h.shape[1], self.config.dim // self.config.n_heads, x.device)
        for layer, modulation in zip(self.layers, modulations):
            h = layer(h, c, freqs_cis, modulation)
        return self.unpatchify(self.final_layer(h, c), height)

    def forward_with_cfg(self, x, t, y, cfg_scale, guided_channels=None, condition=None):
        """Classifier-free guidance, by upstream's contract.

        The first half of x (N, C, H, W) is run twice, the second half is ignored; y is the classes, then as many null
        labels. Returns (N, 2C or C, H, W) whose two halves hold the same guided prediction; sigma is never guided.
        guided_channels=3 reproduces upstream, which leaves the fourth latent channel unguided (DiT issue 41 calls it a
        slip). None guides every channel.
        """
        half = x[: len(x) // 2]
        out = self.forward(torch.cat([half, half]), t, y, condition)
        g = self.config.in_channels if guided_channels is None else guided_channels
        cond, uncond = out[:, :g].chunk(2)
        guided = uncond + cfg_scale * (cond - uncond)
        return torch.cat([torch.cat([guided, guided]), out[:, g:]], dim=1)


# ----------------------------------------------------------------------------------------------------------------------
# 4. Diffusion


def _spaced_steps(respacing, total):
    """The timesteps that a shorter process keeps: "250", "10,15,20" (counts for equal parts), "ddim50" (a stride)."""
    if respacing.startswith("ddim"):
        count = int(respacing[4:])
        for stride in range(1, total):
            if len(range(0, total, stride)) == count:
                return list(range(0, total, stride))
        raise ValueError(f"respacing={respacing!r}: no whole stride gives {count} of {total} steps")
    counts = [int(c) for c in respacing.split(",")]
    steps = []
    for count, part in zip(counts, np.array_split(np.arange(total), len(counts))):
        if not 1 <= count <= len(part):
            raise ValueError(f"respacing={respacing!r}: {count} steps wanted of a part that has {len(part)}")
        stride = (len(part) - 1) / max(count - 1, 1)
        # A running sum, as in ADM: a product rounds otherwise at exact halves.
        steps += [int(part[round(s)]) for s in accumulate([stride] * (count - 1), initial=0.0)]
    return steps


def _normal_kl(mean1, logvar1, mean2, logvar2):
    return 0.5 * (-1 + logvar2 - logvar1 + (logvar1 - logvar2).exp() + (mean1 - mean2) ** 2 * (-logvar2).exp())


def _discretized_gaussian_nll(x, mean, log_scale):
    """-log of the mass that a Gaussian puts on x's own bin of width 2/255 (DDPM section 3.3)."""
    cdf = lambda z: 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))  # as ADM approximates it
    inv_std = (-log_scale).exp()
    plus, minus = cdf(inv_std * (x - mean + 1 / 255)), cdf(inv_std * (x - mean - 1 / 255))
    mass = torch.where(x < -0.999, plus, torch.where(x > 0.999, 1 - minus, plus - minus))
    return -mass.clamp(min=1e-12).log()


class GaussianDiffusion:
    """The noise process q(x_t | x_0), the training loss, and the samplers.

    Linear betas 1e-4..0.02 over 1000 steps (DDPM). `respacing` keeps fewer of them for sampling: a shorter process with
    the same alphas_cumprod at the kept steps, `timestep_map` saying which. Tables are float64 numpy arrays.

    prediction: what the model's first C channels mean. "eps" is the noise, the paper's choice. "v" is
    sqrt(alphas_cumprod) eps - sqrt(1 - alphas_cumprod) x0 (Salimans & Ho 2022): nearly -x0 when x is nearly pure noise,
    where a whole image's layout is decided and where an error in eps costs almost nothing.
    """

    def __init__(self, respacing="", prediction="eps"):
        betas = np.linspace(1e-4, 0.02, 1000, dtype=np.float64)
        acp = np.cumprod(1 - betas)
        self.timestep_map = np.array(_spaced_steps(respacing, 1000) if respacing else range(1000))
        if respacing:
            acp = acp[self.timestep_map]
            betas = 1 - acp / np.append(1.0, acp[:-1])
            acp = np.cumprod(1 - betas)
        self.prediction = prediction
        self.num_timesteps = len(betas)
        self.betas = betas
        self.alphas_cumprod = acp
        self.alphas_cumprod_prev = np.append(1.0, acp[:-1])
        self.alphas_cumprod_next = np.append(acp[1:], 0.0)
        self.sqrt_alphas_cumprod = np.sqrt(acp)
        self.sqrt_one_minus_alphas_cumprod = np.sqrt(1 - acp)
        self.log_one_minus_alphas_cumprod = np.log(1 - acp)
        self.sqrt_recip_alphas_cumprod = np.sqrt(1 / acp)
        self.sqrt_recipm1_alphas_cumprod = np.sqrt(1 / acp - 1)
        # q(x_{t-1} | x_t, x_0), DDPM eq. 6 and 7. Its variance is 0 at t=0, so the log borrows t=1's.
        self.posterior_variance = betas * (1 - self.alphas_cumprod_prev) / (1 - acp)
        second = self.posterior_variance[1] if len(betas) > 1 else betas[0]
        self.posterior_log_variance_clipped = np.log(np.append(second, self.posterior_variance[1:]))
        self.posterior_mean_coef1 = betas * np.sqrt(self.alphas_cumprod_prev) / (1 - acp)
        self.posterior_mean_coef2 = (1 - self.alphas_cumprod_prev) * np.sqrt(1 - betas) / (1 - acp)

    @staticmethod
    def _at(table, t):
        """table[t] as fp32 (N, 1, 1, 1), to go with images (N, C, H, W)."""
        return torch.from_numpy(table).to(t.device)[t].float().view(-1, 1, 1, 1)

    def q_sample(self, x0, t, noise):
        """Noise x0 (N, C, H, W) to timestep t (N,) in one go (DDPM eq. 4)."""
        return self._at(self.sqrt_alphas_cumprod, t) * x0 + self._at(self.sqrt_one_minus_alphas_cumprod, t) * noise

    def _turn(self, a, t, b):
        """sqrt(alphas_cumprod) a - sqrt(1 - alphas_cumprod) b: v of (eps, x0), and, as a rotation, x0 of (x, v)."""
        return self._at(self.sqrt_alphas_cumprod, t) * a - self._at(self.sqrt_one_minus_alphas_cumprod, t) * b

    def q_posterior(self, x0, x, t):
        """Mean and log variance of q(x_{t-1} | x_t, x_0)."""
        mean = self._at(self.posterior_mean_coef1, t) * x0 + self._at(self.posterior_mean_coef2, t) * x
        return mean, self._at(self.posterior_log_variance_clipped, t)

    def p_mean_variance(self, model_out, x, t, clip_denoised=False):
        """Read the model's output (N, 2C or C, H, W) at x (N, C, H, W), t (N,).

        -> dict of mean, variance, log_variance of p(x_{t-1} | x_t), and pred_xstart. Sigma channels in [-1, 1] blend
        the log variance between the smallest and the largest that make sense (Improved DDPM eq. 15).
        """
        pred, *sigma = model_out.float().split(x.shape[1], dim=1)
        if self.prediction == "v":
            x0 = self._turn(x, t, pred)
        else:
            x0 = self._at(self.sqrt_recip_alphas_cumprod, t) * x - self._at(self.sqrt_recipm1_alphas_cumprod, t) * pred
        if clip_denoised:
            x0 = x0.clamp(-1, 1)
        mean, log_variance = self.q_posterior(x0, x, t)
        if sigma:
            frac = (sigma[0] + 1) / 2
            log_variance = frac * self._at(np.log(self.betas), t) + (1 - frac) * log_variance
        log_variance = log_variance.expand_as(x)
        return dict(mean=mean, variance=log_variance.exp(), log_variance=log_variance, pred_xstart=x0)

    def training_losses(self, model, x0, t, y, noise=None):
        """Loss of model(x_t, timestep, y) for x0 (N, C, H, W), t (N,) int64, y (N,) -> dict of (N,) tensors.

        `mse` is the paper's simple loss; `vb`, in bits a dimension, teaches the sigma channels alone (Improved DDPM
        section 3.1): the prediction is detached in it. Without sigma channels there is no vb. `loss` is their sum.
        """
        noise = torch.randn_like(x0) if noise is None else noise
        x = self.q_sample(x0, t, noise)
        out = model(x, torch.from_numpy(self.timestep_map).to(t.device)[t], y).float()
        pred = out[:, : x0.shape[1]]
        target = self._turn(noise, t, x0) if self.prediction == "v" else noise
        terms = {"mse": ((target - pred) ** 2).flatten(1).mean(1)}
        terms["loss"] = terms["mse"]
        if out.shape[1] != x0.shape[1]:
            frozen = torch.cat([pred.detach(), out[:, x0.shape[1] :]], dim=1)
            true_mean, true_logvar = self.q_posterior(x0, x, t)
            p = self.p_mean_variance(frozen, x, t)
            kl = _normal_kl(true_mean, true_logvar, p["mean"], p["log_variance"]).flatten(1).mean(1)
            nll = _discretized_gaussian_nll(x0, p["mean"], 0.5 * p["log_variance"]).flatten(1).mean(1)
            terms["vb"] = torch.where(t == 0, nll, kl) / math.log(2)
            terms["loss"] = terms["mse"] + terms["vb"]
        return terms

    def _sample_loop(self, step, model_fn, x, clip_denoised, noise_fn):
        for i in reversed(range(self.num_timesteps)):
            t = torch.full((len(x),), i, device=x.device)
            out = model_fn(x, torch.full_like(t, int(self.timestep_map[i])))
            p = self.p_mean_variance(out, x, t, clip_denoised)
            noise = noise_fn(x)  # drawn at the last step too, so that a recorded sequence replays
            x = step(p, x, t, noise if i else torch.zeros_like(noise))
        return x

    @torch.no_grad()
    def p_sample_loop(self, model_fn, noise, clip_denoised=False, noise_fn=torch.randn_like):
        """DDPM's ancestral sampling. noise (N, C, H, W) is x_T; model_fn(x, t) gets timesteps of 0..999. -> x_0"""
        step = lambda p, x, t, noise: p["mean"] + (0.5 * p["log_variance"]).exp() * noise
        return self._sample_loop(step, model_fn, noise, clip_denoised, noise_fn)

    @torch.no_grad()
    def ddim_sample_loop(self, model_fn, noise, eta=0.0, clip_denoised=False, noise_fn=torch.randn_like):
        """DDIM (eq. 12; eta=0 is deterministic given x_T). Arguments as in p_sample_loop."""

        def step(p, x, t, noise):
            x0 = p["pred_xstart"]
            # eps from x0, so that clipping x0 reaches it.
            eps = (self._at(self.sqrt_recip_alphas_cumprod, t) * x - x0) / self._at(self.sqrt_recipm1_alphas_cumprod, t)
            acp, prev = self._at(self.alphas_cumprod, t), self._at(self.alphas_cumprod_prev, t)
            sigma = eta * ((1 - prev) / (1 - acp)).sqrt() * (1 - acp / prev).sqrt()
            return x0 * prev.sqrt() + (1 - prev - sigma**2).sqrt() * eps + sigma * noise

        return self._sample_loop(step, model_fn, noise, clip_denoised, noise_fn)


# ----------------------------------------------------------------------------------------------------------------------
# 5. Packing: four weights in a byte


def pack_ternary(codes):
    """codes (N, K) in {-1, 0, 1}, any dtype -> (N/4, K) uint8, in upstream's byte layout.

    Rows are taken in quarters: with n = N/4, byte [r, c] holds the weights of rows r, n+r, 2n+r and 3n+r, high bits
    first, each as weight + 1:    bits 7-6: row r | 5-4: row n+r | 3-2: row 2n+r | 1-0: row 3n+r
    """
    if codes.ndim != 2 or codes.shape[0] % 4:
        raise ValueError(f"pack_ternary needs (N, K) with N a multiple of 4, got {tuple(codes.shape)}")
    if not bool(((codes == -1) | (codes == 0) | (codes == 1)).all()):
        raise ValueError("pack_ternary needs codes of -1, 0 and 1 alone")
    a, b, c, d = (codes + 1).to(torch.uint8).chunk(4)
    return a << 6 | b << 4 | c << 2 | d


def unpack_ternary(packed):
    """(N/4, K) uint8 -> (N, K) int8 in {-1, 0, 1}. Bytes are not checked here: see check_packed."""
    return torch.cat([packed >> shift & 3 for shift in (6, 4, 2, 0)]).to(torch.int8) - 1


def check_packed(packed, name="weight"):
    """Raise ValueError if a 2-bit field of packed (N/4, K) uint8 holds 3, which stands for no weight."""
    if packed.dtype != torch.uint8:
        raise ValueError(f"{name}: packed weights are uint8, got {packed.dtype}")
    if bool((packed & packed >> 1 & 0b01010101).any()):
        raise ValueError(f"{name}: holds code 3, but packed ternary weights use 0, 1 and 2: the bytes are damaged")


SLOWLY = "unpack in plain PyTorch at every call, slower"


@lru_cache(maxsize=None)
def _announce(message):
    warnings.warn(message, stacklevel=2)


def first_line(e):
    """What an exception says, in one line; its type where it says nothing."""
    return str(e).strip().splitlines()[0][:200] if str(e).strip() else type(e).__name__


@lru_cache(maxsize=None)
def cuda_kernel(device):
    """kernel.cu as a ctypes library for `device`, compiled on first use, or None and a warning that names the reason.

    It knows pointers and a stream but not torch, whose headers would make the build take a minute.
    """
    try:
        from torch.utils.cpp_extension import load

        major, minor = torch.cuda.get_device_capability(device)
        if major < 8:
            raise RuntimeError(f"this GPU is sm_{major}{minor}, the kernels need sm_80 or later")
        arch = f"{major}{minor}" + "a" * (major == 9)  # wgmma is in sm_90a alone, which torch's own flags leave out
        warnings.warn(f"building kernel.cu for sm_{arch}: once, some seconds", stacklevel=2)
        flags = ["-O3", "-std=c++17", f"-gencode=arch=compute_{arch},code=sm_{arch}"]
        source = Path(__file__).with_name("kernel.cu")
        library = load(f"terdit_sm_{arch}", [str(source)], extra_cuda_cflags=flags, is_python_module=False)
        return ctypes.CDLL(library)
    except Exception as e:  # no nvcc, no compiler, no ninja, a driver that is too old, an edit that does not compile
        _announce(f"kernel.cu is not used ({first_line(e)}): packed layers {SLOWLY}")
        return None


class KernelError(RuntimeError):
    pass


KERNELS = ("auto", "naive", "small_batch", "mma", "wgmma")  # in the order of kernel.cu's enum


def launch_kernel(library, x, weight, alphas, bias, kernel="auto", tokens=0):
    """kernel.cu's ternary_linear: x (M, K) bf16 or fp16, weight (N/4, K) uint8 -> (M, N).

    kernel: auto, naive, small_batch (M <= 16), mma or wgmma; tokens: of a CTA's tile, 0 for the best. The pointers are
    raw, so everything is checked here: ValueError says what was got. KernelError is a launch that CUDA refuses.
    """
    (M, K), N = x.shape, 4 * len(weight)
    if x.dtype not in (torch.bfloat16, torch.float16) or max(M, N, K) >= 1 << 31:
        raise ValueError(f"kernel.cu takes x of bfloat16 or float16, below 2^31 rows, got {tuple(x.shape)} {x.dtype}")
    for name, z, *want in (
        ("weight", weight, (N // 4, K), torch.uint8, x.device),
        ("alphas", alphas, (1,), torch.float32, x.device),
        ("bias", bias, (N,), x.dtype, x.device),
    ):
        if z is not None and (got := [tuple(z.shape), z.dtype, z.device]) != want:
            raise ValueError(f"{name} of {want} wanted for x of {tuple(x.shape)}, got {got}")
    # Loads are 16 bytes wide: tensors that are strided or start at odd places are copied.
    fits = lambda z: z is None or z.is_contiguous() and z.data_ptr() % 16 == 0
    x, weight, bias = (z if fits(z) else z.clone(memory_format=torch.contiguous_format) for z in (x, weight, bias))
    y = x.new_empty(M, N)
    if M == 0:
        return y
    pointers = [ctypes.c_void_p(None if z is None else z.data_ptr()) for z in (x, weight, alphas, bias, y)]
    stream = ctypes.c_void_p(torch.cuda.current_stream(x.device).cuda_stream if x.is_cuda else None)
    choice = x.dtype == torch.bfloat16, KERNELS.index(kernel), tokens
    with torch.cuda.device(x.device) if x.is_cuda else nullcontext():
        error = library.ternary_linear(*pointers, M, N, K, *choice, stream)
    if error:
        wrong = ValueError if error == -1 else KernelError  # -1: kernel.cu's REFUSED
        raise wrong(f"kernel.cu: error {error} for M={M} N={N} K={K}, kernel {kernel!r}, tokens {tokens}")
    return y


def forced_kernel():
    """TERDIT_KERNEL=off|auto|naive|small_batch|mma|wgmma[:TOKENS], for experiments -> name, tokens."""
    name, _, tokens = os.environ.get("TERDIT_KERNEL", "auto").partition(":")
    if name not in (*KERNELS, "off") or not (tokens or "0").isdigit():
        raise ValueError(f"TERDIT_KERNEL={name!r}, expected off, {', '.join(KERNELS)}, perhaps with :TOKENS")
    return name, int(tokens or 0)


def packed_path(device, dtype):
    """How packed layers run there: "kernel" (kernel.cu), "blocks" (_linear_blocks) or "plain" (packed_linear_plain)."""
    if forced_kernel()[0] == "off":
        return "plain"
    kind = torch.device(device).type
    if kind == "cpu" and dtype in (torch.float32, torch.bfloat16, torch.float16):
        return "blocks"
    if kind == "cuda" and dtype in (torch.bfloat16, torch.float16):
        return "kernel" if cuda_kernel(device) else "plain"
    _announce(f"no kernel for {dtype} on {kind}: packed layers {SLOWLY}")
    return "plain"


def packed_linear_plain(x, weight, alphas, bias):
    """The reference of the two fast paths: unpack to memory, scale as TernaryLinear does, multiply."""
    return F.linear(x, unpack_ternary(weight).to(x.dtype) * alphas.to(x.dtype), bias)


class _Scratch(threading.local):
    """Memory kept from call to call, each thread its own: fresh pages would cost as much as what is done in them."""

    bytes = torch.empty(0, dtype=torch.uint8)

    def get(self, size):
        if len(self.bytes) < size:
            self.bytes = torch.empty(size, dtype=torch.uint8)
            # Having freed a block of 31 MB (none of it touched), glibc keeps what is freed later instead of handing it
            # back: without this line a forward of 600M faults 80,000 pages in again, a quarter of its time.
            torch.empty(31 << 20, dtype=torch.uint8)
        return self.bytes[:size]


_scratch = _Scratch()


@lru_cache(maxsize=None)
def cpu_kernel():
    """The part of kernel.cu that is for CPUs, or None and a warning that says why.

    Each process that needs it compiles it, which takes less than a second: there is nothing to cache.
    """
    flags = "-x c++ -std=c++17 -DCPU -O3 -march=native -fopenmp -shared -fPIC".split()
    command = [*shlex.split(os.environ.get("CXX", "g++")), *flags, str(Path(__file__).with_name("kernel.cu")), "-o"]
    try:
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
            command.append(f"{folder}/kernel.so")
            subprocess.run(command, check=True, capture_output=True, text=True, errors="replace")
            return ctypes.CDLL(command[-1])
    except Exception as e:  # no compiler, one without OpenMP, a folder from which nothing may be run
        why = first_line(getattr(e, "stderr", None) or e)
        _announce(f"kernel.cu's CPU part is not used ({why}): packed layers are widened by PyTorch, slower")
        return None


def widen(library, packed, out):
    """packed (n, K) uint8 -> out (4, n, K) of -2, 0 and 2, in bf16, fp16 or fp32; both contiguous. See kernel.cu."""
    pointers = (ctypes.c_void_p(z.data_ptr()) for z in (packed, out))
    library.dequantize(*pointers, ctypes.c_long(packed.numel()), out.element_size())


def widen_plain(packed, out):
    """The same in PyTorch, where nothing can be compiled."""
    size = out.element_size()
    word, mask = (torch.int16, -(1 << 14)) if size == 2 else (torch.int32, -(1 << 30))
    shifts = 8 * size - torch.tensor([8, 6, 4, 2], dtype=word).view(4, 1, 1)  # of a byte's four fields
    torch.bitwise_left_shift(packed.to(word).bitwise_not_(), shifts, out=out.view(word)).bitwise_and_(mask)


def _linear_blocks(x, weight, alphas, bias):
    """x (M, K), weight (N/4, K) uint8 -> (M, N), widening one block of rows after the other into the same few MB."""
    if (weight.dtype, weight.device) != (torch.uint8, x.device):  # what follows works with pointers
        raise ValueError(f"weight of uint8 on {x.device} wanted, got {weight.dtype} on {weight.device}")
    (M, K), n, size, library = x.shape, len(weight), x.element_size(), cpu_kernel()
    rows = min(n, max(1, (12 << 20) // (4 * K * size)))  # widened, 12 MB: in cache, and still a large matmul
    scratch = _scratch.get(4 * rows * K * size).view(x.dtype)
    half = alphas.item() / 2
    y = x.new_empty(M, 4, n) if rows < n else None
    for r in range(0, n, rows):
        part = weight[r : r + rows].contiguous()
        block = scratch[: 4 * part.numel()].view(4, *part.shape)
        if library:
            widen(library, part, block)
        else:
            widen_plain(part, block)
        w = block.flatten(0, 1)  # (4 * rows, K) of -2, 0 and 2
        b = None if bias is None else bias.view(4, n)[:, r : r + rows].flatten()
        if size == 4:  # alpha where TernaryLinear has it, which makes the same bits
            out = F.linear(x, w.mul_(half), b)
        else:  # alpha within the matmul: free there, and in fp32
            out = torch.addmm(x.new_empty(len(w)) if b is None else b, x, w.t(), beta=int(b is not None), alpha=half)
        if y is None:
            return out
        y[:, :, r : r + rows] = out.view(M, 4, -1)
    return y.flatten(1)


def packed_linear(
    x: torch.Tensor, weight: torch.Tensor, alphas: torch.Tensor, bias: Optional[torch.Tensor]
) -> torch.Tensor:
    """x (..., K), weight (N/4, K) uint8, alphas (1,), bias (N,) or None -> (..., N), by the path of packed_path."""
    path, rows = packed_path(x.device, x.dtype), x.reshape(-1, x.shape[-1])
    shape = (*x.shape[:-1], 4 * len(weight))
    alphas, bias = alphas.float(), bias if bias is None else bias.to(x.dtype)
    if path == "kernel":
        if shape[-1] % 32 or x.shape[-1] % 16:
            size = f"{shape[-1]}x{x.shape[-1]}"
            _announce(f"a layer of {size} fits no tile of kernel.cu (N % 32, K % 16): naive kernel, slow")
        try:
            return launch_kernel(cuda_kernel(x.device), rows, weight, alphas, bias, *forced_kernel()).view(shape)
        except KernelError as e:
            _announce(f"{e}: packed layers {SLOWLY}")
    return (_linear_blocks if path == "blocks" else packed_linear_plain)(rows, weight, alphas, bias).view(shape)


# One operator to torch.compile, which could not look into it. Without torch.compile it would cost 50 us a call.
_packed_linear_op = torch.library.custom_op("terdit::packed_linear", packed_linear, mutates_args=())


@_packed_linear_op.register_fake
def _(x, weight, alphas, bias):
    return x.new_empty(*x.shape[:-1], 4 * len(weight))


class PackedTernaryLinear(nn.Module):
    """TernaryLinear for inference, at 2 bits a weight: x (..., K) -> (..., N).

    `weight` (N/4, K) uint8 as in pack_ternary, `alphas` (1,), `bias` (N,) or None. The bytes stay as they are in the
    checkpoint: every path reads them so. In fp32 on a CPU it gives the same bits as TernaryLinear (above 3M weights,
    where blocks are multiplied one by one, the same to rounding).
    """

    def __init__(self, in_features, out_features, bias=False):
        super().__init__()
        if out_features % 4:
            raise ValueError(f"out_features={out_features} must be a multiple of 4 to be packed")
        self.register_buffer("weight", torch.zeros(out_features // 4, in_features, dtype=torch.uint8))
        self.alphas = nn.Parameter(torch.ones(1))
        self.bias = nn.Parameter(torch.zeros(out_features)) if bias else None

    def forward(self, x):
        if x.shape[-1] != self.weight.shape[1]:
            raise ValueError(f"x of (..., {self.weight.shape[1]}) wanted, got {tuple(x.shape)}")
        if torch.is_grad_enabled() and any(z is not None and z.requires_grad for z in (x, self.alphas, self.bias)):
            return packed_linear_plain(x, self.weight, self.alphas, self.bias)  # the one with a backward
        linear = _packed_linear_op if torch.compiler.is_compiling() else packed_linear
        return linear(x, self.weight, self.alphas, self.bias)


@torch.no_grad()
def pack_model(model):
    """A DiT of TernaryLinear layers -> a new DiT of PackedTernaryLinear layers, in eval mode on the same device.

    Its fp32 output equals the training model's bit for bit, on a CPU and with layers of up to 3M weights.
    """
    with torch.device("meta"):
        packed = DiT(model.config, packed=True)
    ternary = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, TernaryLinear)}
    state = {}
    for name, value in model.state_dict().items():
        if name in ternary and not bool(value.isfinite().all()):
            raise ValueError(f"{name} holds values that are not finite: nothing to pack")
        state[name] = pack_ternary(ternarize(value)) if name in ternary else value.clone()
    packed.load_state_dict(state, assign=True)
    return packed.eval().requires_grad_(False)


# ----------------------------------------------------------------------------------------------------------------------
# 6. Checkpoints

FORMAT = "terdit-1"


def atomic_write(path, write):
    """write(file) into a file beside `path`, then rename it: a crash or a full disk leaves the old file whole."""
    path = Path(path)
    beside = path.with_name(path.name + ".tmp")
    try:
        with open(beside, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except RuntimeError as e:  # what torch.save makes of a full disk
        raise OSError(f"{path}: cannot be written ({first_line(e)})") from None
    finally:
        beside.unlink(missing_ok=True)


def save_checkpoint(path, model):
    """Write a DiT, packed or not, with its Config. load_model reads it back."""
    state, flat = model.state_dict(), {}
    for dtype in {v.dtype for v in state.values()}:
        names = [k for k in state if state[k].dtype == dtype]
        # Views of one storage a dtype: torch.save then writes 2 records instead of one a tensor, 300 bytes less each.
        parts = torch.cat([state[k].flatten().cpu() for k in names]).split([state[k].numel() for k in names])
        flat |= {k: part.view(state[k].shape) for k, part in zip(names, parts)}
    ckpt = {"format": FORMAT, "config": asdict(model.config), "model": {k: flat[k] for k in state}}
    atomic_write(path, lambda file: torch.save(ckpt, file))


def read_checkpoint(path, expected):
    """torch.load that runs no code (weights_only) and says what was wrong. `expected` names what the file should be."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such file; expected {expected}") from None
    except Exception as e:  # a damaged pickle raises almost anything
        raise ValueError(f"{path}: not {expected}, or cut short ({first_line(e)})") from None


def _read_released(folder):
    """A released TerDiT or Large-DiT folder -> Config fields, state dict. Sizes come from the tensors' shapes."""
    from argparse import Namespace  # the one class that upstream's model_args.pth needs; nothing else may be unpickled

    files = [folder / f"{name}.00-of-01.pth" for name in ("consolidated_ema_ternary", "consolidated_ema")]
    found = [f for f in files if f.is_file()]
    if not found:
        raise FileNotFoundError(f"{folder}: a released folder holds {' or '.join(f.name for f in files)}")
    with torch.serialization.safe_globals([Namespace]):
        args = read_checkpoint(folder / "model_args.pth", "a released model's arguments")
    state = read_checkpoint(found[0], "a released model's weights")
    patch_size = 2  # every released model's name ends in _patch2
    try:
        dim, patch_dim = state["x_embedder.weight"].shape
        num_classes = len(state["y_embedder.embedding_table.weight"]) - 1
        ffn_dim = state["layers.0.feed_forward.w2.weight"].shape[-1]
        config = dict(
            input_size=int(getattr(args, "image_size", 256)) // 8,
            patch_size=patch_size,
            in_channels=patch_dim // patch_size**2,
            dim=dim,
            n_layers=1 + max(int(k.split(".")[1]) for k in state if k.startswith("layers.")),
            n_heads=32,
            multiple_of=next((m for m in (256, 128, 64, 32) if -(-int(8 * dim / 3) // m) * m == ffn_dim), 1),
            num_classes=num_classes,
            learn_sigma=len(state["final_layer.linear.weight"]) == 2 * patch_dim,
            qk_norm="layers.0.attention.q_norm.weight" in state,
            ternary="layers.0.attention.wq.alphas" in state,
            adaln_norm="layers.0.adaLN_modulation.2.weight" in state,
            vae=f"stabilityai/sd-vae-ft-{getattr(args, 'vae', 'ema')}",
            # Upstream numbered the classes by their indices as strings: 0, 1, 10, 100, 101, ... so 207 is row 121.
            class_names=sorted(str(i) for i in range(num_classes)),
        )
    except (LookupError, ValueError, TypeError, AttributeError) as e:
        raise ValueError(f"{found[0]}: not the weights of a TerDiT or Large-DiT ({e})") from None
    return config, state


def read_model(path):
    """A file of save_checkpoint or a released folder -> Config fields, state dict (on the CPU, mapped, not copied)."""
    path, what = Path(path), f"a checkpoint of this project (format {FORMAT!r})"
    if (path / "run.json").is_file():
        raise ValueError(f"{path}: a training state: take the packed.pt beside it")
    if path.is_dir():
        return _read_released(path)
    ckpt = read_checkpoint(path, what)
    if not isinstance(ckpt, dict) or ckpt.get("format") != FORMAT:
        raise ValueError(f"{path}: not {what}, but a foreign file")
    if not (isinstance(ckpt.get("config"), dict) and isinstance(ckpt.get("model"), dict)):
        raise ValueError(f"{path}: damaged: {what} holds a config and a model")
    return ckpt["config"], ckpt["model"]


def load_model(path, device="cpu", dtype=torch.float32, **overrides):
    """Load a DiT for inference, with its `.config`: a file of save_checkpoint, or a released folder.

    dtype is that of the full-precision parts; packed codes stay uint8, alphas and ternary latents fp32. `overrides`
    replace Config fields: a released folder does not say n_heads (32 in all of them). Raises ValueError or
    FileNotFoundError, naming the file.
    """
    config, state = read_model(path)
    try:
        config = Config(**{**config, **overrides})
        packed = config.ternary and state["layers.0.attention.wq.weight"].dtype == torch.uint8
        with torch.device("meta"):
            model = DiT(config, packed=packed)
        ternary = {k.removesuffix("alphas") + "weight" for k in state if k.endswith("alphas")}
        for name, value in state.items():
            if packed and name in ternary:
                check_packed(value, name)
            elif not value.is_floating_point():
                raise ValueError(f"{name} is {value.dtype}, expected floating point")
            elif name not in ternary and not name.endswith("alphas"):  # rounded latents would round to other codes
                state[name] = value.to(dtype)
        model.load_state_dict(state, assign=True)
    except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RuntimeError) as e:
        raise ValueError(f"{path}: damaged, or its config is wrong: {' '.join(str(e).split())[:300]}") from None
    return model.to(device).eval().requires_grad_(False)
