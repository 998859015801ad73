"""PerA pre-training for remote-sensing images, and the kernels it is made of.

pera_fast.load_backbone  a trained network, to take features from
pera_fast.ops            the kernels' public functions, usable in any student/teacher trainer
pera_fast.reference      what they compute, in plain PyTorch
pera_fast.config         presets and settings
pera_fast train | evaluate | embed | export | convert | report | stats | plan | info
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pera_fast.backbone import Backbone

__version__ = "0.1.0"


def load_backbone(path: str | Path, device: str = "cpu") -> Backbone:
    """A run's teacher, for features: see pera_fast.backbone.load_backbone."""
    # Here rather than above: torch takes seconds, and `import pera_fast` needs none.
    from pera_fast import backbone

    return backbone.load_backbone(path, device)
