"""The table of `benchmarks/search.py`: the search beside its rivals, image by image."""

from __future__ import annotations

from typing import Any

from scipy.stats import binomtest

RIVALS = ("search", "uniform", "torch_pruning", "random")
KEPT = 0.03  # by which a limit may be missed


def paired(one: str, other: str) -> tuple[int, int, float]:
    """Return the images that only the first and only the second has right, and McNemar's exact two-sided p."""
    first = sum(a > b for a, b in zip(one, other, strict=True))
    second = sum(a < b for a, b in zip(one, other, strict=True))
    return first, second, float(binomtest(first, first + second).pvalue) if first + second else 1.0


def table(record: dict[str, Any]) -> str:
    """Return the record as Markdown."""
    lines = ["# The search beside its rivals", "", "Time and MACs are shares of the student's, as it is served. Gained: of "
             "the share of MACs that is saved, the share that the time falls by.", "",
             "| model | seed | network | time | MACs | gained | kB | validation | test | minutes |",
             "| --- | ---: | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |"]
    rows = [(model, seed, name, row) for model, seeds in record["rows"].items() for seed, rivals in seeds.items()
            for name, row in rivals.items() if "failed" not in row]
    lines += [f"| {model} | {seed} | {name}: {row['failed']} | | | | | | | |" for model, seeds in record["rows"].items()
              for seed, rivals in seeds.items() for name, row in rivals.items() if "failed" in row]
    for model, seed, name, row in rows:
        gained = (1 - row["of_student"]) / max(1 - row["macs_of_student"], 1e-9)
        lines.append(f"| {model} | {seed} | {name} | {row['of_student']:.3f} | {row['macs_of_student']:.3f} | {gained:.2f} "
                     f"| {row['size_bytes'] / 1000:.1f} | {row['validation'].count('1') / len(row['validation']):.2%} | "
                     f"{row['test_correct'] / record['setup']['test_images']:.2%} | {row['minutes']:.2f} |")
    lines += ["", "| the search against | only the search right | only the rival right | p (McNemar, exact) |",
              "| --- | ---: | ---: | ---: |"]
    for rival in RIVALS[1:]:
        both = [(rivals["search"]["validation"], rivals[rival]["validation"]) for seeds in record["rows"].values()
                for rivals in seeds.values()
                if all(name in rivals and "failed" not in rivals[name] for name in ("search", rival))]
        if both:
            first, second, p = paired("".join(one for one, _ in both), "".join(other for _, other in both))
            lines.append(f"| {rival} | {first} | {second} | {p:.2g} |")
    searched = {"CIFAR-10": [row for _, _, name, row in rows if name == "search"], "digits": record["digits"]}
    for name, found in searched.items():
        if found:
            kept = sum(row["of_student"] <= (1 + KEPT) * row["share"] for row in found)
            lines += ["", f"Limits kept within 3 % on {name}, measured again: {kept} of {len(found)}."]
    return "\n".join(lines) + "\n"
