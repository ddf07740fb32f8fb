"""TerDiT from scratch: a diffusion transformer whose weights are -1, 0 and +1.

The method of *TerDiT: Ternary Diffusion Models with Transformers* (arXiv 2405.14854), in the paper's order:

    1. Config, SIZES                what a model is made of
    2. ternarize, TernaryLinear     ternary weights, and how gradients get past the rounding  (paper 3.1)
    3. DiT                          the transformer, with an RMS Norm after each adaLN        (paper 3.2, figure 3)
    4. GaussianDiffusion            what it is trained on, and how it samples                 (DDPM, DDIM)
    5. pack_ternary, pack_model     four weights in a byte                                    (paper 3.3)
    6. save_checkpoint, load_model  our files, the released TerDiT and Large-DiT folders, Meta's DiT files
    7. Fast paths                   what sections 2 and 5 compute, in less time: skip on first reading
    8. MetaDiT                        Meta's DiT, where Large-DiT and TerDiT came from: skip on first reading

Section numbers are those of the paper's first version (May 2024), figures and tables those of the second (April 2025).
"Upstream" is the TerDiT authors' own code, ADM is OpenAI's guided-diffusion, which DiT took its diffusion from.

Letters in the shape comments: B images in a batch, C channels, H and W height and width, T tokens, D the model's width.
A weight matrix is (N, K), N outputs and K inputs. It multiplies x (M, K), whose M rows are tokens (in adaLN, images).
"""

import ctypes
import io
import math
import os
import pickle
import shlex
import subprocess
import tempfile
import time
import warnings
import zipfile
from argparse import Namespace  # upstream's and DiT's files hold one; no other class may be unpickled
from contextlib import nullcontext
from dataclasses import asdict, dataclass, fields
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

# ----------------------------------------------------------------------------------------------------------------------
# 1. What a model is made of


@dataclass
class Config:
    """Everything needed to rebuild a model and to use its samples. It can be saved as JSON.

    `ternary=False, adaln_norm=False` is Large-DiT, the full-precision model that TerDiT quantizes.
    """

    input_size: int = 32  # height = width of what the model sees: latents of a 256x256 image are 32x32
    patch_size: int = 2
    in_channels: int = 4
    dim: int = 1536
    n_layers: int = 16  # transformer blocks
    n_heads: int = 32
    multiple_of: int = 256  # the FFN's width is 8/3 dim, rounded up to a multiple of this
    num_classes: int = 1000  # the null label of classifier-free guidance is num_classes itself
    class_dropout_prob: float = 0.1
    learn_sigma: bool = True
    prediction: str = "eps"  # "eps" is the paper's; "v" learns large shapes sooner (see GaussianDiffusion)
    qk_norm: bool = False
    norm_eps: float = 1e-5
    label_std: float = 0.02  # initial spread of the label embeddings
    pos_embed: bool = False  # add a learned vector to each patch; the paper has rotary positions alone, row by row
    ternary: bool = True
    adaln_norm: bool = True  # the paper's RMS Norm after the adaLN projection
    class_names: list | None = None
    vae: str | None = None  # None: the model works on pixels in [-1, 1]
    latent_scale: float = 0.18215  # latents are multiplied by it to have a variance of about 1 (SD VAE)

    def __post_init__(self):
        for field in fields(self):  # of any type: they may come from a damaged or hostile file
            value = getattr(self, field.name)
            is_bool = isinstance(value, bool)
            if field.type is int:
                expected = "a whole number of 1 to 1,048,576"
                is_good = isinstance(value, int) and not is_bool and 1 <= value <= 1 << 20
            elif field.type is float:
                expected = "a number of 0 to 1,000"
                is_good = isinstance(value, (int, float)) and not is_bool and 0 <= value <= 1000
            else:
                expected = getattr(field.type, "__name__", str(field.type))
                is_good = isinstance(value, field.type)
            if not is_good:
                raise ValueError(f"{field.name}={value!r:.99}, expected {expected}")
        if self.class_names and not all(isinstance(name, str) for name in self.class_names):
            raise ValueError(f"class_names={self.class_names!r:.99}, expected text")
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
        return math.ceil(hidden / self.multiple_of) * self.multiple_of

    @property
    def n_tokens(self):
        return (self.input_size // self.patch_size) ** 2


_DIGITS = dict(input_size=24, patch_size=4, in_channels=3, multiple_of=64, num_classes=10, learn_sigma=False,
               prediction="v", label_std=0.5, pos_embed=True)  # fmt: skip
SIZES = {
    "tiny": dict(**_DIGITS, dim=192, n_layers=4, n_heads=6),  # 2.7M ternary weights
    "small": dict(**_DIGITS, dim=256, n_layers=6, n_heads=8),  # 7.2M
    "S": dict(dim=384, n_layers=12, n_heads=6),  # 31.9M
    "B": dict(dim=768, n_layers=12, n_heads=12),  # 127.4M
    "600M": dict(dim=1536, n_layers=16, n_heads=32),  # 604M
    "4.2B": dict(dim=3072, n_layers=32, n_heads=32),  # 4.2B
}

# ----------------------------------------------------------------------------------------------------------------------
# 2. Ternary weights

TERNARY_EPS = 1e-6  # upstream's; it keeps a matrix of zeros from being divided by zero


class _Ternarize(torch.autograd.Function):
    """The straight-through estimator: the forward pass rounds, the backward pass is the identity.

    Models run the same two lines inside _ScaledTernaryWeight (section 7): whoever changes the rule changes both.
    """

    @staticmethod
    def forward(ctx, weight, eps):
        gamma = weight.abs().mean() + eps
        return (weight / gamma).round().clamp(-1, 1)

    @staticmethod
    def backward(ctx, grad_codes):
        return grad_codes, None


def ternarize(weight, eps=TERNARY_EPS):
    """Round to -1, 0, +1 by the absmean rule (TerDiT eq. 1, from BitNet b1.58); gradients pass straight through.

    weight (N, K) float -> same shape and dtype: clip(round(weight / (mean|weight| + eps)), -1, 1), halves to even.
    Rounding has a derivative of 0 almost everywhere, so nothing could be learned through it. So the backward pass
    pretends that rounding did nothing: the optimizer moves the full-precision *latent* weight, and its code (-1, 0 or
    +1) flips when the latent weight has moved far enough.
    """
    return _Ternarize.apply(weight, eps)


class TernaryLinear(nn.Module):
    """A linear layer whose weight is ternary in the forward pass and full precision in the optimizer.

    `weight` (N, K) latent, `alphas` (1,) the one learned scale, `bias` (N,) or None.  x (..., K) -> (..., N)
    The plural `alphas` is upstream's parameter name. It is no subclass of nn.Linear, so that isinstance(m, nn.Linear)
    finds the full-precision layers alone. Models are built of FastTernaryLinear (section 7), which puts out the same.
    """

    def __init__(self, in_features, out_features, bias=False):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.alphas = nn.Parameter(torch.empty(1))
        self.bias = nn.Parameter(torch.zeros(out_features)) if bias else None
        self.product_dtype = None  # that of x, unless DiT.set_product_dtype says otherwise
        nn.init.xavier_uniform_(self.weight)
        with torch.no_grad():
            self.alphas.copy_(self.weight.abs().mean())  # the output is about as large as without rounding

    def forward(self, x):
        return F.linear(x, ternarize(self.weight) * self.alphas, self.bias)


# ----------------------------------------------------------------------------------------------------------------------
# 3. The model: Large-DiT with ternary linears and a normed adaLN


def modulate(x, shift, scale):
    return x * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)  # x (B, T, D); shift and scale (B, D)


class RMSNorm(nn.RMSNorm):
    """Computes in its weight's dtype, fp32: under autocast x is bf16, but adaLN's output scales whole blocks."""

    def forward(self, x):
        return super().forward(x.to(self.weight.dtype))


class LayerNorm(nn.LayerNorm):
    """As RMSNorm."""

    def forward(self, x):
        return super().forward(x.to(self.weight.dtype))


def timestep_embedding(t, dim=256, max_period=10000):
    """Sinusoids of t (B,), fractions allowed -> (B, dim): the cosines, then the sines (ADM's order)."""
    half = dim // 2
    exponents = -math.log(max_period) * torch.arange(half, dtype=torch.float32, device=t.device) / half
    # exp in fp64: its last bit in fp32 differs between machines, and times t=999 the angle would differ by 6e-5.
    freqs = exponents.double().exp().float()
    angles = t[:, None].float() * freqs
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class TimestepEmbedder(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(256, dim), nn.SiLU(), nn.Linear(dim, dim))

    def forward(self, t):
        return self.mlp(timestep_embedding(t).to(self.mlp[0].weight.dtype))


class LabelEmbedder(nn.Module):
    """One row a class, and a last row, number num_classes, for "no class": the null label of guidance.

    Labels are dropped where batches are drawn (train.py's draw_batch), not here as in DiT.
    """

    def __init__(self, num_classes, dim):
        super().__init__()
        # nn.Embedding(n, dim) would call normal_, which on the meta device loads torch's compiler: 100 MB, a second.
        self.embedding_table = nn.Embedding.from_pretrained(torch.empty(num_classes + 1, dim), freeze=False)

    def forward(self, y):
        return self.embedding_table(y)


