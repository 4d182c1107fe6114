"""What visualization.py does: finds the models and images, measures, draws, saves."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

import numpy as np
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor
from tqdm import tqdm

from datasets.classes import UnknownClass, match_classes, order_classes
from datasets.images import find_files, read_image
from datasets.loading import Data, preprocessing
from datasets.registry import SOURCES, photographs
from models import kernels
from models.features import attention_inputs, attention_weights, forward_features
from models.replace import FarConfig, count_parameters, replacements, set_backend
from models.weights import load_any
from plots.explain import influence, integrated_gradients, rank_correlation, token_similarity
from plots.figures import save_figure
from plots.map_figures import Row, importance_maps, signed, token_matrices
from plots.page import Section, write_page
from utils.checkpoint import write_atomic
from utils.configs import DataConfig, PictureConfig
from utils.distributed import Context, pick_device
from utils.errors import FarError, one_line
from utils.files import check_writable

log = logging.getLogger(__name__)
EXACT_UP_TO = 5000  # N * D up to which the influence matrix is exact; of larger ones tokens and directions are sampled
TOKENS, PROBES, SAMPLED_AT = 64, 8, 197 * 192**2  # so many at N * D^2 of DeiT-Tiny, fewer at more
LONGEST_NAME = 28


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


def find_models(args: PictureConfig) -> tuple[dict[str, VisionTransformer], FarConfig, Path]:
    """{name: model} in the order teacher, FAR, pruned FAR; how they read images; the folder the figures go to."""
    files = dict(zip(FLAGS, (args.base_weight, args.far_weight, args.pruned_weight), strict=True))
    files = {name: path for name, path in files.items() if path}
    if files:
        folder = list(files.values())[-1].parent / "figures"
    else:
        demo = newest_demo()
        files = {name: demo / part / "best.pth" for name, part in zip(FLAGS, ("teacher", "far", "prune"), strict=True)}
        files, folder = {name: path for name, path in files.items() if path.exists()}, demo / "figures"
    check_writable(args.output_dir or folder)
    models: dict[str, VisionTransformer] = {}
    configs: dict[str, FarConfig] = {}
    for name, path in files.items():
        models[name], configs[name] = load_any(args, path, FLAGS[name], teacher=name == "teacher")
        if name != "teacher" and not replacements(models[name]):
            raise FarError(f"{FLAGS[name]} {path}: is a teacher, not a FAR model; give it as --base-weight")
        set_backend(models[name], args.lstm_backend)
    first = next(iter(models))
    sizes = {
        name: {"tokens": model.pos_embed.shape[1], "blocks": len(model.blocks), "classes": model.num_classes}
        for name, model in models.items()
    }
    for name, size in sizes.items():
        for what, expected in sizes[first].items():
            if size[what] != expected:
                where = f"{FLAGS[name]}: has {size[what]} {what}, {FLAGS[first]} has {expected}"
                raise FarError(f"{where}; name models of one kind")
    most = max(configs.values(), key=lambda config: (bool(config.classes), config.preprocessing is not None))
    for name, model in models.items():
        order_classes(model, configs[name].classes, most.classes, FLAGS[name])
    return models, most, args.output_dir or folder


def blocks_to_draw(models: dict[str, VisionTransformer], block: int | None) -> list[int]:
    """--block, else every block that is replaced in one of the models, else all."""
    depth = len(next(iter(models.values())).blocks)
    if block is None:
        return sorted({i for model in models.values() for i in replacements(model)}) or list(range(depth))
    if block >= depth:
        raise FarError(f"--block {block}: blocks run from 0 to {depth - 1} in this model")
    return [block]


def short_name(name: str) -> str:
    """The first of a class's names, cut where it is long."""
    name = one_line(name).partition(",")[0]
    return name if len(name) <= LONGEST_NAME else name[: LONGEST_NAME - 1] + "…"


@dataclass(frozen=True)
class Images:
    """read: as models read them (B, 3, S, S). shown: as a person sees them (B, S, S, 3), 0 to 1. names: of each.

    classes: the names of the models' classes, empty where nothing says them.
    """

    read: Tensor
    shown: np.ndarray
    names: Sequence[str]
    classes: tuple[str, ...]


def find_images(args: PictureConfig, config: FarConfig) -> Images:
    """What --images or --dataset name, spread evenly."""
    size, classes = config.img_size, config.classes
    name = args.dataset or ("DIGITS" if size <= 32 else "PHOTOS")
    data_config, source = DataConfig(name, args.data_path, size), SOURCES["DIGITS" if size <= 32 else "IMNET"]
    if args.images:
        files = find_files(args.images)
        total, read = len(files), lambda i: (one_line(files[i].name), read_image(files[i]))
    elif name == "PHOTOS":
        photos = list(photographs().items())
        total, read = len(photos), photos.__getitem__
    else:
        data, source = Data(data_config, Context(), trains=False), SOURCES[name]
        split, labels = data.val.data, data.class_names
        try:
            match_classes(classes or labels, data.names)
        except UnknownClass as error:
            unknown = str(error)
            log.warning("--dataset %s: the models do not know its class %r; labels are as it has them", name, unknown)
        classes = classes or (labels if data.num_classes == config.num_classes else ())

        def read(i: int) -> tuple:
            image, label = split[i]
            named = f", labelled “{short_name(labels[label])}”" if labels else ""
            return f"{name}, evaluation image {i}{named}", image

        total = len(split)
    indices = np.linspace(0, total - 1, min(args.count, total)).round().astype(int).tolist()
    names, pictures = zip(*map(read, indices), strict=True)
    prepared = config.preprocessing or preprocessing(data_config, source, config.expected_preprocessing)
    images = torch.stack(list(map(prepared.transform(size), pictures)))
    mean, std = (torch.tensor(v)[:, None, None] for v in (prepared.mean, prepared.std))
    return Images(images, (images * std + mean).clamp(0, 1).permute(0, 2, 3, 1).numpy(), names, classes)


