"""`pathflip split`: splits by patient, and checks of existing splits."""

import argparse
import json

from pathflip_jax.commands.options import add_fold_option, command, local_path, number, path_text, place

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
        "pathflip split labels.csv --from splits_0.csv --out slides.csv",
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
        "--from",
        dest="source",
        type=place,
        metavar="FILE",
        help="take the split of another file: splits_0.csv or splits_0_bool.csv of CLAM, k=all.tsv of Patho-Bench, or "
        "a slide table; with --out, write it with the table's labels and patients",
    )
    add_fold_option(parser)
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
    from pathflip_jax.data.texts.split_files import side_and_table

    side, table = side_and_table(text)
    return f"{side}={path_text(table)}" if side else path_text(table)


def _run(options: argparse.Namespace) -> int:
    from pathflip_jax.evaluate import splits

    rows = splits.read_split(options.tables, options.label, "" if options.source else options.fold or "")
    if options.check:
        if options.out or options.shares or options.folds:
            raise ValueError("--check only checks an existing split: drop --out, --shares and --folds")
        checks = {"": _check(options, rows)}
    elif options.out is None:
        raise ValueError("no output file: add --out split.csv, or --check to check an existing split")
    else:
        checks = _write(options, rows)
    note = splits.unlabelled(rows)
    checks = {name: check._replace(findings=[*check.findings, *note]) for name, check in checks.items()}
    if options.json:
        found = {name: check.as_json() for name, check in checks.items()}
        print(json.dumps(found if len(found) > 1 else next(iter(found.values()))))
    else:
        print("\n\n".join(splits.describe(check, name) for name, check in checks.items()))
    return FAULTY if any(check.faults for check in checks.values()) else 0


def _check(options: argparse.Namespace, rows: list[dict[str, str]]):
    """The check of the split that the tables have, or that the file of --from gives them."""
    from pathflip_jax.data.texts.split_files import folds_hint, one_fold
    from pathflip_jax.evaluate.assigned_splits import assign_split
    from pathflip_jax.evaluate.splits import check_split

    if options.source:
        rows, notes = assign_split(rows, one_fold(options.source, options.fold))
        check = check_split(rows)
        return check._replace(findings=[*check.findings, *notes])
    if not any(row["split"] for row in rows):
        raise ValueError(
            f"{' '.join(options.tables)}: no split to check; add a column split (train, val, test), or pass "
            f"train=TABLE test=TABLE{folds_hint(rows)}"
        )
    return check_split(rows)


def _write(options: argparse.Namespace, rows: list[dict[str, str]]) -> dict:
    """Write the split of --from, or a new one; returns the check of each table."""
    from pathflip_jax.data.texts.split_files import one_fold
    from pathflip_jax.evaluate.assigned_splits import write_assigned
    from pathflip_jax.evaluate.splits import write_splits

    if options.source is None:
        return write_splits(
            rows, options.out, shares=options.shares, folds=options.folds, by_site=options.by_site, seed=options.seed
        )
    if options.shares or options.folds or options.by_site:
        raise ValueError("--from takes the split of a file: drop --shares, --folds and --by-site")
    return {str(options.out): write_assigned(rows, one_fold(options.source, options.fold), options.out)}
