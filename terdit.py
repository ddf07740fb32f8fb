"""TerDiT from scratch: a diffusion transformer whose weights are -1, 0 and +1.

The method of *TerDiT: Ternary Diffusion Models with Transformers* (arXiv 2405.14854):

    1. Config, SIZES                what a model is made of
    2. ternarize, TernaryLinear     ternary weights, and their gradient       (paper 3.1)
    3. DiT                          the transformer, an RMS Norm after adaLN  (paper 3.2)
    4. GaussianDiffusion            what it learns, and how it samples        (DDPM, DDIM)
    5. pack_ternary, pack_model     four weights in a byte                    (paper 3.3)
                                    Skip the rest on first reading:
    6. packed_linear                fast products with packed weights, CPU and GPU
    7. save_checkpoint, load_model  our files, and released folders

"Paper 3.1" is a section of the paper's first version, "figure 3" one of its second. "Upstream" is
the authors' own code, ADM is OpenAI's guided-diffusion. Letters in shapes: B images, C channels,
H and W height and width, T tokens, D the model's width. A weight (N, K) maps x (M, K) to (M, N):
M tokens (in adaLN, images), K inputs, N outputs. A test runs the examples after >>>.
"""

import ctypes
import errno
import math
import os
import pickle
import secrets
import shlex
import subprocess
import tempfile
import warnings
import zipfile
from argparse import Namespace  # the one class that may be unpickled
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

# --------------------------------------------------------------------------------------------------
# 1. What a model is made of


@dataclass
class Config:
    """All that is needed to rebuild a model and to use its samples.

    `ternary=False, adaln_norm=False` is Large-DiT, the full-precision model that TerDiT quantizes.
    ValueError: no model can have these values.
    """

    # The transformer:
    size: str | None = None  # its name in SIZES; released models have none
    input_size: int = 32  # height = width: latents of a 256x256 image are 32x32
    patch_size: int = 2
    in_channels: int = 4
    dim: int = 1536
    n_layers: int = 16
    n_heads: int = 32
    multiple_of: int = 256  # see ffn_dim
    num_classes: int = 1000  # num_classes itself is the null label of guidance
    qk_norm: bool = False
    norm_eps: float = 1e-5
    pos_embed: bool = False  # a learned vector a patch, besides rotary_table, which all have
    ternary: bool = True
    adaln_norm: bool = True  # the paper's RMS Norm after the adaLN projection
    # How it is trained:
    label_std: float = 0.02  # initial spread of the label embeddings
    alpha_start: str = "absmean"  # mean|W|; "random" draws from N(0, 1)
    class_dropout_prob: float = 0.1
    learn_sigma: bool = True
    prediction: str = "eps"  # the paper's; "v" learns large shapes sooner
    # What its samples are:
    class_names: list | None = None
    vae: str | None = None  # None: pixels in [-1, 1]
    latent_scale: float = 0.18215  # of SD's VAE; encode multiplies by it, decode divides

    def __post_init__(self):
        if self.n_heads < 1 or self.dim % (2 * self.n_heads):
            raise ValueError(f"dim={self.dim} must split into n_heads={self.n_heads} even heads")
        if self.input_size % self.patch_size:
            patches = f"a multiple of the patch size {self.patch_size}"
            raise ValueError(f"image size {self.input_size} is not {patches}")
        if self.prediction not in ("eps", "v"):
            raise ValueError(f"prediction={self.prediction!r}, expected 'eps' or 'v'")
        if self.alpha_start not in ("absmean", "random"):
            raise ValueError(f"alpha_start={self.alpha_start!r}, expected 'absmean' or 'random'")

    @property
    def cond_dim(self):
        return min(self.dim, 1024)  # the cap is Large-DiT's

    @property
    def ffn_dim(self):
        """8/3 dim: SwiGLU's three matrices then have as many weights as a GELU MLP's two of 4 dim.
        Llama rounds it up to a multiple of multiple_of."""
        hidden = int(8 * self.dim / 3)
        return math.ceil(hidden / self.multiple_of) * self.multiple_of

    @property
    def n_tokens(self):
        return (self.input_size // self.patch_size) ** 2


_DIGITS = dict(
    input_size=24,
    patch_size=4,
    in_channels=3,
    multiple_of=64,
    num_classes=10,
    learn_sigma=False,  # the loss is the MSE alone
    prediction="v",
    label_std=0.5,
    pos_embed=True,
)
SIZES = {
    "tiny": dict(**_DIGITS, dim=192, n_layers=4, n_heads=6),  # 2.7M ternary weights
    "small": dict(**_DIGITS, dim=256, n_layers=6, n_heads=8),  # 7.2M
    "S": dict(dim=384, n_layers=12, n_heads=6),  # 31.9M
    "B": dict(dim=768, n_layers=12, n_heads=12),  # 127.4M
    "600M": dict(dim=1536, n_layers=16, n_heads=32),  # 604M
    "4.2B": dict(dim=3072, n_layers=32, n_heads=32),  # 4.2B
}

# --------------------------------------------------------------------------------------------------
# 2. Ternary weights

TERNARY_EPS = 1e-6  # upstream's; against division by zero


@torch.no_grad()
def ternarize(weight, gamma=None):
    """Round to -1, 0, +1 by the absmean rule (TerDiT eq. 1, from BitNet b1.58).

    weight (N, K) float -> codes, same shape and dtype: clip(round(weight / gamma), -1, 1), where
    gamma = mean|weight| + eps. So a weight with |weight| < gamma / 2 becomes 0: a quarter of them
    at the start, where weights are uniform. If gamma were max|weight|, one large weight would make
    most others 0. gamma decides which weights become 0; the size of the output is up to alphas.
    Like upstream and BitNet we take one gamma for the matrix; one for each row was not tried. Pass
    gamma if `weight` is only a part of the matrix. TernaryWeight adds the gradient.

    >>> ternarize(torch.tensor([[0.30, -0.80], [0.05, 0.85]])).tolist()  # gamma is 0.5
    [[1.0, -1.0], [0.0, 1.0]]
    >>> ternarize(torch.tensor([[0.20, -0.80], [0.05, 0.85]])).tolist()  # 0.30 has become 0.20
    [[0.0, -1.0], [0.0, 1.0]]
    """
    if gamma is None:
        gamma = weight.abs().mean() + TERNARY_EPS
    return (weight / gamma).round().clamp(-1, 1)


class TernaryWeight(torch.autograd.Function):
    """weight (N, K), alphas (1,) -> ternarize(weight) * alphas, with a gradient for both.

    Rounding has a derivative of 0 almost everywhere, so nothing could be learned through it. The
    *straight-through estimator* pretends codes = weight, also where they are clipped. So codes *
    alphas has the gradient `grad * alphas` for weight, and `(grad * codes).sum()` for alphas. The
    optimizer moves the latent weight in full precision, and its code flips when it has moved far
    enough. Latent weights are not clipped: only weight / gamma counts. An alpha may become
    negative.

    (Between the clips a code rises by 1 when its weight rises by gamma, so 1 / gamma would be a
    truer slope than 1. We use 1, as upstream: Adam's steps hardly depend on such a factor.)

    >>> weight = torch.tensor([[0.30, -0.80], [0.05, 0.85]], requires_grad=True)
    >>> alphas = torch.tensor([2.0], requires_grad=True)
    >>> grad = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    >>> TernaryWeight.apply(weight, alphas).backward(grad)
    >>> weight.grad.tolist()  # grad times alpha, also where the code is 0
    [[2.0, 4.0], [6.0, 8.0]]
    >>> alphas.grad  # the codes are 1, -1, 0, 1: 1 * 1 + 2 * -1 + 3 * 0 + 4 * 1
    tensor([3.])
    """

    @staticmethod
    def forward(ctx, weight, alphas):
        codes = ternarize(weight)
        ctx.save_for_backward(codes.to(torch.int8), alphas)  # one byte a weight
        return codes * alphas

    @staticmethod
    def backward(ctx, grad):
        codes, alphas = ctx.saved_tensors
        grad_weight = grad * alphas
        grad_alphas = (grad * codes).sum().view(1)
        return grad_weight, grad_alphas


class TernaryLinear(nn.Module):
    """A linear layer, x (..., K) -> (..., N), ternary in the forward pass.

    `weight` (N, K) latent, ternarized anew in each forward pass; `bias` (N,) or None (only adaLN's
    has one); `alphas` (1,) the one scale, upstream's name. It is learned, where BitNet takes
    mean|W|: so latent weights may decay without a smaller output. One scale an output gained
    nothing in 1,500 steps (tests/RESULTS.md); all users of alphas take one. x is not quantized (for
    sampling it may be: int8_linear_plain). Autocast casts codes * alphas to bf16. That rounds
    alpha; the codes stay exact.
    """

    def __init__(self, in_features, out_features, bias=False):
        super().__init__()
        if out_features % 4:
            raise ValueError(f"{out_features} outputs: a packed layer needs a multiple of 4")
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        nn.init.xavier_uniform_(self.weight)
        # With mean|W| outputs are 0.75 as large as those of the uniform weights. Alphas of N(0, 1)
        # are 15 times larger in the demo, and the picture drowns in the residual stream
        # (tests/RESULTS.md).
        self.alphas = nn.Parameter(self.weight.detach().abs().mean().view(1))
        self.bias = nn.Parameter(torch.zeros(out_features)) if bias else None

    def forward(self, x):
        return F.linear(x, TernaryWeight.apply(self.weight, self.alphas), self.bias)


# --------------------------------------------------------------------------------------------------
# 3. The model: Large-DiT with ternary linears and a normed adaLN


def modulate(x, shift, scale):
    """x (B, T, D), shift and scale (B, D) -> (B, T, D)"""
    return x * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


class RMSNorm(nn.RMSNorm):
    """Computes in its weight's dtype (fp32 in training), even where autocast made x bf16."""

    def forward(self, x):
        return super().forward(x.to(self.weight.dtype))


class LayerNorm(nn.LayerNorm):
    """In fp32, as RMSNorm."""

    def forward(self, x):
        return super().forward(x.to(self.weight.dtype))


def timestep_embedding(t, dim=256, max_period=10000):
    """t (B,), fractions allowed -> (B, dim) fp32: cosines, then sines."""
    half = dim // 2
    exponents = -math.log(max_period) * torch.arange(half, dtype=torch.float32, device=t.device)
    # exp in fp64: in fp32 its last bit differs between machines.
    frequencies = (exponents / half).double().exp().float()
    angles = t[:, None].float() * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class TimestepEmbedder(nn.Module):
    """t (B,) -> (B, dim)"""

    def __init__(self, dim):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(256, dim), nn.SiLU(), nn.Linear(dim, dim))

    def forward(self, t):
        return self.mlp(timestep_embedding(t).to(self.mlp[0].weight.dtype))


