"""The paper's rivals: quantizers by hand and on a small model, and Meta's DiT."""

import numpy as np
import pytest
import torch

from terdit import Config, DiT, TernaryLinear
from tests.baselines import QUANTIZERS, RECONSTRUCTIONS, MetaDiT, MetaDiTConfig, load_any
from tests.baselines import quantize_model, reconstruct, round_to_nearest, ternary_absmean
from tests.baselines import ternary_least_squares
from tests.helpers import SMALL, awake


def test_ternary_by_hand():
    # mean|W| = 0.5: codes 1, 0, 1, -1; least squares: (0.75 + 0.5 + 0.625) / 3 = 0.625. Both scales
    # are exact in fp16.
    w = torch.tensor([[0.75, -0.125], [0.5, -0.625]])
    for quantize, alpha in ((ternary_absmean, 0.5), (ternary_least_squares, 0.625)):
        got, bits = quantize(w)
        assert got.tolist() == [[alpha, 0], [alpha, -alpha]]
        assert bits == 2 + 16 / 4


def test_rounding_by_hand():
    # -1..2 has levels -1, 0, 1, 2. 0..3 has 0, 1, 2, 3. -2..4: step 2, levels -2, 0, 2, 4.
    w = torch.tensor([[-1.0, 2.0, 0.4, 0.6], [0.0, 3.0, 1.4, 2.6], [-2.0, 4.0, 0.9, 3.1]])
    got, bits = round_to_nearest(w)
    assert got.tolist() == [[-1, 2, 0, 1], [0, 3, 1, 3], [-2, 4, 0, 4]]
    assert bits == 2 + 18 / 4
    # In groups of 2 along K: two weights each at the ends of their range. 0.4..0.6 is widened to
    # 0..0.6, step 0.2.
    got, bits = round_to_nearest(w[:1], group=2)
    torch.testing.assert_close(got, w[:1], atol=2e-4, rtol=0)
    assert bits == 2 + 18 / 2


def test_reconstruction_by_hand():
    """Two inputs that are always equal: only the sum of their weights counts, 1.4 + 1.4 = 2.8.

    The levels are 0, 1, 2 and 3: the row's last weight, whose input is independent, sets the range.
    Rounding makes 1 + 1 of the sum. Here the first weight is rounded to 1, which moves the second
    to about 1.8, and that is rounded to 2.
    """
    x = torch.tensor([[1.0, 1, 0], [-1, -1, 0], [0, 0, 1], [0, 0, -1]])
    w = torch.tensor([[1.4, 1.4, 3.0]])
    assert round_to_nearest(w)[0].tolist() == [[1, 1, 3]]
    assert reconstruct(w, x.T @ x)[0].tolist() == [[1, 2, 3]]


@torch.no_grad()
@pytest.mark.parametrize("method", QUANTIZERS | RECONSTRUCTIONS)
def test_quantize_model(method):
    """What TerDiT makes ternary is quantized, to at most four levels a row and group, no more."""
    model = awake(DiT(Config(**SMALL, ternary=False, adaln_norm=False)))
    inputs = (torch.randn(8, 3, 8, 8), torch.full((8,), 300), torch.arange(8) % 6)
    small = quantize_model(model, method, lambda model: model(*inputs))
    before = model.state_dict()
    after = small.state_dict()
    changed = {name for name in after if not torch.equal(after[name], before[name])}
    modules = DiT(Config(**SMALL)).named_modules()
    ternary = {f"{name}.weight" for name, m in modules if isinstance(m, TernaryLinear)}
    assert changed == ternary and 2 < small.bits_per_weight < 2.6
    assert all(len(row[:32].unique()) <= 4 for name in changed for row in after[name])


@torch.no_grad()
def test_metas_dit(tmp_path):
    """Its file is read, and its outputs are those that agreed with a transcription of DiT."""
    model = MetaDiT(MetaDiTConfig(input_size=6, dim=128, n_layers=2, n_heads=2, num_classes=5))
    rng = np.random.default_rng(0)
    for name, value in sorted(model.state_dict().items()):
        spread = 0.3 if value.ndim == 1 else value[0].numel() ** -0.5
        value.copy_(torch.from_numpy(spread * rng.standard_normal(value.shape)))
    torch.save(model.state_dict(), tmp_path / "dit.pt")
    x = torch.from_numpy(rng.standard_normal((2, 4, 6, 6))).float()
    out = load_any(tmp_path / "dit.pt")(x, torch.tensor([17.0, 500.5]), torch.tensor([3, 5]))
    want = """
        -0.40325 -0.15558 -0.92952 -0.95536 -1.03388 0.9968 1.5173 -0.29861 0.00035 0.91805
        -1.54167 -0.14906 0.14293 -1.13274 0.39664 0.46306 0.86535 -1.17222 -1.08617 0.22651
        -1.39721 -0.51189 0.4364 -0.73255
    """
    want = torch.tensor([float(number) for number in want.split()])
    torch.testing.assert_close(out[:, ::3, ::5, ::5].flatten(), want, atol=1e-4, rtol=0)
    with torch.device("meta"):
        released = MetaDiT(MetaDiTConfig())
    n_parameters = sum(p.numel() for p in released.parameters())
    assert n_parameters == 675_129_632  # as DiT's training log says of DiT-XL/2
