"""The training loop: updates, precision, checkpoints and exact resume."""

import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bdcore import Recipe, fit, forward_batches, frozen_copy
from bdcore.context import Context, Progress
from bdcore.errors import BdcoreError, UsageError
from bdcore.models import Classifier, metered
from bdcore.store import load_tensors
from bdcore.training import loop
from bdcore.training.checkpoint import load_checkpoint, save_checkpoint
from bdcore.training.precision import choose_device, choose_precision

PLAIN = {"schedule": "constant", "shuffle": False, "batch_size": 1000}


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def noise(samples: int, channels: int = 3, side: int = 8, seed: int = 0) -> Tensor:
    return torch.randint(0, 256, (samples, channels, side, side), generator=generator(seed), dtype=torch.uint8)


class TestUpdates:
    def regression(self) -> tuple[nn.Linear, dict[str, Tensor]]:
        module = nn.Linear(5, 2)
        with torch.no_grad():
            module.weight.copy_(torch.randn(2, 5, generator=generator(1)))
            module.bias.zero_()
        columns = {"x": torch.randn(12, 5, generator=generator(2)), "y": torch.randn(12, 2, generator=generator(3))}
        return module, columns

    def by_hand(self, update: Callable[[int, Tensor, Tensor, dict[str, Tensor]], Tensor], steps: int) -> Tensor:
        """Full-batch least squares in float64: the gradient in closed form, the update as published."""
        module, columns = self.regression()
        x = torch.cat([columns["x"].double(), torch.ones(12, 1, dtype=torch.float64)], 1)
        weight = torch.cat([module.weight.detach(), module.bias.detach()[:, None]], 1).double()
        memory: dict[str, Tensor] = {}
        for step in range(1, steps + 1):
            gradient = 2 / 24 * (weight @ x.T - columns["y"].double().T) @ x
            weight = update(step, weight, gradient + 0.01 * weight, memory)
        return weight

    def by_fit(self, recipe: Recipe) -> Tensor:
        module, columns = self.regression()
        fit("t", module, columns, lambda batch: F.mse_loss(module(batch["x"]), batch["y"]), recipe, Context())
        return torch.cat([module.weight.detach(), module.bias.detach()[:, None]], 1).double()

    def test_sgd(self):
        def update(step: int, weight: Tensor, gradient: Tensor, memory: dict[str, Tensor]) -> Tensor:
            memory["v"] = 0.8 * memory["v"] + gradient if "v" in memory else gradient
            return weight - 0.05 * memory["v"]

        recipe = Recipe(epochs=4, lr=0.05, momentum=0.8, weight_decay=0.01, **PLAIN)
        torch.testing.assert_close(self.by_fit(recipe), self.by_hand(update, 4), rtol=1e-5, atol=1e-6)

    def test_adam(self):
        def update(step: int, weight: Tensor, gradient: Tensor, memory: dict[str, Tensor]) -> Tensor:
            memory["m"] = 0.5 * memory.get("m", torch.zeros_like(weight)) + 0.5 * gradient
            memory["v"] = 0.9 * memory.get("v", torch.zeros_like(weight)) + 0.1 * gradient**2
            m, v = memory["m"] / (1 - 0.5**step), memory["v"] / (1 - 0.9**step)
            return weight - 0.05 * m / (v.sqrt() + 1e-8)

        recipe = Recipe(epochs=4, optimizer="adam", lr=0.05, betas=(0.5, 0.9), weight_decay=0.01, **PLAIN)
        torch.testing.assert_close(self.by_fit(recipe), self.by_hand(update, 4), rtol=1e-5, atol=1e-6)

    def test_a_convolution_laid_out_channels_last_learns_the_same(self):
        images, labels = noise(16), torch.arange(16) % 4

        def plain() -> Classifier:
            model = network(dropout=0)
            optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=5e-4, foreach=False)
            for _ in range(3):
                optimizer.zero_grad()
                F.cross_entropy(model(images), labels).backward()
                optimizer.step()
            return model

        model = network(dropout=0)
        recipe = Recipe(epochs=3, **PLAIN)
        columns = {"images": images, "labels": labels}
        fit("t", model, columns, lambda b: F.cross_entropy(model(b["images"]), b["labels"]), recipe, Context())
        assert next(model.parameters()).is_contiguous(memory_format=torch.channels_last)
        for ours, theirs in zip(model.parameters(), plain().parameters(), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)

    @pytest.mark.parametrize("precision", ["fp32", "bf16"])
    def test_precision_decides_about_autocast(self, precision: str):
        module, columns = self.regression()
        kinds: list[torch.dtype] = []

        def loss(batch: dict[str, Tensor]) -> Tensor:
            made = module(batch["x"])
            kinds.append(made.dtype)
            return F.mse_loss(made.float(), batch["y"])

        fit("t", module, columns, loss, Recipe(epochs=1), Context(precision=precision))
        assert kinds == [torch.bfloat16 if precision == "bf16" else torch.float32]
        assert module.weight.dtype == torch.float32
        assert not torch.is_autocast_enabled("cpu")

    def test_figures_are_means_and_on_epoch_can_end_it(self):
        module = nn.Linear(1, 1)
        columns = {"value": torch.arange(12.0)}
        told: list[Progress] = []
        seen: list[tuple[int, dict[str, float]]] = []

        def loss(batch: dict[str, Tensor]) -> dict[str, Tensor]:
            return {"loss": 0 * module.weight.sum() + 2, "value": batch["value"].mean()}

        def on_epoch(epoch: int, figures: dict[str, float]) -> bool:
            seen.append((epoch, figures))
            return epoch == 2

        recipe = Recipe(epochs=9, batch_size=4)
        fit("t", module, columns, loss, recipe, Context(report=told.append), on_epoch)
        assert [epoch for epoch, _ in seen] == [0, 1, 2]
        assert all(figures == pytest.approx({"loss": 2, "value": 5.5}) for _, figures in seen)
        assert [(p.phase, p.epoch, p.epochs) for p in told] == [("t", 1, 9), ("t", 2, 9), ("t", 3, 9)]
        assert told[0].seconds_left > told[-1].seconds_left == 0
        assert all(p.images_per_second > 0 for p in told)

    def test_a_diverging_loss_is_one_clear_error(self):
        module, columns = self.regression()
        recipe = Recipe(epochs=50, lr=1e9, **PLAIN)
        with pytest.raises(
            BdcoreError, match=r"^purify: the loss is no longer finite in epoch \d+ of 50\. Lower .*lr|rate"
        ):
            fit("purify", module, columns, lambda b: F.mse_loss(module(b["x"]), b["y"]), recipe, Context())

    @pytest.mark.parametrize("lengths", [(3, 4), (0, 0)])
    def test_columns_that_do_not_match_are_refused(self, lengths: tuple[int, int]):
        columns = {"x": torch.zeros(lengths[0]), "y": torch.zeros(lengths[1])}
        with pytest.raises(ValueError, match=rf"'x': {lengths[0]}, 'y': {lengths[1]}"):
            fit("t", nn.Linear(1, 1), columns, lambda b: b["x"].sum(), Recipe(), Context())

    def test_global_random_states_stay(self):
        model = network(dropout=0.5)
        states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tobytes()  # noqa: NPY002
        train(model, Recipe(epochs=1), Context())
        assert torch.equal(torch.get_rng_state(), states[0])
        assert random.getstate() == states[1]
        assert np.random.get_state()[1].tobytes() == states[2]  # noqa: NPY002


