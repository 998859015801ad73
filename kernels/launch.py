"""What every launch has in common."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec

import torch
from torch import Tensor

_Arguments = ParamSpec("_Arguments")


def on_its_device(launch: Callable[_Arguments, None]) -> Callable[_Arguments, None]:
    """Triton launches on the current device's stream, wherever the tensors lie: make the first tensor's current."""

    @functools.wraps(launch)
    def guarded(*args: _Arguments.args, **kwargs: _Arguments.kwargs) -> None:
        with torch.cuda.device_of(next(x for x in args if isinstance(x, Tensor))):
            launch(*args, **kwargs)

    return guarded
