"""First derivatives of the softmax family and of sigmoid attention, through PyTorch."""

import heed
import pytest
import torch
from reference import DTYPES, error, random, random_qkv
from torch.autograd import gradcheck
from torch.nn.functional import scaled_dot_product_attention as torch_sdpa
from torch.utils._python_dispatch import TorchDispatchMode


def wanted(*tensors):
    return [t.clone().requires_grad_() for t in tensors]


def small(b=1, h=2, hkv=1, lq=4, lk=6, d=3, dv=2):
    return wanted(*random_qkv(b, h, hkv, lq, lk, d, dv, dtype=torch.float64))


BLOCKS = torch.tensor([[[True, False, True], [False, True, True]]])
MASK = torch.tensor([[True, False, True, True, False, True]]).expand(4, 6)

FLASH = {
    "plain": {},
    "causal": dict(causal=True),
    "window": dict(window=(1, 2)),
    "lengths": dict(lengths=torch.tensor([4])),
    "scale": dict(scale=-0.7),
    "softcap": dict(softcap=0.8, causal=True),
    "mask": dict(mask=MASK),
    "mask_that_hides_rows": dict(mask=MASK & (torch.arange(4) != 2)[:, None]),
    "blocks": dict(block_mask=BLOCKS, block_size=(2, 2)),
    "dropout": dict(dropout_p=0.4, seed=11),
}


@pytest.mark.parametrize("name", FLASH)
def test_flash(name):
    def call(q, k, v):
        return heed.flash_attention(q, k, v, return_lse=True, **FLASH[name])

    def finite(q, k, v):
        out, lse = call(q, k, v)
        return out, lse.masked_fill(lse.isneginf(), 0.0)

    assert gradcheck(finite, small())


@pytest.mark.parametrize(
    "shape", [(1, 2, 4, 6), (4, 6), (1, 6), (4, 1), (2, 1, 1), (1, 1, 1, 1), (6,), ()]
)
def test_bias(shape):
    bias = random(*shape, dtype=torch.float64, seed=9).requires_grad_()
    assert gradcheck(lambda q, k, v, b: heed.flash_attention(q, k, v, bias=b), (*small(), bias))


def test_bias_over_batches():
    for shape in [(3, 1, 4, 6), (3, 2, 1, 6), (1, 2, 4, 1), (3, 2, 4, 6)]:
        bias = random(*shape, dtype=torch.float64, seed=9).requires_grad_()
        assert gradcheck(
            lambda q, k, v, b: heed.flash_attention(q, k, v, bias=b, causal=True),
            (*small(b=3), bias),
        )


@pytest.mark.parametrize("name", ["alibi_slopes", "sink"])
def test_numbers_per_head(name):
    values = random(2, dtype=torch.float64, seed=5).abs().requires_grad_()

    def call(q, k, v, x):
        return heed.flash_attention(q, k, v, causal=True, return_lse=True, **{name: x})

    assert gradcheck(call, (*small(), values))


class SizesOfResults(TorchDispatchMode):
    """Numbers of elements of what an operator returned."""

    def __init__(self, op):
        super().__init__()
        self.op, self.sizes = op, None

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        results = func(*args, **(kwargs or {}))
        if func is self.op:
            self.sizes = [result.numel() for result in results]
        return results


def flash_varlen(q, k, v, **options):
    tokens = [t[0].transpose(0, 1) for t in (q, k, v)]
    ends = [torch.tensor([0, t.shape[0] - 1, t.shape[0]]) for t in tokens]
    return heed.flash_attention_varlen(*tokens, ends[0], ends[1], **options)


