"""Weights of other codebases become the start of a run: nothing lost, nothing made up, nothing unpickled."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import run_here, shared_file, tiny_config
from parity_check import check_step, config_of
from safetensors.torch import load_file, save_file
from torch import Tensor

import pera_fast
from pera_fast import checkpoint, convert
from pera_fast.backbone import Backbone, save_backbone
from pera_fast.config import ConfigError, DataConfig, load_yaml
from pera_fast.data.sources import DataError
from pera_fast.data.statistics import Statistics
from pera_fast.export import Args, export
from pera_fast.model.names import from_hf, from_official, to_hf
from pera_fast.model.pera import PerA
from pera_fast.model.vit import VisionTransformer
from pera_fast.optim import make

SHOWN = tiny_config()


def official_names(model: PerA) -> dict[str, Tensor]:
    """A PerA's tensors under the authors' names, in the order of their parameters."""

    def theirs(name: str) -> str:
        name = name.replace("pixel_head.mlp", "pred_head.mlp0.mlp").replace("pixel_head", "pred_head")
        return name.replace("mask_token", "s_mask_token")

    tensors = {theirs(k): v for k, v in model.state_dict().items() if k != "centre"}
    order = ("s_mask_token", "pred_head", "student", "teacher")
    return {k: v for first in order for k, v in tensors.items() if k.startswith(first)}


def official_file(path: Path, change: Any = None) -> tuple[PerA, dict[str, Any]]:
    """What the authors' training saves after two steps of torch.optim.AdamW, written to `path`."""
    torch.manual_seed(3)
    model = PerA(SHOWN)
    tensors = official_names(model)
    ours = {name: p for name, p in model.named_parameters()}
    parameters = [ours[from_official(name)] for name in tensors]
    optimizer = torch.optim.AdamW([{"params": parameters}], lr=1e-3, eps=2e-5)
    for _ in range(2):
        for p in parameters:
            p.grad = torch.randn_like(p) if p.requires_grad else None
        optimizer.step()
    saved = {
        "model": {name: value.clone() for name, value in official_names(model).items()},
        "optimizer": optimizer.state_dict(),
        "scaler": {"scale": 65536.0},
        "best_loss": torch.tensor(8.5),
        "epoch": 7,
    }
    if change is not None:
        change(saved)
    torch.save(saved, path)
    return model, {
        from_official(n): optimizer.state.get(p, {}) for n, p in zip(tensors, parameters, strict=True)
    }


def test_official_checkpoint_is_read_whole(tmp_path: Path) -> None:
    model, moments = official_file(tmp_path / "pera.params")
    convert.official(str(tmp_path / "pera.params"), str(tmp_path / "run"), num_heads=2)
    folder = checkpoint.newest(tmp_path / "run")
    weights = load_file(folder / "model.safetensors")
    expected = model.state_dict()
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[k], v) for k, v in expected.items() if k != "centre")
    assert not weights["centre"].any()
    found = load_file(folder / "optimizer.safetensors")
    wanted = {f"{key}.{name}": x for name, state in moments.items() for key, x in state.items()}
    assert found.keys() == wanted.keys() and all(torch.equal(found[k], wanted[k]) for k in wanted)
    opened = checkpoint.Checkpoint.open(tmp_path / "run")
    assert opened.config.model == replace(SHOWN.model, drop_path=0.3)
    assert opened.config.crops.global_px == 40 and opened.config.optim.eps == 2e-5
    assert opened.statistics.mean == (0.485, 0.456, 0.406)


