"""Replay recorded steps of the authors' implementation and print how far ours is from it.

    python tests/parity_check.py FILE.pt

FILE holds hparams, init_state (the official checkpoint's names) and steps with inputs, permutations,
drop-path subsets, losses, gradients and the state after the update; sizes come from its hparams. Prints one
JSON object; exit code 1 when a bound is broken. Runs on the backends that PERA_FAST_BACKEND selects.
"""

from __future__ import annotations

import json
import math
import sys
from typing import Any

import torch
from torch import Tensor

from pera_fast.config import Config, CropConfig, ModelConfig, OptimConfig
from pera_fast.model.names import from_official
from pera_fast.model.pera import CropGroup, Patches, PerA, make_subsets
from pera_fast.optim import TeacherOptimizer, make
from pera_fast.reference import patchify

BOUNDS = {"losses": 1e-5, "gradients": 1e-5, "parameters": 2e-6}


def config_of(hparams: dict[str, Any], in_bands: int) -> Config:
    if hparams.get("dino_weight", 1.0) != 1.0:
        sys.exit(f"dino_weight: expected 1, as in the method, got {hparams['dino_weight']}")
    return Config(
        model=ModelConfig(
            embed_dim=hparams["embed_dim"],
            depth=hparams["depth"],
            num_heads=hparams["num_heads"],
            mlp_ratio=hparams["mlp_ratio"],
            patch_px=hparams["patch"],
            in_bands=in_bands,
            drop_path=hparams["drop_path"],
            head_hidden_dim=hparams["head_hidden"],
            head_bottleneck_dim=hparams["bottleneck"],
            head_layers=hparams["head_layers"],
            num_prototypes=hparams["head_out_dim"],
        ),
        crops=CropConfig(
            global_px=hparams["global_crop"],
            local_px=hparams.get("local_crop") or hparams["global_crop"],
            num_global=hparams["num_global"],
            num_local=hparams["num_local"],
            student_ratio=hparams["s_ratio"],
            teacher_ratio=hparams["t_ratio"],
        ),
        optim=OptimConfig(
            koleo_weight=hparams["koleo_weight"],
            pixel_weight=hparams["mae_weight"],
            student_temperature=hparams["student_temp"],
            centre_momentum=hparams["center_momentum"],
            clip_norm=hparams["clip"],
            betas=tuple(hparams["betas"]),
            eps=hparams["eps"],
        ),
    )


def crop_group(
    student: Tensor, teacher: Tensor, ranks: Tensor, counts: dict[str, int], patch_px: int, targets: bool
) -> tuple[CropGroup, list[Tensor]]:
    """Patches of full crops by the recorded permutation: rank < student, < student_plus_target, the rest.

    Also (student rows, target pixels, teacher rows); a row of zeros leads each crop's first and last.
    """
    order = ranks.argsort(dim=1)
    cuts = (counts["student"], counts["student_plus_target"])
    picked = [part.sort(dim=1).values for part in order.tensor_split(cuts, dim=1)]
    if not targets:
        picked[1] = picked[1][:, :0]
    rows = [
        torch.stack(
            [patchify(image, patch_px, layout)[chosen] for image, chosen in zip(images, patches, strict=True)]
        )
        for images, layout, patches in zip(
            (student, student, teacher), ("cpq", "pqc", "cpq"), picked, strict=True
        )
    ]
    student_rows, target_pixels, teacher_rows = rows
    return CropGroup(*picked), [with_cls_row(student_rows), target_pixels, with_cls_row(teacher_rows)]


def with_cls_row(rows: Tensor) -> Tensor:
    """[n, count, size] -> [n * (1 + count), size]."""
    return torch.nn.functional.pad(rows, (0, 0, 1, 0)).flatten(0, 1)


def relative(got: Tensor, want: Tensor | float) -> float:
    """‖got - want‖ / ‖want‖; where the reference is exactly 0, ‖got‖; infinite where a number is not finite."""
    got, want = got.double(), torch.as_tensor(want).double()
    error = (got - want).norm().item() / (want.norm().item() or 1.0)
    return error if math.isfinite(error) else math.inf


def absolute(got: Tensor, want: Tensor) -> float:
    """Largest |got - want|; infinite where a number is not finite, so that no maximum can lose it."""
    error = (got.double() - want.double()).abs().max().item()
    return error if math.isfinite(error) else math.inf


