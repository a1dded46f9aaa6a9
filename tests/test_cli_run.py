"""`bdcore run` as its user meets it: real processes, a real terminal, real files."""

import json
import os
import pty
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bdcore.cli import display, main, result
from bdcore.context import Progress
from bdcore.plugins import Host

QUICK = ["--model", "wrn10_1", "--set", "train.epochs=2", "--set", "finetune.epochs=1", "--device", "cpu"]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One cache for the runs below, which share a victim."""
    return tmp_path_factory.mktemp("cache")


def bdcore_run(cache: Path, *arguments: str, path: Path | None = None, terminal: bool = False) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of `bdcore run`; stderr is a terminal where asked."""
    environment = os.environ | {"BDCORE_CACHE": str(cache), "OMP_NUM_THREADS": "1", "COLUMNS": "120", "TERM": "xterm"}
    if path:
        environment["PYTHONPATH"] = str(path)
    master, slave = pty.openpty() if terminal else os.pipe()
    process = subprocess.Popen(
        [sys.executable, "-c", "import bdcore.cli; bdcore.cli.main()", "run", *arguments],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=slave,
        text=True,
    )
    os.close(slave)
    said = b""
    while True:
        try:
            piece = os.read(master, 65536)
        except OSError:  # how Linux ends a terminal that nobody holds any more
            break
        if not piece:
            break
        said += piece
    os.close(master)
    stdout = process.communicate(timeout=120)[0]
    return process.returncode, stdout, said.decode()


def screen(said: str) -> str:
    """What a terminal was sent, without its control sequences."""
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", said)


def test_a_run_draws_bars_on_a_terminal_and_then_answers_from_the_cache(cache: Path, tmp_path: Path):
    out = tmp_path / "out"
    asked = ["--plugin", "finetune", *QUICK, "--out", str(out)]
    status, stdout, stderr = bdcore_run(cache, *asked, terminal=True)
    assert status == 0, stderr
    assert "━" in stderr, "a bar"
    assert re.search(r"train .*[12]/2, loss [\d.e+-]+, [\d,]+ images/s, \d:\d\d:\d\d left", screen(stderr))
    assert re.search(r"train: done in \d+\.\d s", screen(stderr))
    record = json.loads((out / "record.json").read_text())
    victim, defense = record["victim"], record["defenses"][0]
    rows = {line.split("  ")[0].strip(): line.split() for line in stdout.splitlines() if line.strip()}
    assert rows["no defense"][2] == f"{100 * victim['clean_accuracy']:.1f}"
    assert rows["no defense"][4] == f"{100 * victim['asr']:.1f}"
    figures = [f"{100 * defense[name]:.1f}" for name in ("asr", "ra", "der", "target_class_accuracy")]
    assert rows["finetune"][3:7] == figures
    assert str(out / "record.json") in stdout
    assert "\x1b" not in stdout
    assert "━" not in stdout

    status, stdout, stderr = bdcore_run(cache, *asked, "--json")
    assert status == 0, stderr
    assert json.loads(stdout) == record
    assert "\x1b" not in stderr
    assert "train: from the cache" in stderr.splitlines()
    assert "finetune on digits" in stderr.splitlines()[0]


def test_what_a_plugin_prints_cannot_corrupt_the_record(cache: Path, tmp_path: Path):
    info = tmp_path / "noisy-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: noisy\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[bdcore]\nnoisy = noisy\n")
    (tmp_path / "noisy.py").write_text(
        """
import os
from bdcore import Defense, Outcome, hookimpl

print("imported")

class Noisy(Defense):
    name = "noisy"

    def __call__(self, given, context):
        print("by print")
        os.write(1, b"by descriptor\\n")
        os.system("echo by a child")
        return Outcome()

@hookimpl
def bdcore_defense():
    return Noisy
"""
    )
    status, stdout, stderr = bdcore_run(
        cache, "--plugin", "noisy", *QUICK[:4], "--device=cpu", "--json", "--out", str(tmp_path / "out"), path=tmp_path
    )
    assert status == 0, stderr
    record = json.loads(stdout)
    assert record["defenses"][0]["clean_accuracy"] == record["victim"]["clean_accuracy"]
    for line in ("imported", "by print", "by descriptor", "by a child"):
        assert line in stderr


