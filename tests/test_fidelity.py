"""What a student keeps of its teacher, against plain loops; over two processes; and where every command reports it."""

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

import main
import prune
from deploy.fuse import fuse
from engine import modes, pruning
from engine.fidelity import fidelity, summary
from engine.pruning import table
from models.deit import create_teacher
from models.replace import swap_attention
from plots.figures import fidelity_by_block
from tests.conftest import BATCH, EVAL, FLOAT32, QUIET, report, run_ranks
from utils.distributed import Context

OWN = {f"{whose}{name}" for whose in ("", "teacher_") for name in ("loss", "acc1", "acc5", "balanced_acc1")}
KEYS = OWN | {"images", "agreement", "kl", "teacher_errors", "repeated_errors", "z_similarity", "output_error"}


def pair():
    """A teacher and a student of it that answers alike on some images and otherwise on others, never the last class."""
    teacher, student = (create_teacher("DeiT-Micro", 7, 16) for _ in range(2))
    student.load_state_dict(teacher.state_dict())
    swap_attention(student, (1, 3), "multi-lstm")
    with torch.no_grad():
        for model in (teacher, student):
            model.head.weight.mul_(20)
            model.head.bias.normal_(std=0.05)
            model.head.bias[6] = -99
    return student, teacher


def seen(model, images):
    """Logits, and z and output by block, as an ordinary forward pass leaves them, in float64 numpy."""
    z, output, handles = {}, {}, []
    for i, block in enumerate(model.blocks):
        proj = block.attn.proj if hasattr(block.attn, "qkv") else block.attn.post_proj
        handles.append(proj.register_forward_hook(lambda m, args, out, i=i: z.update({i: args[0]})))
        handles.append(block.register_forward_hook(lambda m, args, out, i=i: output.update({i: out})))
    with torch.no_grad():
        logits = model.eval()(images)
    for handle in handles:
        handle.remove()
    return logits.double().numpy(), *({i: v.double().numpy() for i, v in maps.items()} for maps in (z, output))


def scores(logits, labels):
    """Cross entropy, top-1 and top-5 of logits in float64, image by image, and the mean of the classes' top-1."""
    losses, ranks, right = [], [], {}
    for row, label in zip(logits, labels.tolist(), strict=True):
        losses.append(np.log(np.exp(row - row.max()).sum()) + row.max() - row[label])
        ranks.append((row > row[label]).sum())
        right.setdefault(label, []).append(ranks[-1] == 0)
    top1, top5 = (100 * np.mean(np.less(ranks, k)) for k in (1, 5))
    balanced = 100 * np.mean([np.mean(of_class) for of_class in right.values()])
    return {"loss": np.mean(losses), "acc1": top1, "acc5": top5, "balanced_acc1": balanced}


def by_hand(student, teacher, images, labels):
    ours, theirs = seen(student, images), seen(teacher, images)
    same = wrong = repeated = 0
    kl = []
    for a, b, label in zip(ours[0], theirs[0], labels.tolist(), strict=True):
        p, q = (np.exp(v - v.max()) / np.exp(v - v.max()).sum() for v in (b, a))
        kl.append(sum(p[c] * (np.log(p[c]) - np.log(q[c])) for c in range(len(p))))
        same += a.argmax() == b.argmax()
        wrong += b.argmax() != label
        repeated += b.argmax() != label and a.argmax() == b.argmax()
    n = len(labels)
    cosines, errors = {}, {}
    for i in range(4):
        pairs = [(x, y) for k in range(n) for x, y in zip(ours[1][i][k], theirs[1][i][k], strict=True)]
        cosines[i] = np.mean([x @ y / np.linalg.norm(x) / np.linalg.norm(y) for x, y in pairs])
        errors[i] = np.linalg.norm((ours[2][i] - theirs[2][i]).ravel()) / np.linalg.norm(theirs[2][i].ravel())
    return {
        "agreement": 100 * same / n,
        "kl": np.mean(kl),
        "images": n,
        **scores(ours[0], labels),
        **{f"teacher_{name}": value for name, value in scores(theirs[0], labels).items()},
        "teacher_errors": wrong,
        "repeated_errors": repeated,
        "z_similarity": cosines,
        "output_error": errors,
    }


def test_fidelity_equals_loops_over_images_tokens_and_classes():
    images, same = 3 * torch.randn(23, 3, 16, 16) + torch.randn(23, 3, 1, 1), 0
    while not 5 < same < 18:  # some pairs agree on nearly all images, or none
        student, teacher = pair()
        answers = [model.eval()(images).argmax(1) for model in (student, teacher)]
        same = (answers[0] == answers[1]).sum()
    labels = torch.cat([answers[1][:9], torch.randint(6, (14,))])
    labels[(answers[0] == answers[1]).nonzero()[0]] = 6  # nobody's answer: an error that is repeated
    labels[(answers[0] != answers[1]).nonzero()[0]] = 6  # one that is not
    student.train()
    found = fidelity(student, teacher, DataLoader(TensorDataset(images, labels), 5), Context(), FLOAT32)
    assert student.training
    expected = by_hand(student, teacher, images, labels)
    assert found.keys() == KEYS == expected.keys()
    for key, value in expected.items():
        assert found[key] == pytest.approx(value, rel=1e-4), key
    assert 0 < expected["repeated_errors"] < expected["teacher_errors"] < 23


