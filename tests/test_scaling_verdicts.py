"""What `scaling fit` and `scaling predict` must not claim: another network, a winner by default, a misread column."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.conftest import Compress, assert_one_line_error
from tests.test_scaling_fit_command import foreign, grid


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
