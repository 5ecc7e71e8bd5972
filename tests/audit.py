"""pip-audit of constraints.txt, judged: about a package that could not be looked up, no news is not good news."""

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
    """Name and exact version of every line; anything else is refused."""
    found: dict[str, str] = {}
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip() or line.startswith("#"):
            continue
        pin = re.fullmatch(r"([A-Za-z0-9][\w.-]*)==([\w.+!]+)", line)
        if pin is None:
            raise ValueError(
                f"line {number}: expected name==version; got {line!r}. Pin one exact version."
            )
        if canonical(pin[1]) in found:
            raise ValueError(f"line {number}: {pin[1]} is pinned twice. Keep one line.")
        found[canonical(pin[1])] = pin[2]
    return found


def complaints(output: str, errors: str, pinned: dict[str, str]) -> list[str]:
    """What speaks against the pins: known vulnerabilities, and whatever was not looked up."""
    try:
        found = json.loads(output)["dependencies"]
    except ValueError:
        last = errors.strip().splitlines()[-1:] or ["nothing was said"]
        return [f"Not every version could be looked up, so none counts as checked: {last[0]}"]
    known = {
        (canonical(one["name"]), one["version"]): one["vulns"] for one in found if "vulns" in one
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
    found = (
        complaints(done.stdout, done.stderr, pinned)
        if pinned
        else ["constraints.txt pins nothing."]
    )
    if done.returncode and not found:
        found = [f"pip-audit ended with {done.returncode}: {done.stderr.strip()}"]
    print(
        *found or [f"{len(pinned)} pinned versions looked up: no known vulnerabilities."], sep="\n"
    )
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
