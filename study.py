"""What keeps the teacher's function: losses and pruning rules, measured on held-out training images of the digits.

python3 study.py --seeds 0 1 2               every row; an interrupted study goes on where it stopped
python3 study.py --rows preserve "by norm"   the rows that are named like this
"""

import sys
from pathlib import Path
from statistics import mean

from demo import COMMON, COMPARED, COMPARED_BLOCK, DIGITS, TEACHER
from demo import PRUNE as PRUNING
from utils.checkpoint import write_json
from utils.errors import FarError
from utils.recipe import Recipe, recipe_parser
from utils.script import run_script
from utils.terminal import table

HOLDOUT = ["--holdout", "0.2"]  # nothing is tuned on the evaluation split


def both(loss: str, *more: str) -> tuple[list[str], list[str]]:
    """A loss in both stages."""
    return ["--train-loss", loss, *more], ["--block-ft-train-loss", loss, *more]


# By name: flags of stage attn (None leaves it out) and of stage block, besides the demo's; 32 epochs in each row.
DISTILLING: dict[str, tuple[list[str] | None, list[str]]] = {
    "combine": ([], []),
    "preserve": both("preserve"),
    "similarity": both("similarity"),
    "kl": both("kl"),
    "similarity+kl": both("similarity+kl"),
    "squared_error+kl": both("squared_error+kl"),
    "preserve with kl times 3": both("similarity+squared_error+3*kl"),
    "preserve with kl times 10": both("similarity+squared_error+10*kl"),
    "preserve, kl at temperature 4": both("similarity+squared_error+soft_kl"),
    "preserve, images mixed": both("preserve", "--mixup", "0.8"),
    "preserve, then combine": (["--train-loss", "preserve"], []),
    "preserve, teacher's inputs first": (
        ["--train-loss", "preserve", "--distill-input", "teacher"],
        ["--block-ft-train-loss", "preserve"],
    ),
    "preserve, both stages in one": (
        None,
        "--block-ft-train-loss preserve --block-ft-epochs 32 --block-ft-lr 3e-3 --block-ft-warmup-epochs 3".split(),
    ),
}
REGULARIZED = "--epochs 6 --ft-epochs 12".split()
TUNED_ONLY = "--reg 0 --epochs 0 --ft-epochs 18".split()
HALF_TUNED = "--reg 0 --epochs 0 --ft-epochs 9 --distill-loss preserve".split()
FIRST, SECOND = "by norm, preserve, the first of two steps", "by norm, preserve, two steps"
PUBLISHED = "--score norm --no-refit --distill-loss combine".split()
# By name: flags of prune.py besides the demo's and PUBLISHED, from the row `preserve`. 18 epochs in each row (9 in a
# step of two).
PRUNED = {
    "by norm, Hoyer-square, combine": ["--reg", "3", *REGULARIZED],
    "by norm, group L1, combine": ["--reg", "1", *REGULARIZED],
    "by norm, no regularizer, combine": TUNED_ONLY,
    "by norm, no regularizer, preserve": [*TUNED_ONLY, "--distill-loss", "preserve"],
    "carried, preserve": [*TUNED_ONLY, "--distill-loss", "preserve", "--score", "carried"],
    "carried, refit, preserve": [*TUNED_ONLY, "--distill-loss", "preserve", "--score", "carried", "--refit"],
    "carried, refit, combine": [*TUNED_ONLY, "--score", "carried", "--refit"],
    "carried, refit, preserve, Hoyer-square": [
        *("--reg", "3", *REGULARIZED),
        *("--distill-loss", "preserve", "--score", "carried", "--refit"),
    ],
    **{
        f"by norm, preserve, Hoyer-square at {decay}": [
            *("--reg", "3", *REGULARIZED, "--decay", decay),
            *("--distill-loss", "preserve", "--sweep", "0.3"),
        ]
        for decay in ("1e-3", "1e-2", "1e-1")
    },
    "by norm, preserve, no regularizer, six epochs before": [
        *("--reg", "0", *REGULARIZED),
        *("--distill-loss", "preserve", "--sweep", "0.3"),
    ],
    FIRST: [*HALF_TUNED, "--sweep", "0.55"],
    SECOND: [*HALF_TUNED, "--sweep", f"{0.3 / 0.55:.4f}"],  # to 0.3, after FIRST
}
KEEP = "0.5,0.3,0.1"
COLUMNS = {"top-1 %": ("acc1", ".2f"), "agrees %": ("agreement", ".2f"), "KL": ("kl", ".4f")}


