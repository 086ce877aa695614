"""Times heed's linear operators side by side with the same mathematics under torch.compile.

    .venv/bin/python tools/bench_vs_torch.py [NAME ...] [--dtype T] [--eager] [--seconds S] [--json]

The compositions are the best that PyTorch's own operators give on a processor: chunks of matrix
products with a state between them, sums over the keys, FFTs. Each is first compared with heed's result
and gradients in float32; a row that differs is not timed. Calls of both sides alternate; medians, and
the median ratio of neighbours. `heed bench --vs torch` does the same without torch.compile.
"""

import argparse
import json
import math
import statistics
import sys
import time
from dataclasses import dataclass, replace
from typing import Callable

import torch
import torch.nn.functional as F

import heed

CHUNK = 128  # tokens


# --- compositions --------------------------------------------------------------------------------


def chunks(x):
    """[B,H,L,D] as [B,H,L/CHUNK,CHUNK,D]; the last chunk is padded with zeros."""
    return F.pad(x, (0, 0, 0, -x.shape[2] % CHUNK)).unflatten(2, (-1, CHUNK))


def causal_sums(q, k, v, slopes=None):
    """sum over s <= t of exp(-slopes (t - s)) (q_t . k_s) v_s, with states in float32."""
    qc, kc, vc = chunks(q), chunks(k), chunks(v)
    place = torch.arange(CHUNK, device=q.device)
    scores = qc @ kc.transpose(-1, -2)
    state_q, state_k, decay = qc, kc, None
    if slopes is not None:
        slope = slopes.view(-1, 1, 1, 1)

        def decay_over(tokens):
            return torch.exp(-slope * tokens).to(q.dtype)

        scores = scores * decay_over((place[:, None] - place).clamp_min(0))
        state_q = qc * decay_over((place + 1)[:, None])
        state_k = kc * decay_over((CHUNK - 1 - place)[:, None])
        decay = torch.exp(-slope * CHUNK).squeeze(-1)
    sums = (state_k.transpose(-1, -2) @ vc).float().unbind(2)
    states = [torch.zeros_like(sums[0])]
    for s in sums[:-1]:
        states.append((states[-1] if decay is None else states[-1] * decay) + s)
    out = scores.tril() @ vc + state_q @ torch.stack(states, 2).to(q.dtype)
    return out.flatten(2, 3)[:, :, : q.shape[2]]


def with_ones(v):
    """A column of ones: its sums are the denominators."""
    return F.pad(v, (0, 1), value=1.0)


def linear(q, k, v, causal):
    both = causal_sums(q, k, with_ones(v)) if causal else q @ (k.transpose(-1, -2) @ with_ones(v))
    return both[..., :-1] / (both[..., -1:] + 1e-12)


def hedgehog_map(x, weight):
    z = x @ weight
    return torch.cat([F.softmax(z, -1), F.softmax(-z, -1)], -1).clamp_min(1e-12)


def hedgehog(q, k, v, weight_q, weight_k, causal):
    return linear(hedgehog_map(q, weight_q), hedgehog_map(k, weight_k), v, causal)


def mala(q, k, v, causal):
    fq, fk, keys = F.elu(q) + 1, F.elu(k) + 1, k.shape[2]
    if causal:
        both, v_sum = causal_sums(fq, fk, with_ones(v)), v.cumsum(2)
        seen = torch.arange(1, keys + 1, dtype=q.dtype)[:, None]
    else:
        both, v_sum, seen = fq @ (fk.transpose(-1, -2) @ with_ones(v)), v.sum(2, True), keys
    return mala_read_out(both[..., :-1], both[..., -1:], v_sum, seen, q.shape[3])


def mala_read_out(sums, totals, v_sum, seen, dim):
    c = 1 / (math.sqrt(dim) * seen)
    z = c * totals
    return (1 + 1 / (z + 1e-6)) * c * sums - z * v_sum / seen


def turned(x, cosine, sine):
    """Pairs of features rotated, as the published code of MALA does."""
    other = torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2)
    return x * cosine.to(x.dtype) + other * sine.to(x.dtype)


