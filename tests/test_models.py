"""Models: published sizes, penultimate features of any class, determinism, pixels in, the meter."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from bdcore.artifacts import Architecture
from bdcore.context import Meter
from bdcore.errors import UsageError
from bdcore.models import Classifier, build, check_name, metered, names, split_head

MEAN, STD = (0.49, 0.48, 0.45), (0.25, 0.24, 0.26)


def arch(name: str, size: int = 32, classes: int = 10) -> Architecture:
    return Architecture(name, classes, (3, size, size), MEAN, STD)


def grey(name: str, size: int = 32) -> Architecture:
    return Architecture(name, 10, (1, size, size), (0.3,), (0.2,))


def images(count: int, size: int = 32, channels: int = 3) -> torch.Tensor:
    return torch.randint(0, 256, (count, channels, size, size), dtype=torch.uint8)


def parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def wrn_size(depth: int, width: int, classes: int) -> int:
    """The paper's table 1, counted by hand: 3x3 convolutions, two BNs a block, 1x1 shortcuts where shapes change."""
    total = 3 * 16 * 9
    before = 16
    for out in (16 * width, 32 * width, 64 * width):
        for block in range((depth - 4) // 6):
            inside = before if block == 0 else out
            total += 9 * inside * out + 9 * out * out + 2 * inside + 2 * out
            if block == 0 and (inside != out or out > 16 * width):
                total += inside * out
        before = out
    return total + 2 * before + before * classes + classes


@pytest.mark.parametrize(
    ("name", "millions"), [("wrn16_1", 0.175), ("wrn40_1", 0.56), ("wrn40_2", 2.2), ("preact_resnet18", 11.17)]
)
def test_sizes_are_the_published_ones(name: str, millions: float):
    assert parameters(build(arch(name), 0)) / 1e6 == pytest.approx(millions, rel=0.02)


@pytest.mark.parametrize(("depth", "width"), [(10, 1), (16, 1), (16, 4), (22, 3)])
def test_wide_resnets_have_the_size_of_their_table(depth: int, width: int):
    assert parameters(build(arch(f"wrn{depth}_{width}", classes=7), 0)) == wrn_size(depth, width, 7)


def test_wide_resnet_computes_its_algorithm():
    """One WRN-10-1 in float64, written with functionals from the paper's figure 1 and table 1."""
    model = build(arch("wrn10_1"), 3).eval().double()
    x = torch.rand(2, 3, 12, 20, dtype=torch.float64)
    state = model.state_dict()

    def norm(values: torch.Tensor, name: str) -> torch.Tensor:
        parts = [state[f"net.{name}.{part}"] for part in ("running_mean", "running_var", "weight", "bias")]
        return F.relu(F.batch_norm(values, *parts))

    h = F.conv2d((x - state["mean"]) / state["std"], state["net.stem.weight"], padding=1)
    for index, stride in enumerate((1, 2, 2)):
        a = norm(h, f"blocks.{index}.bn1")
        out = F.conv2d(a, state[f"net.blocks.{index}.conv1.weight"], stride=stride, padding=1)
        out = F.conv2d(norm(out, f"blocks.{index}.bn2"), state[f"net.blocks.{index}.conv2.weight"], padding=1)
        h = out + (F.conv2d(a, state[f"net.blocks.{index}.shortcut.weight"], stride=stride) if index else h)
    features = F.adaptive_avg_pool2d(norm(h, "bn"), 1).flatten(1)
    expected = F.linear(features, state["net.head.weight"], state["net.head.bias"])
    torch.testing.assert_close(model(x), expected, rtol=1e-10, atol=1e-10)


def test_gradients_survive_the_inplace_activations():
    model = build(Architecture("wrn10_1", 3, (1, 4, 4), (0.5,), (0.25,)), 0).eval().double()
    assert torch.autograd.gradcheck(model, torch.rand(1, 1, 4, 4, dtype=torch.float64, requires_grad=True))


@pytest.mark.parametrize(
    ("name", "size", "features"),
    [
        ("wrn16_1", 32, 64),
        ("wrn10_2", 28, 128),
        ("preact_resnet18", 16, 512),
        ("resnet18", 32, 512),
        ("shufflenet_v2_x0_5", 32, 1024),
        ("mobilenet_v3_small", 32, 1024),
        ("mnasnet0_5", 32, 1280),
        ("regnet_y_400mf", 32, 440),
        ("googlenet", 32, 1024),
        pytest.param("preact_resnet34", 32, 512, marks=pytest.mark.slow),
        pytest.param("densenet121", 32, 1024, marks=pytest.mark.slow),
        ("efficientnet_b0", 32, 1280),
        ("convnext_tiny", 32, 768),
        ("swin_t", 32, 768),
        pytest.param("maxvit_t", 224, 512, marks=pytest.mark.slow),
        ("inception_v3", 96, 2048),
        pytest.param("vit_b_16", 224, 768, marks=pytest.mark.slow),
        pytest.param("vgg11", 32, 4096, marks=pytest.mark.slow),
    ],
)
def test_features_are_the_input_of_the_head(name: str, size: int, features: int):
    model = build(arch(name, size, classes=7), 0)
    body, head = split_head(model)
    seen: list[torch.Tensor] = []
    head.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].detach().clone()))
    model.eval()
    body.eval()
    batch = images(2, size)
    with torch.no_grad():
        logits = model(batch)
        found = body(batch)
    assert found.shape == (2, features)
    assert torch.equal(found, seen[0])
    assert logits.shape == (2, 7)
    torch.testing.assert_close(head(found), logits)


