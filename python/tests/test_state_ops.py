"""What every operator of the engine with a running state shares inside PyTorch."""

import heed
import pytest
import torch
from linear_reference import F64, features, flat, wide_type
from reference import DTYPES, random, random_qkv
from torch.library import opcheck

OPS = torch.ops.heed
QKV = random_qkv(2, 4, 2, 5, 7, 8, 6)
SELF = random_qkv(2, 4, 2, 6, 6, 8, 6)
FQ, FK = features(2, 4, 5, 8, seed=1), features(2, 2, 7, 8, seed=2)
SLOPES = torch.tensor([0.0, 0.1, 1.0, 8.0])
S, Z, V_SUM = random(2, 4, 8, 6, seed=4), features(2, 4, 8, seed=5), random(2, 4, 6, seed=6)
RPB, PROJECTION = random(4, 11, seed=7), random(4, 5, 8, seed=8)
LENGTHS = torch.tensor([7, 4])

# An operator's name, its tensors, its options. The tensors of 4 dimensions change their type.
CALLS = {
    "lightning": (OPS.lightning_attention, QKV, {}),
    "lightning_state": (
        OPS.lightning_attention,
        (*QKV, SLOPES),
        dict(initial_state=S, return_state=True),
    ),
    "linear": (OPS.linear_attention, (FQ, FK, QKV[2]), dict(lengths=LENGTHS)),
    "linear_state": (
        OPS.linear_attention,
        (FQ, FK, QKV[2]),
        dict(causal=True, initial_s=S, initial_z=Z, return_state=True),
    ),
    "linear_sum": (
        OPS.linear_attention,
        (FQ, FK, QKV[2]),
        dict(normalize=False, initial_s=S, return_state=True),
    ),
    "taylor": (OPS.taylor_state_attention, QKV, dict(order=3)),
    "taylor_state": (
        OPS.taylor_state_attention,
        QKV,
        dict(order=1, initial_s=random(2, 4, 9, 6, seed=9), initial_z=features(2, 4, 9) * 9, return_state=True),
    ),
    "mala": (OPS.magnitude_aware_linear_attention, SELF, dict(rope=(2, 3))),
    "mala_sums": (OPS.magnitude_aware_linear_attention, QKV, dict(return_state=True)),
    "mala_state": (
        OPS.magnitude_aware_linear_attention,
        QKV,
        dict(
            causal=True,
            initial_s=S,
            initial_k_sum=Z,
            initial_v_sum=V_SUM,
            initial_count=torch.tensor([3, 4]),
            return_state=True,
        ),
    ),
    "relu": (OPS.relu_linear_attention, (*QKV, SLOPES), dict(clamp=2.0)),
    "rpe": (OPS.kernelized_rpe_attention, (*SELF, RPB, PROJECTION), dict(causal=True)),
    "rpe_grid": (
        OPS.kernelized_rpe_attention,
        (*SELF, random(4, 3, 5), None),
        dict(features="elu1", grid=(2, 3), path="fft"),
    ),
    "map": (OPS.feature_map, (QKV[0], "hedgehog_exp"), {}),
    "map_weight": (
        OPS.feature_map,
        (QKV[0], "hedgehog_joint", random(4, 8, 3), random(4, 3)),
        {},
    ),
    "map_performer": (OPS.feature_map, (QKV[0], "performer", PROJECTION), {}),
    "loss": (OPS.attention_distillation_loss, (*QKV[:2], FQ, FK), dict(causal=True)),
    "loss_gradients": (
        OPS.attention_distillation_loss,
        (*QKV[:2], FQ, FK),
        dict(causal=True, gradients=True),
    ),
}


def call_of(name, dtype=torch.float32, grad=False):
    """``(op, args, options)`` with inputs of ``dtype``; parameters and states are wide."""
    op, args, options = CALLS[name]

    def cast(key, t):
        if not isinstance(t, torch.Tensor) or not t.is_floating_point():
            return t
        narrow = t.dim() == 4 and not str(key).startswith("initial")
        return t.to(dtype if narrow else wide_type(dtype), copy=True).requires_grad_(grad)

    args = tuple(cast(i, t) for i, t in enumerate(args))
    return op.default, args, {k: cast(k, t) for k, t in options.items()}


def tensors_of(args, options):
    return [t for t in (*args, *options.values()) if isinstance(t, torch.Tensor)]


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("grad", [False, True])
def test_opcheck(name, dtype, grad):
    opcheck(*call_of(name, dtype, grad))


@pytest.mark.parametrize("name", ["lightning_slopes", "hedgehog_identity", "performer_projection"])
def test_opcheck_of_parameters(name):
    args = {
        "lightning_slopes": (6, 1, 3),
        "hedgehog_identity": (2, 3, 4),
        "performer_projection": (2, 3, 4, 7),
    }
    opcheck(getattr(OPS, name).default, args[name], test_utils=["test_schema"])


