"""Wrong input of every kind, at the real entry of the command line: one clear error, soon, and nothing left behind.

Everything is made by seeded generators, so a failure repeats: `pytest tests/test_fuzz.py -k 'NAME'`.
"""

import os
import random
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib import import_module
from io import BytesIO
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save

from bdcore.artifacts import Architecture
from bdcore.cli import COMMANDS, main
from bdcore.errors import BdcoreError
from bdcore.models import build

pytestmark = pytest.mark.timeout(120)

NETWORK = "wrn10_1"
BASES = {
    "run": ["--plugin", "finetune", "--model", NETWORK, "--device", "cpu", "--dataset", "npz:data.npz"],
    "scan": ["--model", "model.pt", "--arch", NETWORK, "--clean", "npz:data.npz", "--device", "cpu"],
    "defend": ["--plugin", "finetune", "--model", "model.pt", "--arch", NETWORK, "--clean", "npz:data.npz"],
    "report": ["done"],
    "new": ["defense", "mine"],
    "plugins": [],
    "doctor": [],
}
"""A right use of every command."""

TEXTS = [
    "",
    " ",
    "\0",
    "a\nb",
    "\x1b[31m",
    "\u202e\u0661é",
    "\udcff",
    "x" * 50_000,
    "-",
    "--",
    "%s{}$(id)",
    "1e999",
    "nan",
]
TEXTS += ["-1", "9" * 5000, "[" * 3000, "a:b", ":", "a.b=c", "run.seed=1", "..", "true"]
PATHS = ["folder", "empty", "fifo", "missing/deeper", "loop", "unreadable", "empty/inside", "/dev/full", "data.npz"]

TRAINING = "training began"


@dataclass
class Case:
    """Arguments; whether they must be refused, or may turn out right; files that they need beside the others."""

    arguments: list[str]
    wrong: bool = True
    files: dict[str, bytes] = field(default_factory=dict)


def numbered(prefix: str, cases: list[Case]) -> list[Any]:
    return [pytest.param(case, id=f"{prefix}-{number}") for number, case in enumerate(cases)]


