"""How far the confidence of `bdcore scan` can be trusted: models of known truth, clean and backdoored, scanned.

    python -m benchmarks.scan_calibration [--cifar10 FILE.npz] [--seeds N] [--results DIR] [--fit]

Trains classifiers on digits (and, with --cifar10, on 10,000 images of CIFAR-10), half of them with BadNets patches of
changing target and pattern, scans each with 72 clean images that nobody trained on (CIFAR-10: 500), and fits Platt's
sigmoid to the largest evidence. Writes scan_calibration.json and .md to benchmarks/results; with --fit also
bdcore/inspection/calibration.json, from which `bdcore scan` takes its confidence. A model that was scanned before comes
from the cache.
"""

import argparse
import json
import platform
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from scipy.optimize import minimize
from scipy.special import expit
from sklearn.metrics import roc_auc_score

import bdcore.inspection
from bdcore.config import resolve
from bdcore.context import Context
from bdcore.inspection import ask, scan
from bdcore.machine import processor_name
from bdcore.pipeline import run
from bdcore.plugins import Host
from bdcore.stages.data import clean_set
from bdcore.store import write_bytes, write_json

OPTIONS = {"inversion": "pixel", "anomaly": 2.0, "target": None}
"""What of MCLDef's options the evidence and the verdict depend on."""

FAMILIES: dict[str, dict[str, Any]] = {
    "wrn10_1 on digits": {"dataset": "digits", "model": "wrn10_1", "images": 72, "settings": []},
    "wrn16_1 on digits": {"dataset": "digits", "model": "wrn16_1", "images": 72, "settings": []},
    "wrn16_1 on CIFAR-10": {
        "model": "wrn16_1",
        "images": 500,
        "settings": [
            "dataset.limit=10000", "train.epochs=8", "train.lr=0.2", "train.batch_size=128", "train.schedule=onecycle",
            "train.flip=true", "train.crop=4",
        ],
    },
}  # fmt: skip


def main() -> None:
    """Measure, write, and fit where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cifar10", metavar="FILE.npz", help="x_train, y_train, x_test, y_test of CIFAR-10")
    parser.add_argument("--seeds", type=int, default=8, help="models of each kind, clean and backdoored (default 8)")
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--fit", action="store_true", help="let bdcore scan use the figures")
    asked = parser.parse_args()
    families = {name: family for name, family in FAMILIES.items() if "dataset" in family}
    if asked.cifar10:
        families["wrn16_1 on CIFAR-10"] = {**FAMILIES["wrn16_1 on CIFAR-10"], "dataset": f"npz:{asked.cifar10}"}
    rows = [
        row
        for name, family in families.items()
        for seed in range(asked.seeds)
        for row in (scanned(name, family, seed, attacked=False), scanned(name, family, seed, attacked=True))
        if print(json.dumps(row), flush=True) is None
    ]
    report = {"machine": processor_name(), "threads": torch.get_num_threads(), "torch": torch.__version__}
    report |= {"python": platform.python_version(), "options": OPTIONS, "fit": fitted(rows), "rows": rows}
    write_json(asked.results / "scan_calibration.json", report)
    write_bytes(asked.results / "scan_calibration.md", markdown(report).encode())
    if asked.fit:
        known = {"mcldef": {"options": OPTIONS, **fitted(rows)}}
        write_json(Path(bdcore.inspection.__file__).with_name("calibration.json"), known)


def scanned(name: str, family: dict[str, Any], seed: int, *, attacked: bool) -> dict[str, Any]:
    """One model: trained by a run, then scanned as a stranger would."""
    target = (3 * seed + 1) % 10
    number = 1 + (7 * seed) % 50  # 0 is all black
    attack = [f"attack.target={target}", "attack.pattern=black_white", f"attack.number={number}"]
    with TemporaryDirectory() as place:
        folder = Path(place)
        host = Host()
        config = resolve(
            host,
            plugins=["badnets"] if attacked else ["finetune"],
            no_attack=not attacked,
            dataset=family["dataset"],
            model=family["model"],
            seed=seed,
            settings=[*family["settings"], *(attack if attacked else ["finetune.epochs=1"])],
            out=folder / "run",
        )
        record = run(config, host)
        dataset = config.dataset.plugin.cls(config.dataset.config).load(config.dataset_argument)
        few = clean_set(
            type(dataset)(dataset.name, dataset.test, dataset.test, dataset.classes),
            family["images"] / len(dataset.test),
            Context(seed=seed),
        )
        np.savez(folder / "clean.npz", x=few.images.numpy(), y=few.labels.numpy())
        host = Host()
        request = ask(
            host, "scan", plugins=["mcldef"], model=folder / "run" / "victim.safetensors",
            clean=f"npz:{folder / 'clean.npz'}", seed=seed, out=folder / "scan",
        )  # fmt: skip
        found = scan(request, host)
    verdict = found["verdict"]
    return {
        "models": name,
        "seed": seed,
        "backdoored": attacked,
        "target": target if attacked else None,
        "accuracy": record["victim"]["clean_accuracy"],
        "asr": record["victim"]["asr"],
        "said": verdict["backdoored"],
        "named": verdict["target"],
        "evidence": max(verdict["evidence"]),
    }


def fitted(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Platt's sigmoid over the largest evidence, and how good it is on models that it was not fitted to."""
    evidence = np.array([row["evidence"] for row in rows])
    truth = np.array([row["backdoored"] for row in rows])
    said = np.array([row["said"] for row in rows])
    intercept, slope = _platt(evidence, truth)
    others = [np.arange(len(rows)) != left for left in range(len(rows))]
    parts = [_platt(evidence[rest], truth[rest]) for rest in others]
    chances = np.array([expit(a + b * one) for (a, b), one in zip(parts, evidence, strict=True)])
    groups = ", ".join(dict.fromkeys(row["models"] for row in rows))
    return {
        "intercept": round(intercept, 4),
        "slope": round(slope, 4),
        "on": f"{groups}; the backdoors are BadNets patches of 3 x 3 pixels",
        "models": len(rows),
        "clean": int((~truth).sum()),
        "auroc": round(float(roc_auc_score(truth, evidence)), 4),
        "brier": round(float(((chances - truth) ** 2).mean()), 4),
        "true_positives": round(float(said[truth].mean()), 4),
        "false_positives": round(float(said[~truth].mean()), 4),
    }


