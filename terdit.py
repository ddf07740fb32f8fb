"""TerDiT from scratch: a diffusion transformer whose weights are -1, 0 and +1.

The method of *TerDiT: Ternary Diffusion Models with Transformers* (arXiv 2405.14854), in the paper's order:

    1. Config, SIZES                what a model is made of
    2. ternarize, TernaryLinear     ternary weights, and how gradients get past the rounding  (paper 3.1)
    3. DiT                          the transformer, with an RMS Norm after each adaLN        (paper 3.2, figure 3)
    4. GaussianDiffusion            what it is trained on, and how it samples                 (DDPM, DDIM, DPM-Solver++)
    5. pack_ternary, pack_model     four weights in a byte                                    (paper 3.3)
                                    Skip the rest on first reading:
    6. packed_linear, int8_linear   fast products with packed weights: which one is taken where, and those of a CPU
    7. save_checkpoint, load_model  our files, and the released TerDiT and Large-DiT folders
    8. cuda_kernel, launch_kernel   kernel.cu on a GPU

Section numbers of the paper are those of its first version (May 2024), figures and tables those of the second (April
2025). "Upstream" is the TerDiT authors' own code, ADM is OpenAI's guided-diffusion, which DiT took its diffusion from.
Letters in shapes: B images, C channels, H and W height and width, T tokens, D the model's width. A weight matrix (N, K)
multiplies x (M, K), whose M rows are tokens (in adaLN, images). A test runs the examples that start with >>>.
"""

import ctypes
import math
import os
import pickle
import subprocess
import tempfile
import warnings
import zipfile
from argparse import Namespace  # a released folder holds one; no other class may be unpickled
from dataclasses import asdict, dataclass
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
    """All that is needed to rebuild a model and to use its samples. `ternary=False, adaln_norm=False` is Large-DiT, the
    full-precision model that TerDiT quantizes."""

    # The transformer:
    input_size: int = 32  # height = width of what the model sees: latents of a 256x256 image are 32x32
    patch_size: int = 2
    in_channels: int = 4
    dim: int = 1536
    n_layers: int = 16  # transformer blocks
    n_heads: int = 32
    multiple_of: int = 256  # the FFN's width is 8/3 dim, rounded up to a multiple of this
    num_classes: int = 1000  # the null label of classifier-free guidance is num_classes itself
    qk_norm: bool = False
    norm_eps: float = 1e-5
    label_std: float = 0.02  # initial spread of the label embeddings
    pos_embed: bool = False  # add a learned vector to each patch; the paper has rotary positions alone, row by row
    ternary: bool = True
    adaln_norm: bool = True  # the paper's RMS Norm after the adaLN projection
    # What it is trained on:
    class_dropout_prob: float = 0.1
    learn_sigma: bool = True
    prediction: str = "eps"  # "eps" is the paper's; "v" learns large shapes sooner (see GaussianDiffusion)
    # What its samples are:
    class_names: list | None = None
    vae: str | None = None  # None: the model works on pixels in [-1, 1]
    latent_scale: float = 0.18215  # latents are multiplied by it to have a variance of about 1 (SD VAE)

    def __post_init__(self):
        if self.dim % (2 * self.n_heads):
            raise ValueError(f"dim={self.dim} must split into n_heads={self.n_heads} heads of even width")
        if self.input_size % self.patch_size:
            raise ValueError(f"image size {self.input_size} is not a multiple of the patch size {self.patch_size}")
        if self.prediction not in ("eps", "v"):
            raise ValueError(f"prediction={self.prediction!r}, expected 'eps' or 'v'")

    @property
    def cond_dim(self):
        return min(self.dim, 1024)  # width of the conditioning vector; the cap is Large-DiT's

    @property
    def ffn_dim(self):
        hidden = int(2 * 4 * self.dim / 3)
        return math.ceil(hidden / self.multiple_of) * self.multiple_of

    @property
    def n_tokens(self):
        return (self.input_size // self.patch_size) ** 2


_DIGITS = dict(input_size=24, patch_size=4, in_channels=3, multiple_of=64, num_classes=10, learn_sigma=False,
               prediction="v", label_std=0.5, pos_embed=True)  # fmt: skip  # why v: see GaussianDiffusion
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


@torch.no_grad()
def ternarize(weight, gamma=None):
    """Round to -1, 0, +1 by the absmean rule (TerDiT eq. 1, from BitNet b1.58).

    weight (N, K) float -> codes of the same shape and dtype: clip(round(weight / gamma), -1, 1), halves to even, where
    gamma = mean|weight| + eps. So what is smaller than half of gamma becomes 0. No gradient: TernaryWeight has it.

    >>> ternarize(torch.tensor([[0.30, -0.80], [0.05, 0.85]])).tolist()  # gamma = 0.5, its half is 0.25
    [[1.0, -1.0], [0.0, 1.0]]
    >>> ternarize(torch.tensor([[0.20, -0.80], [0.05, 0.85]])).tolist()  # training moved 0.30 to 0.20: its code flips
    [[0.0, -1.0], [0.0, 1.0]]
    """
    buffer = weight.abs()  # first |weight|, then the codes: this runs on every weight at every step
    if gamma is None:
        gamma = buffer.mean() + TERNARY_EPS
    return torch.div(weight, gamma, out=buffer).round_().clamp_(-1, 1)


class TernaryWeight(torch.autograd.Function):
    """weight (N, K), alphas (1,) -> ternarize(weight) * alphas, with a gradient for both.

    Rounding has a derivative of 0 almost everywhere, so nothing could be learned through it. The *straight-through
    estimator* pretends codes = weight. (codes = weight / gamma would be nearer; like upstream we leave gamma out.) Then
    codes * alphas has the gradient `grad * alphas` for weight, and `(grad * codes).sum()` for alphas. So the optimizer
    moves the latent weight in full precision, and its code flips when it has moved far enough.

    >>> weight = torch.tensor([[0.30, -0.80], [0.05, 0.85]], requires_grad=True)  # its codes are 1, -1, 0, 1
    >>> alphas = torch.tensor([2.0], requires_grad=True)
    >>> TernaryWeight.apply(weight, alphas).backward(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
    >>> weight.grad.tolist()  # the gradient times alpha, also where the code is 0
    [[2.0, 4.0], [6.0, 8.0]]
    >>> alphas.grad  # 1 * 1 + 2 * -1 + 3 * 0 + 4 * 1
    tensor([3.])
    """

    @staticmethod
    def forward(ctx, weight, alphas):
        codes = ternarize(weight)
        ctx.save_for_backward(codes.to(torch.int8), alphas)  # kept until the backward pass: one byte a weight
        return codes * alphas

    @staticmethod
    def backward(ctx, grad):
        codes, alphas = ctx.saved_tensors
        grad_weight = grad * alphas
        grad_alphas = (grad * codes).sum().view(1)
        return grad_weight, grad_alphas


class TernaryLinear(nn.Module):
    """A linear layer whose weight is ternary in the forward pass and full precision in the optimizer.

    `weight` (N, K) latent, `alphas` (1,) the one learned scale, `bias` (N,) or None.  x (..., K) -> (..., N)
    "alphas" is upstream's name. It is no subclass of nn.Linear, so that isinstance(m, nn.Linear) finds the layers in
    full precision. Under bf16 autocast F.linear rounds codes * alphas to bf16: so alpha is rounded, codes are exact.
    """

    def __init__(self, in_features, out_features, bias=False):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        nn.init.xavier_uniform_(self.weight)
        self.alphas = nn.Parameter(self.weight.detach().abs().mean().view(1))  # keeps the size of the output
        self.bias = nn.Parameter(torch.zeros(out_features)) if bias else None

    def forward(self, x):
        return F.linear(x, TernaryWeight.apply(self.weight, self.alphas), self.bias)


# ----------------------------------------------------------------------------------------------------------------------
# 3. The model: Large-DiT with ternary linears and a normed adaLN


def modulate(x, shift, scale):
    return x * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)  # x (B, T, D); shift and scale (B, D)


