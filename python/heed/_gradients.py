"""Whether a backward may follow."""

import torch


def may_follow(*inputs: object) -> bool:
    """Whether gradients are recorded and one of the inputs wants its own."""
    return torch.is_grad_enabled() and any(getattr(x, "requires_grad", False) for x in inputs)
