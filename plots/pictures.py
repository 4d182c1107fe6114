"""What visualization.py does: find the models and images, measure, draw, save."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean

import numpy as np
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor
from tqdm import tqdm

from datasets.classes import UnknownClass, match_classes
from datasets.images import find_files, read_image, shown
from datasets.loading import Data, DataConfig, preprocessing
from datasets.registry import SOURCES, photographs
from engine.steps import load_any, order_classes
from models import kernels
from models.features import forward_features
from models.replace import FarConfig, count_parameters, replaced_blocks, replacements, set_backend
from plots.explain import (
    attention_inputs,
    attention_rollout,
    attention_weights,
    influence,
    integrated_gradients,
    rank_correlation,
    token_importance,
    token_similarity,
)
from plots.figures import save_figure
from plots.map_figures import Row, block_maps, importance_maps, signed, token_matrices
from plots.page import Section, write_page
from utils.checkpoint import write_atomic
from utils.configs import PictureConfig
from utils.distributed import Context, pick_device
from utils.errors import FarError
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


def find_models(asked: PictureConfig) -> tuple[dict[str, VisionTransformer], FarConfig, Path]:
    """{name: model} in the order teacher, FAR, pruned FAR; how they read pictures; the folder the figures go to."""
    named = dict(zip(FLAGS, (asked.base_weight, asked.far_weight, asked.pruned_weight), strict=True))
    named = {name: path for name, path in named.items() if path}
    if named:
        folder = list(named.values())[-1].parent / "figures"
    else:
        demo = newest_demo()
        found = {name: demo / part / "best.pth" for name, part in zip(FLAGS, ("teacher", "far", "prune"), strict=True)}
        named, folder = {name: path for name, path in found.items() if path.exists()}, demo / "figures"
    check_writable(asked.output_dir or folder)
    loaded = {name: _load(asked, path, FLAGS[name], name == "teacher") for name, path in named.items()}
    models = {name: model for name, (model, _) in loaded.items()}
    _check(models)
    configs = [config for _, config in loaded.values()]
    most = max(configs, key=lambda config: (bool(config.classes), config.preprocessing is not None))
    for name, (model, config) in loaded.items():
        order_classes(model, config.classes, most.classes, FLAGS[name])
    return models, most, asked.output_dir or folder


def _load(asked: PictureConfig, path: Path, flag: str, teacher: bool) -> tuple[VisionTransformer, FarConfig]:
    model, config = load_any(asked, path, flag, teacher)
    if not teacher and not replaced_blocks(model):
        raise FarError(f"{flag} {path}: is a teacher, not a FAR model; give it as --base-weight")
    set_backend(model, asked.lstm_backend)
    return model, config


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


@dataclass(frozen=True)
class Images:
    """read: as models read them (B, 3, S, S). shown: as a person sees them (B, S, S, 3), 0 to 1. names: of each.

    classes: the names of the models' classes, empty where nothing says them.
    """

    read: Tensor
    shown: np.ndarray
    names: Sequence[str]
    classes: tuple[str, ...]


def find_images(asked: PictureConfig, config: FarConfig) -> Images:
    """What --images or --dataset name, spread evenly."""
    size, small = config.img_size, config.img_size <= 32
    name = asked.dataset or ("DIGITS" if small else "PHOTOS")
    wanted, classes = DataConfig(name, asked.data_path, size), config.classes
    source = SOURCES["DIGITS" if small else "IMNET"]
    if asked.images:
        files = find_files(asked.images)
        total, read = len(files), lambda i: (shown(files[i].name), read_image(str(files[i])))
    elif name == "PHOTOS":
        photos = list(photographs().items())
        total, read = len(photos), photos.__getitem__
    else:
        data, source = Data(wanted, Context(), trains=False), SOURCES[name]
        split, own = data.val.data, data.class_names
        try:
            match_classes(classes or own, data.names)
        except UnknownClass as error:
            unknown = shown(error)
            log.warning("--dataset %s: the models do not know its class %r; labels are as it has them", name, unknown)
        classes = classes or (own if data.num_classes == config.num_classes else ())
        total, read = len(split), lambda i: _labelled(split[i], f"{name}, evaluation image {i}", own)
    chosen = np.linspace(0, total - 1, min(asked.count, total)).round().astype(int).tolist()
    names, pictures = zip(*map(read, chosen), strict=True)
    prepared = config.preprocessing or preprocessing(wanted, source, config.reading)
    images = torch.stack(list(map(prepared.transform(size), pictures)))
    shift, scale = (torch.tensor(v)[:, None, None] for v in (prepared.mean, prepared.std))
    return Images(images, (images * scale + shift).clamp(0, 1).permute(0, 2, 3, 1).numpy(), names, classes)


def _labelled(sample: tuple, name: str, classes: tuple[str, ...]) -> tuple:
    """An image of a data set, (name, image); the name says its label where classes have names."""
    image, label = sample
    return f"{name}, labelled “{short(classes[label])}”" if classes else name, image


def short(name: str) -> str:
    """The first of a class's names, cut where it is long."""
    name = shown(name).partition(",")[0]
    return name if len(name) <= LONGEST_NAME else name[: LONGEST_NAME - 1] + "…"


