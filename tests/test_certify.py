"""certify must say no, with the right condition and the right name; yes to what is identifiable; and else neither."""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Callable
from dataclasses import replace

import pyro
import pyro.distributions as dist
import pytest
import torch
from certified import (
    ALL,
    EQUATIONS,
    FLAT,
    FLAWS,
    GLOBAL,
    LOCAL,
    MEANS,
    Case,
    Equation,
    Folded,
    Repeated,
    formula,
    forty,
    functions,
    known,
    lines,
    real,
)
from tqdm.auto import tqdm

import pyro_hybrid as ph
from pyro_hybrid.beliefs.families import LogNormal, Normal
from pyro_hybrid.identifiability import certify as module

pytestmark = pytest.mark.slow  # a certificate solves its program many times

GOOD = known("decay chain", "k1", "k2", tasks=300, support=1, shots=3, points=12, noise=0.01)
ONE = known("decay", "k", tasks=256, support=1, shots=6, points=12, noise=0.01)


@pytest.fixture(scope="module")
def good() -> ph.Certificate:
    return GOOD.certify()


def refused(case: Case, condition: str, *names: str) -> ph.Certificate:
    """Its certificate, which must refuse it by this condition, naming these latents in that order or another."""
    certificate = case.certify()
    check = certificate[condition]
    assert certificate.verdict == "fails" and check.status == "fails", certificate
    assert all(name in check.why for name in names), check.why
    return certificate


# ---- yes -----------------------------------------------------------------------------------------


def test_a_good_model_with_many_systems_is_certified_in_every_condition(
    good: ph.Certificate,
) -> None:
    assert good.verdict == "holds" and {check.status for check in good.conditions} == {"holds"}
    assert good.systems == 300 and good.shots == 1
    assert good["fit"].value == pytest.approx(1.0, abs=0.1)
    assert good[LOCAL].interval[0] > 10.0 and good[GLOBAL].value == 1.0
    assert good[MEANS].interval[0] > 100.0 and good[ALL].interval[0] > 6.0


def test_a_good_model_recovers_the_truth_up_to_a_linear_map_and_near_the_bound(
    good: ph.Certificate,
) -> None:
    assert good["ambiguity against the truth"].status == "holds" and good["ambiguity"].value > 0.99
    assert good["efficiency"].value == pytest.approx(1.0, abs=0.3)


def test_twelve_systems_of_a_good_model_are_too_few_to_tell() -> None:
    certificate = replace(GOOD, tasks=12).certify()
    assert certificate.verdict == "undecided"
    assert certificate[MEANS].status == "holds" and certificate[ALL].status == "undecided"
    wanted = int(certificate[ALL].remedy.split()[0])
    assert certificate[ALL].remedy.endswith("systems like these are enough.") and 50 < wanted < 300


# ---- no: what the prior says ---------------------------------------------------------------------


def test_an_unconditional_prior_is_refused_by_its_means() -> None:
    certificate = refused(replace(GOOD, conditional=False), MEANS, "The prior ignores the support.")
    assert "SupportPrior" in certificate[MEANS].remedy
    assert certificate[ALL].status == "fails" and certificate[ALL].value < 1e-6
    assert certificate[LOCAL].status == "holds"  # nothing is wrong with the equations


def test_one_system_with_fresh_shots_for_every_task_is_refused_by_its_means() -> None:
    certificate = refused(replace(ONE, repeated="shots"), MEANS, "Weakest direction: `k`")
    assert abs(certificate[MEANS].value) < 0.15


def test_the_same_trajectories_again_and_again_with_a_little_noise_are_refused_by_their_means() -> (
    None
):
    certificate = refused(replace(ONE, repeated="trajectories"), MEANS, "Weakest direction: `k`")
    assert certificate[MEANS].value < 0.0  # the tasks differ less than shots of one of them


def test_priors_that_vary_in_their_means_alone_are_refused_where_two_statistics_are_claimed() -> (
    None
):
    names = ("slope", "curve")

    def states(p, t, start):
        return start + sum(getattr(p, name) * FLAT[name](t) for name in names)

    fixed = Equation(
        {name: real(0.0, 1.0) for name in names}, ((-1.0, 1.0),), 3.0, ((0,),), formula(states)
    )
    case = Case(
        fixed,
        {name: Normal(1) for name in names},
        {name: lambda z, name=name: z[name] for name in names},
    )
    certificate = refused(case, ALL, "z²")
    assert certificate[ALL].value < 1e-6 and certificate[MEANS].status == "holds"
    assert "2 directions have more than one nat" in certificate[ALL].why  # of four
    assert "choose a family that has only the statistics that vary" in certificate[ALL].remedy


