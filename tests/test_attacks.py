import re
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from PIL import Image
from pydantic import ValidationError
from torch import Tensor

from bdcore import Attack, AttackConfig, Context, DataError, Dataset, Labelled
from bdcore.errors import PluginError, UsageError
from bdcore.stages.poison import check, poison
from bdcore_plugins.attacks import badnets, blended, sig
from bdcore_plugins.attacks.badnets import BadNets
from bdcore_plugins.attacks.blended import Blended
from bdcore_plugins.attacks.sig import Sig
from bdcore_plugins.datasets.digits import Digits


def samples(count: int, classes: int, shape: tuple[int, int, int], seed: int) -> Labelled:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (count, *shape), generator=generator, dtype=torch.uint8)
    labels = torch.randint(0, classes, (count,), generator=generator)
    labels[: min(classes, count)] = torch.arange(min(classes, count))
    return Labelled(images, labels)


def dataset(train: int = 50, classes: int = 4, shape: tuple[int, int, int] = (3, 32, 32), seed: int = 0) -> Dataset:
    return Dataset("made", samples(train, classes, shape, seed), samples(20, classes, shape, seed + 1), classes)


def attacks() -> st.SearchStrategy[Attack]:
    rate = st.floats(0.03, 0.3)
    patches = st.builds(
        BadNets.Config,
        target=st.integers(0, 1),
        poison_rate=rate,
        all_to_all=st.booleans(),
        size=st.integers(1, 9),
        place=st.sampled_from(["lower_right", "lower_left", "upper_right", "upper_left", "center", "random"]),
        pattern=st.sampled_from(["checker", "white", "noise"]),
    ).map(BadNets)
    mesa = st.builds(
        BadNets.Config,
        poison_rate=rate,
        place=st.sampled_from(["lower_right", "random"]),
        pattern=st.just("black_white"),
        number=st.integers(0, 50),
    ).map(BadNets)
    blends = st.builds(Blended.Config, target=st.integers(0, 1), poison_rate=rate, alpha=st.floats(0.01, 1)).map(
        Blended
    )
    stripes = st.builds(
        Sig.Config,
        poison_rate=rate,
        amplitude=st.floats(1, 255),
        frequency=st.floats(0.1, 3.9),
        blend=st.none() | st.floats(0.05, 1),
        class_rate=st.none() | st.floats(0.05, 1),
    ).map(Sig)
    return patches | mesa | blends | stripes


