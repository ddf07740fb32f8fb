"""What the paper compares TerDiT with: quantization after training.

    QUANTIZERS          weight quantizers that need no data: per-tensor ternary, 2-bit round-to-nearest
    RECONSTRUCTIONS     2-bit quantizers that repair a layer's output on recorded inputs
    quantize_model      a full-precision terdit.DiT with one of them applied where TerDiT is ternary

    small = quantize_model(load_model("full.pt"), "2-bit groups of 64")

A weight is (N, K), N outputs and K inputs.
"""

import copy
from functools import partial

import torch
import torch.nn as nn

from terdit import DiT, ternarize

# ----------------------------------------------------------------------------------------------------------------------
# Quantization after training
#
# Each quantizer takes a weight (N, K) and returns the dequantized weight, of the same shape and dtype, and the bits a
# weight that the quantized one takes. All store 2 bits a weight, ternary included (four in a byte, as TerDiT packs
# them), and fp16 scales: the dequantized weight is made with scales that are rounded to fp16.


def round_to_fp16(scale):
    return scale.half().to(scale.dtype)


def ternary_absmean(weight):
    """What TerDiT trains with, applied at once: ternarize(W) * mean|W|, one scale a tensor (BitNet b1.58)."""
    alpha = round_to_fp16(weight.abs().mean())
    return ternarize(weight) * alpha, 2 + 16 / weight.numel()


def ternary_least_squares(weight):
    """The same codes with the alpha that minimises |W - alpha codes|^2, <W, codes> / <codes, codes>."""
    codes = ternarize(weight)
    nonzero = codes.abs().sum()  # <codes, codes>
    alpha = round_to_fp16((weight * codes).sum() / nonzero.clamp(min=1))
    return codes * alpha, 2 + 16 / weight.numel()


def min_max_grid(weight, group):
    """Scale and zero point of each weight, both (N, K): four levels between the least and the greatest of its group."""
    scales = []
    zeros = []
    for part in weight.split(group or weight.shape[1], dim=1):
        # The range is widened to hold 0, as in GPTQ. Q-DiT does not widen it, and clamps the zero point to 0..3: a
        # range that lacks 0 is then out of reach.
        low = part.amin(1, keepdim=True).clamp(max=0)
        high = part.amax(1, keepdim=True).clamp(min=0)
        scale = round_to_fp16((high - low) / 3)
        scale = torch.where(scale == 0, 1, scale)  # a group of zeros
        zero = (-low / scale).round().clamp(0, 3)
        scales.append(scale.expand_as(part))
        zeros.append(zero.expand_as(part))
    return torch.cat(scales, 1), torch.cat(zeros, 1)


def round_to_grid(weight, scale, zero):
    codes = ((weight / scale).round() + zero).clamp(0, 3)
    return (codes - zero) * scale


def grid_bits(weight, group):
    """Bits a weight: 2 for its code, and its share of its group's fp16 scale and 2-bit zero point."""
    k = weight.shape[1]
    groups = -(-k // (group or k))  # in each row, rounded up
    return 2 + (16 + 2) * groups / k


def round_to_nearest(weight, group=None):
    """2-bit asymmetric min/max rounding per output channel, or in groups of `group` along K; the last may be shorter.

    This is the weight quantizer at the core of Q-DiT (arXiv 2406.17343). What Q-DiT puts around it is left out: a
    search for each layer's group size, GPTQ's corrections (see reconstruct), quantized activations.
    """
    scale, zero = min_max_grid(weight, group)
    return round_to_grid(weight, scale, zero), grid_bits(weight, group)


def reconstruct(weight, moments, group=None):
    """2-bit codes on round_to_nearest's grid, chosen to keep the layer's output on recorded inputs X (samples, K).

    moments (K, K) is X^T X. Minimises |X W^T - X Q^T|^2 greedily: it rounds column after column, and after each one
    moves the weights that are not yet rounded to make up for the error, in closed form (GPTQ, arXiv 2210.17323; 1%
    damping; the grid stays as it was before any move). Q-Diffusion (arXiv 2302.04304) has the same aim, but learns the
    rounding of whole blocks on inputs from all timesteps of its own sampler: this is its idea, not its method.
    """
    if not moments.isfinite().all() or moments.diagonal().mean() <= 0:
        raise ValueError("reconstruct needs recorded inputs that are finite and not all zero")
    scale, zero = min_max_grid(weight, group)
    scale = scale.double()
    zero = zero.double()
    w = weight.to(torch.float64, copy=True)
    h = moments.double()
    damping = 0.01 * h.diagonal().mean()
    h = h + damping * torch.eye(len(h), dtype=h.dtype, device=h.device)
    # Row j of the inverse's upper Cholesky factor says how the columns after j make up for an error in column j.
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(h))
    upper = torch.linalg.cholesky(inverse, upper=True)
    for j in range(w.shape[1]):
        rounded = round_to_grid(w[:, j], scale[:, j], zero[:, j])
        error = (w[:, j] - rounded) / upper[j, j]
        w[:, j + 1 :] -= torch.outer(error, upper[j, j + 1 :])
        w[:, j] = rounded
    return w.to(weight.dtype), grid_bits(weight, group)


