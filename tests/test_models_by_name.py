"""Networks of torchvision, timm and one's own code by name: sizes, options, features of every family, refusals."""

import copy
import hashlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from bdcore.artifacts import Architecture
from bdcore.errors import UsageError
from bdcore.models import Classifier, build, check_name, code_of, split_head

timm = pytest.importorskip("timm")


def arch(name: str, size: int = 32, channels: int = 3, classes: int = 7) -> Architecture:
    return Architecture(name, classes, (channels, size, size), (0.5,) * channels, (0.2,) * channels)


def told(name: str, **form: int) -> str:
    """What is said of a network that cannot be had."""
    with pytest.raises(UsageError) as refusal:
        build(arch(name, **form), 0)
    return str(refusal.value)


SMALLEST = [
    "test_vit",
    "test_vit_relpos",
    "vit_tiny_patch16_224,patch_size=4,depth=2,drop_rate=0.5",
    "deit_tiny_patch16_224,patch_size=8,depth=1",
    "swin_tiny_patch4_window7_224,embed_dim=12,drop_rate=0.5",
    "xcit_nano_12_p16_224,depth=1",
    "beit_base_patch16_224,depth=1,embed_dim=48,num_heads=3",
    "cait_xxs24_224,depth=1,patch_size=8",
    "eva02_tiny_patch14_224,depth=1,patch_size=8",
    "test_convnext",
    "test_resnet",
    "test_efficientnet",
    "test_nfnet",
    "test_maxvit",
    "mobilenetv3_small_050,drop_rate=0.5",
    "mobilevit_xxs",
    "resnet10t",
]


@pytest.mark.parametrize("name", SMALLEST)
def test_a_family_of_timm_builds_for_small_images_and_is_split(name: str):
    """Features are what timm itself calls the input of its classifier, in eval and train mode, copied, in bf16 and
    channels-last."""
    model = build(arch(f"timm:{name}"), 0)
    body, head = split_head(model)
    assert head is model.net.get_classifier()
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    model.eval()
    body.eval()
    with torch.no_grad():
        logits = model(images)
        pixels = (images / 255 - 0.5) / 0.2
        expected = model.net.forward_head(model.net.forward_features(pixels), pre_logits=True)
        torch.testing.assert_close(body(images), expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(head(body(images)), logits, rtol=1e-4, atol=1e-4)
    assert logits.shape == (2, 7)

    copied = copy.deepcopy(model).to(memory_format=torch.channels_last).train()
    with torch.autocast("cpu", torch.bfloat16):
        answer = copied(images.contiguous(memory_format=torch.channels_last))
    assert answer.shape == (2, 7)
    answer.float().square().sum().backward()
    assert all(torch.isfinite(value.grad).all() for value in copied.parameters() if value.grad is not None)


def test_torchvision_transformers_are_sized_by_the_data():
    model = build(arch("vit_b_16"), 0)
    assert model.net.image_size == 32
    body, head = split_head(model)
    assert head is model.net.heads.head
    model.eval()
    body.eval()
    images = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        nn.init.normal_(head.weight)  # torchvision begins with zeros, which any features would fit
        torch.testing.assert_close(head(body(images)), model(images))
        assert body(images).shape == (2, 768)


def test_swin_of_torchvision_is_split():
    model = build(arch("swin_t"), 0)
    assert split_head(model)[1] is model.net.head


@pytest.mark.parametrize(
    ("name", "size", "channels", "expected"),
    [
        ("timm:test_vit", 32, 3, (32, 32)),
        ("timm:test_vit", 48, 1, (48, 48)),
        ("timm:test_vit,img_size=32", 32, 5, (32, 32)),
    ],
)
def test_timm_takes_any_channels_and_the_size_of_the_data(
    name: str, size: int, channels: int, expected: tuple[int, int]
):
    net = build(arch(name, size, channels), 0).net
    assert net.patch_embed.img_size == expected
    assert net.patch_embed.proj.in_channels == channels


def test_options_are_numbers_booleans_or_texts():
    net = build(arch("timm:test_vit, patch_size = 8, global_pool=avg, class_token=false, drop_rate=0.25"), 0).net
    assert net.patch_embed.patch_size == (8, 8)
    assert (net.global_pool, net.cls_token, net.head_drop.p) == ("avg", None, 0.25)
    assert build(arch("mnasnet0_5,dropout=0.5"), 0).net.classifier[0].p == 0.5


def test_images_that_are_not_square():
    wide = Architecture("timm:test_vit", 7, (3, 32, 48), (0.5,) * 3, (0.2,) * 3)
    assert build(wide, 0)(torch.rand(2, 3, 32, 48)).shape == (2, 7)
    wide = Architecture("vit_b_16", 7, (3, 32, 48), (0.5,) * 3, (0.2,) * 3)
    with pytest.raises(UsageError, match=r"square images alone, and the data's are \(32, 48\)"):
        build(wide, 0)


@pytest.mark.parametrize(
    "name", ["timm:test_vit", "timm:test_resnet", "timm:swin_tiny_patch4_window7_224,embed_dim=12"]
)
def test_a_seed_decides_the_bits_of_timm_and_nothing_else_changes(name: str):
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = build(arch(name), 5).state_dict()
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    second, other = build(arch(name), 5).state_dict(), build(arch(name), 6).state_dict()
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert any(not torch.equal(first[key], other[key]) for key in first)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("timm:vit_tiny_patch16_22", "timm:vit_tiny_patch16_224"),
        ("timm:hf-hub:someone/model", "has no 'hf-hub:someone/model'"),
        ("vit_tiny_patch16_224", "Did you mean timm:vit_tiny_patch16_224"),
        ("timm:test_vit,patchsize=4", "unexpected keyword argument 'patchsize'"),
        ("timm:test_resnet,img_size=32", "unexpected keyword argument 'img_size'"),
        ("timm:deit_tiny_patch16_224,depth=1,img_size=64", "does not take images of (3, 32, 32)"),
        ("timm:deit_tiny_patch16_224,depth=1,img_size=64", "Leave img_size out"),
        (
            "timm:eva02_tiny_patch14_224,depth=1",
            "never seen, and a trigger may stand there: give it another patch_size",
        ),
        ("timm:test_vit,pretrained=true", "pretrained is not yours to set"),
        ("timm:test_vit,checkpoint_path=/etc/passwd", "checkpoint_path is not yours"),
        ("resnet18,weights=DEFAULT", "weights is not yours"),
        ("resnet18,depth=3", "unexpected keyword argument 'depth'"),
        ("wrn16_1,width=2", "wrn16_1 has no options"),
        ("timm:test_vit,patch_size", "'patch_size' is no option"),
        ("timm:test_vit,depth=1,depth=2", "given twice"),
        ("alexnet", "does not take images of (3, 32, 32)"),
        ("maxvit_t", "not divisible by partition size 7"),
        ("vit_b_16,image_size=40", "divisible"),
    ],
)
def test_what_cannot_be_had_is_explained(name: str, says: str):
    assert says in told(name)


