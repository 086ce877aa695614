"""Seeds as the operators take them."""


def signed_seed(seed: int) -> int:
    """Any whole number as the 64 bits of it that count, in the range of int64."""
    if -(2**63) <= seed < 2**63:
        return seed
    return (seed + 2**63) % 2**64 - 2**63
