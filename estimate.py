"""FAR: what a model costs on an in-memory-computing chip: exact counts, energy, latency, area. See docs/hardware.md."""

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from utils.arguments import Parser, pick
from utils.configs import EstimateConfig, ModelName
from utils.errors import FarError
from utils.script import run_script
from utils.terminal import table


def build_parser() -> Parser:
    parser = Parser(description=__doc__)
    parser.add_flags(EstimateConfig)
    return parser


def find_models(config: EstimateConfig) -> Iterator[tuple[str, str, Any, Any]]:
    """(source, name, configuration of the teacher, of the model), a teacher's own with an empty name."""
    from models.deit import check_size, named_teacher
    from models.replace import FarConfig, build_on_meta, pruned_to, read_config
    from utils.checkpoint import load

    for file in config.far_weight or ():
        source = f"--far-weight {file}"
        far = read_config(load(file, "--far-weight"), source)
        teacher = FarConfig(far.base_model, far.num_classes, far.img_size)
        yield source, "", teacher, teacher
        if far.replaced or far.mlp:
            yield source, str(file), teacher, far
    for name in config.base_model or ("DeiT-Tiny",) * (not config.far_weight):
        source, teacher = f"--base-model {name}", named_teacher(ModelName(base_model=name))
        teacher = FarConfig(name, teacher.classes, config.input_size or teacher.input_size)
        check_size(name, teacher.img_size)
        yield source, "", teacher, teacher
        blocks = tuple(range(len(build_on_meta(teacher, source).blocks)))
        for rep_by in config.rep_by:
            far = replace(teacher, rep_by=rep_by, replaced=blocks)
            yield source, f"{name}, {rep_by}", teacher, far
            if config.keep_ratio and (pruned := pruned_to(far, config.keep_ratio)) != far:
                yield source, f"{name}, {rep_by}, {config.keep_ratio:g}", teacher, pruned


def with_unit(count: float) -> str:
    for unit, size in (("G", 1e9), ("M", 1e6)):
        if count >= size / 10:
            return f"{count / size:.3f} {unit}"
    return f"{count:,.0f}"


def show(counts: dict[str, Any], costs: dict[str, Any], turns: dict[str, Any]) -> None:
    """Prints counts, costs, and what decides between models."""
    heads = ("static MACs", "dynamic", "elementwise", "functions", "read", "written", "chain", "weights")
    print(table([["counts, an image", *heads], *([name, *map(with_unit, row)] for name, row in counts.items())]))
    rows = [["estimate, an image", "uJ", "low to high", "us", "images/s", "crossbars", "used", "worn out in"]]
    for name, cost in costs.items():
        low, likely, high = cost.total_uj
        worn = "-" if cost.lifetime_h is None else f"{cost.lifetime_h[1]:,.0f} h"
        rows.append([name, f"{likely:,.0f}", f"{low:,.0f} to {high:,.0f}", f"{cost.latency_us:,.0f}"])
        rows[-1] += [f"{1e6 / cost.interval_us:,.0f}", f"{cost.crossbars:,}", f"{cost.used:.0%}", worn]
    print(f"\n{table(rows)}")
    rows = [["energy over attention's cheapest", "ratio", "a constant halved or doubled", "even where"]]
    for name, by in turns.items():
        ratios = [ratio for turn in by.values() for ratio in (turn.halved, turn.doubled)]
        even = [f"{key} x {turn.even:.2f}" for key, turn in by.items() if turn.even and 0.1 < turn.even < 10]
        now = next(iter(by.values())).now
        rows.append([name, f"{now:.2f}", f"{min(ratios):.2f} to {max(ratios):.2f}", ", ".join(even) or "-"])
    if turns:
        print(f"\n{table(rows)}")


def main(argv: list[str] | None = None) -> int:
    parser = build_parser()
    config = pick(EstimateConfig, parser.parse_args(argv))
    if config.far_weight and not config.base_model:
        parser.refuse(argv, {"rep_by", "keep_ratio", "input_size"}, "is for models by name, --base-model")
    from deploy.crossbars import MAPPINGS, Hardware, estimate, find_turns
    from deploy.fuse import merge_blocks
    from models.operations import count, operations
    from models.replace import build_on_meta
    from plots.figures import energy_bars, save_figure
    from utils.checkpoint import write_json
    from utils.files import check_writable

    check_writable(config.output_dir)
    profile = config.hardware or Path(__file__).parent / "hardware/isaac.toml"
    hardware = Hardware.read(profile)
    chosen = {key: getattr(config, key) for key in ("input_bits", "copies") if getattr(config, key)}
    hardware = replace(hardware, design=hardware.design._replace(**chosen))
    counts, costs, turns = {}, {}, {}
    for source, name, teacher, shape in find_models(config):
        classes = "" if teacher.num_classes == 1000 else f", {teacher.num_classes} classes"
        attention = f"{teacher.base_model}, {teacher.img_size} px{classes}"
        title = name or attention
        if title in counts:
            continue
        model = merge_blocks(build_on_meta(shape, source))
        try:
            ops = list(operations(model))
        except FarError as error:
            raise FarError(f"{source}: {error}; leave it out") from error
        counts[title] = count(ops)
        several = {f"{title}, {way}": estimate(ops, hardware, way) for way in MAPPINGS if counts[title].dynamic_macs}
        mapped = several or {title: estimate(ops, hardware)}
        costs |= mapped
        if name:
            cheapest = min(mapped.values(), key=lambda cost: cost.total_uj[1])
            turns[title] = find_turns(cheapest, [costs[f"{attention}, {way}"] for way in MAPPINGS], hardware)
    record = {
        "hardware": {"file": str(profile), "name": hardware.name, **hardware.design._asdict()},
        "constants": {key: value.tolist() for key, value in hardware.constants.items()},
        "counts": {name: row._asdict() for name, row in counts.items()},
        "costs": {name: cost.as_json() for name, cost in costs.items()},
        "turns": {name: {key: turn._asdict() for key, turn in by.items()} for name, by in turns.items()},
    }
    config.output_dir.mkdir(parents=True, exist_ok=True)
    write_json(config.output_dir / "estimate.json", record)
    save_figure(energy_bars({name: cost.energy_uj for name, cost in costs.items()}), config.output_dir / "estimate.png")
    show(counts, costs, turns)
    print(f"\n{hardware.name}; {config.output_dir}/estimate.json, estimate.png")
    return 0


if __name__ == "__main__":
    sys.exit(run_script(main))
