"""flash_attention_varlen against plain float64 formulas and against batches."""

import math

import heed
import pytest
import torch
from reference import (
    DTYPES,
    assert_accurate,
    assert_lse,
    attention64,
    error,
    expect_mistake,
    naive_softmax,
    random,
    random_qkv,
    visible,
)

HEADS = 4
QUERIES, KEYS = (40, 0, 1, 9, 5), (53, 4, 0, 9, 2)  # of each sequence
TOKENS = {
    "q": random(sum(QUERIES), HEADS, 24, dtype=torch.float64, seed=1),
    "k": random(sum(KEYS), 2, 24, dtype=torch.float64, seed=2),
    "v": random(sum(KEYS), 2, 20, dtype=torch.float64, seed=3),
}
SLOPES = torch.tensor([0.5, 0.1, -0.01, 0.0], dtype=torch.float64)
SINK = random(HEADS, dtype=torch.float64, seed=4)

OPTIONS = {
    "plain": {},
    "sink": dict(sink=SINK),
    "dropout": dict(dropout_p=0.4, seed=11),
    "causal_sink": dict(causal=True, sink=SINK),
    "window_dropout": dict(window=(6, 3), dropout_p=0.1, seed=-1),
    "softcap_slopes": dict(causal=True, softcap=0.8, alibi_slopes=SLOPES),
    "all": dict(
        causal=True,
        window=(11, -1),
        softcap=1.5,
        alibi_slopes=SLOPES,
        sink=SINK,
        dropout_p=0.3,
        seed=2**64 - 7,
    ),
}


def ends(lengths, dtype=torch.int64):
    return torch.tensor([0, *lengths]).cumsum(0).to(dtype)


def inputs_of(options, dtype):
    """q, k, v and the options' tensors in a type, all wanting gradients."""
    given = {n: x for n, x in options.items() if isinstance(x, torch.Tensor)}
    return {n: x.to(dtype, copy=True).requires_grad_() for n, x in (TOKENS | given).items()}


def kept(options):
    """The dropout's factors ``[sequences, H, most queries, most keys]``: what is left of each key's
    own value in the mean of a batch."""
    lq, lk, p = max(QUERIES), max(KEYS), options.get("dropout_p", 0.0)
    zeros = [torch.zeros(len(QUERIES), HEADS, length, 1) for length in (lq, lk)]
    own = torch.eye(lk).expand(len(QUERIES), HEADS, lk, lk)
    mean = heed.flash_attention(*zeros, own, dropout_p=p, seed=options.get("seed", 0))
    return (mean > 0).double() / (1 - p)


def by_formula(formula, inputs, options):
    """A formula of reference.py applied to each sequence: ``[Tq,H,Dv]``, and ``[H,Tq]``."""
    factors = kept(options)
    parts = [t.split(n) for t, n in zip((inputs[n] for n in "qkv"), (QUERIES, KEYS, KEYS))]
    results = []
    for b, one in enumerate(zip(*parts)):
        q, k, v = (t.transpose(0, 1)[None] for t in one)
        lq, lk = q.shape[2], k.shape[2]
        seen = visible(lq, lk, options.get("causal", False), options.get("window", (-1, -1)))
        found = formula(
            q,
            k,
            v,
            seen,
            softcap=options.get("softcap", 0.0),
            slopes=inputs.get("alibi_slopes"),
            sink=inputs.get("sink"),
            kept=factors[b, :, :lq, :lk].to(q.dtype),
        )
        results.append(found if isinstance(found, tuple) else (found,))
    out, *lse = (torch.cat(part, 2)[0] for part in zip(*results))
    return out.transpose(0, 1), *lse


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("index_type", [torch.int32, torch.int64])
@pytest.mark.parametrize("name", OPTIONS)
def test_each_sequence_is_on_its_own(name, index_type, dtype):
    options = OPTIONS[name]
    inputs = inputs_of(options, dtype)
    boundaries = ends(QUERIES, index_type), ends(KEYS, index_type)
    with torch.no_grad():
        expected, expected_lse = by_formula(attention64, inputs, options)
        (naive,) = by_formula(naive_softmax, inputs, options)
        q, k, v = (inputs.pop(n) for n in "qkv")
        out, lse = heed.flash_attention_varlen(
            q, k, v, *boundaries, **(options | inputs), return_lse=True
        )
        strided = [t.transpose(0, 1).contiguous().transpose(0, 1) for t in (q, k, v)]
        again = heed.flash_attention_varlen(*strided, *boundaries, **(options | inputs))
    assert_accurate(out, expected, naive)
    assert_lse(lse, expected_lse)
    assert torch.equal(again, out)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", OPTIONS)
