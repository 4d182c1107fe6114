"""Classes by name: the numbers under which one side, a model or a split, knows the classes of another."""

import unicodedata
from collections.abc import Sequence
from functools import partial

import torch
from timm.data import ImageNetInfo
from torch import nn
from torch.utils.data import Dataset

from utils.distributed import say
from utils.errors import FarError


def imagenet_names() -> tuple[str, ...]:
    """ImageNet's thousand classes in words, in timm's order, which is that of its class folders."""
    return tuple(ImageNetInfo().label_descriptions())


class UnknownClass(LookupError):
    """A class that a model does not know; the message is its name."""


def match_classes(known: Sequence[str], names: Sequence[str]) -> list[int]:
    """The number in `known` of each of `names`. Raises UnknownClass at the first that is not there, or there twice.

    Accented letters are the same however they are composed: archives of a Mac hold them in parts. A model that knows
    ImageNet's classes in words knows its folders' names, too.
    """
    if list(names) == list(known):
        return list(range(len(known)))  # ImageNet in words has two cranes
    composed = partial(unicodedata.normalize, "NFC")
    folders = ImageNetInfo().label_names() if tuple(known) == imagenet_names() else []
    numbers: dict[str, int | None] = {}
    for listing in (known, folders):
        for number, name in enumerate(map(composed, listing)):
            numbers[name] = None if name in numbers else number
    indices = [numbers.get(composed(name)) for name in names]
    if None in indices:
        raise UnknownClass(names[indices.index(None)])
    return indices


class Relabelled(Dataset):
    """A split with other numbers for its classes: labels[k] for k."""

    def __init__(self, data: Dataset, labels: Sequence[int]):
        self.data, self.labels = data, labels

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index):
        image, label = self.data[index]
        return image, self.labels[label]


def check_classes(source: str, config, data, mend: str) -> None:
    """Makes a data set's labels a model's: by name where both know their classes, else by number.

    A data set may have images of some of the classes only.

    Args:
        source: the flag and the file of the model, which messages begin with.
        config: of the model, with num_classes and classes.
        data: a `datasets.loading.Data`.
        mend: what the user can do.

    Raises:
        FarError: the data set has other classes than the model.
    """
    dataset, known = data.config.dataset, config.num_classes
    if config.classes and data.names and data.config.nb_classes in (None, known):
        count = data.num_classes
        try:
            data.relabel(config.classes)
        except UnknownClass as error:
            how = "and twice" if config.classes.count(str(error)) > 1 else "but not"
            other = f"{how} {str(error)!r}, one of the {count} that --dataset {dataset} has"
            raise FarError(f"{source}: knows {known} classes, {other}; {mend}") from error
        if len(data.names) < known:
            say(data.context, f"--dataset {dataset}: has {len(data.names)} of the {known} classes that {source} knows")
    elif data.num_classes not in (None, known):
        raise FarError(f"{source}: knows {known} classes, --dataset {dataset} has {data.num_classes}; {mend}")


def keeps_classifier(source: str, config, data) -> bool:
    """True if a model's classes are the data set's, whose labels are then matched by name; else says why not.

    A data set with another number of classes, or as many of other names, needs a fresh classifier. Arguments as in
    `check_classes`.
    """
    try:
        if config.num_classes == data.num_classes:
            if config.classes and data.names:
                data.relabel(config.classes)
            return True
    except UnknownClass:
        pass
    others = f"the {data.num_classes} of --dataset {data.config.dataset}"
    say(data.context, f"{source}: its {config.num_classes} classes are not {others}; a fresh classifier is trained")
    return False


@torch.no_grad()
def order_classes(model: nn.Module, known: Sequence[str], wanted: Sequence[str], source: str) -> None:
    """Reorders the classifiers of a timm model from the classes `known` to `wanted`; no-op where either is empty.

    Raises FarError naming the first class that the model does not know.
    """
    if not (known and wanted) or known == wanted:
        return
    try:
        numbers = match_classes(known, wanted)
    except UnknownClass as error:
        where = f"{source}: does not know the class {str(error)!r} of the other weights or the data"
        raise FarError(f"{where}; give weights of the same classes") from error
    heads = model.get_classifier()  # of a distilled DeiT a tuple of two
    for head in heads if isinstance(heads, tuple) else (heads,):
        head.weight.copy_(head.weight[numbers])
        head.bias.copy_(head.bias[numbers])
