"""kernelized_rpe_attention against the sum over all pairs."""

import math

import heed
import linear_reference as formula
import pytest
import torch
from linear_reference import F64, assert_gradients_near, assert_near, double
from reference import DTYPES, random, random_qkv
from torch.autograd import gradcheck

FEATURES = ["nprf", "prf", "trf", "elu1"]
RPE = heed.kernelized_rpe_attention


def inputs(b, h, hkv, length, d, dv, m, features, dtype=torch.float32, extra=0, grid=None):
    """``(q, k, v, rpb, projection)``; trf gets small tokens, where its sums stay positive."""
    q, k, v = random_qkv(b, h, hkv, length, length, d, dv, torch.float32)
    size = 0.3 if features == "trf" else 1.0
    wide = formula.wide_type(dtype)
    shape = (h, 2 * (length + extra) - 1)
    if grid is not None:
        shape = (h, 2 * grid[0] - 1, 2 * grid[1] - 1)
    projection = None
    if features != "elu1":
        projection = heed.nn.random_projection(h, m, d, seed=5).to(wide)
    q, k, v = ((t * size).to(dtype) for t in (q, k, v))
    return q, k, v, random(*shape, dtype=wide, seed=6), projection


def check(tensors, roundings=256, **options):
    found = RPE(*tensors, **options)
    options.pop("path", None)
    expected = formula.kernelized_rpe(*double(tensors), **options)
    assert found.dtype == tensors[0].dtype
    size = tensors[2].double().abs().max() if found.numel() else None
    assert_near(found, expected, size, roundings=roundings)
    return found


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("features", FEATURES)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("path", ["auto", "fft", "direct"])
@pytest.mark.parametrize("length, d, dv, m", [(1, 1, 1, 1), (9, 5, 3, 7), (130, 16, 9, 20)])
def test_sizes(dtype, features, causal, path, length, d, dv, m):
    tensors = inputs(2, 4, 2, length, d, dv, m, features, dtype)
    check(tensors, features=features, causal=causal, path=path)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("path", ["fft", "direct"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("grid", [(1, 12), (12, 1), (5, 7)])
def test_grids(dtype, path, causal, grid):
    tensors = inputs(2, 2, 1, grid[0] * grid[1], 6, 5, 8, "nprf", dtype, grid=grid)
    check(tensors, causal=causal, grid=grid, path=path)


@pytest.mark.parametrize("path", ["fft", "direct"])
def test_longer_tables_use_their_centre(path):
    long = inputs(1, 2, 2, 20, 6, 5, 8, "nprf", extra=11)
    found = check(long, path=path)
    centre = long[3][:, 11:-11]
    assert torch.equal(RPE(*long[:3], centre, long[4], path=path), found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_parameters_of_the_inputs_type(dtype):
    q, k, v, rpb, projection = inputs(1, 2, 1, 30, 8, 5, 16, "prf", dtype)
    check((q, k, v, rpb.to(dtype), projection.to(dtype)), features="prf")


@pytest.mark.parametrize("path", ["fft", "direct"])
@pytest.mark.parametrize("features", FEATURES)
@pytest.mark.parametrize("options", [{}, dict(causal=True), dict(grid=(2, 3))])
def test_gradcheck(path, features, options):
    q, k, v, rpb, w = inputs(2, 2, 1, 6, 3, 2, 4, features, F64, grid=options.get("grid"))

    def call(q, k, v, rpb):
        return RPE(q, k, v, rpb, w, features=features, path=path, **options)

    assert gradcheck(call, [t.requires_grad_() for t in (q, k, v, rpb)])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("features", FEATURES)
@pytest.mark.parametrize("path", ["fft", "direct"])
def test_gradients(dtype, features, path):
    *tensors, w = inputs(1, 4, 2, 90, 8, 5, 12, features, dtype, extra=3)

    def ours(*tensors):
        return RPE(*tensors, w, features=features, causal=True, path=path)

    def exact(*tensors):
        return formula.kernelized_rpe(*tensors, double(w), features=features, causal=True)

    assert_gradients_near(ours, exact, tensors, roundings=1024)


def test_projection_has_no_gradient():
    *tensors, w = (t.requires_grad_() for t in inputs(1, 2, 2, 9, 4, 3, 5, "nprf"))
    with pytest.raises(ValueError, match=r"projection requires grad.*projection\.detach\(\)"):
        RPE(*tensors, w)
    with torch.no_grad():
        RPE(*tensors, w)
    RPE(*tensors, w.detach()).sum().backward()
    assert all(t.grad is not None for t in tensors)


@pytest.mark.parametrize("features", FEATURES)
def test_masked_offsets(features):
    """-inf masks: the diagonal alone gives v; nothing visible gives 0 with gradients 0."""
    q, k, v, rpb, w = inputs(1, 2, 2, 12, 4, 3, 5, features)
    only = torch.full_like(rpb, -math.inf)
    only[:, 11] = rpb[:, 11]
    assert_near(RPE(q, k, v, only, w, features=features), v.double(), roundings=256)
    tensors = [t.clone().requires_grad_() for t in (q, k, v, torch.full_like(rpb, -math.inf))]
    out = RPE(*tensors, w, features=features)
    assert not out.any()
    out.sum().backward()
    assert all(not t.grad.any() for t in tensors)


@pytest.mark.parametrize("path", ["auto", "fft"])
@pytest.mark.parametrize("features", FEATURES)
def test_nan_reaches_gradients_of_what_sees_it(features, path):
    *tensors, rpb, w = inputs(1, 2, 2, 9, 4, 3, 5, features)
    q, k, v = (t.requires_grad_() for t in tensors)

    def gradients(q, k, v, rows):
        out = RPE(q, k, v, rpb, w, features=features, causal=True, path=path)
        found = torch.autograd.grad(out[:, :, rows].sum(), (q, k, v))
        return [t.isnan().any(-1)[0, 0].tolist() for t in found]

    bad = torch.zeros_like(k)
    bad[:, :, 6] = math.nan
    only = [i == 6 for i in range(9)]
    assert gradients(q, k + bad, v, slice(0, 6))[0][:6] == [False] * 6
    assert gradients(q + bad, k, v, slice(0, 6))[0] == only
    for found in gradients(q + bad, k, v, slice(6, 9))[1:]:
        assert found == [i <= 6 for i in range(9)]


def test_identities():
    q, k, v, rpb, w = inputs(1, 2, 2, 40, 6, 5, 16, "nprf", F64)
    expected = RPE(q, k, v, rpb, w)
    torch.testing.assert_close(RPE(q, k, v, rpb + 3, w), expected)  # a constant cancels
    torch.testing.assert_close(RPE(q, k, torch.ones_like(v), rpb, w), torch.ones_like(v))
    torch.testing.assert_close(RPE(q * 7, k / 3, v, rpb, w), expected)  # only directions count
    zero = torch.zeros_like(rpb)
    fq, fk = heed.feature_map(q, "elu1"), heed.feature_map(k, "elu1")
    for causal in (False, True):
        found = RPE(q, k, v, zero, None, features="elu1", causal=causal)
        torch.testing.assert_close(found, heed.linear_attention(fq, fk, v, causal=causal))


@pytest.mark.parametrize("path", ["fft", "direct"])
def test_zero_vectors_and_large_tokens(path):
    q, k, v, rpb, w = inputs(1, 2, 2, 12, 4, 3, 5, "nprf")
    q[:, :, 3], k[:, :, 5] = 0, 0
    check((q * 100, k * 100, v, rpb, w), path=path)
    q, k, v, rpb, w = inputs(1, 2, 2, 12, 4, 3, 5, "prf")
    out = RPE(q * 100, k * 100, v, rpb, w, features="prf", path="direct" if path == "direct" else "auto")
    assert out.isfinite().all()


@pytest.mark.parametrize("change", ["keys", "window", "prf", "values"])
def test_rows_that_see_small_numbers_only(change):
    """4096 tokens and few features, where auto would take the transform."""
    q, k, v, rpb, w = inputs(1, 1, 1, 4096, 4, 1, 2, "prf")
    options = dict(features="prf" if change == "prf" else "elu1", causal=change != "window")
    w = w if change == "prf" else None
    rpb = torch.zeros_like(rpb)
    if change in ("keys", "window"):
        k[:, :, :100] -= 40
    if change == "window":
        rpb[:, : 4095 - 8], rpb[:, 4095 + 9 :] = -math.inf, -math.inf
    if change == "prf":
        q, k = q * 12, k * 12
    if change == "values":
        v[:, :, 3000] = 1e15
    tensors = [t.requires_grad_() for t in (q, k, v, rpb)]
    found, expected = (RPE(*tensors, w, path=path, **options) for path in ("auto", "direct"))
    assert torch.equal(found, expected)
    if change == "keys":
        ones = RPE(q, k, torch.ones_like(v), rpb, w, **options)
        torch.testing.assert_close(ones, torch.ones_like(v))
    grad = torch.ones_like(found)
    for a, b in zip(*(torch.autograd.grad(out, tensors, grad) for out in (found, expected))):
        assert torch.equal(a, b)
    with pytest.raises(ValueError, match="path is fft.*lie so far apart.*at most 1e-06"):
        RPE(*tensors, w, path="fft", **options)


def test_float64_by_transform_keeps_its_digits_or_is_refused():
    q, k, v, rpb, w = inputs(1, 1, 1, 257, 128, 16, 16, "prf", F64)
    check((q, k, v, rpb, w), features="prf", causal=True, path="fft")
    with pytest.raises(ValueError, match="path is fft.*lie so far apart.*at most 1e-10"):
        RPE(q * 3, k * 3, v, rpb, w, features="prf", causal=True, path="fft")


Q, K, V, B, W = inputs(2, 4, 2, 6, 8, 5, 7, "nprf")
WIDE = torch.linspace(0, 20, 11).expand(4, 11)


@pytest.mark.parametrize(
    "change, error, words",
    [
        (dict(k=K[:, :, :5], v=V[:, :, :5]), ValueError, ["q ", "k ", "as many keys as queries"]),
        (dict(v=V[:, :, :3]), ValueError, ["v ", "3", "6"]),
        (dict(rpb=B[:, 1:]), ValueError, ["rpb", "[4,10]", "2R-1"]),
        (dict(rpb=B[:, 1:-1]), ValueError, ["rpb", "[4,9]", "R >= 6"]),
        (dict(rpb=B[:3]), ValueError, ["rpb", "[3,11]", "[4,11]"]),
        (dict(rpb=B[0]), ValueError, ["rpb", "1 dimensions", "2"]),
        (dict(rpb=B.int()), ValueError, ["rpb", "int32", "float32"]),
        (dict(rpb=None), TypeError, ["rpb", "None"]),
        (dict(grid=(2, 3)), ValueError, ["rpb", "2 dimensions", "3"]),
        (dict(grid=(2, 4), rpb=torch.zeros(4, 3, 7)), ValueError, ["grid", "(2,4)", "6"]),
        (dict(grid=(2, 3), rpb=torch.zeros(4, 3, 7)), ValueError, ["rpb", "[4,3,7]", "[4,3,5]"]),
        (dict(grid=(6,), rpb=torch.zeros(4, 3, 7)), ValueError, ["grid", "1 numbers", "two"]),
        (dict(projection=None), ValueError, ["projection", "nprf", "[4,M,8]"]),
        (dict(projection=W[:, :, :3]), ValueError, ["projection", "[4,7,3]", "[4,7,8]"]),
        (dict(projection=W[0]), ValueError, ["projection", "2 dimensions", "3"]),
        (dict(features="elu1"), ValueError, ["projection", "elu1", "none"]),
        (dict(features="nprv"), ValueError, ["features", "did you mean 'nprf'"]),
        (dict(path="ftt"), ValueError, ["path", "did you mean 'fft'"]),
        (dict(path="fft", rpb=WIDE), ValueError, ["path is fft", "rpb", "direct"]),
    ],
)
def test_mistakes(change, error, words):
    with pytest.raises(error) as caught:
        RPE(**(dict(q=Q, k=K, v=V, rpb=B, projection=W) | change))
    for word in ["kernelized_rpe_attention", *words]:
        assert word in str(caught.value)
