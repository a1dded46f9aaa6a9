"""`bdcore run`: from a data set to a defended model, and an account of both."""

import json
from pathlib import Path

import click

from bdcore.cli.standard_output import kept_clear


@click.command(
    "run",
    epilog="""\b
Examples:
  bdcore run --plugin mcldef
  bdcore run --plugin mcldef --plugin finetune --set attack.target=3 --seed 1
  bdcore run --plugin badnets --plugin mcldef --dataset npz:cifar10.npz --out results/cifar10
  bdcore run --plugin mcldef --no-attack --json
\b
`bdcore options` describes every KEY. A FILE.toml holds the same keys as tables:
  plugins = ["badnets", "mcldef"]
  [train]
  epochs = 30""",
)
@click.option(
    "--plugin",
    "plugins",
    multiple=True,
    metavar="NAME",
    help="A plugin of any kind; repeat it for several: at most one attack, defenses in this order, observers. A "
    "defense without an attack meets badnets. `bdcore plugins` lists them.",
)
@click.option(
    "--dataset", metavar="NAME[:ARGUMENT]", help="Data set, and what it needs to be found.  [default: digits]"
)
@click.option("--model", metavar="NAME", help="Architecture, for instance preact_resnet18.  [default: wrn16_1]")
@click.option("--seed", type=int, metavar="N", help="Seed from which everything random follows.  [default: 0]")
@click.option("--no-attack", is_flag=True, help="Train on clean data: what does a defense harm where nothing is wrong?")
@click.option(
    "--set",
    "settings",
    multiple=True,
    metavar="KEY=VALUE",
    help="An option; KEY is dataset.*, attack.*, train.*, PLUGINNAME.* or run.*. May be repeated.",
)
@click.option(
    "--config",
    "file",
    type=click.Path(path_type=Path),
    metavar="FILE.toml",
    help="Options from a file; the command line wins over it, and --plugin replaces all of its plugins.",
)
@click.option(
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    metavar="DIR",
    help="Where record and models go.  [default: runs/NAME, named after the run]",
)
@click.option("--device", metavar="auto|cpu|cuda[:N]", help="Where to compute.  [default: auto]")
@click.option(
    "--precision",
    metavar="auto|fp32|bf16",
    help="Of training; auto: bf16 where the device computes it natively.  [default: auto]",
)
@click.option("--json", "as_json", is_flag=True, help="Print the record as JSON, and nothing else, on stdout.")
def command(
    plugins: tuple[str, ...],
    dataset: str | None,
    model: str | None,
    seed: int | None,
    no_attack: bool,
    settings: tuple[str, ...],
    file: Path | None,
    out: Path | None,
    device: str | None,
    precision: str | None,
    as_json: bool,
) -> None:
    """Poison a data set, train a victim on it, defend it, and measure both.

    Name at least one plugin; everything else has a default. Finished stages are kept: the same run again, or one that
    was interrupted, goes on from where it was.
    """
    with kept_clear():
        from bdcore.cli.display import shown
        from bdcore.config import resolve
        from bdcore.pipeline import run, run_folder
        from bdcore.plugins import Host

        host = Host()
        config = resolve(
            host,
            plugins=plugins,
            dataset=dataset,
            model=model,
            seed=seed,
            no_attack=no_attack,
            settings=settings,
            file=file,
            device=device,
            precision=precision,
            out=out,
        )
        with shown(host):
            record = run(config, host)

    if as_json:
        click.echo(json.dumps(record, indent=2))
        return
    from bdcore.cli.result import show

    show(record)
    click.echo(f"Record: {run_folder(config) / 'record.json'}")
