"""What `scaling fit` and `scaling predict` must not claim: another network, a winner by default, a misread column."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from compress.studies.scaling.fitting import Observations, fit, huber
from compress.studies.scaling.forms import single_forms
from compress.studies.scaling.intervals import allowed, parameter_intervals
from compress.studies.scaling.ranking import HeldOut, JudgedForm, judge, rank
from tests.helpers.commands import Compress, assert_one_line_error
from tests.helpers.laws import additive, foreign, forms, grid, planted


@pytest.mark.parametrize(("dataset", "parameters"), [("mnist", 1702), ("cifar10", 1774)])
def test_predict_counts_the_network_of_the_studys_images(compress: Compress, tmp_path: Path, dataset: str,
                                                         parameters: int) -> None:
    data = tmp_path / "final_data.csv"
    data.write_text("N,D,loss,dataset\n" + "".join(
        f"{n},{d},{0.3 + 20 / n**0.4 + 10 / d**0.3:.5f},{dataset}\n" for n in (2e3, 8e3, 3e4, 1e5)
        for d in (1e3, 4e3, 2e4, 5e4)))
    done = compress("scaling", "predict", "--width", "4", "--depth", "1", "--dataset_size", "1000", "--data", data)
    assert done.returncode == 0 and f"N = {parameters:,}, D = 1,000" in done.stdout, done.stdout + done.stderr


def test_forms_that_cannot_all_be_tested_are_all_shown(compress: Compress, tmp_path: Path) -> None:
    data = tmp_path / "data.csv"  # four levels: too few to hold one out for a form with E, without which nothing fits
    data.write_text("N,D,seed,loss\n" + "".join(
        f"{n},{d},{seed},{(0.3 + 20 / n**0.4 + 10 / d**0.3) * (1 + 0.004 * (seed - 0.5)):.6f}\n"
        for n in (1e3, 5e3, 2e4, 1e5) for d in (1e3, 4e3, 1.5e4, 5e4) for seed in (0, 1)))
    done = compress("scaling", "fit", data, "--no_plots", "--bootstrap", "50", "--output", tmp_path / "fit")
    text = " ".join(done.stdout.split())
    assert done.returncode == 0, done.stderr
    assert text.index("N at D = 50,000: E + A/N^alpha (too few points to hold any out,") < text.index(
        "N at D = 50,000: A/N^alpha (")
    assert "power of N: the scatter" in text and "misses something that is there" in text
    assert "additive: the scatter" not in text


def test_an_error_rate_in_percent_is_refused(compress: Compress, tmp_path: Path) -> None:
    data = foreign(tmp_path / "data.csv", [(n, d, 100 * loss) for n, d, loss in grid()], "N,D,test_error")
    assert_one_line_error(compress("scaling", "fit", data, "--target", "error"), "must be a fraction in [0, 1]")


def test_numbers_that_measure_nothing_are_left_out_and_said(compress: Compress, tmp_path: Path) -> None:
    rows = [(3e150, 1e3, 1.0), (1e3, 2e-60, 1.0), (1e3, 1e3, 1e200), (1e30, 1e30, 1.0), *grid()]
    data = foreign(tmp_path / "data.csv", rows)
    done = compress("scaling", "fit", data, "--bootstrap", "50", "--no_plots")
    text = " ".join(done.stdout.split())
    assert done.returncode == 0 and done.stderr == "", done.stderr
    for said in ("N is beyond 1e+40: line 2", "D is below 1e-40: line 3", "loss is beyond 1e+40: line 4",
                 "N * D * epochs is beyond 1e+40: line 5", "20 runs of 20 configurations; 4 rows left out"):
        assert said in text, (said, text)
    assert_one_line_error(compress("scaling", "fit", foreign(tmp_path / "all.csv", rows[:3])),
                          "none of its 3 rows can be fitted (line 2: N is beyond 1e+40")
    for flag, others in (("--parameters", ("--dataset_size", "1e9")), ("--dataset_size", ("--parameters", "1e9"))):
        assert_one_line_error(compress("scaling", "predict", flag, "1e150", *others, "--data", data),
                              f"{flag} 1e+150: expected a number from 1e-40 to 1e+40")


def test_an_accuracy_by_any_name(compress: Compress, tmp_path: Path) -> None:
    points = [(n, d, 1 - (loss - 1.6) / 8) for n, d, loss in grid()]
    data = foreign(tmp_path / "data.csv", points, "N,D,top1")
    fit = ("scaling", "fit", data, "--target", "error", "--bootstrap", "50", "--no_plots")
    done = compress(*fit, "--accuracy_column", "Top1")
    assert done.returncode == 0 and "error from 1 - top1" in done.stdout, done.stderr
    content = json.loads((tmp_path / "fit_error" / "fit.json").read_text())
    assert content["points"]["error"][0] == pytest.approx((grid()[0][2] - 1.6) / 8)
    done = compress(*fit, "--loss_column", "top1")
    assert "top1 is taken for an error rate; if it is an accuracy, name it with --accuracy_column" in " ".join(
        done.stdout.split())
    assert_one_line_error(compress(*fit), "no column for accuracy", "columns: N, D, top1", "--accuracy_column",
                          "--loss_column")
    assert_one_line_error(compress(*fit, "--accuracy_column", "top5"), "--accuracy_column 'top5' is not in it")
    assert_one_line_error(compress("scaling", "fit", data, "--accuracy_column", "top1"), "goes with --target error")
    negative = foreign(tmp_path / "negative.csv", [*points, (1, 1, -5)], "N,D,test_acc")
    assert_one_line_error(compress("scaling", "fit", negative, "--target", "error"), "line 22, column test_acc",
                          "a fraction in [0, 1], got -5")


def judged(data: Observations, form: str, **errors: list[float]) -> JudgedForm:
    """A form with relative errors as given on the first points, in splits of these names."""
    def split(name: str, values: list[float]) -> HeldOut:
        chosen = np.arange(len(data)) < len(values)
        return HeldOut(variable=name, edge=1.0, chosen=chosen, predicted=1 + np.array(values),
                       observed=np.ones(len(values)))
    return JudgedForm(fit(forms(data)[form], data), {name: split(name, values) for name, values in errors.items()})


def test_a_configuration_that_is_held_out_twice_counts_once() -> None:
    data = planted(additive(), 0.01, 1)
    good, bad = [0.010, -0.020, 0.015, 0.005], [0.020, -0.021, 0.040, 0.016]
    chance = stats.ttest_rel(np.abs(bad), np.abs(good)).pvalue
    assert 0.05 < chance < 0.12 and stats.ttest_rel(np.abs(bad * 2), np.abs(good * 2)).pvalue < 0.02
    for splits in (("N",), ("N", "C")):  # the same points in two splits say nothing new
        ranking = rank([judged(data, "additive", **dict.fromkeys(splits, good)),
                        judged(data, "bounded", **dict.fromkeys(splits, bad))])
        assert ranking.tested_on == 4 and "the scatter over the 4 held-out configurations" in ranking.ties["bounded"]
    clear = [0.06, -0.065, 0.07, 0.052]
    assert rank([judged(data, "additive", N=good, C=good), judged(data, "bounded", N=clear, C=clear)]).ties == {}
    # The test is of the difference that is stated, in which each split has the same weight, however few its points.
    first = rank([judged(data, "additive", N=good, C=[0.0]), judged(data, "bounded", N=good, C=[0.5])])
    assert first.winner.name == "additive" and "25 points apart, which the scatter" in first.ties["bounded"]


def test_one_held_out_configuration_tells_no_forms_apart() -> None:
    data = planted(additive(), 0.01, 1)
    ranking = rank([judged(data, "additive", N=[0.01]), judged(data, "bounded", N=[0.5])])
    assert ranking.ties == {"bounded": "49 points apart on one held-out configuration, whose scatter is not known"}


def test_the_noise_of_held_out_points_is_not_known_to_their_fit() -> None:
    data = planted(additive(), 0.01, 1)
    loud = data.values["N"] == data.values["N"].max()
    runs = np.where(loud, 1.0, 2.0)
    for squares, known in ((np.where(loud, 0.5, 0.0002), (0.0002, 2.0)), (np.where(loud, 0.5, 0), None)):
        noisy = replace(data, runs=np.where(loud, 2.0, runs if known else 1.0), seed_noise=0.3, squares=squares)
        rest, held = noisy.held_apart(loud)
        assert rest.seed_noise == (None if known is None else pytest.approx(np.sqrt(known[0])))
        assert len(rest) + len(held) == len(data) and held.seed_noise == 0.3
        alone = judge(forms(data)["additive"], noisy, ("N",)).splits["N"].predicted
        assert np.array_equal(alone, fit(forms(data)["additive"], rest).predict(held.values))  # type: ignore[arg-type]
    # What noise makes any form err by is that at the held-out points: here of one seed each, half of the others.
    single = replace(data, runs=np.where(loud, 1.0, 4.0), seed_noise=0.02)
    ranking = rank([judge(form, single, ("N",)) for form in forms(single).values()])
    assert ranking.noise_percent == pytest.approx(100 * 0.02 * np.sqrt(2 / np.pi))


def test_tables_of_other_people(compress: Compress, tmp_path: Path) -> None:
    """Failed rows with words for numbers, the usual ways to say that there is none, and columns that are empty."""
    rows = [f"{n},{d},{loss},done," for n, d, loss in grid()]
    words = ["1e5,1e3,oom,failed,", "1e5,crashed,-,failed,", "2e5,3e3,n/a,done,", "2e5,3e3,NULL,done,"]
    data = tmp_path / "data.csv"
    data.write_text("\n".join(["", "N,D,loss,status,flops", *words, *rows, ""]))
    done = compress("scaling", "fit", data, "--bootstrap", "50", "--no_plots")
    text = " ".join(done.stdout.split())
    assert done.returncode == 0, done.stderr
    for said in ("column flops is empty, so it is not used", f"{len(rows)} runs of {len(rows)} configurations",
                 "left out of the fits, failed: lines 3, 4", "loss is missing: lines 5, 6"):
        assert said in text, (said, text)


def test_columns_that_differ_in_case_alone(compress: Compress, tmp_path: Path) -> None:
    points = [(n, d, loss) for n, d, loss in grid()]
    data = tmp_path / "data.csv"
    data.write_text("N,n,D,loss\n" + "\n".join(f"{n},{index},{d},{loss}" for index, (n, d, loss) in enumerate(points)))
    expected = foreign(tmp_path / "plain.csv", points)
    outputs = []
    for path in (data, expected):
        done = compress("scaling", "predict", "--parameters", "1e5", "--dataset_size", "1e5", "--data", path)
        assert done.returncode == 0, done.stderr
        outputs.append(done.stdout)
    assert outputs[0] == outputs[1]
    data.write_text(data.read_text().replace("N,n,D,loss", "Params,PARAMS,D,loss"))
    assert_one_line_error(compress("scaling", "fit", data), "the columns Params and PARAMS differ in case alone",
                          "choose one with --n_column")
    assert compress("scaling", "predict", "--parameters", "1e5", "--dataset_size", "1e5", "--data", data, "--n_column",
                    "Params").stdout == outputs[0]
    assert_one_line_error(compress("scaling", "fit", tmp_path), "it is a folder")


def test_predictions_name_their_network_and_allocate_none(compress: Compress, tmp_path: Path) -> None:
    rows = [(n, d, loss, 1, 10) for n, d, loss in grid()]
    data = tmp_path / "data.csv"
    data.write_text("N,D,loss,depth,dataset\n" + "\n".join(f"{n},{d},{loss},{depth},cifar10"
                                                          for n, d, loss, depth, _ in rows))
    asked = ("scaling", "predict", "--dataset_size", "50000", "--data", data)
    done = compress(*asked, "--width", "8192")
    assert done.returncode == 0 and "width 8192, depth 1: N = 6,040,461,322" in done.stdout, done.stdout + done.stderr
    assert "depth 3: N = " in compress(*asked, "--width", "4", "--depth", "3").stdout
    assert_one_line_error(compress(*asked, "--width", "10000000000"), "width", "65536")
    assert_one_line_error(compress(*asked, "--width", "4", "--depth", "100000"), "depth", "1024")


def test_epochs_that_vary_are_said(compress: Compress, tmp_path: Path) -> None:
    data = tmp_path / "data.csv"
    data.write_text("N,D,loss,epochs\n" + "\n".join(f"{n},{d},{loss},{200 if d < 1e9 else 25}" for n, d, loss in grid()))
    done = compress("scaling", "fit", data, "--bootstrap", "50", "--no_plots", "--num_epochs", "25")
    assert done.returncode == 0 and "is from 25 to 200 in these runs" in " ".join(done.stdout.split()), done.stdout
    assert "count 25 everywhere (--num_epochs takes another)" in " ".join(
        (tmp_path / "fit" / "summary.md").read_text().split())


@pytest.mark.parametrize(("text", "parts"), [
    ("kind: width\nwidths: [2]\ndataset_size: 100\nsweeps: 5\n", ("sweeps: expected a list of sweeps, got 5",)),
    ("sweeps: [{kind: width, widths: [true], dataset_size: 100}]\n", ("expected a whole number, got true or false",)),
    ("sweeps: [{kind: width, widths: [10000000000], dataset_size: 100}]\n", ("widths", "65536"))])
def test_plans_that_no_machine_can_run(compress: Compress, tmp_path: Path, text: str, parts: tuple[str, ...]) -> None:
    plan = tmp_path / "plan.yaml"
    plan.write_text("dataset: digits\n" + text)
    assert_one_line_error(compress("scaling", "plan", plan, "--base_dir", tmp_path), *parts)


def test_the_profile_of_few_points_ends_where_a_grid_says() -> None:
    """Four points and three parameters: exponent and amplitude make up for each other over many decades."""
    sizes = np.array([1e3, 4e3, 2e4, 5e4])
    data = Observations(values={"D": sizes}, log_loss=np.array([0.586812, 0.335447, 0.050622, -0.072724]), runs=np.ones(4))
    form = single_forms("D", data.values, data.log_loss)[1]
    best = fit(form, data)
    inputs = form.inputs(data.values)[:, 0]
    floors = np.linspace(0, np.exp(data.log_loss.min()), 1500)[:, None]

    def root_at(amplitude: float) -> float:
        """How far the best fit with this amplitude is off, as a share of what is allowed."""
        lowest = np.inf
        for exponent in np.linspace(form.lower[2], form.upper[2], 600):
            inner = np.log(amplitude) - exponent * form.centre[0]
            if form.lower[1] <= inner <= form.upper[1]:
                curve = np.log(floors + np.exp(inner - exponent * inputs))
                lowest = min(lowest, float(huber(curve - data.log_loss, best.delta).min()))
        return float(np.sqrt(max(lowest - best.cost, 0) / allowed(best)))

    interval = parameter_intervals(best)["A"]
    assert interval.low is not None and interval.high is not None and interval.high > 1e3 * interval.value
    for end in (interval.low, interval.high):
        assert root_at(end) == pytest.approx(1, abs=0.1), (interval, root_at(end))