QUANTIZERS = {
    "ternary absmean": ternary_absmean,
    "ternary least squares": ternary_least_squares,
    "2-bit per channel": round_to_nearest,
    "2-bit groups of 128": partial(round_to_nearest, group=128),
    "2-bit groups of 64": partial(round_to_nearest, group=64),
}
RECONSTRUCTIONS = {
    "2-bit per channel, reconstructed": reconstruct,
    "2-bit groups of 64, reconstructed": partial(reconstruct, group=64),
}


def record_moments(model, linears, calibration):
    """Run calibration(model) -> X^T X (K, K) float64 of the inputs X of each linear layer, by the layer's name."""
    moments = {}

    def record(name, module, inputs):
        x = inputs[0].flatten(0, -2).float()
        moments[name] = moments.get(name, 0) + (x.T @ x).double()

    hooks = [module.register_forward_pre_hook(partial(record, name)) for name, module in linears.items()]
    calibration(model)
    for hook in hooks:
        hook.remove()
    missed = [name for name in linears if name not in moments]
    if missed:
        raise ValueError(f"calibration never ran {len(missed)} of the model's layers, {missed[0]} for one")
    return moments


@torch.no_grad()
def quantize_model(model, method, calibration=None):
    """-> a copy in eval mode of a full-precision terdit.DiT, whose linear layers are quantized where TerDiT is ternary.

    method: a name in QUANTIZERS or RECONSTRUCTIONS. The latter need calibration(model), which runs the model on typical
    inputs, as Q-Diffusion does by sampling: lambda m: sample_images(m, y, seed=1). One run of the full-precision copy
    feeds all layers. The copy's `bits_per_weight` is the mean over the quantized weights. Raises ValueError.
    """
    if method not in QUANTIZERS and method not in RECONSTRUCTIONS:
        names = [*QUANTIZERS, *RECONSTRUCTIONS]
        raise ValueError(f"method={method!r}, expected one of: {'; '.join(names)}")
    if not isinstance(model, DiT) or model.config.ternary:
        it_is = "a ternary one" if isinstance(model, DiT) else type(model).__name__
        raise ValueError(f"expected a full-precision terdit.DiT (ternary=False), got {it_is}")
    if method in RECONSTRUCTIONS and calibration is None:
        raise ValueError(f"{method!r} needs calibration: a function that runs the model on typical inputs")
    model = copy.deepcopy(model).eval().requires_grad_(False)
    linears = {name: module for name, module in model.layers.named_modules() if isinstance(module, nn.Linear)}
    moments = record_moments(model, linears, calibration) if method in RECONSTRUCTIONS else {}
    all_bits = 0
    for name, module in linears.items():
        weight = module.weight.float()  # bf16 would round the grid itself
        if method in RECONSTRUCTIONS:
            quantized, bits = RECONSTRUCTIONS[method](weight, moments[name])
        else:
            quantized, bits = QUANTIZERS[method](weight)
        module.weight.copy_(quantized)
        all_bits += bits * weight.numel()
    model.bits_per_weight = all_bits / sum(module.weight.numel() for module in linears.values())
    return model
