"""`scaling fit` and `scaling predict` on real files: what is written, what is left out and said, and what is refused."""

from __future__ import annotations

import csv
import io
import json
import math
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from rich.console import Console

from compress.studies.scaling.analysis import analyse, ceiling_of
from compress.studies.scaling.plots import brief, draw_all
from compress.studies.scaling.summary import number, print_summary, write_all
from compress.studies.scaling.runs import read_runs
from metadata.errors import UserError
from tests.helpers.commands import Compress, PROJECT, assert_one_line_error, run_compress
from tests.helpers.laws import foreign, grid

PLOTS = ("loss_n", "loss_d", "loss_c", "isoflop", "residuals", "frontier", "held_out")


def law(n: float, d: float) -> float:
    h = 25 * n**-0.35 + 30 * d**-0.45
    return 0.3 + (math.log(10) - 0.3) * h / (1 + h)


def own_rows(seeds: int = 2, noise: float = 0.01) -> list[dict[str, Any]]:
    """A study in the format of results/final_data.csv."""
    generator, rows = np.random.default_rng(1), []
    for width in (4, 8, 16, 32, 64):
        for d in (1000, 4000, 12000, 50000):
            for seed in range(seeds):
                n = 300 * width**2
                loss = law(n, d) * math.exp(noise * generator.normal())
                rows.append({"width": width, "depth": 2, "seed": seed, "batch_size": 256, "N": n, "D": d, "epochs": 20,
                             "C_proxy": n * d * 20, "total_flops": 7 * n * d * 20, "final_test_loss_avg_last5": loss,
                             "final_test_acc_avg_last5": 1 - loss / 3, "id": f"run{len(rows)}", "dataset": "cifar10",
                             "status": "done", "message": "", "seconds": 3})
    return rows


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)
    return path


# ------------------------------------------------------------------------------------------------- the whole way


@pytest.mark.parametrize("plots", [(), pytest.param(PLOTS, marks=pytest.mark.slow)], ids=["tables", "plots"])
def test_fit_writes_summary_json_and_plots(plots: tuple[str, ...], compress: Compress, tmp_path: Path) -> None:
    data = write(tmp_path / "final_data.csv", own_rows())
    done = compress("scaling", "fit", data, "--bootstrap", "100", *([] if plots else ["--no_plots"]))
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "fit"
    assert {path.name for path in folder.iterdir()} == {"summary.md", "fit.json", *(f"{name}.png" for name in plots),
                                                        *(f"{name}.svg" for name in plots)}
    for name in plots:
        with Image.open(folder / f"{name}.png") as image:
            assert image.width > 700 and len(image.convert("RGB").getcolors(2**24) or []) > 50, name
    content = json.loads((folder / "fit.json").read_text())
    assert content["schema"] == 1 and content["chosen"] == "bounded" and content["runs"] == 40
    assert content["ceiling"] == pytest.approx(math.log(10))
    assert len(content["points"]["N"]) == 20 and content["points"]["C"][0] == 300 * 16 * 1000 * 20
    best = content["joint"]["forms"][0]
    assert best["name"] == "bounded" and best["degrees_of_freedom"] == 15
    for name, truth in (("alpha", 0.35), ("beta", 0.45)):
        parameter = best["parameters"][name]
        assert parameter["low"] < truth < parameter["high"] and parameter["verdict"] == "identified"
        assert parameter["low"] < parameter["value"] < parameter["high"]
    assert 0.007 < content["seed_noise"] < 0.013
    assert best["splits"]["N"]["error_percent"] < 5 and best["splits"]["N"]["points"] == 4
    assert [form["held_out_percent"] for form in content["joint"]["forms"]] == sorted(
        form["held_out_percent"] for form in content["joint"]["forms"])
    frontier = content["frontier"]
    assert frontier["passes"] == 20 and frontier["rule"] == "20 epochs"
    for compute, n, d in zip(frontier["C"], frontier["N"]["value"], frontier["D"]["value"], strict=True):
        assert n * d * 20 == pytest.approx(compute)
    assert all(low < value < high for low, value, high in zip(frontier["N"]["low"], frontier["N"]["value"],
                                                              frontier["N"]["high"], strict=True))
    summary = (folder / "summary.md").read_text()
    assert "| bounded | " in summary and "| alpha | " in summary
    assert ("![frontier](frontier.png)" in summary) == bool(plots)
    assert "noise between seeds" in summary and "## Compute-optimal frontier" in summary
    for text in ("bounded predicts held-out points best", "noise between seeds", "scatter around the bounded fit",
                 "compute-optimal at 20 epochs", "95 % interval"):
        assert text in done.stdout, text


