"""A run goes on from what a run like it wrote, and from nothing else."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from engine.resume import Position, fingerprint, read_position
from engine.stages import Stage
from models.replace import FarConfig
from utils.configs import Optim
from utils.errors import FarError
from utils.records import read_lines, read_record

CONFIG = FarConfig("DeiT-Micro", 10, 32, replaced=(0, 2))
STAGES = [Stage(name, (0, 2), (0, 2), "block", "preserve", "output", Optim(2, 8, 1e-3)) for name in ("attn", "block")]
LAST = {"position": {"stage": 1, "epoch": 1, "step": 4, "sums": {"images": 64.0}}}


def test_a_run_goes_on_where_it_stood():
    same = fingerprint(CONFIG, STAGES, 1)
    content = {**LAST, "fingerprint": same}
    assert read_position(content, same, Path("last.pth")) == Position(1, 1, 4, sums={"images": 64.0})
    for other in ({}, LAST):  # a best.pth; of a version without fingerprints
        with pytest.raises(FarError, match="was written by another run"):
            read_position(other, same, Path("last.pth"))


@pytest.mark.parametrize(
    "other",
    [
        fingerprint(replace(CONFIG, num_classes=11), STAGES, 1),
        fingerprint(replace(CONFIG, rep_by="gru"), STAGES, 1),
        fingerprint(CONFIG, STAGES[:1], 1),
        fingerprint(CONFIG, [replace(STAGES[0], loss="combine"), STAGES[1]], 1),
        fingerprint(CONFIG, [replace(STAGES[0], optim=Optim(2, 8, 2e-3)), STAGES[1]], 1),
        fingerprint(CONFIG, STAGES, 2),
    ],
)
def test_what_another_run_left_is_refused_in_one_line(other):
    with pytest.raises(FarError, match="^--resume last.pth: was written by another run.*--output-dir$"):
        read_position({**LAST, "fingerprint": other}, fingerprint(CONFIG, STAGES, 1), Path("last.pth"))


# ---- text files


ROWS = [{"stage_index": 0, "epoch": e, "loss": 0.1 * e} for e in range(3)]


def test_a_log_cut_anywhere_keeps_its_whole_lines(tmp_path):
    path = tmp_path / "log.jsonl"
    assert read_lines(path) == []
    raw = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
    for size in range(len(raw) + 1):
        path.write_bytes(raw[:size])
        assert read_lines(path) == ROWS[: raw[:size].count(b"\n")]


@pytest.mark.parametrize("damage", [b"{", b"[]", b"\xff", b'{"epoch": 1}'])
def test_damage_inside_a_log_is_told_by_line(damage, tmp_path):
    path = tmp_path / "log.jsonl"
    raw = [json.dumps(row).encode() for row in ROWS]
    path.write_bytes(b"\n".join([raw[0], damage, *raw[1:]]) + b"\n")
    with pytest.raises(FarError, match=f"^{path}: line 2 is damaged; "):
        read_lines(path)


@pytest.mark.parametrize("text", [b"", b"{}", b'{"args": 3}', None])
def test_a_record_that_is_none_is_one_line(text, tmp_path):
    path = tmp_path / "args.json"
    path.write_bytes(b'{"args": {"seed": 1}}')
    assert read_record(path, "args") == {"args": {"seed": 1}}
    path.unlink() if text is None else path.write_bytes(text)
    with pytest.raises(FarError, match=f"^{path}: .*--output-dir$"):
        read_record(path, "args")