def test_two_processes_measure_what_one_does(far, teacher, tmp_path):
    argv = ["--mode", "eval", *EVAL, "--far-weight", str(far / "best.pth"), "--base-weight", str(teacher)]
    assert main.main([*argv, "--output-dir", str(tmp_path / "one")]) == 0
    two = run_ranks("main.py", *argv, "--batch-size", "37", "--output-dir", "two", cwd=tmp_path)
    assert two.returncode == 0 and "agrees with its teacher" in two.stdout, two.stderr
    one, two = report(tmp_path / "one"), report(tmp_path / "two")
    assert one.keys() == two.keys() >= KEYS
    for key in KEYS:
        assert two[key] == pytest.approx(one[key], rel=1e-5), key


def test_training_and_eval_report_the_same_of_the_same_weights_fused_too(far, teacher, tmp_path, capsys, monkeypatch):
    precisions = []
    monkeypatch.setattr(modes, "fuse", lambda model, dtype: precisions.append(dtype) or fuse(model, dtype))
    trained = report(far)
    weights = ["--far-weight", str(far / "best.pth"), "--base-weight", str(teacher)]
    argv = ["--mode", "eval", *EVAL, "--holdout", "0.04", *weights]
    for name, more in (("run", []), ("fused", ["--fuse", "float32"])):
        assert main.main([*argv, *more, "--output-dir", str(tmp_path / name)]) == 0
        assert f"agrees with its teacher on {trained['agreement']:.2f} %" in capsys.readouterr().out or more
    plain, fused = report(tmp_path / "run"), report(tmp_path / "fused")
    assert trained.keys() - plain.keys() == set() and trained["teacher_acc1"] == plain["teacher_acc1"]
    for key in KEYS:
        assert trained[key] == pytest.approx(plain[key], rel=1e-5), key
    assert fused["kl"] == pytest.approx(plain["kl"], abs=1e-3) and "z_similarity" not in fused
    assert precisions == [torch.float32] and fused["parameters"] == plain["parameters"]
    assert abs(fused["loss"] - plain["loss"]) < 1e-3
    assert abs(fused["acc1"] - plain["acc1"]) < 4  # two of 57 images: barely trained, ties tip over


def test_prune_reports_it_in_every_row_where_there_is_a_teacher(far, teacher, tmp_path, capsys, monkeypatch):
    passes = []
    monkeypatch.setattr(pruning, "fidelity", lambda *args: passes.append(args) or fidelity(*args))
    small = ["--dataset", "DIGITS", "--train-subset", "0.05", "--holdout", "0.02", *QUIET, *BATCH, "--epochs", "0"]
    argv = ["--model-path", str(far / "best.pth"), *small, "--ft-epochs", "0", "--keep-ratio", "0.5"]
    assert prune.main([*argv, "--base-weight", str(teacher), "--output-dir", str(tmp_path)]) == 0
    found = report(tmp_path, "prune_report.json")
    assert len(passes) == 2  # before, and pruned: where nothing trains nothing is measured again
    assert all(row.keys() >= KEYS for row in (*found["rows"], found["teacher"]))
    assert (tmp_path / "fidelity.png").exists()
    assert found["teacher"]["agreement"] == 100 > found["rows"][-1]["agreement"]
    last, said = found["rows"][-1], table(found)
    assert said in capsys.readouterr().out and len({len(line) for line in said.splitlines()}) == 1
    cosine, error = min(last["z_similarity"].values()), max(last["output_error"].values())
    shown = [f"{last['kl']:.4f}", str(last["repeated_errors"]), f"{cosine:.3f}", f"{error:.3f}", str(last["units"])]
    assert " ".join(shown) in " ".join(said.splitlines()[-1].split())
    assert f"z's cosine at least {cosine:.2f}, output error at most {error:.2f}" in summary(last)


def test_the_figure_draws_what_it_is_given():
    reports = {
        name: {key: {str(i): np.random.default_rng(i).random() + k for i in (0, 2, 3)} for key in KEYS}
        for k, name in enumerate(("before", "after attn", "after block", "pruned"))
    }
    for axis, key in zip(fidelity_by_block(reports).axes, ("z_similarity", "output_error"), strict=True):
        heights = [value for line in axis.lines for value in line.get_ydata()]
        assert heights == [value for report in reports.values() for value in report[key].values()]
        assert [label.get_text() for label in axis.get_xticklabels()] == ["0", "2", "3"]