def grid_turns(side, dim):
    """Cosines and sines [side * side, dim]: half of the features turn by row, half by column."""
    pairs = dim // 4
    angles = 10000.0 ** (-torch.arange(pairs) / (pairs - 1))
    place = torch.arange(side)[:, None] * angles.repeat_interleave(2)
    rows = place[:, None].expand(side, side, -1).flatten(0, 1)
    columns = place[None].expand(side, side, -1).flatten(0, 1)
    turns = torch.cat([rows, columns], -1)
    return turns.cos(), turns.sin()


def mala_grid(q, k, v, cosine, sine):
    fq, fk = F.elu(q) + 1, F.elu(k) + 1
    state = turned(fk, cosine, sine).transpose(-1, -2) @ v
    totals = fq @ fk.sum(2).unsqueeze(-1)
    return mala_read_out(turned(fq, cosine, sine) @ state, totals, v.sum(2, True), k.shape[2],
                         q.shape[3])  # fmt: skip


def relu_linear(q, k, v, temperature):
    both = q.relu() @ (k.relu().transpose(-1, -2) @ with_ones(v))
    return temperature.view(-1, 1, 1).to(q.dtype) * both[..., :-1] / both[..., -1:].clamp_min(100)


def kernelized_rpe(q, k, v, rpb, projection):
    """nprf, by FFT: Toeplitz matrices of exp(rpb) times the products of features and values."""
    length, radius = q.shape[2], rpb.shape[1] // 2
    fq = torch.exp(F.normalize(q, dim=-1) @ projection.transpose(-1, -2))
    fk = torch.exp(F.normalize(k, dim=-1) @ projection.transpose(-1, -2))
    weights = torch.exp(rpb - rpb.amax(1, True))
    # circle[p - m]: entry radius + (m - p)
    middle = weights[:, radius - length + 1 : radius + length].flip(1)
    circle = torch.cat([middle[:, length - 1 :], middle.new_zeros(middle.shape[0], 1),
                        middle[:, : length - 1]], 1)  # fmt: skip
    products = (fk.unsqueeze(-1) * with_ones(v).unsqueeze(-2)).flatten(-2)
    spectrum = torch.fft.rfft(circle.double()).unsqueeze(-1)
    moved = torch.fft.rfft(products.double(), 2 * length, dim=2) * spectrum
    sums = torch.fft.irfft(moved, 2 * length, dim=2)[:, :, :length].to(q.dtype)
    both = (fq.unsqueeze(-2) @ sums.unflatten(-1, (fq.shape[-1], -1))).squeeze(-2)
    return both[..., :-1] / both[..., -1:]


def kernelized_rpe_direct(q, k, v, rpb, projection):
    """The same over all pairs."""
    length, radius = q.shape[2], rpb.shape[1] // 2
    fq = torch.exp(F.normalize(q, dim=-1) @ projection.transpose(-1, -2))
    fk = torch.exp(F.normalize(k, dim=-1) @ projection.transpose(-1, -2))
    place = torch.arange(length)
    weights = torch.exp(rpb)[:, radius + place - place[:, None]] * (fq @ fk.transpose(-1, -2))
    return (weights @ v) / weights.sum(-1, True)


# --- cases ---------------------------------------------------------------------------------------


@dataclass
class Case:
    name: str
    what: str
    inputs: tuple
    ours: Callable
    theirs: dict  # title -> composition
    differentiable: tuple  # indices of inputs

    def to(self, dtype):
        """The same with inputs of another type; one number per head stays float32."""
        inputs = tuple(x.to(dtype) if x.dim() > 1 else x for x in self.inputs)
        return replace(self, inputs=inputs)


def normal(*shape, scale=1.0):
    return torch.randn(*shape) * scale


def lightning_cases():
    for dim, length in [(64, 4096), (128, 4096)]:
        q, k, v = (normal(1, 16, length, dim, scale=0.3) for _ in range(3))
        slopes = heed.lightning_slopes(16)
        yield Case("lightning_attention", f"1x16x{length}x{dim}", (q, k, v, slopes),
                   heed.lightning_attention, {"chunks": causal_sums}, (0, 1, 2))  # fmt: skip