@pytest.mark.parametrize(("varies", "condition"), [("means", ALL), ("variances", MEANS)])
def test_a_function_whose_prior_varies_in_means_or_in_variances_alone_is_refused(
    varies: str, condition: str
) -> None:
    certificate = ph.certify(*functions(varies), lines(300), progress=False)
    assert (
        certificate.verdict == certificate[condition].status == "fails"
        and "weights" in certificate[condition].why
    )
    found = certificate.numbers["variability"]
    assert int((found.nats < 1e-9).sum()) == 2  # of the four natural parameters, two stand still
    assert bool((found.locations < 1e-9).all()) == (varies == "variances")


def test_two_systems_are_refused_because_the_theorem_counts_to_five() -> None:
    certificate = refused(replace(GOOD, tasks=2), MEANS, "n·k + 1 = 5 different systems")
    assert certificate[ALL].status == "fails" and certificate[ALL].value == 2.0
    assert {check.status for check in certificate.further} == {"not checked"}


@pytest.mark.parametrize(("family", "loc"), [(Repeated, 0.5), (Repeated, -2.0), (Folded, 0.5)])
def test_statistics_that_follow_from_each_other_are_refused_by_name(
    family: type[Normal], loc: float
) -> None:
    case = replace(
        known("decay", "source", tasks=60, points=8),
        sites={"source": family(1, loc=loc, scale=0.3)},
    )
    certificate = refused(case, "statistics", "One sufficient statistic of `source` follows")
    assert certificate["statistics"].value < 1e-12
    assert certificate[MEANS].status == certificate[ALL].status == "not checked"


def test_the_repeated_family_is_a_family() -> None:
    family, natural = Repeated(2), torch.randn(5, 2, 2, dtype=torch.float64)
    z = torch.randn(5, 2, dtype=torch.float64)
    density = (
        family.log_base(z)
        + (family.statistics(z) * natural).sum(-1)
        - family.log_partition(natural)
    )
    torch.testing.assert_close(density.sum(-1), family.distribution(natural).log_prob(z))


# ---- no: what the equations say ------------------------------------------------------------------


def test_a_product_of_latents_is_refused_naming_both() -> None:
    half = LogNormal(1, loc=0.1, scale=0.25)
    case = replace(GOOD, sites={"a": half, "b": half, "k2": GOOD.sites["k2"]})
    case = replace(case, slots=GOOD.slots | {"k1": lambda z: z["a"] * z["b"]})
    certificate = refused(case, LOCAL, "1 of 3 directions", "`a` (", "`b` (")
    assert "k2" not in certificate[LOCAL].why and certificate[LOCAL].value < 1e-3
    assert (
        certificate[GLOBAL].status == "fails"
    )  # what is redundant nearby is redundant far away too


def test_a_sum_of_latents_is_refused_naming_both() -> None:
    case = replace(
        ONE, sites={"a": Normal(1, loc=0.4, scale=0.2), "b": Normal(1, loc=0.4, scale=0.2)}
    )
    refused(
        replace(case, slots=ONE.slots | {"k": lambda z: z["a"] + z["b"]}),
        LOCAL,
        "1 of 2 directions",
        "`a` (",
        "`b` (",
    )


@pytest.mark.parametrize("size", [torch.abs, torch.square], ids=["abs", "square"])
def test_a_sign_symmetry_is_refused_naming_the_latent_and_two_of_its_values(size) -> None:
    case = replace(GOOD, sites={"z": Normal(1), "k2": GOOD.sites["k2"]})
    certificate = refused(
        replace(case, slots=GOOD.slots | {"k1": lambda z: 0.4 + size(z["z"])}), GLOBAL, "`z` "
    )
    twins = certificate.numbers["equivalent latents"]
    alike = twins.distance < 1.0
    mirror = torch.tensor([-1.0, 1.0])
    torch.testing.assert_close(
        twins.second[alike], twins.first[alike] * mirror, atol=1e-2, rtol=1e-2
    )
    assert certificate[LOCAL].status != "fails"  # close by there is no other


def test_exchangeable_latents_are_refused_naming_both() -> None:
    case = replace(GOOD, sites={name: LogNormal(1, scale=0.5) for name in ("one", "other")})
    rules = {"k1": lambda z: 0.5 * (z["one"] + z["other"]), "k2": lambda z: z["one"] * z["other"]}
    certificate = refused(replace(case, slots=GOOD.slots | rules), GLOBAL, "`one` ", "`other` ")
    twins = certificate.numbers["equivalent latents"]
    alike = twins.distance < 0.1
    torch.testing.assert_close(
        twins.second[alike], twins.first[alike].flip(1), atol=0.02, rtol=0.02
    )


