"""What visualization.py does: find the models and images, measure, draw, save."""

from argparse import Namespace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from datasets.loading import Data, DataConfig, eval_transform
from datasets.registry import SOURCES, photographs, read_image
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
from models.replace import load_model, replaced_blocks, set_backend
from utils import arguments, checkpoint
from utils.checkpoint import write_atomic
from utils.distributed import Context, pick_device
from utils.errors import FarError
from utils.figures import save_figure
from utils.files import check_writable
from utils.map_figures import importance_maps, matrix_rows

IMAGES = {".png", ".jpg", ".jpeg", ".bmp", ".webp", ".gif", ".tif", ".tiff"}
EXACT_UP_TO = 5000  # N * D up to which the influence matrix is exact; larger ones take Gaussian probes
PROBES = 16


def newest_demo(root: Path = Path("runs")) -> Path:
    """The folder of the newest finished demo run. Raises FarError where there is none."""
    done = [path.parent for path in root.glob("*/summary.json") if (path.parent / "far/best.pth").exists()]
    if not done:
        raise FarError(
            f"no demo run found in {root}/: make one with `make demo`, or name models with "
            f"--base-weight and --far-weight"
        )
    return max(done, key=lambda path: (path / "summary.json").stat().st_mtime)


def find_models(args: Namespace) -> tuple[dict, Path]:
    """{name: model} in the order teacher, FAR, pruned FAR, and the folder the figures go to."""
    named = {"teacher": args.base_weight, "FAR": args.far_weight, "pruned FAR": args.pruned_weight}
    if not any(named.values()):
        demo = newest_demo()
        found = {
            "teacher": demo / "teacher/best.pth",
            "FAR": demo / "far/best.pth",
            "pruned FAR": demo / "prune/best.pth",
        }
        named, folder = {name: path for name, path in found.items() if path.exists()}, demo / "figures"
    else:
        folder = [path for path in named.values() if path][-1].parent / "figures"
    check_writable(args.output_dir or folder)
    flags = {"teacher": "--base-weight", "FAR": "--far-weight", "pruned FAR": "--pruned-weight"}
    models = {name: _load(args, path, flags[name], name == "teacher") for name, path in named.items() if path}
    _check(models, flags)
    return models, args.output_dir or folder


def _load(args: Namespace, path: Path, flag: str, teacher: bool):
    content = checkpoint.load(path, flag)
    if not teacher or "config" in content:
        model, _ = load_model(path, flag)
    else:
        name = arguments.choose_model(args)
        head = teacher_state(content, f"{flag} {path}").get("head.weight")
        classes = 1000 if head is None or not head.dim() else len(head)
        model = create_teacher(name, classes, TEACHERS[name].input_size)
        load_teacher_weights(model, path, flag)
    if teacher and replaced_blocks(model):
        raise FarError(f"{flag} {path}: is a FAR model, not a teacher; give it as --far-weight")
    if not teacher and not replaced_blocks(model):
        raise FarError(f"{flag} {path}: is a teacher, not a FAR model; give it as --base-weight")
    set_backend(model, args.lstm_backend)
    return model.eval()


def _check(models: dict, flags: dict[str, str]) -> None:
    first = next(iter(models))
    shapes = (
        ("tokens", lambda m: m.pos_embed.shape[1]),
        ("blocks", lambda m: len(m.blocks)),
        ("classes", lambda m: m.num_classes),
    )
    for name, model in models.items():
        for what, get in shapes:
            ours, theirs = get(model), get(models[first])
            if ours != theirs:
                raise FarError(
                    f"{flags[name]}: has {ours} {what}, {flags[first]} has {theirs}; name models of one kind"
                )


def find_images(args: Namespace, size: int) -> tuple[Tensor, np.ndarray, list[str]]:
    """Images as the models read them (B, 3, S, S), as a person sees them (B, S, S, 3) in 0..1, and their names."""
    name = args.dataset or ("DIGITS" if size <= 32 else "PHOTOS")
    if args.images:
        files = (
            [args.images]
            if args.images.is_file()
            else sorted(p for p in args.images.glob("*") if p.suffix.lower() in IMAGES)
        )
        if not files:
            raise FarError(
                f"--images {args.images}: no such file, or a folder without images ({', '.join(sorted(IMAGES))})"
            )
        source = SOURCES["DIGITS" if size <= 32 else "IMNET"]
        read = {path.name: lambda path=path: read_image(str(path)) for path in files}
        name = "FOLDER"
    elif name == "PHOTOS":
        source, read = SOURCES["IMNET"], {key: lambda image=image: image for key, image in photographs().items()}
    else:
        config = DataConfig(name, args.data_path or Path("data") / name, size)
        data = Data(config, Context()).val.data
        source = SOURCES[name]
        read = {f"{name} {i}": lambda i=i: data[i][0] for i in range(len(data))}
    keys = list(read)
    chosen = [keys[i] for i in np.linspace(0, len(keys) - 1, min(args.count, len(keys))).round().astype(int)]
    transform = eval_transform(DataConfig(name, Path(), size), source)
    images = torch.stack([transform(read[key]()) for key in chosen])
    mean, std = (torch.tensor(v)[:, None, None] for v in (source.mean, source.std))
    return images, (images * std + mean).clamp(0, 1).permute(0, 2, 3, 1).numpy(), chosen


def visualize(args: Namespace) -> Path:
    """Both families of figures; returns the folder they are in."""
    if args.images and (args.dataset or args.data_path):
        raise FarError(f"--images {args.images}: names the images by itself; leave --dataset and --data-path out")
    device = pick_device(args.device)
    kernels.check(args.lstm_backend, device)
    models, folder = find_models(args)
    any_model = next(iter(models.values()))
    images, seen, names = find_images(args, any_model.patch_embed.img_size[0])
    blocks = sorted({i for model in models.values() for i in replaced_blocks(model)}) or list(
        range(len(any_model.blocks))
    )
    if args.block is not None:
        if args.block >= len(any_model.blocks):
            raise FarError(f"--block {args.block}: blocks run from 0 to {len(any_model.blocks) - 1} in this model")
        blocks = [args.block]
    for model in models.values():
        model.to(device).requires_grad_(False)
    images = images.to(device)
    folder.mkdir(parents=True, exist_ok=True)
    draw = Pictures(models, images, seen, names, blocks, folder, args.format, args.seed)
    draw.importance()
    draw.similarity()
    draw.influence()
    return folder


class Pictures:
    """The figures of one call: each method measures, prints what it found, and saves a figure and its arrays."""

    def __init__(self, models, images: Tensor, seen: np.ndarray, names, blocks, folder: Path, form: str, seed: int):
        self.models, self.images, self.seen, self.names, self.blocks = models, images, seen, names, blocks
        self.folder, self.form, self.seed = folder, form, seed
        self.first = next(iter(models))
        self.attends = {n: m for n, m in models.items() if blocks[0] not in replaced_blocks(m)}

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