class LabelEmbedder(nn.Module):
    """y (B,) int64 -> (B, dim). The last vector, number num_classes, is the null label: "no class".
    One label in ten becomes it in train.py's draw_batch, not here as in DiT."""

    def __init__(self, num_classes, dim):
        super().__init__()
        # On the meta device, nn.Embedding(n, dim) takes a second: it imports torch's compiler.
        table = torch.empty(num_classes + 1, dim)
        self.embedding_table = nn.Embedding.from_pretrained(table, freeze=False)

    def forward(self, y):
        return self.embedding_table(y)


def rotary_table(n_tokens, head_dim, device=None, theta=10000.0):
    """-> exp(i * angle) (T, head_dim / 2) complex64. Tokens are numbered line by line, as one
    reads. The angle is this number times the frequency of the channel pair."""
    pairs = torch.arange(0, head_dim, 2, dtype=torch.float32, device=device)
    frequencies = 1.0 / theta ** (pairs / head_dim)
    tokens = torch.arange(n_tokens, dtype=torch.float32, device=device)
    angles = torch.outer(tokens, frequencies)
    return torch.polar(torch.ones_like(angles), angles)


def rotate(x, freqs_cis):
    """Turn each pair (2i, 2i+1) of x (B, heads, T, head_dim) by its angle, in fp32 (RoFormer)."""
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))  # (B, heads, T, head_dim / 2)
    return torch.view_as_real(pairs * freqs_cis).flatten(-2).to(x.dtype)


class Attention(nn.Module):
    """x (B, T, D), freqs_cis from rotary_table -> (B, T, D)"""

    def __init__(self, config, linear):
        super().__init__()
        self.n_heads = config.n_heads
        self.wq = linear(config.dim, config.dim, bias=False)
        self.wk = linear(config.dim, config.dim, bias=False)
        self.wv = linear(config.dim, config.dim, bias=False)
        self.wo = linear(config.dim, config.dim, bias=False)
        # Over all D channels, before heads and rotation (Large-DiT).
        self.q_norm = nn.Identity()
        self.k_norm = nn.Identity()
        if config.qk_norm:
            self.q_norm = LayerNorm(config.dim, eps=config.norm_eps)
            self.k_norm = LayerNorm(config.dim, eps=config.norm_eps)

    def split_heads(self, x):
        return x.unflatten(-1, (self.n_heads, -1)).transpose(1, 2)  # (B, heads, T, head_dim)

    def forward(self, x, freqs_cis):
        x = cast_once(x, self.wq)
        q = rotate(self.split_heads(self.q_norm(self.wq(x))), freqs_cis)
        k = rotate(self.split_heads(self.k_norm(self.wk(x))), freqs_cis)
        v = self.split_heads(self.wv(x))
        out = softmax_attention(q.to(v.dtype), k.to(v.dtype), v)  # (B, heads, T, head_dim)
        return self.wo(out.transpose(1, 2).flatten(-2))  # (B, T, D)


def cast_once(x, linear):
    """x in bf16, if packed layers like `linear` multiply in it: else each would cast x anew."""
    if getattr(linear, "product_dtype", None) == torch.bfloat16:
        return x.to(torch.bfloat16)
    return x


def softmax_attention(q, k, v):
    """softmax(q k^T / sqrt(head_dim)) v, each (B, heads, T, head_dim)."""
    if q.device.type == "cpu" and torch.is_grad_enabled():
        # For training: SDPA's bf16 backward pass takes 13 times as long.
        scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5  # (B, heads, T, T)
        return scores.softmax(-1).to(v.dtype) @ v  # autocast: softmax in fp32
    return F.scaled_dot_product_attention(q, k, v)