def hedgehog_cases():
    def ours(causal):
        def call(q, k, v, weight_q, weight_k):
            fq = heed.feature_map(q, "hedgehog_softmax", weight_q)
            fk = heed.feature_map(k, "hedgehog_softmax", weight_k)
            return heed.linear_attention(fq, fk, v, causal=causal)

        return call

    for causal in (False, True):
        q, k, v = (normal(1, 12, 4096, 64) for _ in range(3))
        eye = torch.eye(64).expand(12, 64, 64)
        weights = [eye + normal(12, 64, 64, scale=0.02) for _ in range(2)]
        yield Case("hedgehog", "1x12x4096x64" + (" causal" if causal else ""), (q, k, v, *weights),
                   ours(causal), {"chunks" if causal else "sums":
                                  lambda *a, c=causal: hedgehog(*a, c)},
                   (0, 1, 2, 3, 4))  # fmt: skip


def mala_cases():
    for causal in (False, True):
        q, k, v = (normal(1, 8, 4096, 64) for _ in range(3))
        yield Case("magnitude_aware_linear_attention",
                   "1x8x4096x64" + (" causal" if causal else ""), (q, k, v),
                   lambda *a, c=causal: heed.magnitude_aware_linear_attention(*a, causal=c),
                   {"chunks" if causal else "sums": lambda *a, c=causal: mala(*a, c)},
                   (0, 1, 2))  # fmt: skip
    side = 56
    q, k, v = (normal(1, 8, side * side, 64) for _ in range(3))
    cosine, sine = grid_turns(side, 64)
    yield Case("magnitude_aware_linear_attention", f"1x8x({side}x{side})x64 turned", (q, k, v),
               lambda *a: heed.magnitude_aware_linear_attention(*a, rope=(side, side)),
               {"sums": lambda *a: mala_grid(*a, cosine, sine)}, (0, 1, 2))  # fmt: skip


def relu_linear_cases():
    q, k, v = (normal(4, 12, 56 * 56, 32) for _ in range(3))
    yield Case("relu_linear_attention", "4x12x(56x56)x32", (q, k, v, torch.ones(12)),
               heed.relu_linear_attention, {"sums": relu_linear}, (0, 1, 2, 3))  # fmt: skip


def kernelized_rpe_cases():
    for length, dim, features in [(1024, 64, 64), (4096, 16, 16)]:
        q, k, v = (normal(1, 2, length, dim) for _ in range(3))
        rpb, projection = normal(2, 2 * length - 1, scale=0.5), normal(2, features, dim)
        yield Case("kernelized_rpe_attention", f"1x2x{length}x{dim}, {features} features",
                   (q, k, v, rpb, projection), heed.kernelized_rpe_attention,
                   {"fft": kernelized_rpe, "all pairs": kernelized_rpe_direct},
                   (0, 1, 2, 3))  # fmt: skip


CASES = {
    "lightning_attention": lightning_cases,
    "hedgehog": hedgehog_cases,
    "magnitude_aware_linear_attention": mala_cases,
    "relu_linear_attention": relu_linear_cases,
    "kernelized_rpe_attention": kernelized_rpe_cases,
}


# --- measuring -----------------------------------------------------------------------------------


def with_gradients(call, case, out_gradient):
    def step():
        leaves = [x.detach().requires_grad_(i in case.differentiable)
                  for i, x in enumerate(case.inputs)]  # fmt: skip
        wanted = [leaves[i] for i in case.differentiable]
        return torch.autograd.grad(call(*leaves), wanted, out_gradient)

    return step


def forward_only(call, case):
    def step():
        with torch.inference_mode():
            return (call(*case.inputs),)

    return step


def difference(ours, theirs):
    """The largest difference, relative to the largest value; NaN counts as infinite."""
    worst = 0.0
    for a, b in zip(ours, theirs, strict=True):
        error = ((a.double() - b.double()).abs().max() / b.double().abs().max()).item()
        worst = max(worst, error if math.isfinite(error) else math.inf)
    return worst


