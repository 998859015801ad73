"""bfloat16 copies of weights: right whenever they are used, with the weight's own gradient."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from pera_fast.model.shadow import Shadow, give_shadows, shadows_of, weight_of


@pytest.fixture
def layer() -> nn.Linear:
    torch.manual_seed(0)
    layer = nn.Linear(4, 3)
    give_shadows(layer)
    return layer


def product(layer: nn.Linear, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    with torch.autocast("cpu", dtype):
        return nn.functional.linear(torch.ones(2, 4), weight_of(layer), layer.bias)


def test_used_under_autocast_to_bfloat16_alone(layer: nn.Linear) -> None:
    assert weight_of(layer) is layer.weight
    with torch.autocast("cpu", torch.float16):
        assert weight_of(layer) is layer.weight
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(weight_of(layer), layer.weight.bfloat16())
    plain = nn.Linear(4, 3)
    with torch.autocast("cpu", torch.bfloat16):
        assert weight_of(plain) is plain.weight


def test_gradient_is_the_weights(layer: nn.Linear) -> None:
    twin = nn.Linear(4, 3)
    twin.load_state_dict(layer.state_dict())
    for one in (layer, twin):
        product(one).square().sum().backward()
    assert layer.weight.grad.dtype == torch.float32 and torch.equal(layer.weight.grad, twin.weight.grad)


@pytest.mark.parametrize("change", ["in place", "load_state_dict", "inference"])
def test_a_changed_weight_is_seen(layer: nn.Linear, change: str) -> None:
    before = product(layer)
    if change == "load_state_dict":
        layer.load_state_dict({"weight": torch.ones(3, 4), "bias": torch.zeros(3)})
    else:
        with torch.no_grad():
            layer.weight.fill_(1)
    with torch.inference_mode(change == "inference"):
        after = product(layer)
    assert not torch.equal(after, before) and torch.equal(
        shadows_of(layer)[0].copy, torch.ones(3, 4).bfloat16()
    )


def test_the_copy_is_not_made_again_without_need(layer: nn.Linear) -> None:
    product(layer)
    shadow = shadows_of(layer)[0]
    version = shadow.copy._version
    product(layer)
    assert shadow.copy._version == version


def test_copied_with_its_layer_and_left_out_of_the_state(layer: nn.Linear) -> None:
    product(layer)
    twin = copy.deepcopy(layer)
    with torch.no_grad():
        twin.weight.fill_(1)
    assert shadows_of(twin)[0].weight is twin.weight
    assert torch.equal(
        product(twin), nn.functional.linear(torch.ones(2, 4), torch.ones(3, 4), layer.bias).bfloat16()
    )
    assert torch.equal(product(layer), product(layer)) and list(layer.state_dict()) == ["weight", "bias"]
    with pytest.raises(RuntimeError, match="copied with the layer"):
        copy.deepcopy(Shadow(layer.weight))
