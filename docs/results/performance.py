"""Print the tables of docs/performance.md: ``python docs/results/performance.py``; ``--write`` puts them there.

They come from the JSON files in ``performance/``, which the scripts in ``tests/benchmarks`` wrote. Between markers of
the page stands what this prints, and nothing else; the tests compare.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
PAGE = HERE.parent / "performance.md"
Table = list[list[str]]


def read(name: str) -> dict[str, Any]:
    """One file of numbers."""
    return json.loads((HERE / "performance" / f"{name}.json").read_text(encoding="utf-8"))


def steps(name: str) -> Table:
    """Milliseconds of every row, and how many times faster than the naive one."""
    columns = read(name)["columns"]
    rows = [["", *(f"B = {column['batch']}" for column in columns)]]
    for row in (row for row in columns[0]["median_ms"] if not row.startswith("evidence")):
        cells = []
        for column in columns:
            ratio = column["times_faster_than_naive"].get(row)
            cells.append(f"{column['median_ms'][row]:.1f}" + (f" ({ratio:.1f}×)" if ratio else ""))
        rows.append([row, *cells])
    for bound in columns[0].get("bound_ms", {}):
        rows.append(
            [
                f"arithmetic alone, {bound}",
                *(f"{column['bound_ms'][bound]:.1f}" for column in columns),
            ]
        )
    return rows


def errors(name: str) -> Table:
    """Error of trajectories, root mean square in standard deviations of the noise."""
    columns = read(name)["columns"]
    rows = [["", *(f"B = {column['batch']}" for column in columns)]]
    for way in columns[0]["error_in_noise_sds"]:
        rows.append([way, *(f"{column['error_in_noise_sds'][way]:.2g}" for column in columns)])
    return rows


def ratios(name: str) -> Table:
    """Theirs over ours: above one, ours is faster."""
    columns = read(name)["columns"]
    rows = [["ours", "theirs", *(f"B = {column['batch']}" for column in columns)]]
    for mine in (row for row in columns[0]["median_ms"] if row.startswith("pyro_hybrid")):
        for other in (row for row in columns[0]["median_ms"] if row.startswith("numpyro")):
            cells = [column["median_ms"][other] / column["median_ms"][mine] for column in columns]
            rows.append([mine, other, *(f"{cell:.2f}×" for cell in cells)])
    return rows


def evidence(name: str) -> Table:
    """Computed evidence over a plain training step of the same trajectories."""
    columns = read(name)["columns"]
    rows = [["", *(f"B = {column['batch']}" for column in columns)]]
    for row, plain in (
        ("evidence", "pyro_hybrid, longer steps"),
        ("evidence, compiled", "pyro_hybrid, longer steps, compiled"),
    ):
        rows.append([row, *(f"{c['median_ms'][row] / c['median_ms'][plain]:.2f}" for c in columns)])
    return rows


def threads() -> Table:
    """One thread against two, in milliseconds."""
    rows = [["", *(f"B = {column['batch']}" for column in read("elbo_step")["columns"])]]
    both = [(1, read("elbo_step")["columns"]), (2, read("elbo_step_threads_2")["columns"])]
    for row in (row for row in both[1][1][0]["median_ms"] if row.startswith("pyro_hybrid")):
        for number, columns in both:
            rows.append(
                [
                    f"{row}, {number} thread{'s' * (number > 1)}",
                    *(f"{column['median_ms'][row]:.1f}" for column in columns),
                ]
            )
    return rows


def identify() -> Table:
    """Seconds until linear R is 0.9 for all four latents, by seed."""
    runs = [
        json.loads(path.read_text(encoding="utf-8"))
        for path in sorted((HERE / "performance").glob("time_to_identify_*.json"))
    ]
    rows = [["", *(f"seed {run['seed']}" for run in runs)]]
    for row in runs[0]["rows"]:
        rows.append(
            [row, *(arrival(run["rows"][row], run["rows"]["library"]["seconds"]) for run in runs)]
        )
    return rows


def arrival(row: dict[str, Any], fastest: float) -> str:
    if row["seconds"]:
        return f"{row['seconds']:.0f} s ({row['looks'][-1]['step']} steps; {row['seconds'] / fastest:.1f}×)"
    worst = max(min(look["linear_r"]) for look in row["looks"])
    return f"not in {row['spent']:.0f} s (> {row['spent'] / fastest:.0f}×; at best {worst:.2f})"


def scaling() -> Table:
    """Milliseconds and MiB as one size grows, the others being fixed."""
    rows = [["what grows", "from", "to", "ms", "MiB"]]
    for name, points in read("scaling")["sweeps"].items():
        first, last = points[0], points[-1]
        rows.append(
            [
                name,
                str(first["size"]),
                str(last["size"]),
                f"{first['median_ms']:.0f} → {last['median_ms']:.0f}",
                f"{first['peak_mib']:.0f} → {last['peak_mib']:.0f}",
            ]
        )
    return rows


TABLES = {
    "steps": lambda: steps("elbo_step"),
    "errors": lambda: errors("elbo_step"),
    "ratios": lambda: ratios("elbo_step"),
    "evidence": lambda: evidence("elbo_step"),
    "threads": threads,
    "identify": identify,
    "grid": lambda: steps("grid_step"),
    "grid errors": lambda: errors("grid_step"),
    "scaling": scaling,
}


def markdown(name: str) -> str:
    """A table by its name."""
    head, *body = TABLES[name]()
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *body))


def filled(page: str) -> str:
    """The page with its tables as they should be."""
    return re.sub(
        r"(<!-- table: ([a-z ]+) -->\n)(?:(?!<!--).)*(<!-- /table -->)",
        lambda found: f"{found[1]}\n{markdown(found[2])}\n\n{found[3]}",
        page,
        flags=re.DOTALL,
    )


if __name__ == "__main__":
    if "--write" in sys.argv:
        PAGE.write_text(filled(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    else:
        print("\n\n".join(f"{name}\n{markdown(name)}" for name in TABLES))