def test_timm_that_is_not_installed(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"timm is not installed.*pip install timm"):
        check_name("timm:test_vit")
    with pytest.raises(UsageError, match="unknown model 'vit_tiny_patch16_224'"):
        check_name("vit_tiny_patch16_224")


def test_timm_is_imported_by_those_alone_who_ask_for_it():
    program = (
        "import sys\nfrom bdcore.models import check_name, code_of, names\nnames()\ncheck_name('resnet18')\n"
        "code_of('resnet18')\nassert 'timm' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("timm:deit_tiny_distilled_patch16_224,depth=1", "averages two heads"),
        ("timm:test_vit,num_classes=3", "num_classes is not yours"),
        ("squeezenet1_1", "no linear layer"),
    ],
)
def test_families_without_one_final_linear_layer_say_so(name: str, reason: str):
    with pytest.raises(UsageError, match=reason):
        split_head(build(arch(name), 0))


class Twisted(nn.Module):
    """Its layers are made in another order than they are called in; the second is a decoy after the head."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(6, 6)
        self.body = nn.Linear(12, 6)
        self.auxiliary = nn.Linear(6, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        features = self.body(x.flatten(1)).relu()
        answer = self.head(features)
        self.auxiliary(features)
        return answer


class Pooled(nn.Module):
    """Classifies each place of the image, then averages."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(x.permute(0, 2, 3, 1)).mean((1, 2))


class Shared(nn.Module):
    """Calls its last layer twice."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(12, 12)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.fc(x.flatten(1)).relu())


def test_the_head_is_found_by_what_it_answers():
    model = Classifier(Twisted(), (3, 2, 2), (0.5,) * 3, (0.5,) * 3)
    assert split_head(model)[1] is model.net.head


@pytest.mark.parametrize(
    ("net", "reason"), [(Pooled(), "and more follows"), (Shared(), "something else than its input")]
)
def test_heads_that_are_none_are_refused(net: nn.Module, reason: str):
    with pytest.raises(UsageError, match=reason):
        split_head(Classifier(net, (3, 2, 2), (0.5,) * 3, (0.5,) * 3))


OWN = """
import torch
from torch import nn
from blocks_of_mine import block

calls = []

def make(num_classes, in_channels, image_size=0, width=8):
    calls.append((num_classes, in_channels, image_size, width))
    print("made")
    return nn.Sequential(block(in_channels, width), nn.Flatten(), nn.LazyLinear(num_classes))

def colour(num_classes):
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, num_classes))

def nothing(num_classes):
    return None

def broken(num_classes):
    raise KeyError("no such layer")

def fixed():
    return nn.Sequential(nn.Flatten(), nn.LazyLinear(1000))

def pair(num_classes):
    class Pair(nn.Module):
        def forward(self, x):
            return x, x
    return Pair()