def network(dropout: float) -> Classifier:
    """A small classifier whose convolutions are laid out channels-last, with buffers and with dropout."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.Sequential(
            nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 5, 3, stride=2), nn.ReLU(),
            nn.Dropout(dropout), nn.Flatten(), nn.Linear(45, 4),
        )  # fmt: skip
    return Classifier(net, (3, 8, 8), (0.5,) * 3, (0.25,) * 3).train()


def train(model: Classifier, recipe: Recipe, context: Context, phase: str = "t") -> None:
    columns = {"images": noise(24), "labels": torch.arange(24) % 4}
    with metered(context.meter):
        fit(phase, model, columns, lambda b: F.cross_entropy(model(b["images"]), b["labels"]), recipe, context)


class Killed(BaseException):
    """What stands for the end of the process."""


@pytest.fixture
def every_epoch(monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint after each epoch, however short."""
    monkeypatch.setattr(loop, "_SECONDS_BETWEEN_CHECKPOINTS", -1.0)


RECIPES = {
    "sgd": Recipe(epochs=4, batch_size=10, crop=1, flip=True),
    "adam": Recipe(epochs=4, batch_size=10, optimizer="adam", lr=0.01, schedule="cosine", cutout=2),
}


def interrupted(recipe: Recipe, folder: Path, after: int) -> Context:
    """Train in `folder` until that epoch is reported."""

    def report(progress: Progress) -> None:
        if progress.epoch == after:
            raise Killed

    context = Context(folder=folder, report=report)
    with pytest.raises(Killed):
        train(network(0.3), recipe, context)
    return context


