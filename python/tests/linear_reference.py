"""The mechanisms with a running state as sums over all pairs of tokens.

Plain PyTorch in the type of the inputs, differentiable, with no chunks: run in float64 it is what a
kernel is compared with.
"""

import math
from itertools import combinations_with_replacement

import torch
from reference import random, repeat_heads, visible

F64 = torch.float64


def wide_type(dtype):
    """Of states, statistics and parameters beside tensors of ``dtype``."""
    return F64 if dtype == F64 else torch.float32


def double(value):
    """Every floating tensor of an argument in float64."""
    if isinstance(value, torch.Tensor):
        return value.double() if value.is_floating_point() else value
    if isinstance(value, (tuple, list)):
        return tuple(double(v) for v in value)
    return value


def divide(num, den):
    return torch.where(den == 0, 0.0, num / torch.where(den == 0, 1.0, den))


# --- attention -----------------------------------------------------------------------------------


def lightning(q, k, v, slopes=None, initial_state=None):
    """``(out, S)``."""
    b, h, lq, _ = q.shape
    lk = k.shape[2]
    k, v = repeat_heads(k, h), repeat_heads(v, h)
    slopes = torch.zeros(h) if slopes is None else slopes
    slopes = slopes.to(q.dtype)[:, None, None]
    distance = (torch.arange(lq)[:, None] + lk - lq - torch.arange(lk)[None, :]).to(q.dtype)
    decay = torch.exp(-slopes * distance.clamp(min=0)) * (distance >= 0)
    out = (q @ k.mT * decay) @ v
    left = torch.exp(-slopes * torch.arange(lk - 1, -1, -1).to(q.dtype)[:, None])
    state = (k * left).mT @ v
    if initial_state is not None:
        age = torch.exp(-slopes * (torch.arange(lq) + lk - lq + 1).to(q.dtype)[:, None])
        out = out + age * (q @ initial_state.to(q.dtype))
        state = state + torch.exp(-slopes * lk) * initial_state
    return out, state


def linear(
    q, k, v, *, causal=False, normalize=True, eps=1e-12, lengths=None, initial_state=None
):
    """``(out, (S, z))``, or ``(out, S)`` without normalize."""
    b, h, lq, _ = q.shape
    lk = k.shape[2]
    k, v = repeat_heads(k, h), repeat_heads(v, h)
    seen = visible(lq, lk, causal, lengths=lengths, batch=b).to(q.dtype)
    weights = q @ k.mT * seen
    num, den = weights @ v, weights.sum(-1, keepdim=True)
    exists = seen[:, :, -1, :, None] if lq else visible(1, lk, lengths=lengths, batch=b).mT
    s, z = (k * exists).mT @ v, (k * exists).sum(2)
    if initial_state is not None:
        s0, z0 = initial_state if normalize else (initial_state, None)
        num, s = num + q @ s0.to(q.dtype), s + s0
        if normalize:
            den, z = den + q @ z0.to(q.dtype)[..., None], z + z0
    if not normalize:
        return num, s
    return divide(num, den + eps), (s, z)


def elu1(x):
    return torch.where(x > 0, x + 1, x.clamp(max=0).exp())


