"""feature_map, attention_distillation_loss and the parameters of heed.nn."""

import math

import heed
import linear_reference as formula
import pytest
import torch
from linear_reference import F64, assert_gradients_near, assert_near, double, features
from reference import DTYPES, random
from torch.autograd import gradcheck

KINDS = [
    "elu1",
    "relu",
    "exp",
    "hedgehog_exp",
    "hedgehog_softmax",
    "hedgehog_exp_max",
    "hedgehog_joint",
    "taylor2",
    "performer",
]
SAFE = ["hedgehog_softmax", "hedgehog_exp_max", "hedgehog_joint"]


def parameters(kind, h, d, width, dtype=torch.float32):
    """``(weight, bias)`` of a kind."""
    if kind == "performer":
        return heed.nn.random_projection(h, width, d, seed=3).to(dtype), None
    return random(h, d, width, dtype=dtype, seed=5) / math.sqrt(d), random(h, width, seed=6).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("length, d, width", [(1, 1, 1), (7, 5, 9), (65, 33, 33), (40, 64, 100)])
def test_kinds(dtype, kind, length, d, width):
    x = random(2, 3, length, d, dtype=dtype) / 2
    wide = formula.wide_type(dtype)
    for own in {dtype, wide}:  # parameters may be float32 beside 16 bits
        weight, bias = parameters(kind, 3, d, width, own)
        found = heed.feature_map(x, kind, weight, bias)
        expected = formula.feature_map(*double((x,)), kind, *double((weight, bias)))
        assert found.dtype == dtype
        assert_near(found, expected, roundings=128)
    if kind != "performer":
        assert_near(heed.feature_map(x, kind), formula.feature_map(x.double(), kind), roundings=128)
        found = heed.feature_map(x, kind, weight)
        expected = formula.feature_map(x.double(), kind, weight.double())
        assert_near(found, expected, roundings=128)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("with_parameters", [False, True])
