"""The report in a real browser: sorting, narrow windows, dark mode, and nothing that its policy forbids."""

import base64
import hashlib
import html
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from bdcore.analysis.page import render
from bdcore.analysis.runs import read_run

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no Chromium")

FLAGS = [
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update",
    "--disable-sync", "--disable-extensions", "--no-first-run", "--hide-scrollbars", "--enable-logging=stderr",
    "--window-size=1200,900", "--virtual-time-budget=3000", "--dump-dom",
]  # fmt: skip

DARK = "--blink-settings=preferredColorScheme=0"

SORT = """
const table = document.querySelector("table.sortable"), seen = [];
const read = (column) => [...table.tBodies[0].rows].map((row) => row.cells[column].textContent);
const states = () => [...table.tHead.rows[0].cells].map((cell) => cell.getAttribute("aria-sort"));
for (const column of [1, 2, 2, 0, 3]) {
  const button = table.tHead.rows[0].cells[column].querySelector("button");
  button.focus();
  const focused = document.activeElement === button;
  button.click();
  seen.push([column, read(column), states(), focused]);
}
tell(seen);
"""
COLOURS = """
const probe = document.createElement("i");
document.body.append(probe);
const found = {};
for (const name of ["paper", "raised", "ink", "muted", "link", "blue", "vermillion", "green", "purple", "orange"]) {
  probe.style.color = `var(--${name})`;
  found[name] = getComputedStyle(probe).color.match(/[0-9.]+/g).slice(0, 3).map(Number);
}
const paper = getComputedStyle(document.body).backgroundColor.match(/[0-9.]+/g).slice(0, 3).map(Number);
const text = getComputedStyle(document.querySelector("svg text")).fill.match(/[0-9.]+/g).slice(0, 3).map(Number);
tell({ ...found, body: paper, text });
"""
WIDTH = """
const all = (selector) => [...document.querySelectorAll(selector)];
const free = all("body *").filter((one) => !one.closest("svg") && !one.parentElement.closest(".scroll"));
tell({
  window: innerWidth,
  page: document.documentElement.scrollWidth,
  widest: Math.max(...free.map((one) => one.getBoundingClientRect().right)),
  scrolling: all(".scroll").filter((one) => one.scrollWidth > one.clientWidth).length,
});
"""