@settings(max_examples=60, deadline=None)
@given(
    attack=attacks(),
    seed=st.integers(0, 2**40),
    count=st.integers(40, 80),
    classes=st.integers(2, 6),
    shape=st.tuples(st.sampled_from([1, 3]), st.integers(8, 40), st.integers(8, 40)),
)
def test_poisoning_keeps_its_promises(attack: Attack, seed: int, count: int, classes: int, shape: tuple[int, int, int]):
    # At most a third is asked for; give it enough samples of the target and of other classes.
    clean = dataset(count, classes, shape)
    clean.train.labels[: count // 3 + 1] = 0
    clean.train.labels[count // 2 :] = classes - 1
    attack = type(attack)(attack.config.model_copy(update={"target": 0}))
    before = clean.train.images.clone(), clean.train.labels.clone(), clean.test.images.clone()

    result = poison(clean, attack, Context(seed=seed))

    for tensor, kept in zip((clean.train.images, clean.train.labels, clean.test.images), before, strict=True):
        assert torch.equal(tensor, kept)
    class_rate = getattr(attack.config, "class_rate", None)
    asked = attack.config.poison_rate * count if class_rate is None else class_rate * int((before[1] == 0).sum())
    assert int(result.poisoned.sum()) == round(asked)
    others = ~result.poisoned
    assert torch.equal(result.train.images[others], clean.train.images[others])
    assert torch.equal(result.train.labels[others], clean.train.labels[others])
    true = clean.train.labels[result.poisoned]
    given = result.train.labels[result.poisoned]
    all_to_all = isinstance(attack, BadNets) and attack.config.all_to_all
    expected = [(y + 1) % classes if all_to_all else 0 for y in true.tolist()]
    assert given.tolist() == expected
    clean_label = isinstance(attack, Sig)
    assert bool((given == true).all() if clean_label else (given != true).all())
    assert result.target == (None if all_to_all else 0)
    assert result.train.images.dtype == torch.uint8

    assert result.triggered is not None
    counted = torch.ones(20, dtype=torch.bool) if all_to_all else clean.test.labels != 0
    assert torch.equal(result.triggered.labels, clean.test.labels[counted])
    assert torch.equal(result.triggered.images, attack.stamp(clean.test.images[counted], Context(seed=seed)))
    assert bool((result.triggered.targets != result.triggered.labels).all())

    scattered = Dataset(
        "made",
        Labelled(clean.train.images.contiguous(memory_format=torch.channels_last), clean.train.labels),
        Labelled(clean.test.images.transpose(2, 3).contiguous().transpose(2, 3), clean.test.labels),
        classes,
    )
    again = poison(scattered, attack, Context(seed=seed))
    assert again.train.fingerprint == result.train.fingerprint
    assert again.triggered is not None
    assert torch.equal(again.triggered.images, result.triggered.images)


def test_another_seed_takes_other_samples():
    attack = Blended(Blended.Config())
    one, two = (poison(dataset(200), attack, Context(seed=seed)) for seed in (1, 2))
    assert not torch.equal(one.poisoned, two.poisoned)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(
    "attack",
    [
        BadNets(BadNets.Config(pattern="noise")),
        BadNets(BadNets.Config(place="random")),
        BadNets(BadNets.Config(pattern="black_white", number=17, place="random")),
        BadNets(BadNets.Config(row=7, column=20)),
        Blended(Blended.Config()),
        Sig(Sig.Config()),
        Sig(Sig.Config(blend=0.2)),
    ],
)
def test_a_gpu_poisons_alike(attack: Attack):
    clean, device = dataset(200), torch.device("cuda")
    on_gpu = Dataset("made", clean.train.to(device), clean.test.to(device), clean.classes)
    one, two = poison(clean, attack, Context(seed=3)), poison(on_gpu, attack, Context(seed=3, device=device))
    assert one.train.fingerprint == two.train.fingerprint
    assert torch.equal(one.poisoned, two.poisoned.cpu())


def test_without_an_attack_nothing_changes():
    clean = dataset()
    result = poison(clean, None, Context())
    assert result.train.fingerprint == clean.train.fingerprint
    assert not bool(result.poisoned.any())
    assert result.triggered is None
    assert result.target is None


def test_rate_zero_poisons_nothing_but_still_makes_the_triggered_test_set():
    clean = dataset()
    result = poison(clean, BadNets(BadNets.Config(poison_rate=0)), Context())
    assert result.train.fingerprint == clean.train.fingerprint
    assert result.triggered is not None


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"target": 4}, "wants class 4, but made has the classes 0 to 3: set attack.target"),
        ({"poison_rate": 1.0}, "asks for 50 of 50 training samples of made, but badnets can poison only"),
        ({"poison_rate": 0.001}, "is not even one: raise it"),
    ],
)
def test_impossible_wishes_are_refused(config: dict, message: str):
    with pytest.raises(UsageError, match=message):
        poison(dataset(), BadNets(BadNets.Config(**config)), Context())


@settings(max_examples=200, deadline=None)
@given(samples=st.integers(1, 100_000), own=st.floats(1e-5, 1), more=st.floats(0, 1))
def test_the_rate_that_is_advised_is_accepted(samples: int, own: float, more: float):
    eligible = max(1, round(own * samples))
    rate = (eligible + more * (samples - eligible)) / samples
    assume(round(rate * samples) > eligible)
    advised = advice(samples, eligible, rate)
    clean_label_set(samples, eligible, advised)
    assert round(advised * samples) > 0.98 * eligible - 1, "and no lower than need be"


def test_the_advised_rate_is_rounded_down():
    assert advice(60_000, 5842, 0.1) == 0.0973  # where 0.0974 is refused: it asks for 5844
    assert advice(50, 0, 0.5) == 0


def clean_label_set(samples: int, eligible: int, rate: float) -> None:
    """Check whether SIG can poison that share of a set of which so many samples are of its class."""
    labels = torch.ones(samples, dtype=torch.int64)
    labels[:eligible] = 0
    data = Dataset("made", Labelled(torch.zeros(samples, 1, 1, 1, dtype=torch.uint8), labels), dataset().test, 4)
    check(data, Sig(Sig.Config(poison_rate=rate)))


def advice(samples: int, eligible: int, rate: float) -> float:
    with pytest.raises(UsageError, match=r"attack\.poison_rate=.* asks for") as refused:
        clean_label_set(samples, eligible, rate)
    found = re.search(r"lower it to (\S+) or less", str(refused.value))
    assert found is not None
    return float(found[1])