def rotate(x, rope, first):
    """``x [B,H,L,D]`` turned by row and column of the grid; token ``i`` stands at ``first + i``."""
    if rope is None:
        return x
    quarter = x.shape[-1] // 4
    theta = 10000.0 ** -torch.linspace(0, 1, quarter, dtype=F64)
    position = first[:, None] + torch.arange(x.shape[2])
    angles = [
        (place[..., None] * theta)[:, None].to(x.dtype)
        for place in (position // rope[1], position % rope[1])
    ]
    halves = []
    for half, angle in zip(x.split(2 * quarter, -1), angles):
        a, b = half[..., 0::2], half[..., 1::2]
        turned = (a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin())
        halves.append(torch.stack(turned, -1).flatten(-2))
    return torch.cat(halves, -1)


def magnitude_aware(
    q, k, v, *, causal=False, form="code", rope=None, scale=None, eps=1e-6, initial_state=None
):
    """``(out, (S, k_sum, v_sum, count))``."""
    b, h, lq, d = q.shape
    lk = k.shape[2]
    fq, fk, v = elu1(q), repeat_heads(elu1(k), h), repeat_heads(v, h)
    count = torch.zeros(b, dtype=torch.long)
    if initial_state is not None:
        s0, k0, v0 = (t.to(q.dtype) for t in initial_state[:3])
        count = initial_state[3].long()
    rq = rotate(fq, rope, count + lk - lq if causal else count)
    rk = rotate(fk, rope, count)
    if form == "consistent":
        fq, fk = rq, rk
    seen = visible(lq, lk, causal, batch=b).to(q.dtype)
    num, dot = (rq @ rk.mT * seen) @ v, (fq @ fk.mT * seen).sum(-1, keepdim=True)
    values = seen @ v
    s, k_sum, v_sum = rk.mT @ v, fk.sum(2), v.sum(2)
    if initial_state is not None:
        num, dot = num + rq @ s0, dot + fq @ k0[..., None]
        values = values + v0[:, :, None]
        s, k_sum, v_sum = s + s0, k_sum + k0, v_sum + v0
    n = seen.sum(-1, keepdim=True) + count[:, None, None, None]
    factor = (1 / math.sqrt(d) if scale is None else scale) / n if form != "paper" else 1.0
    z = factor * dot
    out = (1 + 1 / (z + eps)) * factor * num - z * values / n
    out = torch.where(n == 0, 0.0, out)
    return out, (s, k_sum, v_sum, (count + lk).to(q.dtype))


def relu_linear(q, k, v, temperature, clamp=100.0):
    weights = q.relu() @ repeat_heads(k, q.shape[1]).relu().mT
    den = weights.sum(-1, keepdim=True).clamp(min=clamp)
    return temperature.to(q.dtype)[:, None, None] * (weights @ repeat_heads(v, q.shape[1])) / den


def rpe_features(x, projection, features):
    if features == "elu1":
        return elu1(x)
    w = projection.to(x.dtype)
    if features == "nprf":
        norm = x.norm(dim=-1, keepdim=True)
        return (torch.where(norm == 0, 0.0, x / torch.where(norm == 0, 1.0, norm)) @ w.mT).exp()
    y = x / x.shape[-1] ** 0.25
    half = (y * y).sum(-1, keepdim=True) / 2
    if features == "prf":
        return (y @ w.mT - half).exp()
    return half.exp() * torch.cat([(y @ w.mT).sin(), (y @ w.mT).cos()], -1)


def kernelized_rpe(q, k, v, rpb, projection, *, features="nprf", causal=False, grid=None):
    h, n = q.shape[1], q.shape[2]
    group = h // k.shape[1]
    fq = rpe_features(q, projection, features)
    fk = rpe_features(k.repeat_interleave(group, 1), projection, features)
    if grid is None:
        offset = torch.arange(n)[None, :] - torch.arange(n)[:, None]
        bias = rpb[:, offset + rpb.shape[1] // 2]
    else:
        row, column = torch.arange(n) // grid[1], torch.arange(n) % grid[1]
        bias = rpb[
            :,
            row[None, :] - row[:, None] + grid[0] - 1,
            column[None, :] - column[:, None] + grid[1] - 1,
        ]
    weights = bias.to(q.dtype).exp() * (fq @ fk.mT)
    if causal:
        weights = weights.tril()
    return divide(weights @ v.repeat_interleave(group, 1), weights.sum(-1, keepdim=True))


def monomials(x, order):
    """Products of up to ``order`` elements, each unordered choice once."""
    columns = []
    for degree in range(order + 1):
        for choice in combinations_with_replacement(range(x.shape[-1]), degree):
            product = torch.ones_like(x[..., 0])
            for element in choice:
                product = product * x[..., element]
            columns.append(product)
    return torch.stack(columns, -1)


def coefficients(dim, order, scale):
    """``sum_c coefficients[c] monomials(q)[c] monomials(k)[c]`` is the polynomial of ``scale q . k``."""
    found = []
    for degree in range(order + 1):
        for choice in combinations_with_replacement(range(dim), degree):
            repeats = math.prod(math.factorial(choice.count(e)) for e in set(choice))
            found.append(scale**degree / repeats)
    return torch.tensor(found, dtype=F64)


def taylor(q, k, v, *, order=2, scale=None, initial_state=None):
    """``(out, (S, z))``."""
    b, h, lq, d = q.shape
    lk = k.shape[2]
    scale = 1 / math.sqrt(d) if scale is None else scale
    k, v = repeat_heads(k, h), repeat_heads(v, h)
    x = scale * (q @ k.mT)
    weights = sum(x**n / math.factorial(n) for n in range(order + 1))
    weights = weights * visible(lq, lk, causal=True).to(q.dtype)
    num, den = weights @ v, weights.sum(-1, keepdim=True)
    features = monomials(k, order)
    s, z = features.mT @ v, features.sum(2)
    if initial_state is not None:
        s0, z0 = (t.to(q.dtype) for t in initial_state)
        fq = monomials(q, order) * coefficients(d, order, scale).to(q.dtype)
        num, den, s, z = num + fq @ s0, den + fq @ z0[..., None], s + s0, z + z0
    return divide(num, den), (s, z)


# --- features ------------------------------------------------------------------------------------


def feature_map(x, kind, weight=None, bias=None):
    if kind == "performer":
        y = x / x.shape[-1] ** 0.25
        half = (y * y).sum(-1, keepdim=True) / 2
        return (y @ weight.to(x.dtype).mT - half).exp() / math.sqrt(weight.shape[1])
    z = x if weight is None else x @ weight.to(x.dtype)
    z = z if bias is None else z + bias.to(x.dtype)[:, None]
    if kind == "taylor2":
        y = z / z.shape[-1] ** 0.25
        pairs = (y[..., :, None] * y[..., None, :]).flatten(-2) / math.sqrt(2)
        return torch.cat([torch.ones_like(y[..., :1]), y, pairs], -1)
    return {
        "elu1": lambda: elu1(z),
        "relu": lambda: z.relu(),
        "exp": lambda: z.exp(),
        "hedgehog_exp": lambda: torch.cat([z.exp(), (-z).exp()], -1),
        "hedgehog_softmax": lambda: torch.cat([z.softmax(-1), (-z).softmax(-1)], -1).clamp(1e-12),
        "hedgehog_exp_max": lambda: torch.cat(
            [(z - z.amax(-1, True)).exp(), (z.amin(-1, True) - z).exp()], -1
        ).clamp(1e-12),
        "hedgehog_joint": lambda: torch.cat([2 * z, -2 * z], -1).softmax(-1).clamp(1e-12),
    }[kind]()


def distillation(q, k, feature_q, feature_k, *, causal=False, scale=None):
    h = q.shape[1]
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    seen = visible(q.shape[2], k.shape[2], causal)
    scores = (q @ repeat_heads(k, h).mT * scale).detach().masked_fill(~seen, -math.inf)
    teacher = scores.softmax(-1).nan_to_num(0.0)
    student = feature_q @ repeat_heads(feature_k, h).mT * seen
    student = divide(student, student.sum(-1, keepdim=True)).clamp(min=1e-12)
    return -(teacher * student.log()).sum(-1).mean()


# --- inputs and bounds ---------------------------------------------------------------------------


def features(*shape, dtype=torch.float32, seed=0):
    """Positive numbers, as features of linear attention are."""
    return (random(*shape, dtype=F64, seed=seed).abs() + 0.1).to(dtype)


def random_state(*shapes, dtype=torch.float32, seed=20):
    return tuple(random(*s, dtype=wide_type(dtype), seed=seed + i) for i, s in enumerate(shapes))


def flat(results):
    """The tensors of a result, in order."""
    if isinstance(results, torch.Tensor):
        return [results]
    return [t for r in results for t in flat(r)]


def assert_near(found, expected, size=None, *, inputs=None, roundings=32):
    """One rounding of the result, and some of the float32 (float64) sums behind it.

    ``size`` is the largest sum of the terms' sizes, which the terms may cancel out of; without one
    it is the largest result. ``inputs`` of bfloat16 say that the call may round the factors of
    products to it: half of its spacing, 2**-8, is then the bound of the relative root mean square.
    """
    assert found.shape == expected.shape
    if found.numel() == 0:
        return
    difference = found.double() - expected.double()
    if inputs == torch.bfloat16:
        ratio = (difference.norm() / expected.norm()).item() if difference.any() else 0.0
        assert ratio <= 2**-8, f"relative error {ratio:.3g}"  # False for NaN
        return
    largest = expected.abs().max().item()
    size = largest if size is None else max(largest, float(size))
    inner = torch.finfo(wide_type(found.dtype)).eps
    kind = torch.finfo(found.dtype)
    bound = kind.eps * (largest + kind.smallest_normal) + roundings * inner * size
    worst = difference.abs().max().item()
    assert worst <= bound, f"error {worst:.3g}, bound {bound:.3g}"  # False for NaN


def assert_gradients_near(call, reference, tensors, roundings=256):
    """Gradients of all results of ``call`` against PyTorch's of the float64 ``reference``."""
    inputs = [t.detach().clone().requires_grad_() for t in tensors]
    exact = [t.detach().double().requires_grad_() for t in tensors]
    found, expected = flat(call(*inputs)), flat(reference(*exact))
    assert len(found) == len(expected)
    pairs = [(f, e) for f, e in zip(found, expected) if f.requires_grad]
    weights = [random(*f.shape, dtype=f.dtype, seed=50 + i) for i, (f, _) in enumerate(pairs)]
    gradients = torch.autograd.grad([f for f, _ in pairs], inputs, weights)
    exact_gradients = torch.autograd.grad(
        [e for _, e in pairs], exact, [w.double() for w in weights]
    )
    for g, e, t in zip(gradients, exact_gradients, tensors):
        assert g.dtype == t.dtype
        assert_near(g, e, inputs=tensors[0].dtype, roundings=roundings)