def _platt(evidence: Any, truth: Any) -> tuple[float, float]:
    """Intercept and slope of the greatest likelihood for Platt's smoothed targets (N + 1) / (N + 2) and 1 / (N + 2)."""
    positive, negative = truth.sum(), (~truth).sum()
    target = np.where(truth, (positive + 1) / (positive + 2), 1 / (negative + 2))

    def loss(parameters: Any) -> float:
        score = parameters[0] + parameters[1] * evidence
        return float((np.logaddexp(0, score) - target * score).sum())

    best = minimize(loss, np.array([0.0, 1.0]), method="BFGS").x
    return float(best[0]), float(best[1])


def markdown(report: dict[str, Any]) -> str:
    """The table."""
    fit, rows = report["fit"], report["rows"]
    lines = [
        "# Calibration of `bdcore scan --plugin mcldef`",
        "",
        "`python -m benchmarks.scan_calibration --fit`, with `--cifar10` where such models are listed",
        "",
        f"{report['machine']}, {report['threads']} threads, torch {report['torch']}.",
        "",
        f"{fit['models']} models, {fit['clean']} of them clean: {fit['on']}. AUROC of the largest evidence "
        f"{fit['auroc']:.3f}; Brier score, each model left out of the fit in turn, {fit['brier']:.4f}. "
        f"Chance of a backdoor = 1 / (1 + exp(-({fit['intercept']} + {fit['slope']} evidence))).",
        "",
        "| models | truth | scanned | accuracy | ASR | called backdoored | target right | evidence |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name in dict.fromkeys(row["models"] for row in rows):
        for attacked in (False, True):
            part = [row for row in rows if row["models"] == name and row["backdoored"] == attacked]
            asr = f"{100 * mean(row['asr'] for row in part):.1f}" if attacked else "-"
            right = f"{sum(row['named'] == row['target'] for row in part)}" if attacked else "-"
            spread = [row["evidence"] for row in part]
            deviation = f" ± {stdev(spread):.1f}" if len(spread) > 1 else ""
            lines.append(
                f"| {name} | {'backdoored' if attacked else 'clean'} | {len(part)} "
                f"| {100 * mean(row['accuracy'] for row in part):.1f} | {asr} | {sum(row['said'] for row in part)} "
                f"| {right} | {mean(spread):.1f}{deviation}, {min(spread):.1f} to {max(spread):.1f} |"
            )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