def rotary_table(n_tokens, head_dim, device=None, theta=10000.0):
    """exp(i * angle) (T, head_dim / 2) complex64. angle = token number, row by row, times the pair's frequency."""
    freqs = 1.0 / theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32, device=device) / head_dim)
    angles = torch.outer(torch.arange(n_tokens, dtype=torch.float32, device=device), freqs)
    return torch.polar(torch.ones_like(angles), angles)


def rotate(x, freqs_cis):
    """Turn each pair (2i, 2i+1) of x (B, heads, T, head_dim) by its angle, in fp32 (RoFormer; Large-DiT)."""
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))  # (B, heads, T, head_dim / 2)
    return torch.view_as_real(pairs * freqs_cis).flatten(-2).to(x.dtype)


class Attention(nn.Module):
    def __init__(self, cfg, linear):
        super().__init__()
        self.n_heads = cfg.n_heads
        self.wq = linear(cfg.dim, cfg.dim, bias=False)
        self.wk = linear(cfg.dim, cfg.dim, bias=False)
        self.wv = linear(cfg.dim, cfg.dim, bias=False)
        self.wo = linear(cfg.dim, cfg.dim, bias=False)
        # Over all D channels, before they are split into heads and rotated (Large-DiT).
        self.q_norm = LayerNorm(cfg.dim, eps=cfg.norm_eps) if cfg.qk_norm else nn.Identity()
        self.k_norm = LayerNorm(cfg.dim, eps=cfg.norm_eps) if cfg.qk_norm else nn.Identity()

    def split_heads(self, x):
        return x.unflatten(-1, (self.n_heads, -1)).transpose(1, 2)  # (B, T, D) -> (B, heads, T, head_dim)

    def forward(self, x, freqs_cis):
        q = rotate(self.split_heads(self.q_norm(self.wq(x))), freqs_cis)
        k = rotate(self.split_heads(self.k_norm(self.wk(x))), freqs_cis)
        v = self.split_heads(self.wv(x))
        out = softmax_attention(q.to(v.dtype), k.to(v.dtype), v)  # (B, heads, T, head_dim)
        return self.wo(out.transpose(1, 2).flatten(-2))  # (B, T, D)


def softmax_attention(q, k, v):
    """softmax(q k^T / sqrt(head_dim)) v, each (B, heads, T, head_dim)."""
    if q.device.type == "cpu" and torch.is_grad_enabled():
        # Written out for training on a CPU, where SDPA's bf16 backward pass takes 13 times as long as two matmuls.
        scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5  # (B, heads, T, T)
        return scores.softmax(-1).to(v.dtype) @ v  # autocast computes a softmax in fp32
    return F.scaled_dot_product_attention(q, k, v)


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

    A ternary weight is 0 or +-alpha. Where alpha is large (upstream draws its start from N(0, 1); a full-precision
    weight is near 0.02), the ternary adaLN projection puts out large values, and a few weights that change their code
    change them a lot. The paper's cure is one RMS Norm over the six vectors together, which divides alpha out (paper
    3.2, figures 3 and 4). We start alpha small, but it is learned: the norm keeps training independent of its size.
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

    def forward(self, x, c, freqs_cis):
        """x (B, T, D) tokens, c (B, cond_dim) timestep and label, freqs_cis from rotary_table -> (B, T, D)"""
        modulation = self.adaLN_modulation(c)  # (B, 6 * D)
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = modulation.chunk(6, dim=1)
        attended = self.attention(modulate(self.attention_norm(x), shift_msa, scale_msa), freqs_cis)
        x = x + gate_msa.unsqueeze(1) * attended
        fed = self.feed_forward(modulate(self.ffn_norm(x), shift_mlp, scale_mlp))
        return x + gate_mlp.unsqueeze(1) * fed


