"""Weights out: what other programs compute from them is what ours computes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import run_here, tiny_config
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import pera_fast
from pera_fast.backbone import Backbone, save_backbone
from pera_fast.config import Config, ConfigError, DataConfig
from pera_fast.data.sources import DataError
from pera_fast.data.statistics import Statistics
from pera_fast.export import Args, PlainViT, at_size, export
from pera_fast.model.vit import VisionTransformer


def made(in_bands: int = 3, **model: Any) -> Backbone:
    """A network with random weights and positions that differ, on 40 px images in patches of 8."""
    base = tiny_config()
    config = Config(
        model=replace(base.model, in_bands=in_bands, **model), crops=base.crops,
        data=DataConfig(bands=tuple(range(in_bands, 0, -1))),
    )  # fmt: skip
    torch.manual_seed(0)
    vit = VisionTransformer(config.model, config.crops.global_px)
    for p in vit.parameters():
        torch.nn.init.normal_(p, std=0.3)
    statistics = Statistics(
        {"uint8": (0.0,) * in_bands, "uint16": (10.0,) * in_bands},
        {"uint8": (255.0,) * in_bands, "uint16": (3000.0,) * in_bands},
        tuple(0.3 + 0.1 * i for i in range(in_bands)), (0.2,) * in_bands, 5, 100,
    )  # fmt: skip
    return Backbone(vit, config, statistics, step=12)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "backbone.safetensors"
    save_backbone(made(), path)
    return path


SIZES = [(40, 40), (64, 40), (40, 64), (24, 32), (8, 8), (136, 128)]


def near(got: Any, want: torch.Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(torch.as_tensor(got), want, rtol=tolerance, atol=tolerance)


# --- our own file ---


def test_a_file_holds_all_it_takes(file: Path) -> None:
    want, got = made(), pera_fast.load_backbone(file)
    assert (got.config, got.statistics, got.step) == (want.config, want.statistics, 12)
    assert got.bands == (3, 2, 1)
    pixels = np.random.default_rng(0).integers(0, 3000, (2, 3, 40, 40)).astype(np.uint16)
    for a, b in zip(got(got.preprocess(pixels)), want(want.preprocess(pixels)), strict=True):
        assert torch.equal(a, b)
    with safe_open(str(file), "pt") as opened:
        metadata = opened.metadata()
    assert json.loads(metadata["bands"]) == [3, 2, 1]
    assert json.loads(metadata["mean"]) == pytest.approx([0.3, 0.4, 0.5])
    assert json.loads(metadata["std"]) == [0.2] * 3
    like_any_other = file.with_name("other")
    like_any_other.touch()
    assert file.stat().st_mode == like_any_other.stat().st_mode, "others may read it as the umask says"


def test_nothing_of_the_run_goes_along(tmp_path: Path, image_folder: Path) -> None:
    """Folders of the machine that trained are not published."""
    run = tmp_path / "run"
    done = run_here(
        "pera_fast.train", "--data", image_folder, "--out", run, "--max-steps", 1, "--batch-size", 2, "--workers", 0,
        "--embed-dim", 32, "--depth", 2, "--num-heads", 2, "--device", "cpu", "--num-prototypes", 64,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    out = tmp_path / "out.safetensors"
    done = run_here("pera_fast.export", "--checkpoint", run, "--out", out)
    assert done.returncode == 0, done.stderr
    assert str(tmp_path).encode() not in out.read_bytes()
    images = torch.randn(1, 3, 64, 64)
    for a, b in zip(pera_fast.load_backbone(out)(images), pera_fast.load_backbone(run)(images), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("pixels", "error"),
    [
        (np.zeros((2, 40, 40), np.uint8), ValueError),
        (np.zeros((40, 40), np.uint8), ValueError),
        (np.zeros((3, 40, 40), np.float32), DataError),
    ],
)
def test_preprocess_says_what_is_wrong(pixels: np.ndarray, error: type[Exception]) -> None:
    with pytest.raises(error, match="expected|no scale for float32"):
        made().preprocess(pixels)


@pytest.mark.parametrize(
    "damage",
    ["cut", "no metadata", "missing tensor", "wrong shape", "not there", "a block less", "width", "no json"],
)
def test_a_damaged_file_is_refused(file: Path, damage: str) -> None:
    if damage == "cut":
        file.write_bytes(file.read_bytes()[:-100])
    elif damage == "not there":
        file.unlink()
    else:
        with safe_open(str(file), "pt") as opened:
            metadata = opened.metadata()
        weights = load_file(file)
        if damage == "missing tensor":
            del weights["norm.bias"]
        elif damage == "wrong shape":
            weights["norm.bias"] = torch.zeros(3)
        elif damage == "no json":
            metadata["config"] = "[" * 100_000
        elif damage in ("a block less", "width"):
            config = json.loads(metadata["config"])
            config["model"] |= {"depth": 10**6} if damage == "a block less" else {"embed_dim": 2 * 10**9}
            metadata["config"] = json.dumps(config)
        save_file(weights, file, None if damage == "no metadata" else metadata)
    with pytest.raises(ConfigError, match="^checkpoint: "):
        pera_fast.load_backbone(file)


def test_at_another_size_the_network_is_the_same() -> None:
    backbone = made()
    images = torch.randn(2, 3, 64, 64)
    resized = at_size(backbone, 64)
    assert resized.vit.pos_embed.shape[1] == 65 and resized.config.crops.global_px == 64
    for a, b in zip(resized(images), backbone(images), strict=True):
        near(a, b)
    for px, sentence in ((60, "a multiple of patch_px = 8"), (0, "a multiple"), (8, "a size that crops can have"),
                         (80_000_000, "up to 1024 of them")):  # fmt: skip
        with pytest.raises(ConfigError, match=f"image_px: expected .*{sentence}"):
            at_size(backbone, px)


def test_half_precision_is_read_as_single(file: Path) -> None:
    with safe_open(str(file), "pt") as opened:
        metadata = opened.metadata()
    save_file({name: x.half() for name, x in load_file(file).items()}, file, metadata)
    cls, _ = pera_fast.load_backbone(file)(torch.zeros(1, 3, 40, 40))
    assert cls.dtype == torch.float32


@pytest.mark.parametrize("device", ["mps", "cuda1", "gpu", "cuda:0"])
def test_a_device_that_is_not_there_is_refused(file: Path, device: str) -> None:
    if device == "cuda:0" and torch.cuda.is_available():
        pytest.skip("it is there")
    with pytest.raises(ConfigError, match="device: expected"):
        pera_fast.load_backbone(file, device)


# --- other programs ---


@pytest.mark.parametrize("in_bands", [3, 5])
def test_transformers_computes_the_same(tmp_path: Path, in_bands: int) -> None:
    transformers = pytest.importorskip("transformers")
    backbone = made(in_bands)
    save_backbone(backbone, tmp_path / "b.safetensors")
    export(Args(str(tmp_path / "b.safetensors"), str(tmp_path / "hf"), "hf"))
    theirs, info = transformers.ViTModel.from_pretrained(
        tmp_path / "hf", add_pooling_layer=False, output_loading_info=True, attn_implementation="eager"
    )
    assert not any(info.values()), info
    images = torch.randn(2, in_bands, 40, 40)
    want = torch.cat((backbone(images)[0][:, None], backbone(images)[1]), 1)
    near(theirs.eval()(images).last_hidden_state, want)


@pytest.mark.parametrize("high", [255.0, 200.0])
def test_transformers_feeds_it_the_same(tmp_path: Path, high: float) -> None:
    """Also where the statistics have another range of 8 bits; beyond it they cut off, which it does not."""
    transformers = pytest.importorskip("transformers")
    backbone = made()
    low = 0.0 if high == 255 else 30.0
    backbone.statistics = replace(backbone.statistics, low={"uint8": (low,) * 3}, high={"uint8": (high,) * 3})
    save_backbone(backbone, tmp_path / "b.safetensors")
    export(Args(str(tmp_path / "b.safetensors"), str(tmp_path / "hf"), "hf"))
    settings = json.loads((tmp_path / "hf/preprocessor_config.json").read_text())
    pixels = np.random.default_rng(0).integers(int(low), int(high) + 1, (3, 40, 40)).astype(np.uint8)
    mean, std = (np.array(settings[f"image_{name}"])[:, None, None] for name in ("mean", "std"))
    near(
        torch.tensor((pixels * settings["rescale_factor"] - mean) / std).float(),
        backbone.preprocess(pixels),
        1e-6,
    )
    assert transformers.ViTConfig.from_pretrained(tmp_path / "hf").layer_norm_eps == 1e-6


def _timm() -> Any:
    try:
        import timm
    except (
        ImportError,
        RuntimeError,
    ) as error:  # it needs torchvision, which fails beside a CPU build of torch
        pytest.skip(f"timm cannot be imported: {error}")
    return timm


@pytest.mark.parametrize("in_bands", [3, 5])
def test_timm_computes_the_same(tmp_path: Path, in_bands: int) -> None:
    timm = _timm()
    backbone = made(in_bands)
    save_backbone(backbone, tmp_path / "b.safetensors")
    export(Args(str(tmp_path / "b.safetensors"), str(tmp_path / "timm"), "timm"))
    theirs = timm.create_model(f"local-dir:{tmp_path / 'timm'}", pretrained=True).eval()
    images = torch.randn(2, in_bands, 40, 40)
    cls, patches = backbone(images)
    near(theirs.forward_features(images), torch.cat((cls[:, None], patches), 1))
    near(theirs(images), cls)
    assert theirs(torch.randn(1, in_bands, 64, 48)).shape == (1, 32), "the size is open"


def test_timms_folder_names_what_is_needed(tmp_path: Path) -> None:
    """What timm's own loader reads, where timm itself cannot be imported."""
    save_backbone(made(), tmp_path / "b.safetensors")
    export(Args(str(tmp_path / "b.safetensors"), str(tmp_path / "timm"), "timm"))
    settings = json.loads((tmp_path / "timm/config.json").read_text())
    assert settings["model_args"] == {
        "img_size": 40, "patch_size": 8, "in_chans": 3, "embed_dim": 32, "depth": 2, "num_heads": 2,
        "mlp_ratio": 4.0, "dynamic_img_size": True,
    }  # fmt: skip
    names = set(load_file(tmp_path / "timm/model.safetensors"))
    per_block = {
        f"{part}.{kind}"
        for part in ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")
        for kind in ("weight", "bias")
    }
    assert names == {
        "cls_token", "pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias", "norm.weight", "norm.bias",
        *(f"blocks.{i}.{name}" for i in range(2) for name in per_block),
    }  # fmt: skip