@pytest.mark.parametrize(
    "call, op, name, shape, place",
    [
        (heed.flash_attention, "flash_attention", "bias", (2, 4, 6), 4),
        (heed.flash_attention, "flash_attention", "alibi_slopes", (2,), 3),
        (heed.flash_attention, "flash_attention", "sink", (2,), 5),
        (flash_varlen, "flash_attention_varlen", "alibi_slopes", (2,), 3),
        (flash_varlen, "flash_attention_varlen", "sink", (2,), 4),
        (heed.sigmoid_attention, "sigmoid_attention", "bias", (2,), 3),
        (heed.sigmoid_attention, "sigmoid_attention", "alibi_slopes", (2,), 4),
    ],
)
def test_no_gradient_of_an_option_that_is_constant(call, op, name, shape, place):
    inputs = small()
    option = random(*shape, dtype=torch.float64, seed=3).abs()
    backward = getattr(torch.ops.heed, f"{op}_backward").default

    def gradients(x):
        out = call(*inputs, **{name: x})
        with SizesOfResults(backward) as seen:
            return torch.autograd.grad(out.sum(), [*inputs, x][: 3 + x.requires_grad]), seen.sizes

    expected, sizes = gradients(option.clone().requires_grad_())
    assert sizes[place] == option.numel()
    found, sizes = gradients(option)
    assert sizes[place] == 0
    assert all(map(torch.equal, found, expected))


def test_varlen():
    q, k, v = wanted(
        random(7, 4, 3, dtype=torch.float64, seed=1),
        random(9, 2, 3, dtype=torch.float64, seed=2),
        random(9, 2, 2, dtype=torch.float64, seed=3),
    )
    slopes = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64, requires_grad=True)
    cu_q, cu_k = torch.tensor([0, 3, 3, 7]), torch.tensor([0, 4, 6, 9], dtype=torch.int32)

    def call(q, k, v, slopes):
        return heed.flash_attention_varlen(
            q, k, v, cu_q, cu_k, causal=True, softcap=1.5, alibi_slopes=slopes, return_lse=True
        )

    out, lse = call(q, k, v, slopes)
    for b in range(3):
        rows, keys = slice(cu_q[b], cu_q[b + 1]), slice(cu_k[b], cu_k[b + 1])
        if rows.start == rows.stop:
            continue
        one, one_lse = heed.flash_attention(
            *(t.transpose(0, 1)[None] for t in (q[rows], k[keys], v[keys])),
            causal=True,
            softcap=1.5,
            alibi_slopes=slopes,
            return_lse=True,
        )
        assert torch.equal(out[rows], one[0].transpose(0, 1))
        assert torch.equal(lse[:, rows], one_lse[0])
    # One query more than keys in the last sequence: its first row sees nothing.
    assert gradcheck(lambda *a: call(*a)[0], (q, k, v, slopes))


def test_merge():
    q, k, v = small(lk=8)

    def call(q, k, v):
        parts = []
        for keys in (slice(0, 3), slice(3, 8)):
            parts += heed.flash_attention(q, k[:, :, keys], v[:, :, keys], return_lse=True)
        return heed.merge_attention(*parts)

    whole = heed.flash_attention(q, k, v, return_lse=True)
    for found, expected in zip(call(q, k, v), whole):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    assert gradcheck(call, (q, k, v))


@pytest.mark.parametrize(
    "options", [{}, dict(causal=True, bias=-0.5), dict(window=(1, 0), scale=0.4)]
)
def test_sigmoid(options):
    assert gradcheck(lambda *a: heed.sigmoid_attention(*a, **options), small())


def test_sigmoid_parameters():
    bias = random(2, dtype=torch.float64, seed=5).requires_grad_()
    slopes = random(2, dtype=torch.float64, seed=6).abs().requires_grad_()
    assert gradcheck(
        lambda q, k, v, b, s: heed.sigmoid_attention(q, k, v, bias=b, alibi_slopes=s),
        (*small(), bias, slopes),
    )


