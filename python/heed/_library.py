"""Loads the compiled operators into ``torch.ops.heed``."""

from pathlib import Path

import torch

_PATH = Path(__file__).with_name("libheed_torch.so")

try:
    torch.ops.load_library(_PATH)
except OSError as error:
    raise ImportError(
        f"heed cannot load {_PATH} into PyTorch {torch.__version__} (it is built for one release "
        f"of PyTorch, the one that its package depends on): {error}"
    ) from error


def version() -> str:
    return torch.ops.heed.version()
