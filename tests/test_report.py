"""`bdcore report`: the page says what the records say, runs nothing of theirs, and fails with one clear error."""

import copy
import hashlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from io import BytesIO
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save
from scipy import stats

from bdcore.analysis.page import render
from bdcore.analysis.runs import read_run
from bdcore.cli.report import command
from bdcore.errors import BdcoreError, StoreError, UsageError

TEST, TRIGGERED, TRAIN = 60, 50, 300
VOID = {"meta", "img", "br", "input", "link", "hr"}


def record_of(seed: int) -> dict[str, Any]:
    """A run of BadNets with two defenses, one of which was told the target."""
    cost = {"seconds": 12.5, "peak_memory_bytes": 2**30, "images": 1234}
    victim = {"clean_accuracy": 57 / TEST, "asr": 49 / TRIGGERED, "ra": 0.02}
    victim |= {"target_class_accuracy": 1.0, "nontarget_accuracy": 0.94}
    verdict = {"backdoored": True, "target": 2, "evidence": [0.1, 0.2, 3.4], "correct": True, "target_rank": 1}
    first = {
        "name": "mcldef", **victim, "clean_accuracy": 54 / TEST, "asr": (2 + seed) / TRIGGERED, "der": 0.93,
        "verdict": verdict, "isolation": None, "triggers": [{"target": 2, "asr": 0.99, "size": 4.5}], **cost,
        "notes": {"trigger_size": 4.5},
    }  # fmt: skip
    isolation = {"isolated": 20, "precision": 0.9, "recall": 0.6, "fpr": 0.01, "f1": 0.72, "auroc": 0.97}
    second = {**first, "name": "abl", "asr": 1.0, "verdict": None, "isolation": isolation, "triggers": [], "notes": {}}
    plugins = [
        {"name": name, "kind": kind, "distribution": "bdcore", "version": "0.1.0", "needs": needs, "oracle": oracle}
        for name, kind, needs, oracle in (
            ("digits", "dataset", [], []),
            ("badnets", "attack", [], []),
            ("mcldef", "defense", ["clean", "model"], ["target"] if seed == 1 else []),
            ("abl", "defense", ["arch", "suspect"], []),
        )
    ]
    epochs = [
        {"phase": "train", "epoch": n, "epochs": 4, "figures": {"loss": 2 / n, "accuracy": n / 4}} for n in range(1, 5)
    ]
    return {
        "schema": 2, "command": "run", "run": {"id": f"digits-badnets-seed{seed}"}, "seed": seed,
        "config": {"plugins": ["badnets", "mcldef", "abl"], "no_attack": False,
                   "run": {"seed": seed, "model": "wrn16_1", "clean_fraction": 0.1}, "attack": {"target": 2}},
        "plugins": plugins,
        "dataset": {"name": "digits", "train": TRAIN, "test": TEST, "classes": 3, "fingerprint": "0"},
        "poison": {"count": 30, "rate": 0.1, "class_rate": 0.3, "triggered": TRIGGERED},
        "victim": {**victim, **cost}, "defenses": [first, second],
        "curves": {"train": epochs, "defend mcldef": [{**epoch, "phase": "purify"} for epoch in epochs]},
        "versions": {"python": "3.11", "bdcore": "0.1.0"},
        "device": {"device": "cpu", "name": "a processor", "threads": 2, "precision": "fp32", "operators": "native"},
        "artifacts": {}, "figures": {},
    }  # fmt: skip


