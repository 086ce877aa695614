"""scaled_dot_product_attention is a drop-in for PyTorch's."""

import heed
import pytest
import torch
from reference import DTYPES, assert_accurate, random, random_qkv
from torch.nn.attention.bias import causal_lower_right, causal_upper_left
from torch.nn.functional import scaled_dot_product_attention as torch_sdpa


def check(q, k, v, **options):
    found = heed.scaled_dot_product_attention(q, k, v, **options)
    expected = torch_sdpa(q.double(), k.double(), v.double(), **options)
    assert found.dtype == q.dtype
    # PyTorch leaves NaN where a query sees no key (Lk = 0); here it is 0.
    assert_accurate(found, expected.nan_to_num(0.0), torch_sdpa(q, k, v, **options).nan_to_num(0.0))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize(
    "lead", [(), (1,), (4,), (2, 4), (1, 1), (2, 3, 4), (2, 1, 2, 4)], ids=str
)
def test_leading_dimensions(dtype, is_causal, lead):
    q, k, v = (random(*lead, 9, 16, dtype=dtype, seed=s) for s in (1, 2, 3))
    check(q, k, v, is_causal=is_causal)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "lq, lk", [(1, 1), (1, 9), (9, 1), (7, 40), (40, 7), (130, 150), (150, 130)]
)
@pytest.mark.parametrize("is_causal", [False, True])
def test_causal_is_aligned_to_the_start(dtype, lq, lk, is_causal):
    q = random(2, 3, lq, 12, dtype=dtype, seed=1)
    k, v = (random(2, 3, lk, 12, dtype=dtype, seed=s) for s in (2, 3))
    check(q, k, v, is_causal=is_causal)


@pytest.mark.parametrize("lq, lk", [(5, 40), (40, 5), (70, 30), (30, 70)])
def test_gradients_of_causal_calls(lq, lk):
    inputs = random_qkv(2, 3, 3, lq, lk, 12, dtype=torch.float64)
    inputs = [t.requires_grad_() for t in inputs]
    found, expected = (
        torch.autograd.grad(f(*inputs, is_causal=True).square().sum(), inputs)
        for f in (heed.scaled_dot_product_attention, torch_sdpa)
    )
    for f, e in zip(found, expected):
        torch.testing.assert_close(f, e, rtol=1e-10, atol=1e-10)


def test_export_leaves_lengths_open():
    class Attention(torch.nn.Module):
        def forward(self, q, k, v):
            return heed.scaled_dot_product_attention(q, k, v, is_causal=True)

    queries, keys = ({2: torch.export.Dim(name, max=64)} for name in ("queries", "keys"))
    inputs = random_qkv(1, 2, 2, 6, 9, 8)
    program = torch.export.export(Attention(), inputs, dynamic_shapes=(queries, keys, keys))
    for lq, lk in ((9, 6), (6, 6), (3, 50)):
        inputs = random_qkv(1, 2, 2, lq, lk, 8)
        assert torch.equal(program.module()(*inputs), Attention()(*inputs))


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("lq, lk", [(0, 5), (5, 0), (0, 0)])
def test_no_tokens(lq, lk, is_causal):
    q, k = random(2, 3, lq, 8), random(2, 3, lk, 8)
    found = heed.scaled_dot_product_attention(q, k, k, is_causal=is_causal)
    assert torch.equal(found, torch.zeros(2, 3, lq, 8))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lead, kv_lead", [((6,), (2,)), ((2, 6), (2, 3)), ((2, 2, 6), (2, 2, 1))])
def test_grouped_queries(dtype, lead, kv_lead):
    q = random(*lead, 9, 16, dtype=dtype, seed=1)
    k, v = (random(*kv_lead, 11, 16, dtype=dtype, seed=s) for s in (2, 3))
    check(q, k, v, enable_gqa=True, is_causal=True)


@pytest.mark.parametrize(
    "q_lead, k_lead, v_lead",
    [
        ((2, 4), (1, 4), (2, 1)),
        ((1, 4), (2, 4), (2, 4)),
        ((2, 4), (4,), (4,)),
        ((2, 4), (2, 1), ()),
    ],
    ids=str,
)
def test_leading_dimensions_broadcast(q_lead, k_lead, v_lead):
    q, k, v = random(*q_lead, 9, 16), random(*k_lead, 7, 16), random(*v_lead, 7, 16)
    check(q, k, v)