@pytest.mark.slow
def test_the_same_data_give_the_same_bytes(tmp_path: Path) -> None:
    data = foreign(tmp_path / "data.csv", [(1e7, float(d), 2 + 400 * d**-0.3) for d in np.geomspace(1e6, 1e10, 8)])
    for folder in ("a", "b"):
        write_all(analyse(read_runs(data), replicates=50), tmp_path / folder)
    assert len(list((tmp_path / "a").iterdir())) == 6
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes(), path.name
        assert path.suffix != ".svg" or b"<dc:date>" not in path.read_bytes()


def test_fit_needs_no_torch(tmp_path: Path) -> None:
    data = foreign(tmp_path / "data.csv", grid())
    program = ("import sys; from compress.cli.main import app; app(['scaling', 'fit', sys.argv[1], '--bootstrap', '50', "
               "'--no_plots'], standalone_mode=False); print('torch' in sys.modules)")
    done = subprocess.run([sys.executable, "-c", program, str(data)], cwd=PROJECT, capture_output=True, text=True,
                          check=False)
    assert done.returncode == 0 and done.stdout.strip().endswith("False"), done.stderr


def test_other_peoples_files(compress: Compress, tmp_path: Path) -> None:
    """Names and marks as others have them: semicolons, a byte-order mark, params and tokens, no epochs, no classes."""
    data = foreign(tmp_path / "chinchilla.csv", grid(), "Params,Tokens,val_loss")
    data.write_text("\ufeff" + data.read_text().replace(",", ";"))
    done = compress("scaling", "fit", data, "--bootstrap", "50", "--no_plots")
    assert done.returncode == 0, done.stderr
    assert "N from Params, D from Tokens, loss from val_loss" in done.stdout
    assert "not fitted, bounded: the loss of guessing is not known; give the number of classes with" in done.stdout
    content = json.loads((tmp_path / "fit" / "fit.json").read_text())
    parameters = {name: entry["value"] for name, entry in content["joint"]["forms"][0]["parameters"].items()}
    assert parameters == pytest.approx({"E": 1.7, "A": 400, "B": 410, "alpha": 0.34, "beta": 0.28}, rel=0.01)
    assert content["seed_noise"] is None and "not known, no configuration was repeated" in done.stdout
    assert content["points"]["C"][0] == pytest.approx(1e15), "C is N * D where there are no epochs"
    named = foreign(tmp_path / "named.csv", grid(), "weights,images,ce")
    done = compress("scaling", "fit", named, "--n_column", "weights", "--d_column", "images", "--loss_column", "CE",
                    "--bootstrap", "50", "--no_plots")
    assert done.returncode == 0 and "N from weights, D from images, loss from ce" in done.stdout


def test_the_error_is_one_less_accuracy_and_ends_at_chance(compress: Compress, tmp_path: Path) -> None:
    data = write(tmp_path / "final_data.csv", own_rows(1))
    done = compress("scaling", "fit", data, "--target", "error", "--bootstrap", "50", "--no_plots")
    assert done.returncode == 0, done.stderr
    content = json.loads((tmp_path / "fit_error" / "fit.json").read_text())
    assert content["ceiling"] == pytest.approx(0.9) and ceiling_of("error", 4) == 0.75
    assert content["points"]["error"][0] == pytest.approx(own_rows(1)[0]["final_test_loss_avg_last5"] / 3)
    rows = own_rows(1)
    rows[3]["final_test_acc_avg_last5"] = 71.5
    percent = write(tmp_path / "percent.csv", rows)
    assert_one_line_error(compress("scaling", "fit", percent, "--target", "error"), "line 5", "final_test_acc_avg_last5",
                          "a fraction in [0, 1], got 71.5", "divide them by 100")


