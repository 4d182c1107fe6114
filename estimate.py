"""FAR: what a model costs on an in-memory-computing chip: exact counts, energy, latency, area. See docs/hardware.md."""

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from utils.arguments import Parser, pick
from utils.configs import EstimateConfig, ModelName
from utils.script import run_script
from utils.terminal import table


def build_parser() -> Parser:
    parser = Parser(description=__doc__)
    parser.add_flags(EstimateConfig)
    return parser


def find_models(config: EstimateConfig) -> Iterator[tuple[str, Any, Any]]:
    """(name, its teacher's configuration, its own): only shapes count, no weights are needed. Teachers come first."""
    from models.deit import named_teacher
    from models.replace import FarConfig, build_on_meta, pruned_to, read_config
    from utils.checkpoint import load

    for file in config.far_weight:
        far = read_config(load(file, "--far-weight"), f"--far-weight {file}")
        yield str(file), FarConfig(far.base_model, far.num_classes, far.img_size), far
    for name in config.base_model or ("DeiT-Tiny",) * (not config.far_weight):
        teacher = named_teacher(ModelName(base_model=name))
        plain = FarConfig(name, teacher.classes, config.input_size or teacher.input_size)
        depth = len(build_on_meta(plain, f"--base-model {name}").blocks)
        for rep_by in config.rep_by:
            far = replace(plain, rep_by=rep_by, replaced=tuple(range(depth)))
            yield f"{name}, {rep_by}", plain, far
            if config.keep_ratio and (pruned := pruned_to(far, config.keep_ratio)) != far:
                yield f"{name}, {rep_by}, {config.keep_ratio:g} of units", plain, pruned


def show_counts(counts: dict[str, Any]) -> None:
    heads = ("static MACs", "dynamic MACs", "elementwise", "functions", "read", "written", "chain", "weights")
    rows = [[name, *(f"{x / 1e6:,.4g} M" if x >= 1e5 else f"{x:,}" for x in row)] for name, row in counts.items()]
    print(table([["exact counts, an image", *heads], *rows]))


def show_costs(costs: dict[str, Any]) -> None:
    heads = (
        "uJ",
        "low to high",
        "latency us",
        "images/s",
        "crossbars",
        "used",
        "conversions",
        "cells written",
        "worn out in",
    )
    rows = [["estimate, an image", *heads]]
    for name, cost in costs.items():
        low, likely, high = cost.total_uj
        rows.append([name, f"{likely:,.0f}", f"{low:,.0f} to {high:,.0f}", f"{cost.latency_us:,.0f}"])
        rows[-1] += [f"{1e6 / cost.interval_us:,.0f}", f"{cost.crossbars:,}", f"{cost.used:.0%}"]
        rows[-1] += [f"{count / 1e6:,.4g} M" if count else "0" for count in (cost.conversions, cost.writes)]
        rows[-1] += ["-" if cost.lifetime_h is None else f"{cost.lifetime_h[1]:,.0f} h"]
    print(f"\n{table(rows)}")


def show_turns(turns: dict[str, Any]) -> None:
    rows = [["energy over attention's cheapest", "ratio", "a constant halved or doubled", "even where"]]
    for name, by in turns.items():
        ratios = [ratio for turn in by.values() for ratio in (turn.halved, turn.doubled)]
        even = [f"{key} x {turn.at:.2f}" for key, turn in by.items() if turn.at and 0.1 < turn.at < 10]
        now = next(iter(by.values())).now
        rows.append([name, f"{now:.2f}", f"{min(ratios):.2f} to {max(ratios):.2f}", ", ".join(even) or "-"])
    print(f"\n{table(rows)}")


def main(argv: list[str] | None = None) -> int:
    config = pick(EstimateConfig, build_parser().parse_args(argv))
    from deploy.crossbars import MAPPINGS, Hardware, estimate, find_turns
    from deploy.fuse import merge_blocks
    from models.operations import count, operations
    from models.replace import build, build_on_meta
    from plots.figures import energy_bars, save_figure
    from utils.files import check_writable
    from utils.recipe import write_json

    check_writable(config.output_dir)
    hardware = Hardware.read(config.hardware or Path(__file__).parent / "hardware/isaac.toml")
    chosen = {key: getattr(config, key) for key in ("input_bits", "copies") if getattr(config, key)}
    hardware = replace(hardware, design=hardware.design._replace(**chosen))
    counts, costs, turns = {}, {}, {}
    for name, teacher, far in find_models(config):
        attention = f"{teacher.base_model} {teacher.img_size} px"
        for title, shape in {attention: teacher, name: far}.items():
            if title not in counts and not (title == name and far == teacher):
                model = merge_blocks(build(shape)) if config.merged else build_on_meta(shape, title)
                ops = list(operations(model))
                counts[title] = count(ops)
                mappings = MAPPINGS if counts[title].dynamic_macs else ("",)
                for mapping in mappings:
                    costs[f"{title}, {mapping}".removesuffix(", ")] = estimate(ops, hardware, mapping or "digital")
        if name in costs:
            rivals = [costs[f"{attention}, {mapping}"] for mapping in MAPPINGS]
            turns[name] = find_turns(costs[name], rivals, hardware)
    record = {
        "hardware": {"name": hardware.name, **hardware.design._asdict()},
        "counts": {name: row._asdict() for name, row in counts.items()},
        "costs": {name: cost.as_json() for name, cost in costs.items()},
        "turns": {name: {key: turn._asdict() for key, turn in by.items()} for name, by in turns.items()},
    }
    config.output_dir.mkdir(parents=True, exist_ok=True)
    write_json(config.output_dir / "estimate.json", record)
    save_figure(energy_bars({name: cost.energy_uj for name, cost in costs.items()}), config.output_dir / "estimate.png")
    show_counts(counts)
    show_costs(costs)
    show_turns(turns)
    print(f"\n{hardware.name}; {config.output_dir}/estimate.json, estimate.png")
    return 0


if __name__ == "__main__":
    sys.exit(run_script(main))