def test_an_optimizer_of_the_trained_tensors_alone(tmp_path: Path) -> None:
    """Numbered from 0 on without the teacher's."""

    def renumber(saved: dict[str, Any]) -> None:
        optimizer = saved["optimizer"]
        trained = [i for i, name in enumerate(saved["model"]) if not name.startswith("teacher.")]
        optimizer["state"] = {new: optimizer["state"][old] for new, old in enumerate(trained)}
        optimizer["param_groups"][0]["params"] = list(range(len(trained)))

    for name, change in (("all", None), ("trained", renumber)):
        official_file(tmp_path / f"{name}.params", change)
        convert.official(str(tmp_path / f"{name}.params"), str(tmp_path / name), num_heads=2)
    a, b = (load_file(checkpoint.newest(tmp_path / n) / "optimizer.safetensors") for n in ("all", "trained"))
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_an_empty_optimizer_begins_anew(tmp_path: Path) -> None:
    official_file(tmp_path / "pera.params", lambda saved: saved.update(optimizer={}))
    convert.official(str(tmp_path / "pera.params"), str(tmp_path / "run"), num_heads=2)
    assert not load_file(checkpoint.newest(tmp_path / "run") / "optimizer.safetensors")


@pytest.mark.parametrize("name", ["train_step.pt", "train_step_drop_path.pt"])
def test_recorded_steps_go_on_from_a_converted_checkpoint(name: str, tmp_path: Path) -> None:
    """The authors' state, through a file of theirs, convert and our checkpoint: the steps they recorded after it."""
    recorded = torch.load(shared_file(f"oracle/{name}"), weights_only=True)
    hparams = recorded["hparams"]
    torch.save({"model": recorded["init_state"], "epoch": 0}, tmp_path / "pera.params")
    convert.official(str(tmp_path / "pera.params"), str(tmp_path / "run"), num_heads=hparams["num_heads"])
    found = checkpoint.Checkpoint.open(tmp_path / "run")
    config = config_of(hparams, 3)
    got = replace(found.config.model, drop_path=hparams["drop_path"])
    assert got == config.model and found.config.crops.global_px == config.crops.global_px
    model = PerA(config)
    optimizer = make(
        "adamw_ema", model.ema_pairs(), betas=config.optim.betas, eps=config.optim.eps,
        clip_norm=config.optim.clip_norm, decay_all=True,
    )  # fmt: skip
    found.restore(model, optimizer)
    for step in recorded["steps"]:
        result = check_step(model, optimizer, hparams, step)
        assert max(result["losses"].values()) < 1e-5
        assert max(result.get("parameters", {"": 0.0}).values()) < 2e-6


def test_training_goes_on(tmp_path: Path, image_folder: Path) -> None:
    official_file(tmp_path / "pera.params")
    run = tmp_path / "run"
    made = run_here("pera_fast.convert", "official", tmp_path / "pera.params", "--out", run, "--num-heads", 2)
    assert made.returncode == 0, made.stderr
    assert f"{run}/config.yaml" in made.stdout
    before = load_file(checkpoint.newest(run) / "model.safetensors")
    trained = run_here(
        "pera_fast.train", "--config", run / "config.yaml", "--resume", "--data", image_folder, "--epochs", "3",
        "--warmup-epochs", "1", "--max-steps", 3, "--batch-size", "4", "--workers", "0", "--device", "cpu",
    )  # fmt: skip
    assert trained.returncode == 0, trained.stderr
    assert not list(tmp_path.glob("run.old*"))
    after = checkpoint.newest(run)
    assert after.name == "step_00000003"
    assert not torch.equal(load_file(after / "model.safetensors")["mask_token"], before["mask_token"])
    # The moments were not begun anew: two steps of theirs and three of ours.
    assert load_file(after / "optimizer.safetensors")["step.mask_token"] == 5


def test_schedules_go_on_where_asked(tmp_path: Path) -> None:
    official_file(tmp_path / "pera.params")
    convert.official(str(tmp_path / "pera.params"), str(tmp_path / "run"), num_heads=2, images_seen=640)
    assert checkpoint.Checkpoint.open(tmp_path / "run").images_seen == 640


def test_positions_are_resized_on_request(tmp_path: Path) -> None:
    model, _ = official_file(tmp_path / "pera.params")
    convert.official(str(tmp_path / "pera.params"), str(tmp_path / "run"), global_px=64, num_heads=2)
    found = checkpoint.Checkpoint.open(tmp_path / "run")
    assert found.config.crops.global_px == 64
    teacher = found.teacher()
    # At the new size the network does what the old one does there.
    images = torch.randn(2, 3, 64, 64)
    for got, want in zip(teacher(images), model.teacher.backbone(images), strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-5)
    shapes = found.shapes()
    assert "exp_avg_sq.student.backbone.pos_embed" not in shapes
    assert "exp_avg_sq.student.backbone.cls_token" in shapes