def record(seed: int, asr: float | None) -> dict:
    """A run with curves, evidence, and a defense whose attack success is `asr`."""
    scores = {"clean_accuracy": 0.97 - seed / 50, "asr": asr, "ra": asr, "target_class_accuracy": None}
    scores |= {"nontarget_accuracy": None, "seconds": 10.0**seed, "peak_memory_bytes": None, "images": 1000}
    verdict = {"backdoored": True, "target": 1, "evidence": [0.5, 3.0, 1.0], "correct": True, "target_rank": 1}
    defense = {"name": f"a{seed}-defense-of-a-rather-long-name", **scores, "der": 0.5, "verdict": verdict}
    plugins = [("badnets", "attack"), (defense["name"], "defense")]
    return {
        "schema": 2, "run": {"id": f"r{seed}"}, "seed": seed, "config": {"run": {"seed": seed, "model": "wrn16_1" * 9}},
        "plugins": [
            {"name": name, "kind": kind, "distribution": "bdcore", "version": "1", "needs": ["model"], "oracle": []}
            for name, kind in plugins
        ],
        "dataset": {"name": "digits", "train": 100, "test": 50, "classes": 3},
        "poison": {"count": 10, "rate": 0.1, "class_rate": None, "triggered": 40}, "victim": scores,
        "defenses": [{**defense, "isolation": None, "triggers": [], "notes": {}}],
        "curves": {"train": [{"phase": "train", "epoch": 1, "epochs": 1, "figures": {"loss": 1.0, "accuracy": 0.5}}]},
        "versions": {"bdcore": "1"}, "device": {"device": "cpu"}, "artifacts": {}, "figures": {},
    }  # fmt: skip


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Three runs compared, the success of the middle one not measured."""
    folders = []
    for seed, asr in enumerate((0.5, None, 0.02)):
        folders.append(tmp_path_factory.mktemp("run"))
        (folders[-1] / "record.json").write_text(json.dumps(record(seed, asr)))
    return render([read_run(folder) for folder in folders]).html


def browse(folder: Path, text: str, *flags: str) -> tuple[str, list[str]]:
    """The document after the page's scripts have run, and what the browser's console said."""
    (folder / "page.html").write_text(text, "utf-8")
    profile = f"--user-data-dir={folder / 'profile'}"
    call = [str(BROWSER), *FLAGS, *flags, profile, (folder / "page.html").as_uri()]
    done = subprocess.run(call, capture_output=True, text=True, check=True, timeout=120)
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


def told(folder: Path, page: str, script: str, *flags: str) -> object:
    """What `script`, added to a copy of the page whose policy admits it, hands to `tell`."""
    script = f"const tell = (value) => {{ document.body.dataset.told = JSON.stringify(value); }};\n{script}"
    document, console = browse(folder, with_script(page, script), *flags)
    assert console == []
    (found,) = re.findall(r'data-told="([^"]*)"', document)
    return json.loads(html.unescape(found))


def with_script(page: str, script: str) -> str:
    hashed = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    admitted = page.replace("script-src &#39;", f"script-src &#39;sha256-{hashed}&#39; &#39;")
    assert admitted != page
    return admitted.replace("</body>", f"<script>{script}</script></body>")


def test_a_table_is_sorted_by_its_headings(tmp_path: Path, page: str):
    seen = told(tmp_path, page, SORT)
    names = ["no defense", *(f"a{seed}-defense-of-a-rather-long-name" for seed in range(3))]
    for (column, values, states, focused), way in zip(seen, (1, 1, -1, 1, 1), strict=True):
        assert focused
        assert states == [("ascending" if way == 1 else "descending") if n == column else None for n in range(12)]
        if column == 2:
            assert values == sorted([names[0], names[0], *names], reverse=way == -1)
        if column == 0:
            assert values == ["1", "1", "2", "2", "3", "3"]
    accuracy = [float(value.split()[0]) for value in seen[-1][1]]
    assert accuracy == [93.0, 93.0, 95.0, 95.0, 97.0, 97.0]


def test_figures_that_are_missing_come_last(tmp_path: Path, page: str):
    seen = told(tmp_path, page, SORT.replace("[1, 2, 2, 0, 3]", "[4, 4]"))
    upwards, downwards = [[value.split()[0] for value in values] for _, values, _, _ in seen]
    assert upwards == ["2.0", "2.0", "50.0", "50.0", "-", "-"]
    assert downwards == ["50.0", "50.0", "2.0", "2.0", "-", "-"]


def test_the_console_is_silent_and_the_policy_forbids_what_is_not_the_pages(tmp_path: Path, page: str):
    assert browse(tmp_path, page)[1] == []
    intruder = "<script>document.body.dataset.intruder = 1</script><img src='https://example.org/a.png'>"
    document, console = browse(tmp_path, page.replace("</main>", f"{intruder}</main>"))
    assert "data-intruder" not in document
    assert sum("Content Security Policy" in line for line in console) == 2


def luminance(colour: list[float]) -> float:
    """Relative luminance of sRGB, by WCAG 2.2."""
    linear = [part / 3294.6 if part <= 10.31475 else ((part / 255 + 0.055) / 1.055) ** 2.4 for part in colour]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: list[float], other: list[float]) -> float:
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("flags", [(), (DARK,)], ids=["light", "dark"])
def test_it_can_be_read_in_light_and_in_the_dark(tmp_path: Path, page: str, flags: tuple[str, ...]):
    found = told(tmp_path, page, COLOURS, *flags)
    assert found["body"] == found["paper"]
    assert (luminance(found["paper"]) < 0.05) == bool(flags)
    for paper in (found["paper"], found["raised"]):
        assert all(contrast(found[name], paper) >= 4.5 for name in ("ink", "muted", "link", "text"))
        assert all(contrast(found[name], paper) >= 3 for name in ("blue", "vermillion", "green", "purple", "orange"))


def test_a_phone_shows_it_without_scrolling_sideways(tmp_path: Path, page: str):
    # A browser's window cannot be as narrow as a phone, a frame can.
    script = f"const tell = (value) => parent.postMessage(JSON.stringify(value), '*');\n{WIDTH}"
    (tmp_path / "inner.html").write_text(with_script(page, script), "utf-8")
    frame = (
        "<!doctype html><body><script>onmessage = (event) => { document.body.dataset.told = event.data; };</script>"
        f"<iframe src='{(tmp_path / 'inner.html').as_uri()}' style='width: 360px; height: 800px; border: 0'></iframe>"
    )
    document, _ = browse(tmp_path, frame)
    (found,) = re.findall(r'data-told="([^"]*)"', document)
    seen = json.loads(html.unescape(found))
    assert seen["window"] == 360
    assert seen["page"] == 360
    assert seen["widest"] <= 360
    assert seen["scrolling"] > 0  # what is wider scrolls by itself
