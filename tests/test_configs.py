"""Flags become typed values once, at the door; what the loop does at each step of an epoch."""

import random
from argparse import Namespace
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path

import pytest

import main
import prune
import visualization
from engine.configs import ModelName, Rates
from engine.stages import Optim
from plots.pictures import PictureConfig
from tests.conftest import ROOT
from utils.arguments import pick
from utils.distributed import Context
from utils.errors import FarError


@dataclass(frozen=True)
class Inner:
    size: int = 3
    absent: str = "default"


@dataclass(frozen=True)
class Outer:
    inner: Inner
    name: str
    rate: float = 0.5


def test_a_configuration_takes_the_flags_of_its_fields_names():
    size, rate = random.randrange(100), random.random()
    flags = Namespace(size=size, name="a", rate=rate, ft_rate=rate / 2, ft_name="b", unread=1)
    assert pick(Outer, flags) == Outer(Inner(size), "a", rate)
    assert pick(Outer, flags, "ft_") == Outer(Inner(size), "b", rate / 2)
    assert pick(Outer, flags, inner=Inner(0), name="c") == Outer(Inner(0), "c", rate)


def leaves(config, prefix: str = ""):
    """(flag's destination, value) of every field, down to the last."""
    for field in fields(config):
        value = getattr(config, field.name)
        if is_dataclass(value):
            inner = "block_ft_" if field.name == "block_rates" else "ft_" if field.name == "ft_rates" else prefix
            yield from leaves(value, inner)
        else:
            yield prefix + field.name, value


@pytest.mark.parametrize(
    ("script", "line", "elsewhere"),
    [
        (main, "--mode train --finetune-head", {"record", "flag", "path", "published", "data_path"}),
        (
            prune,
            "--sweep 0.5,0.2 --base-weight t.pth",
            {"mode", "rep_by", "rep_init", "record", "flag", "path", "published"},
        ),
    ],
)
def test_every_value_a_command_holds_is_its_flags(script, line, elsewhere):
    """Each flag of numbers gets a value of its own, so that two that were swapped differ."""
    numbers = {"--seed": 7, "--mixup": 0.3, "--cutmix": 0.4, "--drop": 0.21, "--drop-path": 0.22, "--input-size": 64}
    for prefix in ("--", "--block-ft-" if script is main else "--ft-"):
        for name in ("epochs", "batch-size", "lr", "warmup-epochs", "warmup-lr", "min-lr", "momentum", "weight-decay"):
            numbers[prefix + name] = len(numbers) + 10
        numbers[prefix + "accum-steps"] = len(numbers) + 10
    argv = [*line.split(), *(str(word) for pair in numbers.items() for word in pair)]
    args = script.parse(argv) if script is main else script.build_parser().parse_args(argv)
    seen = {}
    for name, value in leaves(script.configure(args)):
        name = name.replace("block_ft_unscale", "unscale").replace("ft_unscale", "unscale")
        if name.rpartition("ft_")[2] not in elsewhere:
            assert value == getattr(args, name), name
            seen[name] = value
    assert set(numbers) <= {"--" + name.replace("_", "-") for name in seen}


def test_below_the_scripts_nobody_takes_a_namespace():
    below = [p for folder in ("engine", "models", "datasets", "deploy", "plots") for p in (ROOT / folder).rglob("*.py")]
    assert below and not [p for p in below if "argparse" in p.read_text() or "Namespace" in p.read_text()]


def test_a_rate_is_scaled_by_the_images_of_an_update_over_all_processes():
    asked, world = Optim(3, random.randrange(1, 99), 0.25, 1, 0.125, 0.0625, accum_steps=random.randrange(1, 9)), 4
    scaled = Rates(asked, "--opt", False).optim(Context(world=world))
    factor = asked.batch_size * asked.accum_steps * world / 512
    assert [scaled.lr, scaled.warmup_lr, scaled.min_lr] == [0.25 * factor, 0.125 * factor, 0.0625 * factor]
    assert Rates(asked, "--opt", True).optim(Context(world=world)) == asked


def test_two_names_of_one_model_must_agree():
    for base, scale in ((None, "Tiny"), ("DeiT-Tiny", None), ("DeiT-Tiny", "Tiny"), (None, None)):
        assert ModelName(base, scale).name == "DeiT-Tiny"
    assert ModelName().explicit is None and ModelName("DeiT-Base").explicit == "DeiT-Base"
    args = visualization.build_parser().parse_args(["--scale", "Tiny", "--base-model", "DeiT-Base"])
    with pytest.raises(FarError, match="--scale Tiny: means DeiT-Tiny, but --base-model is DeiT-Base"):
        pick(PictureConfig, args)


def test_pictures_of_ones_own_images_need_no_data_set():
    for flag in ("--dataset DIGITS", "--data-path d"):
        args = visualization.build_parser().parse_args(["--images", "x.png", *flag.split()])
        with pytest.raises(FarError, match="--images x.png"):
            pick(PictureConfig, args)
    assert pick(PictureConfig, visualization.build_parser().parse_args(["--images", "x.png"])).images == Path("x.png")