PER_HEAD = {
    "flash": lambda q, k, v, x: heed.flash_attention(
        q, k, v, alibi_slopes=x, sink=x, bias=x[:, None, None]
    ),
    "sigmoid": lambda q, k, v, x: heed.sigmoid_attention(q, k, v, bias=x, alibi_slopes=x),
    "affine": lambda q, k, v, x: heed.affine_scaled_attention(q, k, v, q[..., 0], x),
    "relu_linear": lambda q, k, v, x: heed.relu_linear_attention(q, k, v, x),
    "lightning": lambda q, k, v, x: heed.lightning_attention(q, k, v, x),
}


@pytest.mark.parametrize("name", PER_HEAD)
@pytest.mark.parametrize("b, h, l", [(0, 2, 4), (2, 2, 0), (2, 0, 4), (0, 0, 0)])
def test_nothing_to_attend_to_leaves_gradients_of_zero(name, b, h, l):
    values = torch.rand(h, requires_grad=True)
    inputs = wanted(*random_qkv(b, h, h, l, l, 8))
    PER_HEAD[name](*inputs, values).sum().backward()
    for x in (*inputs, values):
        assert torch.equal(x.grad, torch.zeros_like(x))


@pytest.mark.parametrize("cu", [[0], [0, 0, 0]])
def test_no_packed_tokens_leave_gradients_of_zero(cu):
    slopes, sink = torch.rand(2, requires_grad=True), torch.rand(2, requires_grad=True)
    tokens = torch.randn(0, 2, 8, requires_grad=True)
    cu = torch.tensor(cu)
    out = heed.flash_attention_varlen(
        tokens, tokens, tokens, cu, cu, alibi_slopes=slopes, sink=sink
    )
    out.sum().backward()
    assert torch.equal(slopes.grad, torch.zeros(2))
    assert torch.equal(sink.grad, torch.zeros(2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("shape", [(2, 3, 70, 90, 33, 17), (1, 2, 300, 300, 64, 64)])
def test_no_worse_than_twice_pytorch(dtype, causal, shape):
    b, h, lq, lk, d, dv = shape
    q, k, v = random_qkv(b, h, h, lq, lk, d, dv, dtype=dtype)
    g = random(b, h, lq, dv, dtype=dtype, seed=7)
    seen = torch.ones(lq, lk, dtype=torch.bool).tril(lk - lq) if causal else None

    def gradients(call, cast):
        inputs = wanted(*(t.to(cast) for t in (q, k, v)))
        return torch.autograd.grad(call(*inputs), inputs, g.to(cast))

    def peer(q, k, v):
        return torch_sdpa(q, k, v, seen)

    exact = gradients(peer, torch.float64)
    naive = gradients(peer, dtype)
    found = gradients(lambda *a: heed.flash_attention(*a, causal=causal), dtype)
    for f, n, e in zip(found, naive, exact):
        assert f.dtype == dtype and f.shape == e.shape
        bound = 2 * error(n, e) + 4 * torch.finfo(dtype).eps * e.abs().max().item()
        assert error(f, e) <= bound


@pytest.mark.parametrize("attn_mask", ["bool", "float"])
@pytest.mark.parametrize("lead", [(), (2,), (2, 3), (2, 1, 3)])
@pytest.mark.parametrize("full", [False, True])
def test_sdpa_with_masks(attn_mask, lead, full):
    q, k, v = wanted(*(random(*lead, n, 8, dtype=torch.float64, seed=n) for n in (5, 7, 7)))
    mask = random(*(lead if full else ()), 5, 7, dtype=torch.float64, seed=3)
    mask = mask > -0.5 if attn_mask == "bool" else mask.requires_grad_()
    results = []
    for call in (heed.scaled_dot_product_attention, torch_sdpa):
        out = call(q, k, v, mask)
        inputs = [q, k, v] + ([mask] if mask.requires_grad else [])
        results.append((out, *torch.autograd.grad(out.sin().sum(), inputs)))
    for found, expected in zip(*results):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def test_sdpa_dropout_follows_the_generator():
    q, k, v = random_qkv(1, 2, 2, 50, 60, 8)
    outs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        outs.append(heed.scaled_dot_product_attention(q, k, v, dropout_p=0.5))
    assert torch.equal(outs[0], outs[1]) and not torch.equal(outs[0], outs[2])


def test_dropout_keeps_the_mean():
    q, k = random(1, 1, 4, 8), random(1, 1, 4096, 8)
    v = torch.ones(1, 1, 4096, 8)
    out = heed.flash_attention(q, k * 0.1, v, dropout_p=0.25, seed=3)
    assert (out - 1).abs().max() < 0.1


def test_many_strides():
    q, k, v = random_qkv(2, 4, 2, 20, 30, 16, dtype=torch.float64)
    g = random(2, 4, 20, 16, dtype=torch.float64, seed=4)
    expected = torch.autograd.grad(heed.flash_attention(*(i := wanted(q, k, v))), i, g)
    moved = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k, v)]
    inputs = [t.requires_grad_() for t in moved]
    found = torch.autograd.grad(
        heed.flash_attention(*inputs), inputs, g.mT.contiguous().mT  # no unit stride
    )
    for f, e in zip(found, expected):
        torch.testing.assert_close(f, e, rtol=1e-12, atol=1e-12)