@pytest.mark.parametrize("dtype", DTYPES)
def test_any_stride_of_the_last_dimension(dtype):
    q, k, v = (random(2, 3, 16, 9, dtype=dtype, seed=s).mT for s in (1, 2, 3))
    check(q, k, v, is_causal=True)


@pytest.mark.parametrize("scale", [0.0, -0.5, 2.0])
def test_scale(scale):
    q, k, v = (random(2, 3, 9, 16, seed=s) for s in (1, 2, 3))
    check(q, k, v, scale=scale)


def test_value_dim_differs():
    q, k, v = random(2, 3, 9, 16), random(2, 3, 7, 16, seed=1), random(2, 3, 7, 5, seed=2)
    check(q, k, v, is_causal=True)


def test_positional_arguments_as_in_pytorch():
    q, k, v = (random(2, 3, 9, 16, seed=s) for s in (1, 2, 3))
    found = heed.scaled_dot_product_attention(q, k, v, None, 0.0, True)
    torch.testing.assert_close(found, torch_sdpa(q, k, v, None, 0.0, True))


@pytest.mark.parametrize("lq, lk", [(33, 33), (5, 33), (33, 5)])
@pytest.mark.parametrize("bias", [causal_upper_left, causal_lower_right])
@pytest.mark.filterwarnings("ignore:Lower right causal bias")
def test_causal_bias(bias, lq, lk):
    q = random(2, 3, lq, 16, seed=1)
    k, v = (random(2, 3, lk, 16, seed=s) for s in (2, 3))
    mask = bias(lq, lk)
    found = heed.scaled_dot_product_attention(q, k, v, mask)
    assert type(found) is torch.Tensor
    # Rows without a key are NaN or not with the release of PyTorch; here they are 0.
    expected = torch_sdpa(q, k, v, mask._materialize()).nan_to_num(0.0)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype):
    q, k, v = (random(2, 3, 9, 16, seed=s).requires_grad_() for s in (1, 2, 3))
    mask = random(9, 9, seed=4)
    with torch.autocast("cpu", dtype):
        for inputs in ((q, k, v), (q, k, v.to(dtype)), (q.half(), k.bfloat16(), v)):
            found = heed.scaled_dot_product_attention(*inputs, mask)
            cast = [t.to(dtype) for t in inputs]
            assert found.dtype == torch_sdpa(*inputs, mask).dtype == dtype
            assert torch.equal(found, heed.scaled_dot_product_attention(*cast, mask))
        doubles = [t.double() for t in (q, k, v)]
        assert heed.scaled_dot_product_attention(*doubles).dtype == torch_sdpa(*doubles).dtype
        with torch.autocast("cpu", enabled=False):
            assert heed.scaled_dot_product_attention(q, k, v).dtype == torch.float32
    found.sum().backward()
    assert q.grad.dtype == torch.float32 and q.grad.abs().sum() > 0


def test_autocast_compiled():
    torch.compiler.reset()
    q = random(2, 3, 9, 16)
    compiled = torch.compile(
        lambda q: heed.scaled_dot_product_attention(q, q, q, is_causal=True),
        fullgraph=True,
        backend="aot_eager",
    )
    plain = compiled(q)
    assert plain.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        cast = compiled(q)
    assert cast.dtype == torch.bfloat16
    low = q.bfloat16()
    expected = heed.scaled_dot_product_attention(low, low, low, is_causal=True)
    assert torch.equal(cast, expected)