def folder_name(kind: str, row: str) -> str:
    return kind + "-" + "".join(c if c.isalnum() else "-" for c in row)


def distil(recipe: Recipe, base: list[str], row: str) -> dict[str, dict]:
    """A row of DISTILLING; its result.json, by name. base: the teacher's and the data's flags."""
    attn, block = DISTILLING[row]
    start = []
    if attn is not None:
        recipe.run("main.py", folder_name("attn", row), *COMPARED, *base, *attn)
        start = ["--attn-weight", recipe.best(folder_name("attn", row))]
    return {row: recipe.run("main.py", folder_name("block", row), *COMPARED_BLOCK, *base, *start, *block)}


def prune(recipe: Recipe, base: list[str], row: str) -> dict[str, dict]:
    """A row of PRUNED at each of KEEP, or of its own --sweep, by name. base: the teacher's and the data's flags."""
    start = folder_name("prune", FIRST) + "/keep-0.55" if row == SECOND else folder_name("block", "preserve")
    rule = PRUNING.index("--keep-ratio")
    flags = [*PRUNING[:rule], *PRUNING[rule + 2 :], *PUBLISHED, "--sweep", KEEP, *base]
    flags += ["--model-path", recipe.best(start), *PRUNED[row]]
    report = recipe.run("prune.py", folder_name("prune", row), *flags)
    return {f"{row}, keep {point['keep_ratio']:g}": point for point in report["sweep"]}


def study(root: Path, seeds: list[int], rows: list[str], epochs: int | None, subset: float) -> dict[str, list[dict]]:
    """All named rows, seed by seed, also in root/study.json as they come."""
    results: dict[str, list[dict]] = {}
    for seed in seeds:
        recipe = Recipe(root / str(seed), [*COMMON, "--seed", str(seed)], epochs)
        data = [*DIGITS, *HOLDOUT, "--train-subset", f"{subset:g}"]
        recipe.run("main.py", "teacher", *TEACHER, *data)
        base = ["--base-weight", recipe.best("teacher"), *data]
        for row in rows:
            for name, result in (distil if row in DISTILLING else prune)(recipe, base, row).items():
                results.setdefault(name, []).append(result)
            write_json(root / "study.json", results)
    return results


def table_rows(results: dict[str, list[dict]]) -> list[list[str]]:
    """Means over the seeds, and z's least cosine and the block outputs' largest error of all blocks and seeds."""
    lines = [["", *COLUMNS, "least cos", "most error"]]
    for name, reports in results.items():
        means = [f"{mean(r[key] for r in reports):{form}}" for key, form in COLUMNS.values()]
        least = min(v for r in reports for v in r["z_similarity"].values())
        most = max(v for r in reports for v in r["output_error"].values())
        lines.append([name, *means, f"{least:.3f}", f"{most:.3f}"])
    return lines


def chosen(words: list[str]) -> list[str]:
    """The rows that hold one of the words; pruned ones need the row `preserve`, a second step the first.

    Raises FarError where there is none.
    """
    rows = [row for row in (*DISTILLING, *PRUNED) if any(word in row for word in words)]
    if not rows:
        raise FarError(f"--rows {' '.join(words)}: no row is named like this; there are {'; '.join(DISTILLING)}; ...")
    needed = {*rows, *(["preserve"] if PRUNED.keys() & rows else []), *([FIRST] if SECOND in rows else [])}
    return [row for row in (*DISTILLING, *PRUNED) if row in needed]


def main(argv: list[str] | None = None) -> int:
    parser = recipe_parser(__doc__.splitlines()[0], "runs/study", (0, 1, 2))
    parser.add_argument("--rows", nargs="+", default=[""], metavar="WORDS", help="those whose names hold one of these")
    args = parser.parse_args(argv)
    results = study(args.output_dir, args.seeds, chosen(args.rows), args.epochs, args.train_subset)
    seeds = " ".join(map(str, args.seeds))
    print(f"\nmeans of seeds {seeds}, on held-out training images\n{table(table_rows(results))}")
    return 0


if __name__ == "__main__":
    sys.exit(run_script(main))