def test_gradients(name, dtype):
    options = OPTIONS[name]
    g = random(sum(QUERIES), HEADS, 20, dtype=dtype, seed=7)

    def gradients(call, cast):
        inputs = inputs_of(options, dtype)
        inputs = {n: x.detach().to(cast).requires_grad_() for n, x in inputs.items()}
        out = call(inputs)
        return torch.autograd.grad(out, list(inputs.values()), g.to(out.dtype))

    def heeds(inputs):
        tokens = [inputs[n] for n in "qkv"]
        given = options | {n: x for n, x in inputs.items() if n not in "qkv"}
        return heed.flash_attention_varlen(*tokens, ends(QUERIES), ends(KEYS), **given)

    exact = gradients(lambda x: by_formula(attention64, x, options)[0], torch.float64)
    naive = gradients(lambda x: by_formula(naive_softmax, x, options)[0], dtype)
    found = gradients(heeds, dtype)
    for f, n, e in zip(found, naive, exact, strict=True):
        assert f.dtype == dtype and f.shape == e.shape
        largest = max(1.0, e.abs().max().item())
        if dtype == torch.float64:
            assert error(f, e) <= 1e-11 * largest
        else:
            assert error(f, e) <= 2 * error(n, e) + 4 * torch.finfo(dtype).eps * largest


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("causal", [False, True])
def test_the_same_as_a_padded_batch(dtype, causal):
    # As many more keys than queries in each: then ends of sequences and of the padding agree.
    queries, more = torch.tensor([9, 0, 21, 4]), 6
    lq, lk = int(queries.max()), int(queries.max()) + more
    real = torch.arange(lq) < queries[:, None]
    real_keys = torch.arange(lk) < queries[:, None] + more
    batch = [t.requires_grad_() for t in random_qkv(4, HEADS, 2, lq, lk, 16, dtype=dtype)]
    numbers = [x.to(dtype, copy=True).requires_grad_() for x in (SLOPES.abs(), SINK)]
    options = dict(softcap=2.0, dropout_p=0.3, seed=5, causal=causal)
    options |= dict(alibi_slopes=numbers[0], sink=numbers[1])
    out, lse = heed.flash_attention(*batch, lengths=queries + more, return_lse=True, **options)
    padded = out.transpose(1, 2)[real], lse.transpose(1, 2)[real].T
    tokens = [t.transpose(1, 2)[m] for t, m in zip(batch, (real, real_keys, real_keys))]
    packed = heed.flash_attention_varlen(
        *tokens, ends(queries), ends(queries + more), return_lse=True, **options
    )
    tolerance = 1e-12 if dtype == torch.float64 else 4 * torch.finfo(dtype).eps
    statistics_tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(packed[0], padded[0], rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(
        packed[1], padded[1], rtol=statistics_tolerance, atol=statistics_tolerance
    )
    g = random(*padded[0].shape, dtype=dtype, seed=8)
    g_lse = random(*lse.transpose(1, 2)[real].T.shape, dtype=lse.dtype, seed=9)
    wanted = [*batch, *numbers]
    for found, expected in zip(
        torch.autograd.grad(packed, wanted, (g, g_lse)),
        torch.autograd.grad(padded, wanted, (g, g_lse)),
    ):
        largest = expected.abs().max().item()
        assert error(found, expected.double()) <= 4 * tolerance * max(1.0, largest)


def test_analytic_gradients():
    tokens = [
        random(n, h, 3, dtype=torch.float64, seed=h).requires_grad_() for n, h in ((7, 4), (9, 2))
    ]
    sink = SINK.clone().requires_grad_()
    cu_q, cu_k = torch.tensor([0, 3, 3, 7]), torch.tensor([0, 4, 6, 9])

    def call(q, k, sink):
        return heed.flash_attention_varlen(
            q, k, k, cu_q, cu_k, causal=True, sink=sink, dropout_p=0.4, seed=3, return_lse=True
        )

    assert torch.autograd.gradcheck(call, (*tokens, sink))


def test_a_query_without_keys_has_its_sink():
    sink = SINK.float().requires_grad_()
    q, k = random(3, HEADS, 8), random(5, 2, 8)
    out, lse = heed.flash_attention_varlen(
        q, k, k, ends([2, 1]), ends([0, 5]), sink=sink, return_lse=True
    )
    assert not out[:2].any()
    torch.testing.assert_close(lse[:, :2], sink[:, None].expand(HEADS, 2))
    lse[:, :2].sum().backward()
    torch.testing.assert_close(sink.grad, torch.full((HEADS,), 2.0))


@pytest.mark.parametrize(
    "options, words",
    [
        (dict(sink=torch.ones(3)), ["sink", "[3]", "[4]"]),
        (dict(sink=torch.ones(4, 1)), ["sink", "2", "1"]),
        (dict(sink=torch.ones(4).int()), ["sink", "int32"]),
        (dict(alibi_slopes=torch.ones(2)), ["alibi_slopes", "[2]", "[4]"]),
        (dict(softcap=-1.0), ["softcap", "-1"]),
        (dict(softcap=math.nan), ["softcap", "nan"]),
        (dict(dropout_p=1.0), ["dropout_p", "1.0"]),
        (dict(dropout_p=-0.1), ["dropout_p", "-0.1"]),
        (dict(dropout_p=math.nan), ["dropout_p", "nan"]),
    ],
)
def test_mistakes(options, words):
    q, k = random(7, HEADS, 8), random(9, 2, 8)
    given = dict(q=q, k=k, v=k, cu_seqlens_q=ends([7]), cu_seqlens_k=ends([9]))
    expect_mistake(heed.flash_attention_varlen, given | options, ValueError, words)