def lay(folder: Path, record: dict[str, Any], *, bare: bool = False) -> Path:
    """Write a run folder with this record, with the files of a run unless it is bare."""
    folder.mkdir()
    record = copy.deepcopy(record)
    generator = np.random.default_rng(0)
    poisoned = np.arange(30, dtype=np.int64)
    scores = generator.normal(size=TRAIN).astype(np.float32) + 3 * (np.arange(TRAIN) < 30)
    labels, true = np.repeat(np.arange(3), 12), np.repeat(np.arange(2), 5)
    files = {
        "poison": {"index": poisoned},
        "abl-suspects": {"index": np.argsort(-scores)[:20].copy(), "scores": scores.astype(np.float32)},
        "features": {"labels": labels, "triggered_labels": true},
    }
    for model in ("victim", "mcldef", "abl"):
        files["features"][f"{model}.clean"] = (np.eye(3)[labels] * 9 + generator.normal(size=(36, 3))).astype("f2")
        files["features"][f"{model}.triggered"] = generator.normal(size=(10, 3)).astype("f2")
    for name, tensors in {} if bare else files.items():
        content = save(tensors)
        (folder / f"{name}.safetensors").write_bytes(content)
        sha256 = hashlib.sha256(content).hexdigest()
        record["artifacts"][name] = {"path": f"{name}.safetensors", "sha256": sha256}
    for name in () if bare else ("attack", "mcldef-class2"):
        encoded = BytesIO()
        Image.fromarray(generator.integers(0, 255, (30, 80, 3), dtype=np.uint8)).save(encoded, "PNG")
        (folder / f"{name}.png").write_bytes(encoded.getvalue())
        record["figures"][name] = f"{name}.png"
    (folder / "record.json").write_text(json.dumps(record))
    return folder


def report(*arguments: object) -> None:
    """`bdcore report` in this process; what goes wrong is raised."""
    command.main([str(one) for one in arguments], standalone_mode=False)


class Element:
    def __init__(self, tag: str, attributes: dict[str, str | None]) -> None:
        self.tag, self.attributes, self.children = tag, attributes, []

    def all(self, tag: str) -> list["Element"]:
        inside = [child for child in self.children if isinstance(child, Element)]
        return [found for child in inside for found in ([child] if child.tag == tag else []) + child.all(tag)]

    @property
    def text(self) -> str:
        parts = [child if isinstance(child, str) else child.text for child in self.children]
        return " ".join(" ".join(parts).split())


class Tree(HTMLParser):
    """A page as elements; a tag that is closed out of turn is an error."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.root = Element("", {})
        self.open = [self.root]
        self.feed(html)
        self.close()
        assert self.open == [self.root]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len({name for name, _ in attrs}) == len(attrs)
        self.handle_startendtag(tag, attrs)
        if tag not in VOID:
            self.open.append(self.open[-1].children[-1])

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.open[-1].children.append(Element(tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop().tag == tag

    def handle_data(self, data: str) -> None:
        self.open[-1].children.append(data)


def every(element: Element) -> list[Element]:
    return [found for child in element.children if isinstance(child, Element) for found in [child, *every(child)]]


def table(root: Element, label: str) -> list[dict[str, str]]:
    """Rows of the table in the region of this name, by heading."""
    (region,) = [one for one in root.all("div") if one.attributes.get("aria-label") == label]
    head, *rows = region.all("tr")
    names = [cell.text for cell in every(head) if cell.tag == "th"]
    cells = [[cell.text for cell in every(row) if cell.tag in ("th", "td")] for row in rows]
    return [dict(zip(names, row, strict=True)) for row in cells]


def between(hits: int, of: int) -> str:
    """A share in percent with Wilson's interval, by scipy."""
    ends = stats.binomtest(hits, of).proportion_ci(0.95, method="wilson")
    return f"{100 * hits / of:.1f} {100 * ends.low:.1f} to {100 * ends.high:.1f}"


def squeezed(text: str) -> str:
    """A cell's text, an interval's dash in words."""
    return re.sub(r"\s*\u2013\s*", " to ", text)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("runs")
    return [lay(folder / f"seed{seed}", record_of(seed)) for seed in range(3)]


@pytest.fixture(scope="module")
def single(runs: list[Path]) -> str:
    report(runs[0])
    return (runs[0] / "report.html").read_text("utf-8")