DAMAGES = {
    "missing": (
        lambda s: s["model"].pop("teacher.backbone.norm.bias"),
        "teacher.backbone.norm.bias is missing",
    ),
    "unknown": (lambda s: s["model"].update(extra=torch.zeros(1)), "extra is not one of this network's"),
    "shape": (
        lambda s: s["model"].update({"teacher.backbone.norm.bias": torch.zeros(5)}),
        r"teacher.backbone.norm.bias has shape \[5\], expected \[32\]",
    ),
    "moments of another shape": (
        lambda s: s["optimizer"]["state"][0].update(exp_avg=torch.zeros(2)),
        r"s_mask_token of shape \[1, 1, 32\] has a step and moments of \[\[\], \[2\], \[1, 1, 32\]\]",
    ),
    "no moment": (
        lambda s: s["optimizer"]["state"][0].pop("exp_avg"),
        "s_mask_token of shape .* has a step and",
    ),
    "step of a shape": (
        lambda s: s["optimizer"]["state"][0].update(step=torch.zeros(5)),
        "has a step and moments",
    ),
    "step below 0": (lambda s: s["optimizer"]["state"][0].update(step=-1.0), "or a step below 0"),
    "step of text": (lambda s: s["optimizer"]["state"][0].update(step="x"), "a network that can be read"),
    "moment not finite": (
        lambda s: s["optimizer"]["state"][0]["exp_avg"].fill_(float("nan")),
        "s_mask_token has a step or moments that are not finite",
    ),
    "weight not finite": (
        lambda s: s["model"]["s_mask_token"].fill_(float("inf")),
        "s_mask_token has numbers that are not finite",
    ),
    "state of nothing": (lambda s: s["optimizer"].update(state=None), "a network that can be read"),
    "optimizer of a tensor": (lambda s: s.update(optimizer=torch.zeros(3)), "expected one group of AdamW"),
    "no parameters": (
        lambda s: s["optimizer"]["param_groups"][0].pop("params"),
        "a network that can be read",
    ),
    "prototypes of one axis": (
        lambda s: s["model"].update({"student.cls_head.last_layer.weight_v": torch.zeros(3)}),
        "a network that can be read",
    ),
    "names that are numbers": (
        lambda s: s.update(model={1: torch.zeros(3)}),
        "expected tensors by their names",
    ),
    "escape codes": (
        lambda s: s["model"].update({"\x1b[31mred": torch.zeros(1)}),
        r"\?\[31mred is not one of this network",
    ),
    "moments of nothing": (lambda s: s["optimizer"]["state"].update({999: {}}), "state 999 is of no tensor"),
    "fewer parameters": (
        lambda s: s["optimizer"]["param_groups"][0]["params"].pop(),
        "expected an optimizer of the model's [0-9]+ tensors, or of the [0-9]+ trained ones",
    ),
    "other optimizer": (lambda s: s.update(optimizer={"x": 1}), "expected one group of AdamW"),
    "no vit": (lambda s: s.update(model={"a": torch.zeros(3)}), "expected a vision transformer's tensors"),
    "no tensors": (lambda s: s.update(model={"a": "b"}), "expected tensors by their names"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_does_not_fit_is_listed(damage: str, tmp_path: Path) -> None:
    change, sentence = DAMAGES[damage]
    official_file(tmp_path / "pera.params", change)
    with pytest.raises(ConfigError, match=sentence) as caught:
        convert.official(str(tmp_path / "pera.params"), str(tmp_path / "run"), num_heads=2)
    assert str(caught.value).isprintable()
    assert not (tmp_path / "run").exists(), "nothing is written"


def test_every_misfit_is_named(tmp_path: Path) -> None:
    def change(saved: dict[str, Any]) -> None:
        del saved["optimizer"]
        saved["model"].pop("teacher.backbone.norm.bias")
        saved["model"].pop("student.cls_head.mlp.0.bias")
        saved["model"]["s_mask_token"] = torch.zeros(3)

    official_file(tmp_path / "pera.params", change)
    with pytest.raises(ConfigError) as caught:
        convert.official(str(tmp_path / "pera.params"), str(tmp_path / "run"), num_heads=2)
    for name in ("teacher.backbone.norm.bias", "student.cls_head.mlp.0.bias", "mask_token has shape [3]"):
        assert name in str(caught.value)


class _Harmful:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, (str(self.mark),))


@pytest.mark.parametrize("command", ["official", "timm", "hf"])
def test_a_program_in_a_file_is_not_run(command: str, tmp_path: Path) -> None:
    torch.save({"model": {"a": _Harmful(tmp_path / "harm")}}, tmp_path / "pera.params")
    run = run_here("pera_fast.convert", command, tmp_path / "pera.params", "--out", tmp_path / "run")
    assert run.returncode == 2 and not (tmp_path / "harm").exists()
    assert (
        run.stderr.strip().splitlines()[-1].startswith("error: file: expected tensors and plain values alone")
    )
    assert "Traceback" not in run.stderr


@pytest.mark.parametrize(
    "content", [b"", b"hello", b"version https://git-lfs", b"PK\x03\x04 cut", b"\x80\x02cut"]
)
@pytest.mark.parametrize("name", ["f.params", "f.safetensors"])
def test_what_is_no_checkpoint_is_refused(name: str, content: bytes, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match="file: "):
        convert.official(str(tmp_path / name), str(tmp_path / "run"))


def test_what_is_stopped_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second try finds the folder as the first did."""
    official_file(tmp_path / "pera.params")

    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("pera_fast.convert.save_yaml", interrupted)
        with pytest.raises(KeyboardInterrupt):
            convert.official(str(tmp_path / "pera.params"), str(tmp_path / "run"), num_heads=2)
    assert [p.name for p in tmp_path.iterdir()] == ["pera.params"]
    (tmp_path / "run").mkdir()
    convert.official(str(tmp_path / "pera.params"), str(tmp_path / "run"), num_heads=2)
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == ["checkpoints", "config.yaml"]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"images_seen": -5}, "images_seen: expected a whole number of at least 0, got -5"),
        ({"global_px": 0}, "global_px: expected a multiple of patch_px = 8"),
        ({"global_px": 41}, "global_px: expected a multiple of patch_px = 8"),
        ({"num_heads": 0}, "num_heads: expected"),
        ({"num_heads": 5}, "num_heads: expected a divisor"),
        ({"stats": "/nowhere"}, "stats: cannot read /nowhere"),
    ],
)
def test_options_are_checked(options: dict[str, Any], sentence: str, tmp_path: Path) -> None:
    official_file(tmp_path / "pera.params")
    with pytest.raises(ConfigError, match=sentence):
        convert.official(str(tmp_path / "pera.params"), str(tmp_path / "run"), **{"num_heads": 2, **options})
    assert not (tmp_path / "run").exists()


def test_a_folder_with_files_is_not_written_into(tmp_path: Path) -> None:
    official_file(tmp_path / "pera.params")
    (tmp_path / "run").mkdir()
    (tmp_path / "run/kept").write_text("x")
    with pytest.raises(ConfigError, match="out: expected a new or empty folder"):
        convert.official(str(tmp_path / "pera.params"), str(tmp_path / "run"), num_heads=2)


# --- timm and transformers ---


def vit() -> VisionTransformer:
    torch.manual_seed(5)
    return VisionTransformer(SHOWN.model, SHOWN.crops.global_px).eval()


def same_features(run: Path, network: VisionTransformer) -> None:
    images = torch.randn(2, 3, 40, 40)
    backbone = pera_fast.load_backbone(run)
    for got, want in zip(backbone(images), network(images), strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-6)
    found = load_file(checkpoint.newest(run) / "model.safetensors")
    for name, value in network.state_dict().items():
        assert torch.equal(found[f"student.backbone.{name}"], value)
        assert torch.equal(found[f"teacher.backbone.{name}"], value)


def test_a_timm_vit_starts_a_run(tmp_path: Path) -> None:
    network = vit()
    folder = tmp_path / "timm"
    folder.mkdir()
    save_file({**network.state_dict(), "head.weight": torch.zeros(3, 32)}, folder / "model.safetensors")
    settings = {
        "pretrained_cfg": {"mean": [0.5, 0.5, 0.5], "std": [0.25] * 3},
        "model_args": {"num_heads": 2},
    }
    (folder / "config.json").write_text(json.dumps(settings))
    convert.timm(str(folder), str(tmp_path / "run"), preset="demo")
    same_features(tmp_path / "run", network)
    opened = checkpoint.Checkpoint.open(tmp_path / "run")
    assert opened.statistics.mean == (0.5, 0.5, 0.5) and opened.statistics.std == (0.25,) * 3
    assert opened.config.model.num_prototypes == 1024
    assert load_yaml(tmp_path / "run/config.yaml") == opened.config


@pytest.mark.parametrize("format", ["file", "timm"])
def test_what_was_exported_starts_a_run_as_it_was(format: str, tmp_path: Path) -> None:
    """Heads, bands, the scale of 16 bits: all from the file."""
    config = replace(SHOWN, model=replace(SHOWN.model, in_bands=5), data=DataConfig(bands=(5, 4, 3, 2, 1)))
    statistics = Statistics(
        {"uint8": (0.0,) * 5, "uint16": (7.0,) * 5}, {"uint8": (255.0,) * 5, "uint16": (900.0,) * 5}, (0.4,) * 5,
        (0.1,) * 5, 3, 9,
    )  # fmt: skip
    torch.manual_seed(2)
    before = Backbone(VisionTransformer(config.model, config.crops.global_px), config, statistics, 3)
    save_backbone(before, tmp_path / "b.safetensors")
    if format == "timm":
        export(Args(str(tmp_path / "b.safetensors"), str(tmp_path / "timm"), "timm"))
    convert.timm(str(tmp_path / ("timm" if format == "timm" else "b.safetensors")), str(tmp_path / "run"))
    after = pera_fast.load_backbone(tmp_path / "run")
    assert after.config.model == config.model and after.bands == (5, 4, 3, 2, 1)
    assert after.statistics == statistics
    pixels = np.random.default_rng(0).integers(0, 900, (2, 5, 40, 40)).astype(np.uint16)
    for a, b in zip(after(after.preprocess(pixels)), before(before.preprocess(pixels)), strict=True):
        assert torch.equal(a, b)
    assert run_here("pera_fast.report", tmp_path / "run").returncode == 0, "before its first step"


def test_other_statistics_take_the_place_of_an_override(tmp_path: Path) -> None:
    config = replace(SHOWN, data=DataConfig(mean=(0.1,) * 3, std=(0.1,) * 3))
    old, new = (Statistics({"uint8": (0.0,) * 3}, {"uint8": (255.0,) * 3}, (m,) * 3, (s,) * 3, 3, 9)
                for m, s in ((0.4, 0.1), (0.9, 0.01)))  # fmt: skip
    save_backbone(Backbone(vit(), config, old, 3), tmp_path / "b.safetensors")
    (tmp_path / "new.json").write_text(new.to_json())
    convert.timm(str(tmp_path / "b.safetensors"), str(tmp_path / "run"), stats=str(tmp_path / "new.json"))
    after = pera_fast.load_backbone(tmp_path / "run")
    assert after.preprocess(np.full((3, 8, 8), 230, np.uint8))[0, 0, 0] == pytest.approx(0.196, abs=0.01)


@pytest.mark.parametrize("hidden", [119, 120, 121, 345])
def test_any_width_of_the_mlp_is_kept(hidden: int, tmp_path: Path) -> None:
    """Which a ratio has to give to the unit."""
    weights = dict(vit().state_dict())
    for i in range(SHOWN.model.depth):
        weights[f"blocks.{i}.mlp.fc1.weight"], weights[f"blocks.{i}.mlp.fc1.bias"] = (
            torch.zeros(hidden, 32),
            torch.zeros(hidden),
        )
        weights[f"blocks.{i}.mlp.fc2.weight"] = torch.zeros(32, hidden)
    save_file(weights, tmp_path / "model.safetensors")
    convert.timm(str(tmp_path / "model.safetensors"), str(tmp_path / "run"), preset="demo", num_heads=2)
    assert checkpoint.Checkpoint.open(tmp_path / "run").teacher().blocks[0].mlp.fc1.out_features == hidden


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"mean": [0.5] * 3, "std": [0.2, 0.2, 0]}, "std: expected numbers above 0"),
        ({"mean": ["a", 1, 2], "std": [0.2] * 3}, "mean: expected a list of 3 numbers"),
        ({"mean": [0.5] * 2, "std": [0.2] * 3}, "a mean and a std of 3 bands, got 2 and 3"),
        ({"mean": 0.5, "std": 0.2}, "a network that can be read"),
        ({"model_args": "x"}, "a network that can be read"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings: dict[str, Any], sentence: str, tmp_path: Path) -> None:
    folder = tmp_path / "timm"
    folder.mkdir()
    save_file(vit().state_dict(), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(settings))
    with pytest.raises((ConfigError, DataError), match=sentence):
        convert.timm(
            str(folder),
            str(tmp_path / "run"),
            preset="demo",
            **({} if "model_args" in settings else {"num_heads": 2}),
        )
    assert not (tmp_path / "run").exists()


def test_a_transformers_vit_starts_a_run(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(1)
    theirs = transformers.ViTModel(
        transformers.ViTConfig(
            hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=128, image_size=40,
            patch_size=8, layer_norm_eps=1e-6,
        )
    ).eval()  # fmt: skip
    theirs.save_pretrained(tmp_path / "hf")
    convert.hf(str(tmp_path / "hf"), str(tmp_path / "run"), preset="demo")
    images = torch.randn(2, 3, 40, 40)
    cls, patches = pera_fast.load_backbone(tmp_path / "run")(images)
    want = theirs(images).last_hidden_state
    torch.testing.assert_close(torch.cat((cls[:, None], patches), 1), want, rtol=0, atol=1e-5)
    in_memory = from_hf(theirs.state_dict())  # release 5 has other names in memory than in files
    assert set(vit().state_dict()) <= set(in_memory)


def test_names_go_there_and_back() -> None:
    weights = vit().state_dict()
    again = from_hf(to_hf(weights))
    assert again.keys() == weights.keys() and all(torch.equal(again[k], v) for k, v in weights.items())
    assert len(to_hf(weights)) == len(weights) + 2 * 2 * SHOWN.model.depth


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda w: w.update({"blocks.0.ls1.gamma": torch.ones(32)}), "blocks.0.ls1.gamma is not one of"),
        (lambda w: w.pop("blocks.1.attn.qkv.bias"), "blocks.1.attn.qkv.bias is missing"),
        (lambda w: w.pop("pos_embed"), "expected pos_embed"),
        (lambda w: w.update(pos_embed=torch.zeros(1, 25, 32)), "a CLS token and a square of patches"),
    ],
)
def test_other_architectures_are_refused(change: Any, sentence: str, tmp_path: Path) -> None:
    weights = dict(vit().state_dict())
    change(weights)
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(ConfigError, match=sentence):
        convert.timm(str(tmp_path / "model.safetensors"), str(tmp_path / "run"), num_heads=2)


def test_four_bands_need_statistics(tmp_path: Path) -> None:
    weights = dict(vit().state_dict())
    weights["patch_embed.proj.weight"] = torch.zeros(32, 4, 8, 8)
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(ConfigError, match="stats: expected a file of pera_fast.stats for 4 bands"):
        convert.timm(str(tmp_path / "model.safetensors"), str(tmp_path / "run"), preset="demo", num_heads=2)
