"""Flags become typed configurations once, and a flag's default is its field's."""

from dataclasses import fields, is_dataclass

import pytest
from torch import nn

import main
import prune
from engine.train import make_optimizer
from utils.arguments import pick
from utils.configs import Command, DataConfig, ModelConfig, Optim, Plan, Prediction, RunConfig, Settings
from utils.errors import FarError

# rep_by and rep_init: in prune.py, which has no such flags.
NOT_FLAGS = {"aside", "mode", "record", "published", "family", "rep_by", "rep_init"}


@pytest.mark.parametrize("config", [ModelConfig, DataConfig, Settings, Optim, Plan, Prediction])
def test_without_flags_a_configuration_is_the_default_one(config):
    assert pick(config, main.build_parser().parse_args([])) == config()
    if config is not Plan and config is not Prediction:
        assert pick(config, prune.build_parser().parse_args([])) == config()


def leaves(config, prefix: str = ""):
    """(flag's destination, value) of every field, down to the last."""
    for field in fields(config):
        value = getattr(config, field.name)
        if is_dataclass(value):
            yield from leaves(value, {"block_ft_optim": "block_ft_", "ft_optim": "ft_"}.get(field.name, ""))
        elif field.name not in NOT_FLAGS:
            yield prefix + field.name, value


@pytest.mark.parametrize(
    ("script", "line"), [(main, "--mode train --finetune-head"), (prune, "--sweep 0.5,0.2 --base-weight t.pth")]
)
def test_every_value_a_command_holds_is_its_flags(script, line):
    """Each flag of numbers gets a value of its own, so that two that were swapped differ."""
    numbers = {"--seed": 7, "--mixup": 0.3, "--cutmix": 0.4, "--drop": 0.21, "--drop-path": 0.22, "--input-size": 64}
    for prefix in ("--", "--block-ft-" if script is main else "--ft-"):
        for name in "epochs batch-size lr warmup-epochs warmup-lr min-lr momentum weight-decay accum-steps".split():
            numbers[prefix + name] = len(numbers) + 10
    args = script.build_parser().parse_args([*line.split(), *(str(word) for pair in numbers.items() for word in pair)])
    values = dict(leaves(script.configure(args)))
    assert values == {name: getattr(args, name) for name in values}
    assert set(numbers) <= {"--" + name.replace("_", "-") for name in values}


def command(unscale_lr: bool = False) -> Command:
    parts = {"run": RunConfig("train"), "model": ModelConfig(), "data": DataConfig(), "settings": Settings()}
    return Command(**parts, optim=Optim(), unscale_lr=unscale_lr)


def test_a_rate_is_scaled_by_the_images_of_an_update_over_all_processes():
    optim = Optim(3, batch_size=64, lr=0.25, warmup_lr=0.125, min_lr=0.0625, accum_steps=3)
    scaled = command().scaled(optim, world=4)  # 64 images times 4 processes times 3 batches, over 512
    assert [scaled.lr, scaled.warmup_lr, scaled.min_lr] == [0.25 * 1.5, 0.125 * 1.5, 0.0625 * 1.5]
    assert command(unscale_lr=True).scaled(optim, world=4) == optim


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"opt": "bnbadam"}, "--block-ft-opt bnbadam: timm cannot make this optimiser here"),
        ({"decay_rate": 0.5}, "--block-ft-decay-rate: schedule cosine has none"),
    ],
)
def test_an_optimiser_that_cannot_serve_is_refused_by_its_flag(options, line):
    with pytest.raises(FarError, match=line):
        make_optimizer(nn.Linear(2, 2), command().scaled(Optim(family="block-ft-", **options), world=1), updates=1)
