"""Compiled operators change the speed of a run and the last bits of its numbers, not what it finds."""

import json

import pytest

from bdcore import cli
from bdcore.ops.native import load

RUN = [
    "run", "--plugin", "badnets", "--plugin", "mcldef", "--model", "wrn10_1", "--device", "cpu", "--precision", "fp32",
    "--set", "train.epochs=8", "--set", "mcldef.target=0", "--set", "mcldef.inversion_epochs=25", "--json",
]  # fmt: skip


def record_of(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> dict:
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    printed = capsys.readouterr()
    assert caught.value.code == 0, printed.err
    return json.loads(printed.out)


@pytest.mark.skipif(not load()["cpu"].loaded, reason=f"no compiled operators here: {load()['cpu'].detail}")
def test_a_whole_run_finds_the_same_with_and_without_compiled_operators(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("BDCORE_CACHE", str(tmp_path / "cache"))  # shared: neither may be answered with the other's work
    found = {}
    for how in ("native", "reference"):
        monkeypatch.setenv("BDCORE_OPS", how)
        found[how] = record_of([*RUN, "--out", str(tmp_path / how)], capsys)
        assert found[how]["device"]["operators"] == how
    native, reference = found["native"], found["reference"]
    assert native["victim"]["asr"] > 0.9
    for stage in ("victim", "defense"):
        one, two = (run["victim"] if stage == "victim" else run["defenses"][0] for run in (native, reference))
        for score in ("clean_accuracy", "asr", "ra"):
            assert one[score] == pytest.approx(two[score], abs=0.04), (stage, score)
    models = [run["artifacts"]["mcldef"]["sha256"] for run in (native, reference)]
    assert models[0] != models[1], "one was answered with the other's work"