def check_step(
    model: PerA, optimizer: TeacherOptimizer, hparams: dict[str, Any], step: dict[str, Any]
) -> dict[str, Any]:
    inputs, depth = step["inputs"], hparams["depth"]
    kinds = ["global"] + (["local"] if hparams["num_local"] else [])
    found = [
        crop_group(
            inputs[f"S_{kind}"], inputs[f"T_{kind}"], step[f"{kind}_noise_sort"], hparams[f"{kind}_counts"],
            hparams["patch"], kind == "global",
        )
        for kind in kinds
    ]  # fmt: skip
    groups = [group for group, _ in found]
    students, targets, teachers = zip(*(rows for _, rows in found), strict=True)
    patches = Patches(groups, torch.cat(students), targets[0], torch.cat(teachers))
    recorded = step.get("drop_path_branges", [])
    per_branch = len(groups)
    chosen = [torch.stack(list(recorded[i::per_branch])) for i in range(per_branch)] if recorded else None
    subsets = make_subsets(groups, depth, chosen)

    model.zero_grad()
    centre_used = model.centre.clone()
    losses = model(patches, subsets, step["teacher_temp"])
    losses.total.backward()
    centre_after = model.next_centre(losses.z_teacher_sum / sum(len(g.teacher) for g in groups))
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    norm = optimizer.grad_norm()
    optimizer.schedule(lr=step["lr"], weight_decay=step["wd"], momentum=step["momentum"])
    optimizer.step(grad_norm=norm)
    model.centre.copy_(centre_after)

    num_global, crops = hparams["num_global"], hparams["num_global"] + hparams["num_local"]
    components = {
        "global_dino_loss": losses.distill[:num_global].sum() / crops,
        "local_dino_loss": losses.distill[num_global:].sum() / crops,
        "koleo_loss": losses.koleo,
        "mae_loss": losses.pixel / (100 * num_global),
        "total_loss": losses.total.detach(),
    }
    want = {**step.get("loss_components", {}), "total_loss": step["total_loss"]}
    result: dict[str, Any] = {
        "losses": {name: relative(value, want[name]) for name, value in components.items() if name in want},
    }
    if "grad_norm_before_clip" in step:
        result["grad_norm"] = relative(norm, step["grad_norm_before_clip"])
    if "koleo_nn" in step:
        neighbours = torch.stack([torch.as_tensor(nn) for nn in step["koleo_nn"]])
        result["koleo_neighbours_equal"] = torch.equal(losses.koleo_neighbours, neighbours)
    for key, value in (("center_used", centre_used), ("center_after", centre_after)):
        if key in step:
            result[key] = absolute(value, step[key].flatten())
    if "grads_before_clip" in step:
        result["gradients"] = {
            name: relative(gradients[from_official(name)], grad)
            for name, grad in step["grads_before_clip"].items()
        }
    if "state_after" in step:
        state = model.state_dict()
        result["parameters"] = {
            name: absolute(state[from_official(name)], value) for name, value in step["state_after"].items()
        }
    return result


def check(path: str) -> dict[str, Any]:
    """Worst errors over the recorded steps, and whether each bound holds."""
    recorded = torch.load(path, weights_only=True)
    hparams = recorded["hparams"]
    in_bands = recorded["init_state"]["student.backbone.patch_embed.proj.weight"].shape[1]
    model = PerA(config_of(hparams, in_bands))
    state = {from_official(name): value for name, value in recorded["init_state"].items()}
    model.load_state_dict({**state, "centre": torch.zeros_like(model.centre)}, strict=True)
    optimizer = make(
        "adamw_ema", model.ema_pairs(), betas=tuple(hparams["betas"]), eps=hparams["eps"],
        clip_norm=hparams["clip"], decay_all=True,
    )  # fmt: skip
    steps = [check_step(model, optimizer, hparams, step) for step in recorded["steps"]]

    def worst(key: str) -> float:
        values = [s[key] for s in steps if key in s]
        return max((max(v.values()) if isinstance(v, dict) else v for v in values), default=0.0)

    components = sorted({name for s in steps for name in s["losses"]})
    report: dict[str, Any] = {
        "file": path.rsplit("/", 1)[-1],
        "steps": len(steps),
        "loss_relative_error": {
            name: max(s["losses"][name] for s in steps if name in s["losses"]) for name in components
        },
        "gradient_relative_error": worst("gradients"),
        "grad_norm_relative_error": worst("grad_norm"),
        "parameter_absolute_error": worst("parameters"),
        "centre_absolute_error": max(worst("center_used"), worst("center_after")),
        "koleo_neighbours_equal": all(s.get("koleo_neighbours_equal", True) for s in steps),
        "tensors_compared": {
            "gradients": sum(len(s.get("gradients", ())) for s in steps),
            "parameters": sum(len(s.get("parameters", ())) for s in steps),
        },
        "bounds": BOUNDS,
    }
    report["within_bounds"] = bool(
        max(report["loss_relative_error"].values()) <= BOUNDS["losses"]
        and max(report["gradient_relative_error"], report["grad_norm_relative_error"]) <= BOUNDS["gradients"]
        and max(report["parameter_absolute_error"], report["centre_absolute_error"]) <= BOUNDS["parameters"]
        and report["koleo_neighbours_equal"]
    )
    return report


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python tests/parity_check.py FILE.pt")
    outcome = check(sys.argv[1])
    print(json.dumps(outcome, indent=2))
    sys.exit(0 if outcome["within_bounds"] else 1)
