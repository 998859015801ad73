"""Presets, validation, YAML, and the command line's way of saying no."""

from dataclasses import replace
from pathlib import Path

import pytest

from pera_fast.config import (
    PRESETS,
    Config,
    ConfigError,
    CropConfig,
    DataConfig,
    ModelConfig,
    from_dict,
    load_yaml,
    save_yaml,
)


def test_the_papers_mask_counts() -> None:
    assert CropConfig().mask_counts(784) == (157, 157, 470)
    assert CropConfig().mask_counts(36) == (7, 7, 22)


@pytest.mark.parametrize(
    ("preset", "size"),
    [("vit_ti", (192, 12, 3)), ("vit_s", (384, 12, 6)), ("vit_b", (768, 12, 12)), ("vit_l", (1024, 24, 16)),
     ("vit_g_1024", (1024, 40, 16))],
)  # fmt: skip
def test_preset_sizes(preset: str, size: tuple[int, int, int]) -> None:
    model = PRESETS[preset].model
    assert (model.embed_dim, model.depth, model.num_heads) == size
    assert (model.patch_px, model.num_prototypes, model.head_bottleneck_dim) == (16, 131072, 384)


@pytest.mark.parametrize("preset", PRESETS)
def test_yaml_round_trip(preset: str, tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    save_yaml(PRESETS[preset], path)
    assert load_yaml(path) == PRESETS[preset]


def test_yaml_changes_a_preset(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("optim: {lr: 2e-3}\nrun:\n  epochs: 5\n")
    got = load_yaml(path, PRESETS["vit_g_1024"])
    assert got.optim.lr == 2e-3 and got.run.epochs == 5 and got.optim.momentum == (0.998, 1.0)


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"model": {"embed_dims": 3}}, "unknown setting .*embed_dims"),
        ({"modle": {}}, "unknown setting .*modle"),
        ({"model": {"depth": "deep"}}, "depth"),
        ({"optim": {"lr": "fast"}}, "config: .*fast"),
        ({"data": {"bands": 3}}, "config: "),
        ({"model": {"num_heads": 5}}, "^num_heads: expected a divisor"),
        ({"model": 3}, "model: expected a section of settings, got 3"),
        ({"run": {"precision": "fp8"}}, "precision"),
        ({"data": {"workers": "many"}}, "workers"),
        ({"data": {"workers": 1.5}}, "workers"),
        ([1], "expected sections of settings, got list"),
    ],
)
def test_yaml_that_is_refused(values: object, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        from_dict(values)  # type: ignore[arg-type]


@pytest.mark.parametrize("text", ["model: [", "\x00"])
def test_not_yaml(text: str, tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match="config.yaml is not YAML"):
        load_yaml(path)
    with pytest.raises(ConfigError, match="cannot read .*absent.yaml: No such file"):
        load_yaml(tmp_path / "absent.yaml")


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: ModelConfig(num_heads=5), "num_heads: expected a divisor of embed_dim = 768, got 5"),
        (lambda: ModelConfig(depth=0), "depth: expected a whole number of at least 1, got 0"),
        (lambda: DataConfig(workers=-1), "workers: expected a whole number of at least 0, or auto, got -1"),
        (lambda: ModelConfig(drop_path=1.0), "drop_path: expected .* got 1.0"),
        (
            lambda: CropConfig(student_ratio=0.5, teacher_ratio=0.6),
            r"student_ratio \+ teacher_ratio: .* got 1.1",
        ),
        (lambda: CropConfig(student_ratio=0.0), "student_ratio: expected a share between 0 and 1, got 0.0"),
        (
            lambda: Config(crops=CropConfig(student_ratio=0.4, teacher_ratio=0.6)),
            "at least one patch in each set",
        ),
        (
            lambda: Config(crops=CropConfig(global_px=450)),
            "global_px: expected a multiple of patch_px = 16, got 450",
        ),
        (lambda: Config(crops=CropConfig(local_px=16)), "at least one patch in each set of a 16 px crop"),
        (
            lambda: replace(PRESETS["demo"], data=replace(PRESETS["demo"].data, bands=(1, 2))),
            "bands: .* got 2",
        ),
        (
            lambda: replace(PRESETS["demo"].run, eval_train="a"),
            "eval_train and eval_val: expected both or neither",
        ),
        (lambda: replace(PRESETS["demo"].optim, clip_norm=0.0), "clip_norm"),
        (lambda: replace(PRESETS["demo"].optim, lr=float("nan")), "lr: expected finite numbers"),
    ],
)
def test_settings_that_cannot_work(make: object, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        make()  # type: ignore[operator]


def test_no_local_crops_is_allowed() -> None:
    Config(crops=CropConfig(num_local=0, local_px=16))


@pytest.mark.parametrize(
    ("cores", "local_ranks", "workers"), [(2, None, 2), (64, None, 16), (64, 8, 8), (4, 8, 1)]
)
def test_workers_share_out_the_cores(
    cores: int, local_ranks: int | None, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(cores)))
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    if local_ranks:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(local_ranks))
    assert DataConfig().num_workers == workers
    assert from_dict({"data": {"workers": 4}}).data.num_workers == 4
    assert from_dict({"data": {"workers": 0}}).data.num_workers == 0