def sampling(tokens: int, dim: int, seed: int) -> tuple[list[int], int | None, str]:
    """Which output tokens the influence matrix looks at, in how many directions (None: all), and that in words."""
    if tokens * dim <= EXACT_UP_TO:
        return list(range(tokens)), None, "exact"
    part = min(1.0, SAMPLED_AT / (tokens * dim**2)) ** 0.5
    probes, count = max(2, round(PROBES * part)), min(tokens, max(16, round(TOKENS * part)))
    chosen = np.linspace(0, tokens - 1, count).round().astype(int).tolist()
    return chosen, probes, f"sampled: {count} of {tokens} output tokens, {probes} random directions each, seed {seed}"


def visualize(args: PictureConfig) -> tuple[Path, list[Section]]:
    """All figures, and index.html of them in their folder; returns that page and its sections."""
    device = pick_device(args.device)
    kernels.check(args.lstm_backend, device)
    models, config, folder = find_models(args)
    for model in models.values():
        for attn in replacements(model).values():
            attn.check_backend(args.lstm_backend, device)
    images, blocks = find_images(args, config), blocks_to_draw(models, args.block)
    for model in models.values():
        model.to(device).requires_grad_(False)
    folder.mkdir(parents=True, exist_ok=True)
    gallery = Gallery(models, images, blocks, folder, args.format, args.seed, device)
    sections = [gallery.predictions(), gallery.importance(), gallery.similarity(), gallery.influence()]
    write_page(folder / "index.html", "FAR: what the models look at", sections)
    return folder / "index.html", sections


HOW_IMPORTANT = (
    "Purple patches raise the logit of the class that the first model names, orange ones lower it: integrated "
    "gradients from a plain picture in the image's mean colour. The sum of a map, which is the logit's rise, stands "
    "above it. Colours show a patch's share of its map, on one scale for all models, which ends where 99 % of the "
    "values lie."
)


def correlations(panels: dict[int, np.ndarray], first: dict[int, np.ndarray]) -> dict[int, float]:
    """Rank correlation of two quantities' matrices, block by block."""
    return {i: rank_correlation(torch.from_numpy(panels[i]), torch.from_numpy(first[i])) for i in panels}