class FeedForward(nn.Module):
    """SwiGLU: w2(silu(w1 x) * w3 x), x (..., D)."""

    def __init__(self, config, linear):
        super().__init__()
        self.w1 = linear(config.dim, config.ffn_dim, bias=False)
        self.w2 = linear(config.ffn_dim, config.dim, bias=False)
        self.w3 = linear(config.dim, config.ffn_dim, bias=False)

    def forward(self, x):
        x = cast_once(x, self.w1)
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class TransformerBlock(nn.Module):
    """Attention and SwiGLU, each shifted, scaled and gated by the timestep and the label (adaLN).

    Where alpha is large, adaLN's projection outputs large values, and a few flipped codes change
    them a lot. The paper's cure is one RMS Norm over all six vectors together. It divides by their
    size, so alpha has hardly any effect (paper 3.2, figures 3 and 4).

    >>> outputs = torch.tensor([3.0, -4.0])  # of an adaLN projection
    >>> F.rms_norm(outputs, (2,)), F.rms_norm(100 * outputs, (2,))  # a large alpha changes nothing
    (tensor([ 0.8485, -1.1314]), tensor([ 0.8485, -1.1314]))

    The norm's gain starts at 0. So all six vectors are 0, the gates are closed, and every block
    starts as the identity (adaLN-Zero). They open slowly. Step 1: only the final linear gets a
    gradient, since it starts at 0, too. Step 2: in the blocks only the gates' gain. Step 3: all.

    DiT and upstream start the projection's weights at 0 instead. (If the gain were 0, too, neither
    of the two would ever get a gradient.) That is bad for ternary weights. After Adam's first step
    the gates' weights all have about the same size, and mean|W| is no larger. So every code of them
    is +-1, and the gates go from shut to wide open in one step.

    >>> weight = torch.zeros(1, 3) + 0.0001 * torch.tensor([[1.0, -1.0, -1.0]])  # lr = 0.0001
    >>> ternarize(weight).tolist()
    [[1.0, -1.0, -1.0]]
    """

    def __init__(self, config, linear):
        super().__init__()
        self.attention = Attention(config, linear)
        self.feed_forward = FeedForward(config, linear)
        self.attention_norm = RMSNorm(config.dim, eps=config.norm_eps)
        self.ffn_norm = RMSNorm(config.dim, eps=config.norm_eps)
        projection = linear(config.cond_dim, 6 * config.dim, bias=True)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), projection)
        if config.adaln_norm:
            self.adaLN_modulation.append(RMSNorm(6 * config.dim, eps=config.norm_eps))

    def forward(self, x, c, freqs_cis):
        """x (B, T, D) tokens, c (B, cond_dim) timestep and label -> (B, T, D)"""
        modulation = self.adaLN_modulation(c)  # (B, 6 * D)
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = modulation.chunk(6, dim=1)
        attended = self.attention(modulate(self.attention_norm(x), shift_msa, scale_msa), freqs_cis)
        x = x + gate_msa.unsqueeze(1) * attended
        fed = self.feed_forward(modulate(self.ffn_norm(x), shift_mlp, scale_mlp))
        return x + gate_mlp.unsqueeze(1) * fed


class FinalLayer(nn.Module):
    """x (B, T, D), c (B, cond_dim) -> (B, T, p * p * output channels), in full precision.

    An error here goes straight into the image (paper 3.1). The embeddings are in full precision
    too: every block reads their outputs. Of 600M's weights all this is 1%, of its file 13%."""

    def __init__(self, config):
        super().__init__()
        out_channels = config.in_channels * (2 if config.learn_sigma else 1)
        self.norm_final = nn.LayerNorm(config.dim, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(config.dim, config.patch_size**2 * out_channels)
        self.adaLN_modulation = nn.Sequential(
            nn.SiLU(), nn.Linear(config.cond_dim, 2 * config.dim)
        )

    def forward(self, x, c):
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=1)
        return self.linear(modulate(self.norm_final(x), shift, scale))


