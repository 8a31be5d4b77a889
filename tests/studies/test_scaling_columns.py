"""Columns of tables of runs: what their names tell, what is undone, and what is never taken for N or D."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from compress.studies.scaling.columns import read_name
from compress.studies.scaling.runs import read_runs
from metadata.errors import UserError
from tests.helpers.laws import foreign, grid

FLOP = [(n, 6 * n * d, loss) for n, d, loss in grid()]


@pytest.mark.parametrize(("name", "quantity", "plain"), [
    ("N", "N", 8.0), ("Model Size", "N", 8.0), ("numParams", "N", 8.0), ("params_millions", "N", 8e6),
    ("Params (M)", "N", 8e6),
    ("params in billions", "N", 8e9), ("log10_params", "N", 1e8), ("log2(N)", "N", 256.0), ("ln_tokens", "D", math.exp(8)),
    ("tokens (log10)", "D", 1e8), ("log10_tokens_billions", "D", 1e17), ("Training FLOP", "C", 8.0), ("PFLOPs", "C", 8e15),
    ("training_zettaflops", "C", 8e21), ("compute_pf_days", "C", 8 * 8.64e19), ("loss", "loss", 8.0),
    ("mparams", "N", 8e6), ("gtokens", "D", 8e9), ("n_layers", "another quantity", 8.0),
    ("loss_std", "another quantity", 8.0),
    ("val_samples", "another quantity", 8.0), ("dataset_id", "another quantity", 8.0), ("test_loss_2", "loss", 8.0),
    ("flops_per_token", "another quantity", 8.0), ("images_per_second", "another quantity", 8.0),
    ("steps", "another quantity", 8.0),
    ("perplexity", "another quantity", 8.0), ("remark", None, 8.0), ("acc1", "accuracy", 8.0), ("weights", "N", 8.0),
    ("logits", None, 8.0), ("lnorm", None, 8.0), ("train_tokens_seen", "D", 8.0)])
def test_names_tell_quantity_unit_and_logarithm(name: str, quantity: str | None, plain: float) -> None:
    column = read_name(name)
    assert column.quantity == quantity and column.value(8.0) == pytest.approx(plain)
    assert (column.reading is None) == (plain == 8.0)


def test_a_logarithm_beyond_all_floats_is_infinite() -> None:
    assert read_name("log10_N").value(400.0) == math.inf


@pytest.mark.parametrize("header", ["Model Size,Training FLOP,loss", "params,tokens_seen_flops,loss", "N,compute,loss",
                                    "N,total PFLOP,loss", "N,log10_flops,loss"])
def test_compute_is_never_offered_or_taken_as_the_number_of_samples(header: str, tmp_path: Path) -> None:
    data, name = foreign(tmp_path / "runs.csv", FLOP), header.split(",")[1]
    data.write_text(data.read_text().replace("N,D,loss", header))
    with pytest.raises(UserError) as caught:
        read_runs(data)
    assert "no column for D" in str(caught.value) and f"did you mean {name!r}" not in str(caught.value)
    with pytest.raises(UserError) as caught:
        read_runs(data, d_column=name)
    assert "holds training compute, not the number of training samples" in str(caught.value)
    assert "--d_from_compute" in str(caught.value)


@pytest.mark.parametrize(("column", "options"), [
    ("flops_per_token", {"d_column": "flops_per_token"}), ("steps", {"d_column": "steps"}),
    ("width", {"n_column": "width"}),
    ("tokens", {"loss_column": "tokens"}), ("perplexity", {"loss_column": "perplexity"})])
def test_a_column_that_is_another_quantity_is_refused_where_it_is_named(column: str, options: dict[str, str], tmp_path: Path
                                                                        ) -> None:
    path = tmp_path / "runs.csv"
    path.write_text("\n".join([f"N,D,loss,{column}", *(f"{n},{d},{loss},3" for n, d, loss in grid())]))
    with pytest.raises(UserError, match=f"'{column}': by its name this column holds .*, not .*; rename it if not"):
        read_runs(path, **options)


def test_what_is_no_count_of_the_training_is_not_offered(tmp_path: Path) -> None:
    for header in ("n_layers,D,loss", "N,val_samples,loss", "N,dataset_id,loss", "N,D,loss_std"):
        with pytest.raises(UserError, match="no column for") as caught:
            read_runs(foreign(tmp_path / "runs.csv", grid(), header))
        assert "did you mean" not in str(caught.value)


def test_log_loss_is_the_cross_entropy_and_it_is_said(tmp_path: Path) -> None:
    runs = read_runs(foreign(tmp_path / "runs.csv", grid(), "N,D,log_loss"), loss_column="log_loss")
    assert runs.runs[0].loss == pytest.approx(grid()[0][2]) and "log_loss is taken as the loss itself" in runs.notes[0]


def test_samples_are_computed_from_compute_when_asked(tmp_path: Path) -> None:
    plain = read_runs(foreign(tmp_path / "plain.csv", grid()))
    runs = read_runs(foreign(tmp_path / "flop.csv", FLOP, "Model Size,Training FLOP,loss"), d_from_compute=True)
    assert [run.d for run in runs.runs] == pytest.approx([run.d for run in plain.runs], rel=1e-8)
    assert runs.columns["D"] == "Training FLOP / (6 Model Size)" and runs.passes == pytest.approx(6)
    with pytest.raises(UserError, match="needs a column of training compute"):
        read_runs(tmp_path / "plain.csv", d_from_compute=True)
    with pytest.raises(UserError, match="does not go with --d_column"):
        read_runs(tmp_path / "flop.csv", d_column="loss", d_from_compute=True)


@pytest.mark.parametrize(("header", "convert"), [
    ("log10_params,log10_tokens,loss", math.log10), ("ln_N,ln_D,loss", math.log),
    ("log2(params),log2(tokens),loss", math.log2),
    ("params_millions,tokens (M),loss", lambda value: value / 1e6)])
def test_logarithms_and_units_are_undone_and_said(header: str, convert: object, tmp_path: Path) -> None:
    plain = read_runs(foreign(tmp_path / "plain.csv", grid()))
    path = tmp_path / "runs.csv"
    path.write_text("\n".join([header, *(f"{convert(n)!r},{convert(d)!r},{loss}"  # type: ignore[operator]
                                         for n, d, loss in grid())]))
    for runs in (read_runs(path), read_runs(path, n_column=header.split(",")[0], d_column=header.split(",")[1])):
        for attribute in ("n", "d", "c", "loss"):
            assert [getattr(run, attribute) for run in runs.runs] == pytest.approx(
                [getattr(run, attribute) for run in plain.runs], rel=1e-8)
        assert sum("taken" in note for note in runs.notes) == 2


@pytest.mark.parametrize("name", ["log_params", "lg(N)", "params (log)"])
def test_a_logarithm_of_unknown_base_is_refused(name: str, tmp_path: Path) -> None:
    data = foreign(tmp_path / "runs.csv", grid(), f"{name},D,loss")
    with pytest.raises(UserError, match=r"does not tell their base; rename it to log10_\w+, ln_"):
        read_runs(data)


def test_logarithms_under_a_plain_name_are_refused(tmp_path: Path) -> None:
    data = foreign(tmp_path / "runs.csv", [(math.log10(n), d, loss) for n, d, loss in grid()])
    with pytest.raises(UserError, match="got 7 to 10, which are no counts; rename the column to log10_N"):
        read_runs(data)


def test_a_plain_column_goes_before_its_logarithm(tmp_path: Path) -> None:
    path = tmp_path / "runs.csv"
    rows = [f"{math.log10(n)},{n},{d},{loss}" for n, d, loss in grid()]
    path.write_text("\n".join(["log10_params,params,tokens,loss", *rows]))
    assert read_runs(path).columns["N"] == "params"