@pytest.mark.slow
def test_tables_fit_80_columns(tmp_path: Path) -> None:
    analysis = analyse(read_runs(write(tmp_path / "final_data.csv", own_rows())), replicates=50)
    for width in (80, 120):
        console = Console(width=width, record=True, file=io.StringIO())
        print_summary(console, analysis)
        text = console.export_text()
        assert max(map(len, text.splitlines())) <= width
        table = re.search(r"^ ?alpha +[\d.]+ +[\d.]+ to [\d.]+ +[\d.]+ to [\d.]+ +identified", text, re.MULTILINE)
        assert table, text


# -------------------------------------------------------------------------------------------------------- prediction


def test_predict_says_interval_and_extrapolation(compress: Compress, tmp_path: Path) -> None:
    data = write(tmp_path / "final_data.csv", own_rows())
    done = compress("scaling", "predict", "--parameters", "4915200", "--dataset_size", "50000", "--data", data,
                    "--num_epochs", "10")
    assert done.returncode == 0, done.stderr
    found = re.search(r"predicted loss: ([\d.]+) by the bounded form.*\n95 % interval: ([\d.]+) to ([\d.]+) for the mean "
                      r"over seeds, ([\d.]+) to ([\d.]+) for one run", done.stdout)
    assert found, done.stdout
    value, low, high, run_low, run_high = map(float, found.groups())
    assert run_low < low < value < high < run_high and low < law(4915200, 50000) < high
    assert "an extrapolation: N 4 times beyond the runs" in done.stdout and "10 epochs: compute 2.46e+12" in done.stdout
    assert "other forms: " in done.stdout and "epochs change C, not the prediction" in done.stdout
    inside = compress("scaling", "predict", "--parameters", "1e5", "--dataset_size", "5000", "--data", data)
    assert "inside the range of the runs" in inside.stdout and "extrapolation" not in inside.stdout
    forced = compress("scaling", "predict", "--parameters", "1e5", "--dataset_size", "5000", "--data", data,
                      "--form", "kaplan")
    assert "by the kaplan form" in forced.stdout


def test_predict_refuses_what_it_cannot_know(compress: Compress, tmp_path: Path) -> None:
    data = write(tmp_path / "final_data.csv", own_rows(1))
    assert_one_line_error(compress("scaling", "predict", "--dataset_size", "1000", "--data", data), "either --width")
    assert_one_line_error(compress("scaling", "predict", "--dataset_size", "1000", "--width", "4", "--parameters", "1e5",
                                   "--data", data), "either --width")
    assert_one_line_error(compress("scaling", "predict", "--dataset_size", "0", "--parameters", "1e5", "--data", data),
                          "--dataset_size 0: expected a positive number")
    assert_one_line_error(compress("scaling", "predict", "--dataset_size", "10", "--parameters", "-3", "--data", data),
                          "--parameters -3: expected a positive number")
    assert_one_line_error(compress("scaling", "predict", "--dataset_size", "10", "--parameters", "3", "--data",
                                   tmp_path / "none.csv"), "none.csv: there is no such file")
    one_n = foreign(tmp_path / "one.csv", [point for point in grid() if point[0] == 1e7])
    assert_one_line_error(compress("scaling", "predict", "--dataset_size", "10", "--parameters", "3", "--data", one_n),
                          "nothing can be predicted", "N does not vary")