@dataclass
class Gallery:
    """The figures of one call: each method measures, saves a figure and its arrays, and returns a page's section."""

    models: dict[str, VisionTransformer]
    images: Images
    blocks: list[int]
    folder: Path
    form: str  # png, pdf or svg
    seed: int
    device: torch.device

    def __post_init__(self):
        self.first, *self.others = self.models
        self.read = self.images.read.to(self.device)

    def _save(self, figure, name: str, arrays: dict[str, np.ndarray]) -> Path:
        path = self.folder / f"{name}.{self.form}"
        save_figure(figure, path)
        write_atomic(self.folder / f"{name}.npz", lambda f: np.savez_compressed(f, **arrays))
        print(f"  {path}, {name}.npz", flush=True)
        return path

    def _prediction(self, logits: Tensor) -> str:
        """The likeliest class by name, and how likely."""
        index = logits.argmax().item()
        name = short_name(self.images.classes[index]) if self.images.classes else f"class {index}"
        return f"“{name}” ({logits.softmax(0)[index]:.0%})"

    def predictions(self) -> Section:
        """The models' sizes, and what each predicts for every image."""
        with torch.no_grad():
            said = [[self._prediction(row) for row in model(self.read)] for model in self.models.values()]
        sizes = [f"{count_parameters(model):,}" for model in self.models.values()]
        rows = [["parameters", *sizes], *(list(row) for row in zip(self.images.names, *said, strict=True))]
        return Section("Models and images", "What each model says of each image.", [["", *self.models], *rows])

    def importance(self) -> Section:
        """One map of importance a model and image, of the class that the first model names."""
        with torch.no_grad():
            logits = {name: model(self.read) for name, model in self.models.items()}
        classes, patch, maps = logits[self.first].argmax(1), self.models[self.first].patch_embed.patch_size, {}
        for name, model in tqdm(self.models.items(), desc="importance", unit="model", leave=False):
            maps[name] = F.avg_pool2d(integrated_gradients(model, self.read, classes), patch, divisor_override=1).cpu()
        rho = {name: list(map(rank_correlation, maps[name], maps[self.first])) for name in self.others}
        text = HOW_IMPORTANT + f" ρ: rank correlation with the {self.first}'s map." * bool(self.others)
        figures = []
        for k, (image, called) in enumerate(zip(self.images.shown, self.images.names, strict=True)):
            titled = {}
            for name, patches in maps.items():
                note = f", ρ {signed(rho[name][k])}" if name in rho else ""
                rise = f"logit {signed(patches[k].sum().item(), '+')}{note}"
                titled[f"{name} says {self._prediction(logits[name][k])}\n{rise}"] = self._smooth(patches[k])
            figure = importance_maps(image, called, titled, text, "share of the map (%)")
            arrays = {**{name: patches[k].numpy() for name, patches in maps.items()}, "image": image}
            figures.append((self._save(figure, f"importance-{k}", arrays), called))
        base = f"rank correlation with {self.first}"
        table = [[base, "mean over the images"], *([name, signed(mean(values))] for name, values in rho.items())]
        for name, value in table[1:]:
            print(
                f"importance: rank correlation of {name} with {self.first}, mean over the images: {value}", flush=True
            )
        return Section("Which patches matter", text, table if rho else [], figures)

    def _smooth(self, patches: Tensor) -> np.ndarray:
        """Shares (%) of the patches (rows, columns) in their total magnitude, interpolated to the image's size."""
        shares = 100 * patches / patches.abs().sum().clamp(min=torch.finfo(patches.dtype).tiny)
        return F.interpolate(shares[None, None], self.read.shape[2:], mode="bicubic")[0, 0].numpy()

    def similarity(self) -> Section:
        """Token-to-token cosine of z, mean over the images: first model, each other one, and their difference."""
        rows: list[Row] = []
        for name, model in self.models.items():
            with torch.no_grad():
                z = forward_features(model, self.read, self.blocks).z
            alike = {i: token_similarity(z[i]).mean(0).cpu().numpy() for i in self.blocks}
            rho = correlations(alike, rows[0].panels) if rows else {}
            rows.append(Row(name, alike, True, "cosine", 1.0, rho))
            if len(rows) > 1:
                apart = {i: matrix - rows[0].panels[i] for i, matrix in alike.items()}
                rows.append(Row(f"{name} − {self.first}", apart, True, "difference of cosines"))
        text = (
            f"Cosine of z (the joined outputs of a block's heads) between every two tokens, mean of {len(self.read)} "
            "images: purple is alike, orange opposite."
        )
        return self._matrices(
            "similarity-of-tokens", "Which tokens a block makes alike", text, rows, ("token", "token")
        )

    def influence(self) -> Section:
        """||d z_i / d x_j|| of every model on the first image, beside attention's own weights (mean over heads)."""
        generator, rows = torch.Generator().manual_seed(self.seed), []
        bar = tqdm(total=len(self.models) * len(self.blocks), desc="influence", unit="step", leave=False)
        for name, model in self.models.items():
            inputs = attention_inputs(model, self.read[:1], self.blocks)
            tokens, probes, how = sampling(*inputs[self.blocks[0]].shape[1:], self.seed)
            if name == "teacher":
                with torch.no_grad():
                    weights = {i: attention_weights(model.blocks[i].attn, x)[0].mean(0) for i, x in inputs.items()}
                weights = {i: matrix[tokens].cpu().numpy() for i, matrix in weights.items()}
                rows.append(Row("attention weights", weights, False, "mean over heads"))
            panels = {}
            for i, x in inputs.items():
                panels[i] = influence(model.blocks[i].attn, x[0], tokens, probes, generator).cpu().numpy()
                bar.update()
            rho = correlations(panels, rows[0].panels) if rows else {}
            rows.append(Row(f"{name} ‖∂z/∂x‖", panels, False, "‖∂z/∂x‖", None, rho))
        bar.close()
        text = (
            f"How strongly z of output token i depends on input token j, yellow the strongest ({self.images.names[0]}; "
            f"{how}). Scales end where 99 % of the values lie."
        )
        axes = ("input token j", "output token i")
        return self._matrices("influence", "Which tokens a token depends on", text, rows, axes)

    def _matrices(self, name: str, title: str, text: str, rows: list[Row], axes: tuple[str, str]) -> Section:
        """A figure of token matrices, and a table of their rank correlations with the first row."""
        text += f" ρ: rank correlation with the first row, {rows[0].title}." * (len(rows) > 1)
        figure = token_matrices(title, rows, axes, text)
        path = self._save(figure, name, {f"{row.title} block {i}": m for row in rows for i, m in row.panels.items()})
        table = [[f"rank correlation with {rows[0].title}", *(f"block {i}" for i in self.blocks)]]
        table += [[row.title, *map(signed, row.rho.values())] for row in rows if row.rho]
        for of, *values in table[1:]:
            line = f"rank correlation of {of} with {rows[0].title}, block by block: {' '.join(values)}"
            print(f"{name.replace('-', ' ')}: {line}", flush=True)
        return Section(title, text, table if len(table) > 1 else [], [(path, title)])