@pytest.mark.usefixtures("every_epoch")
class TestResume:
    @pytest.mark.parametrize("after", [1, 2, 3, 4])
    @pytest.mark.parametrize("optimizer", ["sgd", "adam"])
    def test_to_the_bit(self, tmp_path: Path, optimizer: str, after: int):
        recipe = RECIPES[optimizer]
        whole, parts = tmp_path / "whole", tmp_path / "parts"
        whole.mkdir()
        parts.mkdir()
        straight, resumed = network(0.3), network(0.3)
        train(straight, recipe, Context(folder=whole))
        first = interrupted(recipe, parts, after)
        told: list[int] = []
        context = Context(folder=parts, report=lambda progress: told.append(progress.epoch))
        train(resumed, recipe, context)
        assert told == list(range(after + 1, 5))
        for name, value in straight.state_dict().items():
            assert torch.equal(resumed.state_dict()[name], value), name
        ours, theirs = load_tensors(whole / "t.safetensors")[0], load_tensors(parts / "t.safetensors")[0]
        assert any(name.startswith("optimizer0.") for name in ours)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours), "the optimiser's state"
        assert first.meter.images == after * 24
        assert context.meter.images == 4 * 24

    def test_an_early_end_stays_an_end(self, tmp_path: Path):
        for _ in range(2):
            ends: list[int] = []
            module = nn.Linear(2, 1)
            columns = {"x": torch.ones(4, 2)}

            def on_epoch(epoch: int, figures: dict[str, float], ends: list[int] = ends) -> bool:
                ends.append(epoch)
                return epoch == 1

            def loss(batch: dict[str, Tensor], module: nn.Linear = module) -> Tensor:
                return module(batch["x"]).square().mean()

            fit("t", module, columns, loss, Recipe(epochs=9), Context(folder=tmp_path), on_epoch)
        assert ends == []

    def test_seconds_before_the_interruption_count(self, tmp_path: Path):
        before = interrupted(RECIPES["sgd"], tmp_path, 2).meter
        before.resume(before.images, 500.0)
        model = network(0.3)
        optimizer = RECIPES["sgd"].optimizer_for(model.parameters())
        context = Context(meter=before)
        save_checkpoint(tmp_path / "a.safetensors", model, [optimizer], {"recipe": "r"}, context)
        again = Context()
        assert load_checkpoint(tmp_path / "a.safetensors", model, [optimizer], "r", again) == {"recipe": "r"}
        assert 500 <= again.meter.seconds < 560
        assert again.meter.images == before.images

    @pytest.mark.parametrize("damage", ["truncated", "empty", "tensor", "epochs"])
    def test_damage_is_noticed_said_and_repaired(self, tmp_path: Path, damage: str):
        recipe = RECIPES["sgd"]
        straight, resumed = network(0.3), network(0.3)
        train(straight, recipe, Context())
        interrupted(recipe, tmp_path, 3)
        path = tmp_path / "t.safetensors"
        content = path.read_bytes()
        assert content.count(b'\\"epochs\\": 3') == 1
        path.write_bytes(
            {
                "truncated": content[: len(content) // 2],
                "empty": b"",
                "tensor": content[:-40] + bytes([content[-40] ^ 1]) + content[-39:],
                "epochs": content.replace(b'\\"epochs\\": 3', b'\\"epochs\\": 2'),
            }[damage]
        )
        said: list[str] = []
        told: list[int] = []
        context = Context(folder=tmp_path, warn=said.append, report=lambda progress: told.append(progress.epoch))
        train(resumed, recipe, context)
        assert len(said) == 1
        assert said[0].startswith("checkpoint t.safetensors was damaged")
        assert told == [1, 2, 3, 4]
        for name, value in straight.state_dict().items():
            assert torch.equal(resumed.state_dict()[name], value), name
        assert context.meter.images == 4 * 24

    def test_any_single_changed_bit_is_noticed(self, tmp_path: Path):
        recipe = RECIPES["adam"]
        interrupted(recipe, tmp_path, 2)
        path = tmp_path / "t.safetensors"
        content = path.read_bytes()
        model = network(0.3)
        optimizer = recipe.optimizer_for(model.parameters())
        identity = f"t {recipe.model_dump_json()}"
        assert load_checkpoint(path, model, [optimizer], identity, Context()) is not None
        header = 8 + int.from_bytes(content[:8], "little")
        places = [*range(0, header, 7), *range(header, len(content), len(content) // 40)]
        untouched = {name: value.clone() for name, value in model.state_dict().items()}
        for number, place in enumerate(places):
            altered = bytearray(content)
            altered[place] ^= 1 << number % 8
            path.write_bytes(altered)
            said: list[str] = []
            context = Context(warn=said.append)
            assert load_checkpoint(path, model, [optimizer], identity, context) is None, place
            assert len(said) == 1, place
            assert context.meter.images == 0
        assert all(torch.equal(model.state_dict()[name], value) for name, value in untouched.items())

    def test_a_checkpoint_of_another_recipe_is_not_used(self, tmp_path: Path):
        interrupted(RECIPES["sgd"], tmp_path, 2)
        other = RECIPES["sgd"].model_copy(update={"lr": 0.05})
        straight, second = network(0.3), network(0.3)
        train(straight, other, Context())
        said: list[str] = []
        train(second, other, Context(folder=tmp_path, warn=said.append))
        assert said == []
        for name, value in straight.state_dict().items():
            assert torch.equal(second.state_dict()[name], value), name

    def test_two_phases_of_one_stage_need_two_names(self, tmp_path: Path):
        context = Context(folder=tmp_path)
        recipe = Recipe(epochs=1)
        train(network(0), recipe, context, "first")
        train(network(0), recipe, context, "second")
        with pytest.raises(ValueError, match="'first' was trained already"):
            train(network(0), recipe, context, "first")


class TestReading:
    @pytest.fixture
    def model(self) -> Classifier:
        return network(0.3)

    def test_forward_in_batches_is_one_forward(self, model: Classifier):
        model.eval()
        images = noise(23)
        with torch.no_grad():
            whole = model(images)
        for precision in ("fp32", "bf16"):
            made = forward_batches(model, images, Context(precision=precision), batch_size=5)
            assert made.dtype == torch.float32
            assert not made.requires_grad
            torch.testing.assert_close(made, whole, rtol=1e-5, atol=1e-6)

    def test_a_frozen_copy_leaves_the_model_alone(self, model: Classifier):
        before = {name: (value.clone(), value.stride()) for name, value in model.state_dict().items()}
        copied = frozen_copy(model, Context())
        assert not any(module.training for module in copied.modules())
        assert not any(parameter.requires_grad for parameter in copied.parameters())
        with torch.no_grad():
            for value in copied.state_dict().values():
                value.zero_()
        assert all(module.training for module in model.modules())
        assert all(parameter.requires_grad for parameter in model.parameters())
        for name, value in model.state_dict().items():
            assert torch.equal(value, before[name][0]), name
            assert value.stride() == before[name][1], name


class TestMachine:
    def test_a_missing_gpu_is_named(self):
        with pytest.raises(
            UsageError, match=r"'cuda:99' is not here: this machine has \d+ usable CUDA devices.*--device cpu"
        ):
            choose_device("cuda:99")
        assert choose_device("cpu").type == "cpu"
        assert choose_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")

    @pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
    def test_cuda_where_there_is_none(self):
        with pytest.raises(UsageError, match="'cuda' is not here: this machine has 0"):
            choose_device("cuda")

    def test_precision_auto_is_what_the_processor_computes(self):
        cpu = torch.device("cpu")
        assert choose_precision("fp32", cpu) == "fp32"
        assert choose_precision("bf16", cpu) == "bf16"
        info = Path("/proc/cpuinfo")
        flags = info.read_text().split() if info.exists() else []
        if "avx512f" in flags:
            native = "avx512_bf16" in flags or "amx_bf16" in flags
            assert choose_precision("auto", cpu) == ("bf16" if native else "fp32")