# --------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.slow
def test_rows_that_cannot_be_fitted_are_kept_marked_and_said(compress: Compress, tmp_path: Path) -> None:
    rows = own_rows()
    rows[0]["final_test_loss_avg_last5"] = "nan"                                     # line 2
    rows[1]["final_test_loss_avg_last5"] = -0.5                                      # line 3
    rows[2]["final_test_loss_avg_last5"] = 0                                         # line 4
    rows[3]["final_test_loss_avg_last5"] = "inf"                                     # line 5
    rows[4] |= {"status": "diverged", "final_test_loss_avg_last5": 2.2}              # line 6
    rows[5] |= {"status": "failed", "message": "out of\nmemory", "final_test_loss_avg_last5": ""}  # lines 7 and 8
    rows[6]["final_test_loss_avg_last5"] = ""                                        # line 9
    rows.append(rows[20])                                                            # line 43, as 23
    rows.append({**rows[22], "final_test_loss_avg_last5": 9.0})                      # line 44, as 25
    data = write(tmp_path / "final_data.csv", rows)
    done = compress("scaling", "fit", data, "--bootstrap", "50", "--no_plots")
    assert done.returncode == 0, done.stderr
    text = " ".join(done.stdout.split())
    for expected in ("33 runs of", "9 rows left out", "loss is NaN: line 2", "loss is negative: line 3",
                     "loss is zero: line 4", "loss is infinite: line 5", "diverged: line 6", "failed: line 8",
                     "loss is missing: line 9",
                     "repeated rows are counted once: lines 43 (as 23), 44 (as 25, where the loss is another)"):
        assert expected in text, (expected, text)
    left_out = {row["line"]: row["reason"] for row in json.loads((tmp_path / "fit" / "fit.json").read_text())["left_out"]}
    assert sorted(left_out) == [2, 3, 4, 5, 6, 8, 9, 43, 44] and left_out[6] == "diverged"
    assert "loss is NaN: line 2" in (tmp_path / "fit" / "summary.md").read_text()
    clean = read_runs(write(tmp_path / "clean.csv", own_rows()[7:])).observations()
    dirty = read_runs(data).observations()
    assert np.array_equal(dirty.log_loss, clean.log_loss) and np.array_equal(dirty.runs, clean.runs)
    assert all(np.array_equal(dirty.values[name], clean.values[name]) for name in "NDC")


def test_repeats_without_a_seed_column(tmp_path: Path) -> None:
    """Rows alike in every cell are copies; the same N and D with another loss is another run, and gives the noise."""
    points = [(1e4, 1e3, 1.0), (1e4, 1e3, 1.0), (1e4, 1e3, 1.1), (1e5, 1e3, 0.9), (1e5, 1e3, 1.0)]
    runs = read_runs(foreign(tmp_path / "data.csv", points))
    assert [run.line for run in runs.runs] == [2, 4, 5, 6] and runs.left_out[0].reason == "repeats line 2"
    # two groups of two: the pooled variance is the mean of (log ratio)^2 / 2
    expected = math.sqrt((math.log(1.1)**2 / 2 + math.log(1 / 0.9)**2 / 2) / 2)
    data = runs.observations()
    assert data.seed_noise == pytest.approx(expected)
    assert data.runs.tolist() == [2, 2] and data.log_loss[0] == pytest.approx(math.log(1.1) / 2)


def test_runs_of_other_epochs_and_batches_are_other_configurations(tmp_path: Path) -> None:
    rows = own_rows(1)[:2]
    rows += [{**rows[0], "epochs": 40}, {**rows[0], "batch_size": 64}, {**rows[0], "seed": 5}]
    runs = read_runs(write(tmp_path / "data.csv", rows))
    assert len(runs.runs) == 5 and len(runs.observations()) == 4 and runs.passes == 20
    assert sorted(runs.observations().values["C"] / (4800 * 1000)) == [20, 20, 40, 80]
    assert any("several amounts of compute" in note for note in runs.notes)


