"""The examples as a stranger runs them, what they leave behind, and the pages' tables of their results."""

from __future__ import annotations

import ast
import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from scripts import HANGING, load

import pyro_hybrid as ph
from pyro_hybrid.identifiability.certificate import HEADLINES

ROOT = Path(__file__).parents[1]
EXAMPLES, RESULTS = ROOT / "examples", ROOT / "docs" / "results"
README = (ROOT / "README.md").read_text(encoding="utf-8")
NOT_RUN = {
    "habits",
    "unidentifiable",
    "write_your_own",
}  # what the others share; and what tests of their own run
SCRIPTS = sorted(path.stem for path in EXAMPLES.glob("*.py") if path.stem not in NOT_RUN)
RUNS = [*((script,) for script in SCRIPTS), ("pendulum", "--unconditional")]
OPTIONS = (
    "--tasks",
    "--held-out",
    "--shots",
    "--steps",
    "--seed",
    "--device",
    "--threads",
    "--out",
    "--fast",
)
OF_TRAININGS = ("--steps", "--device")  # not of examples that leave the training to ph.identify
IDENTIFIES = {"double_pendulum"}
FEW_FOR_ICA = (
    "RuntimeWarning: expected ICA to converge"  # it may not on the few systems of a tiny run
)
FIGURES = ("certificate.png", "latents.png", "loss.png", "prior_posterior.png", "trajectories.png")
SPRINGS = ("--systems", "--steps", "--seed", "--out", "--fast")  # of the example that is refused
GROUPS = {
    "posterior",
    "prior",
    "posterior_predictive",
    "log_likelihood",
    "observed_data",
    "constant_data",
}
SYSTEMS = ("double_pendulum", "pendulum", "advection_diffusion")
SEEDS = (0, 1, 2)


def options_of(script: str) -> set[str]:
    """The options that a script understands, but for flags of its own."""
    return set(OPTIONS) - (set(OF_TRAININGS) if script in IDENTIFIES else set())


def documented_keys() -> set[str]:
    """The keys of metrics.json that the quickstart's table names, in the first column, as code."""
    text = (ROOT / "docs" / "quickstart.md").read_text(encoding="utf-8")
    table = text.partition("| key of `metrics.json`")[2].partition("\n\n")[0]
    return {
        key for line in table.splitlines()[2:] for key in re.findall(r"`(\w+)`", line.split("|")[1])
    }


def numbers_in(value: Any) -> Iterator[float]:
    """Every number, however deep."""
    if isinstance(value, dict | list):
        for inside in value.values() if isinstance(value, dict) else value:
            yield from numbers_in(inside)
    elif isinstance(value, int | float):
        yield value


