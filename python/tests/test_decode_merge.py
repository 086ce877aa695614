"""decode_attention and merge_attention against flash_attention and plain float64 formulas."""

import math

import heed
import pytest
import torch
from reference import (
    DTYPES,
    assert_accurate,
    assert_lse,
    attention64,
    expect_mistake,
    naive_softmax,
    random,
    random_qkv,
    visible,
)


def decode64(q, k, v, lengths, window, scale=None, **options):
    """Each sequence on its own over the keys it has, and the naive result in the same type."""
    parts = []
    for b, length in enumerate(lengths.tolist()):
        seen = visible(q.shape[2], length, causal=True, window=(window, -1))
        args = (q[b : b + 1], k[b : b + 1, :, :length], v[b : b + 1, :, :length], seen, scale)
        parts.append((*attention64(*args, **options), naive_softmax(*args, **options)))
    return [torch.cat(p) for p in zip(*parts)]


def check_decode(
    q, k, v, lengths, *, window=-1, scale=None, splits=0, softcap=0.0, slopes=None, sink=None
):
    k, v = k.clone(), v.clone()
    for b, length in enumerate(lengths.tolist()):
        k[b, :, length:] = math.nan
        v[b, :, length:] = math.inf
    out, lse = heed.decode_attention(
        q,
        k,
        v,
        lengths,
        window=window,
        scale=scale,
        splits=splits,
        softcap=softcap,
        alibi_slopes=slopes,
        sink=sink,
        return_lse=True,
    )
    expected, expected_lse, naive = decode64(
        q, k, v, lengths, window, scale, softcap=softcap, slopes=slopes, sink=sink
    )
    assert_accurate(out, expected, naive)
    assert_lse(lse, expected_lse)
    return out


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lq", [1, 3, 16])
@pytest.mark.parametrize("d, dv", [(1, 1), (5, 9), (64, 64), (80, 33), (256, 200), (577, 260)])
def test_decode_sizes(dtype, lq, d, dv):
    q, k, v = random_qkv(3, 6, 2, lq, 200, d, dv, dtype)
    check_decode(q, k, v, torch.tensor([200, 16, 77]))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lq", [1, 4])
@pytest.mark.parametrize("splits", [0, 1, 2, 7, 64])
@pytest.mark.parametrize("window", [-1, 0, 5, 120])
def test_decode_splits_and_windows(dtype, lq, splits, window):
    q, k, v = random_qkv(2, 4, 1, lq, 300, 24, dtype=dtype)
    check_decode(q, k, v, torch.tensor([300, 131], dtype=torch.int32), window=window, splits=splits)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lq", [1, 4])
@pytest.mark.parametrize("window, splits", [(-1, 0), (-1, 3), (120, 0), (120, 2)])
@pytest.mark.parametrize("softcap", [0.0, 0.8])
@pytest.mark.parametrize("given", [(), ("slopes",), ("sink",), ("slopes", "sink")])
def test_decode_options(dtype, lq, window, splits, softcap, given):
    q, k, v = random_qkv(4, 6, 2, lq, 1300, 24, 20, dtype=dtype)
    k, v = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in (k, v))
    lengths = torch.tensor([1300, 0, 131, 7])
    values = {
        "slopes": torch.tensor([0.5, 0.1, 0.02, 0.0, -0.001, 1.0]).repeat_interleave(2)[::2],
        "sink": random(6, dtype=dtype, seed=4),
    }
    options = {name: values[name] for name in given}
    check_decode(q, k, v, lengths, window=window, splits=splits, softcap=softcap, **options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [-1, 9])
def test_decode_with_options_is_flash_of_each_sequence(dtype, window):
    q, k, v = random_qkv(3, 4, 2, 3, 90, 32, dtype=dtype)
    lengths = torch.tensor([90, 3, 41])
    slopes, sink = random(4, seed=4).abs(), random(4, seed=5)
    options = dict(softcap=1.5, alibi_slopes=slopes, sink=sink, return_lse=True)
    decoded = heed.decode_attention(q, k, v, lengths, window=window, **options)
    for b, length in enumerate(lengths):
        own = (q[b : b + 1], k[b : b + 1, :, :length], v[b : b + 1, :, :length])
        out, lse = heed.flash_attention(*own, causal=True, window=(window, -1), **options)
        seen = visible(3, length, True, (window, -1))
        naive = naive_softmax(*own, seen, softcap=1.5, slopes=slopes, sink=sink)
        assert_accurate(decoded[0][b : b + 1], out.double(), naive)
        assert_lse(decoded[1][b : b + 1], lse.double())


