"""FAR: a model as a file that runs without this repository, checked where it will run. See docs/deploy.md."""

import sys

from utils import arguments, names
from utils.arguments import Parser, pick
from utils.script import run_script


def build_parser() -> Parser:
    parser = Parser(description=__doc__)
    g = parser.add_argument_group("model (one of the two files)")
    arguments.add_file(g, "--far-weight", "a checkpoint of ours, of a FAR model or of a teacher")
    arguments.add_file(g, "--base-weight", "a teacher's weights, timm's or DeiT's layout")
    arguments.add_model_name(g, "of --base-weight where the file does not say it")
    g = parser.add_argument_group("file")
    g.add_argument(
        "--to",
        choices=names.EXPORTS,
        required=True,
        help="onnx: for ONNX Runtime, OpenVINO and others; pt2: for torch.export.load; safetensors: weights and "
        "config.json, as the hub's users expect",
    )
    g.add_argument("--output", type=arguments.path, metavar="FILE", help="default: beside the weights")
    g.add_argument("--opset", type=arguments.SIZE, help="of ONNX; default 20")
    g.add_argument("--int8", action="store_true", help="onnx: weights in 8 bits, activations too while it runs")
    g.add_argument("--aot", action="store_true", help="pt2: compiled for this kind of CPU, an AOTInductor package")
    g = parser.add_argument_group("check")
    g.add_argument(
        "--images",
        type=arguments.path,
        metavar="PATH",
        help="a file, or a folder of image files, to compare answers on; default: digits up to 32 pixels, else two "
        "photographs and their quarters, which come with scikit-learn",
    )
    g.add_argument("--dataset", choices=names.DATASETS, help="or a data set's evaluation split: top-1 too")
    g.add_argument("--data-path", type=arguments.path, help="the data set's folder; default data/<dataset>")
    return parser


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    from deploy.export import ExportConfig, export

    export(pick(ExportConfig, args))
    return 0


if __name__ == "__main__":
    sys.exit(run_script(main))