Q = random(2, 4, 5, 8)


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda f: f(Q, Q, Q, torch.ones(5, 4, dtype=torch.bool)), ["attn_mask", "[5, 4]"]),
        (lambda f: f(Q, Q, Q, torch.ones(5, 5), is_causal=True), ["attn_mask", "is_causal"]),
        (lambda f: f(Q, Q, Q, None, 1.5), ["dropout_p", "1.5"]),
        (lambda f: f(Q[0, 0, 0], Q, Q), ["query", "[8]"]),
        (lambda f: f(Q, Q[:, :2], Q[:, :2]), ["key [2, 2, 5, 8]", "enable_gqa"]),
        (lambda f: f(Q, Q[:, :3], Q[:, :3], enable_gqa=True), ["4", "3"]),
        (lambda f: f(Q[0, 0], Q[0, 0], Q[0, 0], enable_gqa=True), ["enable_gqa", "3"]),
        (lambda f: f(Q, Q, Q, causal_upper_left(5, 4)), ["attn_mask", "[5, 4]", "[5, 5]"]),
        (lambda f: f(Q, Q, Q, causal_upper_left(5, 5), is_causal=True), ["attn_mask", "is_causal"]),
        (lambda f: f(Q, Q, Q[:, :, :2]), ["value [2,4,2,8]", "key [2,4,5,8]"]),
        (lambda f: f(Q, Q[..., :3], Q), ["query [2,4,5,8]", "key has head dim 3"]),
    ],
)
def test_errors_name_the_argument(call, words):
    with pytest.raises(ValueError) as caught:
        call(heed.scaled_dot_product_attention)
    for word in ["scaled_dot_product_attention: ", *words]:
        assert word in str(caught.value)


@pytest.mark.parametrize("wrong", [None, "0.1", torch.tensor(0.1)])
def test_a_dropout_probability_is_a_number(wrong):
    with pytest.raises(TypeError, match="scaled_dot_product_attention: dropout_p is"):
        heed.scaled_dot_product_attention(Q, Q, Q, dropout_p=wrong)


def nested(layout):
    parts = [random(4, 3, 8), random(4, 5, 8)]
    return torch.nested.nested_tensor(parts, layout=layout)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize(
    "call, words",
    [
        (lambda f: f(*[nested(torch.strided)] * 3), ["query", "nested", "dense"]),
        (lambda f: f(*[nested(torch.jagged)] * 3), ["query", "nested", "dense"]),
        (lambda f: f(Q, nested(torch.jagged), Q), ["key", "nested", "dense"]),
        (lambda f: f(Q, Q, nested(torch.strided)), ["value", "nested", "dense"]),
        (lambda f: f(Q.to_sparse(), Q, Q), ["query", "sparse_coo", "dense"]),
        (lambda f: f(Q, Q, Q.to_sparse()), ["value", "sparse_coo", "dense"]),
        (lambda f: f(Q, Q, Q, torch.ones(5, 5).bool().to_sparse()), ["attn_mask", "sparse_coo"]),
        (lambda f: f(Q, Q, Q, torch.ones(5, 5, dtype=torch.int32)), ["attn_mask", "int32", "bool"]),
        (lambda f: f(None, Q, Q), ["query", "None"]),
        (lambda f: f(Q[0], Q[0], [1.0]), ["value", "a list"]),
        (lambda f: f(Q, Q, Q, [True]), ["attn_mask", "a list"]),
        (lambda f: f(Q, Q.double(), Q), ["key", "float64", "float32"]),
        (lambda f: f(Q, Q, Q, torch.ones(5, 5) + 0j), ["attn_mask", "complex64", "floating"]),
    ],
)
def test_type_errors_name_the_argument(call, words):
    with pytest.raises(TypeError) as caught:
        call(heed.scaled_dot_product_attention)
    for word in ["scaled_dot_product_attention: ", *words]:
        assert word in str(caught.value)


def test_autocast_of_no_tensor():
    with torch.autocast("cpu"), pytest.raises(TypeError, match="key is None"):
        heed.scaled_dot_product_attention(Q, None, Q)


def test_dropping_every_weight():
    q = Q.clone().requires_grad_()
    out = heed.scaled_dot_product_attention(q, q, q, dropout_p=1.0)
    assert torch.equal(out, torch_sdpa(q, q, q, dropout_p=1.0))
    out.sum().backward()
    assert torch.equal(q.grad, torch.zeros_like(q))


def test_dropout_in_one_graph():
    torch.compiler.reset()

    def attend(x):
        return heed.scaled_dot_product_attention(x, x, x, dropout_p=0.5)

    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    x = random(2, 3, 5, 8)
    torch.manual_seed(3)
    found, next_found = compiled(x), compiled(x)
    torch.manual_seed(3)
    assert torch.equal(found, attend(x)) and torch.equal(next_found, attend(x))
    assert not torch.equal(found, next_found)
    assert torch._dynamo.explain(attend)(x).graph_break_count == 0