@pytest.mark.parametrize("dtype", DTYPES)
def test_decode_queries_before_the_first_key_see_nothing(dtype):
    q, k, v = random_qkv(3, 2, 2, 5, 40, 16, dtype=dtype)
    out = check_decode(q, k, v, torch.tensor([0, 3, 5]))
    assert not out[0].any() and not out[1, :, :2].any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [-1, 9])
def test_decode_of_a_full_cache_is_causal_flash(dtype, window):
    q, k, v = random_qkv(2, 4, 2, 6, 90, 32, dtype=dtype)
    decoded = heed.decode_attention(q, k, v, torch.tensor([90, 90]), window=window)
    whole = heed.flash_attention(q, k, v, causal=True, window=(window, -1))
    seen = visible(6, 90, True, (window, -1))
    assert_accurate(decoded, whole.double(), naive_softmax(q, k, v, seen))


@pytest.mark.parametrize("dtype", DTYPES)
def test_decode_from_a_strided_cache(dtype):
    q, k, v = random_qkv(2, 4, 2, 1, 90, 32, dtype=dtype)
    lengths = torch.tensor([90, 1, 41, 1])[::2]
    expected = heed.decode_attention(q, k, v, lengths)
    token_major = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in (k, v)]
    assert torch.equal(heed.decode_attention(q, *token_major, lengths), expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_decode_has_the_same_bits_on_any_thread_count(dtype):
    q, k, v = random_qkv(1, 4, 2, 1, 3000, 64, dtype=dtype)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(heed.decode_attention(q, k, v, torch.tensor([2999])))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(r, results[0]) for r in results)


def test_decode_of_no_sequences():
    q, k, v = random_qkv(0, 2, 2, 1, 8, 4)
    assert heed.decode_attention(q, k, v, torch.empty(0, dtype=torch.long)).shape == (0, 2, 1, 4)


def halves(q, k, v, cut):
    part = [heed.flash_attention(q, k[:, :, s], v[:, :, s], return_lse=True) for s in cut]
    return heed.merge_attention(*part[0], *part[1])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cut", [0, 1, 40, 99, 100])
def test_merge_of_parts_is_the_whole(dtype, cut):
    q, k, v = random_qkv(2, 4, 2, 9, 100, 32, 20, dtype=dtype)
    out, lse = halves(q, k, v, (slice(0, cut), slice(cut, 100)))
    seen = visible(9, 100)
    expected, expected_lse = attention64(q, k, v, seen)
    # The parts are rounded to the inputs' type before they are merged: the naive way has that too.
    naive = naive_softmax(q, k, v, seen)
    assert_accurate(out, expected, naive)
    assert_lse(lse, expected_lse)


def test_merge_of_a_grid_with_a_context():
    query, key, value = (random(2, 5, 4, 2, 8, seed=seed) for seed in range(3))
    context = [random(2, 3, 2, 8, seed=seed) for seed in (3, 4)]
    both = {"additional_keys": context[0], "additional_values": context[1]}
    whole = heed.na2d(query, key, value, 3, **both, return_lse=True)
    near = heed.na2d(query, key, value, 3, return_lse=True)
    tokens = query.flatten(1, 2).transpose(1, 2)
    far = heed.flash_attention(tokens, *(t.transpose(1, 2) for t in context), return_lse=True)
    far = (t.transpose(1, 2).unflatten(1, (5, 4)) for t in far)
    for found, expected in zip(heed.merge_attention(*near, *far), whole):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_merge_of_packed_sequences():
    q, k, v = (random(9, heads, 8, seed=heads) for heads in (4, 2, 2))
    ends, cut = torch.tensor([0, 4, 9]), torch.tensor([0, 2, 5])
    first = torch.tensor([0, 1, 4, 5, 6])  # the keys of the first part
    second = torch.tensor([2, 3, 7, 8])

    def part(keys, ends_k):
        out, lse = heed.flash_attention_varlen(q, k[keys], v[keys], ends, ends_k, return_lse=True)
        return out, lse.T

    merged = heed.merge_attention(*part(first, cut), *part(second, torch.tensor([0, 2, 4])))
    for found, expected in zip(merged, part(torch.arange(9), ends)):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def two_parts(*shape, dtype=torch.float64):
    return [random(*(shape, shape[:-1])[n % 2], dtype=dtype, seed=n) for n in range(4)]