class RMSNorm(nn.RMSNorm):
    """Computes in fp32, its weight's dtype, even if autocast made x bf16: adaLN's output scales whole blocks."""

    def forward(self, x):
        return super().forward(x.to(self.weight.dtype))


class LayerNorm(nn.LayerNorm):  # in fp32, as RMSNorm
    def forward(self, x):
        return super().forward(x.to(self.weight.dtype))


def timestep_embedding(t, dim=256, max_period=10000):
    """Sinusoids of t (B,), fractions allowed -> (B, dim): the cosines, then the sines (ADM's order)."""
    half = dim // 2
    exponents = -math.log(max_period) * torch.arange(half, dtype=torch.float32, device=t.device) / half
    angles = t[:, None].float() * exponents.double().exp().float()  # fp64, or else machines differ in the last bit
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class TimestepEmbedder(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(256, dim), nn.SiLU(), nn.Linear(dim, dim))

    def forward(self, t):
        return self.mlp(timestep_embedding(t).to(self.mlp[0].weight.dtype))


class LabelEmbedder(nn.Module):
    """One row a class, and a last row, number num_classes, for "no class": the null label of guidance. Labels are
    dropped where batches are drawn (train.py's draw_batch), not here as in DiT."""

    def __init__(self, num_classes, dim):
        super().__init__()
        # nn.Embedding(n, dim) calls normal_, which on the meta device imports torch's compiler: 100 MB, a second.
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
    def __init__(self, config, linear):
        super().__init__()
        self.n_heads = config.n_heads
        self.wq = linear(config.dim, config.dim, bias=False)
        self.wk = linear(config.dim, config.dim, bias=False)
        self.wv = linear(config.dim, config.dim, bias=False)
        self.wo = linear(config.dim, config.dim, bias=False)
        # Over all D channels, before they are split into heads and rotated (Large-DiT).
        self.q_norm = LayerNorm(config.dim, eps=config.norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = LayerNorm(config.dim, eps=config.norm_eps) if config.qk_norm else nn.Identity()

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
        # Written out for training, where SDPA's bf16 backward pass takes 13 times as long as two matmuls.
        scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5  # (B, heads, T, T)
        return scores.softmax(-1).to(v.dtype) @ v  # autocast computes a softmax in fp32
    return F.scaled_dot_product_attention(q, k, v)


class FeedForward(nn.Module):
    """SwiGLU: w2(silu(w1 x) * w3 x)."""

    def __init__(self, config, linear):
        super().__init__()
        self.w1 = linear(config.dim, config.ffn_dim, bias=False)
        self.w2 = linear(config.ffn_dim, config.dim, bias=False)
        self.w3 = linear(config.dim, config.ffn_dim, bias=False)

    def forward(self, x):
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class TransformerBlock(nn.Module):
    """Attention and SwiGLU, each shifted, scaled and gated by the timestep and the label (adaLN).

    A ternary weight is 0 or +-alpha. Where alpha is large (upstream draws its start from N(0, 1)), the adaLN projection
    puts out large values, and a few codes that flip change them a lot. The paper's cure is one RMS Norm over the six
    vectors together. It divides alpha out, but for the bias, which is small (paper 3.2, figures 3 and 4).

    The norm's gain starts at 0, so every block starts as the identity (adaLN-Zero). DiT starts the projection's weights
    at 0 instead. Ternary weights must not: Adam's first update is about +-lr for each of them, so all |W| would then be
    about gamma = mean|W|, however small lr is. Most codes would jump to +-1 at once, and the gates would open fully.

    >>> outputs = torch.tensor([3.0, -4.0])  # of an adaLN projection; an alpha 100 times as large changes nothing
    >>> F.rms_norm(outputs, (2,)), F.rms_norm(100 * outputs, (2,))
    (tensor([ 0.8485, -1.1314]), tensor([ 0.8485, -1.1314]))
    """

    def __init__(self, config, linear):
        super().__init__()
        self.attention = Attention(config, linear)
        self.feed_forward = FeedForward(config, linear)
        self.attention_norm = RMSNorm(config.dim, eps=config.norm_eps)
        self.ffn_norm = RMSNorm(config.dim, eps=config.norm_eps)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), linear(config.cond_dim, 6 * config.dim, bias=True))
        if config.adaln_norm:
            self.adaLN_modulation.append(RMSNorm(6 * config.dim, eps=config.norm_eps))

    def forward(self, x, c, freqs_cis):
        """x (B, T, D) tokens, c (B, cond_dim) timestep and label, freqs_cis from rotary_table -> (B, T, D)"""
        modulation = self.adaLN_modulation(c)  # (B, 6 * D)
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = modulation.chunk(6, dim=1)
        attended = self.attention(modulate(self.attention_norm(x), shift_msa, scale_msa), freqs_cis)
        x = x + gate_msa.unsqueeze(1) * attended
        fed = self.feed_forward(modulate(self.ffn_norm(x), shift_mlp, scale_mlp))
        return x + gate_mlp.unsqueeze(1) * fed