def test_a_latent_that_the_field_ignores_is_refused_by_name() -> None:
    certificate = refused(
        replace(GOOD, sites={**GOOD.sites, "idle": Normal(1)}), LOCAL, "Weakest direction: `idle`."
    )
    assert certificate[LOCAL].value == 0.0 and certificate[ALL].status == "fails"
    assert certificate[GLOBAL].status == "fails" and "`idle` " in certificate[GLOBAL].why


def test_a_latent_that_only_a_sensor_without_data_sees_is_refused_by_name() -> None:
    case = replace(
        GOOD, sites={**GOOD.sites, "brightness": LogNormal(1, scale=0.4)}, gain="brightness"
    )
    certificate = refused(case, LOCAL, "Weakest direction: `brightness`.")
    assert certificate[LOCAL].value == 0.0 and certificate[GLOBAL].status == "fails"


@pytest.mark.parametrize(
    "system", [ph.systems.Pendulum(), ph.systems.DoublePendulum()], ids=lambda s: type(s).__name__
)
def test_an_untrained_model_is_refused_by_its_fit_and_its_prior(system: ph.systems.System) -> None:
    system.points = 12
    model = ph.models.MetaHybridVAE(system)
    certificate = ph.certify(model, model.guide(), system.simulate(60, 4, seed=0), progress=False)
    assert certificate.verdict == "fails"
    assert certificate["fit"].status == "fails" and certificate["fit"].interval[0] > 2.0
    assert "Train longer" in certificate["fit"].remedy
    assert certificate[ALL].status == "fails" and certificate[ALL].interval[1] < 1e-3


# ---- any program ---------------------------------------------------------------------------------


def test_functions_with_a_prior_and_a_guide_by_hand_are_certified() -> None:
    certificate = ph.certify(*functions(), lines(3000), progress=False)  # precisions vary little
    assert certificate.verdict == "holds", certificate
    assert certificate["ambiguity against the truth"].value > 0.98


def test_certifying_changes_neither_programs_nor_data_nor_random_numbers() -> None:
    model, guide = replace(GOOD, tasks=40).build()
    tasks = replace(GOOD, tasks=40).data()
    model.train()
    model.zero_grad()
    before = copy.deepcopy((model.state_dict(), guide.state_dict()))
    values, random = tasks.values.clone(), torch.random.get_rng_state()
    ph.certify(model, guide, tasks, progress=False)
    torch.testing.assert_close((model.state_dict(), guide.state_dict()), before, rtol=0, atol=0)
    assert torch.equal(torch.random.get_rng_state(), random) and torch.equal(tasks.values, values)
    assert model.training and guide.training and guide.prior is model.prior
    assert all(
        p.requires_grad and p.grad is None and p.dtype == torch.float32 for p in model.parameters()
    )
    assert not pyro.get_param_store().keys()


def test_a_seed_gives_the_same_certificate_and_another_the_same_verdict() -> None:
    def certificate(seed: int) -> dict:
        return replace(ONE, tasks=150).certify(seed=seed).to_dict() | {"seconds": 0.0}

    first, again, other = certificate(0), certificate(0), certificate(1)
    assert first == again
    assert first != other and first["verdict"] == other["verdict"] == "holds"


def test_another_training_becomes_a_row_of_its_own(good: ph.Certificate) -> None:
    restart = GOOD.build(seed=1)[0]
    certificate = ph.certify(*GOOD.build(), GOOD.data(), restarts=[restart], progress=False)
    assert [check.condition for check in certificate.further][:2] == [
        "ambiguity against restart 1",
        "ambiguity against the truth",
    ]
    check = certificate["ambiguity against restart"]
    assert (
        check.status == "holds"
        and check.value > 0.99
        and "the same without any alignment" in check.why
    )
    assert certificate.conditions == good.conditions  # which say nothing of restarts


def test_without_truth_or_restarts_there_is_nothing_to_compare_with() -> None:
    tasks = replace(replace(ONE, tasks=100).data(), true_latents=None)
    certificate = ph.certify(*ONE.build(), tasks, progress=False)
    check = certificate["residual ambiguity"]
    assert check.status == "not checked" and "restarts=[model]" in check.remedy
    assert "difference of two halves of each task" in certificate["efficiency"].why


# ---- how it is handed out ------------------------------------------------------------------------