def test_body_shares_parameters_and_statistics():
    model = build(arch("wrn10_1"), 0)
    body, head = split_head(model)
    before = copy.deepcopy(model.state_dict())
    batch = images(8)
    optimiser = torch.optim.SGD(body.parameters(), lr=0.1)
    body(batch).square().sum().backward()
    optimiser.step()
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert {"net.stem.weight", "net.bn.running_mean", "net.bn.num_batches_tracked"} <= changed
    assert not changed & {"net.head.weight", "net.head.bias", "mean", "std"}
    model.eval()
    body.eval()
    with torch.no_grad():
        torch.testing.assert_close(head(body(batch)), model(batch))


@pytest.mark.parametrize("training", [True, False])
def test_splitting_changes_nothing(training: bool):
    model = build(arch("wrn10_1"), 0).train(training)
    model.net.bn.eval()
    flags = [module.training for module in model.modules()]
    before = copy.deepcopy(model.state_dict())
    random = torch.get_rng_state()
    meter = Meter()
    with metered(meter):
        body, _ = split_head(model)
    assert [module.training for module in model.modules()] == flags
    assert body.training is training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)
    assert meter.images == 0
    assert isinstance(model.get_submodule("net.head"), nn.Linear)


def test_a_compiled_network_is_split_without_compiling():
    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]):
        raise AssertionError("compiled")

    model = build(arch("wrn10_1"), 0).eval()
    model.net.compile(backend=backend)
    body, _ = split_head(model)
    assert body(images(2)).shape == (2, 64)