@pytest.mark.parametrize("size", SIZES)
def test_plain_operations_compute_the_same(size: tuple[int, int]) -> None:
    backbone = made()
    images = torch.randn(2, 3, *size)
    for a, b in zip(PlainViT(backbone.vit)(images), backbone(images), strict=True):
        near(a, b)


def test_onnxruntime_computes_the_same_at_any_size(tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    backbone = made(depth=1)
    save_backbone(backbone, tmp_path / "b.safetensors")
    export(Args(str(tmp_path / "b.safetensors"), str(tmp_path / "b.onnx"), "onnx"))
    session = onnxruntime.InferenceSession(str(tmp_path / "b.onnx"))
    for batch, size in enumerate(SIZES, 1):
        images = torch.randn(batch, 3, *size)
        got = session.run(["cls", "patches"], {"images": images.numpy()})
        for a, b in zip(got, backbone(images), strict=True):
            near(a, b)
    facts = session.get_modelmeta().custom_metadata_map
    assert json.loads(facts["bands"]) == [3, 2, 1] and json.loads(facts["mean"]) == pytest.approx(
        [0.3, 0.4, 0.5]
    )
    assert sorted(p.name for p in tmp_path.iterdir()) == ["b.onnx", "b.safetensors"]


# --- the command ---


@pytest.mark.parametrize(
    ("out", "format", "sentence"),
    [
        ("full", "timm", "out: expected a new or empty folder, got .*/full with files in it"),
        ("full", "safetensors", "out: expected a file to write, got the folder"),
        ("no/where.safetensors", "safetensors", "out: expected a file in a folder that exists"),
        ("backbone.safetensors", "onnx", "out: expected a file that nothing else is read from"),
        ("x" * 300, "safetensors", "out: expected a file that can be written"),
    ],
)
def test_out_is_checked_first(file: Path, tmp_path: Path, out: str, format: Any, sentence: str) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full/kept").write_text("x")
    with pytest.raises(ConfigError, match=sentence):
        export(Args(str(file), str(tmp_path / out), format))
    assert (tmp_path / "full/kept").read_text() == "x"


def test_what_fails_leaves_nothing(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pera_fast.checkpoint.save_file", full)
    with pytest.raises(DataError, match="No space left"):
        export(Args(str(file), str(tmp_path / "hf"), "hf"))
    with pytest.raises(DataError, match="No space left"):
        export(Args(str(file), str(tmp_path / "x.safetensors"), "safetensors"))
    assert [p.name for p in tmp_path.iterdir()] == [file.name]
