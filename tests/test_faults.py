"""What goes wrong outside FAR: kills, a full disk, command lines nobody meant.

For longer: `python -m tests.faults --rounds 20`, and FAULTS_EXAMPLES=2000 for the command lines.
"""

import argparse
import contextlib
import functools
import io
import os
import random
import resource
import signal
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from matplotlib.figure import Figure

import benchmark
import convert
import demo
import main
import prune
import visualization
from datasets import loading, registry
from engine import jobs, pruning, steps
from models.deit import create_teacher
from models.published import to_published
from models.replace import FarConfig, build, pack
from plots import pictures
from plots.figures import save_figure
from tests import faults
from utils import arguments, checkpoint
from utils.arguments import Parser
from utils.configs import Record, RunConfig
from utils.distributed import Context
from utils.errors import FarError
from utils.run_folder import open_run
from utils.script import run_script


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """A folder with the undisturbed runs, and how long each took."""
    cwd = tmp_path_factory.mktemp("faults")
    return cwd, faults.prepare(cwd, ["train", "prune"])


@pytest.mark.parametrize("case", ["train", "train", "prune"])
def test_a_run_killed_again_and_again_ends_bit_equal_to_the_undisturbed_one(case, undisturbed):
    cwd, seconds = undisturbed
    print(faults.disturb(cwd, case, seconds[case], random.SystemRandom().randrange(10**6), most=3))


def test_a_kill_between_two_writes_changes_no_log(undisturbed):
    """Around a teacher's second last.pth, which log.jsonl and steps.jsonl must agree with."""
    cwd, _ = undisturbed
    with faults.started(cwd, "teacher", "between", faults.Kill(write=6).arm) as process:
        process.join()
        assert process.exitcode == -signal.SIGKILL
    faults.finish(cwd, "teacher", "between")
    faults.assert_equal(cwd / "between", cwd / "teacher")


def test_a_full_disk_is_one_line_and_the_last_good_checkpoint_goes_on(undisturbed):
    """The optimiser's state makes the second last.pth three times as large as the first one, which still fits."""
    cwd, _ = undisturbed
    limit = 2 * (cwd / "teacher/best.pth").stat().st_size
    with faults.started(cwd, "teacher", "full", partial(faults.full_disk, limit)) as process:
        process.join()
    output = (cwd / "full.log").read_text()
    lines = [line for line in output.splitlines() if "error: " in line]
    assert process.exitcode == 2 and "Traceback" not in output, output
    assert lines == [
        "error: full/last.pth: cannot be written (File too large); what was there before is kept; "
        "make room or name another folder"
    ]
    faults.assert_loads(cwd / "full")
    assert not list((cwd / "full").glob(".*.tmp")) and output.rstrip().endswith(lines[0])
    faults.finish(cwd, "teacher", "full")
    faults.assert_equal(cwd / "full", cwd / "teacher")


def test_a_kill_before_a_run_has_its_record_leaves_no_file_to_the_next(tmp_path):
    for name in (".args.json.12.tmp", ".last.pth.12.tmp"):  # the second one cannot be ours: nothing was trained here
        (tmp_path / name).write_text("half")
    with open_run(RunConfig("train", tmp_path, "auto", Record({}, {})), Context()):
        assert {p.name for p in tmp_path.iterdir()} == {".lock", ".last.pth.12.tmp", "args.json"}


