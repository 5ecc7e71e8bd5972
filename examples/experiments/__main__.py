"""Run an experiment from a checkout: ``python examples/experiments NAME``."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from experiments.command import main

if __name__ == "__main__":
    main()
