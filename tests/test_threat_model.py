"""What a defense can reach, and what it may do: real runs with defenses that try."""

import gc
import json
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from types import CodeType, FrameType, FunctionType, ModuleType
from typing import TYPE_CHECKING, Any, ClassVar, get_args

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from bdcore import Context, Defense, DefenseInput, Outcome, build
from bdcore.artifacts import Dataset, Need, Poisoned, Scores, Triggered
from bdcore.cli import main
from bdcore.config import Chosen, RunConfig, resolve
from bdcore.context import derive_seed
from bdcore.contract import Attack, AttackConfig, DatasetPlugin
from bdcore.errors import BdcoreError, PluginError, ThreatModelError
from bdcore.pipeline import run
from bdcore.plugins import Host, Loaded
from bdcore.store import Entry, Store, load_tensors

if TYPE_CHECKING:
    from conftest import Site

SEED = 1_234_567
NEEDS: tuple[Need, ...] = get_args(Need)


class Spy(Defense):
    """A defense that does what a test wants."""

    name = "spy"
    needs: ClassVar[frozenset[Need]] = frozenset(NEEDS)
    act: ClassVar[Callable[[DefenseInput, Context], Any]]

    def __call__(self, given: DefenseInput, context: Context) -> Outcome:
        return type(self).act(given, context)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, np.ndarray]:
    """Real handwritten digits, 8 x 8: 600 to train, 300 to test, no image twice."""
    images, labels = load_digits(return_X_y=True)
    _, first = np.unique(images, axis=0, return_index=True)
    first = np.sort(first)[:900]
    grey, labels = (images[first].reshape(-1, 1, 8, 8) * 15).astype(np.uint8), labels[first]
    return {"x_train": grey[:600], "y_train": labels[:600], "x_test": grey[600:], "y_test": labels[600:]}


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory, data: dict[str, np.ndarray]) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    np.savez(folder / "digits.npz", **data)
    return folder


@pytest.fixture
def spied(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Any]]:
    """Run a defense that does `act`; all these runs share their victim."""
    monkeypatch.setenv("BDCORE_CACHE", str(cache))

    def go(act: Callable[[DefenseInput, Context], Any], needs: frozenset[Need] = Spy.needs) -> dict[str, Any]:
        cls = type("Spy", (Spy,), {"act": staticmethod(act), "needs": needs})
        host = Host()
        config: RunConfig = resolve(
            host, plugins=["badnets"], dataset=f"npz:{cache / 'digits.npz'}", model="wrn10_1", device="cpu",
            precision="fp32", seed=SEED, settings=["train.epochs=1", "attack.target=7"], out=tmp_path / "out",
        )  # fmt: skip
        loaded = Loaded("spy", "defense", "tests", "1", f"{tmp_path}", cls)  # code: never the same, so never cached
        return run(replace(config, defenses=(Chosen(loaded, Spy.Config()),)), host)

    return go


def reachable(*roots: object) -> list[object]:
    """Every object that the roots lead to: attributes, closures, containers, whatever the garbage collector knows.

    Left out are modules, classes, code and the globals of functions: what any import gives to anyone.
    """
    seen: dict[int, object] = {}
    waiting = list(roots)
    while waiting:
        found = waiting.pop()
        if id(found) in seen or isinstance(found, ModuleType | type | CodeType | FrameType):
            continue
        seen[id(found)] = found
        if isinstance(found, FunctionType):
            waiting += [found.__closure__, found.__defaults__, found.__kwdefaults__, found.__dict__]
            continue
        waiting += gc.get_referents(found)
        waiting += list(getattr(found, "__dict__", {}).values())
        if isinstance(found, Tensor):
            waiting += [found._base, found.grad, found.grad_fn]
    return list(seen.values())


def rows(images: Tensor) -> set[bytes]:
    return {row.tobytes() for row in images.contiguous().numpy()}