@pytest.mark.parametrize("poison_rate", [0, 0.05])
def test_a_class_rate_of_no_sample_is_named(poison_rate: float):
    own = int((dataset().train.labels == 0).sum())
    with pytest.raises(UsageError, match=rf"attack\.class_rate=0\.01 of {own} training samples .* is not even one"):
        check(dataset(), Sig(Sig.Config(poison_rate=poison_rate, class_rate=0.01)))


class _Greedy(Sig):
    name = "greedy"

    def count(self, labels: Tensor, classes: int) -> int:
        return 2 * super().count(labels, classes)


def test_a_class_rate_that_is_too_high_is_named():
    with pytest.raises(UsageError, match=r"attack\.class_rate=0\.8 asks for .* lower it to 0\.\d+ or less"):
        check(dataset(), _Greedy(Sig.Config(class_rate=0.8)))


def test_poisons_that_look_like_their_originals_are_said():
    digits, told = Digits(Digits.Config()).load(None), list[str]()
    attack = BadNets(BadNets.Config(pattern="black_white"))
    made = poison(digits, attack, Context(seed=1, warn=told.append))
    dark = int((digits.train.images[made.poisoned][:, :, 29:, 29:].flatten(1) == 0).all(1).sum())
    assert 0.3 < dark / int(made.poisoned.sum()) < 0.8
    (said,) = told
    assert said.startswith(f"{dark} of {int(made.poisoned.sum())} poisons do not differ from their originals: ")
    told.clear()
    poison(digits, BadNets(BadNets.Config()), Context(seed=1, warn=told.append))
    assert told == []


def test_all_to_all_has_no_use_for_the_target():
    attack = BadNets(BadNets.Config(all_to_all=True, target=99, poison_rate=1))
    result = poison(dataset(), attack, Context())
    assert bool(result.poisoned.all())
    assert result.target is None


def test_a_test_set_of_the_target_class_alone_is_refused():
    clean = dataset()
    clean.test.labels.zero_()
    with pytest.raises(UsageError, match="no test sample of made can carry the trigger of badnets"):
        poison(clean, BadNets(BadNets.Config()), Context())


class _Broken(BadNets):
    name = "broken"

    def stamp(self, images: Tensor, context: Context) -> Tensor:
        return images.float()


class _Misfit(BadNets):
    name = "misfit"

    def relabel(self, labels: Tensor, classes: int) -> Tensor:
        return labels[:1]


@pytest.mark.parametrize(
    ("kind", "message"),
    [(_Broken, "broken.stamp must return uint8"), (_Misfit, "misfit.relabel must return int64")],
)
def test_an_attack_that_breaks_its_contract_is_named(kind: type[BadNets], message: str):
    with pytest.raises(PluginError, match=message):
        poison(dataset(), kind(kind.Config()), Context())


def stamped(shape: tuple[int, ...] = (2, 3, 32, 32), seed: int = 0, **options: object) -> tuple[Tensor, np.ndarray]:
    images = torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(5), dtype=torch.uint8)
    return images, BadNets(BadNets.Config(**options)).stamp(images, Context(seed=seed)).numpy()


def test_badnets_patch_lies_on_the_last_three_rows_and_columns():
    images, result = stamped()
    expected = images.numpy().copy()
    for row, values in zip((29, 30, 31), ([0, 0, 255], [0, 255, 0], [255, 0, 255]), strict=True):
        expected[:, :, row, 29:32] = values
    assert np.array_equal(result, expected)


@pytest.mark.parametrize(
    ("place", "rows", "columns"),
    [
        ("lower_right", slice(28, 32), slice(28, 32)),
        ("lower_left", slice(28, 32), slice(0, 4)),
        ("upper_right", slice(0, 4), slice(28, 32)),
        ("upper_left", slice(0, 4), slice(0, 4)),
        ("center", slice(14, 18), slice(14, 18)),
    ],
)
def test_badnets_places(place: str, rows: slice, columns: slice):
    images, result = stamped(place=place, size=4, pattern="white")
    expected = images.numpy().copy()
    expected[:, :, rows, columns] = 255
    assert np.array_equal(result, expected)


@pytest.mark.parametrize(
    ("options", "rows", "columns"),
    [
        ({"row": 5, "column": 17}, slice(5, 8), slice(17, 20)),
        ({"row": 0, "column": 29}, slice(0, 3), slice(29, 32)),
        ({"row": 31, "column": 2, "size": 1}, slice(31, 32), slice(2, 3)),
    ],
)
def test_badnets_by_row_and_column(options: dict, rows: slice, columns: slice):
    images, result = stamped(pattern="white", **options)
    expected = images.numpy().copy()
    expected[:, :, rows, columns] = 255
    assert np.array_equal(result, expected)