def test_same_bits_again():
    q, k, v = wanted(*random_qkv(1, 2, 1, 700, 700, 32))
    def run():
        return torch.autograd.grad(heed.flash_attention(q, k, v, causal=True).sum(), (q, k, v))
    for a, b in zip(run(), run()):
        assert torch.equal(a, b)


def test_results_that_no_gradient_needs_may_be_changed():
    x, weight = wanted(random(1, 2, 8, 4), random(4, 3))
    changed = heed.depthwise_causal_conv(x, weight)
    changed.mul_(2)
    gradients = torch.autograd.grad(changed.sum(), [x, weight])
    expected = torch.autograd.grad(2 * heed.depthwise_causal_conv(x, weight).sum(), [x, weight])
    for got, want in zip(gradients, expected, strict=True):
        assert torch.equal(got, want)
    q, k, v = wanted(*random_qkv(1, 2, 1, 4, 6, 3, 2))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        heed.flash_attention(q, k, v).mul_(2).sum().backward()


def test_second_derivatives_are_refused():
    q, k, v = small()
    (g,) = torch.autograd.grad(heed.flash_attention(q, k, v).sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="flash_attention_backward"):
        g.sum().backward()


def test_training_step_compiles():
    torch.compiler.reset()

    def loss(q, k, v, bias):
        out, lse = heed.flash_attention(q, k, v, causal=True, bias=bias, return_lse=True)
        return (heed.sigmoid_attention(out, k, v) ** 2).sum() + lse.sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    inputs = wanted(*random_qkv(2, 4, 2, 9, 9, 8), random(4, 9, 9, seed=3))
    expected = torch.autograd.grad(loss(*inputs), inputs)
    for found, e in zip(torch.autograd.grad(compiled(*inputs), inputs), expected):
        assert torch.equal(found, e)


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda f: f(mask=torch.ones(6)), ["mask", "booleans"]),
        (lambda f: f(mask=torch.ones(5, dtype=torch.bool)), ["mask", "[1,2,4,6]"]),
        (lambda f: f(bias=torch.ones(6, dtype=torch.bool)), ["bias", "mask"]),
        (lambda f: f(bias=torch.ones(4, 5)), ["bias", "[1,2,4,6]"]),
        (lambda f: f(sink=torch.ones(3)), ["sink", "[2]"]),
        (lambda f: f(alibi_slopes=torch.ones(3)), ["alibi_slopes", "[2]"]),
        (lambda f: f(softcap=-1.0), ["softcap", "-1"]),
        (lambda f: f(softcap=float("nan")), ["softcap", "nan"]),
        (lambda f: f(dropout_p=1.0), ["dropout_p", "1.0"]),
        (lambda f: f(dropout_p=-0.1), ["dropout_p", "-0.1"]),
        (lambda f: f(block_mask=BLOCKS), ["block_mask", "[2,1,1]"]),
        (lambda f: f(block_mask=BLOCKS, block_size=(0, 2)), ["block_size", "0"]),
        (lambda f: f(block_size=(0, -5)), ["block_size", "(0, -5)"]),
        (lambda f: f(mask=torch.ones((1,) * 7).bool()), ["mask", "7", "0 to 4"]),
        (lambda f: f(bias=torch.ones((1,) * 5)), ["bias", "5", "0 to 4"]),
        (lambda f: f(block_mask=BLOCKS.int(), block_size=(2, 2)), ["block_mask", "int32"]),
    ],
)
def test_mistakes(call, words):
    q, k, v = random_qkv(1, 2, 1, 4, 6, 3, 2)
    with pytest.raises(ValueError) as caught:
        call(lambda **options: heed.flash_attention(q, k, v, **options))
    for word in ["flash_attention", *words]:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    "options, words",
    [
        (dict(mask=torch.ones(6, dtype=torch.uint8)), ["mask", "Byte", "bool", "floating"]),
        (dict(bias=torch.ones(6) + 0j), ["bias", "ComplexFloat", "floating"]),
        (dict(block_size=(64, 64, 1)), ["block_size", "(64, 64, 1)", "two whole numbers"]),
        (dict(block_size=64), ["block_size", "64"]),
        (dict(block_size=(64, 0.5)), ["block_size", "0.5"]),
    ],
)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_type_mistakes(options, words, device):
    q, k, v = (t.to(device) for t in random_qkv(1, 2, 1, 4, 6, 3, 2))
    options = {n: x.to(device) if isinstance(x, torch.Tensor) else x for n, x in options.items()}
    with pytest.raises(TypeError) as caught:
        heed.flash_attention(q, k, v, **options)
    for word in ["flash_attention", *words]:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    "cu_q, cu_k, words",
    [
        ([0, 3], [0, 9], ["cu_seqlens_q", "3", "7"]),
        ([1, 7], [0, 9], ["cu_seqlens_q[0]", "1"]),
        ([0, 5, 4, 7], [0, 1, 2, 9], ["cu_seqlens_q[2]", "4"]),
        ([0, 7], [0, 4, 9], ["cu_seqlens_q", "1", "2"]),
        ([], [0, 9], ["cu_seqlens_q"]),
    ],
)
def test_varlen_mistakes(cu_q, cu_k, words):
    q, k = random(7, 4, 8), random(9, 2, 8)
    with pytest.raises(ValueError) as caught:
        heed.flash_attention_varlen(
            q, k, k, torch.tensor(cu_q, dtype=torch.int64), torch.tensor(cu_k)
        )
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_nan_in_a_query_reaches_only_what_the_query_sees(dtype):
    def reached(attend, q, k, v):
        k, v = (t.detach().requires_grad_() for t in (k, v))
        attend(q, k, v).nan_to_num(0).sum().backward()
        keys = [t.grad.isnan().any(-1).flatten() for t in (k, v)]
        assert torch.equal(*keys)
        return keys[0].nonzero().flatten().tolist()

    q, k, v = (random(1, 1, 70, 8, seed=i).to(dtype) for i in range(3))
    q[0, 0, 20] = float("nan")
    seen = torch.rand(70, 70, generator=torch.Generator().manual_seed(3)) < 0.3
    masked = reached(lambda *t: heed.flash_attention(*t, mask=seen), q, k, v)
    assert masked == seen[20].nonzero().flatten().tolist()
    q, k, v = (random(1, 10, 20, 1, 8, seed=i).to(dtype) for i in range(3))
    q[0, 4, 7] = float("nan")
    near = reached(lambda *t: heed.na2d(*t, 3), q, k, v)
    assert near == [20 * y + x for y in (3, 4, 5) for x in (6, 7, 8)]
