"""How flags are declared, parsed and made into configurations, and the types that they convert to."""

import argparse
import dataclasses
import math
import sys
from collections.abc import Collection
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from utils import names
from utils.errors import one_line, tell
from utils.files import expanded


class Help(argparse.ArgumentDefaultsHelpFormatter):
    """Shows defaults, as a user would type them, where there is one and the text does not name it by itself."""

    def _get_help_string(self, action: argparse.Action) -> str:
        text, default = action.help or "", action.default
        if default is None or default is False or default == argparse.SUPPRESS or "default" in text:
            return text
        values = default if isinstance(default, list | tuple) else [default]
        return f"{text} (default: {' '.join(map(str, values))})" if action.option_strings else text


class Parser(argparse.ArgumentParser):
    """Errors are one line; help shows defaults."""

    def __init__(self, **kwargs):
        super().__init__(formatter_class=Help, allow_abbrev=False, **kwargs)

    def error(self, message: str):
        tell(f"error: {one_line(message)}; see --help")
        self.exit(2)

    def group(self, title: str) -> argparse._ArgumentGroup:
        """The group of this title, made where there is none."""
        known = (group for group in self._action_groups if group.title == title)
        return next(known, None) or self.add_argument_group(title)

    def add_flags(
        self,
        *configs: type,
        prefix: str = "",
        title: str = "",
        without: Collection[str] = (),
        defaults: dict[str, Any] | None = None,
    ) -> None:
        """Adds the flags that configurations declare, each to its group.

        Args:
            prefix: what their names begin with, `block-ft-`.
            title: the group of all of them, in place of those declared.
            without: groups to leave out.
            defaults: in place of those declared, by field.
        """
        for field in (field for config in configs for field in dataclasses.fields(config)):
            if not field.metadata or field.metadata["group"] in without:
                continue
            options = dict(field.metadata)
            group = options.pop("group")
            words = [f"--{prefix}{field.name.replace('_', '-')}", *options.pop("aliases", ())]
            options["default"] = (defaults or {}).get(field.name, field.default)
            if field.type is bool and "action" not in options:
                options["action"] = "store_true"
            self.group(title or group).add_argument(*words, **options)

    def named(self, argv: list[str] | None) -> dict[str, str]:
        """The flags that a command line names, by destination."""
        words = {word.partition("=")[0] for word in (sys.argv[1:] if argv is None else argv)}
        return {action.dest: flag for action in self._actions for flag in action.option_strings if flag in words}

    def titled(self, titles: Collection[str]) -> set[str]:
        """The destinations of the flags in groups of these titles."""
        groups = [group for group in self._action_groups if group.title in titles]
        return {action.dest for group in groups for action in group._group_actions}

    def refuse(self, argv: list[str] | None, dests: Collection[str], reason: str) -> None:
        """Ends with one line where a command line names a flag of `dests`: a flag that is accepted does something."""
        for dest, flag in self.named(argv).items():
            if dest in dests:
                self.error(f"{flag}: {reason}; leave it out")


def flag(help: str, default: Any = None, *, group: str = "", **options) -> Any:
    """A configuration's field that is the flag of its name, with dashes.

    Args:
        group: the title that --help shows it under.
        options: of argparse's add_argument; `aliases` are further names. A bool with no action is a switch.
    """
    return dataclasses.field(default=default, metadata={"help": help, "group": group, **options})


Config = TypeVar("Config")


def pick(config: type[Config], args: argparse.Namespace, prefix: str = "", **values) -> Config:
    """A configuration (a dataclass) from parsed flags.

    Each field is one of `values`, or a configuration itself, or the flag of its name behind `prefix`; a script that has
    no such flag leaves the field its default.
    """
    flags = vars(args)
    for field in dataclasses.fields(config):
        if field.name not in values and dataclasses.is_dataclass(field.type):
            values[field.name] = pick(field.type, args)
        elif field.name not in values and prefix + field.name in flags:
            values[field.name] = flags[prefix + field.name]
    return config(**values)


def number(kind: type, low: float, high: float = float("inf"), open_low: bool = False):
    """A converter for finite numbers in [low, high], or (low, high] with `open_low`."""

    def convert(text: str):
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a {'whole ' if kind is int else ''}number") from None
        if not (low < value if open_low else low <= value) or not value <= high or value == math.inf:
            edge = "above" if open_low else "at least"
            most = f" and at most {high:.10g}" if high < math.inf else ""
            raise argparse.ArgumentTypeError(f"{text:.40} must be a finite number {edge} {low:g}{most}")
        return value

    return convert


COUNT, SIZE, SEED, EPOCHS = number(int, 0), number(int, 1), number(int, 0, 2**31 - 1), number(int, 0, 9999)
RATE, SHARE, PART = number(float, 0), number(float, 0, 1), number(float, 0, 1, open_low=True)
PERCENT = number(float, 0, 100, open_low=True)
SECONDS, MINUTES = number(float, 0, 86400, open_low=True), number(float, 0, 10080, open_low=True)
OnOff = argparse.BooleanOptionalAction


def path(text: str) -> Path:
    """`~` is the home folder here, too: a shell leaves that of --flag=~/x as it is."""
    if not text.strip():
        raise argparse.ArgumentTypeError("is empty; name a file or folder")
    file = expanded(text)
    try:
        file.stat()
    except (FileNotFoundError, NotADirectoryError):
        pass  # told where it is known what should be there
    except OSError as error:
        raise argparse.ArgumentTypeError(f"{text:.80}: {error.strerror}; name another file or folder") from None
    return file


def table(text: str) -> Path:
    file = path(text)
    if file.suffix.lower() not in names.TABLES:
        raise argparse.ArgumentTypeError(f"{text:.80}: its name must end in {' or '.join(names.TABLES)}")
    return file


def optional_rate(text: str) -> float | None:
    return None if text == "none" else number(float, 0, open_low=True)(text)


class Latency(NamedTuple):
    """A time: milliseconds, or percent of the teacher's."""

    amount: float
    percent: bool

    def __str__(self) -> str:
        return f"{self.amount:g}{'%' * self.percent}"


def latency(text: str) -> Latency:
    return Latency(number(float, 0, open_low=True)(text.removesuffix("%")), text.endswith("%"))


def loss(text: str) -> str:
    """A loss by name, or a sum of terms."""
    try:
        if text not in names.LOSSES:
            names.loss_terms(text)
    except ValueError:
        known, terms = ", ".join(names.LOSSES), ", ".join(names.TERMS)
        raise argparse.ArgumentTypeError(
            f"{text:.80} is none of {known}, nor a sum like similarity+0.5*kl of {terms}"
        ) from None
    return text


def dataset(text: str) -> str:
    """A data set by name, or one that timm's readers stream."""
    if text.startswith(("hfds/", "hfids/")):
        raise argparse.ArgumentTypeError(
            f"{text:.80}: HuggingFace's package datasets cannot be imported beside FAR's own folder of that name; save "
            "it as class folders and take FOLDER, or as WebDataset tars and take wds/NAME"
        )
    if text not in names.DATASETS and not names.is_stream(text):
        streams = " or ".join(f"{kind}/NAME" for kind in names.STREAMS)
        raise argparse.ArgumentTypeError(f"{text:.80} is none of {', '.join(names.DATASETS)}, nor {streams}")
    return text


def ratios(text: str) -> list[float]:
    values = [PART(word) for word in text.split(",")]
    if len(set(values)) < len(values):
        raise argparse.ArgumentTypeError(f"{text}: names a ratio twice; each has a folder of its own")
    return values
