"""Ternary weights and their packing: by hand, gradients, packed layers against those that train."""

import doctest

import pytest
import torch

import terdit
import train
from terdit import Config, DiT, PackedTernaryLinear, TernaryLinear
from terdit import check_packed, pack_model, pack_ternary, ternarize, unpack_ternary
from tests.helpers import SMALL, awake


@pytest.mark.parametrize("module", [terdit, train])
def test_the_worked_examples(module):
    failed, tried = doctest.testmod(module)
    assert tried >= 2 and failed == 0


# The quantizer ------------------------------------------------------------------------------------


def test_halves_round_to_even():
    # gamma = 1: 0.5 and -0.5 round to 0, and 1.5 rounds to 2, which is clipped to 1.
    weight = torch.tensor([[0.5, -0.5, 1.5, -1.5], [0.5001, -0.5001, 1.4999, 0.4999]])
    assert ternarize(weight, gamma=1.0).tolist() == [[0, 0, 1, -1], [1, -1, 1, 0]]


def test_ternarize_leaves_the_weight_alone():
    w = torch.randn(8, 8)
    before = w.clone()
    assert set(ternarize(w).unique().tolist()) == {-1, 0, 1}
    assert torch.equal(w, before)
    gamma = w.abs().mean() + terdit.TERNARY_EPS
    assert torch.equal(ternarize(w[3:5], gamma), ternarize(w)[3:5])  # the gamma of the whole


# The layer that trains ----------------------------------------------------------------------------


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("alpha", [0.07, -0.3])
def test_the_layer_equals_the_textbook_form(alpha, compiled):
    """The usual way to write a straight-through estimator: weight + (codes - weight).detach()."""
    layer = TernaryLinear(48, 24, bias=True)
    torch.nn.init.normal_(layer.bias)
    torch.nn.init.constant_(layer.alphas, alpha)
    x = torch.randn(5, 48)
    grad = torch.randn(5, 24)
    forward = torch.compile(layer) if compiled else layer
    y = forward(x)
    y.backward(grad)
    trained = (layer.weight, layer.alphas, layer.bias)
    parameters = [p.detach().clone().requires_grad_() for p in trained]
    weight, alphas, bias = parameters
    codes = weight + (ternarize(weight) - weight).detach()
    want_y = torch.nn.functional.linear(x, codes * alphas, bias)
    want = torch.autograd.grad(want_y, parameters, grad)
    torch.testing.assert_close(y, want_y, rtol=1e-4, atol=1e-5)
    for p, gradient in zip(trained, want):
        assert (p.grad - gradient).abs().max() <= 1e-5 * gradient.abs().max()


# Packing ------------------------------------------------------------------------------------------


def test_packing_by_hand():
    # Eight rows: the first byte holds rows 0, 2, 4 and 6, the second holds rows 1, 3, 5 and 7.
    codes = torch.tensor([[1], [-1], [0], [1], [0], [0], [-1], [1]])
    assert pack_ternary(codes).tolist() == [[0b10010100], [0b00100110]]


@pytest.mark.parametrize("shape", [(4, 1), (8, 3), (192, 64), (12, 0)])
def test_packing_round_trip(shape):
    codes = torch.randint(-1, 2, shape, dtype=torch.int8)
    packed = pack_ternary(codes)
    assert packed.dtype == torch.uint8
    assert packed.shape == (shape[0] // 4, shape[1])
    assert torch.equal(unpack_ternary(packed), codes)
    check_packed(packed)


@pytest.mark.parametrize("value", [2.0, 0.5, float("nan")])
def test_packing_refuses_what_is_not_ternary_and_odd_heights(value):
    with pytest.raises(ValueError, match="-1, 0 and 1"):
        pack_ternary(torch.full((4, 2), value))
    with pytest.raises(ValueError, match=r"multiple of 4, got \(6, 2\)"):
        pack_ternary(torch.zeros(6, 2))


def test_every_byte_without_code_3_passes_and_every_other_is_found():
    packed = pack_ternary(torch.randint(-1, 2, (16, 9)))
    passed = 0
    for byte in range(256):
        packed[2, 5] = byte
        if 3 in (byte >> 6, (byte >> 4) & 3, (byte >> 2) & 3, byte & 3):
            with pytest.raises(ValueError, match="code 3"):
                check_packed(packed)
        else:
            check_packed(packed)
            passed += 1
    assert passed == 3**4


@torch.no_grad()
@pytest.mark.parametrize("bias", [False, True])
def test_a_packed_layer_gives_the_bits_of_the_layer_that_trains(bias):
    ternary = TernaryLinear(48, 24, bias=bias)
    state = ternary.state_dict()
    state["weight"] = pack_ternary(ternarize(ternary.weight))
    packed = PackedTernaryLinear(48, 24, bias=bias)
    packed.load_state_dict(state)
    many = torch.randn(3, 7, 48)  # enough tokens for the plain form
    packed.is_adaln = False
    assert torch.equal(packed(many), ternary(many))
    few = torch.randn(2, 48)
    torch.testing.assert_close(packed(few), ternary(few), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("product_dtype", [torch.float32, torch.int8])
def test_a_gradient_passes_through_a_packed_layer(product_dtype):
    packed = PackedTernaryLinear(8, 12).requires_grad_(False)
    packed.weight.copy_(pack_ternary(torch.randint(-1, 2, (12, 8))))
    packed.product_dtype = product_dtype
    x = torch.randn(3, 8, requires_grad=True)
    packed(x).sum().backward()
    assert torch.equal(x.grad, unpack_ternary(packed.weight).float().sum(0).expand(3, 8))


@torch.no_grad()
@pytest.mark.parametrize("change", [dict(adaln_norm=False), dict(qk_norm=True, learn_sigma=False)])
def test_a_packed_model_computes_the_same(change):
    model = awake(DiT(Config(**SMALL | change)))
    packed = pack_model(model)
    inputs = (torch.randn(2, 3, 8, 8), torch.tensor([3, 900]), torch.tensor([0, 5]))
    want = model(*inputs)
    assert want.std() > 0.01
    torch.testing.assert_close(packed(*inputs), want, rtol=1e-4, atol=1e-5)
    ternary = sum(m.weight.numel() for m in model.modules() if isinstance(m, TernaryLinear))
    assert sum(b.numel() for b in packed.buffers()) * 4 == ternary  # exactly 2 bits a weight