@pytest.fixture
def small_files() -> Iterator[None]:
    """No file of this process may grow beyond a megabyte: Python meets the limit as the error of a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def half(file) -> None:
    file.write(b"half")
    raise RuntimeError("no more")


@pytest.mark.parametrize("write", [half, lambda file: file.write(bytes(2**21))])
def test_a_write_that_fails_keeps_the_old_file_and_leaves_no_other(write, tmp_path, small_files):
    path = tmp_path / "a.pth"
    path.write_bytes(b"old")
    with pytest.raises((FarError, RuntimeError), match=r"no more|a\.pth: cannot be written \(File too large\)"):
        checkpoint.write_atomic(path, write)
    assert path.read_bytes() == b"old" and [p.name for p in tmp_path.iterdir()] == ["a.pth"]


def test_a_figure_is_written_whole_or_not_at_all(tmp_path, small_files):
    save_figure(Figure(figsize=(1, 1)), tmp_path / "a.png")
    before = (tmp_path / "a.png").read_bytes()
    large = Figure(figsize=(20, 20))
    large.figimage(np.random.rand(1000, 1000))
    with pytest.raises(FarError, match=r"a\.png: cannot be written"):
        save_figure(large, tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["a.png"]


def test_a_folder_that_is_gone_is_one_line(tmp_path):
    with pytest.raises(FarError, match="No such file or directory"):
        checkpoint.save(tmp_path / "gone/last.pth", {})


EXAMPLES = int(os.environ.get("FAULTS_EXAMPLES", "25"))  # a script


class Done(BaseException):
    """Real work would begin."""


def begin(*args, **kwargs):
    raise Done


ODD = ["", " ", "a\nb", "-5\n", "1\n2", "\x0c-7", "\x85", "\u2028", "\0", "\udc80", "x" * 300, "9" * 5000]
SOUND = "0 1 2 3 0.5 0.25 1e-3 1e30 64".split()
NUMBERS = [
    *SOUND,
    *"-1 -0 +4 nan inf -inf 1e400 1e-400 1_0 0x10 \u0663 \u00b2 \uff11 2147483648 none".split(),
    "9" * 30,
]
PLACES = """file file/inside folder missing missing/deeper fifo fifo/inside loop loop/inside - . .. ~ /dev/null
/dev/null/x /proc/none teacher.pth far.pth far.safetensors broken.pth""".split()
PATHS = [*PLACES, "nul\0", "new\nline", "y/" * 3000, "\udcff"]
WORDS = """nope none all best adamw sgd lbfgs adahessian lookahead_adam rand-m9-mstd0.5-inc1 rand-mx rand-m9-n-1
augmix-m3 original originalr v0 0 -1 0-3 3-0 0,2 0-99999999999 \u0661 , 0.5,0.5 0.5,0.25 -- -x = --=""".split()
TEXT = st.text(st.characters(exclude_characters="/"), max_size=6)  # and so no path out of the example's folder
ANY = st.sampled_from(ODD) | st.sampled_from(NUMBERS) | st.sampled_from(PATHS) | st.sampled_from(WORDS) | TEXT


def words(action: argparse.Action, sound: bool) -> st.SearchStrategy[list[str]]:
    """What follows a flag: `sound`, what its converter may well take; else anything, too little or too much of it."""
    if action.choices:
        word = st.sampled_from([str(choice) for choice in action.choices])
    elif action.type is arguments.path:
        word = st.sampled_from(PATHS)
    else:
        word = st.sampled_from(WORDS if action.type is None else SOUND)
    if not sound:
        return st.lists(ANY | word, max_size=2)
    least = int(action.nargs in (None, "+"))
    return st.lists(word, min_size=least, max_size={0: 0, "+": 3}.get(action.nargs, 1))


@st.composite
def flag(draw, actions: list[argparse.Action], sound: bool) -> list[str]:
    """One flag as a person, or a broken script, would write it."""
    action = draw(st.sampled_from(actions))
    name, after = draw(st.sampled_from(action.option_strings)), draw(words(action, sound))
    return [f"{name}={after[0]}", *after[1:]] if after and draw(st.booleans()) else [name, *after]


def parser_of(script: Callable) -> argparse.ArgumentParser:
    """The parser that a script makes."""
    found = []

    def stop(parser: Parser, *args) -> None:
        found.append(parser)
        raise Done

    with pytest.MonkeyPatch.context() as patch, contextlib.suppress(Done):
        patch.setattr(Parser, "parse_args", stop)
        script([])
    return found[0]


MICRO = ["--scale", "Micro", "--dataset", "DIGITS"]
SCRIPTS = {  # name: (script, lines that reach its work)
    "main": (
        main.main,
        [
            ["--mode", "teacher", *MICRO],
            ["--mode", "train", *MICRO, "--base-weight", "teacher.pth"],
            ["--mode", "block-distill", *MICRO, "--base-weight", "teacher.pth", "--attn-weight", "far.pth"],
            ["--mode", "downstream", *MICRO, "--far-weight", "far.pth"],
            ["--mode", "eval", "--dataset", "DIGITS", "--far-weight", "far.pth"],
        ],
    ),
    "prune": (
        prune.main,
        [[*MICRO, "--model-path", "far.pth"], [*MICRO, "--model-path", "far.pth", "--base-weight", "teacher.pth"]],
    ),
    "visualization": (
        visualization.main,
        [["--base-weight", "teacher.pth", "--far-weight", "far.pth"], ["--far-weight", "far.pth"]],
    ),
    "convert": (
        convert.main,
        [["--published", "published.pth", "--output", "out.pth"], ["--far-weight", "far.pth", "--output", "out.pth"]],
    ),
    "demo": (demo.demo, [["--output-dir", "demo"]]),
    "benchmark": (benchmark.benchmark, [["--output-dir", "speed"]]),
}


@st.composite
def lines(draw, name: str) -> list[str]:
    """A command line of a script: one that would work, or none, with flags and words added."""
    script, good = SCRIPTS[name]
    actions = [action for action in parser_of(script)._actions if action.option_strings]
    sound = st.lists(flag(actions, True), max_size=3)
    wrong = st.lists(flag(actions, False) | st.lists(ANY, max_size=1), max_size=2)
    added = draw(sound) + draw(st.just([]) | wrong)
    return [*draw(st.sampled_from([*good, []])), *(word for part in added for word in part)]


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    """A folder of checkpoints that the lines name."""
    folder = tmp_path_factory.mktemp("weights")
    far = FarConfig("DeiT-Micro", 10, 32, replaced=(0, 1, 2, 3))
    checkpoint.save(folder / "teacher.pth", pack(create_teacher("DeiT-Micro", 10, 32), FarConfig("DeiT-Micro", 10, 32)))
    checkpoint.save(folder / "far.pth", pack(build(far), far))
    checkpoint.save(folder / "published.pth", to_published(build(far)))
    safetensors.torch.save_file(build(far).state_dict(), folder / "far.safetensors")
    (folder / "broken.pth").write_bytes((folder / "far.pth").read_bytes()[:5000])
    return folder


@pytest.fixture(scope="module")
def idle() -> Iterator[None]:
    """Real work raises Done. The digits are read once, and a model larger than DeiT-Micro is work already."""

    def small(name: str, *args, **kwargs):
        return create_teacher(name, *args, **kwargs) if name == "DeiT-Micro" else begin()

    def local(name: str, root: Path, train: bool, download: bool = False, category: str = "name"):
        if download and registry.SOURCES[name].can_download:
            begin()
        return registry.build_split(name, root, train, download, category)

    with pytest.MonkeyPatch.context() as patch:
        for owner, name in (
            (jobs.Trainer, "fit"),
            (jobs, "evaluate"),
            (pruning.Pruning, "run"),
            (pictures.Pictures, "importance"),
            (benchmark, "compare_programs"),
            (demo.Demo, "run"),
            (demo.Demo, "stage"),
        ):
            patch.setattr(owner, name, begin)
        for owner in (jobs, steps):
            patch.setattr(owner, "create_teacher", small)
        patch.setattr(loading, "build_split", local)
        patch.setattr(registry, "Digits", functools.cache(registry.Digits))
        yield


def furnish(folder: Path, weights: Path) -> None:
    """What the lines' paths name."""
    (folder / "folder").mkdir()
    (folder / "file").write_text("text")
    os.mkfifo(folder / "fifo")
    (folder / "loop").symlink_to("loop")
    for file in weights.iterdir():
        os.link(file, folder / file.name)