class TestSecrets:
    @pytest.fixture
    def loot(self, spied: Callable[..., dict[str, Any]]) -> tuple[list[object], DefenseInput, Context]:
        taken: list[Any] = []

        def act(given: DefenseInput, context: Context) -> Outcome:
            taken.append((reachable(given, context), given, context))
            return Outcome()

        spied(act)
        return taken[0]

    @pytest.fixture
    def secrets(self, cache: Path, loot: object) -> dict[str, Tensor]:
        """What the attacker did, as the cache has it."""
        (poison,) = cache.glob("stages/poison/*/poison.safetensors")
        (triggered,) = cache.glob("stages/poison/*/triggered.safetensors")
        return {**load_tensors(poison)[0], **{f"triggered.{k}": v for k, v in load_tensors(triggered)[0].items()}}

    def test_the_search_finds_what_is_there(self, loot: tuple[list[object], DefenseInput, Context]):
        """A search that finds nothing would prove nothing."""
        objects, given, _ = loot
        tensors = {id(found) for found in objects if isinstance(found, Tensor)}
        assert given.model is not None
        assert given.clean is not None
        assert given.suspect is not None
        assert all(id(parameter) in tensors for parameter in given.model.parameters())
        assert all(id(part) in tensors for part in (given.clean.images, given.clean.labels, given.suspect.labels))
        hidden = torch.ones(3)
        view = torch.ones(4)[1:]
        held = reachable(lambda: hidden, {"a": [view]})
        assert any(found is hidden for found in held)
        assert any(found is view._base for found in held)

    def test_no_test_image_flag_or_index(
        self,
        loot: tuple[list[object], DefenseInput, Context],
        secrets: dict[str, Tensor],
        data: dict[str, np.ndarray],
    ):
        tensors = [found for found in loot[0] if isinstance(found, Tensor)]
        flags = torch.zeros(600, dtype=torch.bool)
        flags[secrets["index"]] = True
        hidden = rows(torch.from_numpy(data["x_test"])) | rows(secrets["triggered.images"])
        hidden -= rows(torch.from_numpy(data["x_train"]))
        assert len(hidden) > 500
        forbidden = [flags, secrets["index"], *(secrets[f"triggered.{name}"] for name in ("labels", "targets"))]
        forbidden += [torch.from_numpy(data["y_test"]), torch.from_numpy(data["y_train"])]
        for tensor in tensors:
            if tensor.dtype == torch.uint8 and tensor.ndim == 4:
                assert not rows(tensor) & hidden
            plain = tensor.detach()
            for secret in forbidden:
                assert plain.shape != secret.shape or not torch.equal(plain.double(), secret.double())
        assert not [found for found in loot[0] if isinstance(found, np.ndarray)]

    def test_no_storage_holds_more_than_was_handed_over(self, loot: tuple[list[object], DefenseInput, Context]):
        for tensor in (found for found in loot[0] if isinstance(found, Tensor)):
            assert tensor._base is None
            assert tensor.untyped_storage().nbytes() == tensor.nbytes

    def test_no_object_of_the_run(self, loot: tuple[list[object], DefenseInput, Context]):
        kinds = (
            Attack, AttackConfig, DatasetPlugin, Dataset, Poisoned, Triggered, Scores, RunConfig, Chosen, Loaded, Host,
            Store, Entry,
        )  # fmt: skip
        assert [type(found).__name__ for found in loot[0] if isinstance(found, kinds)] == []
        words = [found for found in loot[0] if isinstance(found, str)]
        assert [word for word in words if "badnets" in word or "digits" in word] == []

    def test_no_seed_of_another_stage(
        self,
        loot: tuple[list[object], DefenseInput, Context],
        secrets: dict[str, Tensor],
        data: dict[str, np.ndarray],
    ):
        objects, _, context = loot
        other = {SEED, *(derive_seed(SEED, stage) for stage in ("poison", "data", "train", "evaluate"))}
        numbers = [found for found in objects if isinstance(found, int)]
        assert context.seed in numbers
        assert not other & set(numbers)

        def chosen(generator: torch.Generator) -> Tensor:
            """The poisoned samples as the poison stage draws them (target 7, 10% of 600)."""
            candidates = torch.from_numpy(data["y_train"] != 7).nonzero()[:, 0]
            return candidates[torch.randperm(len(candidates), generator=generator)[:60]].sort().values

        theirs = Context(seed=derive_seed(SEED, "poison")).generator("poison")
        assert torch.equal(chosen(theirs), secrets["index"]), "this is how it is drawn"
        for seed in (context.seed, derive_seed(context.seed, "poison"), derive_seed(context.seed, "defend spy")):
            assert not torch.equal(chosen(Context(seed=seed).generator("poison")), secrets["index"])