class DiT(nn.Module):
    """The diffusion transformer. Parameters have upstream's names, so released checkpoints load.
    packed=True builds the inference model, at 2 bits a weight."""

    def __init__(self, config, packed=False):
        super().__init__()
        self.config = config
        if packed:
            linear = PackedTernaryLinear
        elif config.ternary:
            linear = TernaryLinear
        else:
            linear = nn.Linear
        # What is no TransformerBlock is in full precision: see FinalLayer.
        self.x_embedder = nn.Linear(config.patch_size**2 * config.in_channels, config.dim)
        self.t_embedder = TimestepEmbedder(config.cond_dim)
        self.y_embedder = LabelEmbedder(config.num_classes, config.cond_dim)
        self.pos_embed = None
        if config.pos_embed:
            self.pos_embed = nn.Parameter(torch.empty(config.n_tokens, config.dim))
        # (To keep a block in full precision, give it nn.Linear.)
        blocks = [TransformerBlock(config, linear) for _ in range(config.n_layers)]
        self.layers = nn.ModuleList(blocks)
        self.final_layer = FinalLayer(config)
        if not (packed or self.x_embedder.weight.is_meta):
            self.init_weights()

    def init_weights(self):
        """The start of training: Large-DiT's, except for the norm's gain of 0 (TransformerBlock)
        and alphas of mean|W| (upstream draws them: alpha_start="random")."""
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
            elif not config.ternary:  # see TransformerBlock
                nn.init.zeros_(block.adaLN_modulation[1].weight)
        nn.init.zeros_(self.final_layer.adaLN_modulation[1].weight)
        nn.init.zeros_(self.final_layer.linear.weight)
        if config.alpha_start == "random":  # last, so that all else starts as with absmean
            for name, p in self.named_parameters():
                if name.endswith("alphas"):
                    nn.init.normal_(p)

    def patchify(self, x):
        p = self.config.patch_size
        x = x.unflatten(3, (-1, p)).unflatten(2, (-1, p))  # (B, C, H/p, p, W/p, p)
        return x.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)  # (B, T, C * p * p)

    def unpatchify(self, x, height):
        # The final layer's outputs are (p, p, C), x_embedder's inputs (C, p, p), as those of DiT's
        # convolution. Checkpoints rely on both.
        p = self.config.patch_size
        x = x.unflatten(2, (p, p, -1)).unflatten(1, (height // p, -1))  # (B, H/p, W/p, p, p, C)
        return x.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)  # (B, C, H, W)

    def forward(self, x, t, y):
        """Predict the noise (or v) in x.

        x (B, C, H, W) float; t (B,) from 0 to NUM_TIMESTEPS - 1, fractions allowed; y (B,) int64.
        -> (B, 2C, H, W): prediction, then sigma channels; (B, C, H, W) if not learn_sigma.
        """
        dtype = self.x_embedder.weight.dtype  # autocast returns bf16; the residual stream is fp32
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

        x (B, C, H, W) holds every image twice; only the first half is used. y (B,): classes, then
        as many null labels. -> (B, 2C or C, H, W): both halves hold the same guided prediction;
        other channels are as the model gave them. guided_channels=None guides all C channels.
        Upstream guides 3 of a latent's 4, by mistake (DiT issue 41): the last stays conditional.
        """
        out = self(x[: len(x) // 2].repeat(2, 1, 1, 1), t, y)
        channels = self.config.in_channels
        n_guided = channels if guided_channels is None else min(guided_channels, channels)
        cond, uncond = out[:, :n_guided].chunk(2)
        guided = uncond + cfg_scale * (cond - uncond)
        return torch.cat([torch.cat([guided, guided]), out[:, n_guided:]], dim=1)


# --------------------------------------------------------------------------------------------------
# 4. Diffusion

NUM_TIMESTEPS = 1000


class GaussianDiffusion:
    """The noise process q(x_t | x_0), the training loss, and the samplers (DDPM).

    Betas rise from 1e-4 to 0.02 in equal steps; alphas_cumprod (acp) is the product of 1 - beta.
    With fewer `steps`, for sampling, some timesteps are kept, with their acp; timestep_map[i] is
    the original timestep of step i. Tables are float64. ValueError: steps are not 1 to
    NUM_TIMESTEPS.

    prediction: what the model's first C channels mean: "eps", the noise, as in the paper, or "v"
    (see v_rotation). Where t is large, x_t is nearly eps, so a model of eps has a small loss if it
    copies its input, and learns little of layout. v is nearly -x0 then, the picture itself.
    train.py draws other timesteps for v.
    """

    def __init__(self, steps=NUM_TIMESTEPS, prediction="eps"):
        betas = np.linspace(1e-4, 0.02, NUM_TIMESTEPS, dtype=np.float64)
        alphas_cumprod = np.cumprod(1 - betas)
        self.timestep_map = np.array(spaced_timesteps(steps))
        if steps < NUM_TIMESTEPS:
            kept = alphas_cumprod[self.timestep_map]
            betas = 1 - kept / np.append(1.0, kept[:-1])
            alphas_cumprod = np.cumprod(1 - betas)
        alphas_cumprod_prev = np.append(1.0, alphas_cumprod[:-1])
        self.prediction = prediction
        self.num_timesteps = len(betas)
        self.betas = betas
        self.alphas_cumprod = alphas_cumprod
        self.alphas_cumprod_prev = alphas_cumprod_prev  # of t - 1
        # x_t from x0 and eps (eq. 4, see q_sample)
        self.sqrt_alphas_cumprod = np.sqrt(alphas_cumprod)
        self.sqrt_one_minus_alphas_cumprod = np.sqrt(1 - alphas_cumprod)
        # x0 from x_t and eps (eq. 4 solved for x0)
        self.sqrt_recip_alphas_cumprod = np.sqrt(1 / alphas_cumprod)
        self.sqrt_recipm1_alphas_cumprod = np.sqrt(1 / alphas_cumprod - 1)
        # The variance of q(x_{t-1} | x_t, x0), beta~ (eq. 7)
        self.posterior_variance = betas * (1 - alphas_cumprod_prev) / (1 - alphas_cumprod)
        # log 0 is -inf: t = 0 takes the value of t = 1.
        clipped = self.posterior_variance.copy()
        clipped[0] = clipped[1] if steps > 1 else betas[0]
        self.posterior_log_variance_clipped = np.log(clipped)
        # Its mean is coef1 x0 + coef2 x_t (eq. 7).
        self.posterior_mean_coef1 = betas * np.sqrt(alphas_cumprod_prev) / (1 - alphas_cumprod)
        coef2_numerator = (1 - alphas_cumprod_prev) * np.sqrt(1 - betas)
        self.posterior_mean_coef2 = coef2_numerator / (1 - alphas_cumprod)

    def q_sample(self, x0, t, noise):
        """Noise x0 (B, C, H, W) to timestep t (B,): x_t = sqrt(acp) x0 + sqrt(1 - acp) noise."""
        signal = extract(self.sqrt_alphas_cumprod, t) * x0
        return signal + extract(self.sqrt_one_minus_alphas_cumprod, t) * noise

    def v_rotation(self, a, t, b):
        """sqrt(acp) a - sqrt(1 - acp) b (B, C, H, W). It makes v, and undoes it (Salimans & Ho):

        v  = sqrt(acp) eps - sqrt(1 - acp) x0
        x0 = sqrt(acp) x_t - sqrt(1 - acp) v
        """
        kept = extract(self.sqrt_alphas_cumprod, t) * a
        return kept - extract(self.sqrt_one_minus_alphas_cumprod, t) * b

    def q_posterior(self, x0, x, t):
        """Mean coef1 x0 + coef2 x_t (B, C, H, W) and log variance (B, 1, 1, 1) of
        q(x_{t-1} | x_t, x0) (eq. 6)."""
        coef1 = extract(self.posterior_mean_coef1, t)
        coef2 = extract(self.posterior_mean_coef2, t)
        return coef1 * x0 + coef2 * x, extract(self.posterior_log_variance_clipped, t)

    def predict_x0(self, pred, x, t):
        """The x0 that the model's prediction at x implies, each (B, C, H, W)."""
        if self.prediction == "v":
            return self.v_rotation(x, t, pred)
        scaled = extract(self.sqrt_recip_alphas_cumprod, t) * x
        return scaled - extract(self.sqrt_recipm1_alphas_cumprod, t) * pred

    def p_mean_variance(self, model_out, x, t, clip_denoised=False):
        """Read the model's output (B, 2C or C, H, W) at x (B, C, H, W), t (B,).

        -> dict of mean and log_variance of p(x_{t-1} | x_t), and pred_xstart. A sigma channel of -1
        gives the posterior's log variance, +1 gives log(beta) (Improved DDPM eq. 15). Without them,
        as in the demo, it is the posterior's.
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
        return dict(mean=mean, log_variance=log_variance.expand_as(x), pred_xstart=x0)

    def training_losses(self, model, x0, t, y, noise):
        """Loss of model(x_t, timestep, y) for x0 (B, C, H, W), t (B,) int64, y (B,) int64.

        -> dict of (B,) tensors: `mse`, the mean of (noise - prediction)^2, DDPM's simple loss (eq.
        14), or of (v - prediction)^2; with sigma channels (not in the demo) also `vb`, the
        variational bound in bits a dimension; `loss`, the sum. (Improved DDPM takes 0.001 of the
        sum over 1000 timesteps: one mean.) The gradient of vb is noisy, so it trains the sigma
        channels alone: the prediction is detached (Improved DDPM 3.1).
        """
        x = self.q_sample(x0, t, noise)
        timesteps = torch.from_numpy(self.timestep_map).to(t.device)[t]
        out = model(x, timesteps, y).float()
        n_channels = x0.shape[1]
        pred = out[:, :n_channels]
        target = self.v_rotation(noise, t, x0) if self.prediction == "v" else noise
        mse = ((target - pred) ** 2).flatten(1).mean(1)
        if out.shape[1] == n_channels:
            return dict(loss=mse, mse=mse)
        out_for_vb = torch.cat([pred.detach(), out[:, n_channels:]], dim=1)
        p = self.p_mean_variance(out_for_vb, x, t)
        true_mean, true_log_variance = self.q_posterior(x0, x, t)
        kl = gaussian_kl(true_mean, true_log_variance, p["mean"], p["log_variance"])
        nll = discretized_gaussian_nll(x0, p["mean"], 0.5 * p["log_variance"])
        vb = torch.where(t == 0, nll.flatten(1).mean(1), kl.flatten(1).mean(1)) / math.log(2)
        return dict(loss=mse + vb, mse=mse, vb=vb)

    def predict_at(self, model_fn, x, i, clip_denoised):
        """p_mean_variance of model_fn(x, t) at x (B, C, H, W) and step i of num_timesteps."""
        step = torch.full((len(x),), i, device=x.device)
        out = model_fn(x, torch.full_like(step, int(self.timestep_map[i])))
        return self.p_mean_variance(out, x, step, clip_denoised)

    @torch.no_grad()
    def p_sample_loop(self, model_fn, noise, clip_denoised=False, noise_fn=torch.randn_like):
        """DDPM's algorithm 2: model_fn(x, t (B,)) -> prediction, noise (B, C, H, W) -> x0.

        noise_fn(x) -> noise for each step: also the last one, which does not use it.
        """
        x = noise
        for i in reversed(range(self.num_timesteps)):
            p = self.predict_at(model_fn, x, i, clip_denoised)
            z = noise_fn(x)
            x = p["mean"]
            if i > 0:
                x = x + (0.5 * p["log_variance"]).exp() * z
        return x

    def ddim_sample_loop(self, model_fn, noise, clip_denoised=False):
        """DDIM with eta = 0 (eq. 12): dpm_sample_loop of first order."""
        return self.dpm_sample_loop(model_fn, noise, clip_denoised, order=1)

    @torch.no_grad()
    def dpm_sample_loop(self, model_fn, noise, clip_denoised=False, order=2):
        """DPM-Solver++(2M) (arXiv 2211.01095, algorithm 2); order=1 is DDIM. Arguments as in
        p_sample_loop. It adds no noise, so sigma channels are ignored.

        Let sigma = sqrt(1 - acp) and lambda = log(sqrt(acp) / sigma), half the log of the
        signal-to-noise ratio. A step goes from lambda to lambda + h. First order keeps x0 constant
        on the way. All else is exact, so few steps suffice:

            x_next = (sigma_next / sigma) * x - sqrt(acp_next) * (exp(-h) - 1) * x0

        From acp = 0.5, where x = 0.707 x0 + 0.707 eps, to 0.8, where x = 0.894 x0 + 0.447 eps:

        >>> h = 0.5 * math.log(0.8 / 0.2) - 0.5 * math.log(0.5 / 0.5)
        >>> f"{math.sqrt(0.2 / 0.5):.3f} x + {-math.sqrt(0.8) * math.expm1(-h):.3f} x0"
        '0.632 x + 0.447 x0'

        Second order takes the x0 in the middle of the step, at lambda + h / 2, from the straight
        line through the last two predictions. The first step has one prediction alone, and in the
        step to i = 0, where acp jumps to almost 1, h is too large: both are of first order. Steps
        are even in t, not in lambda: ADM's spacing, for all samplers.
        """
        sigma = self.sqrt_one_minus_alphas_cumprod
        lambdas = 0.5 * np.log(self.alphas_cumprod / (1 - self.alphas_cumprod))
        x = noise
        previous_x0 = None
        for i in reversed(range(self.num_timesteps)):
            x0 = self.predict_at(model_fn, x, i, clip_denoised)["pred_xstart"]
            if i == 0:
                return x0
            h = lambdas[i - 1] - lambdas[i]
            middle_x0 = x0
            if order == 2 and previous_x0 is not None and i > 1:
                slope = (x0 - previous_x0) / previous_h
                middle_x0 = x0 + 0.5 * h * slope
            shrink = sigma[i - 1] / sigma[i]
            x = shrink * x - self.sqrt_alphas_cumprod[i - 1] * np.expm1(-h) * middle_x0
            previous_x0 = x0
            previous_h = h


def diffusion_of(config, steps=NUM_TIMESTEPS):
    """The GaussianDiffusion that a model of this Config is trained with, or sampled in `steps`."""
    return GaussianDiffusion(steps, config.prediction)


def extract(table, t):
    """table[t] as fp32 (B, 1, 1, 1)"""
    return torch.from_numpy(table).to(t.device)[t].float().view(-1, 1, 1, 1)


def spaced_timesteps(steps):
    """The timesteps that a shorter process keeps, evenly from first to last (ADM)."""
    if not 1 <= steps <= NUM_TIMESTEPS:
        raise ValueError(f"{steps} steps, expected 1 to {NUM_TIMESTEPS}")
    last = NUM_TIMESTEPS - 1
    if steps == 1:
        return [last]  # pure noise; ADM would keep timestep 0
    strides = np.full(steps - 1, last / (steps - 1))
    # A sum, as in ADM: i * stride may round otherwise.
    return [round(position) for position in np.cumsum(np.append(0.0, strides))]


def gaussian_kl(mean1, logvar1, mean2, logvar2):
    """KL divergence between two Gaussians, in nats."""
    ratio = (logvar1 - logvar2).exp()
    distance = (mean1 - mean2) ** 2 * (-logvar2).exp()
    return 0.5 * (-1 + logvar2 - logvar1 + ratio + distance)


def discretized_gaussian_nll(x, mean, log_scale):
    """-log of the mass that a Gaussian puts on x's own bin of width 2/255 (DDPM section 3.3)."""

    def normal_cdf(z):  # ADM's approximation
        return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))

    inv_std = (-log_scale).exp()
    below_upper_edge = normal_cdf(inv_std * (x - mean + 1 / 255))
    below_lower_edge = normal_cdf(inv_std * (x - mean - 1 / 255))
    mass = below_upper_edge - below_lower_edge
    mass = torch.where(x > 0.999, 1 - below_lower_edge, mass)  # the last bin has no upper edge
    mass = torch.where(x < -0.999, below_upper_edge, mass)  # the first has no lower edge
    return -mass.clamp(min=1e-12).log()