def test_without_attack_the_harm_is_shown(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setenv("BDCORE_CACHE", str(cache))
    with pytest.raises(SystemExit) as ended:
        main(["run", "--plugin", "finetune", "--no-attack", *QUICK, "--out", str(tmp_path)])
    stdout, stderr = capsys.readouterr()
    assert ended.value.code == 0, stderr
    record = json.loads((tmp_path / "record.json").read_text())
    row = next(line for line in stdout.splitlines() if line.startswith("finetune")).split()
    change = 100 * (record["defenses"][0]["clean_accuracy"] - record["victim"]["clean_accuracy"])
    assert float(row[2]) == pytest.approx(change, abs=0.11)
    assert row[3:7] == ["-"] * 4
    assert "finetune: no attack, accuracy" in stdout


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "nothing to run: name a defense (abl, finetune, mcldef, mesa) or an attack (badnets, "),
        (["--plugin", "mcldeff"], "Did you mean mcldef?"),
        (
            ["--plugin", "badnets", "--set", "train.epochs=0"],
            "--set train.epochs=0: must be greater than or equal to 1",
        ),
        (["--plugin", "badnets", "--device", "gpu"], "auto, cpu, cuda or cuda:N"),
        (["--plugin", "badnets", "--config", "nowhere.toml"], "nowhere.toml"),
        (["--plugin", "badnets", "--seed", "one"], "'one' is not a valid integer"),
    ],
)
def test_wrong_use_ends_with_2_and_one_clear_line(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        main(["run", *arguments])
    stdout, stderr = capsys.readouterr()
    assert ended.value.code == 2
    assert stdout == ""
    assert said in stderr
    assert "Traceback" not in stderr
    assert list(tmp_path.iterdir()) == []


def test_help_describes_every_option(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as ended:
        main(["run", "--help"])
    assert ended.value.code == 0
    said = capsys.readouterr().out
    listed = set(re.findall(r"^  --([a-z-]+)", said, re.MULTILINE))
    assert listed >= {"plugin", "dataset", "model", "seed", "no-attack", "set", "config", "out", "device", "precision"}
    assert "json" in listed
    assert "bdcore run --plugin mcldef\n" in said


def lines_of(epochs: int, seconds_each: float, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> list[str]:
    """What is written where stderr is no terminal, while a phase of `epochs` takes its time."""
    now = [0.0]
    monkeypatch.setattr(display, "monotonic", lambda: now[0])
    host = Host()
    with display.shown(host):
        for epoch in range(1, epochs + 1):
            now[0] += seconds_each
            left = seconds_each * (epochs - epoch)
            progress = Progress("purify", epoch, epochs, {"loss": 0.12345, "other": 1.0}, 1234.5, left)
            host.hook.bdcore_epoch_finished(stage="defend mine", progress=progress)
    captured = capsys.readouterr()
    assert captured.out == ""
    return captured.err.splitlines()


def test_plain_lines_are_few_and_hold_the_last(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    last = "defend mine: purify: epoch 100/100, loss 0.123, 1,234 images/s, 0:00:00 left"
    assert lines_of(100, 0.01, monkeypatch, capsys) == [last]
    slow = lines_of(100, 2.0, monkeypatch, capsys)
    assert 8 <= len(slow) <= 12
    assert slow[-1] == last
    hours = lines_of(100, 120.0, monkeypatch, capsys)
    assert len(hours) == 100, "one every two minutes is not too much"
    assert len(lines_of(3, 10.0, monkeypatch, capsys)) == 3


def test_a_phase_that_ends_early_has_its_last_line(capsys: pytest.CaptureFixture[str]):
    host = Host()
    with display.shown(host):
        progress = Progress("invert", 3, 100, {"loss": 1.0}, 10.0, 0.0)
        host.hook.bdcore_epoch_finished(stage="defend mine", progress=progress)
        host.hook.bdcore_warning(message="something [odd]")
    assert capsys.readouterr().err.splitlines() == [
        "defend mine: invert: epoch 3/100, loss 1, 10 images/s, 0:00:00 left",
        "warning: something [odd]",
    ]


def record_of(victim: dict[str, Any], **defense: Any) -> dict[str, Any]:
    """A record with one defense, "mine"."""
    none = {"asr": None, "ra": None, "der": None, "target_class_accuracy": None, "verdict": None, "isolation": None}
    return {
        "poison": {"count": 5000, "rate": 0.1, "class_rate": 0.526} if "asr" in victim else None,
        "plugins": [{"name": "mine", "kind": "defense", "oracle": []}],
        "victim": {**none, "seconds": 1.0, **victim},
        "defenses": [{"name": "mine", **none, "seconds": 2.0, **defense}],
    }


ATTACKED = {"clean_accuracy": 0.989, "asr": 1.0, "ra": 0.0, "target_class_accuracy": 0.99}


@pytest.mark.parametrize(
    ("record", "said", "unsaid"),
    [
        (
            record_of(ATTACKED, clean_accuracy=0.961, asr=0.012, der=0.98),
            "mine: attack success 100.0% -> 1.2%, accuracy 98.9% -> 96.1% (2.8 points lost).",
            "warning",
        ),
        (record_of(ATTACKED, clean_accuracy=0.989, asr=0.97), "did not remove the backdoor", "damaged"),
        (record_of(ATTACKED, clean_accuracy=0.11, asr=0.0), "mine damaged the classifier", "did not remove"),
        # What was published of ABL against Blended: an ASR that looks like a success.
        (
            record_of({**ATTACKED, "clean_accuracy": 0.9347, "asr": 0.9992}, clean_accuracy=0.7656, asr=0.0048),
            "mine damaged the classifier",
            "did not remove",
        ),
        (record_of({**ATTACKED, "asr": 0.2}, clean_accuracy=0.989, asr=0.2), "did not take hold", "did not remove"),
        (
            record_of({"clean_accuracy": 0.9}, clean_accuracy=0.91),
            "mine: no attack, accuracy 90.0% -> 91.0% (1.0 p",
            "%%",
        ),
        (
            record_of(
                {"clean_accuracy": 0.9},
                clean_accuracy=0.9,
                verdict={"backdoored": True, "target": 3, "evidence": [], "correct": False},
            ),
            "warning: mine says that the model is backdoored towards class 3, which is wrong.",
            "lost",
        ),
        (
            record_of(
                ATTACKED,
                clean_accuracy=0.989,
                asr=0.0,
                verdict={"backdoored": True, "target": None, "evidence": [], "correct": True},
            ),
            "mine: says that the model is backdoored, which is right.",
            "warning",
        ),
        (
            record_of(
                ATTACKED,
                clean_accuracy=0.989,
                asr=0.0,
                isolation={"isolated": 500, "precision": 0.998, "recall": 0.0998, "auroc": 0.98765},
            ),
            "mine: set 500 training images aside, 99.8% of them poisoned (10.0% of all poisoned ones; as a ranking of "
            "all images AUROC 0.988).",
            "warning",
        ),
        (
            record_of({"clean_accuracy": 0.9}, clean_accuracy=0.9, isolation={"isolated": 500, "precision": 0.0}),
            "mine: set 500 training images aside, none of them poisoned: there is no attack.",
            "%%",
        ),
    ],
)
def test_figures_in_words(record: dict[str, Any], said: str, unsaid: str):
    text = "\n".join(result.sentences(record))
    assert said in text
    assert unsaid not in text


def test_an_oracle_is_marked_and_explained(capsys: pytest.CaptureFixture[str]):
    verdict = {"backdoored": True, "target": 3, "evidence": [], "correct": False}
    record = record_of(ATTACKED, clean_accuracy=0.961, asr=0.012, ra=0.93, der=0.98, verdict=verdict)
    record["plugins"][0]["oracle"] = ["target"]
    result.show(record)
    stdout = capsys.readouterr().out
    row = next(line for line in stdout.splitlines() if line.startswith("mine†"))
    assert row.split() == ["mine†", "96.1", "-2.8", "1.2", "93.0", "98.0", "-", "class", "3", "(wrong)", "2.0"]
    assert "Poisoned: 5,000 training images, 10.0% of all, 52.6% of those labelled with the target class." in stdout
    assert "† mine was told what a defender does not know: target." in stdout
