"""Classes by name: the numbers under which one side, a model or a split, knows the classes of another."""

import unicodedata
from collections.abc import Sequence

from timm.data import ImageNetInfo
from torch.utils.data import Dataset


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
    folders = ImageNetInfo().label_names() if tuple(known) == imagenet_names() else []
    numbers: dict[str, int | None] = {}
    for listing in (known, folders):
        for number, name in enumerate(map(_composed, listing)):
            numbers[name] = None if name in numbers else number
    found = [numbers.get(_composed(name)) for name in names]
    if None in found:
        raise UnknownClass(names[found.index(None)])
    return found


def _composed(name: str) -> str:
    return unicodedata.normalize("NFC", name)


class Relabelled(Dataset):
    """A split with other numbers for its classes: labels[k] for k."""

    def __init__(self, data: Dataset, labels: Sequence[int]):
        self.data, self.labels = data, labels

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index):
        image, label = self.data[index]
        return image, self.labels[label]
