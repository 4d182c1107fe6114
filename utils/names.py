"""The names that flags take, here so that a parser need not import torch; a test holds each to its registry."""

MODELS = ("DeiT-Tiny", "DeiT-Small", "DeiT-Base", "DeiT-Micro")  # models.deit.TEACHERS
SCALES = {name.removeprefix("DeiT-"): name for name in MODELS}
REPLACEMENTS = ("multi-lstm", "lstm", "gru", "mingru", "mixer")  # models.replace.REPLACEMENTS
BACKENDS = ("auto", "reference", "torch", "cpu", "triton")  # models.kernels.BACKENDS
# datasets.registry.SOURCES
DATASETS = (
    *("IMNET", "CIFAR10", "CIFAR100", "FLOWER", "CAR", "INAT18", "INAT19", "FOLDER", "IMAGES"),
    *("DIGITS", "ELPV", "ELPV2"),
)
DATA_PACKAGES = {"ELPV": "elpv_dataset", "ELPV2": "elpv_dataset"}  # that ship a data set, in their folder data/
STREAMS = ("wds", "tfds")  # datasets.streams.PACKAGES: before the slash of a --dataset that is read from front to back
INAT_CATEGORIES = ("kingdom", "phylum", "class", "order", "supercategory", "family", "genus", "name")  # as DeiT's
LOSSES = ("similarity", "classification", "combine", "preserve")  # engine.distill.LOSSES
# engine.distill.TERMS: what a loss is a sum of
TERMS = ("similarity", "squared_error", "kl", "soft_kl", "classification")
AMP = ("auto", "off", "bf16", "fp16")  # what utils.configs.Settings.autocast knows
PRECISIONS = ("float32", "bfloat16", "int8")  # deploy.packed.PRECISIONS
EXPORTS = ("onnx", "pt2", "safetensors", "engine")  # deploy.export.TARGETS
TABLES = (".csv", ".json")  # deploy.predict.TABLES
RANKINGS = ("alone", "restore", "greedy", "spacing", "entropy")  # engine.ranking.RANKINGS
SCORES = ("norm", "carried")  # engine.pruning.SCORES
REGULARIZERS = (0, 1, 2, 3)  # engine.hoyer.REGULARIZERS
SENSITIVITY = {"norm": 1.0, "carried": 0.6}  # prune's defaults: two fifths of the digits model's units are weaker


def is_stream(dataset: str) -> bool:
    """Whether --dataset is wds/NAME or the like."""
    kind, _, name = dataset.partition("/")
    return kind in STREAMS and bool(name)


def loss_terms(text: str) -> dict[str, float]:
    """`similarity+0.5*kl` as {term: weight}. Raises ValueError."""
    terms: dict[str, float] = {}
    for word in text.split("+"):
        weight, _, name = word.rpartition("*")
        value = float(weight or 1)
        if name not in TERMS or name in terms or not 0 < value < 1e6:
            raise ValueError(word)
        terms[name] = value
    return terms
