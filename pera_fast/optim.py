"""The optimisers, by name: clip to a global norm, update the student, move the teacher after it.

`AdamWEMA` does it all in one pass over the parameters. The others are libraries' optimisers with the same
interface, which take the passes one after the other.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from pera_fast import ops
from pera_fast.config import ConfigError

_NOT_DECAYED = ("cls_token", "pos_embed", "mask_token", "weight_g")


class Shadow(Protocol):
    """A bfloat16 copy of a weight: pera_fast.model.shadow.Shadow."""

    weight: Tensor

    def fresh(self) -> Tensor: ...
    def mark(self) -> None: ...


class TeacherOptimizer(torch.optim.Optimizer):
    """What the optimisers here have in common.

    teachers: for each parameter with one, the tensor that is its moving average. shadows: bfloat16 copies of
    parameters and teachers that are to follow them. momentum: of the moving average. clip_norm: largest norm of the
    whole gradient.
    """

    teachers: dict[Tensor, Tensor]
    momentum: float | Tensor
    clip_norm: float
    skipped: Tensor  # bool []: whether the last step found a gradient that is not finite, and changed nothing

    def __init__(
        self,
        params: Iterable[Any],
        *,
        teachers: Mapping[Tensor, Tensor] | None = None,
        shadows: Sequence[Shadow] = (),
        momentum: float | Tensor = 0.992,
        clip_norm: float = math.inf,
        **options: Any,
    ) -> None:
        _check("momentum", momentum, lambda x: 0 <= x <= 1, "0 to 1")
        _check("clip_norm", clip_norm, lambda x: x > 0, "above 0")
        super().__init__(params, **options)  # of the class beside it
        self.teachers, self.momentum, self.clip_norm = dict(teachers or {}), momentum, clip_norm
        self._shadows = {shadow.weight: shadow for shadow in shadows}
        self.skipped = torch.tensor(False)
        if not self.teachers.keys() <= {p for group in self.param_groups for p in group["params"]}:
            raise ValueError("teachers: expected parameters of this optimiser as its keys, got others")

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles, which torch's own gives defaults, state and groups alone."""
        own = ("teachers", "momentum", "clip_norm", "_shadows", "skipped")
        return {**super().__getstate__(), **{name: vars(self)[name] for name in own}}

    def schedule(self, *, lr: float, weight_decay: float, momentum: float) -> None:
        """Set what changes from step to step; groups made with a weight decay of 0 keep it.

        Where a group's value or the momentum is a tensor, it is filled, for graphs that have captured it.
        """
        for group in self.param_groups:
            _set(group, "lr", lr)
            if group.get("decayed", True):
                _set(group, "weight_decay", weight_decay)
        _set(vars(self), "momentum", momentum)

    @torch.no_grad()
    def grad_norm(self) -> Tensor:
        """L2 norm of the whole gradient, float32 []; of DTensors, over all their shards."""
        grads = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        whole = [g for g in grads if not _is_sharded(g)]
        norms = [ops.grad_norm(whole)] if whole else []
        # Those sharded alike are summed over the ranks together.
        alike: dict[Any, list[Any]] = {}
        for g in grads:
            if _is_sharded(g):
                alike.setdefault((g.device_mesh, g.placements), []).append(g)
        for (mesh, placements), shards in alike.items():
            square = ops.grad_norm([g.to_local() for g in shards]).double().square()
            for axis, placement in enumerate(placements):
                if placement.is_partial():
                    raise ValueError("gradients: expected sharded or replicated DTensors, got partial sums")
                if placement.is_shard():
                    dist.all_reduce(square, group=mesh.get_group(axis))
            norms.append(square.sqrt().float())
        return ops.grad_norm([norm[None] for norm in norms]) if len(norms) != 1 else norms[0]

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None, *, grad_norm: Tensor | None = None) -> Any:  # type: ignore[override]
        """Update parameters, teachers and shadows. grad_norm: float32 [], if it was computed before.

        Returns what closure returns.
        """
        result = None
        if closure is not None:
            with torch.enable_grad():
                result = closure()
        self._update(self.grad_norm() if grad_norm is None else grad_norm)
        return result

    def allocate(self) -> None:
        """Make what the first step would make, where that is known, so that memory can be measured before it."""

    def _update(self, norm: Tensor) -> None:
        raise NotImplementedError

    def _move_teachers(self, params: Sequence[Tensor], momentum: float | Tensor) -> None:
        teachers = [self.teachers[p] for p in params]
        ops.ema_update(_local(teachers), _local(params), momentum, self._copies(teachers))
        self._mark(teachers)

    def _copies(self, tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
        """The shadows' copies, equal from the start: a step that is skipped leaves them as they are."""
        found = (self._shadows.get(t) if t is not None else None for t in tensors)
        return [None if shadow is None else shadow.fresh() for shadow in found]

    def _mark(self, tensors: Sequence[Tensor | None]) -> None:
        for tensor in tensors:
            if tensor is not None and tensor in self._shadows:
                self._shadows[tensor].mark()


class AdamWEMA(TeacherOptimizer):
    """AdamW, gradient clipping, the teacher's moving average and bfloat16 copies in one pass: `ops.adamw_ema`.

    params, lr, betas, eps, weight_decay: as torch.optim.AdamW; its state_dict can be loaded here and this one
    there. lr, weight_decay and momentum may be 0-d tensors, for graphs. For the others see TeacherOptimizer.

    A step whose gradient's norm is not finite changes nothing and sets `skipped`. Parameters may be DTensors of
    FSDP2, their teachers then sharded alike; each rank updates its shards.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float | Tensor = 1e-2,
        *,
        teachers: Mapping[Tensor, Tensor] | None = None,
        shadows: Sequence[Shadow] = (),
        momentum: float | Tensor = 0.992,
        clip_norm: float = math.inf,
    ) -> None:
        _check("lr", lr, lambda x: x >= 0, "at least 0")
        _check("weight_decay", weight_decay, lambda x: x >= 0, "at least 0")
        _check("eps", eps, lambda x: x >= 0, "at least 0")
        _check("betas", min(betas), lambda x: x >= 0, "at least 0")
        _check("betas", max(betas), lambda x: x < 1, "below 1")
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(
            params, teachers=teachers, shadows=shadows, momentum=momentum, clip_norm=clip_norm, defaults=defaults
        )  # fmt: skip

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            for option in ("amsgrad", "maximize"):  # of torch.optim.AdamW's state_dict
                if group.get(option):
                    raise ValueError(f"{option}: expected False, got {group[option]}")
        for parameter, values in self.state.items():
            if "step" in values:  # torch keeps it on the CPU
                values["step"] = torch.as_tensor(values["step"]).to(parameter.device, torch.float32)

    def allocate(self) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                self._state(parameter)

    def _update(self, norm: Tensor) -> None:
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            states = [self._state(p) for p in params]
            teachers = [self.teachers.get(p) for p in params]
            self.skipped = ops.adamw_ema(
                _local(params), _local([p.grad for p in params]), _local([s["exp_avg"] for s in states]),
                _local([s["exp_avg_sq"] for s in states]), [s["step"] for s in states], _local(teachers),
                self._copies(params), self._copies(teachers), grad_norm=norm, lr=group["lr"],
                weight_decay=group["weight_decay"], momentum=self.momentum, betas=group["betas"],
                eps=group["eps"], clip_norm=self.clip_norm,
            )  # fmt: skip
            self._mark(params)
            self._mark(teachers)
        still = [p for p in self.teachers if p.grad is None]
        if still:  # their teachers move all the same, unless the step was skipped
            one, momentum = torch.ones((), dtype=torch.float64, device=norm.device), self.momentum
            self._move_teachers(still, torch.where(self.skipped, one, momentum))

    def _state(self, parameter: Tensor) -> dict[str, Tensor]:
        state: dict[str, Tensor] = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
            state["exp_avg"] = torch.zeros_like(parameter)
            state["exp_avg_sq"] = torch.zeros_like(parameter)
        return state


class _StepThenTeacher(TeacherOptimizer):
    """Clip, a library's step, then `ops.ema_update`; the host waits to learn whether the gradient is finite."""

    def _update(self, norm: Tensor) -> None:
        self.skipped = ~norm.isfinite()
        if self.skipped:
            return
        params = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        torch.nn.utils.clip_grads_with_norm_(params, self.clip_norm, norm)
        super(TeacherOptimizer, self).step()
        # Fused steps leave the counter of changes as it is, by which shadows are made anew.
        torch.autograd.graph.increment_version(params)
        self._move_teachers(list(self.teachers), self.momentum)


class TorchAdamW(_StepThenTeacher, torch.optim.AdamW):
    """torch.optim.AdamW, fused, behind the interface of AdamWEMA."""


OPTIMIZERS = ("adamw_ema", "torch_adamw", "apex_adam", "apex_lamb")


def make(
    name: str,
    pairs: Sequence[tuple[str, Tensor, Tensor | None]],
    *,
    betas: tuple[float, float],
    eps: float,
    clip_norm: float,
    decay_all: bool,
    shadows: Sequence[Shadow] = (),
) -> TeacherOptimizer:
    """An optimiser by its name, one of OPTIMIZERS.

    pairs: (name, parameter, its teacher or None). decay_all: weight decay on every parameter, as the PerA authors
    do; off, it spares biases, norms, tokens, positions and weight_g. Raises ConfigError when the name or what
    it needs is not there.
    """
    decayed: list[Tensor] = []
    spared: list[Tensor] = []
    for parameter_name, parameter, _ in pairs:
        is_spared = parameter.ndim < 2 or parameter_name.rsplit(".", 1)[-1] in _NOT_DECAYED
        (spared if is_spared and not decay_all else decayed).append(parameter)
    groups: list[dict[str, Any]] = [{"params": decayed}]
    if spared:
        groups.append({"params": spared, "weight_decay": 0.0, "decayed": False})
    options: dict[str, Any] = {
        "betas": betas, "eps": eps, "clip_norm": clip_norm, "shadows": shadows,
        "teachers": {parameter: teacher for _, parameter, teacher in pairs if teacher is not None},
    }  # fmt: skip
    if name == "adamw_ema":
        # As tensors, so that the step can be recorded in a graph.
        lr, weight_decay, momentum, none = torch.zeros(4, dtype=torch.float64, device=pairs[0][1].device)
        if spared:
            groups[1]["weight_decay"] = none
        return AdamWEMA(groups, lr, weight_decay=weight_decay, momentum=momentum, **options)
    if name == "torch_adamw":
        return TorchAdamW(groups, fused=True, **options)
    if name in ("apex_adam", "apex_lamb"):
        return _apex_optimizer(name, groups, options)
    raise ConfigError(f"optimizer: expected one of {', '.join(OPTIMIZERS)}, got {name!r}")


def apex() -> dict[str, Any]:
    """Which `apex` is installed: NVIDIA's, which is built from source, or the package index's unrelated one.

    Decided without importing it.
    """
    spec = importlib.util.find_spec("apex")
    has_kernels = importlib.util.find_spec("amp_C") is not None
    places = list(spec.submodule_search_locations or []) if spec else []
    is_nvidia = has_kernels or any((Path(place) / "optimizers").is_dir() for place in places)
    if spec is None and not has_kernels:
        note = "not installed"
    elif is_nvidia:
        note = "NVIDIA apex" + ("" if has_kernels else ", without its compiled kernels (amp_C)")
    else:
        note = "an unrelated package of that name, not NVIDIA apex; not used"
    return {"is_nvidia": is_nvidia, "has_kernels": has_kernels, "note": note}


def _apex_optimizer(name: str, groups: list[dict[str, Any]], options: dict[str, Any]) -> TeacherOptimizer:
    found = apex()
    if not (found["is_nvidia"] and found["has_kernels"]):
        raise ConfigError(
            f"optimizer: expected NVIDIA apex with its compiled kernels (github.com/NVIDIA/apex) for {name}, "
            f"got {found['note']}"
        )
    module = importlib.import_module("apex.optimizers")
    base: Any = module.FusedAdam
    own: dict[str, Any] = {"adam_w_mode": True}
    if name == "apex_lamb":
        base, own["max_grad_norm"] = module.FusedLAMB, 1e30  # clipped already
    made: TeacherOptimizer = type(base.__name__, (_StepThenTeacher, base), {})(groups, **own, **options)
    return made


def _is_sharded(tensor: Any) -> bool:
    """Whether it is a DTensor; asked so, since importing the class takes a second."""
    return hasattr(tensor, "to_local")


def _local(tensors: Sequence[Any]) -> list[Any]:
    """This rank's shards of DTensors; other tensors as they are."""
    return [t.to_local() if _is_sharded(t) else t for t in tensors]


def _set(values: dict[str, Any], key: str, value: float) -> None:
    if isinstance(values[key], Tensor):
        values[key].fill_(value)
    else:
        values[key] = value


def _check(name: str, value: float | Tensor, holds: Callable[[float], bool], expected: str) -> None:
    if not isinstance(value, Tensor) and not holds(value):
        raise ValueError(f"{name}: expected {expected}, got {value}")