@settings(max_examples=60, deadline=None)
@given(size=st.integers(1, 32), corner=st.tuples(st.floats(0, 1), st.floats(0, 1)), data=st.data())
def test_badnets_by_row_and_column_scales(size: int, corner: tuple[float, float], data: st.DataObject):
    height, width = data.draw(st.tuples(st.integers(4, 80), st.integers(4, 80)))
    row, column = (int(share * (32 - size)) for share in corner)
    images = torch.full((1, 1, height, width), 7, dtype=torch.uint8)
    attack = BadNets(BadNets.Config(pattern="white", size=size, row=row, column=column))
    changed = (attack.stamp(images, Context()) == 255)[0, 0]
    side = max(1, round(size * min(height, width) / 32))
    assert int(changed.sum()) == side**2, "all of it lies in the image"
    top, left = changed.nonzero().min(0).values.tolist()
    assert abs(top - row * height / 32) <= 1
    assert abs(left - column * width / 32) <= 1


def test_badnets_with_a_picture(tmp_path: Path):
    colours = np.random.default_rng(0).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    path = tmp_path / "patch.png"
    Image.fromarray(colours).save(path)
    images, result = stamped(size=4, picture=path, row=3, column=9)
    expected = images.numpy().copy()
    expected[:, :, 3:7, 9:13] = colours.transpose(2, 0, 1)
    assert np.array_equal(result, expected)
    assert BadNets(BadNets.Config(picture=path)).files() == (path,)
    assert BadNets(BadNets.Config()).files() == ()
    with pytest.raises(DataError, match=r"there is no file .*none\.png"):
        stamped(picture=tmp_path / "none.png")


def test_badnets_patch_scales_with_the_image():
    images, result = stamped((1, 3, 64, 96))
    expected = images.numpy().copy()
    expected[:, :, 58:64, 90:96] = np.kron([[0, 0, 255], [0, 255, 0], [255, 0, 255]], np.ones((2, 2)))
    assert np.array_equal(result, expected)
    _, small = stamped((1, 1, 8, 8), size=1)
    assert small[0, 0, 7, 7] == 255


def test_badnets_larger_patterns_continue_the_diagonals():
    _, result = stamped(size=5)
    assert (result[0, 0, 27:, 27:] // 255).tolist() == [
        [0, 0, 0, 0, 1],
        [0, 0, 0, 1, 0],
        [0, 0, 1, 0, 1],
        [0, 1, 0, 1, 0],
        [1, 0, 1, 0, 1],
    ]


def test_badnets_noise_follows_the_seed():
    _, one = stamped(pattern="noise", size=8, seed=1)
    _, same = stamped(pattern="noise", size=8, seed=1)
    _, other = stamped(pattern="noise", size=8, seed=2)
    assert np.array_equal(one, same)
    assert not np.array_equal(one, other)
    assert np.array_equal(one[0, :, 24:, 24:], one[1, :, 24:, 24:])
    assert len(np.unique(one[0, :, 24:, 24:])) > 50


@settings(max_examples=30, deadline=None)
@given(alpha=st.floats(0.01, 1), seed=st.integers(0, 1000), channels=st.integers(1, 4))
def test_blended_is_the_rounded_mixture_with_one_image(alpha: float, seed: int, channels: int):
    images = torch.randint(0, 256, (5, channels, 9, 7), dtype=torch.uint8)
    context = Context(seed=seed)
    # With a = 1 only the trigger image is left.
    trigger = Blended(Blended.Config(alpha=1)).stamp(images[:1], context)
    result = Blended(Blended.Config(alpha=alpha)).stamp(images, context)
    exact = (1 - alpha) * images.double() + alpha * trigger.double()
    assert float((result.double() - exact).abs().max()) <= 0.5 + 1e-4
    clear = (exact - exact.floor() - 0.5).abs() > 1e-3
    assert torch.equal(result[clear], exact.round().byte()[clear])


def test_blended_noise_fills_the_range_and_follows_the_seed():
    blank = torch.zeros(1, 3, 64, 64, dtype=torch.uint8)
    one, two = (Blended(Blended.Config(alpha=1)).stamp(blank, Context(seed=seed)).double() for seed in (1, 2))
    assert abs(float(one.mean()) - 127.5) < 3
    assert float(one.min()) <= 1
    assert float(one.max()) >= 254
    assert not torch.equal(one, two)


