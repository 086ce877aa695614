"""What PyTorch's FlexAttention says in score_mod and mask_mod, said in heed's arguments."""

import heed
import pytest
import torch
from reference import random, random_qkv
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

# That it is not compiled is meant, and its older keyword for the log-sum-exp serves all versions.
pytestmark = [
    pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile"),
    pytest.mark.filterwarnings("ignore:return_lse is deprecated"),
]

LQ, LK, HEADS = 37, 37, 4
DOCUMENT = torch.tensor([0] * 5 + [1] * 20 + [2] * 12)
ENDS = torch.tensor([0, 5, 25, 37])
SLOPES = torch.tensor([0.5, 0.25, 0.125, 0.0], dtype=torch.float64)
BIAS = random(HEADS, LQ, LK, dtype=torch.float64, seed=7)
I, J = torch.arange(LQ)[:, None], torch.arange(LK)


def causal(b, h, i, j):
    return j <= i


def window(b, h, i, j):
    return (j <= i) & (j >= i - 5)


def prefix(b, h, i, j):
    return (j <= i) | (j < 9)


def documents(b, h, i, j):
    return DOCUMENT[i] == DOCUMENT[j]


def alibi(score, b, h, i, j):
    return score - SLOPES[h] * (i - j).abs()


def bias(score, b, h, i, j):
    return score + BIAS[h, i, j]


def softcap(score, b, h, i, j):
    return 2.0 * torch.tanh(score / 2.0)


CASES = {
    "plain": (None, None, {}),
    "causal": (None, causal, dict(causal=True)),
    "window": (None, window, dict(window=(5, 0))),
    "prefix": (None, prefix, dict(mask=(J <= I) | (J < 9))),
    "documents": (None, documents, dict(mask=DOCUMENT[:, None] == DOCUMENT)),
    "alibi": (alibi, causal, dict(alibi_slopes=SLOPES, causal=True)),
    "bias": (bias, None, dict(bias=BIAS)),
    "softcap": (softcap, causal, dict(softcap=2.0, causal=True)),
}


def flex(q, k, v, score_mod, mask_mod):
    def masked(score, b, h, i, j):
        score = score if score_mod is None else score_mod(score, b, h, i, j)
        return score if mask_mod is None else torch.where(mask_mod(b, h, i, j), score, -torch.inf)

    torch.compiler.reset()  # where FlexAttention keeps what it learnt of other shapes
    return flex_attention(q, k, v, score_mod=masked, enable_gqa=True, return_lse=True)


@pytest.mark.parametrize("name", CASES)
def test_score_and_mask_mods(name):
    score_mod, mask_mod, options = CASES[name]
    inputs = random_qkv(2, HEADS, 2, LQ, LK, 16, dtype=torch.float64)
    expected = flex(*inputs, score_mod, mask_mod)
    found = heed.flash_attention(*inputs, **options, return_lse=True)
    torch.testing.assert_close(found[0], expected[0], rtol=1e-11, atol=1e-11)
    # FlexAttention's is float32.
    torch.testing.assert_close(found[1], expected[1].double(), rtol=1e-6, atol=1e-6)


def test_documents_are_packed_sequences():
    q, k, v = random_qkv(1, HEADS, 2, LQ, LK, 16, dtype=torch.float64)
    expected, _ = flex(q, k, v, None, documents)
    packed = (t[0].transpose(0, 1) for t in (q, k, v))
    found = heed.flash_attention_varlen(*packed, ENDS, ENDS)
    torch.testing.assert_close(found.transpose(0, 1)[None], expected, rtol=1e-11, atol=1e-11)


def test_block_masks():
    length, size = 96, 16
    q, k, v = random_qkv(1, HEADS, 2, length, length, 16, dtype=torch.float64)
    blocks = create_block_mask(
        lambda b, h, i, j: (i // size + j // size) % 3 != 1,
        B=None,
        H=None,
        Q_LEN=length,
        KV_LEN=length,
        device="cpu",
        BLOCK_SIZE=size,
    )
    expected = flex_attention(q, k, v, block_mask=blocks, enable_gqa=True)
    found = heed.flash_attention(
        q, k, v, block_mask=blocks.to_dense()[0].bool(), block_size=blocks.BLOCK_SIZE
    )
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)
