"""States: any cutting of a sequence gives the numbers of one call, forward and backward; docs/states.md."""

import contextlib
import io
import re
from pathlib import Path

import heed
import pytest
import torch
from linear_reference import F64, assert_near, features, flat
from reference import DTYPES, random, random_qkv

LENGTH = 140
SLOPES = torch.tensor([0.0, 1e-6, 0.3, 8.0])
CUTS = {
    "halves": [70, 70],
    "odd": [1, 63, 2, 65, 9],
    "prompt": [130] + 10 * [1],
    "tokens": LENGTH * [1],
    "empty": [0, 100, 0, 40, 0],
}


def lightning(q, k, v, **options):
    return heed.lightning_attention(q, k, v, SLOPES.to(options.pop("kind", F64)), **options)


def linear(q, k, v, **options):
    return heed.linear_attention(q, k, v, causal=True, **options)


def linear_sum(q, k, v, **options):
    return heed.linear_attention(q, k, v, causal=True, normalize=False, **options)


def linear_all(q, k, v, **options):
    """Not causal: the state alone goes on."""
    return heed.linear_attention(q, k, v, **options)


def taylor(order):
    def call(q, k, v, **options):
        return heed.taylor_state_attention(q / 3, k / 3, v, order=order, **options)

    return call


def mala(q, k, v, **options):
    return heed.magnitude_aware_linear_attention(q, k, v, causal=True, **options)


def mala_paper(q, k, v, **options):
    return mala(q, k, v, form="paper", **options)


def mala_grid(q, k, v, **options):
    return mala(q, k, v, rope=(9, 16), **options)


CALLS = {
    "lightning": lightning,
    "linear": linear,
    "linear_sum": linear_sum,
    "taylor0": taylor(0),
    "taylor2": taylor(2),
    "taylor3": taylor(3),
    "mala": mala,
    "mala_paper": mala_paper,
    "mala_grid": mala_grid,
}


def inputs(dtype, hkv=2):
    """Positive q and k, so that no denominator is near 0."""
    return (
        features(2, 4, LENGTH, 8, dtype=dtype, seed=1),
        features(2, hkv, LENGTH, 8, dtype=dtype, seed=2),
        random(2, hkv, LENGTH, 5, dtype=dtype, seed=3),
    )


def in_pieces(call, tensors, cuts):
    state, out = None, []
    for piece in zip(*(t.split(cuts, dim=2) for t in tensors)):
        part, state = call(*piece, initial_state=state, return_state=True)
        out.append(part)
    return torch.cat(out, 2), state


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("cuts", CUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_cutting(name, cuts, dtype):
    tensors = inputs(dtype)
    assert sum(CUTS[cuts]) == LENGTH
    whole = flat(CALLS[name](*tensors, return_state=True))
    pieces = flat(in_pieces(CALLS[name], tensors, CUTS[cuts]))
    magnitude = 60 if name == "mala_paper" else 1  # its terms, of size z, cancel
    for found, expected in zip(pieces, whole, strict=True):
        expected = expected.double()
        half = torch.bfloat16 if dtype == torch.bfloat16 else None
        assert_near(found, expected, magnitude * expected.abs().max(), inputs=half, roundings=64)


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("cuts", ["odd", "prompt"])
def test_gradients_go_through_states(name, cuts):
    whole = [t.requires_grad_() for t in inputs(F64)]
    cut = [t.detach().clone().requires_grad_() for t in whole]
    pairs = list(
        zip(
            flat(CALLS[name](*whole, return_state=True)),
            flat(in_pieces(CALLS[name], cut, CUTS[cuts])),
            strict=True,
        )
    )
    pairs = [(a, b) for a, b in pairs if a.requires_grad]
    weights = [random(*a.shape, dtype=F64, seed=30 + i) for i, (a, _) in enumerate(pairs)]
    torch.autograd.backward([a for a, _ in pairs], weights)
    torch.autograd.backward([b for _, b in pairs], weights)
    for a, b in zip(whole, cut):
        torch.testing.assert_close(b.grad, a.grad, rtol=1e-9, atol=1e-9)


def test_without_causal_every_query_reads_the_state_after_all_keys():
    q, k, v = inputs(F64)
    _, state = linear_all(q[:, :, :0], k[:, :, :90], v[:, :, :90], return_state=True)
    found = linear_all(q, k[:, :, 90:], v[:, :, 90:], initial_state=state)
    torch.testing.assert_close(found, heed.linear_attention(q, k, v))


@pytest.mark.parametrize("name", CALLS)
def test_entries_of_a_batch_can_be_joined(name):
    tensors = inputs(F64)
    call, parts = CALLS[name], []
    for b, length in ((0, 40), (1, 77)):
        _, state = call(*(t[b : b + 1, :, :length] for t in tensors), return_state=True)
        parts.append(flat(state))
    joined = [torch.cat(pair) for pair in zip(*parts)]
    state = joined[0] if name in ("lightning", "linear_sum") else tuple(joined)
    rest = [torch.stack([t[0, :, 40:50], t[1, :, 77:87]]) for t in tensors]
    found = call(*rest, initial_state=state)
    whole = call(*tensors)
    torch.testing.assert_close(found[0], whole[0, :, 40:50], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(found[1], whole[1, :, 77:87], rtol=1e-9, atol=1e-9)


def test_fewer_queries_than_keys_are_the_last_tokens():
    tensors = inputs(F64)
    for call in CALLS.values():
        _, state = call(*(t[:, :, :60] for t in tensors), return_state=True)
        q, k, v = (t[:, :, 60:] for t in tensors)
        found = call(q[:, :, -7:], k, v, initial_state=state)
        torch.testing.assert_close(found, call(*tensors)[:, :, -7:], rtol=1e-9, atol=1e-9)


def test_states_may_have_any_strides():
    q, k, v = random_qkv(2, 4, 2, 9, 9, 8, 5)
    state = random(2, 4, 5, 8, seed=4)
    found = heed.lightning_attention(q, k, v, initial_state=state.mT)
    assert torch.equal(found, heed.lightning_attention(q, k, v, initial_state=state.mT.contiguous()))


def test_the_page_on_states():
    """Every program of docs/states.md prints what the page says it does."""
    text = (Path(__file__).parents[2] / "docs/states.md").read_text()
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    programs = [b for kind, b in blocks if kind == "python"]
    expected = [b for kind, b in blocks if not kind]
    assert len(programs) == len(expected) == 4
    names = {}
    for program, lines in zip(programs, expected):
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(program, "docs/states.md", "exec"), names)
        assert numbers(printed.getvalue()) == numbers(lines)


def numbers(text):
    """Text whose decimal numbers are rounded to what float32 can promise."""
    return re.sub(r"\d+\.\d+", lambda found: f"{float(found[0]):.5f}", text)