@pytest.mark.parametrize("needs", [*(frozenset({need}) for need in NEEDS), frozenset[Need](), frozenset(NEEDS)])
def test_given_is_what_was_declared(spied: Callable[..., dict[str, Any]], needs: frozenset[Need]):
    taken: list[DefenseInput] = []

    def act(given: DefenseInput, context: Context) -> Outcome:
        taken.append(given)
        return Outcome()

    spied(act, needs)
    (given,) = taken
    assert given.classes == 10
    assert {field.name for field in fields(given)} == {"classes", *NEEDS}
    for need in NEEDS:
        assert (getattr(given, need) is not None) == (need in needs), need


def parts(given: DefenseInput) -> tuple[nn.Module, Tensor, Tensor, Tensor]:
    assert given.model is not None
    assert given.clean is not None
    assert given.suspect is not None
    return given.model, given.clean.images, given.clean.labels, given.suspect.images


def alter_weight(given: DefenseInput) -> None:
    next(parts(given)[0].parameters()).data[0] += 1e-6


def alter_buffer(given: DefenseInput) -> None:
    model, images, *_ = parts(given)
    model.train()(images)  # BatchNorm's statistics
    model.eval()


def alter_normalisation(given: DefenseInput) -> None:
    parts(given)[0].std.mul_(2)


def alter_mode(given: DefenseInput) -> None:
    parts(given)[0].train()


def alter_one_mode(given: DefenseInput) -> None:
    next(module for module in parts(given)[0].modules() if isinstance(module, nn.BatchNorm2d)).train()


def alter_flag(given: DefenseInput) -> None:
    next(parts(given)[0].parameters()).requires_grad_(False)


def leave_gradients(given: DefenseInput) -> None:
    model, images, *_ = parts(given)
    model(images).sum().backward()


def alter_parameter(given: DefenseInput) -> None:
    head = next(module for module in parts(given)[0].modules() if isinstance(module, nn.Linear))
    head.bias = nn.Parameter(torch.ones_like(head.bias))


def alter_clean_images(given: DefenseInput) -> None:
    parts(given)[1][0, 0, 0, 0] ^= 1


def alter_clean_labels(given: DefenseInput) -> None:
    labels = parts(given)[2]
    labels[0] = (labels[0] + 1) % 10


def alter_suspect_images(given: DefenseInput) -> None:
    parts(given)[3][-1].fill_(0)


def alter_suspect_labels(given: DefenseInput) -> None:
    assert given.suspect is not None
    given.suspect.labels.sort()  # of a copy: allowed
    given.suspect.labels.copy_(given.suspect.labels.sort().values)


def take_away(given: DefenseInput) -> None:
    object.__setattr__(given, "clean", None)


def read_only(given: DefenseInput) -> None:
    model, images, labels, suspect = parts(given)
    with torch.no_grad():
        model(images)
        (images + 1, labels + 1, suspect.flip(0))
    assert given.clean is not None
    assert given.clean.fingerprint