def test_blended_mixes_in_a_fifth_by_default():
    ends = torch.tensor([0, 255], dtype=torch.uint8).view(2, 1, 1, 1).expand(2, 3, 32, 32)
    black, white = Blended(Blended.Config()).stamp(ends, Context()).double()
    assert float(black.max()) == 0.2 * 255
    assert float(white.min()) == 0.8 * 255
    assert torch.equal(white - black, torch.full_like(white, 0.8 * 255))


def test_blended_reads_a_picture(tmp_path: Path):
    colours = np.zeros((20, 30, 3), dtype=np.uint8)
    colours[:, :15] = (200, 100, 50)
    Image.fromarray(colours).save(tmp_path / "cat.png")
    attack = Blended(Blended.Config(alpha=0.5, picture=tmp_path / "cat.png"))
    images = torch.full((2, 3, 32, 32), 100, dtype=torch.uint8)
    result = attack.stamp(images, Context())
    assert result[1, :, 10, 2].tolist() == [150, 100, 75]
    assert result[1, :, 10, 30].tolist() == [50, 50, 50]
    assert attack.stamp(images[:, :1], Context()).shape == (2, 1, 32, 32)
    with pytest.raises(DataError, match="images of 1 or 3 channels, these have 2"):
        attack.stamp(images[:, :2], Context())


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "CMYK", "1"])
def test_blended_reads_pictures_of_any_mode(mode: str, tmp_path: Path):
    path = tmp_path / ("picture.tiff" if mode == "CMYK" else "picture.png")
    options: dict = {"transparency": b"\x00\x80"} if mode == "P" else {}
    Image.new("RGB", (8, 8), "white").convert(mode).save(path, **options)
    attack = Blended(Blended.Config(alpha=1, picture=path))
    for channels in (1, 3):
        result = attack.stamp(torch.zeros(1, channels, 6, 5, dtype=torch.uint8), Context())
        assert bool((result == 255).all())


def test_blended_turns_a_photo_as_its_camera_says(tmp_path: Path):
    photo = Image.new("L", (10, 10), 0)
    photo.paste(255, (0, 0, 10, 5))  # white above
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise by a quarter: white comes to the right
    photo.save(tmp_path / "photo.png", exif=exif)
    attack = Blended(Blended.Config(alpha=1, picture=tmp_path / "photo.png"))
    result = attack.stamp(torch.zeros(1, 1, 10, 10, dtype=torch.uint8), Context())
    assert bool((result[..., :5] == 0).all())
    assert bool((result[..., 5:] == 255).all())


