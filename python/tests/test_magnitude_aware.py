"""magnitude_aware_linear_attention and relu_linear_attention against sums over all pairs."""

import math

import heed
import linear_reference as formula
import pytest
import torch
from linear_reference import F64, assert_gradients_near, assert_near, double
from reference import DTYPES, expect_mistake, random, random_qkv
from torch.autograd import gradcheck

MALA = heed.magnitude_aware_linear_attention
FORMS = [dict(form="code"), dict(form="code", scale=0.3), dict(form="paper", eps=1e-3)]


def check(q, k, v, causal=False, **options):
    """The two terms of a row cancel; each has the size of ``(1 + z) max|v|``, z the magnitude."""
    exact = formula.magnitude_aware(
        *double((q, k, v)), causal=causal, **{n: double(o) for n, o in options.items()}
    )
    dots = formula.elu1(q.double()) @ formula.elu1(formula.repeat_heads(k, q.shape[1]).double()).mT
    state = options.get("initial_state")
    if state is not None:
        dots = dots + (formula.elu1(q.double()) * state[1][:, :, None]).sum(-1, keepdim=True).double()
    z = dots.abs().sum(-1).max() if dots.numel() else 0.0
    if options["form"] == "code":
        scale = options.get("scale", 1 / math.sqrt(q.shape[3]))
        z = scale * (dots.abs().max() if dots.numel() else 0.0)
    size = (1 + z) * (v.double().abs().max() if v.numel() else 0.0)
    if causal:
        out, state = MALA(q, k, v, causal=True, return_state=True, **options)
        for found, expected in zip(state, exact[1], strict=True):
            assert found.dtype == formula.wide_type(q.dtype)
            assert_near(found, expected, v.double().abs().sum(2).max() if v.numel() else 0.0)
        assert torch.equal(MALA(q, k, v, causal=True, **options), out)
    else:
        out = MALA(q, k, v, **options)
    assert out.dtype == q.dtype
    assert_near(out, exact[0], size)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("options", FORMS)