def sampling(tokens: int, dim: int, seed: int) -> tuple[list[int], int | None, str]:
    """Which output tokens the influence matrix looks at, in how many directions (None: all), and that in words."""
    if tokens * dim <= EXACT_UP_TO:
        return list(range(tokens)), None, "exact"
    part = min(1.0, SAMPLED_AT / (tokens * dim**2)) ** 0.5
    probes, count = max(2, round(PROBES * part)), min(tokens, max(16, round(TOKENS * part)))
    chosen = np.linspace(0, tokens - 1, count).round().astype(int).tolist()
    return chosen, probes, f"sampled: {count} of {tokens} output tokens, {probes} random directions each, seed {seed}"


def visualize(asked: PictureConfig) -> tuple[Path, list[Section]]:
    """All figures, and index.html of them in their folder; returns that page and its sections."""
    device = pick_device(asked.device)
    kernels.check(asked.lstm_backend, device)
    models, config, folder = find_models(asked)
    for model in models.values():
        for attn in replacements(model).values():
            attn.check_backend(asked.lstm_backend, device)
    images, blocks = find_images(asked, config), choose_blocks(models, asked.block)
    for model in models.values():
        model.to(device).requires_grad_(False)
    folder.mkdir(parents=True, exist_ok=True)
    draw = Pictures(models, images, blocks, folder, asked.format, asked.seed, device)
    sections = [draw.answers(), draw.importance(), draw.similarity(), draw.influence(), draw.importance_by_block()]
    write_page(folder / "index.html", "FAR: what the models look at", sections)
    return folder / "index.html", sections


HOW_IMPORTANT = (
    "Purple patches raise the logit of the class that the first model names, orange ones lower it: integrated "
    "gradients from a plain picture in the image's mean colour. The sum of a map, which is the logit's rise, stands "
    "above it. Colours show a patch's share of its map, on one scale for all models, which ends where 99 % of the "
    "values lie."
)
IN_BLOCKS = (
    "Purple speaks for the class that the model names, orange against it: the gradient of its logit times what the "
    "block reads, patch by patch. One scale a model, which ends where 99 % of the values lie."
)


def compared(row: Row, base: Row) -> Row:
    """The row with its rank correlation with another one, block by block."""
    maps = {i: (torch.from_numpy(m), torch.from_numpy(base.panels[i])) for i, m in row.panels.items()}
    return replace(row, rho={i: rank_correlation(*pair) for i, pair in maps.items()})