def test_printed_it_has_every_condition_and_its_status(good: ph.Certificate) -> None:
    lines = str(good).splitlines()
    for check in (*good.conditions, *good.further):
        (row,) = [line for line in lines if line.startswith(check.condition)]
        assert row.split(check.condition)[1].split()[0].lower() == check.status.split()[0]
    assert max(map(len, lines)) <= 120


def test_as_a_dictionary_it_is_json(good: ph.Certificate) -> None:
    read = json.loads(json.dumps(good.to_dict(), allow_nan=False))
    assert read["verdict"] == "holds" and read["systems"] == 300
    assert [row["condition"] for row in read["conditions"]] == [
        check.condition for check in good.conditions
    ]
    noise = read["conditions"][0]
    assert noise["value"] is None and noise["interval"] == [None, None]  # nothing was measured


def test_a_check_is_found_by_the_beginning_of_its_name(good: ph.Certificate) -> None:
    assert good["fit"] is good.conditions[1] and good["efficiency"] is good.further[-1]
    with pytest.raises(
        KeyError, match="'fitness' isn't among .'noise .i.', 'fit', 'injectivity, local"
    ):
        good["fitness"]


@pytest.mark.parametrize(
    ("statuses", "verdict"),
    [
        (["holds", "holds"], "holds"),
        (["holds", "undecided"], "undecided"),
        (["holds", "not checked"], "undecided"),
        (["undecided", "fails"], "fails"),
        (["not checked", "fails"], "fails"),
    ],
)
def test_one_condition_that_fails_fails_all_and_one_that_is_open_leaves_all_open(
    good: ph.Certificate, statuses: list[str], verdict: str
) -> None:
    checks = [good["fit"]._replace(status=status) for status in statuses]
    failing = [good["efficiency"]._replace(status="fails")]
    assert (
        ph.Certificate(checks, failing).verdict == verdict
    )  # what is beyond the theorem doesn't decide


@pytest.fixture
def bars(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, bool]]:
    """Descriptions of all progress bars that are made, and whether they are switched off."""
    made: list[tuple[str, bool]] = []
    original = tqdm.__init__

    def spy(self: tqdm, *args: object, **options: object) -> None:
        made.append((str(options["desc"]), bool(options.get("disable"))))
        original(self, *args, **options)

    monkeypatch.setattr(tqdm, "__init__", spy)
    return made


@pytest.mark.parametrize("progress", [False, True])
def test_progress_switches_every_bar(bars: list[tuple[str, bool]], progress: bool) -> None:
    case = replace(ONE, tasks=24)
    ph.certify(*case.build(), case.data(), restarts=[case.build(1)[0]], progress=progress)
    assert {name for name, _ in bars} == {
        "certify",
        "inferring tasks",
        "searching for equivalent latents",
        "ICA of resampled tasks",
    }
    assert {is_off for _, is_off in bars} == {not progress}


# ---- what it refuses to look at ------------------------------------------------------------------