@pytest.mark.parametrize("shape", [(3,), (7, 3), (2, 7, 3), (1, 2, 3, 2, 5), (2, 0, 3), (0,)])
def test_merge_of_any_rank(shape):
    parts = [part.requires_grad_() for part in two_parts(*shape)]
    merged = heed.merge_attention(*parts)
    assert [t.shape for t in merged] == [shape, shape[:-1]]
    if merged[0].numel():
        rows = [part.reshape(1, 1, -1, *part.shape[len(shape) - 1 :]) for part in parts]
        for found, expected in zip(merged, heed.merge_attention(*rows)):
            assert torch.equal(found, expected.reshape(found.shape))
        assert torch.autograd.gradcheck(heed.merge_attention, parts)


def test_merge_of_any_rank_under_compile_and_vmap():
    parts = two_parts(3, 2, 7, 4, 5, dtype=torch.float32)
    expected = heed.merge_attention(*parts)
    torch.compiler.reset()
    compiled = torch.compile(
        heed.merge_attention, fullgraph=True, dynamic=True, backend="aot_eager"
    )
    for found in (compiled(*parts), torch.vmap(heed.merge_attention)(*parts)):
        assert all(torch.equal(f, e) for f, e in zip(found, expected))


def test_merge_of_any_rank_is_exported_with_open_sizes():
    class Merge(torch.nn.Module):
        def forward(self, *parts):
            return heed.merge_attention(*parts)

    def packed(tokens):
        return (random(tokens, 3, 8), random(tokens, 3), random(tokens, 3, 8), random(tokens, 3))

    sizes = ({0: torch.export.Dim("tokens")},) * 4
    exported = torch.export.export(Merge(), packed(4), dynamic_shapes=(sizes,)).module()
    parts = packed(7)
    for found, expected in zip(exported(*parts), heed.merge_attention(*parts)):
        assert torch.equal(found, expected)


def test_mistakes_of_merges_of_any_rank():
    out, lse = random(7, 2, 3), random(7, 2)
    mistakes = [("lse_a", lse.T), ("lse_b", lse[:1]), ("out_b", out[..., :2]), ("out_b", out[None])]
    for name, wrong in mistakes:
        arguments = {"out_a": out, "lse_a": lse, "out_b": out, "lse_b": lse, name: wrong}
        expect_mistake(heed.merge_attention, arguments, ValueError, [name, "needed is [7, 2"])


@pytest.mark.parametrize("dtype", DTYPES)
def test_merge_with_empty_rows(dtype):
    statistics = torch.float64 if dtype == torch.float64 else torch.float32
    out_a, out_b = random(1, 1, 4, 3, dtype=dtype), torch.zeros(1, 1, 4, 3, dtype=dtype)
    lse_a = torch.tensor([0.5, -2.0, -math.inf, -math.inf], dtype=statistics).reshape(1, 1, 4)
    lse_b = torch.full((1, 1, 4), -math.inf, dtype=statistics)
    out_a[0, 0, 2:] = 0
    for out, lse in (
        heed.merge_attention(out_a, lse_a, out_b, lse_b),
        heed.merge_attention(out_b, lse_b, out_a, lse_a),
    ):
        assert torch.equal(out, out_a)
        assert torch.equal(lse, lse_a)


def test_merge_of_far_apart_statistics():
    out_a, out_b = random(1, 1, 2, 3, seed=1), random(1, 1, 2, 3, seed=2)
    lse_a, lse_b = torch.tensor([[[1e4, -1e4]]]), torch.tensor([[[-1e4, 1e4]]])
    out, lse = heed.merge_attention(out_a, lse_a, out_b, lse_b)
    assert torch.equal(out, torch.stack([out_a[:, :, 0], out_b[:, :, 1]], 2))
    assert torch.equal(lse, torch.tensor([[[1e4, 1e4]]]))


def test_merge_under_autocast():
    q, k, v = random_qkv(1, 2, 2, 5, 9, 8)
    kept = heed.flash_attention(q, k, v, return_lse=True)
    with torch.autocast("cpu", torch.bfloat16):
        fresh = heed.flash_attention(q, k, v, return_lse=True)
        found = heed.merge_attention(*kept, *fresh)
    expected = heed.merge_attention(kept[0].bfloat16(), kept[1], *fresh)
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])


@pytest.mark.parametrize("dtype", DTYPES)
def test_merge_of_strided_tensors(dtype):
    q, k, v = random_qkv(2, 4, 2, 9, 50, 16, dtype=dtype)
    a = heed.flash_attention(q, k[:, :, :20], v[:, :, :20], return_lse=True)
    b = heed.flash_attention(q, k[:, :, 20:], v[:, :, 20:], return_lse=True)
    expected = heed.merge_attention(*a, *b)
    strided = [t.mT.contiguous().mT for t in (*a, *b)]
    assert not strided[0].is_contiguous()
    found = heed.merge_attention(*strided)
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])