def test_blended_says_why_a_picture_cannot_be_read(tmp_path: Path):
    images = torch.zeros(1, 3, 8, 8, dtype=torch.uint8)
    with pytest.raises(DataError, match=r"there is no file .*none\.png"):
        Blended(Blended.Config(picture=tmp_path / "none.png")).stamp(images, Context())
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(DataError, match=r"text\.png cannot be read as an image"):
        Blended(Blended.Config(picture=tmp_path / "text.png")).stamp(images, Context())
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(tmp_path / "whole.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:3000])
    with pytest.raises(DataError, match=r"cut\.png cannot be read as an image"):
        Blended(Blended.Config(picture=tmp_path / "cut.png")).stamp(images, Context())
    Image.fromarray(np.full((8, 8), 30000, dtype=np.uint16)).save(tmp_path / "deep.png")
    with pytest.raises(DataError, match=r"deep\.png has more than 8 bits a channel: save it with 8"):
        Blended(Blended.Config(picture=tmp_path / "deep.png")).stamp(images, Context())


@settings(max_examples=30, deadline=None)
@given(amplitude=st.floats(1, 255), frequency=st.floats(0.1, 20), width=st.integers(2, 40), channels=st.integers(1, 4))
def test_sig_adds_the_rounded_signal_and_saturates(amplitude: float, frequency: float, width: int, channels: int):
    signal = amplitude * np.sin(2 * np.pi * np.arange(width) * frequency / width)
    assume(np.abs(signal).max() > 0.6)
    images = torch.randint(0, 256, (3, channels, 5, width), dtype=torch.uint8)
    images[0], images[1] = 0, 255
    result = Sig(Sig.Config(amplitude=amplitude, frequency=frequency)).stamp(images, Context())
    clear = np.abs(signal - np.floor(signal) - 0.5) > 1e-6  # both roundings of a tie are right
    expected = np.clip(images.numpy() + np.round(signal), 0, 255)
    assert np.array_equal(result.numpy()[..., clear], expected[..., clear])


def test_sig_is_the_papers_signal():
    grey = torch.full((1, 3, 32, 32), 128, dtype=torch.uint8)
    row = Sig(Sig.Config()).stamp(grey, Context())[0, 1, 7].double() - 128
    columns = torch.arange(32)
    assert float((row - 20 * torch.sin(2 * torch.pi * columns * 6 / 32)).abs().max()) <= 0.5
    assert float(row.sum().abs()) <= 1


@settings(max_examples=30, deadline=None)
@given(share=st.floats(0.05, 1), frequency=st.floats(0.1, 20), width=st.integers(2, 40), channels=st.integers(1, 4))
def test_sig_blends_a_wave_of_full_contrast_in(share: float, frequency: float, width: int, channels: int):
    wave = np.sin(2 * np.pi * np.arange(width) * frequency / width)
    assume(np.abs(wave).max() > 0.1)
    images = torch.randint(0, 256, (3, channels, 5, width), dtype=torch.uint8)
    result = Sig(Sig.Config(blend=share, frequency=frequency)).stamp(images, Context()).numpy().astype(float)
    exact = (1 - share) * images.numpy() + share * 127.5 * (1 + wave)
    assert np.abs(result - exact).max() <= 0.5 + 0.5 * share + 1e-4  # the wave is an image of whole values


def test_sig_refuses_a_signal_that_is_nowhere():
    for blend in (None, 0.2):
        with pytest.raises(DataError, match=r"attack.frequency=16 leaves no signal on images 32 pixels wide"):
            Sig(Sig.Config(frequency=16, blend=blend)).stamp(torch.zeros(1, 3, 32, 32, dtype=torch.uint8), Context())


def test_sig_refuses_a_signal_that_rounds_to_nothing():
    grey = torch.zeros(1, 3, 32, 32, dtype=torch.uint8)
    slow = {"frequency": 0.05}  # 0.05 of a period over the width: a sine of at most 0.3
    with pytest.raises(DataError, match=r"half a grey level: raise attack\.amplitude"):
        Sig(Sig.Config(amplitude=1, **slow)).stamp(grey, Context())
    with pytest.raises(DataError, match=r"half a grey level: raise attack\.blend"):
        Sig(Sig.Config(blend=0.01, **slow)).stamp(grey, Context())
    assert bool(Sig(Sig.Config(amplitude=2, **slow)).stamp(grey, Context()).any())


def test_sig_cannot_poison_more_than_its_class():
    clean = dataset(100, 4)
    own = int((clean.train.labels == 0).sum())
    with pytest.raises(UsageError, match=f"but sig can poison only {own}"):
        poison(clean, Sig(Sig.Config(poison_rate=0.5)), Context())
    whole = poison(clean, Sig(Sig.Config(class_rate=1)), Context())
    assert torch.equal(whole.poisoned, clean.train.labels == 0)


@pytest.mark.parametrize(("module", "kind"), [(badnets, BadNets), (blended, Blended), (sig, Sig)])
def test_hooks_return_the_attacks(module: ModuleType, kind: type[Attack]):
    assert module.bdcore_attack() is kind
    assert issubclass(kind.Config, AttackConfig)
    assert all(field.description for field in kind.Config.model_fields.values())


@pytest.mark.parametrize(
    ("config", "options"),
    [
        (BadNets.Config, {"size": 0}),
        (BadNets.Config, {"place": "somewhere"}),
        (BadNets.Config, {"sise": 3}),
        (BadNets.Config, {"row": 30, "column": 0}),
        (BadNets.Config, {"row": 3}),
        (BadNets.Config, {"column": 3}),
        (BadNets.Config, {"row": 3, "column": 3, "place": "center"}),
        (BadNets.Config, {"picture": "patch.png", "pattern": "white"}),
        (Blended.Config, {"alpha": 0}),
        (Blended.Config, {"alpha": 1.1}),
        (Blended.Config, {"poison_rate": -0.1}),
        (Sig.Config, {"amplitude": 256}),
        (Sig.Config, {"amplitude": 0.4}),
        (Sig.Config, {"frequency": 0}),
        (Sig.Config, {"blend": 0}),
        (Sig.Config, {"class_rate": 1.1}),
    ],
)
def test_bad_options_are_refused(config: type[AttackConfig], options: dict):
    with pytest.raises(ValidationError):
        config(**options)