def test_gradcheck(kind, with_parameters):
    x = random(2, 3, 4, 4, dtype=F64)
    weight, bias = parameters(kind, 3, 4, 5, F64)
    given = [t for t in (weight, bias) if t is not None] if with_parameters else []
    if kind == "performer":
        given = [weight]

    def call(x, *given):
        return heed.feature_map(x, kind, *given)

    assert gradcheck(call, [t.requires_grad_() for t in (x, *given)])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_gradients(dtype, kind):
    x = random(2, 3, 70, 20, dtype=dtype) / 2
    weight, bias = parameters(kind, 3, 20, 17, formula.wide_type(dtype))
    given = [t for t in (weight, bias) if t is not None]
    assert_gradients_near(
        lambda x, *given: heed.feature_map(x, kind, *given),
        lambda x, *given: formula.feature_map(x, kind, *given),
        (x, *given),
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", SAFE)
@pytest.mark.parametrize("size", [100, 1000, 10000])
def test_large_inputs_of_safe_kinds(dtype, kind, size):
    x = (random(1, 2, 9, 16, dtype=F64) * size / 3).to(dtype).requires_grad_()
    found = heed.feature_map(x, kind)
    floor = 6e-8 if dtype == torch.float16 else 1e-12
    expected = formula.feature_map(x.detach().double(), kind).clamp(min=floor)
    torch.testing.assert_close(
        found.double(), expected, rtol=4 * torch.finfo(dtype).eps + 1e-6, atol=floor
    )
    assert (found > 0).all()
    found.sum().backward()
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("kind", SAFE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_linear_attention_over_large_safe_features(kind, dtype):
    """|x| = 100: features as small as their floor, denominators near zero, everything finite."""
    q, k = ((random(1, 2, 40, 8, dtype=F64, seed=s).sign() * 100).to(dtype) for s in (1, 2))
    v = random(1, 2, 40, 4, dtype=dtype, seed=3)
    inputs = [t.requires_grad_() for t in (q, k, v)]
    fq, fk = (heed.feature_map(t, kind) for t in inputs[:2])
    out = heed.linear_attention(fq, fk, v, causal=True)
    expected, _ = formula.linear(*double((fq.detach(), fk.detach(), v.detach())), causal=True)
    assert_near(out, expected, v.detach().abs().max(), inputs=dtype)
    out.sum().backward()
    assert all(t.grad.isfinite().all() for t in inputs)


@pytest.mark.parametrize("kind", KINDS)
def test_nan_stays_in_its_row(kind):
    x = random(1, 1, 6, 4)
    weight, bias = parameters(kind, 1, 4, 4)
    expected = heed.feature_map(x, kind, weight, bias)
    x[0, 0, 2, 1] = math.nan
    found = heed.feature_map(x, kind, weight, bias)
    others = [0, 1, 3, 4, 5]
    assert found[0, 0, 2].isnan().any()
    assert torch.equal(found[:, :, others], expected[:, :, others])


def test_taylor_features_are_the_polynomial():
    q, k = random(1, 1, 9, 7, dtype=F64), random(1, 1, 9, 7, dtype=F64, seed=1)
    s = q @ k.mT / math.sqrt(7)
    found = heed.feature_map(q, "taylor2") @ heed.feature_map(k, "taylor2").mT
    torch.testing.assert_close(found, 1 + s + s * s / 2)


# --- parameters ----------------------------------------------------------------------------------


@pytest.mark.parametrize("orthogonal", [False, True])
def test_random_projections(orthogonal):
    found = heed.nn.random_projection(3, 20, 8, seed=7, orthogonal=orthogonal)
    assert found.shape == (3, 20, 8) and found.dtype == torch.float32
    assert torch.equal(found, heed.nn.random_projection(3, 20, 8, seed=7, orthogonal=orthogonal))
    assert not torch.equal(found, heed.nn.random_projection(3, 20, 8, seed=8, orthogonal=orthogonal))
    products = found.double() @ found.double().mT
    off = products[:, :8, :8] - torch.diag_embed(products[:, :8, :8].diagonal(dim1=1, dim2=2))
    assert (off.abs().max() < 1e-4) == orthogonal


@pytest.mark.parametrize("orthogonal", [False, True])
def test_random_projections_are_normal(orthogonal):
    numbers = heed.nn.random_projection(16, 512, 16, orthogonal=orthogonal).double()
    count = numbers.numel()
    assert abs(numbers.mean()) < 5 / math.sqrt(count)
    assert abs(numbers.var() - 1) < 5 * math.sqrt(2 / count)
    assert abs((numbers**4).mean() - 3) < 5 * math.sqrt(96 / count)


def test_performer_features_estimate_the_exponential():
    q, k = random(1, 1, 4, 8, dtype=F64) / 2, random(1, 1, 4, 8, dtype=F64, seed=1) / 2
    w = heed.nn.random_projection(1, 65536, 8).double()
    found = heed.feature_map(q, "performer", w) @ heed.feature_map(k, "performer", w).mT
    torch.testing.assert_close(found, (q @ k.mT / math.sqrt(8)).exp(), rtol=0.03, atol=0)


def test_hedgehog_identity():
    assert torch.equal(heed.nn.hedgehog_identity(2, 5), torch.eye(5).expand(2, 5, 5))
    assert torch.equal(heed.nn.hedgehog_identity(1, 3, 5)[0], torch.eye(3, 5))
    assert torch.equal(heed.nn.hedgehog_identity(1, 5, 3)[0], torch.eye(5, 3))
    x = random(1, 2, 4, 6)
    weight, bias = heed.nn.hedgehog_identity(2, 6), torch.zeros(2, 6)
    for kind in KINDS[3:7]:
        assert_near(heed.feature_map(x, kind, weight, bias), heed.feature_map(x, kind).double())


def test_slopes_are_in_nn():
    assert heed.nn.lightning_slopes is heed.lightning_slopes


# --- attention_distillation_loss -----------------------------------------------------------------


def loss_inputs(b, h, hkv, hf, lq, lk, d, f, dtype=torch.float32):
    return (
        random(b, h, lq, d, dtype=dtype, seed=1),
        random(b, hkv, lk, d, dtype=dtype, seed=2),
        features(b, h, lq, f, dtype=dtype, seed=3),
        features(b, hf, lk, f, dtype=dtype, seed=4),
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("hkv, hf", [(4, 4), (2, 4), (2, 1)])
@pytest.mark.parametrize("lq, lk, d, f", [(1, 2, 1, 2), (7, 9, 5, 3), (70, 131, 33, 40)])
def test_loss(dtype, causal, hkv, hf, lq, lk, d, f):
    tensors = loss_inputs(2, 4, hkv, hf, lq, lk, d, f, dtype)
    found = heed.attention_distillation_loss(*tensors, causal=causal, scale=0.7)
    expected = formula.distillation(*double(tensors), causal=causal, scale=0.7)
    assert found.shape == () and found.dtype == formula.wide_type(dtype)
    tolerance = 1e-12 if dtype == F64 else 2e-6
    torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance)
    q, k, fq, fk = tensors
    assert_gradients_near(
        lambda *f: heed.attention_distillation_loss(q, k, *f, causal=causal),
        lambda *f: formula.distillation(*double((q, k)), *f, causal=causal),
        (fq, fk),
    )


def test_features_of_float32_beside_16_bits():
    q, k, fq, fk = loss_inputs(1, 2, 2, 2, 30, 30, 8, 6, torch.bfloat16)
    found = heed.attention_distillation_loss(q, k, fq.float(), fk.float())
    expected = formula.distillation(*double((q, k, fq, fk)))
    torch.testing.assert_close(found.double(), expected, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("lq, lk", [(4, 6), (6, 4)])
def test_loss_gradcheck(causal, lq, lk):
    q, k, fq, fk = loss_inputs(2, 4, 2, 1, lq, lk, 3, 2, F64)

    def call(fq, fk):
        return heed.attention_distillation_loss(q, k, fq, fk, causal=causal)

    assert gradcheck(call, [fq.requires_grad_(), fk.requires_grad_()])


def test_one_key_leaves_nothing_to_learn():
    inputs = [t.requires_grad_() for t in loss_inputs(2, 2, 1, 1, 1, 1, 3, 4)]
    loss = heed.attention_distillation_loss(*inputs)
    loss.backward()
    assert loss.abs() <= 1e-6
    assert all(t.grad.abs().max() <= 1e-6 for t in inputs[2:])


def test_teacher_is_detached():
    q, k, fq, fk = (t.requires_grad_() for t in loss_inputs(1, 2, 2, 2, 9, 9, 4, 3))
    heed.attention_distillation_loss(q, k, fq, fk).backward()
    assert q.grad is None and k.grad is None
    assert fq.grad.any() and fk.grad.any()
    assert not heed.attention_distillation_loss(q, k, fq.detach(), fk.detach()).requires_grad


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_made_with_the_loss_are_those_of_the_backward(dtype):
    q, k, fq, fk = loss_inputs(2, 4, 2, 1, 70, 131, 33, 40, dtype)
    found = []
    for gradients in (True, False):
        inputs = [t.clone().requires_grad_() for t in (fq, fk)]
        loss = torch.ops.heed.attention_distillation_loss(
            q, k, *inputs, causal=True, gradients=gradients
        )[0]
        (3 * loss).backward()
        found.append((loss.detach(), *(t.grad for t in inputs)))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)
        assert a.dtype == b.dtype


def test_loss_of_equal_weights_is_the_entropy():
    """Identity: cross-entropy is at least the teacher's entropy, and equal where A = P."""
    q, k, fq, fk = loss_inputs(1, 1, 1, 1, 12, 12, 1, 1, F64)
    weights = (q @ k.mT).softmax(-1)
    entropy = -(weights * weights.log()).sum(-1).mean()
    one_hot = torch.eye(12, dtype=F64)[None, None]
    found = heed.attention_distillation_loss(q, k, weights, one_hot, scale=1.0)
    torch.testing.assert_close(found, entropy)
    assert heed.attention_distillation_loss(q, k, fq, fk, scale=1.0) > entropy
    uniform = heed.attention_distillation_loss(q, k, torch.ones_like(fq), torch.ones_like(fk))
    torch.testing.assert_close(uniform, torch.tensor(math.log(12), dtype=F64))


# --- mistakes ------------------------------------------------------------------------------------

X = random(2, 4, 5, 8)


@pytest.mark.parametrize(
    "args, error, words",
    [
        ((None, "elu1"), TypeError, ["x ", "None"]),
        ((X[0], "elu1"), ValueError, ["x ", "3", "4"]),
        ((X.int(), "elu1"), TypeError, ["x ", "int32"]),
        ((random(2, 4, 8, 5).mT, "elu1"), ValueError, ["x ", "stride"]),
        ((random(1, 1, 2, 257), "elu1"), ValueError, ["x ", "257", "256"]),
        ((X[..., :0], "elu1"), ValueError, ["x ", "head dim 0"]),
        ((X, "hedgehog"), ValueError, ["kind", "'hedgehog'", "known", "hedgehog_exp"]),
        ((X, "hedgehog_sofmax"), ValueError, ["did you mean 'hedgehog_softmax'"]),
        ((X, "performer"), ValueError, ["weight is missing", "[4,M,8]"]),
        ((X, "performer", torch.ones(4, 3, 7)), ValueError, ["weight", "[4,3,7]", "[4,3,8]"]),
        ((X, "performer", torch.ones(4, 3, 8), torch.ones(4, 3)), ValueError, ["bias", "none"]),
        ((X, "exp", torch.ones(3, 8, 8)), ValueError, ["weight", "[3,8,8]", "[4,8,8]"]),
        ((X, "exp", torch.ones(8, 8)), ValueError, ["weight", "2 dimensions", "3"]),
        ((X, "exp", torch.ones(4, 8, 6), torch.ones(4, 8)), ValueError, ["bias", "[4,6]"]),
        ((X, "exp", torch.ones(4, 8, 8).int()), ValueError, ["weight", "int32", "float32"]),
    ],
)
def test_mistakes(args, error, words):
    with pytest.raises(error) as caught:
        heed.feature_map(*args)
    for word in ["feature_map", *words]:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    "change, error, words",
    [
        (dict(q=None), TypeError, ["q ", "None"]),
        (dict(k=X.half()), TypeError, ["k ", "float16", "float32"]),
        (dict(feature_q=X[:, :2]), ValueError, ["feature_q", "[2,2,5,8]"]),
        (dict(feature_k=X[..., :3]), ValueError, ["feature_k", "[2,4,5,3]"]),
        (dict(feature_q=X.half()), ValueError, ["feature_q", "float16", "float32"]),
        (dict(feature_k=X[:, :3]), ValueError, ["feature_k", "4 heads", "3"]),
        (dict(scale=math.inf), ValueError, ["scale", "inf"]),
    ],
)
def test_loss_mistakes(change, error, words):
    with pytest.raises(error) as caught:
        heed.attention_distillation_loss(**(dict(q=X, k=X, feature_q=X, feature_k=X) | change))
    for word in ["attention_distillation_loss", *words]:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda nn: nn.hedgehog_identity(-1, 3), ValueError, "hedgehog_identity: num_heads is -1"),
        (lambda nn: nn.hedgehog_identity(1, 3, -2), ValueError, "hedgehog_identity: width is -2"),
        (lambda nn: nn.random_projection(-1, 3, 4), ValueError, "random_projection: num_heads"),
        (lambda nn: nn.random_projection(2, -3, 4), ValueError, "num_features is -3"),
        (lambda nn: nn.random_projection(2, 3, 0.5), TypeError, "random_projection: dim is 0.5"),
    ],
)
def test_mistakes_about_parameters(call, error, message):
    with pytest.raises(error, match=message):
        call(heed.nn)
