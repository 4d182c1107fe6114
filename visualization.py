"""FAR: pictures of what teacher, FAR and pruned FAR look at. With no flag, of the newest demo run. See README.md."""

import sys

from utils import arguments, names
from utils.arguments import Parser, pick
from utils.script import run_script


def add_models_group(parser: Parser) -> None:
    g = parser.add_argument_group("models (with none, those of the newest demo run)")
    arguments.add_file(g, "--base-weight", "a teacher: a checkpoint of ours, or timm's or DeiT's layout")
    arguments.add_file(g, "--far-weight", "a FAR model")
    arguments.add_file(g, "--pruned-weight", "a pruned FAR model")
    arguments.add_model_name(g, "of --base-weight where the file does not say it; else DeiT-Tiny")
    arguments.add_backend(g)
    arguments.add_device(g)


def add_images_group(parser: Parser) -> None:
    g = parser.add_argument_group("images")
    g.add_argument("--images", type=arguments.path, metavar="PATH", help="a file, or a folder of image files")
    g.add_argument(
        "--dataset",
        choices=(*names.DATASETS, "PHOTOS"),
        help="or a data set's evaluation split; default DIGITS for DeiT-Micro, else PHOTOS, the two photographs "
        "that come with scikit-learn",
    )
    g.add_argument("--data-path", type=arguments.path, help="the data set's folder; default data/<dataset>")
    g.add_argument(
        "--count", type=arguments.SIZE, default=4, help="images taken, spread evenly over the split or folder"
    )


def add_figures_group(parser: Parser) -> None:
    g = parser.add_argument_group("figures")
    g.add_argument("--block", type=arguments.COUNT, help="this block alone; default: every replaced one")
    g.add_argument("--format", choices=("png", "pdf", "svg"), default="png", help="of the figures")
    g.add_argument(
        "--output-dir",
        type=arguments.path,
        help="where figures and arrays go; default: figures/ beside the newest model",
    )
    g.add_argument("--seed", type=arguments.SEED, default=42, help="seed of the influence matrix's probes")


def build_parser() -> Parser:
    parser = Parser(description=__doc__)
    add_models_group(parser)
    add_images_group(parser)
    add_figures_group(parser)
    return parser


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    from plots.pictures import PictureConfig, visualize

    page, _ = visualize(pick(PictureConfig, args))
    print(f"open {page}")
    return 0


if __name__ == "__main__":
    sys.exit(run_script(main))