@pytest.mark.parametrize("name", CALLS)
def test_second_derivatives_are_refused(name):
    op, args, options = call_of(name, grad=True)
    inputs = [t for t in tensors_of(args, options) if t.requires_grad]
    out = flat(op(*args, **options))[0]
    first = torch.autograd.grad(out.sum(), inputs, create_graph=True, allow_unused=True)
    gradient = next(g for g in first if g is not None)
    operator = op._schema.name.split("::")[1]
    with pytest.raises(RuntimeError, match=f"derivative for heed::{operator}_backward"):
        gradient.sum().backward()


@pytest.mark.parametrize("name", CALLS)
def test_missing_tensors_are_named(name):
    op, args, options = call_of(name)
    first = op._schema.arguments[0].name
    with pytest.raises(TypeError, match=f"{first} is None"):
        op(None, *args[1:], **options)


@pytest.mark.parametrize("name", CALLS)
def test_other_layouts_and_devices_are_refused(name):
    op, args, options = call_of(name)
    with pytest.raises(RuntimeError, match="Sparse"):
        op(args[0].to_sparse(), *args[1:], **options)
    if isinstance(args[-1], torch.Tensor):
        with pytest.raises(RuntimeError, match="meta"):
            op(*args[:-1], args[-1].to("meta"), **options)


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_strides(name, dtype):
    """Heads-last memory and slices of longer tensors give the same bits, also in the backward."""

    def strided(t):
        if not isinstance(t, torch.Tensor) or t.dim() != 4:
            return t
        wide = torch.full((*t.shape[:3], t.shape[3] + 3), 7.0, dtype=t.dtype)
        wide = wide.transpose(1, 2).contiguous().transpose(1, 2)[..., 1:-2]
        wide.copy_(t.detach())
        assert not wide.is_contiguous() and wide.stride(3) == 1
        return wide.detach().requires_grad_(t.requires_grad)

    op, args, options = call_of(name, dtype, grad=True)
    other_args = tuple(map(strided, args))
    other_options = {k: strided(t) for k, t in options.items()}
    expected, found = flat(op(*args, **options)), flat(op(*other_args, **other_options))
    for f, e in zip(found, expected, strict=True):
        assert torch.equal(f, e)
    weights = [random(*e.shape, dtype=e.dtype, seed=i) for i, e in enumerate(expected)]
    # Gradients whose last dimension is not dense are inputs of the backward too.
    other_weights = [
        w.mT.contiguous().mT if w.dim() > 1 else w for w in weights
    ]
    for results, seeds in ((expected, weights), (found, other_weights)):
        pairs = [(r, w) for r, w in zip(results, seeds) if r.requires_grad and r.numel()]
        torch.autograd.backward([r for r, _ in pairs], [w for _, w in pairs])
    for a, b in zip(tensors_of(args, options), tensors_of(other_args, other_options), strict=True):
        assert (a.grad is None) == (b.grad is None)
        if a.grad is not None:
            assert torch.equal(a.grad, b.grad)


@pytest.mark.parametrize("name", CALLS)
def test_threads_do_not_change_results(name):
    op, args, options = call_of(name)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(flat(op(*args, **options)))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


# --- empty tensors -------------------------------------------------------------------------------


@pytest.mark.parametrize("b, h, hkv, lq, lk", [(0, 2, 1, 3, 3), (1, 0, 0, 3, 3), (1, 2, 1, 0, 5), (1, 2, 1, 0, 0)])
def test_no_batch_heads_or_queries(b, h, hkv, lq, lk):
    q, k, v = (t.requires_grad_() for t in random_qkv(b, h, hkv, lq, lk, 4, 3))
    for op in (
        heed.lightning_attention,
        heed.linear_attention,
        heed.taylor_state_attention,
        lambda *t, **o: heed.magnitude_aware_linear_attention(*t, causal=True, **o),
    ):
        out, state = op(q, k, v, return_state=True)
        assert out.shape == (b, h, lq, 3)
        sum(t.sum() for t in flat((out, state))).backward()
        assert q.grad.shape == q.shape and v.grad.isfinite().all()
    assert heed.relu_linear_attention(q, k, v, torch.ones(h)).shape == (b, h, lq, 3)
    assert heed.feature_map(q, "taylor2").shape == (b, h, lq, 21)
    if lq == lk:
        table = torch.zeros(h, 2 * max(lq, 1) - 1, requires_grad=True)
        out = heed.kernelized_rpe_attention(q, k, v, table, None, features="elu1")
        assert out.shape == (b, h, lq, 3)
        out.sum().backward()
        assert not table.grad.any()