@pytest.fixture(scope="module")
def several(runs: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    page = tmp_path_factory.mktemp("page") / "several.html"
    report(*runs, "--out", page)
    return page


def test_a_page_says_what_the_record_says(single: str):
    root = Tree(single).root
    assert root.all("h1")[0].text == "mcldef and abl against badnets on digits"
    rows = table(root, "Scores")
    assert [row["Classifier"] for row in rows] == ["no defense", "mcldef", "abl"]
    assert [squeezed(row["Accuracy"]) for row in rows] == [between(57, TEST), between(54, TEST), between(54, TEST)]
    assert [squeezed(row["Attack success"]) for row in rows] == [between(49, 50), between(2, 50), between(50, 50)]
    assert [row["Change"] for row in rows] == ["-", "-5.0", "-5.0"]
    assert rows[1]["Verdict"] == "class 2 right"
    given = table(root, "What each defense was given")
    assert given[0]["Was given"] == "clean images: 10% of the training set, about 30; the suspicious model"
    assert {row["Told beyond that (oracle)"] for row in given} == {"nothing"}
    text = root.text
    assert "mcldef: says that the model is backdoored towards class 2, which is right." in text
    assert "abl did not remove the backdoor." in text
    assert "Recovered trigger towards class 2: changes 4.5 pixels, sends 99.0% of images there." in text
    assert len(root.all("img")) == 2
    titles = [figure.all("strong")[0].text for figure in root.all("figure")]
    assert titles == [
        "The attack.", "mcldef: class 2.", "no defense.", "mcldef.", "abl.", "abl.", "mcldef.", "train.",
        "defend mcldef: purify.",
    ]  # fmt: skip


def test_a_page_is_sound_and_needs_nothing_else(single: str, several: Path):
    for html in (single, several.read_text("utf-8")):
        root = Tree(html).root
        elements = every(root)
        ids = [one.attributes["id"] for one in elements if "id" in one.attributes]
        assert len(ids) == len(set(ids))
        levels = [int(one.tag[1]) for one in elements if re.fullmatch(r"h\d", one.tag)]
        assert levels[0] == 1
        assert levels.count(1) == 1
        assert all(after <= before + 1 for before, after in pairwise(levels))
        assert all(one.attributes["alt"] for one in root.all("img"))
        assert all(one.attributes["aria-label"] for one in root.all("svg"))
        for one in elements:
            for name in ("src", "href", "xlink:href", "action"):
                assert re.match(r"#|data:image/(png|webp);base64,|$", one.attributes.get(name) or "")
        assert not re.search(r"url\((?!#)|@import|@font-face", html)
        (policy,) = [one.attributes["content"] for one in root.all("meta") if "http-equiv" in one.attributes]
        assert policy.startswith("default-src 'none'; img-src data:;")
        assert len(html) < 2_000_000


def test_several_runs_are_compared(several: Path):
    root = Tree(several.read_text("utf-8")).root
    rows = table(root, "All classifiers")
    assert [(row["Run"], row["Defense"], row["Seed"]) for row in rows] == [
        (str(seed + 1), f"{name}{'†' if (seed, name) == (1, 'mcldef') else ''}", str(seed))
        for seed in range(3) for name in ("no defense", "mcldef", "abl")
    ]  # fmt: skip
    assert [squeezed(row["Attack success"]) for row in rows[1::3]] == [between(2 + seed, 50) for seed in range(3)]
    low, high = stats.t.interval(0.95, 2, 0.06, stats.sem([0.04, 0.06, 0.08]))
    over = table(root, "Over seeds")
    assert squeezed(over[1]["Attack success"]) == f"6.0 {100 * max(0, low):.1f} to {100 * high:.1f}"
    assert [row["Accuracy"].split(maxsplit=1)[1] for row in over] == ["all alike"] * 3
    assert [one.attributes["id"] for one in root.all("section") if "id" in one.attributes] == ["run1", "run2", "run3"]


def test_runs_that_differ_in_more_than_the_seed_are_not_averaged(runs: list[Path], tmp_path: Path):
    other = record_of(5)
    other["config"]["attack"]["target"] = 1
    page = render([read_run(runs[0]), read_run(lay(tmp_path / "other", other, bare=True))]).html
    assert "Over seeds" not in page


def test_an_old_record_leaves_out_what_it_has_not(tmp_path: Path):
    record = record_of(0)
    record["schema"] = 1
    for part in ("command", "curves"):
        del record[part]
    del record["poison"]["triggered"]
    for plugin in record["plugins"]:
        del plugin["needs"]
    root = Tree(render([read_run(lay(tmp_path / "old", record, bare=True))]).html).root
    text = root.text
    assert text.count("older bdcore") == 5  # given twice, features, histogram, curves
    assert "attack success has no interval" in text
    assert [row["Attack success"] for row in table(root, "Scores")] == ["98.0", "4.0", "100.0"]
    assert squeezed(table(root, "Scores")[0]["Accuracy"]) == between(57, TEST)
    assert root.all("img") == []


def test_a_run_without_attack_or_defense_has_a_page(tmp_path: Path):
    record = record_of(0)
    record |= {"poison": None, "defenses": [], "plugins": record["plugins"][:1]}
    record["victim"] |= {"asr": None, "ra": None, "target_class_accuracy": None, "nontarget_accuracy": None}
    root = Tree(render([read_run(lay(tmp_path / "clean", record, bare=True))]).html).root
    assert root.all("h1")[0].text == "no attack on digits"


@pytest.mark.parametrize("backdoored", [True, False])
def test_a_scan_and_a_defense_of_an_own_model_have_a_page(tmp_path: Path, backdoored: bool):
    record = record_of(0)
    for part in ("dataset", "poison", "victim"):
        del record[part]
    model = {"path": "some/net.pt", "sha256": "0" * 64, "form": "pt", "arch": {"name": "resnet18"}}
    model["clean_accuracy"] = 0.95
    clean = {"source": "folder:photos", "images": 100, "classes": 3, "labelled": True}
    verdict = {
        "backdoored": backdoored,
        "target": 1 if backdoored else None,
        "class_name": "cat" if backdoored else None,
    }
    verdict |= {"confidence": 0.875, "evidence": [0.5, 9.0, 0.25]}
    record |= {"model": model, "clean": clean, "suspect": None, "config": {"command": "scan", "model": "some/net.pt"}}
    scan = {**record, "command": "scan", "defenses": [], "verdict": verdict, "triggers": []}
    root = Tree(
        render([read_run(lay(tmp_path / "scan", {**scan, "calibration": {"auroc": 0.96875}}, bare=True))]).html
    ).root
    assert root.all("h1")[0].text == "Scan of net.pt"
    assert ("Backdoored: class 1 (cat)" in root.text) == backdoored
    assert ("No backdoor found" in root.text) != backdoored
    assert "Confidence 87.5%." in root.text
    assert "0.9688" in root.text
    assert "Most speaks against class 1 (9)." in root.text
    own = {"name": "mcldef", "clean_accuracy": None, "agreement": 0.97, "verdict": None, "isolation": {"isolated": 4}}
    own |= {"triggers": [], "seconds": 1.0, "peak_memory_bytes": 1, "images": 1, "notes": {}}
    defend = {**record, "command": "defend", "defenses": [own]}
    root = Tree(render([read_run(lay(tmp_path / "defend", defend, bare=True))]).html).root
    assert root.all("h1")[0].text == "mcldef on net.pt"
    assert "as it came" in root.text
    assert "97.0% of the clean images keep their class" in root.text
    assert "set 4 training images aside" in root.text
    model |= {"path": None, "sha256": None, "form": None, "clean_accuracy": None}
    defend |= {"clean": None, "suspect": {"source": "folder:downloaded", "images": 7}}
    root = Tree(render([read_run(lay(tmp_path / "anew", defend, bare=True))]).html).root
    assert root.all("h1")[0].text == "mcldef on a new resnet18"
    assert "7 suspect images" in root.text


HOSTILE = '<script>alert(1)</script>"><img src=x onerror=alert(2)>{{7*7}}\ud800\x00$\\frac'


def test_nothing_of_a_hostile_record_runs(tmp_path: Path, single: str):
    def spoilt(value: Any, key: str = "") -> Any:
        if isinstance(value, dict):
            return {one: spoilt(inner, one) for one, inner in value.items()}
        if isinstance(value, list):
            return [spoilt(one) for one in value]
        kept = ("command", "kind")
        return value + HOSTILE if isinstance(value, str) and key not in kept else value

    record = spoilt(record_of(0))
    record["defenses"][0]["notes"] = {HOSTILE: HOSTILE}
    record["curves"] = {HOSTILE: [{"phase": HOSTILE, "epoch": 1, "epochs": 1, "figures": {HOSTILE: 1.0}}]}
    folder = lay(tmp_path / "hostile", record)
    for name in ("a<b>.png", "mcldef-class2.png"):
        content = json.loads((folder / "record.json").read_text())
        (folder / name).write_bytes((folder / "attack.png").read_bytes())
        content["figures"][HOSTILE + name] = name
        (folder / "record.json").write_text(json.dumps(content))
    report(folder, "--png", tmp_path / "figures")
    root = Tree((folder / "report.html").read_text("utf-8")).root
    assert [script.text for script in root.all("script")] == [script.text for script in Tree(single).root.all("script")]
    elements = every(root)
    assert not [one for one in elements for name in one.attributes if name.startswith("on")]
    assert {one.attributes["src"][:10] for one in root.all("img")} == {"data:image"}
    assert "{{7*7}}" in root.text
    assert all(
        path.parent == tmp_path / "figures" and path.suffix == ".png" for path in (tmp_path / "figures").iterdir()
    )


def test_the_page_and_the_figures_are_the_same_again(runs: list[Path], single: str, tmp_path: Path):
    report(runs[0] / "record.json", "--out", tmp_path / "again.html", "--png", tmp_path / "some" / "figures")
    assert (tmp_path / "again.html").read_text("utf-8") == single
    names = {path.stem for path in (tmp_path / "some" / "figures").iterdir()}
    assert {"scores", "features-victim", "isolation-abl", "evidence-mcldef", "curves-train-train"} <= names
    for path in (tmp_path / "some" / "figures").iterdir():
        Image.open(path).verify()
    assert not list(tmp_path.rglob("*.tmp"))


def test_a_large_picture_does_not_make_a_heavy_page(runs: list[Path], tmp_path: Path):
    folder = lay(tmp_path / "run", record_of(0))
    noise = np.random.default_rng(0).integers(0, 255, (700, 1800, 3), dtype=np.uint8)
    Image.fromarray(noise).save(folder / "attack.png")
    assert (folder / "attack.png").stat().st_size > 3_000_000
    page = render([read_run(folder)]).html
    assert "data:image/webp;base64," in page
    assert len(page) < 2_000_000


Spoil = Callable[[Path, dict[str, Any]], None]


def write(path: Path, content: bytes) -> None:
    path.write_bytes(content)


def features(folder: Path, record: dict[str, Any], **tensors: np.ndarray) -> None:
    """Put other tensors into the features' file, under the right checksum."""
    content = save(tensors)
    (folder / "features.safetensors").write_bytes(content)
    record["artifacts"]["features"]["sha256"] = hashlib.sha256(content).hexdigest()


@pytest.mark.parametrize(
    ("kind", "said", "spoil"),
    [
        (UsageError, "no record.json", lambda folder, record: (folder / "record.json").unlink()),
        (UsageError, "damaged", lambda folder, record: write(folder / "record.json", b'{"schema": 2,')),
        (UsageError, "damaged", lambda folder, record: write(folder / "record.json", b"[" * 200_000)),
        (UsageError, "damaged", lambda folder, record: write(folder / "record.json", b"\xff\xfe")),
        (UsageError, "no record", lambda folder, record: write(folder / "record.json", b"[1]")),
        (UsageError, "schema 9, this bdcore reads 1 and 2", lambda folder, record: record.update(schema=9)),
        (UsageError, "schema True", lambda folder, record: record.update(schema=True)),
        (UsageError, "victim", lambda folder, record: record.update(victim=None)),
        (UsageError, "victim.asr", lambda folder, record: record["victim"].update(asr=1.5)),
        (UsageError, "victim.asr", lambda folder, record: record["victim"].update(asr=float("nan"))),
        (UsageError, "defenses.0.name", lambda folder, record: record["defenses"][0].update(name=3)),
        (UsageError, "plugins.0", lambda folder, record: record.update(plugins=[1])),
        (UsageError, "curves.train", lambda folder, record: record.update(curves={"train": "loss"})),
        (UsageError, "command", lambda folder, record: record.update(command="rm")),
        (StoreError, "poison.safetensors is missing", lambda folder, record: (folder / "poison.safetensors").unlink()),
        (StoreError, "SHA-256 differs", lambda folder, record: write(folder / "features.safetensors", b"other")),
        (StoreError, "`victim.clean`", lambda folder, record: features(
            folder, record, labels=np.arange(3), **{"victim.clean": np.zeros((4, 2))})),
        (StoreError, "`index`", lambda folder, record: features(folder, record, labels=np.zeros(3))),
        (StoreError, "attack.png is missing", lambda folder, record: (folder / "attack.png").unlink()),
        (StoreError, "attack.png is no PNG", lambda folder, record: write(folder / "attack.png", b"GIF89a")),
        (StoreError, "none of its folder's", lambda folder, record: record["figures"].update(attack="../key.png")),
        (StoreError, "none of its folder's", lambda folder, record: record["artifacts"]["poison"].update(path="/x")),
        (StoreError, "no plain file", lambda folder, record: (
            (folder / "attack.png").unlink(), (folder / "attack.png").symlink_to("mcldef-class2.png"))),
    ],
)  # fmt: skip
def test_a_bad_run_folder_is_one_error_and_nothing_is_written(
    tmp_path: Path, kind: type[BdcoreError], said: str, spoil: Spoil
):
    folder = lay(tmp_path / "run", record_of(0))
    record = json.loads((folder / "record.json").read_text())
    before = json.dumps(record)
    spoil(folder, record)
    if json.dumps(record) != before:
        (folder / "record.json").write_text(json.dumps(record))
    with pytest.raises(kind, match=re.escape(said)) as caught:
        report(folder, "--out", tmp_path / "page.html", "--png", tmp_path / "figures")
    assert str(folder) in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_missing_folder_is_named(tmp_path: Path):
    with pytest.raises(UsageError, match="no run folder"):
        report(tmp_path / "absent")
    with pytest.raises(UsageError, match=r"has no record\.json\. `bdcore run` prints where its record is"):
        report(tmp_path)


def test_results_that_cannot_be_written_are_one_error_and_leave_nothing(runs: list[Path], tmp_path: Path):
    with pytest.raises(UsageError, match="is a folder"):
        report(runs[0], "--out", tmp_path)
    with pytest.raises(UsageError, match=r"must end with \.html"):
        report(runs[0], "--out", runs[0] / "record.json")
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="no folder"):
        report(runs[0], "--out", tmp_path / "page.html", "--png", tmp_path / "file")
    with pytest.raises(StoreError, match="file/inside"):
        report(runs[0], "--out", tmp_path / "page.html", "--png", tmp_path / "file" / "inside")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_is_read_only_is_one_error(runs: list[Path], tmp_path: Path):
    tmp_path.chmod(0o555)
    with pytest.raises(StoreError, match="permission denied"):
        report(runs[0], "--out", tmp_path / "page.html")


def test_the_command_does_not_import_torch(runs: list[Path], tmp_path: Path):
    program = (
        "import sys\nfrom bdcore.cli.report import command\n"
        f"command.main([{str(runs[0])!r}, '--out', {str(tmp_path / 'a.html')!r}], standalone_mode=False)\n"
        "assert not {'torch', 'matplotlib.pyplot'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", program], check=True, timeout=120)