WRONG: dict[str, tuple[Callable[[], object], str]] = {
    "no model": (
        lambda: ph.certify(None, *ONE.build()[1:], ONE.data()),
        r"model to be callable; got NoneType\. Pass the trained Pyro program",
    ),
    "tasks for the guide": (
        lambda: ph.certify(ONE.build()[0], ONE.data(), ONE.data()),
        r"guide to be callable; got Tasks\. Pass the trained guide",
    ),
    "an episode": (
        lambda: ph.certify(*ONE.build(), ONE.data().episode()),
        r"tasks to be a data set \(ph\.Tasks\); got Episode\. Make one with ph\.Tasks",
    ),
    "one restart": (
        lambda: ph.certify(*ONE.build(), ONE.data(), restarts=ONE.build()[0]),
        r"restarts to be a list of trained models; got \w+\. Pass restarts=\[model\]",
    ),
    "tasks for a restart": (
        lambda: ph.certify(*ONE.build(), ONE.data(), restarts=[ONE.data()]),
        r"each of restarts to be callable; got Tasks",
    ),
    "half a seed": (
        lambda: ph.certify(*ONE.build(), ONE.data(), seed=0.5),
        r"seed as a whole number of 0 or more; got 0\.5",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_objects_are_answered_with_what_to_pass(name: str, without_jaxtyping: None) -> None:
    call, message = WRONG[name]
    with pytest.raises(TypeError, match=message):
        call()


def test_one_task_is_refused() -> None:
    with pytest.raises(
        ValueError, match="expected two tasks or more; got 1. Identifiability is about what differs"
    ):
        ph.certify(*ONE.build(), ONE.data()[:1], progress=False)


def test_tasks_of_one_shot_are_refused() -> None:
    tasks = ONE.data()
    tasks = replace(
        tasks,
        values=tasks.values[:, :1],
        initial=tasks.initial[:, :1],
        scored=tasks.scored[:, :1],
        observed=tasks.observed[:, :1],
    )
    with pytest.raises(
        ValueError, match="expected two shots or more of every task; got 1. One support alone"
    ):
        ph.certify(*ONE.build(), tasks, progress=False)


def test_systems_of_which_only_the_support_was_observed_are_left_out_of_what_looks_at_the_query() -> (
    None
):
    tasks = replace(ONE, tasks=60).data()
    mask = tasks.scored.clone()
    mask[::2, 1:] = False
    certificate = ph.certify(
        *ONE.build(), replace(tasks, scored=mask, observed=mask), progress=False
    )
    assert len(certificate.numbers["fit"].error) == 30 and certificate["fit"].status == "holds"
    assert certificate[LOCAL].status == "holds" and certificate[GLOBAL].value == 1.0
    mask[:, 1:] = False
    with pytest.raises(
        ValueError, match="expected systems with observations beside their support; got none. Take"
    ):
        ph.certify(*ONE.build(), replace(tasks, scored=mask, observed=mask), progress=False)


def sampling(shape: str) -> object:
    """A program with a latent that can't be certified."""

    def program(episode: ph.Episode) -> None:
        zeros = episode.query.initial[:, 0, :1] * 0.0
        with episode.plate:
            if shape == "uniform":
                pyro.sample("z", dist.Uniform(zeros, zeros + 1.0).to_event(1))
            elif shape == "scalar":
                pyro.sample("z", dist.Normal(zeros[:, 0], 1.0))

    return program


@pytest.mark.parametrize(
    ("shape", "error", "message"),
    [
        (
            "uniform",
            TypeError,
            "expected a prior from an exponential family for 'z'; got Uniform. Use one of",
        ),
        (
            "scalar",
            ValueError,
            r"expected latent 'z' of shape \(task, component\); got \(100,\). Give it a component",
        ),
        (
            "none",
            ValueError,
            "expected a program with latents of tasks, of shape .task, component.; got none.",
        ),
    ],
)
def test_a_program_that_cannot_be_read_is_refused_with_words(
    shape: str, error: type, message: str
) -> None:
    with pytest.raises(error, match=message):
        ph.certify(sampling(shape), sampling(shape), ONE.data(), progress=False)


# ---- forty programs ------------------------------------------------------------------------------


def test_forty_has_twenty_of_each_kind_over_all_equations_flaws_and_families() -> None:
    cases = forty()
    good, bad = cases[:20], cases[20:]
    assert {case.expected for case in good} == {"holds"} and {case.expected for case in bad} == {
        "fails"
    }
    assert {case.name for case in good} == set(EQUATIONS) and {case.flaw for case in bad} == set(
        FLAWS
    )
    families = {type(family).__name__ for case in cases for family in case.sites.values()}
    assert families == {"Normal", "LogNormal", "Gamma", "Beta"}
    assert {sum(family.n for family in case.sites.values()) for case in good} == {1, 2, 3, 4, 5}
    assert (
        {case.plain for case in good} == {bool(case.start_noise) for case in good} == {True, False}
    )


@pytest.mark.long
def test_of_forty_programs_none_is_judged_wrongly_and_few_not_at_all(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # What doesn't decide isn't computed: it takes half of the time.
    monkeypatch.setattr(
        sys.modules["pyro_hybrid.identifiability.certify"], "_further_checks", lambda *rest: []
    )
    rows, wrong, undecided, elsewhere = [], 0, 0, 0
    for case in forty():
        certificate = case.certify()
        undecided += certificate.verdict == "undecided"
        wrong += certificate.verdict not in (case.expected, "undecided")
        rows.append(f"{case.name} {case.flaw} {case.expected} {certificate.verdict}")
        if certificate.verdict == "fails" and case.flaw:
            check = certificate[case.condition]
            elsewhere += check.status != "fails" or not all(
                name in check.why for name in case.culprits
            )
    assert wrong == 0 and undecided <= 4, "\n".join(rows)
    assert elsewhere <= 1, "\n".join(
        rows
    )  # one is refused by another condition than the one that was spoilt


def test_separability_is_not_checked_where_scikit_learn_is_missing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "sklearn", None)
    measurements = module._Measurements(1, progress=False)
    found = module._check_separability(torch.randn(100, 2), measurements, seed=0, progress=False)
    assert found.status == "not checked"
    assert "pip install 'pyro_hybrid[ica]'" in str(found)
