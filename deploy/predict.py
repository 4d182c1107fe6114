"""A model's likeliest classes for pictures, by name."""

import csv
import io
import logging
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from datasets.images import ImageFiles, find_files
from datasets.loading import Loader, Transformed, naming_dead_workers
from models.replace import FarConfig
from utils.checkpoint import write_atomic, write_json
from utils.configs import Prediction
from utils.distributed import cores
from utils.errors import FarError, one_line
from utils.files import check_writable
from utils.preprocessing import Preprocessing

log = logging.getLogger(__name__)


def find_pictures(config: Prediction) -> list[Path]:
    """The files of --images. Raises FarError where there are none, or --output could not be written."""
    if config.images is None:
        raise FarError("--images: none given; name a picture or a folder of them")
    if config.output is not None:
        if config.output.is_dir() or not config.output.parent.is_dir():
            raise FarError(f"--output {config.output}: no file in a folder that is there; name another")
        check_writable(config.output.parent, "--output")
    return find_files(config.images)


@dataclass(frozen=True)
class Answer:
    """One of the likeliest classes of a file: `rank` counts from 1, `index` is the class's number."""

    file: str
    rank: int
    index: int
    name: str
    probability: float


def preprocessing_of(config: FarConfig) -> Preprocessing:
    """How a checkpoint, or its teacher's weights, say that images are prepared; else ImageNet's, with a warning."""
    if config.expected_preprocessing is None:
        log.warning("the checkpoint does not say how pictures are prepared; taken as ImageNet's")
    return config.expected_preprocessing or Preprocessing()


def picture_loader(files: list[Path], config: FarConfig, batch: int, workers: int) -> DataLoader:
    """Batches (B, 3, S, S) of the files, in their order, and labels that mean nothing."""
    images = Transformed(ImageFiles(files[0].parent, files), preprocessing_of(config).transform(config.img_size))
    return Loader(images, batch, num_workers=min(workers, cores(), len(files) // batch))


@torch.no_grad()
def predict(model: nn.Module, config: FarConfig, loader: DataLoader, top: int, device, autocast) -> Iterator[Answer]:
    """The likeliest `top` classes of every file, in order. Raises FarError on a file that is no picture."""
    files = iter(loader.dataset.data.files)
    with naming_dead_workers(loader.num_workers):
        for images, _ in tqdm(loader, unit="batch", leave=False, disable=None):
            with autocast():
                logits = model(images.to(device))
            likeliest = logits.float().softmax(1).topk(min(top, config.num_classes), dim=1)
            for values, classes, file in zip(*map(Tensor.tolist, likeliest), files, strict=False):
                for rank, (probability, index) in enumerate(zip(values, classes, strict=True), 1):
                    name = config.classes[index] if config.classes else f"class {index}"
                    yield Answer(str(file), rank, index, name, probability)


def as_text(answers: list[Answer]) -> str:
    """Each file and under it its classes; control characters and undecodable bytes in names are escaped."""
    lines = []
    for answer in answers:
        lines += [one_line(answer.file)] * (answer.rank == 1)
        lines += [f"  {100 * answer.probability:6.2f} %  {one_line(answer.name)}"]
    return "\n".join(lines)


def write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    table = io.StringIO()
    writer = csv.DictWriter(table, rows[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_atomic(path, lambda file: file.write(table.getvalue().encode(errors="surrogateescape")))


TABLES = {".csv": write_csv, ".json": write_json}


def write(answers: list[Answer], path: Path) -> None:
    """As the suffix says."""
    TABLES[path.suffix.lower()](path, [asdict(answer) for answer in answers])