def times(calls, seconds):
    """Milliseconds of each call, in turn; compiled and warmed up before."""
    for call in calls:
        call(), call()
    samples = [[] for _ in calls]
    end = time.perf_counter() + seconds * len(calls)
    while len(samples[0]) < 5 or time.perf_counter() < end:
        for call, own in zip(calls, samples, strict=True):
            start = time.perf_counter()
            call()
            own.append((time.perf_counter() - start) * 1e3)
    return samples


def measure(case, mode, title, composition, arguments):
    """One row: heed and one composition, eager and compiled, whichever is faster."""
    torch.manual_seed(1)
    forward = mode == "forward"
    candidates = {f"{title}, eager": composition}
    if not arguments.eager:
        torch._dynamo.reset()
        candidates[f"{title}, compiled"] = torch.compile(composition)
    out_gradient = torch.randn_like(case.ours(*case.inputs))

    def prepare(call, case, out_gradient):
        return forward_only(call, case) if forward else with_gradients(call, case, out_gradient)

    compared = {"heed": case.ours, **candidates}
    results = {name: prepare(call, case, out_gradient)() for name, call in compared.items()}
    dtype = getattr(torch, arguments.dtype)
    case, out_gradient = case.to(dtype), out_gradient.to(dtype)
    calls = {name: prepare(call, case, out_gradient) for name, call in compared.items()}
    rows = []
    for name in candidates:
        error = difference(results["heed"], results[name])
        if error > 2e-3:
            print(f"{case.name} {case.what} {mode}: {name} differs by {error:.1e}", file=sys.stderr)
            return []
    for name, samples in zip(calls, times(list(calls.values()), arguments.seconds), strict=True):
        rows.append((name, samples))
    ours = dict(rows)["heed"]
    best = min(candidates, key=lambda name: statistics.median(dict(rows)[name]))
    ratio = statistics.median(b / a for a, b in zip(ours, dict(rows)[best], strict=True))
    return [{
        "op": case.name, "shape": case.what, "pass": mode, "torch": best,
        "heed_ms": statistics.median(ours),
        "torch_ms": {name: statistics.median(dict(rows)[name]) for name in candidates},
        "speed_up": ratio,
    }]  # fmt: skip


def print_table(rows):
    header = ["op", "shape", "pass", "heed ms", "torch ms", "best of PyTorch", "speed-up"]
    cells = [header]
    for row in rows:
        cells.append([row["op"], row["shape"], row["pass"], f"{row['heed_ms']:.2f}",
                      f"{row['torch_ms'][row['torch']]:.2f}", row["torch"],
                      f"{row['speed_up']:.2f}x"])  # fmt: skip
    widths = [max(len(line[i]) for line in cells) for i in range(len(header))]
    for line in cells:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
    for row in rows:
        if row["speed_up"] < 1:
            print(f"PyTorch was faster: {row['op']} {row['shape']} {row['pass']}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(CASES))
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32",
                        help="of queries, keys, values and weights")  # fmt: skip
    parser.add_argument("--eager", action="store_true", help="do not compile")
    parser.add_argument("--seconds", type=float, default=1.0, help="to measure each call")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    unknown = [name for name in arguments.names if name not in CASES]
    if unknown:
        parser.error(f"unknown {unknown[0]!r}; known: {', '.join(CASES)}")
    torch.manual_seed(0)
    rows = []
    for name in arguments.names or CASES:
        for case in CASES[name]():
            for mode in ("forward", "forward+backward"):
                candidates = [row for title, composition in case.theirs.items()
                              for row in measure(case, mode, title, composition, arguments)]  # fmt: skip
                if candidates:  # against the best composition
                    rows.append(min(candidates, key=lambda row: row["speed_up"]))
    if arguments.json:
        print(json.dumps(rows, indent=2))
    else:
        print(f"PyTorch {torch.__version__}, {torch.get_num_threads()} threads")
        print_table(rows)


if __name__ == "__main__":
    main()
