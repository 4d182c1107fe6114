"""What convert.py does: weights of the published code to a FAR checkpoint and back, DINOv2 to a teacher."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
from timm.models.vision_transformer import VisionTransformer

from models.deit import named_teacher
from models.dinov2 import find_file, from_onnx
from models.parts import BlockPart
from models.published import from_published, to_published
from models.replace import FarConfig, count_parameters, load_model, mlps, pack, replacements
from utils.checkpoint import load, save, write_atomic
from utils.configs import ModelName
from utils.errors import FarError
from utils.files import check_writable

SUFFIXES = (".pth", ".pt")


@dataclass(frozen=True)
class ConvertConfig(ModelName):
    """What convert.py asks for; one of `published`, `onnx` and `far_weight` is given."""

    output: Path = Path()
    published: Path | None = None
    onnx: Path | None = None
    far_weight: Path | None = None
    per_head: bool = False
    rep_by: str = "multi-lstm"
    tolerance: float = 0.0
    remove_zeroed: bool = False


def convert(asked: ConvertConfig) -> str:
    """Writes --output and says what it holds. Raises FarError, nothing written, where one cannot become the other."""
    _check_output(asked)
    named_teacher(asked)
    convert_source = _leave if asked.far_weight else _come if asked.published else _from_onnx
    model, config, parameters, said = convert_source(asked)
    return (
        f"{asked.output}: {config.base_model}, {len(replacements(model))} of {len(model.blocks)} blocks replaced, "
        f"{config.num_classes} classes, {config.img_size} px, {parameters:,} parameters, {said}"
    )


def _leave(asked: ConvertConfig) -> tuple[VisionTransformer, FarConfig, int, str]:
    """A FAR checkpoint to a state dict of the published code."""
    source = f"--far-weight {asked.far_weight}"
    model, config = load_model(asked.far_weight, "--far-weight")
    if not config.replaced:
        raise FarError(f"{source}: holds a teacher, which needs no conversion; name a FAR model's checkpoint")
    try:
        state = {name: value.contiguous() for name, value in to_published(model, asked.per_head).items()}
    except FarError as error:
        raise FarError(f"{source}: {error}") from error
    if asked.output.suffix == ".safetensors":
        write_atomic(asked.output, lambda file: file.write(safetensors.torch.save(state)))
    else:
        save(asked.output, state)
    return model, config, sum(w.numel() for w in state.values()), "an LSTM a head" if asked.per_head else "dense LSTMs"


def _come(asked: ConvertConfig) -> tuple[VisionTransformer, FarConfig, int, str]:
    """A state dict of the published code to a FAR checkpoint."""
    content, source = load(asked.published, "--published"), f"--published {asked.published}"
    model, config, dropped = from_published(content, source, asked.named, asked.rep_by, asked.tolerance)
    parts = [*replacements(model).values(), *mlps(model).values()]
    zeroed = sum(int(mask.sum()) for part in parts for mask in part.silent().values())
    if asked.remove_zeroed:
        remove_silent(parts)
    save(asked.output, pack(model, config))
    done = "removed" if asked.remove_zeroed or not zeroed else "kept (--remove-zeroed takes them out)"
    said = f"{zeroed} zeroed units {done}" + f", values up to {dropped:.3g} off the heads' blocks dropped" * (
        dropped > 0
    )
    return model, config, count_parameters(model), said


def _from_onnx(asked: ConvertConfig) -> tuple[VisionTransformer, FarConfig, int, str]:
    """A DINOv2 in an ONNX file to a teacher's checkpoint."""
    model, config = from_onnx(find_file(asked.onnx), f"--onnx {asked.onnx}", asked.named)
    save(asked.output, pack(model, config))
    return model, config, count_parameters(model), "--mode teacher gives it a classifier"


def _check_output(asked: ConvertConfig) -> None:
    known = (*SUFFIXES, ".safetensors") if asked.far_weight else SUFFIXES
    if asked.output.suffix not in known:
        raise FarError(f"--output {asked.output}: unknown suffix; write one of {', '.join(known)}")
    if asked.output.resolve() == (asked.far_weight or asked.published or asked.onnx).resolve():
        raise FarError(f"--output {asked.output}: would take the place of the weights; name another file")
    check_writable(asked.output.absolute().parent, "--output")


def remove_silent(parts: Iterable[BlockPart]) -> None:
    """Takes units that are always zero out of the parts, but for one where a place would have none."""
    for part in parts:
        silent = part.silent()
        for mask in silent.values():
            mask[0] &= not mask.all()
        part.shrink({place: (~mask).nonzero().flatten() for place, mask in silent.items()})