def test_compute_of_its_own_column_sets_how_a_budget_is_spent(compress: Compress, tmp_path: Path) -> None:
    """C = 6 N D, as language models are counted: the best split is that of N D = C / 6."""
    data = tmp_path / "data.csv"
    data.write_text("N,D,flops,loss\n" + "".join(f"{n},{d},{6 * n * d},{loss}\n" for n, d, loss in grid()))
    found = analyse(read_runs(data), replicates=50)
    assert found.tradeoff and found.tradeoff.rule == "C = 6 N D" and found.runs.columns["C"] == "flops"
    best = found.tradeoff.best
    assert best.n[0] * best.d[0] * 6 == pytest.approx(best.compute)
    gain = (0.34 * 400 / (0.28 * 410))**(1 / 0.62)
    assert best.n[0] == pytest.approx(gain * (best.compute / 6)**(0.28 / 0.62), rel=0.02)
    assert_one_line_error(compress("scaling", "fit", data, "--num_epochs", "3"), "this file has no epochs", "column flops")


@given(st.integers(0, 100_000))
@settings(max_examples=4, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_table_is_fitted_or_refused_in_one_line(tmp_path: Path, seed: int) -> None:
    """Few points over twelve decades, constant losses, absurd ones: tables and JSON come out, without a warning."""
    generator = np.random.default_rng(seed)
    n, d = (10**generator.uniform(0, 12, generator.integers(1, 5)) for _ in range(2))
    spread = generator.choice([0, 0.001, 0.2, 12])
    points = [(float(generator.choice(n)), float(generator.choice(d)), 10**(spread * generator.uniform(-0.5, 0.5)))
              for _ in range(generator.integers(1, 14))]
    try:
        found = analyse(read_runs(foreign(tmp_path / "data.csv", points)), 10 if generator.random() < 0.5 else None,
                        replicates=50)
    except UserError as error:
        assert "\n" not in str(error)
        return
    print_summary(Console(width=80, file=io.StringIO()), found)
    assert write_all(found, tmp_path / "out", draw=False) == [] and (tmp_path / "out" / "fit.json").is_file()


@pytest.mark.parametrize("text,parts", [
    ("", ("it is empty", "N, D and the loss")),
    ("N,D,loss\n", ("a header and no rows",)),
    ("params,tokens,perplexity\n1,2,3\n", ("no column for loss", "params, tokens, perplexity", "--loss_column")),
    ("parmeters,D,loss\n1,2,3\n", ("no column for N; did you mean 'parmeters'", "--n_column")),
    ("N,D,loss\n1e4,1e3,1.0\n1e4,abc,2\n", ("line 3, column D", "expected a number, got 'abc'")),
    ("N,D,loss\n1e4,1e3\n", ("line 2", "expected 3 cells", "got 2")),
    ("N,N,D,loss\n1,1,2,3\n", ("column 'N' is there twice",)),
    ("N,D,loss\n1e4,1e3,nan\n1e4,1e3,-1\n", ("none of its 2 rows can be fitted", "line 2: loss is NaN",
                                            "line 3: loss is negative")),
    ("N,D,loss\n1e4,1e3,1.0\n2e4,2e3,0.9\n", ("2 configurations and no form that can be fitted",
                                             "additive: needs at least 6 configurations", "kaplan: needs at least 5")),
    ("N,D,loss,dataset\n1e4,1e3,1.0,cifar10\n2e4,2e3,0.9,mnist\n", ("several data sets (cifar10, mnist)", "--dataset")),
])
def test_bad_files_get_one_line(text: str, parts: tuple[str, ...], compress: Compress, tmp_path: Path) -> None:
    path = tmp_path / "data.csv"
    path.write_text(text)
    assert_one_line_error(compress("scaling", "fit", path), "data.csv", *parts)
    assert not (tmp_path / "fit").exists()


def test_bad_flags_get_one_line(compress: Compress, tmp_path: Path) -> None:
    data = foreign(tmp_path / "data.csv", grid())
    assert_one_line_error(compress("scaling", "fit", tmp_path / "no.csv"), "no.csv: there is no such file")
    assert_one_line_error(compress("scaling", "fit", data, "--n_column", "Nn"), "--n_column 'Nn' is not in it",
                          "columns: N, D")
    assert_one_line_error(compress("scaling", "fit", data, "--num_epochs", "0"),
                          "--num_epochs 0: expected a positive number")
    assert_one_line_error(compress("scaling", "fit", data, "--form", "bounded"), "--form bounded: it could not be fitted",
                          "fitted: ")
    assert_one_line_error(compress("scaling", "fit", data, "--dataset", "mnist"), "no column 'dataset'")
    assert_one_line_error(compress("scaling", "fit", data, "--target", "error"), "no column for accuracy", "--loss_column")
    (tmp_path / "binary.csv").write_bytes(b"N,D,loss\n\xff\xfe")
    assert_one_line_error(compress("scaling", "fit", tmp_path / "binary.csv"), "not a text file in UTF-8")
    mixed = write(tmp_path / "mixed.csv", own_rows(1))
    assert_one_line_error(compress("scaling", "fit", mixed, "--dataset", "cifar100"), "did you mean 'cifar10'")


def test_the_real_command_line_exits_2_with_one_line(tmp_path: Path) -> None:
    (tmp_path / "data.csv").write_text("a,b\n1,2\n")
    assert_one_line_error(run_compress("scaling", "fit", tmp_path / "data.csv"), "no column for N", "columns: a, b")


@pytest.mark.slow
def test_one_value_of_n_leaves_the_law_in_d(compress: Compress, tmp_path: Path) -> None:
    data = foreign(tmp_path / "data.csv", [(1e7, float(d), 2 + 400 * d**-0.3) for d in np.geomspace(1e6, 1e10, 8)])
    done = compress("scaling", "fit", data, "--bootstrap", "50", "--no_plots")
    assert done.returncode == 0, done.stderr
    text = " ".join(done.stdout.split())
    assert "joint forms need at least two values of N and of D; N does not vary (it is 10,000,000 in every row)" in text
    assert "one value of N, nothing to fit" in text and "D at N = 10,000,000: E + A/D^alpha" in text
    content = json.loads((tmp_path / "fit" / "fit.json").read_text())
    assert content["chosen"] is None and content["frontier"] is None and content["joint"]["forms"] == []
    power = content["single"][1]["forms"][0]["parameters"]
    assert power["alpha"]["value"] == pytest.approx(0.3, rel=1e-3) and power["E"]["value"] == pytest.approx(2, rel=1e-3)
    drawn = draw_all(analyse(read_runs(data), replicates=50), tmp_path)
    assert [path.name for path in drawn] == ["loss_d.png", "loss_c.png"]
    assert_one_line_error(compress("scaling", "fit", data, "--form", "additive"), "N does not vary")


def test_forms_with_too_few_points_leave_the_others(tmp_path: Path) -> None:
    five = read_runs(foreign(tmp_path / "five.csv", [(n, d, law(n, d)) for n, d in ((1e4, 1e3), (1e5, 1e3), (1e4, 1e4),
                                                                                   (1e5, 1e4), (1e6, 3e3))]))
    found = analyse(five, classes=10, replicates=50)
    assert found.joint.ranking and [form.name for form in found.joint.ranking.forms] == ["kaplan"]
    assert "additive: needs at least 6 configurations (it has 5 parameters), there are 5" in found.joint.skipped
    assert found.joint.ranking.winner.held_out_percent is None
    two = read_runs(foreign(tmp_path / "two.csv", grid()[:2]))
    with pytest.raises(UserError, match="2 configurations and no form"):
        analyse(two)


@pytest.mark.slow
def test_losses_above_chance_are_said(tmp_path: Path) -> None:
    rows = own_rows(1)
    rows[0]["final_test_loss_avg_last5"] = 2.5
    found = analyse(read_runs(write(tmp_path / "data.csv", rows)), replicates=50)
    assert any("1 of 20 configurations lie above the loss of guessing (2.303)" in note for note in found.notes)


def test_numbers_for_people() -> None:
    assert [number(value) for value in (0.0, 0.35, 1234.6, 288746, 4.2e11, None, math.nan)] == [
        "0", "0.35", "1,235", "288,700", "4.2e11", "?", "?"]
    assert [brief(value) for value in (0.35, 1200, 5e4, 2.4e6, 1.6e10, 7.2e13)] == [
        "0.35", "1,200", "50k", "2.4M", "16B", "7.2e13"]