# --------------------------------------------------------------------------------------------------
# 5. Packing: four weights in a byte


def pack_ternary(codes):
    """codes (N, K) in {-1, 0, 1}, any dtype -> (N/4, K) uint8, in upstream's byte layout, where a
    shift and a mask unpack a quarter of the rows.

    The N outputs are split into quarters of n = N/4. Byte [r, c] holds four codes of input c. Each
    has 1 added: -1, 0, 1 become 0, 1, 2, which fit into 2 bits.

        bits 7-6: output r | 5-4: output n+r | 3-2: output 2n+r | 1-0: output 3n+r

    ValueError: N is no multiple of 4, or another code. (Other codes would change unpack_ternary,
    check_packed and init_from, too, and in kernel.cu naive, dequantize, unpack and multiply_rows.)

    >>> packed = pack_ternary(torch.tensor([[1], [0], [-1], [1]]))  # its fields are 2, 1, 0, 2
    >>> f"{packed.item():08b}"
    '10010010'
    """
    if codes.ndim != 2 or codes.shape[0] % 4:
        shape = tuple(codes.shape)
        raise ValueError(f"pack_ternary needs (N, K) with N a multiple of 4, got {shape}")
    if not bool(((codes == -1) | (codes == 0) | (codes == 1)).all()):
        raise ValueError("pack_ternary needs codes of -1, 0 and 1 alone")
    quarter0, quarter1, quarter2, quarter3 = (codes + 1).to(torch.uint8).chunk(4)
    return (quarter0 << 6) | (quarter1 << 4) | (quarter2 << 2) | quarter3