class FinalLayer(nn.Module):
    """Full precision, because an error here goes straight into the image (paper 3.1)."""

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

    packed=True builds the inference model, whose ternary linears hold 2 bits a weight (see pack_model).
    """

    def __init__(self, config, packed=False):
        super().__init__()
        self.config = cfg = config
        self.product_dtype = torch.float32
        if packed and not cfg.ternary:
            raise ValueError("a full-precision model (ternary=False) has no ternary layers to pack")
        # The linears of sections 2 and 5 in the faster form of section 7. The plain classes work here too.
        if packed:
            linear = FastPackedTernaryLinear
        elif cfg.ternary:
            linear = FastTernaryLinear
        else:
            linear = nn.Linear
        self.out_channels = cfg.in_channels * (2 if cfg.learn_sigma else 1)
        self.x_embedder = nn.Linear(cfg.patch_size**2 * cfg.in_channels, cfg.dim)
        self.t_embedder = TimestepEmbedder(cfg.cond_dim)
        self.y_embedder = LabelEmbedder(cfg.num_classes, cfg.cond_dim)
        self.pos_embed = nn.Parameter(torch.empty(cfg.n_tokens, cfg.dim)) if cfg.pos_embed else None
        self.layers = nn.ModuleList([TransformerBlock(cfg, linear) for _ in range(cfg.n_layers)])
        self.final_layer = FinalLayer(cfg, self.out_channels)
        if not (packed or self.x_embedder.weight.is_meta):
            self.init_weights()

    def init_weights(self):
        """The start of training. Two things differ from upstream.

        alpha starts at mean|W| (upstream: a draw from N(0, 1)), so a ternary linear puts out about what its latent
        weights would. And every block starts as the identity (adaLN-Zero) through the RMS Norm's gain, not through
        zero weights: were the weights 0, mean|W| would be 0 too. After the first update, however small, each weight is
        about as large as mean|W|, so most round to +-1, and the gates would open fully in one step.
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
            elif not cfg.ternary:  # ternary without the norm does not start as the identity: see above
                nn.init.zeros_(block.adaLN_modulation[1].weight)
        for linear in (self.final_layer.adaLN_modulation[1], self.final_layer.linear):
            nn.init.zeros_(linear.weight)

    def set_product_dtype(self, dtype):
        """Multiply by ternary weights in this dtype: fp32, bf16, fp16, or int8 for packed ones (int8_linear_plain).

        All else stays in fp32: the residual stream, norms, embeddings and the final layer, as in training. With int8
        the adaLN projections take int16, two int8 products: they steer whole blocks, and cause most of int8's error.
        """
        self.product_dtype = dtype
        for name, module in self.named_modules():
            if isinstance(module, (TernaryLinear, PackedTernaryLinear)):
                is_adaln = "adaLN_modulation" in name
                module.product_dtype = torch.int16 if dtype == torch.int8 and is_adaln else dtype

    def patchify(self, x):
        p = self.config.patch_size
        x = x.unflatten(3, (-1, p)).unflatten(2, (-1, p))  # (B, C, H/p, p, W/p, p)
        return x.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)  # (B, T, C * p * p)

    def unpatchify(self, x, height):
        p = self.config.patch_size
        # Within a patch the order is (p, p, C) here and (C, p, p) in patchify. DiT does so, and checkpoints rely on it.
        x = x.unflatten(2, (p, p, -1)).unflatten(1, (height // p, -1))  # (B, H/p, W/p, p, p, C)
        return x.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)  # (B, C, H, W)

    def forward(self, x, t, y):
        """Predict the noise (or v) in x.

        x (B, C, H, W) noisy images or latents; t (B,) in 0..999, fractions allowed; y (B,) classes or the null label.
        -> (B, 2C, H, W): prediction, then the sigma channels; (B, C, H, W) if not learn_sigma.
        """
        height = x.shape[2]
        dtype = self.x_embedder.weight.dtype  # the residual stream keeps it, under autocast too
        h = self.x_embedder(self.patchify(x).to(dtype)).to(dtype)  # (B, T, D)
        if self.pos_embed is not None:
            h = h + self.pos_embed
        c = self.t_embedder(t) + self.y_embedder(y)  # (B, cond_dim)
        freqs_cis = rotary_table(h.shape[1], self.config.dim // self.config.n_heads, x.device)
        for block in self.layers:
            h = block(h, c, freqs_cis)
        return self.unpatchify(self.final_layer(h, c), height)

    def forward_with_cfg(self, x, t, y, cfg_scale, guided_channels=None):
        """Classifier-free guidance, with upstream's arguments.

        x (B, C, H, W): the first half is run twice, the second half is ignored. y (B,): the classes, then as many null
        labels. -> (B, 2C or C, H, W), whose two halves hold the same guided prediction; sigma is never guided.
        guided_channels=3 reproduces upstream, which leaves the fourth latent channel unguided (DiT issue 41 calls it a
        slip). None guides every channel.
        """
        half = x[: len(x) // 2]
        out = self.forward(torch.cat([half, half]), t, y)
        n_guided = self.config.in_channels if guided_channels is None else guided_channels
        cond, uncond = out[:, :n_guided].chunk(2)
        guided = uncond + cfg_scale * (cond - uncond)
        return torch.cat([torch.cat([guided, guided]), out[:, n_guided:]], dim=1)


# ----------------------------------------------------------------------------------------------------------------------
# 4. Diffusion


def spaced_timesteps(respacing, total):
    """The timesteps that a shorter process keeps (ADM): "250" spreads 250 evenly, "ddim50" takes every 20th."""
    count = respacing.removeprefix("ddim")
    if not count.isdigit() or not 1 <= int(count) <= total:
        raise ValueError(f"respacing={respacing!r}, expected a count of 1 to {total} such as '250', or 'ddim50'")
    count = int(count)
    if respacing.startswith("ddim"):
        for stride in range(1, total):
            steps = list(range(0, total, stride))
            if len(steps) == count:
                return steps
        raise ValueError(f"respacing={respacing!r}: no whole stride gives {count} of {total} steps")
    stride = (total - 1) / max(count - 1, 1)
    steps = []
    position = 0.0
    for _ in range(count):
        steps.append(round(position))
        position += stride  # a running sum, as in ADM: i * stride rounds differently at exact halves
    return steps


def gaussian_kl(mean1, logvar1, mean2, logvar2):
    """KL divergence between two Gaussians, in nats."""
    return 0.5 * (-1 + logvar2 - logvar1 + (logvar1 - logvar2).exp() + (mean1 - mean2) ** 2 * (-logvar2).exp())


def normal_cdf(z):
    """The standard normal distribution function, in ADM's approximation."""
    return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))


def discretized_gaussian_nll(x, mean, log_scale):
    """-log of the mass that a Gaussian puts on x's own bin of width 2/255 (DDPM section 3.3)."""
    inv_std = (-log_scale).exp()
    below_upper_edge = normal_cdf(inv_std * (x - mean + 1 / 255))
    below_lower_edge = normal_cdf(inv_std * (x - mean - 1 / 255))
    mass = below_upper_edge - below_lower_edge
    mass = torch.where(x > 0.999, 1 - below_lower_edge, mass)  # the brightest bin reaches to infinity
    mass = torch.where(x < -0.999, below_upper_edge, mass)  # and the darkest to minus infinity
    return -mass.clamp(min=1e-12).log()


def extract(table, t):
    """table[t] as fp32 (B, 1, 1, 1), to go with images (B, C, H, W)."""
    return torch.from_numpy(table).to(t.device)[t].float().view(-1, 1, 1, 1)


class GaussianDiffusion:
    """The noise process q(x_t | x_0), the training loss, and the samplers.

    Linear betas 1e-4..0.02 over 1000 steps (DDPM). `respacing` keeps fewer of them for sampling: a shorter process with
    the same alphas_cumprod at the kept steps; timestep_map[i] is the original number of step i. Tables are float64.

    prediction: what the model's first C channels mean. "eps" is the noise, the paper's choice. "v" is
    sqrt(alphas_cumprod) eps - sqrt(1 - alphas_cumprod) x0 (Salimans & Ho 2022): nearly -x0 when x is nearly pure noise,
    where a whole image's layout is decided and where an error in eps costs almost nothing.
    """

    def __init__(self, respacing="", prediction="eps"):
        betas = np.linspace(1e-4, 0.02, 1000, dtype=np.float64)
        alphas_cumprod = np.cumprod(1 - betas)
        self.timestep_map = np.arange(1000)
        if respacing:
            self.timestep_map = np.array(spaced_timesteps(respacing, 1000))
            kept = alphas_cumprod[self.timestep_map]
            betas = 1 - kept / np.append(1.0, kept[:-1])
            alphas_cumprod = np.cumprod(1 - betas)
        self.prediction = prediction
        self.num_timesteps = len(betas)
        self.betas = betas
        self.alphas_cumprod = alphas_cumprod
        self.alphas_cumprod_prev = np.append(1.0, alphas_cumprod[:-1])
        self.sqrt_alphas_cumprod = np.sqrt(alphas_cumprod)
        self.sqrt_one_minus_alphas_cumprod = np.sqrt(1 - alphas_cumprod)
        self.sqrt_recip_alphas_cumprod = np.sqrt(1 / alphas_cumprod)
        self.sqrt_recipm1_alphas_cumprod = np.sqrt(1 / alphas_cumprod - 1)
        # q(x_{t-1} | x_t, x_0), DDPM eq. 6 and 7. Its variance is 0 at t=0, so the log there takes the value of t=1.
        self.posterior_variance = betas * (1 - self.alphas_cumprod_prev) / (1 - alphas_cumprod)
        at_zero = self.posterior_variance[1] if len(betas) > 1 else betas[0]
        self.posterior_log_variance_clipped = np.log(np.append(at_zero, self.posterior_variance[1:]))
        self.posterior_mean_coef1 = betas * np.sqrt(self.alphas_cumprod_prev) / (1 - alphas_cumprod)
        self.posterior_mean_coef2 = (1 - self.alphas_cumprod_prev) * np.sqrt(1 - betas) / (1 - alphas_cumprod)

    def q_sample(self, x0, t, noise):
        """Noise x0 (B, C, H, W) to timestep t (B,) in one go (DDPM eq. 4)."""
        return extract(self.sqrt_alphas_cumprod, t) * x0 + extract(self.sqrt_one_minus_alphas_cumprod, t) * noise

    def v_rotation(self, a, t, b):
        """sqrt(alphas_cumprod) a - sqrt(1 - alphas_cumprod) b, in two uses:

        v = v_rotation(eps, t, x0)    and, backwards,    x0 = v_rotation(x, t, v)
        """
        return extract(self.sqrt_alphas_cumprod, t) * a - extract(self.sqrt_one_minus_alphas_cumprod, t) * b

    def q_posterior(self, x0, x, t):
        """Mean and log variance of q(x_{t-1} | x_t, x_0)."""
        mean = extract(self.posterior_mean_coef1, t) * x0 + extract(self.posterior_mean_coef2, t) * x
        return mean, extract(self.posterior_log_variance_clipped, t)

    def predict_x0(self, pred, x, t):
        """The clean image that the model's prediction (B, C, H, W) at x and t implies."""
        if self.prediction == "v":
            return self.v_rotation(x, t, pred)
        return extract(self.sqrt_recip_alphas_cumprod, t) * x - extract(self.sqrt_recipm1_alphas_cumprod, t) * pred

    def p_mean_variance(self, model_out, x, t, clip_denoised=False):
        """Read the model's output (B, 2C or C, H, W) at x (B, C, H, W), t (B,).

        -> dict of mean, variance, log_variance of p(x_{t-1} | x_t), and pred_xstart. The sigma channels choose the log
        variance: -1 is that of the posterior, +1 that of beta, between them it is blended (Improved DDPM eq. 15).
        """
        model_out = model_out.float()
        n_channels = x.shape[1]
        x0 = self.predict_x0(model_out[:, :n_channels], x, t)
        if clip_denoised:
            x0 = x0.clamp(-1, 1)
        mean, log_variance = self.q_posterior(x0, x, t)
        if model_out.shape[1] != n_channels:
            blend = (model_out[:, n_channels:] + 1) / 2
            log_variance = blend * extract(np.log(self.betas), t) + (1 - blend) * log_variance
        log_variance = log_variance.expand_as(x)
        return dict(mean=mean, variance=log_variance.exp(), log_variance=log_variance, pred_xstart=x0)

    def training_losses(self, model, x0, t, y, noise=None, teacher=None):
        """Loss of model(x_t, timestep, y) for x0 (B, C, H, W), t (B,) int64, y (B,) -> dict of (B,) tensors.

        `mse` is the paper's simple loss; `vb`, in bits a dimension, teaches the sigma channels alone (Improved DDPM
        section 3.1): no gradient of it reaches the prediction. Without sigma channels there is none. `loss` is the sum.
        With a teacher, another model of the same outputs, `distill` is the mean square between both models' outputs,
        sigma channels included. It is no part of `loss`.
        """
        if noise is None:
            noise = torch.randn_like(x0)
        x = self.q_sample(x0, t, noise)
        timesteps = torch.from_numpy(self.timestep_map).to(t.device)[t]
        out = model(x, timesteps, y).float()
        n_channels = x0.shape[1]
        pred = out[:, :n_channels]
        target = self.v_rotation(noise, t, x0) if self.prediction == "v" else noise
        mse = ((target - pred) ** 2).flatten(1).mean(1)
        terms = dict(mse=mse, loss=mse)
        if teacher is not None:
            with torch.no_grad():
                teacher_out = teacher(x, timesteps, y).float()
            terms["distill"] = ((teacher_out - out) ** 2).flatten(1).mean(1)
        if out.shape[1] == n_channels:
            return terms
        out_for_vb = torch.cat([pred.detach(), out[:, n_channels:]], dim=1)
        p = self.p_mean_variance(out_for_vb, x, t)
        true_mean, true_log_variance = self.q_posterior(x0, x, t)
        kl = gaussian_kl(true_mean, true_log_variance, p["mean"], p["log_variance"]).flatten(1).mean(1)
        nll = discretized_gaussian_nll(x0, p["mean"], 0.5 * p["log_variance"]).flatten(1).mean(1)
        vb = torch.where(t == 0, nll, kl) / math.log(2)
        return terms | dict(vb=vb, loss=mse + vb)

    def _sample_loop(self, step, model_fn, x, clip_denoised, noise_fn):
        """From x_T to x_0. step(p, x, t, noise) makes x_{t-1} from x_t; DDPM and DDIM each pass their own."""
        for i in reversed(range(self.num_timesteps)):
            t = torch.full((len(x),), i, device=x.device)
            out = model_fn(x, torch.full_like(t, int(self.timestep_map[i])))
            p = self.p_mean_variance(out, x, t, clip_denoised)
            noise = noise_fn(x)  # drawn at the last step too, where it is not used: as many draws as steps
            if i == 0:
                noise = torch.zeros_like(noise)
            x = step(p, x, t, noise)
        return x

    @torch.no_grad()
    def p_sample_loop(self, model_fn, noise, clip_denoised=False, noise_fn=torch.randn_like):
        """DDPM's ancestral sampling. noise (B, C, H, W) is x_T; model_fn(x, t) gets timesteps of 0..999. -> x_0"""

        def step(p, x, t, noise):
            return p["mean"] + (0.5 * p["log_variance"]).exp() * noise

        return self._sample_loop(step, model_fn, noise, clip_denoised, noise_fn)

    @torch.no_grad()
    def ddim_sample_loop(self, model_fn, noise, eta=0.0, clip_denoised=False, noise_fn=torch.randn_like):
        """DDIM (eq. 12), arguments as in p_sample_loop. eta sets the variance, so sigma channels are ignored; with 0
        the result is a function of x_T."""

        def step(p, x, t, noise):
            x0 = p["pred_xstart"]
            # From the clipped x0, not the model's own eps.
            eps = (extract(self.sqrt_recip_alphas_cumprod, t) * x - x0) / extract(self.sqrt_recipm1_alphas_cumprod, t)
            acp = extract(self.alphas_cumprod, t)
            acp_prev = extract(self.alphas_cumprod_prev, t)
            sigma = eta * ((1 - acp_prev) / (1 - acp)).sqrt() * (1 - acp / acp_prev).sqrt()
            return x0 * acp_prev.sqrt() + (1 - acp_prev - sigma**2).sqrt() * eps + sigma * noise

        return self._sample_loop(step, model_fn, noise, clip_denoised, noise_fn)


    @torch.no_grad()
    def dpm_sample_loop(self, model_fn, noise, clip_denoised=False):
        """DPM-Solver++(2M) (arXiv 2211.01095, algorithm 2): second order, so it needs fewer steps. Deterministic.

        Arguments as in p_sample_loop; sigma channels are ignored. With lambda = log(sqrt(acp) / sqrt(1 - acp)), a step
        extrapolates x0 from the last two predictions. The first step has only one. Before t = 0 lambda jumps, and an
        extrapolation that far does harm: this step is of first order too.
        """
        half_log_snr = 0.5 * np.log(self.alphas_cumprod / (1 - self.alphas_cumprod))
        x = noise
        previous_x0 = None
        previous_h = None
        for i in reversed(range(self.num_timesteps)):
            t = torch.full((len(x),), i, device=x.device)
            out = model_fn(x, torch.full_like(t, int(self.timestep_map[i])))
            x0 = self.p_mean_variance(out, x, t, clip_denoised)["pred_xstart"]
            if i == 0:
                return x0
            h = half_log_snr[i - 1] - half_log_snr[i]
            direction = x0
            if previous_x0 is not None and i > 1:
                direction = x0 + (x0 - previous_x0) * (0.5 * h / previous_h)
            shrink = self.sqrt_one_minus_alphas_cumprod[i - 1] / self.sqrt_one_minus_alphas_cumprod[i]
            x = shrink * x - self.sqrt_alphas_cumprod[i - 1] * np.expm1(-h) * direction
            previous_x0 = x0
            previous_h = h


# ----------------------------------------------------------------------------------------------------------------------
# 5. Packing: four weights in a byte


def pack_ternary(codes):
    """codes (N, K) in {-1, 0, 1}, any dtype -> (N/4, K) uint8, in upstream's byte layout.

    Rows are taken in quarters: with n = N/4, byte [r, c] holds the weights of rows r, n+r, 2n+r and 3n+r, high bits
    first, each as weight + 1:    bits 7-6: row r | 5-4: row n+r | 3-2: row 2n+r | 1-0: row 3n+r
    Example with N = 4, K = 1: the weights 1, 0, -1, 1 from top to bottom become the byte 0b10_01_00_10 (2, 1, 0, 2).
    """
    if codes.ndim != 2 or codes.shape[0] % 4:
        raise ValueError(f"pack_ternary needs (N, K) with N a multiple of 4, got {tuple(codes.shape)}")
    if not bool(((codes == -1) | (codes == 0) | (codes == 1)).all()):
        raise ValueError("pack_ternary needs codes of -1, 0 and 1 alone")
    quarter0, quarter1, quarter2, quarter3 = (codes + 1).to(torch.uint8).chunk(4)
    return (quarter0 << 6) | (quarter1 << 4) | (quarter2 << 2) | quarter3


def unpack_ternary(packed):
    """(N/4, K) uint8 -> (N, K) int8 in {-1, 0, 1}. Bytes are not checked here: see check_packed."""
    quarters = [(packed >> shift) & 3 for shift in (6, 4, 2, 0)]
    return torch.cat(quarters).to(torch.int8) - 1


def check_packed(packed, name="weight"):
    """Raise ValueError if a 2-bit field of packed (N/4, K) uint8 holds 3, which stands for no weight."""
    if packed.dtype != torch.uint8:
        raise ValueError(f"{name}: packed weights are uint8, got {packed.dtype}")
    low_bits = packed & 0b01010101
    high_bits = (packed >> 1) & 0b01010101
    if bool((low_bits & high_bits).any()):
        raise ValueError(f"{name}: holds code 3, but packed ternary weights use 0, 1 and 2: the bytes are damaged")


def packed_linear_plain(x, weight, alphas, bias):
    """x (..., K), weight (N/4, K) uint8, alphas (1,), bias (N,) or None -> (..., N): unpack, scale, multiply."""
    if bias is not None:
        bias = bias.to(x.dtype)
    return F.linear(x, unpack_ternary(weight).to(x.dtype) * alphas.to(x.dtype), bias)


def round_to_int8(x):
    """x (..., K) -> fp32 levels of -127 to 127, halves to even, and each row's scale: x is about levels * scale."""
    x = x.float()
    greatest = x.abs().amax(-1, keepdim=True).clamp(min=1e-30)  # (..., 1)
    return (x * (torch.full_like(greatest, 127) / greatest)).round(), greatest / 127


def int8_linear_plain(x, weight, alphas, bias):
    """packed_linear_plain with activations in int8 (W1.58A8): x (M, K) fp32 or bf16 -> (M, N) bf16.

    Each row of x is rounded to 255 levels between -max|x| and max|x|. A ternary weight is exact in int8, so the integer
    sums are exact, and nearly all of the work runs at int8's rate. ValueError if x is not finite.
    """
    levels, scales = round_to_int8(x)  # (M, K), (M, 1)
    if not bool(scales.isfinite().all()):
        raise ValueError("activations are not finite: is the checkpoint damaged?")
    sums = integer_matmul(levels.to(torch.int8), unpack_ternary(weight).t())  # (M, N) int32
    y = sums.float() * (scales * alphas.float())
    if bias is not None:
        y = y + bias.float()
    return y.to(torch.bfloat16)


def int8_remainder(x):
    """x (..., K) less what int8_linear_plain rounds it to, fp32."""
    levels, scales = round_to_int8(x)
    return x.float() - levels * scales


class PackedTernaryLinear(nn.Module):
    """TernaryLinear for inference, at 2 bits a weight: x (..., K) -> (..., N).

    `weight` (N/4, K) uint8 as in pack_ternary, `alphas` (1,), `bias` (N,) or None. In fp32 on a CPU it gives the same
    bits as TernaryLinear. Models are built of FastPackedTernaryLinear (section 7), which puts out the same.
    """

    def __init__(self, in_features, out_features, bias=False):
        super().__init__()
        if out_features % 4:
            raise ValueError(f"out_features={out_features} must be a multiple of 4 to be packed")
        self.register_buffer("weight", torch.zeros(out_features // 4, in_features, dtype=torch.uint8))
        self.alphas = nn.Parameter(torch.ones(1))
        self.bias = nn.Parameter(torch.zeros(out_features)) if bias else None
        self.product_dtype = None  # that of x, unless DiT.set_product_dtype says otherwise

    def forward(self, x):
        return packed_linear_plain(x, self.weight, self.alphas, self.bias)


@torch.no_grad()
def pack_model(model):
    """A DiT of TernaryLinear layers -> a new DiT of PackedTernaryLinear layers, in eval mode on the same device.

    Without gradients, on a CPU in fp32, its output equals the model's bit for bit.
    """
    with torch.device("meta"):
        packed = DiT(model.config, packed=True)
    packed.set_product_dtype(model.product_dtype)
    ternary = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, TernaryLinear)}
    state = {}
    for name, value in model.state_dict().items():
        if name not in ternary:
            state[name] = value.clone()
        elif bool(value.isfinite().all()):
            state[name] = pack_ternary(ternarize(value))
        else:
            raise ValueError(f"{name} holds values that are not finite: it cannot be packed")
    packed.load_state_dict(state, assign=True)
    return packed.eval().requires_grad_(False)


# ----------------------------------------------------------------------------------------------------------------------
# 6. Checkpoints

FORMAT = "terdit-1"


def atomic_write(path, write):
    """write(file) into a file beside `path`, then rename it: a crash or a full disk leaves the old file whole.

    Where `path` is a link, its target is replaced. A device or a pipe is written to as it is. OSError names the path.
    """
    target = Path(os.path.realpath(path))
    tmp_path = target.with_name(target.name + ".tmp")
    try:
        if target.exists() and not target.is_file():
            content = io.BytesIO()  # zip files are written back and forth, which a device cannot do
            write(content)
            target.write_bytes(content.getvalue())
            return
        with open(tmp_path, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(tmp_path, target)
    except (RuntimeError, OSError) as e:  # torch.save raises a RuntimeError when the disk is full
        raise OSError(f"{path}: cannot be written ({first_line(e)})") from None
    finally:
        tmp_path.unlink(missing_ok=True)


def save_checkpoint(path, model):
    """Write a DiT, packed or not, with its Config. load_model reads it back."""
    state = {name: value.cpu() for name, value in model.state_dict().items()}
    ckpt = {"format": FORMAT, "config": asdict(model.config), "model": state}
    atomic_write(path, lambda file: torch.save(ckpt, file))


def read_checkpoint(path, expected):
    """torch.load that runs no code (weights_only) and says what was wrong. `expected` names what the file should be."""
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file; expected {expected}")
    if not path.is_file():  # to open a pipe would wait for ever
        raise ValueError(f"{path}: not a regular file; expected {expected}")
    n_bytes = path.stat().st_size
    try:
        members = zipfile.ZipFile(path).infolist()
        # torch.save compresses nothing. What is compressed could fill the memory when it is unpacked.
        is_plain = all(member.compress_type == zipfile.ZIP_STORED for member in members)
        if not is_plain or sum(member.file_size for member in members) > n_bytes:
            raise ValueError("its parts are compressed, or larger than the file")
        # Not mapped into memory (mmap=True): a file that is replaced later must not change the model.
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:  # torch's words advise to load it with weights_only=False, which would run its code
        raise ValueError(f"{path}: not {expected}: it holds more than tensors, and may be hostile") from None
    except Exception as e:  # a damaged file raises almost anything
        raise ValueError(f"{path}: not {expected}, or cut short ({first_line(e)})") from None


def check_tensors(path, state):
    """Raise ValueError if a state dict that was read from the file `path` holds other than plain tensors, or more bytes
    than the file: a tensor of stride 0 is small in a file and may be huge in memory."""
    n_bytes = 0
    for name, value in state.items():
        is_tensor = isinstance(value, torch.Tensor) and value.layout == torch.strided and value.device.type == "cpu"
        if not isinstance(name, str) or not is_tensor:
            raise ValueError(f"{path}: damaged: {name!r:.99} is no plain tensor")
        n_bytes += value.numel() * value.element_size()
    if n_bytes > path.stat().st_size:
        raise ValueError(f"{path}: damaged: its tensors would take {n_bytes:,} bytes, more than the file has")


def released_config(state, args):
    """Config fields of a released TerDiT or Large-DiT, from its tensors' shapes and its argparse.Namespace."""
    patch_size = 2  # every released model's name ends in _patch2
    dim, patch_dim = state["x_embedder.weight"].shape
    num_classes = len(state["y_embedder.embedding_table.weight"]) - 1
    ffn_dim = state["layers.0.feed_forward.w2.weight"].shape[-1]
    multiple_of = 1  # it is stored nowhere: the largest that gives this width
    for candidate in (32, 64, 128, 256):
        if math.ceil(int(8 * dim / 3) / candidate) * candidate == ffn_dim:
            multiple_of = candidate
    is_ternary = "layers.0.attention.wq.alphas" in state
    class_names = [str(i) for i in range(num_classes)]
    if is_ternary:
        # TerDiT's rows follow its class_to_idx.json, the indices in order as strings: 0, 1, 10, 100, 101, ... So 207 is
        # row 121. Large-DiT's rows are ImageNet's indices themselves: 207 is row 207.
        class_names.sort()
    return dict(
        input_size=int(getattr(args, "image_size", 256)) // 8,
        patch_size=patch_size,
        in_channels=patch_dim // patch_size**2,
        dim=dim,
        n_layers=1 + max(int(name.split(".")[1]) for name in state if name.startswith("layers.")),
        n_heads=32,
        multiple_of=multiple_of,
        num_classes=num_classes,
        learn_sigma=len(state["final_layer.linear.weight"]) == 2 * patch_dim,
        qk_norm="layers.0.attention.q_norm.weight" in state,
        ternary=is_ternary,
        adaln_norm="layers.0.adaLN_modulation.2.weight" in state,
        vae=f"stabilityai/sd-vae-ft-{getattr(args, 'vae', 'ema')}",
        class_names=class_names,
    )


def read_released(folder):
    """A released TerDiT or Large-DiT folder -> Config fields, state dict."""
    candidates = [folder / "consolidated_ema_ternary.00-of-01.pth", folder / "consolidated_ema.00-of-01.pth"]
    weights = next((path for path in candidates if path.is_file()), None)
    if weights is None:
        names = ", ".join(path.name for path in candidates)
        raise FileNotFoundError(f"{folder}: no checkpoint in it: a run folder holds packed.pt, a released one {names}")
    with torch.serialization.safe_globals([Namespace]):
        args = read_checkpoint(folder / "model_args.pth", "a released model's arguments")
    state = read_checkpoint(weights, "a released model's weights")
    try:
        check_tensors(weights, state)
        return released_config(state, args), state
    except (LookupError, ValueError, TypeError, AttributeError, ArithmeticError) as e:
        raise ValueError(f"{weights}: not the weights of a TerDiT or Large-DiT ({e})") from None


def read_model(path):
    """A file of save_checkpoint, a released folder or a file of DiT -> Config fields, state dict (on the CPU)."""
    path = Path(path)
    expected = f"a checkpoint of this project (format {FORMAT!r}) or of Meta's DiT"
    if (path / "run.json").is_file():
        raise ValueError(f"{path}: a training state: train.py --export --out {path.parent} makes its packed.pt")
    if path.is_dir():
        return read_released(path)
    with torch.serialization.safe_globals([Namespace]):  # DiT's train.py keeps its arguments beside the weights
        ckpt = read_checkpoint(path, expected)
    if not isinstance(ckpt, dict):
        raise ValueError(f"{path}: not {expected}, but a foreign file, a {type(ckpt).__name__}")
    if ckpt.get("format") == FORMAT:
        config_fields = ckpt.get("config")
        state = ckpt.get("model")
        if not (isinstance(config_fields, dict) and isinstance(state, dict)):
            raise ValueError(f"{path}: damaged: a checkpoint of this project holds a config and a model")
    else:
        config_fields = {}  # model_from_state takes them from the shapes
        state = find_meta_dit(ckpt)
        if state is None:
            raise ValueError(f"{path}: not {expected}, but a foreign file, which holds {list(ckpt)[:4]!r:.99}")
    check_tensors(path, state)
    return config_fields, state


def checked_state(state, packed):
    """The tensors of a checkpoint, their types checked: packed codes are uint8, all else is cast to fp32.

    `state` is emptied on the way, so that what is cast is not in memory twice.
    """
    ternary = {name.removesuffix("alphas") + "weight" for name in state if name.endswith("alphas")}
    checked = {}
    for name in list(state):
        value = state.pop(name)
        if packed and name in ternary:
            check_packed(value, name)
        elif not value.is_floating_point():
            raise ValueError(f"{name} is {value.dtype}, expected floating point")
        else:
            value = value.float()
        checked[name] = value
    return checked


def load_model(path, device="cpu", dtype=torch.float32, **overrides):
    """Load a model for inference, with its `.config`: a file of save_checkpoint, a released folder, or a file of DiT.

    Meta's file gives a MetaDiT (section 8), all else a DiT. dtype is that of products with ternary weights (in_dtype).
    `overrides` replace Config fields. Released models do not say n_heads: 32 is taken for a folder, Meta's for DiT. A
    wrong one that splits the width goes unnoticed and draws nonsense. Raises ValueError or OSError, naming the file.
    """
    config_fields, state = read_model(path)
    return model_from_state(path, config_fields | overrides, state, device, dtype)


def model_from_state(path, config_fields, state, device="cpu", dtype=torch.float32):
    """load_model of what was read from `path` already; `state` is emptied. model.stored_bytes is what the file takes:
    2-bit codes, and the rest."""
    stored_bytes = dict(codes=0, rest=0)
    try:
        for value in state.values():
            stored_bytes["codes" if value.dtype == torch.uint8 else "rest"] += value.numel() * value.element_size()
        if is_meta_dit(state):
            config = MetaDiTConfig(**meta_dit_sizes(state) | config_fields)
        else:
            config = Config(**config_fields)
        if 10 * config.n_layers > len(state):  # a block has ten or more; said before all blocks are built
            raise ValueError(f"n_layers={config.n_layers}, but it holds only {len(state)} tensors")
        packed = config.ternary and state["layers.0.attention.wq.weight"].dtype == torch.uint8
        with torch.device("meta"):
            if is_meta_dit(state):
                model = MetaDiT(config)
            else:
                model = DiT(config, packed=packed)
        model.load_state_dict(checked_state(state, packed), assign=True)
    except KeyError as e:
        raise ValueError(f"{path}: damaged: there is no {e.args[0]} in it") from None
    except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RuntimeError) as e:
        raise ValueError(f"{path}: damaged, or its config is wrong: {' '.join(str(e).split())[:300]}") from None
    model.stored_bytes = stored_bytes
    model.eval().requires_grad_(False)
    return in_dtype(model, dtype).to(device)


def in_dtype(model, dtype):
    """A model for inference whose products with ternary weights are in dtype. For int8 they are packed first.

    All else stays in fp32 (DiT.set_product_dtype). A full-precision model is in dtype as a whole.
    """
    if not model.config.ternary:
        if dtype == torch.int8:
            raise ValueError("int8 is for ternary weights, this checkpoint is in full precision")
        return model.to(dtype)
    if dtype == torch.int8 and not any(isinstance(module, PackedTernaryLinear) for module in model.modules()):
        stored_bytes = model.stored_bytes
        model = pack_model(model)
        model.stored_bytes = stored_bytes
    model.set_product_dtype(dtype)
    return model


# ----------------------------------------------------------------------------------------------------------------------
# 7. Fast paths: skip on first reading
#
# Models are built of these. FastTernaryLinear puts out what TernaryLinear does, FastPackedTernaryLinear what
# PackedTernaryLinear does; tests hold each pair together. A packed layer runs in one of these ways, which packed_path
# chooses; where a gradient is wanted, the layer itself takes the plain one:
#
#     "kernel"  on a GPU, in bf16 or fp16: kernel.cu multiplies by the packed bytes
#     "int8"    on a CPU, if asked for (DiT.set_product_dtype): kernel.cu's C++ around torch's integer matmul
#     "blocks"  on a CPU, in other dtypes: a block of weights after another is unpacked in the cache and multiplied
#     "plain"   everywhere else: packed_linear_plain or int8_linear_plain

SLOWLY = "unpack in plain PyTorch at every call, slower"


@lru_cache(maxsize=None)
def announce_once(message):
    warnings.warn(message, stacklevel=2)


def first_line(e):
    """What an exception says, in one line; its type where it says nothing."""
    text = str(e).strip()
    return text.splitlines()[0][:200] if text else type(e).__name__


class _ScaledTernaryWeight(torch.autograd.Function):
    """(ternarize(weight) * alphas).to(dtype), with fewer passes over memory: this runs on every weight at every step.

    The forward pass works in one buffer. For the backward pass it keeps the scaled weight alone, which F.linear keeps
    too; the plain expression would also keep the codes. tests/bench_qat.py prints what is left of the cost.
    """

    @staticmethod
    def forward(ctx, weight, alphas, dtype):
        buffer = weight.abs()
        gamma = buffer.mean() + TERNARY_EPS
        torch.div(weight, gamma, out=buffer).round_().clamp_(-1, 1)
        scaled = buffer.mul_(alphas).to(dtype)
        ctx.save_for_backward(scaled, alphas)
        return scaled

    @staticmethod
    def backward(ctx, grad):
        scaled, alphas = ctx.saved_tensors
        if grad.dtype == torch.float32:
            grad_dot_scaled = torch.dot(grad.flatten(), scaled.flatten())
        else:
            grad_dot_scaled = torch.linalg.vecdot(grad, scaled).sum(dtype=torch.float32)
            grad = grad.float()
        # d/dalpha = <grad, codes>. The codes are not kept, but scaled = alpha * codes, so it is <grad, scaled> / alpha.
        # At an alpha of exactly 0 that would be 0 / 0: it gets no gradient.
        grad_alphas = torch.where(alphas == 0, alphas, grad_dot_scaled / alphas)
        if torch.is_grad_enabled():  # create_graph=True: for a second derivative `grad` must not be overwritten
            return grad * alphas, grad_alphas, None
        # In place, because a copy would cost more than the arithmetic. F.linear's backward made `grad` for this
        # function alone, so nobody else sees the change.
        return grad.mul_(alphas), grad_alphas, None


class FastTernaryLinear(TernaryLinear):
    """TernaryLinear, with the weight made by _ScaledTernaryWeight directly in the dtype that the matmul takes."""

    def forward(self, x):
        dtype = self.product_dtype or x.dtype
        if not x.is_meta and torch.is_autocast_enabled(x.device.type):  # the meta device has no autocast
            dtype = torch.get_autocast_dtype(x.device.type)
        weight = _ScaledTernaryWeight.apply(self.weight, self.alphas, dtype)
        bias = None if self.bias is None else self.bias.to(dtype)
        return F.linear(x.to(dtype), weight, bias)


class FastPackedTernaryLinear(PackedTernaryLinear):
    """PackedTernaryLinear by packed_linear, in the dtype of DiT.set_product_dtype."""

    def forward(self, x):
        if x.shape[-1] != self.weight.shape[1]:
            raise ValueError(f"x of (..., {self.weight.shape[1]}) wanted, got {tuple(x.shape)}")
        dtype = self.product_dtype or x.dtype
        if dtype.is_floating_point:  # int8_linear rounds by itself
            x = x.to(dtype)
        if torch.is_grad_enabled() and any(z is not None and z.requires_grad for z in (x, self.alphas, self.bias)):
            return super().forward(x)  # only the plain path has a backward pass
        return packed_linear(x, self.weight, self.alphas, self.bias, dtype)


def packed_path(device, dtype):
    """How packed layers run on this device in this product dtype: "kernel", "int8", "blocks" or "plain"."""
    kind = torch.device(device).type
    if forced_kernel()[0] == "off":
        return "plain"
    if kind == "cpu" and cpu_kernel():
        return "blocks" if dtype.is_floating_point else "int8"
    if kind == "cuda" and dtype in (torch.bfloat16, torch.float16):
        return "kernel" if cuda_kernel(device) else "plain"
    if kind == "cuda" and dtype.is_floating_point:
        announce_once(f"no kernel for {dtype} on a GPU: packed layers {SLOWLY}")
    return "plain"


def packed_linear(x, weight, alphas, bias, dtype=None):
    """packed_linear_plain, or for dtype=torch.int8 int8_linear_plain, by the fastest path there is.

    torch.int16 stands for two int8 products, of x and of what rounding it to int8 leaves, added in fp32. Where rows are
    few, as in adaLN, the second costs little.
    """
    dtype = dtype or x.dtype
    if dtype == torch.int16:
        first, rest = packed_linear(torch.stack([x.float(), int8_remainder(x)]), weight, alphas, None, torch.int8)
        y = first.float() + rest.float()
        return y if bias is None else y + bias.float()
    path = packed_path(x.device, dtype)
    rows = x.reshape(-1, x.shape[-1])  # (M, K)
    alphas = alphas.float()
    if bias is not None and dtype.is_floating_point:
        bias = bias.to(x.dtype)
    y = None
    if path == "kernel":
        try:
            library = cuda_kernel(x.device)
            y = launch_kernel(library, rows, weight, alphas, bias, *choose_kernel(library, rows, weight))
        except KernelError as e:
            announce_once(f"{e}: packed layers {SLOWLY}")
    if path == "int8":
        y = int8_linear(rows, weight, alphas, bias)
    elif path == "blocks":
        y = linear_in_blocks(rows, weight, alphas, bias)
    elif y is None and dtype == torch.int8:
        y = int8_linear_plain(rows, weight, alphas, bias)
    elif y is None:
        y = packed_linear_plain(rows, weight, alphas, bias)
    return y.view(*x.shape[:-1], 4 * len(weight))


# kernel.cu on a GPU ---------------------------------------------------------------------------------------------------

KERNELS = ("auto", "naive", "small_batch", "mma", "wgmma")  # in the order of kernel.cu's enum
REFUSED = -1  # kernel.cu's code for arguments that no kernel takes

# Small cases for trusted_kernels: (tokens of the tile, M, N, K), with a remainder of M, N and K where the kernel may
# get one. All tiles are here but 256 x 64 of wgmma, which is chosen for large layers alone.
CHECKS = {
    "naive": [(0, 3, 20, 7)],
    "small_batch": [(0, 3, 64, 592), (0, 13, 64, 592)],
    "mma": [(32, 33, 160, 400), (64, 40, 160, 400), (128, 100, 160, 400)],
    "wgmma": [(48, 50, 160, 656), (64, 40, 160, 656), (96, 90, 160, 656), (128, 120, 160, 656)],
}
STALE_SECONDS = 120  # a build takes less


class KernelError(RuntimeError):
    """A launch that CUDA refuses, a wrong result, or no kernel to launch."""


def forced_kernel():
    """TERDIT_KERNEL=off|auto|naive|small_batch|mma|wgmma[:TOKENS], for experiments -> name, tokens."""
    name, _, tokens = os.environ.get("TERDIT_KERNEL", "auto").partition(":")
    if name not in (*KERNELS, "off") or not (tokens or "0").isdigit():
        raise ValueError(f"TERDIT_KERNEL={name!r}, expected off, {', '.join(KERNELS)}, perhaps with :TOKENS")
    return name, int(tokens or 0)


def wait_for_build(lock):
    """Wait while another process builds. load() would wait for ever where a build was killed and left its lock."""
    while True:
        try:
            age = time.time() - lock.stat().st_mtime
        except FileNotFoundError:
            return
        if age > STALE_SECONDS:
            raise RuntimeError(f"delete {lock} and start again: a build that was killed seems to have left it")
        time.sleep(0.1)


@lru_cache(maxsize=None)
def cuda_kernel(device):
    """kernel.cu as a ctypes library for `device`, compiled on first use, or None and a warning that names the reason.

    It takes pointers and a stream and includes nothing of torch, whose headers would make the build take a minute.
    """
    try:
        from torch.utils.cpp_extension import load

        major, minor = torch.cuda.get_device_capability(device)
        if major < 8:
            raise RuntimeError(f"this GPU is sm_{major}{minor}, the kernels need sm_80 or later")
        arch = f"{major}{minor}"
        if major == 9:
            arch += "a"  # wgmma exists in sm_90a alone, which torch's own flags leave out
        name = f"terdit_sm_{arch}"
        root = os.environ.get("TORCH_EXTENSIONS_DIR") or os.path.expanduser("~/.cache/terdit")
        folder = os.path.join(root, f"{name}_torch_{torch.__version__}")
        os.makedirs(folder, exist_ok=True)
        wait_for_build(Path(folder, "lock"))
        warnings.warn(f"building kernel.cu for sm_{arch}: once, some seconds", stacklevel=2)
        flags = ["-O3", "-std=c++17", f"-gencode=arch=compute_{arch},code=sm_{arch}"]
        source = Path(__file__).with_name("kernel.cu")
        library = load(name, [str(source)], extra_cuda_cflags=flags, build_directory=folder, is_python_module=False)
        return ctypes.CDLL(library)
    except Exception as e:  # no nvcc, no ninja, a stale lock, a driver that is too old, an edit that does not compile
        announce_once(f"kernel.cu is not used ({first_line(e)}): packed layers {SLOWLY}")
        return None


def check_kernel(library, device, kernel, tokens, M, N, K):
    """Raise KernelError if this kernel and packed_linear_plain (in fp32, on the CPU) differ in a small case.

    The inputs are small integers and alpha is a power of two. So all sums are exact, and the results must be equal.
    """
    random = torch.Generator("cpu").manual_seed(0)  # of its own: the user's random numbers stay as they are

    def integers(low, high, *shape):
        return torch.randint(low, high + 1, shape, generator=random, device="cpu").float()

    x = integers(-2, 2, M, K)
    weight = pack_ternary(integers(-1, 1, N, K))
    alphas = torch.tensor([0.5], dtype=torch.float32, device="cpu")
    bias = integers(-8, 8, N)
    plain = packed_linear_plain(x, weight, alphas, None)
    for dtype in (torch.bfloat16, torch.float16):
        inputs = [x.to(device, dtype), weight.to(device), alphas.to(device)]
        for b, want in ((None, plain), (bias.to(device, dtype), plain + bias)):
            # The allocator hands this memory out again, so an output that the kernel does not write is NaN.
            torch.full((M, N), float("nan"), dtype=dtype, device=device)
            got = launch_kernel(library, *inputs, b, kernel, tokens).cpu()
            if not torch.equal(got, want.to(dtype)):
                error = (got - want).abs().max().item()
                raise KernelError(f"{dtype}: the largest error is {error:g}")


@lru_cache(maxsize=None)
def trusted_kernels(library, device):
    """The names in KERNELS that may be used on this device; a warning says what each other kernel gets wrong.

    A kernel that never ran on such a GPU must not be believed, nor one that was edited. So this runs once in a process
    for each device, before the first packed layer. It should take less than 50 ms, but no one has measured it on a GPU.
    What it cannot notice: a kernel that never ends, or that is wrong only at times or in other sizes.
    """
    trusted = set(KERNELS)
    for kernel, cases in CHECKS.items():
        try:
            for case in cases:
                check_kernel(library, device, kernel, *case)
        except Exception as e:  # a wrong result, a refused launch, an illegal address
            trusted.remove(kernel)
            if kernel == "wgmma" and isinstance(e, ValueError):
                continue  # kernel.cu refuses it on all GPUs but sm_90, and never chooses it there
            trusted.discard("auto")  # kernel.cu might choose the wrong kernel
            what = f"kernel.cu's {kernel} with (tokens, M, N, K) = {case} fails its check on {device}"
            announce_once(f"{what} ({first_line(e)}): it is not used, unless TERDIT_KERNEL names it")
    return trusted


def choose_kernel(library, x, weight):
    """What launch_kernel is to run on x (M, K) and weight (N/4, K) -> kernel, tokens.

    It is what TERDIT_KERNEL names, or "auto", which is kernel.cu's own choice. Where that may be a wrong kernel, it is
    the first trusted one in the order of kernel.cu's choose_kernel.
    """
    kernel, tokens = forced_kernel()
    trusted = trusted_kernels(library, x.device)  # even if a kernel is forced: the user must hear that it is wrong
    if kernel != "auto" or "auto" in trusted:
        return kernel, tokens
    M, K = x.shape
    order = ["wgmma", "mma"]
    if (4 * len(weight)) % 32 or K % 16:
        order = ["naive"]
    elif M <= 16:
        order = ["small_batch", "wgmma", "mma"]
    for name in order:
        if name in trusted:
            return name, tokens
    raise KernelError("kernel.cu: no kernel that passed its check takes this layer")


def as_kernel_input(z):
    """z, copied if it is strided or does not start at a multiple of 16 bytes: the kernels load 16 bytes at a time."""
    if z is None or (z.is_contiguous() and z.data_ptr() % 16 == 0):
        return z
    return z.clone(memory_format=torch.contiguous_format)


def launch_kernel(library, x, weight, alphas, bias, kernel="auto", tokens=0):
    """kernel.cu's ternary_linear: x (M, K) bf16 or fp16, weight (N/4, K) uint8 -> (M, N).

    kernel: auto, naive, small_batch (M <= 16), mma or wgmma; tokens: of a thread block's tile, 0 for the best. The
    pointers are raw, so everything is checked here: ValueError says what was got. KernelError: CUDA refused the launch.
    """
    M, K = x.shape
    N = 4 * len(weight)
    if x.dtype not in (torch.bfloat16, torch.float16) or max(M, N, K) >= 1 << 31:
        raise ValueError(f"kernel.cu takes x of bfloat16 or float16, below 2^31 rows, got {tuple(x.shape)} {x.dtype}")
    for name, z, shape, dtype in (
        ("weight", weight, (N // 4, K), torch.uint8),
        ("alphas", alphas, (1,), torch.float32),
        ("bias", bias, (N,), x.dtype),
    ):
        wanted = [shape, dtype, x.device]
        if z is not None and [tuple(z.shape), z.dtype, z.device] != wanted:
            got = [tuple(z.shape), z.dtype, z.device]
            raise ValueError(f"{name} of {wanted} wanted for x of {tuple(x.shape)}, got {got}")
    if kernel == "auto" and (N % 32 or K % 16):
        announce_once(f"a layer of {N}x{K} fits no tile of kernel.cu (N % 32, K % 16): naive kernel, slow")
    x = as_kernel_input(x)
    weight = as_kernel_input(weight)
    bias = as_kernel_input(bias)
    y = x.new_empty(M, N)
    if M == 0:
        return y
    pointers = [ctypes.c_void_p(None if z is None else z.data_ptr()) for z in (x, weight, alphas, bias, y)]
    stream = ctypes.c_void_p(torch.cuda.current_stream(x.device).cuda_stream if x.is_cuda else None)
    is_bf16 = x.dtype == torch.bfloat16
    with torch.cuda.device(x.device) if x.is_cuda else nullcontext():
        error = library.ternary_linear(*pointers, M, N, K, is_bf16, KERNELS.index(kernel), tokens, stream)
    if error:
        message = f"kernel.cu: error {error} for M={M} N={N} K={K}, kernel {kernel!r}, tokens {tokens}"
        raise ValueError(message) if error == REFUSED else KernelError(message)
    return y


# On a CPU -------------------------------------------------------------------------------------------------------------


def integer_matmul(a, b):
    """a (M, K) int8 times b (K, N) int8 -> (M, N) int32, exact."""
    M, K = a.shape
    fits = K > 1  # with K = 1 it is wrong on a CPU (torch 2.13)
    if a.is_cuda:
        fits = M > 16 and K % 8 == 0 and b.shape[1] % 8 == 0  # what cuBLASLt takes
    if fits and has_int_mm(a.device.type):
        return torch._int_mm(a, b)  # torchao builds on it too
    return (a.float() @ b.float()).to(torch.int32)  # exact as well: |sum| <= 127 K < 2^24 for K up to 132,000


BLOCK_BYTES = 8 << 20  # of unpacked weights, or of their sums in int8


@lru_cache(maxsize=None)
def has_int_mm(kind):
    """Whether torch._int_mm, which has no public name, is there and right on this kind of device."""
    a = torch.arange(-96, 96, dtype=torch.int8).view(24, 8).to(kind)
    b = a.t().contiguous()
    try:
        right = torch.equal(torch._int_mm(a, b).cpu().long(), a.cpu().long() @ b.cpu().long())
    except (AttributeError, RuntimeError):
        right = False
    if not right:
        announce_once(f"torch._int_mm does not work on this {kind}: int8 products run in fp32, slower")
    return right


@lru_cache(maxsize=None)
def cpu_kernel():
    """The CPU part of kernel.cu as a ctypes library, or None and a warning that says why.

    Each process that needs it compiles it, in less than a second. No file is kept.
    """
    # Without -ffp-contract=off, a * b + c would be rounded once, and the results would not be int8_linear_plain's bits.
    flags = "-x c++ -std=c++17 -DCPU -O3 -march=native -ffp-contract=off -fopenmp -shared -fPIC".split()
    source = Path(__file__).with_name("kernel.cu")
    try:
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
            library = f"{folder}/kernel.so"
            command = [*shlex.split(os.environ.get("CXX", "g++")), *flags, str(source), "-o", library]
            subprocess.run(command, check=True, capture_output=True, text=True, errors="replace")
            # glibc returns large freed blocks to the system, and the next layer would fault their pages in again: half
            # of a step's time. Once a block of 31 MB was freed, it keeps blocks up to that size. This one is never
            # written to, so it takes no memory.
            torch.empty(31 << 20, dtype=torch.uint8)
            return ctypes.CDLL(library)
    except Exception as e:  # no compiler, one without OpenMP, a folder from which nothing may be run
        compilers_words = getattr(e, "stderr", None)
        reason = first_line(compilers_words or e)
        announce_once(f"kernel.cu's CPU part is not used ({reason}): packed layers run in plain PyTorch, slower")
        return None


def pointer(z):
    return ctypes.c_void_p(None if z is None else z.data_ptr())


def unpacked_blocks(weight, bytes_per_row):
    """weight (N/4, K) uint8 -> pairs (first row of bytes, its block unpacked: (4 * rows, K) int8 of -1, 0 and 1).

    bytes_per_row is what the caller makes of a row of weights: blocks are of BLOCK_BYTES, so they stay in the cache.
    """
    if weight.dtype != torch.uint8 or weight.device.type != "cpu":  # the C++ works with raw pointers
        raise ValueError(f"weight of uint8 on cpu wanted, got {weight.dtype} on {weight.device}")
    n, K = weight.shape
    block_rows = max(1, min(n, BLOCK_BYTES // (4 * bytes_per_row)))
    for first in range(0, n, block_rows):
        packed = weight[first : first + block_rows].contiguous()
        codes = torch.empty(4 * len(packed), K, dtype=torch.int8)
        cpu_kernel().unpack(pointer(packed), pointer(codes), ctypes.c_long(packed.numel()))
        yield first, codes


def linear_in_blocks(x, weight, alphas, bias):
    """packed_linear_plain with less memory: x (M, K), weight (N/4, K) uint8 -> (M, N)."""
    M, K = x.shape
    n = len(weight)
    y = x.new_empty(M, 4, n)
    for first, codes in unpacked_blocks(weight, bytes_per_row=K * x.element_size()):
        last = first + len(codes) // 4
        w = codes.to(x.dtype)
        b = None if bias is None else bias.view(4, n)[:, first:last].flatten()
        if x.dtype == torch.float32:
            out = F.linear(x, w.mul_(alphas), b)  # exactly what TernaryLinear computes
        elif b is None:
            out = torch.addmm(x.new_empty(len(w)), x, w.t(), beta=0, alpha=alphas.item())
        else:
            out = torch.addmm(b, x, w.t(), alpha=alphas.item())
        y[:, :, first:last] = out.view(M, 4, last - first)
    return y.flatten(1)


def int8_linear(x, weight, alphas, bias):
    """int8_linear_plain to the bit, with kernel.cu's C++ in the place of the passes over memory around the product."""
    library = cpu_kernel()
    M, K = x.shape
    n = len(weight)
    if x.dtype != torch.bfloat16:
        x = x.float()
    x = x.contiguous()
    if bias is not None:
        bias = bias.float().contiguous()
    levels = torch.empty(M, K, dtype=torch.int8)
    scales = torch.empty(M)
    y = torch.empty(M, 4 * n, dtype=torch.bfloat16)
    is_bf16 = x.dtype == torch.bfloat16
    sizes = (ctypes.c_long(M), ctypes.c_long(K))
    if not library.quantize_rows(pointer(x), is_bf16, pointer(levels), pointer(scales), *sizes):
        raise ValueError("activations are not finite: is the checkpoint damaged?")
    alpha = ctypes.c_float(alphas.item())
    for first, codes in unpacked_blocks(weight, bytes_per_row=max(K, 4 * M)):  # a row's codes, or its sums
        sums = integer_matmul(levels, codes.t())  # (M, 4 * rows) int32
        sizes = (ctypes.c_long(M), ctypes.c_long(len(codes) // 4), ctypes.c_long(n), ctypes.c_long(first))
        library.scale_rows(pointer(sums), pointer(scales), alpha, pointer(bias), pointer(y), *sizes)
    return y


# ----------------------------------------------------------------------------------------------------------------------
# 8. Meta's DiT: where Large-DiT and TerDiT came from; a baseline, and a teacher. Skip on first reading
#
# DiT (Peebles & Xie, arXiv 2212.09748) as its files need it: load_model("DiT-XL-2-256x256.pt") is a MetaDiT. It is read
# and run, not trained, so it has no initial values. What it has in common with section 3 is not written again: the
# embedders of timestep and label, the final layer, unpatchify and guidance are the same in both.


@dataclass
class MetaDiTConfig(Config):
    """Config with the sizes of DiT-XL/2 at 256x256. DiT has nothing of multiple_of, norm_eps, qk_norm, pos_embed."""

    dim: int = 1152
    n_layers: int = 28
    n_heads: int = 16
    ternary: bool = False
    adaln_norm: bool = False
    vae: str | None = "stabilityai/sd-vae-ft-mse"  # DiT's files do not name it, but its sample.py decodes with it

    @property
    def cond_dim(self):
        return self.dim

    @property
    def ffn_dim(self):
        return 4 * self.dim


class MetaDiTAttention(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.n_heads = cfg.n_heads
        self.qkv = nn.Linear(cfg.dim, 3 * cfg.dim)
        self.proj = nn.Linear(cfg.dim, cfg.dim)

    def forward(self, x):
        qkv = self.qkv(x).unflatten(-1, (3, self.n_heads, -1))  # (B, T, 3, heads, head_dim)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, heads, T, head_dim) each
        out = softmax_attention(q, k, v)
        return self.proj(out.transpose(1, 2).flatten(-2))  # (B, T, D)


class MetaDiTMLP(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.fc1 = nn.Linear(cfg.dim, cfg.ffn_dim)
        self.fc2 = nn.Linear(cfg.ffn_dim, cfg.dim)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class MetaDiTBlock(nn.Module):
    """TransformerBlock before LLaMA: LayerNorm without gains, GELU for SwiGLU, biases, no rotary positions."""

    def __init__(self, cfg):
        super().__init__()
        self.norm = nn.LayerNorm(cfg.dim, elementwise_affine=False, eps=1e-6)
        self.attn = MetaDiTAttention(cfg)
        self.mlp = MetaDiTMLP(cfg)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(cfg.dim, 6 * cfg.dim))

    def forward(self, x, c):
        modulation = self.adaLN_modulation(c)  # (B, 6 * D)
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = modulation.chunk(6, dim=1)
        x = x + gate_msa.unsqueeze(1) * self.attn(modulate(self.norm(x), shift_msa, scale_msa))
        return x + gate_mlp.unsqueeze(1) * self.mlp(modulate(self.norm(x), shift_mlp, scale_mlp))


class MetaDiT(nn.Module):
    """Meta's DiT of any size; the default MetaDiTConfig is DiT-XL/2 at 256x256. Names are those of its files."""

    unpatchify = DiT.unpatchify
    forward_with_cfg = DiT.forward_with_cfg

    def __init__(self, config):
        super().__init__()
        self.config = cfg = config
        patches = nn.Conv2d(cfg.in_channels, cfg.dim, cfg.patch_size, stride=cfg.patch_size)
        self.x_embedder = nn.ModuleDict({"proj": patches})
        self.t_embedder = TimestepEmbedder(cfg.dim)
        self.y_embedder = LabelEmbedder(cfg.num_classes, cfg.dim)
        self.pos_embed = nn.Parameter(torch.empty(1, cfg.n_tokens, cfg.dim))  # fixed sines of the column and the row
        self.blocks = nn.ModuleList([MetaDiTBlock(cfg) for _ in range(cfg.n_layers)])
        self.final_layer = FinalLayer(cfg, cfg.in_channels * (2 if cfg.learn_sigma else 1))

    @property
    def layers(self):
        return self.blocks

    def forward(self, x, t, y):
        """As DiT.forward. The positions are a table of one size, so x of another size is a ValueError."""
        channels = self.config.in_channels
        size = self.config.input_size
        if x.shape[1:] != (channels, size, size):
            raise ValueError(f"x is {tuple(x.shape)}, expected (B, {channels}, {size}, {size})")
        patches = self.x_embedder["proj"](x.to(self.pos_embed.dtype))  # (B, D, H / p, W / p)
        h = patches.flatten(2).transpose(1, 2) + self.pos_embed  # (B, T, D)
        c = self.t_embedder(t) + self.y_embedder(y)  # (B, D)
        for block in self.blocks:
            h = block(h, c)
        return self.unpatchify(self.final_layer(h, c), size)


def is_meta_dit(state):
    """Whether a state dict is DiT's, which embeds patches by a convolution, where Large-DiT has a linear layer."""
    return "x_embedder.proj.weight" in state


def find_meta_dit(ckpt):
    """The state dict of DiT in the contents of a file, or None. A released file holds it alone; DiT's train.py writes
    {"model", "ema", "opt", "args"}, of which the average is taken."""
    state = ckpt.get("ema", ckpt.get("model", ckpt))
    return state if isinstance(state, dict) and is_meta_dit(state) else None


def meta_dit_sizes(state):
    """Config fields that the shapes in a state dict of DiT tell. The heads are in no shape: in Meta's models they are
    72 wide in XL, and 64 in L, B and S."""
    dim, in_channels, patch_size, _ = state["x_embedder.proj.weight"].shape
    _, n_tokens, _ = state["pos_embed"].shape
    n_outputs = len(state["final_layer.linear.weight"])
    num_classes = len(state["y_embedder.embedding_table.weight"]) - 1  # the last row is the null label
    class_names = None
    if num_classes == 1000:  # the rows are ImageNet's classes in sorted order, so a class's index names it
        class_names = [str(i) for i in range(num_classes)]
    return dict(
        input_size=round(n_tokens**0.5) * patch_size,
        patch_size=patch_size,
        in_channels=in_channels,
        dim=dim,
        n_layers=len({name.split(".")[1] for name in state if name.startswith("blocks.")}),
        n_heads=16 if dim == 1152 else max(1, dim // 64),
        num_classes=num_classes,
        learn_sigma=n_outputs == 2 * in_channels * patch_size**2,
        class_names=class_names,
    )
