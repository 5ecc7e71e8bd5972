"""Write the table of docs/reliability.md from what the tests measured: ``python docs/results/reliability.py``.

``make test-slow`` writes ``reliability.json`` beside this script, and then runs it.
"""

from __future__ import annotations

import json
from pathlib import Path

FOLDER = Path(__file__).parent

# Test, requirement and result, where braces stand for numbers of the JSON file.
ROWS = {
    "kills": (
        "processes killed (SIGKILL) at random calls of the file system while they save",
        "no checkpoint lost",
        "{kills} kills, {in_a_save} of them in a save: {lost} lost (`torch.save` over the old file: "
        "{lost_in_place} of {kills_in_place})",
    ),
    "full": (
        "disk full at every stage of a save, and a limit on file sizes",
        "old checkpoint intact, error, no leftovers",
        "{intact} times so: {full_disks} full disks, {file_size_limits} limit",
    ),
    "rot": (
        "{flips} bit flips, {truncations} truncations",
        "all refused",
        "{refused} refused (safetensors and JSON alone accept {accepted_by_others} of the {flips_for_others} "
        "flips in their files)",
    ),
    "malice": (
        "malicious files: pickles in every place, paths that lead out, a manifest that names a module, a header "
        "of 10 GB, a tensor of 10 TB, numbers that no float holds, ...",
        "nothing executed, nothing written outside",
        "{files} files: {executed} executed, {written_outside} written outside",
    ),
    "resume": (
        "trainings by the full recipe (curriculum, penalty ramps, averages, early stopping) stopped at random steps "
        "and resumed, on 1 and on 2 threads",
        "parameters equal bit for bit",
        "{equal_on_1} of 20, {equal_on_2} of 20",
    ),
    "bad data": (
        "15 kinds of bad data × train, infer, export",
        "a named error, or a documented mask; no parameter NaN",
        "{errors} errors, {masks} masks; {poisoned} poisoned parameters",
    ),
    "ill gradients": (
        "trainings with NaN gradients at random steps",
        "all end finite, skips counted",
        "{finite} of 100 finite; {skipped} steps skipped",
    ),
    "stuck solver": (
        "fields that become NaN, blow up, or are too stiff, tolerances out of reach, by rk4, dopri5 and "
        "dopri8; under `python` and `python -O`",
        "`SolverError` after fewer than 20,000 evaluations of the field",
        "{errors} `SolverError`s, the last after {evaluations:,.0f} evaluations (`max_steps` of 1000 and less)",
    ),
    "stiffness": (
        "64 trajectories of mixed stiffness, alone and in a batch",
        "≤ 10 × tolerance apart; 0 for rk4",
        "{adaptive:.2g} × tolerance; {rk4:g}",
    ),
    "energy": (
        "energy of the frictionless double pendulum, 10 s, float64, tolerance 1e-9",
        "relative drift < 1e-6",
        "{drift:.1g}",
    ),
    "sbc": (
        "simulation-based calibration of the exact posterior of a conjugate model, and of one 20% too narrow",
        "inside the 99% band; outside",
        "{exact_outside} of {exact} latents outside; {narrow_outside} of {narrow}",
    ),
    "guides": (
        "amortised guide against NUTS against closed form, three toys",
        "means within 0.1 sd, sds within 10%, k̂ < 0.7",
        "{mean:.2g} sd, {sd:.1%}, k̂ {k:.2g}",
    ),
}


def table(rows: dict[str, dict[str, float]]) -> str:
    """Write a Markdown table; rows that weren't measured are left out and named below."""
    lines = ["| what was done | what must come of it | what came |", "| --- | --- | --- |"]
    for name, cells in ROWS.items():
        if name in rows:
            lines.append("| " + " | ".join(cell.format(**rows[name]) for cell in cells) + " |")
    missing = [name for name in ROWS if name not in rows]
    return "\n".join(lines) + "\n" + (f"\nNot measured: {', '.join(missing)}.\n" if missing else "")


def main() -> None:
    measured = json.loads((FOLDER / "reliability.json").read_text(encoding="utf-8"))
    (FOLDER / "reliability.md").write_text(table(measured["rows"]), encoding="utf-8")
    print(f"wrote {FOLDER / 'reliability.md'}")


if __name__ == "__main__":
    main()
