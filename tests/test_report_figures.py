"""Intervals, embeddings, figures and the lines that repeat a run, against other libraries and closed forms."""

import re
import shlex
import subprocess
import tomllib
from io import BytesIO
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.figure import Figure
from PIL import Image
from scipy import stats

from bdcore.analysis import figures
from bdcore.analysis.drawing import COLOURS, Drawing, label, styled
from bdcore.analysis.embedding import company, embed
from bdcore.analysis.intervals import Interval, student_t, wilson
from bdcore.analysis.records import Epoch
from bdcore.analysis.repeat import command, toml
from bdcore.analysis.runs import Features
from bdcore.config import resolve
from bdcore.plugins import Host

SVG = "{http://www.w3.org/2000/svg}"


@settings(max_examples=60, deadline=None)
@given(count=st.integers(1, 10_000), share=st.floats(0, 1), confidence=st.sampled_from([0.9, 0.95, 0.99]))
def test_wilson_is_scipys(count: int, share: float, confidence: float):
    hits = round(share * count)
    expected = stats.binomtest(hits, count).proportion_ci(confidence, method="wilson")
    assert wilson(hits / count, count, confidence) == pytest.approx((expected.low, expected.high), abs=1e-12)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(0, 1), min_size=2, max_size=12))
def test_student_t_is_scipys_cut_off_at_0_and_1(values: list[float]):
    found = student_t(values)
    if np.ptp(values) < 1e-9:
        assert found == pytest.approx((values[0], values[0]), abs=1e-7)
        return
    expected = stats.t.interval(0.95, len(values) - 1, np.mean(values), stats.sem(values))
    assert found == pytest.approx(np.clip(expected, 0, 1), abs=1e-9)


