"""Hand-written backward passes against autograd on the plain formulas."""

import pytest
import torch
import torch.nn.functional as F

from usbrec.llm.kernels import (
    Window,
    adapted_product,
    ordered,
    quick_product,
    rms_norm,
    rotary_tables,
    rotate,
    window_attention,
)


def random(*shape, seed=0, dtype=torch.float32):
    """A random tensor that asks for a gradient."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(dtype).requires_grad_()


def same_values_and_gradients(ours, plain, inputs, tolerance=1e-5):
    """Compare two functions of the same inputs, and their gradients under a random pull."""
    results = [function(*inputs) for function in (ours, plain)]
    torch.testing.assert_close(*results, atol=tolerance, rtol=tolerance)
    pull = random(*results[0].shape, seed=99).detach().to(results[0].dtype)
    grads = [torch.autograd.grad(result, inputs, pull) for result in results]
    for got, expected in zip(*grads, strict=True):
        torch.testing.assert_close(got, expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("bias", [True, False])
def test_an_adapted_product_equals_its_formula(bias):
    weight, b = random(10, 6, seed=1).detach(), random(10, seed=2).detach() if bias else None

    def plain(x, A, B):
        return F.linear(x, weight, b) + 1.5 * (x @ A.T @ B.T)

    def ours(x, A, B):
        return adapted_product(x, weight, b, A, B, 1.5)

    same_values_and_gradients(ours, plain, (random(7, 6), random(3, 6, seed=4), random(10, 3)))


def test_an_adapted_product_over_bf16_keeps_fp32_adapters_and_gradients():
    """Against the same numbers in fp32, an error of some bf16 roundings (2^-8 each)."""
    x, weight = random(50, 64, dtype=torch.bfloat16), random(48, 64, seed=1).detach()
    A, B = random(4, 64, seed=2), random(48, 4, seed=3)
    out = adapted_product(x, weight.bfloat16(), None, A, B, 0.5)
    assert out.dtype == torch.bfloat16
    out.float().square().sum().backward()
    assert A.grad.dtype == B.grad.dtype == torch.float32 and x.grad.dtype == torch.bfloat16
    wide = x.detach().float()
    exact = wide @ weight.bfloat16().float().T + 0.5 * (wide @ A.T @ B.T)
    expected = torch.autograd.grad(exact.square().sum(), (A, B))
    assert (out - exact).norm() < 0.01 * exact.norm()
    for got, exact_grad in zip((A.grad, B.grad), expected, strict=True):
        assert (got - exact_grad).norm() < 0.02 * exact_grad.norm()


def test_an_input_that_wants_no_gradient_gets_none():
    A, B = random(3, 6), random(10, 3, seed=1)
    adapted_product(torch.ones(2, 6), torch.ones(10, 6), None, A, B, 1.0).sum().backward()
    assert A.grad is not None and B.grad is not None


def test_rms_norm_equals_its_formula():
    weight = random(12, seed=1).detach()

    def plain(x):
        return weight * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-3))

    same_values_and_gradients(lambda x: rms_norm(x, weight, 1e-3), plain, (random(5, 12),))


@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("r", [2, 4])
def test_rotation_equals_complex_multiplication(interleaved, r):
    """A pair (a, b) turned by t is (a + ib) e^it; heads of 8 dimensions, 2 r of which turn."""
    angles = random(5, 1, r, seed=1).detach()

    def plain(x):
        head, rest = x[..., : 2 * r], x[..., 2 * r :]
        pairs = head.unflatten(-1, (r, 2)) if interleaved else head.unflatten(-1, (2, r)).mT
        turned = torch.view_as_complex(pairs.contiguous()) * torch.exp(1j * angles)
        back = torch.view_as_real(turned)
        back = back.flatten(-2) if interleaved else back.mT.flatten(-2)
        return torch.cat((back, rest), -1)

    def ours(x):
        return rotate(x, *rotary_tables(angles, interleaved), interleaved)

    same_values_and_gradients(ours, plain, (random(5, 3, 8),))


def dense_attention(q, k, v, visible):
    """softmax(q k^T / sqrt(d)) v with key heads repeated for their query heads."""
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    scores = torch.einsum("nhd,shd->hns", q, k) / q.shape[-1] ** 0.5
    probs = scores.masked_fill(~visible, -torch.inf).softmax(-1)
    return torch.einsum("hns,shd->nhd", probs, v)


@pytest.mark.parametrize("seed", range(4))
def test_window_attention_equals_dense_attention_under_random_masks(seed):
    """Two sequences of 9 and 6 tokens in one row, the first cut in two windows."""
    generator = torch.Generator().manual_seed(seed)
    visible = torch.rand(15, 15, generator=generator) < 0.5
    visible |= torch.eye(15, dtype=torch.bool)
    visible &= torch.ones(15, 15, dtype=torch.bool).tril()
    visible[9:, :9] = False
    spans = [(0, 0, 4), (0, 4, 9), (9, 9, 15)]

    def ours(q, k, v):
        windows = [Window(f, a, b, visible[a:b, f:b]) for f, a, b in spans]
        return window_attention(q, k, v, windows)

    inputs = random(15, 4, 8, seed=1), random(15, 2, 8, seed=2), random(15, 2, 8, seed=3)
    same_values_and_gradients(ours, lambda *x: dense_attention(*x, visible), inputs)


def test_one_window_serves_two_dtypes():
    window = Window(0, 0, 3, torch.ones(3, 3, dtype=torch.bool).tril())
    for dtype in (torch.float32, torch.bfloat16, torch.float32):
        q = random(3, 2, 8, dtype=dtype)
        assert window_attention(q, q[:, :1], q[:, :1], [window]).dtype == dtype


@pytest.mark.parametrize("rows", [1, 7, 64])
def test_a_weight_in_the_processors_order_gives_the_same_product(rows: int) -> None:
    weight, bias = torch.randn(48, 32).bfloat16(), torch.randn(48).bfloat16()
    order = ordered(weight)
    if order is None:  # a processor without bf16 kernels keeps the plain weight
        assert not torch.ops.mkldnn._is_mkldnn_bf16_supported()
        return
    x = torch.randn(rows, 32).bfloat16()
    plain = torch.nn.functional.linear(x.float(), weight.float(), bias.float())
    torch.testing.assert_close(quick_product(x, order, bias).float(), plain, rtol=2**-7, atol=2**-5)


def test_weights_of_other_dtypes_have_no_order_of_their_own() -> None:
    assert ordered(torch.randn(48, 32)) is None
