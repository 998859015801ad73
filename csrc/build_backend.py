"""PEP 517/660 build backend: setuptools, plus the torch that the target environment already has.

Build isolation hides the environment that pip runs in, so `torch` as a build requirement would download
a second copy (gigabytes, perhaps of another version) to compile against. The stable ABI makes any torch
good for the headers: when the target environment has a new enough one, the build uses it; only otherwise
is it asked for.
"""

from __future__ import annotations

import re
import site
import sys
import sysconfig
from importlib import metadata
from pathlib import Path
from typing import Any

from setuptools import build_meta as _setuptools
from setuptools.build_meta import (  # noqa: F401  (hooks that need no torch)
    build_sdist,
    get_requires_for_build_sdist,
    prepare_metadata_for_build_editable,
    prepare_metadata_for_build_wheel,
)

MINIMUM_TORCH = (2, 10)


def target_site_packages() -> list[str]:
    """The site-packages of the environment that runs the build, whether or not isolation hides them."""
    paths = [sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
    configuration = Path(sys.prefix) / "pyvenv.cfg"
    if configuration.is_file() and re.search(
        r"include-system-site-packages\s*=\s*true", configuration.read_text(), re.IGNORECASE
    ):
        base = {"base": sys.base_prefix, "platbase": sys.base_exec_prefix}
        paths += [sysconfig.get_path("purelib", vars=base), sysconfig.get_path("platlib", vars=base)]
    if sys.prefix == sys.base_prefix and site.ENABLE_USER_SITE is not False:
        paths.append(site.getusersitepackages())
    return [path for path in dict.fromkeys(paths) if Path(path).is_dir()]


def installed_torch() -> str | None:
    """The directory whose torch the build can use, or None when there is none that is new enough."""
    for path in target_site_packages():
        for distribution in metadata.distributions(name="torch", path=[path]):
            numbers = re.match(r"(\d+)\.(\d+)", distribution.version)
            has_headers = (Path(path) / "torch/include/torch/csrc/stable/library.h").is_file()
            if numbers and has_headers and tuple(map(int, numbers.groups())) >= MINIMUM_TORCH:
                return path
    return None


def _torch_requirement() -> list[str]:
    return [] if installed_torch() else [f"torch>={'.'.join(map(str, MINIMUM_TORCH))}"]


def _show_torch() -> None:
    # At the end: whatever the isolated environment itself provides (setuptools) goes first.
    path = installed_torch()
    if path and path not in sys.path:
        sys.path.append(path)


def get_requires_for_build_wheel(config_settings: Any = None) -> list[str]:
    return [*_setuptools.get_requires_for_build_wheel(config_settings), *_torch_requirement()]


def get_requires_for_build_editable(config_settings: Any = None) -> list[str]:
    return [*_setuptools.get_requires_for_build_editable(config_settings), *_torch_requirement()]


def build_wheel(wheel_directory: str, config_settings: Any = None, metadata_directory: Any = None) -> str:
    _show_torch()
    return _setuptools.build_wheel(wheel_directory, config_settings, metadata_directory)


def build_editable(wheel_directory: str, config_settings: Any = None, metadata_directory: Any = None) -> str:
    _show_torch()
    return _setuptools.build_editable(wheel_directory, config_settings, metadata_directory)