def unpack_ternary(packed):
    """(N/4, K) uint8 -> (N, K) int8 in {-1, 0, 1}. A field of 3 would become 2 here, in kernel.cu 0
    or 2: load_model refuses it (check_packed)."""
    quarters = [(packed >> shift) & 3 for shift in (6, 4, 2, 0)]
    return torch.cat(quarters).to(torch.int8) - 1


def check_packed(packed, name="weight"):
    """ValueError if packed (N/4, K) is not uint8, or a 2-bit field holds 3."""
    if packed.dtype != torch.uint8:
        raise ValueError(f"{name}: packed weights are uint8, got {packed.dtype}")
    if bool((packed & (packed >> 1) & 0b01010101).any()):  # a field is 0b11
        raise ValueError(f"{name}: holds code 3, which stands for no weight: it is damaged")


def packed_linear_plain(x, weight, alphas, bias):
    """Unpack, scale, multiply: x (..., K), weight (N/4, K) uint8, alphas (1,), bias (N,) or None
    -> (..., N) in the dtype of x."""
    bias = None if bias is None else bias.to(x.dtype)
    return F.linear(x, unpack_ternary(weight).to(x.dtype) * alphas.to(x.dtype), bias)


class PackedTernaryLinear(nn.Module):
    """TernaryLinear for inference, at 2 bits a weight: x (..., K) -> (..., N).

    `weight` (N/4, K) uint8, `alphas` (1,), `bias` (N,) or None. packed_linear computes what
    packed_linear_plain does, but faster. in_dtype sets product_dtype.
    """

    product_dtype = torch.float32

    def __init__(self, in_features, out_features, bias=False):
        super().__init__()
        packed = torch.zeros(out_features // 4, in_features, dtype=torch.uint8)
        self.register_buffer("weight", packed)
        self.alphas = nn.Parameter(torch.ones(1))
        self.bias = nn.Parameter(torch.zeros(out_features)) if bias else None
        self.is_adaln = bias  # only adaLN's linears have a bias

    def forward(self, x):
        tokens = x.reshape(-1, x.shape[-1])  # (M, K)
        layer = (self.weight, self.alphas, self.bias)
        if torch.is_grad_enabled() and (x.requires_grad or self.alphas.requires_grad):
            y = packed_linear_plain(tokens, *layer)  # only the plain form has a gradient
        else:
            y = packed_linear(tokens, *layer, self.product_dtype, self.is_adaln)
        return y.unflatten(0, x.shape[:-1])


@torch.no_grad()
def pack_model(model):
    """A DiT of TernaryLinear layers -> a new one of PackedTernaryLinear layers, in eval mode. All
    else stays in fp32. fp32 outputs agree to 1e-5: sums are added in another order. ValueError: a
    weight is not finite."""
    with torch.device("meta"):
        packed = DiT(model.config, packed=True)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    for name, module in model.named_modules():
        if isinstance(module, TernaryLinear):
            # NaN is no code: pack_ternary refuses it.
            state[f"{name}.weight"] = pack_ternary(ternarize(module.weight))
    packed.load_state_dict(state, assign=True)
    return packed.eval().requires_grad_(False)


# --------------------------------------------------------------------------------------------------
# 6. Fast products with packed weights, on CPU and GPU: skip on first reading

SMALL_ROWS = 8  # up to so many tokens, reading the weights takes most of the time


def packed_linear(x, weight, alphas, bias, dtype, is_adaln=False):
    """x (M, K) times a packed weight -> (M, N). The first line that fits is taken:

        device  tokens M        dtype   product
        GPU     any             bf16    launch_kernel                      -> bf16
        CPU     up to 8; adaLN  any     small_rows, x is not rounded       -> fp32
        any     any             int8    int8_linear, x is rounded          -> bf16
        any     any             others  packed_linear_plain                -> dtype

    launch_kernel takes small_batch up to 16 tokens, else wgmma on Hopper and mma on other GPUs (for
    sizes that do not fit: naive). It needs nvcc, small_rows g++; a warning says once what is
    missing. ValueError: x is not (M, K), or in int8 not finite.
    """
    if x.shape[1] != weight.shape[1]:
        raise ValueError(f"x of (M, {weight.shape[1]}) wanted, got {tuple(x.shape)}")
    if len(x) == 0:
        return x.new_empty(0, 4 * len(weight))
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

    In bf16 and int8 the products of many tokens are bf16, and so attention and SwiGLU; norms and
    the residual stream stay in fp32. So do adaLN's projections under int8, because they steer whole
    blocks and would cause most of its error. A full-precision model is put in dtype as a whole, but
    ValueError for int8.
    """
    if not model.config.ternary:
        if dtype == torch.int8:
            raise ValueError("int8 is for ternary weights, this checkpoint is in full precision")
        return model.to(dtype)
    for module in model.modules():
        if isinstance(module, PackedTernaryLinear):
            stays_fp32 = module.is_adaln and dtype == torch.int8
            module.product_dtype = torch.float32 if stays_fp32 else dtype
    return model


def int8_linear_plain(x, weight, alphas, bias):
    """packed_linear_plain with activations in int8: x (M, K) fp32 or bf16 -> (M, N) bf16.

    Each token is rounded to 255 levels between -max|x| and max|x|. Codes are exact in int8, so the
    sums are exact, and most work runs at int8's rate. A step of a random 600M errs by 2%, the toy
    FID of the demo by 0.2% (tests/RESULTS.md). ValueError: x is not finite.
    """
    x = x.float()
    greatest = x.abs().amax(1, keepdim=True).clamp(min=1e-30)  # (M, 1)
    if not bool(greatest.isfinite().all()):
        raise ValueError("activations are not finite: is the checkpoint damaged?")
    levels = (x * (torch.full_like(greatest, 127) / greatest)).round()  # halves to even
    # No public name, but torchao builds on it too.
    sums = torch._int_mm(levels.to(torch.int8), unpack_ternary(weight).t())  # (M, N) int32
    y = sums.float() * (greatest / 127 * alphas.float())
    if bias is not None:
        y = y + bias.float()
    return y.to(torch.bfloat16)


def int8_linear(x, weight, alphas, bias):
    """int8_linear_plain to the bit; on a CPU, C++ does all but the product. Each call unpacks the
    codes of its layer, so that one layer at a time is in int8."""
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
        return int8_linear_plain(x, weight, alphas, bias)  # x is not finite: it says so
    call_cpu("unpack", weight, codes, weight.numel())
    alpha = alphas.float().view(1)
    chunk_size = max(1, (1 << 22) // N)  # 16 MB of sums
    for first in range(0, M, chunk_size):
        chunk = slice(first, first + chunk_size)
        sums = torch._int_mm(levels[chunk], codes.t())
        call_cpu("scale_rows", sums, scales[chunk], alpha, bias, y[chunk], len(sums), N)
    return y


def small_rows(x, weight, alphas, bias):
    """packed_linear_plain in fp32, for few tokens: C++ reads the packed bytes once."""
    y = torch.empty(len(x), 4 * len(weight))
    alpha = alphas.float().view(1)
    call_cpu("small_rows", x.float(), weight, alpha, bias, y, *x.shape, len(weight))
    return y


def call_cpu(function, *arguments):
    """Call a function of kernel.cu's CPU part: contiguous tensors, alphas and bias in fp32."""
    pointers_and_sizes = [ctypes.c_long(z) if isinstance(z, int) else pointer(z) for z in arguments]
    return getattr(cpu_kernel(), function)(*pointers_and_sizes)


def pointer(z):
    """The address of a tensor; null for None."""
    return ctypes.c_void_p(None if z is None else z.data_ptr())


@lru_cache(maxsize=None)
def cpu_kernel():
    """The CPU part of kernel.cu as a ctypes library, or None and a warning. Each process compiles
    it, within a second; no file is kept."""
    # -ffp-contract=off: rounding a * b + c once would not give int8_linear_plain's bits.
    flags = "-x c++ -std=c++17 -DCPU -O3 -march=native -ffp-contract=off -fopenmp -shared -fPIC"
    try:
        compiler = shlex.split(os.environ.get("CXX", "")) or ["g++"]
        with tempfile.TemporaryDirectory() as folder:
            source = Path(__file__).with_name("kernel.cu")
            command = [*compiler, *flags.split(), str(source), "-o", f"{folder}/kernel.so"]
            subprocess.run(command, check=True, capture_output=True, text=True, errors="replace")
            library = ctypes.CDLL(f"{folder}/kernel.so")
    except Exception as e:  # no compiler, no OpenMP, a folder where nothing may be run
        warn_plain("kernel.cu's CPU part", e)
        return None
    keep_freed_memory()
    return library


def keep_freed_memory():
    """Have glibc keep freed memory for the next layer. A step can be a tenth faster."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # glibc alone
    if mallopt:
        mallopt(-3, 32 << 20)  # M_MMAP_THRESHOLD: blocks of up to 32 MB,
        mallopt(-1, 256 << 20)  # M_TRIM_THRESHOLD: up to 256 MB in all


def warn_plain(part, e):
    """Warn that `part` was not built, and why."""
    reason = error_line(e)
    warnings.warn(f"{part} is not used ({reason}): packed layers run in plain PyTorch, slower")


def error_line(e):
    """Why a compiler failed: its first line is only the place."""
    text = str(getattr(e, "stderr", None) or e)
    errors = [line for line in text.splitlines() if "error:" in line or "cannot find" in line]
    return first_line(errors[0] if errors else text or e)


def first_line(e):
    """What an exception says, in one line; its type where it says nothing."""
    text = str(e).strip()
    return text.splitlines()[0][:200] if text else type(e).__name__


KERNELS = ("auto", "naive", "small_batch", "mma", "wgmma")  # in the order of kernel.cu's enum

# For check_kernels: each tile, with remainders.
CHECKS = (
    # kernel, its tile's tokens, M, N, K
    ("naive", 0, 3, 20, 7),
    ("small_batch", 0, 3, 64, 592),
    ("small_batch", 0, 13, 64, 592),
    ("mma", 32, 33, 160, 336),
    ("mma", 64, 70, 160, 336),
    ("mma", 128, 130, 160, 336),
    ("wgmma", 64, 70, 160, 752),
    ("wgmma", 128, 130, 288, 752),
)


@lru_cache(maxsize=None)
def cuda_kernel(device):
    """kernel.cu as a ctypes library for `device`, compiled and checked on first use, or None and a
    warning. It knows pointers, not torch, whose headers would take a minute to compile."""
    try:
        from torch.utils.cpp_extension import load

        major, minor = torch.cuda.get_device_capability(device)
        arch = f"{major}{minor}"
        if major == 9:
            arch += "a"  # for wgmma; torch's own flags leave it out
        flags = ["-O3", "-std=c++17", f"-gencode=arch=compute_{arch},code=sm_{arch}"]
        source = str(Path(__file__).with_name("kernel.cu"))
        name = f"terdit_sm_{arch}"
        path = load(name, [source], extra_cuda_cflags=flags, is_python_module=False)
        library = ctypes.CDLL(path)
        check_kernels(library, device)
        return library
    except Exception as e:  # no nvcc, no ninja, an old driver, a wrong edit
        warn_plain("kernel.cu", e)
        return None


def check_kernels(library, device):
    """RuntimeError if a kernel that this GPU can run differs from packed_linear_plain in a small
    case. Small integers and an alpha of 1/2 make sums exact, so results must be equal."""
    random = torch.Generator().manual_seed(0)  # not the user's
    for kernel, tokens, M, N, K in CHECKS:
        if kernel == "wgmma" and device.type == "cuda":
            if torch.cuda.get_device_capability(device)[0] != 9:
                continue
        x = torch.randint(-2, 3, (M, K), generator=random).bfloat16()
        weight = pack_ternary(torch.randint(-1, 2, (N, K), generator=random))
        alphas = torch.tensor([0.5])
        bias = torch.randint(-8, 9, (N,), generator=random).bfloat16()
        want = packed_linear_plain(x.float(), weight, alphas, bias).bfloat16()
        on_device = [z.to(device) for z in (x, weight, alphas, bias)]
        got = launch_kernel(library, *on_device, kernel, tokens).cpu()
        if not torch.equal(got, want):
            raise RuntimeError(f"kernel {kernel!r} is wrong for {tokens=}, {M=}, {N=}, {K=}")


def launch_kernel(library, x, weight, alphas, bias, kernel="auto", tokens=0):
    """kernel.cu's ternary_linear -> (M, N) bf16.

    x (M, K) bf16, weight (N/4, K) uint8, alphas (1,) fp32, bias (N,) bf16 or None: contiguous, on
    one GPU. kernel: one of KERNELS; tokens: of a thread block's tile, 0 for the best. ValueError:
    dtypes or sizes. RuntimeError: CUDA or kernel.cu refuse.
    """
    M, K = x.shape
    N = 4 * len(weight)
    if kernel == "auto" and (N % 32 or K % 16):
        warnings.warn(f"a layer of {N}x{K} fits no tile of kernel.cu (N % 32, K % 16): slow")
    y = x.new_empty(M, N)
    dtypes = [None if z is None else z.dtype for z in (x, weight, alphas, bias)]
    wanted = [torch.bfloat16, torch.uint8, torch.float32, None if bias is None else torch.bfloat16]
    if dtypes != wanted or weight.shape[1] != K or alphas.numel() != 1:
        shapes = [tuple(z.shape) for z in (x, weight, alphas)]
        raise ValueError(f"x, weight, alphas, bias: wanted {wanted}, got {dtypes}, {shapes}")
    pointers = [pointer(z) for z in (x, weight, alphas, bias, y)]
    stream = ctypes.c_void_p(torch.cuda.current_stream(x.device).cuda_stream if x.is_cuda else None)
    with torch.cuda.device(x.get_device()):  # -1, for the CPU, changes nothing
        error = library.ternary_linear(*pointers, M, N, K, KERNELS.index(kernel), tokens, stream)
    if error:  # a cudaError_t, or kernel.cu's -1
        sizes = f"tokens {tokens}, M={M} N={N} K={K}"
        raise RuntimeError(f"kernel.cu: error {error} for kernel {kernel!r}, {sizes}")
    return y


# --------------------------------------------------------------------------------------------------
# 7. Checkpoints: skip on first reading

FORMAT = "terdit-1"
EXPECTED = f"a checkpoint of this project (format {FORMAT!r})"


@contextmanager
def temporary_beside(path, tmp_name=None):
    """Open a temporary file in the folder of `path`, and remove it at the end. -> the file, and
    what it shall replace: `path`, or its target if it is a link. OSError: in one line."""
    target = Path(os.path.realpath(path))
    if tmp_name is None or os.path.islink(path):  # a link's target may lie in another folder
        # Random, so that two writers share none; short, for paths of 252 letters.
        tmp_path = target.with_name(f"{secrets.token_hex(4)}.tmp")
    else:
        tmp_path = target.with_name(tmp_name)
    try:
        if target.exists() and not target.is_file():
            raise OSError("it is no regular file")
        with open(tmp_path, "wb") as file:
            try:
                yield file, target
            finally:
                tmp_path.unlink(missing_ok=True)
    except (RuntimeError, OSError) as e:
        # torch.save hides the system's reason behind a RuntimeError.
        reason = e.__context__ if isinstance(e.__context__, OSError) else e
        raise OSError(f"{path}: cannot be written ({first_line(reason)})") from None


def atomic_write(path, write, tmp_name=None):
    """write(file) into a temporary file, then rename it: the old file stays whole until then.

    tmp_name: its name in a folder with one writer. The next write overwrites what a kill leaves.
    """
    with temporary_beside(path, tmp_name) as (file, target):
        write(file)
        file.flush()
        os.fsync(file.fileno())
        os.replace(file.name, target)


def check_writable(path):
    """OSError now, before hours of work, if atomic_write(path) would fail after them."""
    with temporary_beside(path):
        pass


def save_checkpoint(path, model, tmp_name=None):
    """Write a DiT, packed or not, with its Config, for load_model. Else as atomic_write."""
    state = {name: value.cpu() for name, value in model.state_dict().items()}
    ckpt = dict(format=FORMAT, config=asdict(model.config), model=state)
    atomic_write(path, lambda file: torch.save(ckpt, file), tmp_name)


def read_checkpoint(path, expected, mmap=False):
    """torch.load that runs no code and compares the zip's CRCs. `expected` names what it should be.

    mmap: tensors stay in the file until they are used. ValueError: no checkpoint, or damaged.
    OSError, MemoryError: the system cannot read it.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; expected {expected}")
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()  # torch.load would take flipped bits
            if damaged and archive.getinfo(damaged).CRC == 0:
                raise ValueError("it was saved without checksums; save it again with them")
            if damaged:
                raise ValueError(f"its part {damaged} has changed since it was written")
        with torch.serialization.safe_globals([Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except Exception as e:  # a damaged file raises almost anything
        reason = first_line(e)
        if isinstance(e, MemoryError) or "allocate memory" in reason:  # torch's words
            raise MemoryError(f"{path}: not enough memory to read it") from None
        if isinstance(e, OSError) and e.errno not in (None, errno.EINVAL):  # EINVAL: a wrong offset
            raise OSError(f"{path}: cannot be read ({reason})") from None
        if isinstance(e, pickle.UnpicklingError):  # torch's words advise to run its code
            reason = "it holds more than tensors, and may be hostile"
        raise ValueError(f"{path}: not {expected}, or damaged ({reason})") from None


def read_ours(path):
    """A file of save_checkpoint -> Config fields, state dict."""
    ckpt = read_checkpoint(path, EXPECTED)
    is_dict = isinstance(ckpt, dict)
    kind = str(ckpt.get("format")) if is_dict else ""
    if kind == FORMAT:
        return ckpt["config"], ckpt["model"]
    if kind.startswith("terdit-state"):
        advice = "a state of training; take packed.pt or full.pt of its folder"
    elif isinstance(ckpt, Namespace) or (is_dict and "x_embedder.weight" in ckpt):
        advice = "a part of a released model; name its folder"
    else:
        advice = f"a foreign file, a {type(ckpt).__name__}"
    raise ValueError(f"{path}: not {EXPECTED}, but {advice}")


def read_released(folder):
    """A released TerDiT or Large-DiT folder -> Config fields, state dict."""
    weights = folder / "consolidated_ema_ternary.00-of-01.pth"
    if not weights.is_file():
        weights = folder / "consolidated_ema.00-of-01.pth"
    arguments = folder / "model_args.pth"
    if not (weights.is_file() or arguments.is_file()):
        expected = f"packed.pt or full.pt of a run, or {arguments.name} and {weights.name}"
        raise FileNotFoundError(f"{folder}: nothing is saved there yet; expected {expected}")
    args = read_checkpoint(arguments, "a released model's arguments")
    state = read_checkpoint(weights, "a released model's weights")
    return released_config(state, args), state


def released_config(state, args):
    """Config fields of a released model, from its tensors' shapes and its arguments."""
    patch_size = 2  # every released model's name ends in _patch2
    dim, patch_dim = state["x_embedder.weight"].shape
    num_classes = len(state["y_embedder.embedding_table.weight"]) - 1
    is_ternary = "layers.0.attention.wq.alphas" in state
    class_names = [str(i) for i in range(num_classes)]
    if is_ternary:
        # TerDiT orders ImageNet's indices as strings: 0, 1, 10, 100, ... So its label 121 is 207.
        class_names.sort()
    return dict(
        input_size=args.image_size // 8,
        patch_size=patch_size,
        in_channels=patch_dim // patch_size**2,
        dim=dim,
        n_layers=1 + max(int(name.split(".")[1]) for name in state if name.startswith("layers.")),
        n_heads=32,
        multiple_of=state["layers.0.feed_forward.w2.weight"].shape[1],  # it rounds up to itself
        num_classes=num_classes,
        learn_sigma=len(state["final_layer.linear.weight"]) == 2 * patch_dim,
        qk_norm="layers.0.attention.q_norm.weight" in state,
        ternary=is_ternary,
        adaln_norm="layers.0.adaLN_modulation.2.weight" in state,
        vae=f"stabilityai/sd-vae-ft-{args.vae}",
        class_names=class_names,
    )


def load_model(path, device="cpu", dtype=torch.float32, **overrides):
    """Load a model for inference: a file of save_checkpoint, or a released folder.

    dtype: see in_dtype. `overrides` replace Config fields. Released models do not say n_heads; 32
    is taken, and a wrong number draws nonsense. ValueError, OSError: in one line, naming the file.
    """
    path = Path(path)
    if "n_heads" in overrides and path.is_file():
        n_heads = overrides["n_heads"]
        raise ValueError(f"{path}: n_heads={n_heads} is for released folders, not for this file")
    try:
        config_fields, state = read_released(path) if path.is_dir() else read_ours(path)
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
    except (LookupError, TypeError, AttributeError, ArithmeticError, RuntimeError) as e:
        reason = " ".join(f"{type(e).__name__}: {e}".split())[:300]
        raise ValueError(f"{path}: not the weights of a TerDiT or Large-DiT ({reason})") from None
    return in_dtype(model.eval().requires_grad_(False), dtype).to(device)
