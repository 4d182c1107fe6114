"""What convert.py does: weights of the published code to a FAR checkpoint and back, DINOv2 to a teacher."""

from collections.abc import Iterable

import safetensors.torch

from models.deit import named_teacher
from models.dinov2 import find_file, from_onnx
from models.parts import BlockPart
from models.published import from_published, to_published
from models.replace import count_parameters, load_model, mlps, pack, replacements
from models.weights import read
from utils.checkpoint import save, write_atomic
from utils.configs import ConvertConfig
from utils.errors import FarError
from utils.files import check_writable

SUFFIXES = (".pth", ".pt")


def convert(args: ConvertConfig) -> str:
    """Writes --output and returns a line on it. Raises FarError, nothing written, where one cannot become the other."""
    check_output(args)
    named_teacher(args)
    if args.far_weight:
        model, config = load_model(args.far_weight, "--far-weight")
        parameters = write_published(model, args)
        note = "an LSTM a head" if args.per_head else "dense LSTMs"
    else:
        if args.published:
            weights = read(args.published, "--published")
            model, config, dropped = from_published(weights, args.named, args.rep_by, args.tolerance)
            parts = [*replacements(model).values(), *mlps(model).values()]
            zeroed = sum(int(mask.sum()) for part in parts for mask in part.dead_units().values())
            if args.remove_zeroed:
                remove_dead_units(parts)
            done = "removed" if args.remove_zeroed or not zeroed else "kept (--remove-zeroed takes them out)"
            note = f"{zeroed} zeroed units {done}"
            if dropped:
                note += f", values up to {dropped:.3g} off the heads' blocks dropped"
        else:
            model, config = from_onnx(find_file(args.onnx), f"--onnx {args.onnx}", args.named)
            note = "--mode teacher gives it a classifier"
        save(args.output, pack(model, config))
        parameters = count_parameters(model)
    return (
        f"{args.output}: {config.base_model}, {len(replacements(model))} of {len(model.blocks)} blocks replaced, "
        f"{config.num_classes} classes, {config.img_size} px, {parameters:,} parameters, {note}"
    )


def write_published(model, args: ConvertConfig) -> int:
    """Writes a FAR model's state dict as the published code has it. Returns its number of parameters."""
    source = f"--far-weight {args.far_weight}"
    if not replacements(model):
        raise FarError(f"{source}: holds a teacher, which needs no conversion; name a FAR model's checkpoint")
    try:
        state = {name: value.contiguous() for name, value in to_published(model, args.per_head).items()}
    except FarError as error:
        raise FarError(f"{source}: {error}") from error
    if args.output.suffix == ".safetensors":
        write_atomic(args.output, lambda file: file.write(safetensors.torch.save(state)))
    else:
        save(args.output, state)
    return sum(w.numel() for w in state.values())


def check_output(args: ConvertConfig) -> None:
    """Raises FarError where --output has an unknown suffix, is the input, or cannot be written."""
    suffixes = (*SUFFIXES, ".safetensors") if args.far_weight else SUFFIXES
    if args.output.suffix not in suffixes:
        raise FarError(f"--output {args.output}: unknown suffix; write one of {', '.join(suffixes)}")
    if args.output.resolve() == (args.far_weight or args.published or args.onnx).resolve():
        raise FarError(f"--output {args.output}: would take the place of the weights; name another file")
    check_writable(args.output.absolute().parent, "--output")


def remove_dead_units(parts: Iterable[BlockPart]) -> None:
    """Removes units that are always zero; a head and direction in which all are keeps its first."""
    for part in parts:
        dead = part.dead_units()
        for mask in dead.values():
            mask[0] &= not mask.all()
        part.shrink({place: (~mask).nonzero().flatten() for place, mask in dead.items()})