def run(script: Path, *arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run(
        [sys.executable, str(script), *arguments],
        capture_output=True,
        text=True,
        env=environment,
        cwd=cwd,
        timeout=HANGING,
    )


def checks(certificate: dict[str, Any]) -> list[dict[str, Any]]:
    """Every check of a certificate's JSON, in order."""
    return [*certificate["conditions"], *certificate["further"]]


def implied(certificate: dict[str, Any]) -> str:
    """The verdict that follows from a certificate's conditions."""
    found = {check["status"] for check in certificate["conditions"]}
    return "fails" if "fails" in found else "holds" if found == {"holds"} else "undecided"


def compare(text: str, certificate: dict[str, Any]) -> None:
    """A printed certificate says what its JSON says: the verdict, and of every check status and value."""
    assert text.startswith(HEADLINES[certificate["verdict"]]) and certificate["verdict"] == implied(
        certificate
    )
    lines = iter(text.splitlines())
    for check in checks(certificate):
        status = "FAILS" if check["status"] == "fails" else check["status"]
        row = next((line for line in lines if line.startswith(f"{check['condition']}  ")), None)
        assert row is not None, f"{check['condition']} isn't printed, or out of order"
        cells = re.split(r"  +", row)
        assert cells[1] == status, row
        if check["value"] is not None:
            assert float(cells[2].split()[0]) == pytest.approx(
                check["value"], rel=0.01, abs=1e-4
            ), row


class Run(NamedTuple):
    """One run of a script with ``--fast``: its name, its flags, its output, and its folder."""

    script: str
    flags: tuple[str, ...]
    done: subprocess.CompletedProcess[str]
    folder: Path

    @property
    def metrics(self) -> dict[str, Any]:
        """What it measured."""
        return json.loads((self.folder / "metrics.json").read_text(encoding="utf-8"))

    @property
    def certificate(self) -> dict[str, Any]:
        """What it was certified, or refused."""
        return json.loads((self.folder / "certificate.json").read_text(encoding="utf-8"))


def run_fast(script: str, *flags: str, cwd: Path) -> Run:
    """A fast run from a folder that isn't the repository's."""
    done = run(EXAMPLES / f"{script}.py", "--fast", *flags, "--out", "here/it goes", cwd=cwd)
    return Run(script, flags, done, cwd / "here" / "it goes")


@pytest.fixture(scope="module", params=RUNS, ids=" ".join)
def fast(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Each script once, and each flag of its own."""
    return run_fast(*request.param, cwd=tmp_path_factory.mktemp(request.param[0]))


def options(said: str) -> list[str]:
    """The options that a help text names, but for ``--help`` itself."""
    return [
        option for option in re.findall(r"^  (--[\w-]+)", said, re.MULTILINE) if option != "--help"
    ]


# ---- each script ---------------------------------------------------------------------------------


def test_there_is_an_example_for_every_system() -> None:
    assert set(SCRIPTS) >= set(SYSTEMS)


@pytest.mark.slow
def test_a_fast_run_ends_well(fast: Run) -> None:
    assert fast.done.returncode == 0, fast.done.stdout + fast.done.stderr
    said = fast.done.stderr.replace(FEW_FOR_ICA, "")
    assert "Traceback" not in said and "Warning" not in said, fast.done.stderr
    assert fast.done.stdout.startswith("latent")
    assert fast.done.stdout.rstrip().endswith("figures and numbers are in here/it goes/")


@pytest.mark.slow
def test_what_it_promises_is_there_and_nothing_else(fast: Run) -> None:
    assert {path.name for path in fast.folder.iterdir()} == {
        "certificate.json",
        "metrics.json",
        "posterior.nc",
        *FIGURES,
    }
    assert [path.name for path in fast.folder.parents[1].iterdir()] == ["here"]
    for name in FIGURES:
        content = (fast.folder / name).read_bytes()
        assert content.startswith(b"\x89PNG") and len(content) > 5_000, name


@pytest.mark.slow
def test_metrics_are_the_documented_ones_and_finite(fast: Run) -> None:
    metrics = fast.metrics
    assert documented_keys() == set(metrics)
    assert all(math.isfinite(value) for value in numbers_in(metrics))
    latents, known = len(metrics["latents"]), len(metrics["mse_physics"])
    by_latent = ("linear_r", "strong", "after_disentangle", "coverage_90", "cramer_rao")
    assert {len(metrics[key]) for key in by_latent} == {latents}
    assert 1 <= known < latents and len(metrics["mse_over_cramer_rao"]) == known
    assert all(
        0.0 <= value <= 1.0
        for key in ("linear_r", "strong", "coverage_90")
        for value in metrics[key]
    )
    settings = {option.lstrip("-").replace("-", "_") for option in options_of(fast.script)} - {
        "out"
    }  # a path of this machine only
    assert set(metrics["settings"]) >= settings and metrics["settings"]["fast"] is True
    assert all(metrics["settings"][flag.lstrip("-")] is True for flag in fast.flags)


@pytest.mark.slow
def test_the_table_on_the_screen_is_that_of_the_file(fast: Run) -> None:
    metrics, lines = fast.metrics, fast.done.stdout.splitlines()
    for i, name in enumerate(metrics["latents"]):
        row = lines[1 + i].split()
        assert row[0] == name and row[1] == (
            "physics" if i < len(metrics["mse_physics"]) else "neural"
        )
        expected = [metrics[key][i] for key in ("strong", "after_disentangle", "linear_r")]
        assert [float(text) for text in row[2:5]] == pytest.approx(expected, abs=1e-3)


@pytest.mark.slow
def test_the_certificate_on_the_screen_is_that_of_the_file_and_stands_below_the_table(
    fast: Run,
) -> None:
    certificate, lines = fast.certificate, fast.done.stdout.splitlines()
    begin, end = (
        1
        + next(
            i for i, line in enumerate(lines) if line.startswith("squared error of trajectories")
        ),
        len(lines) - 1,
    )
    assert lines[begin] == lines[end - 1] == "" and all(
        len(line) <= 120 for line in lines[begin:end]
    )
    compare("\n".join(lines[begin + 1 : end - 1]), certificate)
    assert all(math.isfinite(value) for value in numbers_in(certificate))
    assert [check["condition"] for check in certificate["conditions"]] == [
        "noise (i)",
        "fit",
        "injectivity, local (ii)",
        "injectivity, global (ii)",
        "statistics (iii)",
        "variability of means (iv)",
        "variability (iv)",
    ]
    assert (
        certificate["verdict"] != "holds"
        and certificate["systems"] < fast.metrics["settings"]["tasks"]
    )  # untrained


@pytest.mark.slow
def test_its_posterior_opens_in_arviz(fast: Run) -> None:
    data = ph.load_arviz(fast.folder / "posterior.nc")
    assert data.attrs["identified"] == fast.certificate["verdict"]
    assert json.loads(data.attrs["certificate"]) == fast.certificate
    for group in GROUPS:
        assert len(data[group].data_vars) > 0, group
    sites = set(data["posterior"].data_vars)
    assert {"unknown", "initial"} < sites and len(ph.summary(data, ["unknown"])) > 0
    assert all(bool(value.notnull().all()) for value in data["posterior"].data_vars.values())


@pytest.mark.slow
def test_a_fast_run_is_a_tiny_one(fast: Run) -> None:
    settings = fast.metrics["settings"]
    assert settings["tasks"] <= 60 and settings["held_out"] <= 40
    assert settings["shots"] <= 4
    assert fast.script in IDENTIFIES or settings["steps"] <= 12


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_names_every_option_and_its_default(script: str, tmp_path: Path) -> None:
    path = EXAMPLES / f"{script}.py"
    done = run(path, "--help", cwd=tmp_path)
    assert done.returncode == 0 and done.stderr == "" and not list(tmp_path.iterdir())
    said, summary = (
        " ".join(done.stdout.split()),
        ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))),
    )
    named = options(done.stdout)
    assert set(named) == {
        *options_of(script),
        *(flag for name, *flags in RUNS if name == script for flag in flags),
    }
    assert said.count("(default: ") == len(named)
    assert summary is not None and summary.splitlines()[0] in said and f"out/{script}" in said


@pytest.mark.parametrize("script", [*SCRIPTS, "unidentifiable"])
def test_an_option_it_does_not_know_is_refused(script: str, tmp_path: Path) -> None:
    done = run(EXAMPLES / f"{script}.py", "--epochs", "3", cwd=tmp_path)
    assert (
        done.returncode == 2
        and "unrecognized arguments: --epochs" in done.stderr
        and not list(tmp_path.iterdir())
    )


# ---- the one that is refused ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def refused(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The example of a redundant program."""
    return run_fast("unidentifiable", cwd=tmp_path_factory.mktemp("unidentifiable"))


@pytest.mark.slow
def test_a_redundant_program_is_refused_by_the_names_of_what_only_counts_together(
    refused: Run,
) -> None:
    found = refused.metrics["mass and stiffness"]["certificate"]
    (local,) = [
        check for check in found["conditions"] if check["condition"] == "injectivity, local (ii)"
    ]
    assert (
        found["verdict"] == "fails" and local["status"] == "fails" and local["interval"][1] < 1e-2
    )
    assert (
        "`mass` (" in local["why"]
        and "`stiffness` (" in local["why"]
        and "unknown" not in local["why"]
    )
    assert "`mass` (" in local["remedy"] and "`stiffness` (" in local["remedy"]
    (other,) = [
        check
        for check in refused.metrics["their ratio"]["certificate"]["conditions"]
        if check["condition"] == "injectivity, local (ii)"
    ]
    assert other["value"] > 100.0 * local["interval"][1]


@pytest.mark.slow
def test_what_the_refused_example_leaves_behind_and_says_is_the_same(refused: Run) -> None:
    assert refused.done.returncode == 0, refused.done.stdout + refused.done.stderr
    assert "Traceback" not in refused.done.stderr and "Warning" not in refused.done.stderr, (
        refused.done.stderr
    )
    pictures = {"refused.png", "certified.png", "recovered.png"}
    assert {path.name for path in refused.folder.iterdir()} == {"metrics.json", *pictures}
    assert [path.name for path in refused.folder.parents[1].iterdir()] == ["here"]
    assert all((refused.folder / name).read_bytes().startswith(b"\x89PNG") for name in pictures)
    metrics, said = refused.metrics, refused.done.stdout
    assert (
        list(metrics) == ["mass and stiffness", "their ratio"]
        and "metrics.json" in said.splitlines()[-1]
    )
    assert all(math.isfinite(value) for value in numbers_in(metrics))
    for name, part in zip(metrics, said.split("=== a program that asks for ")[1:], strict=True):
        assert (
            part.startswith(f"{name} ===") and f"true one: {metrics[name]['linear_r']:.2f}" in part
        )
        assert f"to {metrics[name]['prediction_error_in_noises']:.1f} standard deviations" in part
        compare(
            part[re.search("|".join(map(re.escape, HEADLINES.values())), part).start() :],
            metrics[name]["certificate"],
        )


def test_help_of_the_refused_example_names_every_option(tmp_path: Path) -> None:
    done = run(EXAMPLES / "unidentifiable.py", "--help", cwd=tmp_path)
    assert done.returncode == 0 and done.stderr == "" and not list(tmp_path.iterdir())
    assert options(done.stdout) == list(SPRINGS)
    assert (
        done.stdout.count("(default: ") == len(SPRINGS) - 1 and "out/unidentifiable" in done.stdout
    )  # not --fast
    assert (
        "A model that fits perfectly, predicts perfectly, and whose numbers mean nothing."
        in done.stdout
    )


# ---- the one that is written from nothing --------------------------------------------------------


def test_a_system_written_from_nothing_trains(capsys: pytest.CaptureFixture[str]) -> None:
    load(EXAMPLES / "write_your_own.py").main(steps=3)
    said = capsys.readouterr().out
    assert re.fullmatch(
        r"growth: linear R = [01]\.\d{3}\nappetite: linear R = [01]\.\d{3}\n", said
    ), said


# ---- what the pages print ------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    "page, smaller",
    [
        (
            "quickstart",
            {
                "DoublePendulum()": "DoublePendulum()\nsystem.points = 15",
                "tasks=1000": "tasks=20",
                "split(100)": "split(14)",
                "num_samples=100": "num_samples=5",
            },
        ),
        ("write_a_model", {}),
        ("identify", {"rand(80, 1)": "rand(16, 1)", "rand(80, 6)": "rand(16, 4)", "=3": "=2"}),
    ],
    ids=["quickstart", "write_a_model", "identify"],
)
def test_what_the_docs_print_runs(
    page: str, smaller: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    text = (ROOT / "docs" / f"{page}.md").read_text(encoding="utf-8")
    code = "\n".join(re.findall(r"```python\n(.*?)```", text, re.DOTALL))
    for large, small in smaller.items():
        assert large in code, large
        code = code.replace(large, small)
    printed: dict[str, Any] = {"__name__": page}
    exec(compile(code, f"{page}.md", "exec"), printed)
    if page == "quickstart":
        assert "gravity[0, 0]" in capsys.readouterr().out
    elif page == "identify":
        assert capsys.readouterr().out.startswith("Posterior of Tank\n- fit: ")
        assert [stage.summary for stage in printed["quick"].stages][:1] == ["20 gradient steps"]
    else:
        both, data = (
            (printed["model"], printed["guide"]),
            ph.systems.Pendulum().simulate(8, 4, seed=0),
        )
        fit = ph.meta_train(
            *both, data, num_steps=3, batch_size=4, curriculum={0.0: 7}, progress=False
        )
        assert fit.skipped == 0 and all(math.isfinite(loss) for loss in fit.loss)
        assert len(printed["tasks"]) == 30


# ---- what the README says of them ----------------------------------------------------------------


def fake(folder: Path, system: str, seed: int, **changes: Any) -> None:
    """A result as an example writes it, of one physics and one neural latent."""
    metrics = {
        "latents": ["known", "hidden"],
        "linear_r": [0.98 + 0.005 * seed, 0.97 - 0.01 * seed],
        "linear_r_mean": 0.97,
        "strong_mcc_after_disentangle": 0.9 + 0.03 * seed,
        "strong_mcc_neural_after_disentangle": 0.8,
        "mse_over_cramer_rao": [1.0 + seed],
        "coverage_90": [0.9, 0.85 + 0.01 * seed],
        "seconds": 100.0 + seed,
        "settings": {"seed": seed, "fast": False},
        **changes,
    }
    (folder / f"{system}_{seed}.json").write_text(json.dumps(metrics), encoding="utf-8")


def test_the_table_holds_the_worst_linear_r_and_means_over_seeds(tmp_path: Path) -> None:
    for system in SYSTEMS:
        for seed in SEEDS:
            fake(tmp_path, system, seed)
    done = run(RESULTS / "table.py", str(tmp_path), cwd=tmp_path)
    header, line, *rows = [
        [cell.strip() for cell in row.strip("|").split("|")] for row in done.stdout.splitlines()
    ]
    assert len(header) == len(line) == 8 and [row[0] for row in rows] == [
        name.replace("_", " ") for name in SYSTEMS
    ]
    expected = [
        "0, 1, 2",
        "known 0.980, hidden 0.950",
        "0.970",
        "0.930 / 0.800",
        "2.0",
        "0.90, 0.86",
        "101",
    ]
    assert all(row[1:] == expected for row in rows)


def test_the_table_refuses_what_is_missing(tmp_path: Path) -> None:
    fake(tmp_path, "double_pendulum", 0)
    done = run(RESULTS / "table.py", str(tmp_path), cwd=tmp_path)
    assert done.returncode == 1 and "expected pendulum_0.json" in done.stderr and done.stdout == ""


@pytest.mark.parametrize("seed, fast", [(1, False), (0, True)], ids=["other seed", "tiny"])
def test_the_table_refuses_results_that_are_not_what_their_name_says(
    tmp_path: Path, seed: int, fast: bool
) -> None:
    fake(tmp_path, "double_pendulum", 0, settings={"seed": seed, "fast": fast})
    done = run(RESULTS / "table.py", str(tmp_path), cwd=tmp_path)
    assert done.returncode == 1 and "expected a full run of seed 0" in done.stderr


@pytest.mark.parametrize(
    "path",
    sorted(path for name in SYSTEMS for path in RESULTS.glob(f"{name}_*.json")),
    ids=lambda path: path.stem,
)
def test_every_result_is_what_the_example_wrote_by_default(path: Path) -> None:
    (system, _, number), metrics = (
        path.stem.rpartition("_"),
        json.loads(path.read_text(encoding="utf-8")),
    )
    seed = int(number)
    assert set(metrics) == documented_keys() and all(
        math.isfinite(value) for value in numbers_in(metrics)
    )
    script, settings = (EXAMPLES / f"{system}.py").read_text(encoding="utf-8"), metrics["settings"]
    default = re.search(rf'"{system}",\s*tasks=(\d+)(?:,\s*steps=(\d+))?[,)]', script)
    assert default is not None
    assert [settings["tasks"], settings.get("steps")] == [
        text if text is None else int(text) for text in default.groups()
    ]
    assert settings["seed"] == seed
    assert not any(value is True for value in settings.values())  # --fast, or a comparison


def test_the_readme_shows_the_table_of_the_results() -> None:
    done = run(RESULTS / "table.py", cwd=RESULTS)
    assert done.returncode == 0, done.stderr
    shown = re.search(r"<!-- results -->\n(.*?)\n<!-- /results -->", README, re.DOTALL)
    assert shown is not None, "README has no <!-- results --> ... <!-- /results -->"
    assert shown[1].strip() == done.stdout.strip(), (
        "write what docs/results/table.py prints between the markers"
    )


def test_the_readme_has_no_result_outside_of_that_table() -> None:
    prose = re.sub(
        r"<!-- results -->.*?<!-- /results -->|```.*?```|`[^`]*`|\]\([^)]*\)",
        " ",
        README,
        flags=re.DOTALL,
    )
    numbers = set(re.findall(r"\d+\.\d+|\d+(?:\.\d+)?\s*%", prose))
    # Python's version, the licence's, the seconds of a trajectory (49 steps of 0.05 s), and a nominal interval
    assert numbers <= {"3.11", "2.0", "2.5", "90%"}, numbers


# ---- what the pages say of certificates ----------------------------------------------------------

PAGE = (ROOT / "docs" / "identifiability.md").read_text(encoding="utf-8")
CERTIFICATES = RESULTS / "certificates"


@pytest.fixture
def identifiability(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The script that makes the page's figures; it imports an example as scripts do."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield load(RESULTS / "identifiability.py")
    sys.modules.pop("unidentifiable", None)


@pytest.mark.parametrize("name, key", [("certified", "ratio"), ("refused", "mass_and_stiffness")])
def test_a_certificate_that_the_page_prints_is_that_of_the_numbers(name: str, key: str) -> None:
    numbers = json.loads((RESULTS / "identifiability.json").read_text(encoding="utf-8"))
    text = (RESULTS / f"{name}.txt").read_text(encoding="utf-8")
    compare(text, numbers[key])
    assert max(map(len, text.splitlines())) <= 120 and numbers[key]["systems"] == 1000
    assert numbers[key]["verdict"] == {"certified": "holds", "refused": "fails"}[name]


def test_the_page_refuses_a_program_that_fits_by_the_names_of_what_only_counts_together() -> None:
    numbers = json.loads((RESULTS / "identifiability.json").read_text(encoding="utf-8"))
    found = {check["condition"]: check for check in numbers["mass_and_stiffness"]["conditions"]}
    injectivity = [found[f"injectivity, {name} (ii)"] for name in ("local", "global")]
    assert found["fit"]["status"] == "holds" and {check["status"] for check in injectivity} == {
        "fails"
    }
    assert all(
        name in " ".join(check["why"] for check in injectivity) for name in ("mass", "stiffness")
    )
    one, other = numbers["prediction_error_in_noises"]
    assert max(one, other) < 1.5 * min(one, other)  # "equally well"


def test_every_file_that_the_page_of_identifiability_shows_is_there() -> None:
    images = re.findall(r"!\[[^\]]*\]\(([^)]+)\)", PAGE)
    included = re.findall(r"^```\{(?:literal)?include\} (\S+)$", PAGE, re.MULTILINE)
    assert len(images) >= 10 and set(included) == {
        f"results/{name}" for name in ("certified.txt", "refused.txt", "certificates.md")
    }
    missing = [name for name in (*images, *included) if not (ROOT / "docs" / name).is_file()]
    assert not missing, missing


def test_the_page_shows_the_table_of_the_certificates(identifiability: Any) -> None:
    shown = (RESULTS / "certificates.md").read_text(encoding="utf-8")
    assert shown == identifiability.table(CERTIFICATES), (
        "run python docs/results/identifiability.py --table"
    )
    assert len(shown.splitlines()) == 2 + len(list(CERTIFICATES.glob("*.json")))


@pytest.mark.parametrize("name", sorted(path.stem for path in CERTIFICATES.glob("*.json")))
def test_every_certificate_is_what_the_example_wrote_by_default(name: str) -> None:
    found, system = (
        json.loads((CERTIFICATES / f"{name}.json").read_text(encoding="utf-8")),
        name.rpartition("_")[0],
    )
    assert system in SYSTEMS and len(list(CERTIFICATES.glob(f"{system}_*.json"))) >= 2
    tasks = re.search(
        rf'"{system}",\s*tasks=(\d+)', (EXAMPLES / f"{system}.py").read_text(encoding="utf-8")
    )
    assert tasks is not None and found["systems"] == int(tasks[1]) and found["shots"] == 4
    assert found["verdict"] == implied(found) and all(
        math.isfinite(value) for value in numbers_in(found)
    )


def test_the_table_of_certificates_has_a_line_for_each_with_what_was_not_met(
    identifiability: Any, tmp_path: Path
) -> None:
    names = (
        "fit",
        "injectivity, local (ii)",
        "injectivity, global (ii)",
        "variability of means (iv)",
        "variability (iv)",
        "ambiguity against the truth",
        "separability",
        "efficiency",
    )
    found = {
        name: {"condition": name, "status": "holds", "value": 1.2345, "interval": [1.0, 20.0]}
        for name in names
    }
    found["fit"] |= {"status": "fails"}
    found["efficiency"] |= {"status": "not checked", "value": None}
    for seed, verdict in ((1, "undecided"), (0, "fails")):
        text = json.dumps(
            {
                "verdict": verdict,
                "conditions": list(found.values())[:5],
                "further": list(found.values())[5:],
            }
        )
        (tmp_path / f"double_pendulum_{seed}.json").write_text(text, encoding="utf-8")
    lines = [
        [cell.strip() for cell in row.strip("|").split("|")]
        for row in identifiability.table(tmp_path).splitlines()
    ]
    assert len({len(line) for line in lines}) == 1 and [line[:3] for line in lines[2:]] == [
        ["double pendulum", "0", "fails"],
        ["double pendulum", "1", "undecided"],
    ]
    assert lines[2][3:] == ["1.23 (1 to 20), fails", *["1.23 (1 to 20)"] * 6, "not checked"]