def uncopied(num_classes):
    net = colour(num_classes)
    net.lock = __import__("threading").Lock()
    return net

number = 3
"""
BLOCKS = "from torch import nn\n\ndef block(i, o):\n    return nn.Conv2d(i, o, 3)\n"


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A working folder with a network of one's own."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "net_of_mine.py").write_text(OWN)
    (tmp_path / "blocks_of_mine.py").write_text(BLOCKS)
    (tmp_path / "broken_of_mine.py").write_text("import torch\nraise RuntimeError('half written')\n")
    (tmp_path / "wrong_of_mine.py").write_text("def make(:\n")
    (tmp_path / "needs_of_mine.py").write_text("import no_such_package_anywhere\n")
    path = list(sys.path)
    yield tmp_path
    assert sys.path == path
    for name in [name for name in sys.modules if name.endswith("_of_mine")]:
        del sys.modules[name]


def test_own_code_is_called_with_what_it_takes(own: Path, capsys: pytest.CaptureFixture[str]):
    model = build(arch("net_of_mine:make,width=4", 8, 2), 3)
    assert sys.modules["net_of_mine"].calls == [(7, 2, 8, 4)]
    assert capsys.readouterr().out == "", "results alone go to stdout"
    assert model(torch.rand(2, 2, 8, 8)).shape == (2, 7)
    again = build(arch("net_of_mine:make,width=4", 8, 2), 3)
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items())
    split_head(model)
    copy.deepcopy(model)


def test_grey_images_are_repeated_for_own_code_that_takes_colours(own: Path):
    model = build(arch("net_of_mine:colour", 8, 1), 0)
    assert model.mean.shape == (1, 3, 1, 1)
    assert model(torch.rand(2, 1, 8, 8)).shape == (2, 7)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("net_of_yours:make", "no module 'net_of_yours' in the working folder {folder}"),
        ("net_of_mine:mak", "Did you mean make"),
        ("net_of_mine:number", "unknown function of"),
        ("net_of_mine:make,widht=3", "unknown option 'widht'. Did you mean width"),
        ("net_of_mine:nothing", "returned NoneType and must return a torch.nn.Module"),
        ("net_of_mine:broken", "KeyError: 'no such layer' (at {folder}/net_of_mine.py:20)"),
        ("net_of_mine:fixed", "(2, 1000), where logits (2, 7) are needed"),
        ("net_of_mine:pair", "answers with a tuple"),
        ("net_of_mine:uncopied", "cannot be copied by copy.deepcopy"),
        ("broken_of_mine:make", "RuntimeError: half written (at {folder}/broken_of_mine.py:2)"),
        ("wrong_of_mine:make", "SyntaxError"),
        ("needs_of_mine:make", "No module named 'no_such_package_anywhere'"),
        (":make", "MODULE:FUNCTION"),
        ("net_of_mine:", "MODULE:FUNCTION"),
        ("net_of_mine.py:make", "without .py"),
        ("../net_of_mine:make", "MODULE:FUNCTION"),
        ("posix:getpid", "returned int"),
    ],
)
def test_own_code_that_cannot_be_used_is_explained(name: str, says: str, own: Path):
    assert says.format(folder=own) in told(name, size=8)


def test_the_code_of_a_network_is_its_sources(own: Path):
    before = code_of("net_of_mine:make,width=3")
    assert before == code_of("net_of_mine:make") == code_of("net_of_mine:colour")
    content = {"blocks_of_mine.py": BLOCKS, "net_of_mine.py": OWN}
    digest = hashlib.sha256()
    for name, source in content.items():
        digest.update(f"{name}|{len(source)}|".encode() + source.encode())
    assert before == digest.hexdigest()
    (own / "unrelated.py").write_text("x = 1\n")
    assert code_of("net_of_mine:make") == before
    (own / "blocks_of_mine.py").write_text(BLOCKS + "# changed\n")
    assert code_of("net_of_mine:make") != before
    assert code_of("posix:getpid") == code_of("resnet18") == code_of("wrn16_1") == ""
    assert timm.__version__ in code_of("timm:test_vit")


def test_own_code_in_a_package(own: Path):
    package = own / "package_of_mine"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "deep.py").write_text("from .parts import net\n\ndef make(num_classes):\n    return net(num_classes)\n")
    (package / "parts.py").write_text(
        "from torch import nn\n\ndef net(n):\n    return nn.Sequential(nn.Flatten(), nn.LazyLinear(n))\n"
    )
    try:
        assert build(arch("package_of_mine.deep:make", 4), 0)(torch.rand(2, 3, 4, 4)).shape == (2, 7)
        (package / "not_python.py").write_text("{{ template }} is\n")
        before = code_of("package_of_mine.deep:make")
        (package / "parts.py").write_text((package / "parts.py").read_text() + "\n")
        assert code_of("package_of_mine.deep:make") != before
    finally:
        for name in [name for name in sys.modules if name.startswith("package_of_mine")]:
            del sys.modules[name]