@dataclass
class Pictures:
    """The figures of one call: each method measures, saves figures and their arrays, and returns a page's section."""

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

    def _patches(self, tokens: Tensor) -> np.ndarray:
        """(N,) to the patches' grid, the tokens before them left out."""
        model = self.models[self.first]
        return tokens[model.num_prefix_tokens :].reshape(model.patch_embed.grid_size).cpu().numpy()

    def _correlations(
        self, of: str, base: str, rho: dict[str, list[float]], columns: Sequence[str] = ()
    ) -> list[list[str]]:
        """A table of rank correlations with `base`, by name and column (block by default), also printed."""
        over = " ".join(columns) or "block by block"
        rows = [[name, *map(signed, values)] for name, values in rho.items()]
        for name, *values in rows:
            print(f"{of}: rank correlation of {name} with {base}, {over}: {' '.join(values)}", flush=True)
        columns = columns or [f"block {i}" for i in self.blocks]
        return [[f"rank correlation with {base}", *columns], *rows] if rows else []

    def _says(self, logits: Tensor) -> str:
        """The likeliest class by name, and how likely."""
        index = logits.argmax().item()
        name = short(self.images.classes[index]) if self.images.classes else f"class {index}"
        return f"“{name}” ({logits.softmax(0)[index]:.0%})"

    def answers(self) -> Section:
        """The models' sizes, and what each says of every image."""
        with torch.no_grad():
            said = [[self._says(row) for row in model(self.read)] for model in self.models.values()]
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
            for name, found in maps.items():
                note = f", ρ {signed(rho[name][k])}" if name in rho else ""
                title = f"{name} says {self._says(logits[name][k])}\nlogit {signed(found[k].sum().item(), '+')}{note}"
                titled[title] = self._smooth(found[k])
            figure = importance_maps(image, called, titled, text, "share of the map (%)")
            arrays = {**{name: found[k].numpy() for name, found in maps.items()}, "image": image}
            figures.append((self._save(figure, f"importance-{k}", arrays), called))
        means = {name: [mean(values)] for name, values in rho.items()}
        table = self._correlations("importance", self.first, means, ["mean over the images"])
        return Section("Which patches matter", text, table, figures)

    def _smooth(self, patches: Tensor) -> np.ndarray:
        """Shares (%) of the patches (rows, columns) in their total magnitude, interpolated to the image's size."""
        shares = 100 * patches / patches.abs().sum().clamp(min=torch.finfo(patches.dtype).tiny)
        return F.interpolate(shares[None, None], self.read.shape[2:], mode="bicubic")[0, 0].numpy()

    def importance_by_block(self) -> Section:
        """Token importance of every model, block by block, and the teacher's attention rollout."""
        found = {name: token_importance(model, self.read, self.blocks) for name, model in self.models.items()}
        rollout = attention_rollout(self.models["teacher"], self.read) if self.first == "teacher" else None
        text = IN_BLOCKS + f" ρ: rank correlation with the {self.first}'s map of the same block." * bool(self.others)
        figures, rho = [], {name: [] for name in self.others}
        for k, (image, called) in enumerate(zip(self.images.shown, self.images.names, strict=True)):
            rows = {}
            for name, (maps, logits) in found.items():
                title, panels = f"{name} says {self._says(logits[k])}", {i: self._patches(maps[i][k]) for i in maps}
                rows[name] = Row(title, panels, True, "importance")
            for name in self.others:
                rows[name] = compared(rows[name], rows[self.first])
                rho[name].append(rows[name].rho)
            arrays = {f"{name} block {i}": m for name, row in rows.items() for i, m in row.panels.items()}
            if rollout is not None:
                arrays["rollout"] = self._patches(rollout[k])
                last = {len(self.models[self.first].blocks) - 1: arrays["rollout"]}
                rows["rollout"] = Row(
                    "teacher's attention rollout through all blocks", last, False, "reaches the class token"
                )
            figure = block_maps(image, called, list(rows.values()), text)
            figures.append((self._save(figure, f"importance-{k}-blocks", arrays), called))
        means = {name: [mean(by[i] for by in found) for i in self.blocks] for name, found in rho.items()}
        table = self._correlations(f"importance by block, mean of {len(figures)} images", self.first, means)
        return Section(
            "Which patches matter, block by block", f"{text} The table holds means over the images.", table, figures
        )

    def similarity(self) -> Section:
        """Token-to-token cosine of z, mean over the images: first model, each other one, and their difference."""
        rows: list[Row] = []
        for name, model in self.models.items():
            with torch.no_grad():
                z = forward_features(model, self.read, self.blocks).z
            alike = {i: token_similarity(z[i]).mean(0).cpu().numpy() for i in self.blocks}
            row = Row(name, alike, True, "cosine", top=1.0)
            rows.append(compared(row, rows[0]) if rows else row)
            if len(rows) > 1:
                apart = {i: m - rows[0].panels[i] for i, m in alike.items()}
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
                weights = {i: m[tokens].cpu().numpy() for i, m in weights.items()}
                rows.append(Row("attention weights", weights, False, "mean over heads"))
            panels = {}
            for i, x in inputs.items():
                panels[i] = influence(model.blocks[i].attn, x[0], tokens, probes, generator).cpu().numpy()
                bar.update()
            row = Row(f"{name} ‖∂z/∂x‖", panels, False, "‖∂z/∂x‖")
            rows.append(compared(row, rows[0]) if rows else row)
        bar.close()
        text = (
            f"How strongly z of output token i depends on input token j, yellow the strongest ({self.images.names[0]}; "
            f"{how}). Scales end where 99 % of the values lie."
        )
        axes = ("input token j", "output token i")
        return self._matrices("influence", "Which tokens a token depends on", text, rows, axes)

    def _matrices(self, name: str, title: str, text: str, rows: list[Row], axes: tuple[str, str]) -> Section:
        text += f" ρ: rank correlation with the first row, {rows[0].title}." * (len(rows) > 1)
        figure = token_matrices(title, rows, axes, text)
        path = self._save(figure, name, {f"{row.title} block {i}": m for row in rows for i, m in row.panels.items()})
        table = self._correlations(
            name.replace("-", " "), rows[0].title, {row.title: list(row.rho.values()) for row in rows if row.rho}
        )
        return Section(title, text, table, [(path, title)])
