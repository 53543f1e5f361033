"""Demo over several seeds: the source of the demo's figures in docs/benchmarks.md and in its report.

For each seed, a cohort is made, a model is trained with and without the region loss, and the held-out slides are
scored. Prints the scores of each seed and their mean, and writes them with a description of the machine.

    python benchmarks/cohort.py --seeds 0 1 2 --out runs/cohort --json benchmarks/results/cohort.json
"""

import argparse
import json
import platform
import statistics
import sys
from pathlib import Path

from pathflip_jax.commands.demo_steps import SLIDES, run_demo
from pathflip_jax.runtime.limits import processors

# Name in the table -> path of the number in scores.json.
FIGURES = {
    "text_to_slide_r1": ("retrieval", "text_to_slide", "of_100", "R@1", "value"),
    "slide_to_text_r1": ("retrieval", "slide_to_text", "of_100", "R@1", "value"),
    "text_to_slide_r1_slide_loss_only": ("retrieval", "text_to_slide", "of_100", "R@1", "compared", "value"),
    "slide_to_text_r1_slide_loss_only": ("retrieval", "slide_to_text", "of_100", "R@1", "compared", "value"),
    "r1_chance": ("retrieval", "text_to_slide", "of_100", "R@1", "chance"),
    "zero_shot_balanced_accuracy": ("zero_shot", "metrics", "balanced_accuracy", "value"),
    "zero_shot_slide_loss_only": ("zero_shot", "metrics", "balanced_accuracy", "compared", "value"),
    "zero_shot_mean_colour": ("zero_shot", "metrics", "balanced_accuracy", "mean_colour", "value"),
    "grounding_auc": ("grounding", "auc", "value"),
    "grounding_mean_colour": ("grounding", "auc", "mean_colour", "value"),
    "grounding_no_text": ("grounding", "auc", "no_text", "value"),
    "grounding_slide_loss_only": ("grounding", "auc", "compared", "value"),
    "grounding_gain": ("grounding", "auc", "difference", "value"),
    "grounding_gain_low": ("grounding", "auc", "difference", "low"),
    "grounding_gain_high": ("grounding", "auc", "difference", "high"),
    "pointing": ("grounding", "pointing", "value"),
    "pointing_no_text": ("grounding", "pointing", "no_text", "value"),
    "pointing_mean_colour": ("grounding", "pointing", "mean_colour", "value"),
    "dice": ("grounding", "dice", "value"),
    "dice_no_text": ("grounding", "dice", "no_text", "value"),
    "dice_mean_colour": ("grounding", "dice", "mean_colour", "value"),
}


def figures(scores: dict) -> dict[str, float]:
    """Scores of one seed, by name."""
    found = {}
    for name, path in FIGURES.items():
        value = scores
        for key in path:
            value = value[key]
        found[name] = float(value)
    return found


def main() -> int:
    """Run every seed, print the table, write the JSON; the exit code is non-zero if a seed's demo failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--slides", type=int, default=SLIDES)
    parser.add_argument("--out", type=Path, required=True, help="folder of one demo per seed")
    parser.add_argument("--json", type=Path, help="file to write")
    options = parser.parse_args()
    rows = {}
    for seed in options.seeds:
        out = options.out / f"seed{seed}"
        code = run_demo(out, slides=options.slides, seed=seed, workers=processors())
        if code:
            return code
        rows[seed] = figures(json.loads((out / "scores.json").read_text()))
    mean = {name: statistics.mean(row[name] for row in rows.values()) for name in FIGURES}
    width = max(map(len, FIGURES))
    print(f"\n{'':{width}}  " + "  ".join(f"seed {seed:<3}" for seed in rows) + "  mean")
    for name in FIGURES:
        print(f"{name:{width}}  " + "  ".join(f"{row[name]:8.3f}" for row in rows.values()) + f"  {mean[name]:.3f}")
    if options.json:
        machine = {"cores": processors(), "processor": platform.machine(), "python": platform.python_version()}
        settings = {"slides": options.slides, "seeds": options.seeds}
        options.json.parent.mkdir(parents=True, exist_ok=True)
        outcome = {"machine": machine, "settings": settings, "seeds": rows, "mean": mean}
        options.json.write_text(json.dumps(outcome, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
