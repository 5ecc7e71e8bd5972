"""Run pip-audit on constraints.txt, and fail also for packages that it could not look up."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

CONSTRAINTS = Path(__file__).parents[1] / "constraints.txt"
OPTIONS = [
    "--strict",
    "--no-deps",
    "--disable-pip",
    "--progress-spinner",
    "off",
    "--format",
    "json",
]


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def pins(text: str) -> dict[str, str]:
    """Parse the name and exact version of every line; refuse anything else."""
    versions: dict[str, str] = {}
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip() or line.startswith("#"):
            continue
        pin = re.fullmatch(r"([A-Za-z0-9][\w.-]*)==([\w.+!]+)", line)
        if pin is None:
            raise ValueError(
                f"line {number}: expected name==version; got {line!r}. Pin one exact version."
            )
        if canonical(pin[1]) in versions:
            raise ValueError(f"line {number}: {pin[1]} is pinned twice. Keep one line.")
        versions[canonical(pin[1])] = pin[2]
    return versions


def complaints(output: str, errors: str, pinned: dict[str, str]) -> list[str]:
    """List known vulnerabilities of the pins, and pins that were not looked up."""
    try:
        dependencies = json.loads(output)["dependencies"]
    except ValueError:
        last = errors.strip().splitlines()[-1:] or ["nothing was said"]
        return [f"Not every version could be looked up, so none counts as checked: {last[0]}"]
    known = {
        (canonical(one["name"]), one["version"]): one["vulns"]
        for one in dependencies
        if "vulns" in one
    }
    missing = [pin for pin in pinned.items() if pin not in known]
    return [f"{name}=={version} was not looked up." for name, version in missing] + [
        f"{name}=={version}: {one['id']}, mended in {', '.join(one['fix_versions']) or 'no version yet'}."
        for (name, version), vulnerabilities in known.items()
        for one in vulnerabilities
    ]


def main() -> int:
    pinned = pins(CONSTRAINTS.read_text(encoding="utf-8"))
    command = [sys.executable, "-m", "pip_audit", *OPTIONS, "--requirement", str(CONSTRAINTS)]
    done = subprocess.run(command, capture_output=True, text=True)
    problems = (
        complaints(done.stdout, done.stderr, pinned)
        if pinned
        else ["constraints.txt pins nothing."]
    )
    if done.returncode and not problems:
        problems = [f"pip-audit ended with {done.returncode}: {done.stderr.strip()}"]
    all_clear = f"{len(pinned)} pinned versions looked up: no known vulnerabilities."
    print(*problems or [all_clear], sep="\n")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
