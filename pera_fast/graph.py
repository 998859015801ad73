"""A step recorded once as a CUDA graph and replayed: the host launches one thing instead of thousands."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten


class Recorded(Protocol):
    """What torch.cuda.CUDAGraph can do."""

    def replay(self) -> None: ...

    def reset(self) -> None: ...


Record = Callable[[Callable[[], Tensor]], tuple[Tensor, Recorded]]


def record_on_gpu(function: Callable[[], Tensor]) -> tuple[Tensor, Recorded]:
    """(what `function` returned, what fills it anew). Nothing is computed yet.

    The current stream must not be the default one: gradients are summed on the stream that made them.
    """
    graph, pool = torch.cuda.CUDAGraph(), torch.cuda.graph_pool_handle()
    stream = torch.cuda.current_stream()
    try:
        # thread_local: the loader's thread may pin memory meanwhile.
        with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
            output = function()
    except BaseException:
        # torch 2.11 leaves the pool open where what was recorded is not valid: it would keep its memory for good, and
        # nothing that another stream has used could be freed any more. Raises where torch has closed it.
        with suppress(RuntimeError):
            torch._C._cuda_endAllocateToPool(stream.device_index, pool)
            torch._C._cuda_releasePool(stream.device_index, pool)
        raise
    return output, graph


class StepGraph:
    """`function(inputs)`, recorded on buffers of its own that are filled before each replay.

    inputs: nested tuples and lists of tensors; what else is in them must be equal at every call. The function must
    not wait for the device, and everything that changes from call to call must come in through a tensor. The
    tensor it returns is overwritten by the next call.

    Its buffers, `inputs`, are free to be filled beforehand, on the same stream, once the call before has been made:
    of inputs that lie there already nothing is copied.
    """

    def __init__(
        self, function: Callable[[Any], Tensor], inputs: Any, record: Record = record_on_gpu
    ) -> None:
        self._buffers, self._structure = tree_flatten(tree_map_only(Tensor, Tensor.clone, inputs))
        self.inputs = own = tree_unflatten(self._buffers, self._structure)
        self._output, self._recorded = record(lambda: function(own))

    def __call__(self, inputs: Any) -> Tensor:
        """Raises ValueError for inputs of another structure, shape or dtype than those recorded."""
        values, structure = tree_flatten(inputs)
        if structure != self._structure:
            raise ValueError("inputs: expected the structure of those recorded, got another")
        targets, sources = [], []
        for place, (buffer, x) in enumerate(zip(self._buffers, values, strict=True)):
            if isinstance(buffer, Tensor) and isinstance(x, Tensor):
                if x.shape != buffer.shape or x.dtype != buffer.dtype:
                    raise ValueError(
                        f"inputs: expected {buffer.dtype} {list(buffer.shape)} as recorded in place {place}, got "
                        f"{x.dtype} {list(x.shape)}"
                    )
                if x.data_ptr() != buffer.data_ptr():
                    targets.append(buffer)
                    sources.append(x)
            elif isinstance(buffer, Tensor) or isinstance(x, Tensor) or x != buffer:
                raise ValueError(f"inputs: expected {buffer} as recorded in place {place}, got {x}")
        if targets:
            torch._foreach_copy_(targets, sources, non_blocking=True)
        self._recorded.replay()
        return self._output

    def release(self) -> None:
        """Give its memory back, and the communicators that it holds, whoever else still refers to this object."""
        self._recorded.reset()