class FinalLayer(nn.Module):
    """Full precision, because an error here goes straight into the image (paper 3.1). So are the embeddings of patches,
    timestep and label: every block reads what they put out, and 2 bits would save little (1% of 600M's weights).
    Norms, biases and alphas are vectors or single numbers: there is nothing to save."""

    def __init__(self, config):
        super().__init__()
        out_channels = config.in_channels * (2 if config.learn_sigma else 1)
        self.norm_final = nn.LayerNorm(config.dim, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(config.dim, config.patch_size**2 * out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(config.cond_dim, 2 * config.dim))

    def forward(self, x, c):
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=1)
        return self.linear(modulate(self.norm_final(x), shift, scale))


class DiT(nn.Module):
    """The diffusion transformer. Parameter names are upstream's, so released checkpoints load. packed=True builds the
    inference model, at 2 bits a weight. Embeddings, norms and final layer stay in full precision: see FinalLayer."""

    def __init__(self, config, packed=False):
        super().__init__()
        self.config = config
        if packed:
            linear = PackedTernaryLinear
        elif config.ternary:
            linear = TernaryLinear
        else:
            linear = nn.Linear
        self.x_embedder = nn.Linear(config.patch_size**2 * config.in_channels, config.dim)
        self.t_embedder = TimestepEmbedder(config.cond_dim)
        self.y_embedder = LabelEmbedder(config.num_classes, config.cond_dim)
        self.pos_embed = nn.Parameter(torch.empty(config.n_tokens, config.dim)) if config.pos_embed else None
        self.layers = nn.ModuleList([TransformerBlock(config, linear) for _ in range(config.n_layers)])
        self.final_layer = FinalLayer(config)
        if not (packed or self.x_embedder.weight.is_meta):
            self.init_weights()

    def init_weights(self):
        """The start of training: Large-DiT's, but for the RMS Norm's gain of 0 (see TransformerBlock), and alphas of
        mean|W| (see TernaryLinear; upstream draws them from N(0, 1))."""
        config = self.config
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
            if getattr(module, "bias", None) is not None:
                nn.init.zeros_(module.bias)
        for linear in (self.t_embedder.mlp[0], self.t_embedder.mlp[2]):
            nn.init.normal_(linear.weight, std=0.02)
        nn.init.normal_(self.y_embedder.embedding_table.weight, std=config.label_std)
        if config.pos_embed:
            nn.init.normal_(self.pos_embed, std=0.5)
        for block in self.layers:
            if config.adaln_norm:
                nn.init.zeros_(block.adaLN_modulation[2].weight)
            elif not config.ternary:  # ternary weights do not start at 0: see TransformerBlock
                nn.init.zeros_(block.adaLN_modulation[1].weight)
        for linear in (self.final_layer.adaLN_modulation[1], self.final_layer.linear):
            nn.init.zeros_(linear.weight)

    def patchify(self, x):
        p = self.config.patch_size
        x = x.unflatten(3, (-1, p)).unflatten(2, (-1, p))  # (B, C, H/p, p, W/p, p)
        return x.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)  # (B, T, C * p * p)

    def unpatchify(self, x, height):
        p = self.config.patch_size
        # Within a patch the order is (p, p, C) here and (C, p, p) in patchify, for no reason but history: DiT embeds
        # patches by a convolution, whose weights are (C, p, p), and wrote unpatchify by itself. Checkpoints rely on it.
        x = x.unflatten(2, (p, p, -1)).unflatten(1, (height // p, -1))  # (B, H/p, W/p, p, p, C)
        return x.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)  # (B, C, H, W)

    def forward(self, x, t, y):
        """Predict the noise (or v) in x.

        x (B, C, H, W) noisy images or latents; t (B,) in 0..999, fractions allowed; y (B,) classes or the null label.
        -> (B, 2C, H, W): prediction, then the sigma channels; (B, C, H, W) if not learn_sigma.
        """
        dtype = self.x_embedder.weight.dtype  # the residual stream keeps it, under autocast too
        h = self.x_embedder(self.patchify(x).to(dtype)).to(dtype)  # (B, T, D)
        if self.pos_embed is not None:
            h = h + self.pos_embed
        c = self.t_embedder(t) + self.y_embedder(y)  # (B, cond_dim)
        freqs_cis = rotary_table(h.shape[1], self.config.dim // self.config.n_heads, x.device)
        for block in self.layers:
            h = block(h, c, freqs_cis)
        return self.unpatchify(self.final_layer(h, c), x.shape[2])

    def forward_with_cfg(self, x, t, y, cfg_scale, guided_channels=None):
        """Classifier-free guidance, with upstream's arguments.

        x (B, C, H, W): the same images twice; the second half is not looked at, as upstream. y (B,): the classes, then
        as many null labels. -> (B, 2C or C, H, W): guided channels are the same in both halves, others (sigma) are not
        guided. None guides all C (also more than C); upstream's 3 leaves a latent channel out (DiT issue 41: a slip).
        """
        out = self(x[: len(x) // 2].repeat(2, 1, 1, 1), t, y)
        channels = self.config.in_channels
        n_guided = channels if guided_channels is None else min(guided_channels, channels)
        cond, uncond = out[:, :n_guided].chunk(2)
        guided = uncond + cfg_scale * (cond - uncond)
        return torch.cat([torch.cat([guided, guided]), out[:, n_guided:]], dim=1)


# ----------------------------------------------------------------------------------------------------------------------
# 4. Diffusion


class GaussianDiffusion:
    """The noise process q(x_t | x_0), the training loss, and the samplers: 1000 linear betas of 1e-4..0.02 (DDPM).

    Fewer `steps` are for sampling: a shorter process, which keeps the alphas_cumprod (acp) of some timesteps;
    timestep_map[i] is the original timestep of its step i. Tables are float64.

    prediction: what the model's first C channels mean. "eps" is the noise, the paper's choice. "v" is sqrt(acp) eps -
    sqrt(1 - acp) x0 (Salimans & Ho 2022). An image's layout is decided where x is nearly pure noise. There v is nearly
    -x0, while eps is nearly x, which can be learned without any layout. It changes the target of the loss, how x0 is
    read (predict_x0), and the timesteps that train.py draws.
    """

    def __init__(self, steps=1000, prediction="eps"):
        betas = np.linspace(1e-4, 0.02, 1000, dtype=np.float64)
        alphas_cumprod = np.cumprod(1 - betas)
        self.timestep_map = np.array(spaced_timesteps(steps))
        if steps < 1000:
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
        """sqrt(acp) a - sqrt(1 - acp) b. So v = v_rotation(eps, t, x0), and x0 = v_rotation(x, t, v)."""
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

    def training_losses(self, model, x0, t, y, noise, teacher=None):
        """Loss of model(x_t, timestep, y) for x0 (B, C, H, W), t (B,) int64, y (B,) -> dict of (B,) tensors.

        `mse` is the paper's simple loss; `vb`, in bits a dimension, teaches the sigma channels alone (Improved DDPM
        3.1): it is noisy and would disturb the prediction, which gets no gradient of it. `loss` is the sum.
        With a teacher, another model of the same outputs, `distill` is the mean square between both models' outputs,
        sigma channels included. It is no part of `loss`: train.py's train_step adds it.
        """
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

    def predict_at(self, model_fn, x, i, clip_denoised):
        """p_mean_variance of model_fn(x, t) at x (B, C, H, W) and step i, where t (B,) is a timestep of 0..999."""
        step = torch.full((len(x),), i, device=x.device)
        out = model_fn(x, torch.full_like(step, int(self.timestep_map[i])))
        return self.p_mean_variance(out, x, step, clip_denoised)

    @torch.no_grad()
    def p_sample_loop(self, model_fn, noise, clip_denoised=False, noise_fn=torch.randn_like):
        """DDPM's ancestral sampling (algorithm 2). noise (B, C, H, W) is x_T. -> x_0"""
        x = noise
        for i in reversed(range(self.num_timesteps)):
            p = self.predict_at(model_fn, x, i, clip_denoised)
            z = noise_fn(x)  # drawn at the last step too, where it is not used: as many draws as steps
            x = p["mean"]
            if i > 0:
                x = x + (0.5 * p["log_variance"]).exp() * z
        return x

    @torch.no_grad()
    def ddim_sample_loop(self, model_fn, noise, clip_denoised=False):
        """DDIM with eta = 0 (eq. 12): deterministic, so sigma channels are ignored. Arguments as in p_sample_loop."""
        x = noise
        for i in reversed(range(self.num_timesteps)):
            x0 = self.predict_at(model_fn, x, i, clip_denoised)["pred_xstart"]
            # The noise that x0 implies: where x0 was clipped, it is not what the model said.
            eps = (x - self.sqrt_alphas_cumprod[i] * x0) / self.sqrt_one_minus_alphas_cumprod[i]
            acp_prev = self.alphas_cumprod_prev[i]
            x = np.sqrt(acp_prev) * x0 + np.sqrt(1 - acp_prev) * eps
        return x

    @torch.no_grad()
    def dpm_sample_loop(self, model_fn, noise, clip_denoised=False):
        """DPM-Solver++(2M) (arXiv 2211.01095, algorithm 2): second order, so it needs fewer steps. Deterministic.

        Arguments as in p_sample_loop; sigma channels are ignored. With lambda = log(sqrt(acp) / sqrt(1 - acp)), a step
        extrapolates x0 from the last two predictions to the middle of its own h = its change of lambda: half of h, in
        units of the step before. Two steps use one prediction alone (first order): the first one, which has no other,
        and the one from step 1 to step 0, where lambda jumps too far to extrapolate.
        A first-order step from acp = 0.5 to 0.8, where x = 0.707 x0 + 0.707 eps becomes 0.894 x0 + 0.447 eps:

        >>> h = 0.5 * math.log(0.8 / 0.2) - 0.5 * math.log(0.5 / 0.5)  # lambda rises by 0.693
        >>> f"x becomes {math.sqrt(0.2 / 0.5):.3f} x + {-math.sqrt(0.8) * math.expm1(-h):.3f} x0"
        'x becomes 0.632 x + 0.447 x0'
        """
        half_log_snr = 0.5 * np.log(self.alphas_cumprod / (1 - self.alphas_cumprod))  # lambda
        x = noise
        previous_x0 = None
        for i in reversed(range(self.num_timesteps)):
            x0 = self.predict_at(model_fn, x, i, clip_denoised)["pred_xstart"]
            if i == 0:
                return x0
            h = half_log_snr[i - 1] - half_log_snr[i]
            direction = x0
            if previous_x0 is not None and i > 1:
                previous_h = half_log_snr[i] - half_log_snr[i + 1]
                direction = x0 + (x0 - previous_x0) * (0.5 * h / previous_h)
            shrink = self.sqrt_one_minus_alphas_cumprod[i - 1] / self.sqrt_one_minus_alphas_cumprod[i]
            x = shrink * x - self.sqrt_alphas_cumprod[i - 1] * np.expm1(-h) * direction
            previous_x0 = x0


def extract(table, t):
    """table[t] as fp32 (B, 1, 1, 1), to go with images (B, C, H, W)."""
    return torch.from_numpy(table).to(t.device)[t].float().view(-1, 1, 1, 1)


def spaced_timesteps(steps):
    """The timesteps that a shorter process keeps, evenly from 0 to 999 (ADM). ValueError: not 1 to 1000 steps."""
    if not 1 <= steps <= 1000:
        raise ValueError(f"{steps} steps, expected 1 to 1000")
    if steps == 1:
        return [999]  # one step starts from pure noise (ADM would keep timestep 0, a nearly clean image)
    strides = np.full(steps - 1, 999 / (steps - 1))
    return [round(position) for position in np.cumsum(np.append(0.0, strides))]  # i * stride may round otherwise


def gaussian_kl(mean1, logvar1, mean2, logvar2):
    """KL divergence between two Gaussians, in nats."""
    return 0.5 * (-1 + logvar2 - logvar1 + (logvar1 - logvar2).exp() + (mean1 - mean2) ** 2 * (-logvar2).exp())


def discretized_gaussian_nll(x, mean, log_scale):
    """-log of the mass that a Gaussian puts on x's own bin of width 2/255 (DDPM section 3.3)."""

    def normal_cdf(z):  # ADM's approximation
        return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))

    inv_std = (-log_scale).exp()
    below_upper_edge = normal_cdf(inv_std * (x - mean + 1 / 255))
    below_lower_edge = normal_cdf(inv_std * (x - mean - 1 / 255))
    mass = below_upper_edge - below_lower_edge
    mass = torch.where(x > 0.999, 1 - below_lower_edge, mass)  # the brightest bin reaches to infinity
    mass = torch.where(x < -0.999, below_upper_edge, mass)  # and the darkest to minus infinity
    return -mass.clamp(min=1e-12).log()


# ----------------------------------------------------------------------------------------------------------------------
# 5. Packing: four weights in a byte


def pack_ternary(codes):
    """codes (N, K) in {-1, 0, 1}, any dtype -> (N/4, K) uint8, in upstream's byte layout.

    Rows are taken in quarters: with n = N/4, byte [r, c] holds the weights of rows r, n+r, 2n+r and 3n+r, high bits
    first, each as weight + 1:    bits 7-6: row r | 5-4: row n+r | 3-2: row 2n+r | 1-0: row 3n+r

    >>> packed = pack_ternary(torch.tensor([[1], [0], [-1], [1]]))  # N = 4, K = 1: the fields are 2, 1, 0, 2
    >>> f"{packed.item():08b}"
    '10010010'
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
    """Raise ValueError if packed (N/4, K) is not uint8, or if a 2-bit field holds 3, which stands for no weight."""
    if packed.dtype != torch.uint8:
        raise ValueError(f"{name}: packed weights are uint8, got {packed.dtype}")
    if bool((packed & (packed >> 1) & 0b01010101).any()):  # where both bits of a field are 1
        raise ValueError(f"{name}: holds code 3, but packed ternary weights use 0, 1 and 2: the bytes are damaged")


def packed_linear_plain(x, weight, alphas, bias):
    """x (..., K), weight (N/4, K) uint8, alphas (1,), bias (N,) or None -> (..., N): unpack, scale, multiply."""
    bias = None if bias is None else bias.to(x.dtype)
    return F.linear(x, unpack_ternary(weight).to(x.dtype) * alphas.to(x.dtype), bias)


class PackedTernaryLinear(nn.Module):
    """TernaryLinear for inference, at 2 bits a weight: x (..., K) -> (..., N).

    `weight` (N/4, K) uint8 as in pack_ternary, `alphas` (1,), `bias` (N,) or None. packed_linear computes what
    packed_linear_plain does, but faster. in_dtype sets product_dtype and is_adaln.
    """

    product_dtype = torch.float32
    is_adaln = False

    def __init__(self, in_features, out_features, bias=False):
        super().__init__()
        self.register_buffer("weight", torch.zeros(out_features // 4, in_features, dtype=torch.uint8))
        self.alphas = nn.Parameter(torch.ones(1))
        self.bias = nn.Parameter(torch.zeros(out_features)) if bias else None

    def forward(self, x):
        rows = x.reshape(-1, x.shape[-1])  # (M, K)
        if torch.is_grad_enabled() and (x.requires_grad or self.alphas.requires_grad):
            y = packed_linear_plain(rows, self.weight, self.alphas, self.bias)  # only the plain form has a gradient
        else:
            y = packed_linear(rows, self.weight, self.alphas, self.bias, self.product_dtype, self.is_adaln)
        return y.unflatten(0, x.shape[:-1])


@torch.no_grad()
def pack_model(model):
    """A DiT of TernaryLinear layers -> a new DiT of PackedTernaryLinear layers, in eval mode on the same device.

    ValueError: a weight is not finite. In fp32 the outputs agree to 1e-5 (small_rows adds in another order).
    """
    with torch.device("meta"):
        packed = DiT(model.config, packed=True)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    for name, module in model.named_modules():
        if isinstance(module, TernaryLinear):
            state[f"{name}.weight"] = pack_ternary(ternarize(module.weight))  # NaN is no code, so it is refused
    packed.load_state_dict(state, assign=True)
    return packed.eval().requires_grad_(False)


# ----------------------------------------------------------------------------------------------------------------------
# 6. Fast products with packed weights: skip on first reading

SMALL_ROWS = 8  # up to so many rows of x, reading the weights takes most of the time


def packed_linear(x, weight, alphas, bias, dtype, is_adaln=False):
    """x (M, K) times a packed weight in the fastest way -> (M, N). The first line that fits is taken:

        device  rows M          dtype   product
        GPU     any             bf16    launch_kernel: small_batch up to 16 rows, then wgmma (Hopper) or mma  -> bf16
        CPU     up to 8; adaLN  any     small_rows: reads the packed bytes once, x is not rounded             -> fp32
        any     any             int8    int8_linear: x is rounded, the sums are exact                         -> bf16
        any     any             others  packed_linear_plain, which unpacks at every call                      -> dtype

    Without nvcc the first line never fits, without g++ the second; a warning says so once. Without g++ int8_linear is
    int8_linear_plain. Where x or alphas need a gradient, PackedTernaryLinear takes packed_linear_plain instead.
    """
    if x.shape[1] != weight.shape[1]:
        raise ValueError(f"x of (M, {weight.shape[1]}) wanted, got {tuple(x.shape)}")
    x = x.contiguous()  # C++ gets bare addresses
    weight = weight.contiguous()
    if x.is_cuda and dtype == torch.bfloat16 and cuda_kernel(x.device):
        bias = None if bias is None else bias.to(dtype)
        return launch_kernel(cuda_kernel(x.device), x.to(dtype), weight, alphas, bias)
    if x.device.type == "cpu" and (is_adaln or len(x) <= SMALL_ROWS) and cpu_kernel():
        return small_rows(x, weight, alphas, bias)
    if dtype == torch.int8:
        return int8_linear(x, weight, alphas, bias)
    return packed_linear_plain(x.to(dtype), weight, alphas, bias)


def in_dtype(model, dtype):
    """Set the dtype of the products with packed weights: fp32, bf16 or int8. -> the model

    Embeddings, norms, residual stream and final layer stay in fp32. adaLN's projections would cause most of int8's
    error, because they steer whole blocks: with int8 they are in fp32, and on a CPU they take small_rows whatever the
    dtype. A model in full precision is put in dtype as a whole.
    """
    if not model.config.ternary:
        if dtype == torch.int8:
            raise ValueError("int8 is for ternary weights, this checkpoint is in full precision")
        return model.to(dtype)
    for name, module in model.named_modules():
        if isinstance(module, PackedTernaryLinear):
            module.is_adaln = "adaLN_modulation" in name
            module.product_dtype = torch.float32 if module.is_adaln and dtype == torch.int8 else dtype
    return model


def int8_linear_plain(x, weight, alphas, bias):
    """packed_linear_plain with activations in int8 (W1.58A8): x (M, K) fp32 or bf16 -> (M, N) bf16.

    Each row of x is rounded to 255 levels between -max|x| and max|x|. A ternary weight is exact in int8, so the sums
    are exact, and nearly all of the work runs at int8's rate. ValueError if x is not finite.
    """
    x = x.float()
    greatest = x.abs().amax(1, keepdim=True).clamp(min=1e-30)  # (M, 1)
    if not bool(greatest.isfinite().all()):
        raise ValueError("activations are not finite: is the checkpoint damaged?")
    levels = (x * (torch.full_like(greatest, 127) / greatest)).round()  # halves to even
    # torch._int_mm has no public name, but torchao builds on it too.
    sums = torch._int_mm(levels.to(torch.int8), unpack_ternary(weight).t())  # (M, N) int32
    y = sums.float() * (greatest / 127 * alphas.float())
    if bias is not None:
        y = y + bias.float()
    return y.to(torch.bfloat16)


def int8_linear(x, weight, alphas, bias):
    """int8_linear_plain to the bit, with kernel.cu's C++ in the place of the passes over memory around the product."""
    if x.is_cuda or not cpu_kernel():
        return int8_linear_plain(x, weight, alphas, bias)
    M, K = x.shape
    N = 4 * len(weight)
    if x.dtype != torch.bfloat16:
        x = x.float()
    levels = torch.empty(M, K, dtype=torch.int8)
    scales = torch.empty(M)
    codes = torch.empty(N, K, dtype=torch.int8)
    y = torch.empty(M, N, dtype=torch.bfloat16)
    if not call_cpu("quantize_rows", x, x.dtype == torch.bfloat16, levels, scales, M, K):
        return int8_linear_plain(x, weight, alphas, bias)  # x is not finite, and this says so
    call_cpu("unpack", weight, codes, weight.numel())
    chunk = max(1, (1 << 22) // N)  # 16 MB of sums: malloc keeps blocks of this size for the next layer
    for first in range(0, M, chunk):
        rows = slice(first, first + chunk)
        sums = torch._int_mm(levels[rows], codes.t())  # (rows, N) int32
        call_cpu("scale_rows", sums, scales[rows], alphas.float().view(1), bias, y[rows], len(sums), N)
    return y


def small_rows(x, weight, alphas, bias):
    """packed_linear_plain in fp32 for few rows, on a CPU: kernel.cu's loop over the packed bytes. x (M, K) -> (M, N)"""
    y = torch.empty(len(x), 4 * len(weight))
    call_cpu("small_rows", x.float(), weight, alphas.float().view(1), bias, y, *x.shape, len(weight))
    return y


def call_cpu(function, *arguments):
    """Call a function of kernel.cu's CPU part. It gets the addresses of tensors: contiguous, alphas and bias fp32."""
    addresses = [z.data_ptr() if isinstance(z, torch.Tensor) else z for z in arguments]
    return getattr(cpu_kernel(), function)(*addresses)


@lru_cache(maxsize=None)
def cpu_kernel():
    """The CPU part of kernel.cu as a ctypes library, or None and a warning that says why. Each process that needs it
    compiles it, in less than a second; no file is kept."""
    # Without -ffp-contract=off, a * b + c would be rounded once, and the results would not be int8_linear_plain's bits.
    flags = "-x c++ -std=c++17 -DCPU -O3 -march=native -ffp-contract=off -fopenmp -shared -fPIC".split()
    try:
        with tempfile.TemporaryDirectory() as folder:
            source = Path(__file__).with_name("kernel.cu")
            command = [os.environ.get("CXX", "g++"), *flags, str(source), "-o", f"{folder}/kernel.so"]
            subprocess.run(command, check=True, capture_output=True, text=True, errors="replace")
            library = ctypes.CDLL(f"{folder}/kernel.so")
    except Exception as e:  # no compiler, one without OpenMP, a folder from which nothing may be run
        reason = first_line(getattr(e, "stderr", None) or e)
        warnings.warn(f"kernel.cu's CPU part is not used ({reason}): packed layers run in plain PyTorch, slower")
        return None
    address = ctypes.c_void_p
    size = ctypes.c_long
    library.small_rows.argtypes = [address, address, address, address, address, size, size, size]
    library.quantize_rows.argtypes = [address, ctypes.c_int, address, address, size, size]
    library.unpack.argtypes = [address, address, size]
    library.scale_rows.argtypes = [address, address, address, address, address, size, size]
    # glibc gives large freed blocks back to the system, and getting them anew takes half of a step's time. Once one of
    # 31 MB was freed, it keeps later ones. This one is never touched, so it costs no memory.
    torch.empty(31 << 20, dtype=torch.uint8)
    return library


def first_line(e):
    """What an exception says, in one line; its type where it says nothing."""
    text = str(e).strip()
    return text.splitlines()[0][:200] if text else type(e).__name__


# ----------------------------------------------------------------------------------------------------------------------
# 7. Checkpoints: skip on first reading

FORMAT = "terdit-1"


def atomic_write(path, write):
    """write(file) into a file beside `path`, then rename it: a crash or a full disk leaves the old file whole."""
    tmp_path = Path(f"{path}.tmp")
    try:
        with open(tmp_path, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(tmp_path, path)
    except (RuntimeError, OSError) as e:  # torch.save raises a RuntimeError when the disk is full
        raise OSError(f"{path}: cannot be written; is the disk full? ({first_line(e)})") from None
    finally:
        tmp_path.unlink(missing_ok=True)


def save_checkpoint(path, model):
    """Write a DiT, packed or in full precision, with its Config. load_model reads it back."""
    state = {name: value.cpu() for name, value in model.state_dict().items()}
    ckpt = dict(format=FORMAT, config=asdict(model.config), model=state)
    atomic_write(path, lambda file: torch.save(ckpt, file))


def read_checkpoint(path, expected, mmap=False):
    """torch.load that runs no code (weights_only) and compares the zip's CRCs. `expected` names what it should be.

    mmap leaves the tensors in the file until they are used: for what may be larger than memory. ValueError, OSError.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; expected {expected}")
    try:
        with zipfile.ZipFile(path) as archive:
            # torch.save compresses nothing. What is compressed could fill the memory when it is unpacked.
            if any(member.compress_type != zipfile.ZIP_STORED for member in archive.infolist()):
                raise ValueError("its parts are compressed")
            damaged = archive.testzip()  # torch.load compares no checksum: it would take flipped bits for weights
            if damaged:
                raise ValueError(f"its part {damaged} has changed since it was written")
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except Exception as e:  # a damaged file raises almost anything
        reason = first_line(e)
        if isinstance(e, pickle.UnpicklingError):  # torch's words advise weights_only=False, which would run its code
            reason = "it holds more than tensors, and may be hostile"
        raise ValueError(f"{path}: not {expected}, or damaged ({reason})") from None


def released_config(state, args):
    """Config fields of a released TerDiT or Large-DiT, from its tensors' shapes and its argparse.Namespace."""
    patch_size = 2  # every released model's name ends in _patch2
    dim, patch_dim = state["x_embedder.weight"].shape
    num_classes = len(state["y_embedder.embedding_table.weight"]) - 1
    is_ternary = "layers.0.attention.wq.alphas" in state
    class_names = [str(i) for i in range(num_classes)]
    if is_ternary:
        # TerDiT's rows follow its class_to_idx.json, the indices in order as strings: 0, 1, 10, 100, 101, ... So 207 is
        # row 121. Large-DiT's rows are ImageNet's indices themselves: 207 is row 207.
        class_names.sort()
    return dict(
        input_size=args.image_size // 8,
        patch_size=patch_size,
        in_channels=patch_dim // patch_size**2,
        dim=dim,
        n_layers=1 + max(int(name.split(".")[1]) for name in state if name.startswith("layers.")),
        n_heads=32,
        multiple_of=state["layers.0.feed_forward.w2.weight"].shape[1],  # not stored; this rounds up to itself
        num_classes=num_classes,
        learn_sigma=len(state["final_layer.linear.weight"]) == 2 * patch_dim,
        qk_norm="layers.0.attention.q_norm.weight" in state,
        ternary=is_ternary,
        adaln_norm="layers.0.adaLN_modulation.2.weight" in state,
        vae=f"stabilityai/sd-vae-ft-{args.vae}",
        class_names=class_names,
    )


def read_released(folder):
    """A released TerDiT or Large-DiT folder -> Config fields, state dict."""
    weights = folder / "consolidated_ema_ternary.00-of-01.pth"
    if not weights.is_file():
        weights = folder / "consolidated_ema.00-of-01.pth"
    with torch.serialization.safe_globals([Namespace]):
        args = read_checkpoint(folder / "model_args.pth", "packed.pt of a run folder, or a released folder's arguments")
    state = read_checkpoint(weights, "a released model's weights")
    return released_config(state, args), state


def load_model(path, device="cpu", dtype=torch.float32, **overrides):
    """Load a model for inference, with its `.config`: a file of save_checkpoint, or a released folder.

    dtype: see in_dtype. `overrides` replace Config fields. Released models do not say n_heads, so 32 is taken: a wrong
    one that splits the width goes unnoticed and draws nonsense. ValueError and OSError name the file.
    """
    path = Path(path)
    try:
        if path.is_dir():
            config_fields, state = read_released(path)
        else:
            expected = f"a checkpoint of this project (format {FORMAT!r})"
            ckpt = read_checkpoint(path, expected)
            if not isinstance(ckpt, dict) or ckpt.get("format") != FORMAT:
                raise ValueError(f"{path}: not {expected}, but a foreign file, a {type(ckpt).__name__}")
            config_fields = ckpt["config"]
            state = ckpt["model"]
        config = Config(**config_fields | overrides)
        with torch.device("meta"):
            model = DiT(config, packed=config.ternary)
        packed = {name for name, buffer in model.named_buffers()}
        for name, value in state.items():
            if name in packed:
                check_packed(value, f"{path}: {name}")
            else:
                state[name] = value.float()
        model.load_state_dict(state, assign=True)
    except (LookupError, TypeError, AttributeError, RuntimeError) as e:
        reason = " ".join(f"{type(e).__name__}: {e}".split())[:300]
        raise ValueError(f"{path}: not the weights of a TerDiT or Large-DiT ({reason})") from None
    return in_dtype(model.eval().requires_grad_(False), dtype).to(device)


# ----------------------------------------------------------------------------------------------------------------------
# 8. kernel.cu on a GPU: skip on first reading

KERNELS = ("auto", "naive", "small_batch", "mma", "wgmma")  # in the order of kernel.cu's enum

# (kernel, tokens of its tile, M, N, K) for check_kernels: every tile, with remainders where it may get some.
CHECKS = (("naive", 0, 3, 20, 7), ("small_batch", 0, 3, 64, 592), ("small_batch", 0, 13, 64, 592),
          ("mma", 32, 33, 160, 336), ("mma", 64, 70, 160, 336), ("mma", 128, 130, 160, 336),
          ("wgmma", 64, 70, 160, 752), ("wgmma", 128, 130, 288, 752))  # fmt: skip


@lru_cache(maxsize=None)
def cuda_kernel(device):
    """kernel.cu as a ctypes library for `device`, compiled on first use and checked, or None and a warning. It includes
    nothing of torch, whose headers would make the build take a minute, so it takes pointers and a stream."""
    try:
        from torch.utils.cpp_extension import load

        major, minor = torch.cuda.get_device_capability(device)
        arch = f"{major}{minor}"
        if major == 9:
            arch += "a"  # wgmma exists in sm_90a alone, which torch's own flags leave out
        flags = ["-O3", "-std=c++17", f"-gencode=arch=compute_{arch},code=sm_{arch}"]
        source = str(Path(__file__).with_name("kernel.cu"))
        library = ctypes.CDLL(load(f"terdit_sm_{arch}", [source], extra_cuda_cflags=flags, is_python_module=False))
        check_kernels(library, device)
        return library
    except Exception as e:  # no nvcc, no ninja, a driver that is too old, an edit that does not compile or is wrong
        warnings.warn(f"kernel.cu is not used ({first_line(e)}): packed layers run in plain PyTorch, slower")
        return None


def check_kernels(library, device):
    """Raise RuntimeError if a kernel that this GPU can run differs from packed_linear_plain in a small case.

    A kernel that never ran on such a GPU must not be believed, nor one that was edited. Small integers and an alpha of
    1/2 make all sums exact, so the results must be equal. A kernel that is wrong in other sizes goes unnoticed.
    """
    random = torch.Generator().manual_seed(0)  # of its own: the user's random numbers stay as they are
    for kernel, tokens, M, N, K in CHECKS:
        if kernel == "wgmma" and device.type == "cuda" and torch.cuda.get_device_capability(device)[0] != 9:
            continue
        x = torch.randint(-2, 3, (M, K), generator=random).bfloat16()
        weight = pack_ternary(torch.randint(-1, 2, (N, K), generator=random))
        alphas = torch.tensor([0.5])
        bias = torch.randint(-8, 9, (N,), generator=random).bfloat16()
        want = packed_linear_plain(x.float(), weight, alphas, bias).bfloat16()
        got = launch_kernel(library, *[z.to(device) for z in (x, weight, alphas, bias)], kernel, tokens).cpu()
        if not torch.equal(got, want):
            raise RuntimeError(f"kernel {kernel!r} is wrong for tokens={tokens}, M={M}, N={N}, K={K}")


def launch_kernel(library, x, weight, alphas, bias, kernel="auto", tokens=0):
    """kernel.cu's ternary_linear: x (M, K) bf16, weight (N/4, K) uint8, alphas (1,) fp32, bias (N,) bf16 -> (M, N).

    All are contiguous, on one GPU. For experiments: kernel is one of KERNELS, tokens those of a thread block's tile, 0
    for the best. RuntimeError: CUDA refused the launch, or kernel.cu the sizes.
    """
    M, K = x.shape
    N = 4 * len(weight)
    if kernel == "auto" and (N % 32 or K % 16):
        warnings.warn(f"a layer of {N}x{K} fits no tile of kernel.cu (N % 32, K % 16): naive kernel, slow")
    y = x.new_empty(M, N)
    dtypes = [None if z is None else z.dtype for z in (x, weight, alphas, bias)]
    wanted = [torch.bfloat16, torch.uint8, torch.float32, None if bias is None else torch.bfloat16]
    if dtypes != wanted or weight.shape[1] != K or alphas.numel() != 1:
        raise ValueError(f"x, weight, one alpha, bias: wanted {wanted}, K={weight.shape[1]}, got {dtypes}, K={K}")
    pointers = [ctypes.c_void_p(None if z is None else z.data_ptr()) for z in (x, weight, alphas, bias, y)]
    stream = ctypes.c_void_p(torch.cuda.current_stream(x.device).cuda_stream if x.is_cuda else None)
    with torch.cuda.device(x.get_device()):  # -1, for the CPU, changes nothing
        error = library.ternary_linear(*pointers, M, N, K, KERNELS.index(kernel), tokens, stream)
    if error:  # a cudaError_t, or -1 for what this kernel does not take
        raise RuntimeError(f"kernel.cu: error {error} for kernel {kernel!r}, tokens {tokens}, M={M} N={N} K={K}")
    return y
