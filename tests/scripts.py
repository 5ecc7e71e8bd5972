"""Import scripts that belong to no package, and run them in another process."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

HANGING = 3600.0
"""Seconds after which a subprocess is taken to hang. A guard and no claim: machines are shared, and a slow run passes."""


def load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