def mixed(seed: str, content: bytes, count: int) -> list[bytes]:
    """Damaged forms of a file: cut short, bytes altered, filled with noise, pieces moved or doubled."""
    generator = random.Random(seed)
    found = [b"", b"\0", generator.randbytes(64), generator.randbytes(len(content)), content[: len(content) // 2]]
    while len(found) < count:
        damaged = bytearray(content)
        place, length = generator.randrange(len(content)), generator.choice([1, 2, 8, 64])
        kind = generator.randrange(5)
        if kind == 0:
            del damaged[place:]
        elif kind == 1:
            for _ in range(length):
                damaged[generator.randrange(len(damaged))] ^= 1 << generator.randrange(8)
        elif kind == 2:
            damaged[place : place + length] = generator.randbytes(length)
        elif kind == 3:
            damaged[place:place] = damaged[place : place + length]
        else:
            del damaged[place : place + length]
        found.append(bytes(damaged))
    return found


def saved(write: Callable[[BytesIO], object]) -> bytes:
    content = BytesIO()
    write(content)
    return content.getvalue()


GENERATOR = np.random.default_rng(0)
IMAGES = GENERATOR.integers(0, 256, (200, 3, 12, 12), dtype=np.uint8)
LABELS = np.arange(200) % 10
ARRAYS = {"x_train": IMAGES, "y_train": LABELS, "x_test": IMAGES[:16], "y_test": LABELS[:16]}
MODEL = build(Architecture(NETWORK, 10, (3, 12, 12), (0.5,) * 3, (0.25,) * 3), 0).net.state_dict()
OLD = saved(lambda file: torch.save(MODEL, file, _use_new_zipfile_serialization=False))
PNG = saved(lambda file: Image.fromarray(IMAGES[0].transpose(1, 2, 0)).resize((24, 24)).save(file, "png"))
SMALL = {name: MODEL[name] for name in list(MODEL)[:4]}


def npz(**arrays: Any) -> bytes:
    return saved(lambda file: np.savez(file, **{**ARRAYS, **arrays}))


def pt(value: Any, **options: Any) -> bytes:
    return saved(lambda file: torch.save(value, file, **options))


TOML = b"""plugins = ["badnets", "finetune"]
no_attack = false
[run]
seed = 3
model = "wrn10_1"
device = "cpu"
[dataset]
name = "npz"
argument = "data.npz"
[attack]
target = 1
[train]
epochs = 2
betas = [0.9, 0.99]
[finetune]
lr = 0.01
"""


def options() -> list[Case]:
    """Every option and argument of every command: without a value, misspelt, with values of every kind."""
    cases = [Case(["--no-such"]), Case(["rnu"]), Case([""]), Case(["\0"]), Case(["-"]), Case(["run", "extra"])]
    for name, base in BASES.items():
        assert name in COMMANDS
        cases += [Case([name, *base, "--no-such"]), Case([name, *base, "--help=1"]), Case([name, *base, "-x"])]
        command: click.Command = import_module(f"bdcore.cli.{name}").command
        for option in command.params:
            if isinstance(option, click.Argument):
                values = [[value] for value in TEXTS + PATHS]
                cases += [Case([name, *base[:-1], *value], wrong=False) for value in values]
                continue
            flag = option.opts[0]
            cases.append(Case([name, *base, flag[:-1]]))
            if option.is_flag:
                cases.append(Case([name, *base, f"{flag}=1"]))
                continue
            cases.append(Case([name, *base, flag]))
            generator = random.Random(f"{name} {flag}")
            values = generator.sample(TEXTS, 3) + generator.sample(PATHS, 2)
            cases += [Case([name, *base, flag, value], wrong=False) for value in values]
    return cases


SETTINGS = """
train.epochs=0 train.epochs=1.5 train.epochs=x train.epochs= train.epochs train.lr=-1 train.lr=nan train.lr=[1]
train.lr=true train.lr={} train.epoch=3 trian.epochs=3 train.=3 .epochs=3 =3 = train.betas=[nan,0.9]
train.betas=[0.9] train.betas=[0.9,2] train.milestones=[nan] train.momentum=1.5 train.schedule=none
attack.target=10 attack.target=-1 attack.poison_rate=1.1 badnets.size=0 run.seed=-1 run.seed=99999999999
run.clean_fraction=0 run.clean_fraction=0.01 run.clean_fraction=nan run.model= run.device=gpu run.precision=fp8
run.victim=none dataset.name=digits dataset.limit=0 npz.limit=2 finetune.lr=0 finetune.batch_size=1
mcldef.epochs=3 attack.target=1979-05-27 run.compile=1.5
"""
"""Options that cannot be."""


def contradictions() -> list[Case]:
    """What is right by itself and not together, names that do not exist, values out of range."""
    run = ["run", *BASES["run"]]
    cases = [Case([*run, "--set", text]) for text in SETTINGS.split()]
    cases += [
        Case(["run"]),
        Case(["run", "--plugin", "tensorboard"]),
        Case(["run", "--plugin", "digits"]),
        Case([*run, "--plugin", "finetune"]),
        Case([*run, "--plugin", "badnets", "--plugin", "blended"]),
        Case([*run, "--plugin", "digits"]),
        Case([*run, "--plugin", "badnets", "--no-attack"]),
        Case([*run, "--no-attack", "--set", "attack.target=1"]),
        Case([*run, "--no-attack", "--set", "run.victim=fine_tuned"]),
        Case([*run, "--set", "run.fine_tuning_lr=0.01"]),
        Case([*run, "--set", "run.fine_tuning_epochs=3"]),
        Case([*run, "--set", "run.victim=fine_tuned", "--set", "run.fine_tuning_lr=0"]),
        Case([*run, "--seed", "1", "--set", "run.seed=1"]),
        Case([*run, "--set", "train.epochs=1", "--set", "train.epochs=2"]),
        Case([*run, "--set", "attack.target=1", "--set", "badnets.target=1"]),
        Case([*run, "--dataset", "npz"]),
        Case([*run, "--dataset", "npz:data.npz:x"]),
        Case([*run, "--dataset", "finetune"]),
        Case([*run, "--dataset", ""]),
        Case([*run, "--device", "cuda:99"]),
        Case([*run, "--model", "inception_v3"]),
        Case([*run, "--model", "os:system"]),
        Case([*run, "--model", "wrn11_1"]),
        Case([*run, "--model", "wrn10_99999999"]),
        Case([*run, "--out", "data.npz"]),
        Case([*run, "--out", "data.npz/inside"]),
        Case([*run, "--out", "done"]),
        Case([*run, "--set", "tensorboard.folder=x"]),
        Case(["scan", *BASES["scan"], "--plugin", "badnets"]),
        Case(["scan", *BASES["scan"], "--plugin", "mcldef", "--plugin", "finetune"]),
        Case(["scan", *BASES["scan"], "--clean", "npz:model.pt"]),
        Case(["scan", *BASES["scan"], "--model", "data.npz"]),
        Case(["scan", *BASES["scan"], "--arch", "resnet18"]),
        Case(["scan", *BASES["scan"], "--arch", "os:system"]),
        Case(["scan", *BASES["scan"], "--size", "0"]),
        Case(["scan", *BASES["scan"], "--size", "8x"]),
        Case(["scan", *BASES["scan"], "--images", "0"]),
        Case(["scan", *BASES["scan"], "--normalize", "1,2/3"]),
        Case(["scan", *BASES["scan"], "--normalize", "0/0"]),
        Case(["scan", "--clean", "npz:data.npz"]),
        Case(["scan", "--model", "model.pt", "--arch", NETWORK]),
        Case(["defend", *BASES["defend"], "--plugin", "badnets"]),
        Case(["defend", *BASES["defend"], "--plugin", "abl"]),
        Case(["defend", *BASES["defend"], "--out", "data.npz"]),
        Case(["defend", *BASES["defend"], "--out", "missing/model.pt"]),
        Case(["defend", *BASES["defend"], "--out", "model.pt"]),
        Case(["report"]),
        Case(["report", "done", "folder"]),
        Case(["report", "done", "--out", "folder"]),
        Case(["new", "observer", "mine"]),
        Case(["new", "defense", "mcldef"]),
        Case(["new", "defense", "run"]),
        Case(["new", "defense", "mine", "more"]),
    ]
    return cases


def line_noise() -> list[Case]:
    """Words of the command line in any order and number."""
    generator = random.Random("words")
    words = [
        "--plugin",
        "--dataset",
        "--set",
        "--out",
        "--config",
        "--seed",
        "--no-attack",
        "--json",
        "--device",
        "cpu",
    ]
    words += [
        "mcldef",
        "finetune",
        "badnets",
        "npz:data.npz",
        "train.epochs=3",
        "run.toml",
        "--",
        "=",
        "train.x=y",
        "7",
    ]
    words += ["--model", "--arch", "--clean", "--traceback=", "-h=", "model.pt", *TEXTS[:6]]
    commands = [*BASES, "run", "run", "scan", "defend"]
    return [
        Case([generator.choice(commands), *generator.choices(words, k=generator.randrange(1, 9))], wrong=False)
        for _ in range(50)
    ]


def configurations() -> list[Case]:
    """Configuration files: each wrong in one way, or damaged."""
    wrong = """plugins = 3|plugins = ["finetune", 3]|plugins = ["nosuch"]|no_attack = "no"|seed = 3|[run]\nseed = "x"
        |[run]\nsed = 1|[run]\nseed = 1979-05-27|[nosuch]\nx = 1|[dataset]\nname = 3|[dataset]\nname = "nosuch"|[[run]]
        |[run]\nseed = 1\nseed = 2|[train]\nlr = inf|[train]\nlr = nan|[train.deep]\nx = 1|[mcldef]\nepochs = 1|= 1
        |[finetune]\nlr = {}|[attack]\ntarget = 1\n[badnets]\ntarget = 1|a.b.c = 1|[run]\nmodel = ["x"]"""
    contents = [text.strip().encode() for text in wrong.split("|")]
    contents += [b"\xff\xfe", b"\0", b"x = " + b"[" * 5000, b"[run]\nseed = " + b"9" * 5000, b"x" * 100_000]
    cases = []
    for one in contents:
        plugin = [] if b"plugins" in one else ["--plugin", "finetune"]
        cases.append(Case(["run", *plugin, "--config", "case.toml"], True, {"case.toml": one}))
    damaged = mixed("toml", TOML, 35)
    return cases + [Case(["run", "--config", "case.toml"], False, {"case.toml": one}) for one in damaged]


def arrays() -> list[Case]:
    """Files of NumPy's: arrays that cannot be images and labels, and damaged ones."""
    wrong = [
        npz(x_train=IMAGES.astype(np.float32)),
        npz(x_train=IMAGES[:, :2]),
        npz(x_train=IMAGES[0]),
        npz(x_train=IMAGES[:0], y_train=LABELS[:0]),
        npz(x_train=np.array([None, {}], dtype=object)),
        npz(x_train=np.array("text")),
        npz(y_train=LABELS - 1),
        npz(y_train=LABELS.astype(np.float64)),
        npz(y_train=LABELS[:-1]),
        npz(y_train=LABELS[:, None]),
        npz(y_train=LABELS + 10**9),
        npz(y_train=np.full_like(LABELS, 2**62)),
        saved(lambda file: np.savez(file, a=IMAGES)),
        saved(np.savez),
        saved(lambda file: np.save(file, IMAGES)),
    ]
    uses = [["run", *BASES["run"], "--dataset", "npz:case.npz"], ["scan", *BASES["scan"], "--clean", "npz:case.npz"]]
    cases = [Case(use, True, {"case.npz": one}) for use in uses for one in wrong]
    cases.append(Case(uses[0], True, {"case.npz": npz(x_train=IMAGES[:, :, :6])}))
    damaged = mixed("npz", npz(), 30)
    return cases + [Case(uses[number % 2], False, {"case.npz": one}) for number, one in enumerate(damaged)]


def pictures() -> list[Case]:
    """Folders of images: laid out wrongly, or with damaged ones among them."""
    whole = {}
    for form in ("png", "jpeg", "gif", "webp", "bmp", "tiff"):
        picture = Image.fromarray(IMAGES[0].transpose(1, 2, 0)).resize((24, 24))
        whole[form] = saved(lambda file, form=form, picture=picture: picture.save(file, form))
    good, scan = PNG, ["scan", *BASES["scan"], "--clean", "folder:case"]
    classes = {f"case/{number}/good.png": good for number in range(10)}
    layouts = [
        {"case/notes.txt": b"nothing"},
        {**classes, "case/loose.png": good},
        {"case/cat/a.png": good},
        {"case/train/a.png": good, "case/test/a.png": good},
        {**classes, "case/cat/a.png": good},
        {**classes, "case/00/a.png": good},
        {**classes, "case/999999999/a.png": good},
        {**classes, "case/10/a.png": good},
        {**classes, "case/0/other.png": saved(lambda file: Image.new("RGB", (9, 7)).save(file, "png"))},
        {"case": good},
    ]
    cases = [Case(scan, True, layout) for layout in layouts]
    for form, content in whole.items():
        damaged = mixed(form, content, 8)
        cases += [Case(scan, False, {**classes, f"case/1/bad.{form}": one}) for one in damaged]
    return cases


class Hostile:
    """What a pickle would call if it were trusted."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("executed",)


def checkpoints() -> list[Case]:
    """Checkpoints: of other things, of other networks, hostile, and damaged."""
    other = {name: torch.zeros(3) for name in MODEL}
    wrong = [
        pt(one)
        for one in (3, [], {}, "text", {"a": 1}, {"a": Hostile()}, Hostile(), SMALL, other, SMALL | {"z": SMALL})
    ]
    wrong += [pt(Hostile(), _use_new_zipfile_serialization=False), pt({1: torch.zeros(1)})]
    use = ["scan", *BASES["scan"], "--model", "case.pt"]
    cases = [Case(use, True, {"case.pt": one}) for one in wrong]
    tensors = save(MODEL)
    header = {"huge": 2**63 - 1, "long": 10_000_000, "zero": 0}
    cases += [Case(use, True, {"case.pt": size.to_bytes(8, "little") + tensors[8:]}) for size in header.values()]
    for name, content in (
        ("safetensors", tensors),
        ("pt", pt(MODEL)),
        ("old", OLD),
    ):
        cases += [Case(use, False, {"case.pt": one}) for one in mixed(name, content, 16)]
        # Most of a file is weights; what names and shapes them stands at one end.
        cases += [
            Case(use, False, {"case.pt": one + content[3000:]}) for one in mixed(f"{name} head", content[:3000], 13)[5:]
        ]
    return cases


def records() -> list[Case]:
    """Run folders for a report."""
    contents = [
        b"",
        b"{}",
        b"[]",
        b"null",
        b'{"schema": 1}',
        b'{"schema": 99}',
        b'{"schema": "x"}',
        b"[" * 9999,
        b"\xff",
    ]
    return [Case(["report", "case"], True, {"case/record.json": content}) for content in contents]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The working folder, with right inputs of every kind, a finished run, and things that are no files."""
    here = tmp_path_factory.mktemp("fuzz") / "around" / "here"
    (here / "folder").mkdir(parents=True)
    contents = {"data.npz": npz(), "model.pt": pt(MODEL), "run.toml": TOML, "empty": b"", "unreadable": b"x"}
    for name, content in contents.items():
        (here / name).write_bytes(content)
    (here / "unreadable").chmod(0)
    (here / "loop").symlink_to("loop")
    os.mkfifo(here / "fifo")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(here)
        patch.setenv("BDCORE_CACHE", str(here.parent.parent / "cache"))
        quick = ["--set", "train.epochs=1", "--set", "finetune.epochs=1", "--out", "done"]
        with pytest.raises(SystemExit) as caught:
            main(["run", *BASES["run"], *quick])
        assert caught.value.code == 0
        yield here


def seen(folder: Path) -> dict[str, tuple[int, int]]:
    """Every file with its size and time of modification, and every folder."""
    found: dict[str, tuple[int, int]] = {}
    for place, folders, files in os.walk(folder):
        found |= {os.path.join(place, name): (0, 0) for name in folders}
        for name in files:
            status = os.lstat(os.path.join(place, name))
            found[os.path.join(place, name)] = (status.st_size, status.st_mtime_ns)
    return found


def refuse_training(*_: object, **__: object) -> None:
    raise BdcoreError(TRAINING)


@pytest.fixture
def check(
    world: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Iterator[Callable[[Case], bool]]:
    """Run a case in this process, in which no training can begin, and hold its end against the rules; whether the
    input was taken."""
    monkeypatch.setattr(torch.Tensor, "backward", refuse_training)
    monkeypatch.setattr(torch.autograd, "grad", refuse_training)

    def run(case: Case) -> bool:
        for name, content in case.files.items():
            (world / name).parent.mkdir(parents=True, exist_ok=True)
            (world / name).write_bytes(content)
        before = seen(world.parent)
        began = time.process_time()
        with pytest.raises(SystemExit) as caught:
            main(case.arguments)
        seconds = time.process_time() - began
        told = capfd.readouterr()
        judge(case, caught.value.code, told.err, TRAINING in told.err)
        assert seconds < 10
        left = seen(world.parent)
        if caught.value.code in (1, 2):
            assert left == before
        assert not list((world.parent.parent / "cache").glob("tmp/*"))
        stages = (world.parent.parent / "cache").glob("stages/*/*")
        assert all((stage / "manifest.json").is_file() for stage in stages)
        assert not (world / "executed").exists()
        return TRAINING in told.err or caught.value.code == 0

    names = set(seen(world.parent))
    yield run
    for made in sorted(set(seen(world.parent)) - names):
        if os.path.isdir(made):
            shutil.rmtree(made)
        elif os.path.lexists(made):
            os.remove(made)


def judge(case: Case, code: object, stderr: str, began: bool) -> None:
    """The rules that hold for every end: its code, and what is said."""
    brief = re.sub(r"(.)\1{30,}", r"\1...\1", f"{case.arguments}: {code}, {stderr}")[-2000:]
    assert code in (0, 1, 2, 3), brief
    assert not (case.wrong and (began or code in (0, 3))), f"not refused: {brief}"
    assert "Traceback" not in stderr or "--traceback" in case.arguments, brief
    assert "error: unexpected" not in stderr, brief
    errors = re.findall(r"^error: ", stderr, re.MULTILINE | re.IGNORECASE)
    assert len(errors) == (code in (1, 2)), brief


@pytest.mark.parametrize(
    "case",
    [
        *numbered("option", options()),
        *numbered("together", contradictions()),
        *numbered("noise", line_noise()),
        *numbered("toml", configurations()),
        *numbered("npz", arrays()),
        *numbered("picture", pictures()),
        *numbered("checkpoint", checkpoints()),
        *numbered("record", records()),
    ],
)
def test_wrong_input_is_refused_in_one_sentence_and_leaves_nothing(case: Case, check: Callable[[Case], bool]):
    check(case)


RIGHT = [Case([name, *base], False) for name, base in BASES.items()]
RIGHT += [
    Case(["run", "--config", "case.toml"], False, {"case.toml": TOML}),
    Case(["run", *BASES["run"], "--dataset", "npz:case.npz"], False, {"case.npz": npz()}),
    Case(["scan", *BASES["scan"], "--clean", "npz:case.npz"], False, {"case.npz": npz()}),
    Case(["scan", *BASES["scan"], "--clean", "folder:case"], False, {f"case/{n}/a.png": PNG for n in range(10)}),
    Case(["scan", *BASES["scan"], "--model", "case.pt"], False, {"case.pt": save(MODEL)}),
    Case(["scan", *BASES["scan"], "--model", "case.pt"], False, {"case.pt": OLD}),
    Case(["defend", *BASES["defend"], "--out", "new.pt"], False),
]
"""What the wrong inputs above were made from."""


@pytest.mark.parametrize("case", numbered("right", RIGHT))
def test_what_is_right_is_taken(case: Case, check: Callable[[Case], bool]):
    assert check(case), case.arguments


@pytest.mark.parametrize("number", range(15))
def test_a_damaged_record_is_no_harm(number: int, world: Path, check: Callable[[Case], bool]):
    content = mixed("record", (world / "done" / "record.json").read_bytes(), 15)[number]
    check(Case(["report", "case"], False, {"case/record.json": content}))


@pytest.mark.parametrize(
    "arguments",
    [
        ["rnu"],
        ["run", "--plugin"],
        ["run", "--seed", "x"],
        ["new", "defense", "../mine"],
        ["report", "empty"],
        ["plugins", "--jsn"],
        ["doctor", "x" * 9999],
        ["new", "defense", "\udcff\u202e"],
        ["run", "--plugin", "finetune", "--config", "fifo"],
        ["scan", *BASES["scan"], "--model", "empty"],
    ],
)
def test_a_process_of_its_own_ends_alike(arguments: list[str], world: Path):
    before = seen(world.parent)
    script = Path(sys.executable).with_name("bdcore")
    done = subprocess.run(
        [script, *map(os.fsencode, arguments)], cwd=world, capture_output=True, timeout=60, check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    judge(Case(arguments), done.returncode, done.stderr.decode("utf-8", "replace"), began=False)
    assert done.stdout == b""
    assert seen(world.parent) == before
