"""What visualization.py does: find the models and images, measure, draw, save."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from datasets.images import find_files, read_image
from datasets.loading import Data, DataConfig, preprocessing
from datasets.registry import SOURCES, photographs
from engine.configs import ModelName
from engine.distill import forward_features
from engine.explain import (
    attention_inputs,
    attention_rollout,
    attention_weights,
    influence,
    mean_rank_correlation,
    rank_correlation,
    token_importance,
    token_similarity,
)
from models import kernels
from models.deit import TEACHERS, create_teacher, load_teacher_weights, teacher_state
from models.replace import load_model, replaced_blocks, replacements, set_backend
from utils import checkpoint
from utils.checkpoint import write_atomic
from utils.distributed import Context, pick_device
from utils.errors import FarError
from utils.figures import save_figure
from utils.files import check_writable
from utils.map_figures import importance_maps, matrix_rows

EXACT_UP_TO = 5000  # N * D up to which the influence matrix is exact; larger ones take Gaussian probes
PROBES = 16


def newest_demo(root: Path = Path("runs")) -> Path:
    """The folder of the newest finished demo run. Raises FarError where there is none."""
    done = [path.parent for path in root.glob("*/summary.json") if (path.parent / "far/best.pth").exists()]
    if not done:
        raise FarError(
            f"no demo run found in {root}/: make one with `make demo`, or name models with "
            "--base-weight and --far-weight"
        )
    return max(done, key=lambda path: (path / "summary.json").stat().st_mtime)


FLAGS = {"teacher": "--base-weight", "FAR": "--far-weight", "pruned FAR": "--pruned-weight"}


@dataclass(frozen=True)
class PictureConfig(ModelName):
    """What visualization.py asks for. Raises FarError where it contradicts itself."""

    base_weight: Path | None = None
    far_weight: Path | None = None
    pruned_weight: Path | None = None
    lstm_backend: str = "auto"
    device: str = "auto"
    images: Path | None = None
    dataset: str | None = None
    data_path: Path | None = None
    count: int = 4
    block: int | None = None
    format: str = "png"
    output_dir: Path | None = None
    seed: int = 42

    def __post_init__(self):
        super().__post_init__()
        if self.images and (self.dataset or self.data_path):
            raise FarError(f"--images {self.images}: names the images by itself; leave --dataset and --data-path out")


def find_models(asked: PictureConfig) -> tuple[dict[str, VisionTransformer], Path]:
    """{name: model} in the order teacher, FAR, pruned FAR, and the folder the figures go to."""
    named = dict(zip(FLAGS, (asked.base_weight, asked.far_weight, asked.pruned_weight), strict=True))
    named = {name: path for name, path in named.items() if path}
    if named:
        folder = list(named.values())[-1].parent / "figures"
    else:
        demo = newest_demo()
        found = {name: demo / part / "best.pth" for name, part in zip(FLAGS, ("teacher", "far", "prune"), strict=True)}
        named, folder = {name: path for name, path in found.items() if path.exists()}, demo / "figures"
    check_writable(asked.output_dir or folder)
    models = {name: _load(asked, path, FLAGS[name], name == "teacher") for name, path in named.items()}
    _check(models)
    return models, asked.output_dir or folder


def _load(asked: PictureConfig, path: Path, flag: str, teacher: bool) -> VisionTransformer:
    content = checkpoint.load(path, flag)
    if not teacher or "config" in content:
        model, _ = load_model(path, flag)
    else:
        head = teacher_state(content, f"{flag} {path}").get("head.weight")
        classes = 1000 if head is None or not head.dim() else len(head)
        model = create_teacher(asked.name, classes, TEACHERS[asked.name].input_size)
        load_teacher_weights(model, path, flag)
    if teacher and replaced_blocks(model):
        raise FarError(f"{flag} {path}: is a FAR model, not a teacher; give it as --far-weight")
    if not teacher and not replaced_blocks(model):
        raise FarError(f"{flag} {path}: is a teacher, not a FAR model; give it as --base-weight")
    set_backend(model, asked.lstm_backend)
    return model.eval()


def _check(models: dict[str, VisionTransformer]) -> None:
    def shape(model: VisionTransformer) -> dict[str, int]:
        return {"tokens": model.pos_embed.shape[1], "blocks": len(model.blocks), "classes": model.num_classes}

    first = next(iter(models))
    expected = shape(models[first])
    for name, model in models.items():
        for what, ours in shape(model).items():
            if ours != expected[what]:
                raise FarError(
                    f"{FLAGS[name]}: has {ours} {what}, {FLAGS[first]} has {expected[what]}; name models of one kind"
                )


def choose_blocks(models: dict[str, VisionTransformer], block: int | None) -> list[int]:
    """--block, else every block that is replaced in one of the models, else all."""
    depth = len(next(iter(models.values())).blocks)
    if block is None:
        return sorted({i for model in models.values() for i in replaced_blocks(model)}) or list(range(depth))
    if block >= depth:
        raise FarError(f"--block {block}: blocks run from 0 to {depth - 1} in this model")
    return [block]


def find_images(asked: PictureConfig, size: int) -> tuple[Tensor, np.ndarray]:
    """Images as the models read them (B, 3, S, S), and as a person sees them (B, S, S, 3) in 0..1."""
    small = size <= 32
    name = asked.dataset or ("DIGITS" if small else "PHOTOS")
    config = DataConfig(name, asked.data_path, size)
    if asked.images:
        files, source = find_files(asked.images), SOURCES["DIGITS" if small else "IMNET"]
        total, read = len(files), lambda i: read_image(str(files[i]))
    elif name == "PHOTOS":
        photos, source = list(photographs().values()), SOURCES["IMNET"]
        total, read = len(photos), photos.__getitem__
    else:
        data, source = Data(config, Context()).val.data, SOURCES[name]
        total, read = len(data), lambda i: data[i][0]
    chosen = np.linspace(0, total - 1, min(asked.count, total)).round().astype(int).tolist()
    transform = preprocessing(config, source).transform(size)
    images = torch.stack([transform(read(i)) for i in chosen])
    mean, std = (torch.tensor(v)[:, None, None] for v in (source.mean, source.std))
    return images, (images * std + mean).clamp(0, 1).permute(0, 2, 3, 1).numpy()


def visualize(asked: PictureConfig) -> Path:
    """Both families of figures; returns the folder they are in."""
    device = pick_device(asked.device)
    kernels.check(asked.lstm_backend, device)
    models, folder = find_models(asked)
    for model in models.values():
        for attn in replacements(model).values():
            attn.check_backend(asked.lstm_backend, device)
    images, seen = find_images(asked, next(iter(models.values())).patch_embed.img_size[0])
    blocks = choose_blocks(models, asked.block)
    for model in models.values():
        model.to(device).requires_grad_(False)
    folder.mkdir(parents=True, exist_ok=True)
    draw = Pictures(models, images.to(device), seen, blocks, folder, asked.format, asked.seed)
    draw.importance()
    draw.similarity()
    draw.influence()
    return folder


@dataclass
class Pictures:
    """The figures of one call: each method measures, prints what it found, and saves a figure and its arrays."""

    models: dict[str, VisionTransformer]
    images: Tensor  # (B, 3, S, S), as the models read them
    seen: np.ndarray  # (B, S, S, 3), 0 to 1
    blocks: list[int]
    folder: Path
    form: str  # png, pdf or svg
    seed: int

    def __post_init__(self):
        self.first = next(iter(self.models))
        self.attends = {n for n, m in self.models.items() if self.blocks[0] not in replaced_blocks(m)}

    def _save(self, figure, name: str, arrays: dict[str, np.ndarray]) -> None:
        save_figure(figure, self.folder / f"{name}.{self.form}")
        write_atomic(self.folder / f"{name}.npz", lambda f: np.savez_compressed(f, **arrays))
        print(f"  {self.folder / name}.{self.form}, {name}.npz")

    def _patches(self, tokens: Tensor) -> np.ndarray:
        """(N,) to the patches' grid, class token left out."""
        model = self.models[self.first]
        return tokens[model.num_prefix_tokens :].reshape(model.patch_embed.grid_size).cpu().numpy()

    def importance(self) -> None:
        """Token importance of every model, image by image, and the teacher's attention rollout."""
        maps, classes = {}, {}
        for name, model in self.models.items():
            maps[name], classes[name] = token_importance(model, self.images, self.blocks)
        rollout = attention_rollout(self.models["teacher"], self.images) if "teacher" in self.attends else None
        others = [name for name in self.models if name != self.first]
        for name in others:
            for i in self.blocks:
                value = mean_rank_correlation([m[1:] for m in maps[self.first][i]], [m[1:] for m in maps[name][i]])
                print(
                    f"importance, block {i}: rank correlation of {name} with {self.first} "
                    f"{value:.3f} (mean of {len(self.images)} images)"
                )
        for k, image in enumerate(self.seen):
            shown = {name: {i: self._patches(maps[name][i][k]) for i in self.blocks} for name in self.models}
            rho = {
                name: {i: rank_correlation(maps[name][i][k][1:], maps[self.first][i][k][1:]) for i in self.blocks}
                for name in others
            }
            titles = {name: f"{name}: class {classes[name][k]}" for name in self.models}
            patches = self._patches(rollout[k]) if rollout is not None else None
            arrays = {f"{name} block {i}": values for name, by in shown.items() for i, values in by.items()}
            arrays |= {"image": image} | ({"rollout": patches} if rollout is not None else {})
            self._save(importance_maps(image, shown, titles, rho, patches), f"importance-{k}", arrays)

    def similarity(self) -> None:
        """Token-to-token cosine of z, mean over the images: first model, each other one, and their difference."""
        with torch.no_grad():
            z = {name: forward_features(model, self.images, self.blocks).z for name, model in self.models.items()}
        similar = {name: {i: token_similarity(z[name][i]).mean(0).cpu() for i in self.blocks} for name in self.models}
        columns, notes = {}, {}
        for name, matrices in similar.items():
            columns[name] = {i: m.numpy() for i, m in matrices.items()}
            if name != self.first:
                base = similar[self.first]
                columns[f"{name} − {self.first}"] = {i: (m - base[i]).numpy() for i, m in matrices.items()}
                notes[name] = {i: f", ρ {rank_correlation(m, base[i]):.2f}" for i, m in matrices.items()}
        figure = matrix_rows(columns, dict.fromkeys(columns, True), notes, ("token", "token"), share_scale=True)
        self._save(
            figure, "similarity-of-tokens", {f"{n} block {i}": m for n, by in columns.items() for i, m in by.items()}
        )

    def influence(self) -> None:
        """||d z_i / d x_j|| of every model on the first image, beside attention's own weights (mean over heads)."""
        columns, generator = {}, torch.Generator().manual_seed(self.seed)
        for name, model in self.models.items():
            inputs = attention_inputs(model, self.images[:1], self.blocks)
            if name in self.attends:
                with torch.no_grad():
                    weights = {
                        i: attention_weights(model.blocks[i].attn, x).mean((0, 1)).cpu().numpy()
                        for i, x in inputs.items()
                    }
                columns["attention weights"] = weights
            n, dim = inputs[self.blocks[0]].shape[1:]
            probes = None if n * dim <= EXACT_UP_TO else PROBES
            columns[f"{name} ‖∂z/∂x‖"] = {
                i: influence(model.blocks[i].attn, x[0], probes, generator).cpu().numpy() for i, x in inputs.items()
            }
        notes, base = {}, next(iter(columns))
        for name in list(columns)[1:]:
            notes[name] = {
                i: f", ρ {rank_correlation(torch.from_numpy(m), torch.from_numpy(columns[base][i])):.2f}"
                for i, m in columns[name].items()
            }
        figure = matrix_rows(
            columns, dict.fromkeys(columns, False), notes, ("input token j", "output token i"), share_scale=False
        )
        self._save(figure, "influence", {f"{n} block {i}": m for n, by in columns.items() for i, m in by.items()})