class Tempered(nn.Module):
    """Ends with something else than its linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(12, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(x.flatten(1)).log_softmax(1)


@pytest.mark.parametrize(
    ("net", "reason"),
    [
        (Tempered(), "is not what it ends with"),
        (nn.Sequential(nn.Flatten(), nn.Linear(12, 5), nn.ReLU(), nn.Linear(5, 4), nn.ReLU()), "is not what"),
        (nn.Sequential(nn.Conv2d(3, 4, 2), nn.Flatten()), "no linear layer"),
        (nn.Sequential(nn.Linear(2, 6), nn.Conv2d(3, 4, 2), nn.Flatten()), "and more follows"),
    ],
)
def test_models_without_a_final_linear_layer_are_refused(net: nn.Module, reason: str):
    with pytest.raises(UsageError, match=reason):
        split_head(Classifier(net, (3, 2, 2), MEAN, STD))


def test_squeezenet_and_foreign_modules_are_refused_with_the_reason():
    with pytest.raises(UsageError, match=r"SqueezeNet cannot be split.*no linear layer"):
        split_head(build(arch("squeezenet1_1", 64), 0))
    with pytest.raises(UsageError, match="wrap the network"):
        split_head(nn.Linear(3, 2))


@pytest.mark.parametrize("name", ["wrn16_1", "preact_resnet18", "resnet18", "googlenet"])
def test_a_seed_decides_the_bits_and_nothing_else_changes(name: str):
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = build(arch(name), 5).state_dict()
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    second, other = build(arch(name), 5).state_dict(), build(arch(name), 6).state_dict()
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert any(not torch.equal(first[key], other[key]) for key in first)


def test_convolutions_begin_with_he_variance():
    for module in build(arch("preact_resnet18"), 0).modules():
        if isinstance(module, nn.Conv2d):
            fan_out = module.out_channels * module.kernel_size[0] * module.kernel_size[1]
            assert module.weight.std().item() == pytest.approx((2 / fan_out) ** 0.5, rel=0.1)


def test_normalisation_is_inside():
    model = Classifier(nn.Identity(), (3, 4, 4), MEAN, STD)
    batch = images(5, 4)
    expected = (batch.double() / 255 - torch.tensor(MEAN).double().view(1, 3, 1, 1)) / torch.tensor(STD).double().view(
        1, 3, 1, 1
    )
    torch.testing.assert_close(model(batch).double(), expected, rtol=1e-6, atol=1e-6)
    assert torch.equal(model(batch), model(batch.float() / 255))
    assert model(batch.contiguous(memory_format=torch.channels_last)).is_contiguous(memory_format=torch.channels_last)
    assert set(model.state_dict()) == {"mean", "std"}


@pytest.mark.parametrize(("name", "takes"), [("wrn10_1", 1), ("resnet18", 3)])
def test_grey_images(name: str, takes: int):
    model = build(grey(name), 0).eval()
    batch = images(2, channels=1)
    seen: list[torch.Tensor] = []
    model.net.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        assert model(batch).shape == (2, 10)
    assert torch.equal(seen[0], ((batch / 255 - 0.3) / 0.2).expand(-1, takes, -1, -1))
    split_head(model)


def test_five_channels():
    five = Architecture("wrn10_1", 4, (5, 16, 16), (0.5,) * 5, (0.2,) * 5)
    assert build(five, 0)(images(2, 16, 5)).shape == (2, 4)
    with pytest.raises(UsageError, match="takes images of 3 channels"):
        build(Architecture("resnet18", 4, (5, 16, 16), (0.5,) * 5, (0.2,) * 5), 0)


def test_meter_counts_copies_nests_and_stops():
    model = build(arch("wrn10_1", 8), 0)
    body, _ = split_head(model)
    outer, inner = Meter(), Meter()
    inner.images = 100
    model(images(2, 8))
    with metered(outer):
        model(images(3, 8))
        copy.deepcopy(model)(images(4, 8))
        with metered(inner):
            body(images(5, 8))
        with pytest.raises(RuntimeError), metered(inner):
            raise RuntimeError
        body(images(6, 8))
    model(images(7, 8))
    assert (outer.images, inner.images) == (13, 105)


def test_every_name_offered_is_accepted():
    assert {"wrn16_1", "preact_resnet18", "preact_resnet34", "resnet18", "vit_b_16"} <= set(names())
    for name in [*names(), "wrn100_7"]:
        check_name(name)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("resnet81", "Did you mean .*resnet18"),
        ("wrn_16_1", "wrnDEPTH_WIDTH"),
        ("wrn16_0", "wrn16_1"),
        ("wrn17_1", "depth is 10, 16, 22"),
        ("wrn4_1", "depth is 10, 16, 22"),
        ("", "Valid: alexnet"),
        ("get_model", "Valid: alexnet"),
    ],
)
def test_unknown_names_are_refused_with_the_valid_ones(name: str, says: str):
    with pytest.raises(UsageError, match=says):
        check_name(name)
    with pytest.raises(UsageError, match=says):
        build(arch(name), 0)