class TestInPlace:
    @pytest.mark.parametrize(
        ("alter", "part"),
        [
            (alter_weight, "model"),
            (alter_buffer, "model"),
            (alter_normalisation, "model"),
            (alter_mode, "model"),
            (alter_one_mode, "model"),
            (alter_flag, "model"),
            (leave_gradients, "model"),
            (alter_parameter, "model"),
            (alter_clean_images, "clean"),
            (alter_clean_labels, "clean"),
            (take_away, "clean"),
            (alter_suspect_images, "suspect"),
            (alter_suspect_labels, "suspect"),
        ],
    )
    def test_is_caught_and_named(
        self,
        spied: Callable[..., dict[str, Any]],
        tmp_path: Path,
        alter: Callable[[DefenseInput], None],
        part: str,
    ):
        def act(given: DefenseInput, context: Context) -> Outcome:
            read_only(given)
            alter(given)
            return Outcome()

        with pytest.raises(ThreatModelError, match=rf"^defense 'spy' altered its input `{part}` in place\."):
            spied(act)
        assert not (tmp_path / "out" / "record.json").exists()

    def test_reading_is_allowed(self, spied: Callable[..., dict[str, Any]]):
        def act(given: DefenseInput, context: Context) -> Outcome:
            read_only(given)
            return Outcome()

        record = spied(act)
        victim, (defense,) = record["victim"], record["defenses"]
        assert defense["clean_accuracy"] == victim["clean_accuracy"]


class TestOutcomes:
    @pytest.mark.parametrize(
        ("answer", "error", "said"),
        [
            (lambda given: Outcome(model=given.model), ThreatModelError, "'spy' returned the handed model itself"),
            (
                lambda given: Outcome(model=nn.Linear(2, 2)),
                PluginError,
                "'spy' returned a model of another form .*wrn10_1",
            ),
            (
                lambda given: Outcome(model=build(replace(given.arch, classes=9), 0)),
                PluginError,
                r"'spy' returned a model of another form .*\(9,\)",
            ),
            (lambda given: given.model, PluginError, "'spy' returned Classifier; it must return bdcore.Outcome"),
            (lambda given: None, PluginError, "'spy' returned NoneType; it must return bdcore.Outcome"),
            (lambda given: Outcome(model="none"), BdcoreError, "'spy'"),
            (lambda given: Outcome(verdict=True), BdcoreError, "'spy'"),
        ],
    )
    def test_of_the_wrong_form_is_one_clear_error(
        self,
        spied: Callable[..., dict[str, Any]],
        answer: Callable[[DefenseInput], Any],
        error: type[BdcoreError],
        said: str,
    ):
        with pytest.raises(error, match=said):
            spied(lambda given, context: answer(given))

    def test_what_it_returns_is_what_is_scored(self, spied: Callable[..., dict[str, Any]]):
        def act(given: DefenseInput, context: Context) -> Outcome:
            assert given.arch is not None
            model = build(given.arch, 0)
            with torch.no_grad():
                model.net.head.weight.zero_()
                model.net.head.bias.copy_(torch.arange(10) == 7)
            return Outcome(model=model)

        (defense,) = spied(act)["defenses"]
        assert (defense["asr"], defense["ra"], defense["target_class_accuracy"]) == (1, 0, 1)


ORACLE = """
from bdcore import Defense, Outcome, hookimpl

class Told(Defense):
    name = "told"

    def oracles(self):
        return ("target",)

    def __call__(self, given, context):
        return Outcome()

@hookimpl
def bdcore_defense():
    return Told
"""


def test_an_oracle_is_recorded_and_marked(
    site: "Site", cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    monkeypatch.setenv("BDCORE_CACHE", str(cache))
    site.add("bd-told", {"told": "bd_told"}, {"bd_told.py": ORACLE})
    arguments = [
        "run", "--plugin", "told", "--dataset", f"npz:{cache / 'digits.npz'}", "--model", "wrn10_1", "--device", "cpu",
        "--precision", "fp32", "--seed", str(SEED), "--set", "train.epochs=1", "--out", str(tmp_path / "out"),
    ]  # fmt: skip
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 0
    stdout = capfd.readouterr().out
    record = json.loads((tmp_path / "out" / "record.json").read_text())
    assert {plugin["name"]: plugin["oracle"] for plugin in record["plugins"]} == {
        "npz": [], "badnets": [], "told": ["target"],
    }  # fmt: skip
    assert [line.split()[0] for line in stdout.splitlines() if "†" in line] == ["told†", "†"]
    assert "told was told what a defender does not know: target" in stdout