@pytest.mark.parametrize("lq, lk", [(1, 1), (7, 7), (63, 200), (200, 63), (130, 130)])
@pytest.mark.parametrize("d, dv", [(1, 3), (32, 17)])
def test_sizes(dtype, causal, options, lq, lk, d, dv):
    check(*random_qkv(2, 4, 2, lq, lk, d, dv, dtype), causal=causal, **options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", ["code", "paper"])
@pytest.mark.parametrize("d", [4, 8, 20])
@pytest.mark.parametrize("grid", [(1, 1), (5, 7), (12, 11)])
def test_rotation(dtype, form, d, grid):
    length = grid[0] * grid[1]
    check(*random_qkv(2, 2, 1, length, length, d, 6, dtype), form=form, rope=grid)
    check(*random_qkv(2, 2, 1, 29, 29, d, 6, dtype), causal=True, form=form, rope=grid)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rope", [None, (6, 7)])
@pytest.mark.parametrize("form", ["code", "paper"])
@pytest.mark.parametrize("kind", [None, torch.int32, torch.int64])
@pytest.mark.parametrize("lq, lk", [(1, 1), (40, 40), (20, 61)])
def test_initial_state(dtype, rope, form, kind, lq, lk):
    before = random_qkv(2, 4, 2, 33, 33, 8, 5, dtype)
    _, state = MALA(*before, causal=True, form=form, rope=rope, return_state=True)
    if kind is not None:
        state = (*state[:3], state[3].to(kind))
    after = [t.roll(1, 2) for t in random_qkv(2, 4, 2, lq, lk, 8, 5, dtype)]
    check(*after, causal=True, form=form, rope=rope, initial_state=state)


def test_sequences_of_one_batch_may_be_at_different_places():
    q, k, v = random_qkv(2, 2, 2, 9, 9, 8, 5, F64)
    state = [
        MALA(*(t[:1, :, :n] for t in (q, k, v)), causal=True, rope=(3, 3), return_state=True)[1]
        for n in (2, 7)
    ]
    state = tuple(torch.cat(parts) for parts in zip(*state))
    assert state[3].tolist() == [2, 7]
    check(q, k, v, causal=True, form="code", rope=(3, 3), initial_state=state)


@pytest.mark.parametrize("form", ["code", "paper", "consistent"])
@pytest.mark.parametrize("causal, with_state", [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize("rope", [None, (2, 3)])
def test_gradcheck(form, causal, with_state, rope):
    tensors = random_qkv(2, 4, 2, 6, 6, 4, 3, F64)
    state = ()
    if with_state:
        *state, count = MALA(
            *random_qkv(2, 4, 2, 5, 5, 4, 3, F64), causal=True, form=form, rope=rope, return_state=True
        )[1]

    def call(q, k, v, *sums):
        options = dict(causal=causal, form=form, rope=rope, eps=0.05)
        if not causal:
            return MALA(q, k, v, **options)
        initial = (*sums, count) if sums else None
        out, last = MALA(q, k, v, initial_state=initial, return_state=True, **options)
        assert not last[3].requires_grad
        return [out, *last[:3]]

    assert gradcheck(call, [t.clone().requires_grad_() for t in (*tensors, *state)])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("rope", [None, (10, 13)])
def test_gradients(dtype, causal, rope):
    tensors = random_qkv(2, 4, 2, 130, 130, 16, 9, dtype)
    options = dict(causal=causal, rope=rope)
    assert_gradients_near(
        lambda *t: MALA(*t, **options),
        lambda *t: formula.magnitude_aware(*t, **options)[0],
        tensors,
        roundings=1024,
    )


@pytest.mark.parametrize("causal", [False, True])
def test_rows_sum_to_1_where_the_magnitude_is_of_turned_features(causal):
    q, k, v = random_qkv(2, 4, 2, 60, 60, 20, 6, F64)
    options = dict(causal=causal, form="consistent", eps=0.0)
    for rope in [None, (6, 10), (1, 60)]:
        constant = MALA(q, k, torch.ones_like(v), rope=rope, **options)
        torch.testing.assert_close(constant, torch.ones_like(constant))
        found = MALA(q, k, v, rope=rope, **options)
        expected = formula.magnitude_aware(q, k, v, rope=rope, **options)
        torch.testing.assert_close(found, expected[0])
    torch.testing.assert_close(
        MALA(q, k, v, **options), MALA(q, k, v, causal=causal, eps=0.0), rtol=0, atol=0
    )


def test_identities():
    """Sheet: constant values stay; a row is linear attention moved away from the mean by z."""
    q, k, v = random_qkv(1, 2, 2, 50, 50, 8, 6, F64)
    ones = torch.ones_like(v)
    torch.testing.assert_close(MALA(q, k, ones, eps=0.0), ones)
    torch.testing.assert_close(MALA(q, k, ones, eps=0.0, causal=True), ones)
    fq, fk = heed.feature_map(q, "elu1"), heed.feature_map(k, "elu1")
    plain = heed.linear_attention(fq, fk, v)
    z = (fq @ fk.mean(2)[..., None]) / math.sqrt(8)
    expected = plain + z * (plain - v.mean(2, keepdim=True))
    torch.testing.assert_close(MALA(q, k, v, eps=0.0), expected)


def test_a_prefix_of_the_causal_form_is_the_other_form():
    q, k, v = random_qkv(1, 2, 1, 60, 60, 8, 6, F64)
    causal = MALA(q, k, v, causal=True)
    for t in (1, 17, 60):
        alone = MALA(q[:, :, t - 1 : t], k[:, :, :t], v[:, :, :t])
        torch.testing.assert_close(causal[:, :, t - 1 : t], alone)


def test_131072_tokens():
    q, k, v = random_qkv(1, 1, 1, 131072, 131072, 3, 2)
    out, (_, k_sum, _, count) = MALA(q, k, v, causal=True, return_state=True)
    fk, vd = formula.elu1(k.double()), v.double()
    fq, n = formula.elu1(q.double()), torch.arange(1, 131073, dtype=F64)[:, None]
    num = (fq[..., None, :] @ (fk[..., None] * vd[..., None, :]).cumsum(2))[..., 0, :]
    z = (fq * fk.cumsum(2)).sum(-1, keepdim=True) / math.sqrt(3) / n
    expected = (1 + 1 / (z + 1e-6)) * num / math.sqrt(3) / n - z * vd.cumsum(2) / n
    assert_near(out, expected, (1 + z.max()) * vd.abs().max())
    assert_near(k_sum, fk.sum(2))
    assert count.item() == 131072


def test_a_count_that_float32_cannot_hold_is_an_error():
    q, k, v = random_qkv(1, 1, 1, 2, 2, 4)
    _, state = MALA(q, k, v, causal=True, return_state=True)
    long = (*state[:3], torch.tensor([2**24 - 1]))
    assert MALA(q, k, v, causal=True, initial_state=long).isfinite().all()
    with pytest.raises(ValueError, match="count.*16777217.*16777216"):
        MALA(q, k, v, causal=True, initial_state=long, return_state=True)
    double_state = tuple(t.double() for t in long)
    q, k, v = (t.double() for t in (q, k, v))
    _, state = MALA(q, k, v, causal=True, initial_state=double_state, return_state=True)
    assert state[3].item() == 2**24 + 1


# --- relu_linear_attention -----------------------------------------------------------------------

TEMPERATURE = torch.tensor([0.2, 1.0, -0.5, 3.0])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("clamp", [1e-3, 100.0])
@pytest.mark.parametrize("lq, lk", [(1, 1), (7, 9), (200, 63), (300, 1000)])
@pytest.mark.parametrize("d, dv", [(1, 3), (33, 17), (64, 80)])
def test_relu_sizes(dtype, clamp, lq, lk, d, dv):
    q, k, v = random_qkv(2, 4, 2, lq, lk, d, dv, dtype)
    for own in {dtype, formula.wide_type(dtype)}:
        temperature = TEMPERATURE.to(own)
        found = heed.relu_linear_attention(q, k, v, temperature, clamp=clamp)
        expected = formula.relu_linear(*double((q, k, v, temperature)), clamp)
        assert found.dtype == dtype
        assert_near(found, expected, 3 * v.double().abs().max())


@pytest.mark.parametrize("clamp", [0.5, 5.0, 100.0])
def test_relu_gradcheck(clamp):
    tensors = (*random_qkv(2, 4, 2, 5, 7, 3, 2, F64), TEMPERATURE.double())

    def call(*tensors):
        return heed.relu_linear_attention(*tensors, clamp=clamp)

    assert gradcheck(call, [t.clone().requires_grad_() for t in tensors])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("clamp", [5.0, 100.0])
def test_relu_gradients(dtype, clamp):
    tensors = (*random_qkv(2, 4, 2, 90, 130, 12, 7, dtype), TEMPERATURE)
    if dtype == F64:
        tensors = tuple(t.double() for t in tensors)
    assert_gradients_near(
        lambda *t: heed.relu_linear_attention(*t, clamp=clamp),
        lambda *t: formula.relu_linear(*t, clamp),
        tensors,
    )


def test_relu_of_a_query_without_a_positive_element():
    q, k, v = random_qkv(1, 2, 2, 5, 7, 3)
    q[:, :, 2] = -q[:, :, 2].abs()
    out = heed.relu_linear_attention(q, k, v, torch.ones(2), clamp=1e-30)
    assert out.isfinite().all() and not out[:, :, 2].any()


# --- mistakes ------------------------------------------------------------------------------------

Q, K, V = random_qkv(2, 4, 2, 5, 7, 8, 6)
STATE = (
    torch.zeros(2, 4, 8, 6),
    torch.zeros(2, 4, 8),
    torch.zeros(2, 4, 6),
    torch.zeros(2),
)


def with_state(*changed, **options):
    state = list(STATE)
    for place, value in zip(changed[::2], changed[1::2]):
        state[place] = value
    return dict(causal=True, initial_state=tuple(state)) | options


@pytest.mark.parametrize(
    "options, error, words",
    [
        (dict(k=K[..., :4]), ValueError, ["k ", "4", "8"]),
        (dict(q=random(2, 4, 5, 257), k=random(2, 2, 7, 257)), ValueError, ["q ", "257", "256"]),
        (dict(form="code2"), ValueError, ["form", "code2", "'code'", "'paper'", "'consistent'"]),
        (dict(form="paper", scale=0.1), ValueError, ["scale", "paper"]),
        (dict(scale=math.nan), ValueError, ["scale", "nan"]),
        (dict(eps=-1e-6), ValueError, ["eps", "-"]),
        (dict(rope=(2, 3)), ValueError, ["rope", "(2, 3)", "5", "7"]),
        (dict(rope=(5,)), ValueError, ["rope", "1 numbers", "two"]),
        (dict(rope=(0, 5), causal=True), ValueError, ["rope", "(0, 5)"]),
        (dict(rope=5), RuntimeError, ["rope", "int"]),
        (
            dict(q=Q[..., :6], k=K[..., :6], rope=(1, 7), causal=True),
            ValueError,
            ["rope", "head dim 6", "multiple of 4"],
        ),
        (dict(return_state=True), ValueError, ["return_state", "causal"]),
        (with_state(causal=False), ValueError, ["initial state", "causal"]),
        (dict(causal=True, initial_state=STATE[:3]), TypeError, ["initial_state", "count"]),
        (dict(causal=True, initial_state=STATE[0]), TypeError, ["initial_state", "a Tensor"]),
        (with_state(0, STATE[0][:, :2]), ValueError, ["initial_state s", "[2,2,8,6]"]),
        (with_state(1, STATE[2]), ValueError, ["initial_state k_sum", "[2,4,6]", "[2,4,8]"]),
        (with_state(2, STATE[2].half()), ValueError, ["initial_state v_sum", "float16"]),
        (with_state(3, torch.zeros(3)), ValueError, ["count", "[3]", "[2]"]),
        (with_state(3, torch.tensor([0.5, 0])), ValueError, ["count[0]", "0.5"]),
        (with_state(3, torch.tensor([0, -1])), ValueError, ["count[1]", "-1"]),
        (with_state(q=random(2, 4, 9, 8)), ValueError, ["initial state", "9 queries", "7 keys"]),
    ],
)
def test_mistakes(options, error, words):
    expect_mistake(MALA, dict(q=Q, k=K, v=V) | options, error, words)


@pytest.mark.parametrize(
    "options, error, words",
    [
        (dict(temperature=None), TypeError, ["temperature", "None"]),
        (dict(temperature=torch.ones(3)), ValueError, ["temperature", "[3]", "[4]"]),
        (dict(temperature=torch.ones(4, 1, 1)), ValueError, ["temperature", "3", "1"]),
        (dict(temperature=torch.ones(4).int()), ValueError, ["temperature", "int32"]),
        (dict(clamp=0.0), ValueError, ["clamp", "0"]),
        (dict(clamp=-1.0), ValueError, ["clamp", "-1"]),
        (dict(clamp=math.nan), ValueError, ["clamp", "nan"]),
        (dict(v=V[:, :, :3]), ValueError, ["v ", "3", "7"]),
    ],
)
def test_relu_mistakes(options, error, words):
    options = dict(temperature=torch.ones(4)) | options
    expect_mistake(heed.relu_linear_attention, dict(q=Q, k=K, v=V) | options, error, words)
