"""The comparers themselves: they must not let a wrong result or a NaN pass."""

import math

import pytest
import torch
from reference import assert_accurate, assert_lse, attention64, naive_softmax, random_qkv, visible


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("wrong", [math.nan, math.inf, 0.5])
def test_wrong_element_is_found(dtype, wrong):
    q, k, v = random_qkv(1, 2, 2, 5, 7, 8, dtype=dtype)
    seen = visible(5, 7)
    expected, lse = attention64(q, k, v, seen)
    naive = naive_softmax(q, k, v, seen)
    assert_accurate(expected.to(dtype), expected, naive)
    found = expected.to(dtype, copy=True)
    found[0, 1, 2, 3] += wrong
    with pytest.raises(AssertionError):
        assert_accurate(found, expected, naive)
    lse_found = lse.to(torch.float32 if dtype != torch.float64 else dtype, copy=True)
    assert_lse(lse_found, lse)
    lse_found[0, 1, 2] += wrong
    with pytest.raises(AssertionError):
        assert_lse(lse_found, lse)


def test_reference_is_pytorch_softmax_attention():
    q, k, v = random_qkv(2, 4, 2, 5, 7, 8, 3, dtype=torch.float64)
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)
    torch.testing.assert_close(attention64(q, k, v, visible(5, 7))[0], expected)
