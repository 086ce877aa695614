"""recurrent_softmax_attention in PyTorch. Its kernels are proved against their cascades by
`heed check`; here is what PyTorch adds."""

import heed
import pytest
import torch
from reference import random, random_qkv
from torch.autograd import gradcheck
from torch.library import opcheck
from torch.nn.functional import layer_norm, normalize

F64 = torch.float64
OP = torch.ops.heed.recurrent_softmax_attention.default
NORMALIZERS = ["softmax", "l2", "rms", "layer", "divide_by_count", "clamped", "none"]
GATE = random(2, 4, 5, dtype=F64, seed=8).sigmoid()


def qkv(dtype=F64):
    return random_qkv(2, 4, 2, 5, 7, 3, 3, dtype=dtype)


def wanted(*tensors):
    return [t.clone().requires_grad_() for t in tensors]


@pytest.mark.parametrize("normalizer", NORMALIZERS)
@pytest.mark.parametrize("options", [{}, dict(order=2), dict(order=3, scale=0.2, causal=False)])
def test_gradcheck(normalizer, options):
    def call(q, k, v, gate):
        return heed.recurrent_softmax_attention(
            q, k, v, normalizer=normalizer, gate=gate, eps=0.1, **options
        )

    assert gradcheck(call, wanted(*qkv(), GATE))


def test_gradcheck_of_clamped_scores():
    def call(q, k, v):
        return heed.recurrent_softmax_attention(q, k, v, normalizer="none", score_clamp=0.3)

    assert gradcheck(call, wanted(*qkv()))


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("options", [{}, dict(normalizer="l2"), dict(order=2, gate=GATE)])
@pytest.mark.parametrize("dtype", [F64, torch.float32])
def test_opcheck(options, grad, dtype):
    tensors = qkv(dtype)
    options = {n: o.to(dtype) if isinstance(o, torch.Tensor) else o for n, o in options.items()}
    opcheck(OP, tuple(wanted(*tensors) if grad else tensors), options)


def everything(q, k, v, gate):
    return sum(
        heed.recurrent_softmax_attention(q, k, v, normalizer=n, gate=gate, order=order).sum()
        for n in NORMALIZERS
        for order in (None, 2)
    )


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile(dynamic):
    torch.compiler.reset()
    inputs = wanted(*qkv(), GATE)
    expected = torch.autograd.grad(everything(*inputs), inputs)
    compiled = torch.compile(everything, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for found, e in zip(torch.autograd.grad(compiled(*inputs), inputs), expected):
        assert torch.equal(found, e)


def textbook(q, k, v, normalizer, eps=1e-6):
    """The numerator as it stands, under PyTorch's own norms."""
    lq, lk = q.shape[2], k.shape[2]
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
    seen = torch.ones(lq, lk, dtype=torch.bool).tril(lk - lq)
    weights = (q @ k.mT / q.shape[-1] ** 0.5).exp() * seen
    num, den = weights @ v, weights.sum(-1, keepdim=True)
    return {
        "softmax": lambda: num / den,
        "l2": lambda: normalize(num, dim=-1),
        "rms": lambda: num * (num.square().mean(-1, keepdim=True) + eps).rsqrt(),
        "layer": lambda: layer_norm(num, num.shape[-1:], eps=eps),
        "divide_by_count": lambda: num / seen.sum(-1, keepdim=True),
        "clamped": lambda: num / den.clamp(min=1),
        "none": lambda: num,
    }[normalizer]()


@pytest.mark.parametrize("normalizer", NORMALIZERS)
def test_pytorch_says_the_same(normalizer):
    inputs = wanted(*qkv())
    found = heed.recurrent_softmax_attention(*inputs, normalizer=normalizer)
    expected = textbook(*inputs, normalizer)
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)
    weights = random(*found.shape, dtype=F64, seed=3)
    for f, e in zip(
        torch.autograd.grad(found, inputs, weights), torch.autograd.grad(expected, inputs, weights)
    ):
        torch.testing.assert_close(f, e, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("normalizer", NORMALIZERS)
def test_half_types(dtype, normalizer):
    q, k, v = qkv(dtype)
    gate = GATE.to(dtype)
    found = heed.recurrent_softmax_attention(q, k, v, normalizer=normalizer, gate=gate)
    expected = textbook(q.double(), k.double(), v.double(), normalizer) * gate.double()[..., None]
    assert found.dtype == dtype
    scale = expected.abs().max().item()
    torch.testing.assert_close(
        found.double(), expected, rtol=0, atol=4 * torch.finfo(dtype).eps * scale
    )


@pytest.mark.parametrize(
    "options, error, words",
    [
        (dict(normalizer="l3"), ValueError, ["normalizer", "l3", "l2"]),
        (dict(order=-1), ValueError, ["order", "-1"]),
        (dict(eps=-1.0), ValueError, ["eps", "-1"]),
        (dict(score_clamp=float("nan")), ValueError, ["score_clamp", "nan"]),
        (dict(gate=GATE[:1]), ValueError, ["gate", "1", "2"]),
        (dict(gate=GATE[0]), ValueError, ["gate", "2", "3"]),
        (dict(gate=GATE.to("meta")), RuntimeError, ["gate", "meta"]),
    ],
)
def test_mistakes(options, error, words):
    with pytest.raises(error) as caught:
        heed.recurrent_softmax_attention(*qkv(), **options)
    for word in ["recurrent_softmax_attention", *words]:
        assert word in str(caught.value)


def test_second_derivatives_are_refused():
    q, k, v = wanted(*qkv())
    out = heed.recurrent_softmax_attention(q, k, v)
    (first,) = torch.autograd.grad(out.sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="derivative for heed::recurrent_softmax"):
        first.sum().backward()
