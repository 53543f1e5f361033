"""`pathflip split`: splits by patient, and the check of a given one."""

import argparse
import json

from pathflip_jax.commands.options import command, local_path, number, path_text

FAULTY = 1


def add(commands) -> None:
    """Add the command and its options."""
    parser = command(
        commands,
        "split",
        _run,
        "split a slide table by patient, even in labels and sites; or check a given split",
        "pathflip split slides.csv --shares 0.7 0.1 0.2 --out split.csv",
        "pathflip split slides.csv --label subtype --folds 5 --out folds",
        "pathflip split --check train=TCGA_RCC_train.csv test=TCGA_RCC_test.csv",
    )
    parser.add_argument(
        "tables",
        type=_table,
        nargs="+",
        metavar="TABLE",
        help="slide table: slide_id, patient_id, label, site (patient and site are read from TCGA barcodes where there "
        "is no such column); several are read as one, SIDE=TABLE says on which side its slides are",
    )
    parser.add_argument("--check", action="store_true", help="examine the split that the tables have; exit code 1: bad")
    parser.add_argument(
        "--shares",
        type=number("shares"),
        nargs="+",
        metavar="X",
        help="shares of train, val and test (default 0.7 0.1 0.2); two: train and test",
    )
    parser.add_argument(
        "--folds",
        type=number("folds"),
        metavar="K",
        help="K tables: a different fold is test in each, the next one val, K > 2",
    )
    parser.add_argument(
        "--label", default="", metavar="COLUMN", help="column of the labels; the new table has them as `label` too"
    )
    parser.add_argument("--by-site", action="store_true", help="no site on two sides either (needs sites)")
    parser.add_argument("--seed", type=number("seed"), default=0, help="seed of the order of patients (default 0)")
    parser.add_argument("--out", type=local_path, metavar="CSV", help="table to write; with --folds a new folder")
    parser.add_argument("--json", action="store_true", help="print the check as JSON")


def _table(text: str) -> str:
    side, equals, table = text.rpartition("=")
    return f"{side}{equals}{path_text(table)}"


def _run(options: argparse.Namespace) -> int:
    from pathflip_jax.evaluate import splits

    rows = splits.read_split(options.tables, options.label)
    if options.check:
        if options.out or options.shares or options.folds:
            raise ValueError("--check examines a split and makes none: leave --out, --shares and --folds out")
        if not any(row["split"] for row in rows):
            raise ValueError(
                f"{' '.join(options.tables)}: no split to check; a column split (train, val, test) is needed, or "
                "train=TABLE test=TABLE"
            )
        checks = {"": splits.check_split(rows)}
    else:
        if options.out is None:
            raise ValueError("where to write the split is not said: add --out split.csv (or --check, to examine one)")
        checks = splits.write_splits(
            rows, options.out, shares=options.shares, folds=options.folds, by_site=options.by_site, seed=options.seed
        )
    note = splits.unlabelled(rows)
    checks = {name: check._replace(findings=[*check.findings, *note]) for name, check in checks.items()}
    if options.json:
        found = {name: check.as_json() for name, check in checks.items()}
        print(json.dumps(found if len(found) > 1 else next(iter(found.values()))))
    else:
        print("\n\n".join(splits.describe(check, name) for name, check in checks.items()))
    return FAULTY if any(check.faults for check in checks.values()) else 0