def groups(classes: int, each: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Features of well separated classes, and their labels."""
    generator = np.random.default_rng(seed)
    centres = 20 * generator.normal(size=(classes, 16))
    labels = np.repeat(np.arange(classes), each)
    return centres[labels] + generator.normal(size=(len(labels), 16)), labels


def test_an_embedding_keeps_neighbours_and_is_the_same_again():
    features, labels = groups(4, 20)
    clean, triggered = embed(features, features[:10])
    assert clean.shape == (80, 2)
    assert triggered.shape == (10, 2)
    assert np.array_equal(embed(features, features[:10])[0], clean)
    apart = np.linalg.norm(clean[:, None] - clean, axis=2)
    np.fill_diagonal(apart, np.inf)
    assert (labels[apart.argmin(1)] == labels).mean() > 0.95


@pytest.mark.parametrize("count", [1, 2, 7, 40])
def test_few_or_equal_features_have_places_too(count: int):
    for features in (np.ones((count, 3)), np.zeros((count, 1)), np.eye(count, 5)):
        places, _ = embed(features, features[:0])
        assert places.shape == (count, 2)
        assert np.isfinite(places).all()


def test_company_is_that_of_the_nearest():
    features, labels = groups(5, 8)
    at_home = company(features, labels, features + 0.01, labels, 3)
    assert at_home == (pytest.approx(8 / 40), 1.0)  # those of class 3 themselves lie among the target's
    moved = company(features, labels, np.repeat(features[labels == 3], 5, 0), labels, 3)
    assert moved == (1.0, pytest.approx(8 / 40))
    assert company(features, labels, features, labels, None).target is None


def every_figure() -> list[Drawing]:
    features, labels = groups(3, 10)
    generator = np.random.default_rng(1)
    scores = generator.normal(size=300)
    scores[:3] = np.inf, -np.inf, np.nan
    epochs = [Epoch(phase="a", epoch=n, epochs=9, figures={"loss": 10.0**-n, "accuracy": n / 9}) for n in range(1, 10)]
    return [
        figures.embedding("mine", Features(features, features[:5]), labels, labels[:5], 1),
        figures.embedding("victim", Features(features, features[:0]), labels, labels[:0], None),
        figures.curves("train", "train", epochs),
        figures.curves("defend mine", "one", epochs[:1]),
        figures.curves("defend mine", "none", [Epoch(phase="a", epoch=1, epochs=1, figures={"loss": None})]),
        figures.isolation("mine", scores, np.arange(5, 25), np.arange(7, 17)),
        figures.isolation("mine", np.full(20, np.nan), np.arange(3), np.zeros(0, np.int64)),
        figures.evidence("mine", [0.1, None, 3.5], 2),
        figures.evidence("mine", [0.0] * 43, None),
        figures.scores([figures.Row("no defense", 0.9, Interval(0.8, 0.95), None, None)]),
    ]


def test_every_figure_is_an_element_of_the_page_and_a_picture():
    for drawing in every_figure():
        svg = drawing.svg("f3-")
        root = ElementTree.fromstring(svg)
        assert root.tag == f"{SVG}svg"
        assert root.get("role") == "img"
        assert root.get("aria-label") == drawing.alt != ""
        assert not any(colour in svg for colour in COLOURS.values())
        assert "<metadata" not in svg
        ids = [element.get("id") for element in root.iter() if element.get("id")]
        assert len(ids) == len(set(ids))
        assert all(name.startswith("f3-") for name in ids)
        assert {*re.findall(r"url\(#([^)]+)\)", svg), *re.findall(r'href="#([^"]+)"', svg)} == set(ids)
    picture = Image.open(BytesIO(drawing.png))
    assert picture.getpixel((0, 0))[:3] == (255, 255, 255)
    assert picture.width > 600


def test_figures_are_the_same_again():
    one, other = every_figure(), every_figure()
    for place in (0, 2, 5, 7):
        assert one[place].svg() == other[place].svg()
    assert one[7].png == other[7].png


def test_bars_stand_at_their_values():
    drawing = figures.evidence("mine", [1.0, 2.0, 4.0], 2)
    (axes,) = drawing.figure.axes
    assert [bar.get_height() for bar in axes.patches] == [1.0, 2.0, 4.0]
    assert "class 2 (4)" in drawing.caption


def test_a_histogram_counts_every_sample_once():
    scores = np.concatenate([np.zeros(70), np.linspace(1, 2, 30)])
    drawing = figures.isolation("mine", scores, np.arange(70, 100), np.arange(90, 100))
    counts = [patch.get_data().values.sum() for patch in drawing.figure.axes[0].patches[::2]]
    assert counts == [70, 30]
    assert drawing.caption == "10 of 100 training images set aside, 10 of them poisoned."


@pytest.mark.parametrize("name", ["$\\frac", "a\x00b\ud800", "<&>", "名", "x" * 500])
def test_any_name_can_stand_in_a_figure(name: str):
    with styled():
        figure = Figure(figsize=(3, 2))
        figure.subplots().set_title(label(name))
    drawing = Drawing("some", "title", label(name), "", figure)
    root = ElementTree.fromstring(drawing.svg())
    assert label(name) in ["".join(text.itertext()) for text in root.iter(f"{SVG}text")]
    assert len(drawing.png) > 100


JSON = st.recursive(
    st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: st.lists(inner, max_size=3),
    max_leaves=5,
)  # fmt: skip
KEYS = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)


@settings(max_examples=150, deadline=None)
@given(st.dictionaries(KEYS, JSON | st.dictionaries(KEYS, JSON, max_size=3), max_size=5))
def test_toml_reads_back(config: dict):
    assert tomllib.loads(toml(config)) == config


def test_a_surrogate_that_toml_has_no_form_for_does_not_fail():
    assert tomllib.loads(toml({"name": "a\ud800"})) == {"name": "a?"}


def test_the_lines_repeat_a_run(tmp_path: Path):
    argument = 'it\'s a "file"\\with $HOME `x`\n中.npz'
    asked = {"dataset": f"npz:{argument}", "settings": ("train.epochs=3", "attack.target=4", "mcldef.lr=0.003")}
    config = resolve(Host(), plugins=("badnets", "mcldef", "abl"), seed=7, **asked)
    lines = command("run", config.record())
    writing, _, run = lines.rpartition("\n")
    subprocess.run(["sh", "-c", writing], cwd=tmp_path, check=True)
    assert shlex.split(run) == ["bdcore", "run", "--config", "repeat.toml"]
    assert resolve(Host(), file=tmp_path / "repeat.toml").record() == config.record()


def test_the_lines_repeat_a_run_without_attack(tmp_path: Path):
    config = resolve(Host(), plugins=("finetune",), no_attack=True)
    (tmp_path / "a.toml").write_text(toml(config.record()))
    assert resolve(Host(), file=tmp_path / "a.toml").record() == config.record()


def test_the_line_repeats_a_scan(tmp_path: Path):
    from bdcore.cli.scan import command as scan
    from bdcore.inspection import ask

    model = tmp_path / "it's a model.pt"
    model.touch()
    asked = {"model": model, "arch": "resnet18", "clean": "folder:my photos", "size": "32x48", "normalize": "imagenet"}
    config = ask(Host(), "scan", plugins=("mcldef",), settings=("mcldef.lr=0.003",), seed=3, **asked).record()
    lines = f'bdcore() {{ printf "%s\\0" "$@"; }}\n{command("scan", config)}'
    done = subprocess.run(["sh", "-c", lines], capture_output=True, text=True, check=True)
    name, *arguments = done.stdout.split("\0")[:-1]
    assert name == "scan"
    given = scan.make_context("scan", arguments).params
    del given["as_json"]
    assert ask(Host(), "scan", **given).record() == config
