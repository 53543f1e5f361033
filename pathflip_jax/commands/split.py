"""`pathflip split`: splits by patient, and checks of existing splits."""

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
        "pathflip split slides.csv --shares 0.7 0.1 0.2 --out split.csv",
        "pathflip split slides.csv --label subtype --folds 5 --out folds",
        "pathflip split --check train=TCGA_RCC_train.csv test=TCGA_RCC_test.csv",
    )
    parser.add_argument(
        "tables",
        type=_table,
        nargs="+",
        metavar="TABLE",
        help="slide table with columns slide_id, patient_id, label, site (without them, patient and site are read from "
        "TCGA barcodes); several tables are read as one; SIDE=TABLE puts all slides of a table in split SIDE",
    )
    parser.add_argument(
        "--check", action="store_true", help="check the split that the tables already have; exit code 1 if it is faulty"
    )
    parser.add_argument(
        "--shares",
        type=number("shares"),
        nargs="+",
        metavar="X",
        help="proportions of train, val and test (default 0.7 0.1 0.2), or of train and test",
    )
    parser.add_argument(
        "--folds",
        type=number("folds"),
        metavar="K",
        help="write K tables for cross-validation, K > 2: in each, a different fold is test and the next one val",
    )
    parser.add_argument(
        "--label", default="", metavar="COLUMN", help="column of the labels; the new table repeats it as `label`"
    )
    parser.add_argument(
        "--by-site", action="store_true", help="also keep all slides of a site in one split (needs sites)"
    )
    parser.add_argument("--seed", type=number("seed"), default=0, help="seed of the order of patients (default 0)")
    parser.add_argument("--out", type=local_path, metavar="CSV", help="table to write; with --folds, a new folder")
    parser.add_argument("--json", action="store_true", help="print the check as JSON")


def _table(text: str) -> str:
    side, equals, table = text.rpartition("=")
    return f"{side}{equals}{path_text(table)}"


def _run(options: argparse.Namespace) -> int:
    from pathflip_jax.evaluate import splits

    rows = splits.read_split(options.tables, options.label)
    if options.check:
        if options.out or options.shares or options.folds:
            raise ValueError("--check only checks an existing split: drop --out, --shares and --folds")
        if not any(row["split"] for row in rows):
            raise ValueError(
                f"{' '.join(options.tables)}: no split to check; add a column split (train, val, test), or pass "
                "train=TABLE test=TABLE"
            )
        checks = {"": splits.check_split(rows)}
    else:
        if options.out is None:
            raise ValueError("no output file: add --out split.csv, or --check to check an existing split")
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