def seen(folder: Path) -> set[tuple[str, int]]:
    """Everything below a folder and when it was last written."""
    return {(str(p), 0 if p.is_dir() else p.lstat().st_mtime_ns) for p in folder.rglob("*")}


def ended(script: Callable, argv: list[str]) -> tuple[int | None, str]:
    """The exit code (None where the work would begin) and what stands on stderr, streams encoding as a shell's do."""
    out, err = (io.TextIOWrapper(io.BytesIO(), "utf-8", errors=errors) for errors in ("strict", "backslashreplace"))
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = run_script(script, argv)
        except SystemExit as stop:  # argparse
            code = stop.code
        except Done:
            code = None
    err.seek(0)
    return code, err.read()


def assert_sound(name: str, argv: list[str], weights: Path) -> str:
    """A script begins its work, or tells its help, or ends with one line and leaves nothing; returns that line."""
    with tempfile.TemporaryDirectory() as root:
        cwd = Path(root, "cwd")
        cwd.mkdir()
        furnish(cwd, weights)
        before = seen(Path(root))
        with contextlib.chdir(cwd):
            code, err = ended(SCRIPTS[name][0], argv)
        assert code in (0, 2, None), err
        if code == 2:
            assert err.startswith("error: ") and len(err.splitlines()) == 1, err
            assert seen(Path(root)) == before, err
        return err


@pytest.mark.parametrize("name", SCRIPTS)
def test_any_command_line_works_or_is_one_line_that_leaves_nothing(name, weights, idle):
    @settings(max_examples=EXAMPLES, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(lines(name))
    def holds(argv: list[str]) -> None:
        assert_sound(name, argv, weights)

    holds()


@pytest.mark.parametrize(
    ("name", "argv", "said"),
    [
        ("main", ["--mode", "teacher", *MICRO, "--resume"], "--resume must: needs the run's folder"),
        ("main", ["--mode", "teacher", *MICRO, "--output-dir", "file/a\nb"], r"--output-dir file/a\nb: "),
        ("demo", ["a\nb\x85c"], r"a\nb\x85c"),
        ("benchmark", ["--seconds", "\n-5"], r"\n-5"),
        ("visualization", ["--far-weight", "far.pth", "--images", "x" * 300], "File name too long"),
        ("visualization", ["--far-weight", "far.pth", "--images", "a\0"], "null byte"),
    ],
)
def test_lines_that_once_failed_name_their_word(name, argv, said, weights, idle):
    assert said in assert_sound(name, argv, weights)