def test_no_keys():
    """Queries without keys read the state alone, and 0 without one."""
    q, k, v = random_qkv(1, 2, 1, 3, 0, 8, 6)
    for op in (heed.lightning_attention, heed.linear_attention, heed.taylor_state_attention):
        out, state = op(q, k, v, return_state=True)
        assert not out.any() and not any(t.any() for t in flat(state))
    s, z = S[:1, :2], Z[:1, :2]
    found = heed.linear_attention(q.abs(), k, v, initial_state=(s, z))
    expected = q.abs() @ s / (q.abs() @ z[..., None])
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_no_tokens_leave_the_state_alone():
    q, k, v = random_qkv(2, 4, 2, 0, 0, 8, 6)
    _, state = heed.lightning_attention(q, k, v, SLOPES, initial_state=S, return_state=True)
    assert torch.equal(state, S)
    _, state = heed.linear_attention(q, k, v, causal=True, initial_state=(S, Z), return_state=True)
    assert torch.equal(state[0], S) and torch.equal(state[1], Z)


# --- torch.compile -------------------------------------------------------------------------------


def everything(q, k, v, slopes, weight, rpb, projection):
    fq = heed.feature_map(q, "hedgehog_joint", weight)
    fk = heed.feature_map(k, "hedgehog_joint", weight)
    vq = v.repeat_interleave(q.shape[1] // v.shape[1], 1)
    grid = (1, q.shape[2])
    out, state = heed.lightning_attention(q, k, v, slopes, return_state=True)
    more, _ = heed.lightning_attention(q, k, v, slopes, initial_state=state, return_state=True)
    linear, sums = heed.linear_attention(fq, fk, vq, causal=True, return_state=True)
    linear2 = heed.linear_attention(fq, fk, vq, causal=True, initial_state=sums)
    taylor, sums = heed.taylor_state_attention(q, k, v, order=2, return_state=True)
    taylor2 = heed.taylor_state_attention(q, k, v, order=2, initial_state=sums)
    mala, sums = heed.magnitude_aware_linear_attention(q, k, v, causal=True, return_state=True)
    mala2 = heed.magnitude_aware_linear_attention(q, k, v, causal=True, initial_state=sums)
    mala3 = heed.magnitude_aware_linear_attention(q, k, v, rope=grid)
    relu = heed.relu_linear_attention(q, k, v, slopes + 1)
    rpe = heed.kernelized_rpe_attention(q, k, v, rpb, projection)
    rpe2 = heed.kernelized_rpe_attention(q, k, v, rpb[:, None], projection, grid=grid)
    loss = heed.attention_distillation_loss(q, k, fq, fk, causal=True)
    ends = (out, more, linear, linear2, taylor, taylor2, mala, mala2, mala3, relu, rpe, rpe2)
    return sum((t.double() ** 2).mean() for t in ends) + loss


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compile(dynamic, dtype):
    torch.compiler.reset()
    compiled = torch.compile(everything, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for b, length in [(2, 6), (3, 9)]:
        inputs = [
            *random_qkv(b, 4, 4, length, length, 8, 6, dtype=dtype),
            SLOPES.clone(),
            random(4, 8, 3, seed=5),
            random(4, 2 * length - 1, seed=6),
        ]
        inputs = [t.requires_grad_() for t in inputs]
        expected = torch.autograd.grad(everything(*inputs, PROJECTION), inputs)
        found = torch.autograd.grad(compiled(*inputs, PROJECTION), inputs)
        for f, e in zip(found, expected, strict=True):
            assert torch.equal(f, e)


def test_parameters_compile():
    torch.compiler.reset()

    def make():
        return (
            heed.lightning_slopes(4, 1, 3),
            heed.nn.hedgehog_identity(2, 3),
            heed.nn.random_projection(2, 3, 4, seed=5),
            heed.random_permutation(1, (2, 7)),
        )

    compiled = torch.compile(make, fullgraph=True, backend="aot_eager")
    for found, expected in zip(compiled(), make(), strict=True):
        assert torch.equal(found, expected)


# --- fake tensors --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda q, k, v: heed.lightning_attention(q, k[..., :3], v), "k has head dim 3"),
        (lambda q, k, v: heed.linear_attention(q, k, v[:, :, :2]), "v has length 2"),
        (lambda q, k, v: heed.taylor_state_attention(q, k, v, order=4), "order is 4"),
        (lambda q, k, v: heed.magnitude_aware_linear_attention(q, k, v, form="x"), "form is 'x'"),
        (lambda q, k, v: heed.kernelized_rpe_attention(q, k, v, v[0, :, 0], None), "k has length"),
        (lambda q, k, v: heed.feature_map(q, "performer"), "weight is missing"),
        (lambda q, k, v: heed.attention_distillation_loss(q, k, q, v), "feature_k has head dim 6"),
    ],
)
def test_fake_tensors_are_checked(call, words):
    with pytest.raises(ValueError, match=words):
        call(*(t.to("meta") for t in QKV))
