"""The noise is Philox, addressed as documented, distributed as named, and independent across addresses.

All seeds are fixed. Statistical bounds are 4.5 standard errors, or p-values above 1e-3, of the exact law.
"""

import dataclasses
import importlib
import math

import numpy as np
import pytest
import scipy.stats
import torch

from expfam_poco.noise import NoiseKey, address_of, noise, philox, quantile, reflect, traced, words

module = importlib.import_module("expfam_poco.family.noise")  # a package may re-export the function under this name

KINDS = ("normal", "logistic", "uniform", "rademacher")
CONTINUOUS = {
    "normal": scipy.stats.norm(),
    "logistic": scipy.stats.logistic(scale=0.5),
    "uniform": scipy.stats.uniform(),
}
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
MANY = 2**20
MASK = 0xFFFFFFFF
KEY = NoiseKey(seed=0x0123456789ABCDEF, stream=3, step=41, parameter=5)


def reference_philox(counter, key):
    """Salmon et al. 2011, section 4.3, word by word in Python integers."""
    (c0, c1, c2, c3), (k0, k1) = counter, key
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (p1 >> 32) ^ c1 ^ k0, p1 & MASK, (p0 >> 32) ^ c3 ^ k1, p0 & MASK
        k0, k1 = (k0 + 0x9E3779B9) & MASK, (k1 + 0xBB67AE85) & MASK
    return c0, c1, c2, c3


def same_words(monkeypatch, word):
    """Every word becomes `word`."""
    monkeypatch.setattr(
        module,
        "words_of_tiles",
        lambda first, stop, draws, key, device: (torch.full((2, draws, module.TILE * (stop - first)), word),) * 2,
    )


# ---- words ------------------------------------------------------------------------------------------------

# Random123's kat_vectors, philox4x32 10: counter, key, words.
KNOWN_ANSWERS = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def from_hex(text):
    return [int(word, 16) for word in text.split()]


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN_ANSWERS)
def test_known_answers(counter, key, answer):
    assert philox(torch.tensor(from_hex(counter)), tuple(from_hex(key))).tolist() == from_hex(answer)
    assert list(reference_philox(from_hex(counter), from_hex(key))) == from_hex(answer)


def test_philox_equals_the_python_reference():
    generator = np.random.default_rng(0)
    for _ in range(5):
        counter, key = generator.integers(0, 2**32, (4, 40)), generator.integers(0, 2**32, 2).tolist()
        expected = [reference_philox(column, key) for column in counter.T.tolist()]
        assert philox(torch.from_numpy(counter), tuple(key)).T.tolist() == [list(block) for block in expected]
        lanes = [torch.from_numpy(row).view(5, 8) for row in counter]  # four tensors of any shape
        assert philox(lanes, tuple(key)).flatten(1).T.tolist() == [list(block) for block in expected]


def test_philox_leaves_its_counter_alone():
    counter = torch.arange(12).view(4, 3)
    philox(counter, (1, 2))
    assert counter.tolist() == torch.arange(12).view(4, 3).tolist()


@pytest.mark.parametrize(
    "key",
    [
        NoiseKey(0),
        NoiseKey(seed=7 + 9 * 2**32, stream=2, step=3, parameter=4, offset=5, draw=6),
        NoiseKey(2**64 - 1, stream=255, step=MASK, parameter=MASK, offset=2**34 - 6, draw=2**24 - 3),
    ],
)
def test_words_follow_the_documented_layout(key):
    for draw, row in enumerate(words((2, 3), 3, key)):
        for element, word in enumerate(row.flatten().tolist(), start=key.offset):
            block, lane = 64 * (element // 256) + element % 64, element % 256 // 64
            counter = (block, key.parameter, key.step, key.stream << 24 | key.draw + draw)
            assert word == reference_philox(counter, (key.seed % 2**32, key.seed // 2**32))[lane]


# ---- addresses --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_repeated_calls_agree_bitwise_and_touch_no_global_generator(kind):
    torch.manual_seed(0)
    state = torch.get_rng_state()
    first = noise(kind, (5, 7), 3, KEY)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(1)
    assert torch.equal(noise(kind, (5, 7), 3, dataclasses.replace(KEY)), first)
    assert torch.equal(noise(kind, (35,), 3, KEY), first.flatten(1))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_shard_sees_its_slice_of_the_whole(kind, dtype):
    whole = noise(kind, (640,), 2, KEY.at(offset=3), dtype=dtype)
    for offset in (0, 1, 60, 61, 62, 125, 252, 253, 254, 300, 509, 639):
        for size in (0, 1, 2, 63, 64, 65, 257, 330):
            size = min(size, 640 - offset)
            shard = noise(kind, (size,), 2, KEY.at(offset=3 + offset), dtype=dtype)
            assert torch.equal(shard, whole[:, offset : offset + size])
            assert torch.equal(
                words((size,), 2, KEY.at(offset=3 + offset)),
                words((640,), 2, KEY.at(offset=3))[:, offset : offset + size],
            )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("span", [256, 300, 700])
def test_spans_do_not_show(kind, span, monkeypatch):
    key = KEY.at(offset=6)
    expected, expected_words = noise(kind, (5, 211), 3, key), words((5, 211), 3, key)
    monkeypatch.setattr(module, "_SPAN", {"cpu": 3 * span})
    assert torch.equal(noise(kind, (5, 211), 3, key), expected)
    assert torch.equal(words((5, 211), 3, key), expected_words)


def test_the_default_span_is_crossed_without_a_seam():
    size, far = module._SPAN["cpu"] + 10, module._SPAN["cpu"] - 5
    assert torch.equal(words((size,), 1, KEY)[:, far:], words((15,), 1, KEY.at(offset=far)))


@pytest.mark.parametrize("kind", KINDS)
def test_draws_made_together_equal_draws_made_one_at_a_time(kind):
    together = noise(kind, (32,), 5, KEY)
    for draw in range(5):
        assert torch.equal(noise(kind, (32,), 1, KEY.at(draw=draw))[0], together[draw])


@pytest.mark.parametrize("shape", [(), (1,), (0,), (3, 0), (2, 3, 4), torch.Size([2, 2])])
def test_shapes(shape):
    for kind in KINDS:
        made = noise(kind, shape, 3, KEY)
        assert made.shape == (3, *shape) and made.dtype == torch.float32
    assert words(shape, 3, KEY).shape == (3, *shape)


@pytest.mark.parametrize("kind", KINDS)
def test_under_vmap(kind):
    batch = torch.arange(12.0).view(4, 3)
    expected = batch + noise(kind, (3,), 2, KEY).sum(0)
    mapped = torch.func.vmap(lambda row: row + noise(kind, row.shape, 2, KEY).sum(0))(batch)
    assert torch.equal(mapped, expected)


def test_under_vmap_in_spans(monkeypatch):
    expected = noise("normal", (30,), 1, KEY)
    monkeypatch.setattr(module, "_SPAN", {"cpu": 8})
    mapped = torch.func.vmap(lambda row: row * noise("normal", (30,), 1, KEY))(torch.ones(2, 1))
    assert torch.equal(mapped, expected.expand(2, 1, 30))


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("kind", KINDS)
def test_cuda_equals_cpu(kind):
    key = KEY.at(offset=3)
    assert torch.equal(words((1001,), 3, key, "cuda").cpu(), words((1001,), 3, key))
    for dtype in (torch.float32, torch.float64):
        there = noise(kind, (1001,), 3, key, dtype=dtype, device="cuda")
        torch.testing.assert_close(there.cpu(), noise(kind, (1001,), 3, key, dtype=dtype), rtol=1e-5, atol=1e-6)


# ---- distributions ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sample():
    """2**20 elements of every kind, float64 and float32, made once."""
    return {
        (kind, dtype): noise(kind, (MANY,), 1, KEY.at(offset=1), dtype=dtype)[0]
        for kind in KINDS
        for dtype in (torch.float32, torch.float64)
    }


def exact_moment(kind, order):
    if kind == "uniform":
        return 1 / (order + 1)
    if order % 2:
        return 0.0
    if kind == "rademacher":
        return 1.0
    if kind == "normal":
        return math.prod(range(1, order, 2))
    bernoulli = {
        2: 1 / 6,
        4: 1 / 30,
        6: 1 / 42,
        8: 1 / 30,
    }  # |B_2k|; E X^2k = π^2k (2^2k − 2) |B_2k| at scale 1
    return (math.pi / 2) ** order * (2**order - 2) * bernoulli[order]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", KINDS)
def test_moments(kind, dtype, sample):
    values = sample[kind, dtype].double()
    for order in (1, 2, 3, 4):
        variance = exact_moment(kind, 2 * order) - exact_moment(kind, order) ** 2
        bound = 4.5 * math.sqrt(variance / MANY) + 1e-7
        assert abs(values.pow(order).mean().item() - exact_moment(kind, order)) < bound, order


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", CONTINUOUS)
def test_kolmogorov_smirnov(kind, dtype, sample):
    values = np.sort(sample[kind, dtype].double().numpy())
    probability, rank = CONTINUOUS[kind].cdf(values), np.arange(MANY)
    distance = max(np.max((rank + 1) / MANY - probability), np.max(probability - rank / MANY))
    assert scipy.stats.kstwobign.sf(distance * math.sqrt(MANY)) > 1e-3


@pytest.mark.parametrize("kind", ["normal", "logistic"])
def test_tails(kind):
    values = torch.cat([noise(kind, (MANY,), 1, KEY.at(step=step))[0] for step in range(4)])
    for threshold in (3, 4, 5):
        probability = CONTINUOUS[kind].sf(threshold)
        for side in (values > threshold, values < -threshold):
            test = scipy.stats.binomtest(int(side.sum()), values.numel(), probability)
            assert test.pvalue > 1e-3, (threshold, test.statistic, probability)


def test_bytes_are_uniform():
    octets = words((MANY,), 1, KEY).numpy().astype("<u4").view(np.uint8).reshape(-1, 4)
    for position in octets.T:
        assert 1e-3 < scipy.stats.chisquare(np.bincount(position, minlength=256)).pvalue < 1 - 1e-3


def assert_uncorrelated(first, second):
    first, second = first.double(), second.double()
    bound = 4.5 / math.sqrt(first.numel())
    for one, other in ((first, second), (first**2, second**2), (first, second**2), (first**2, second)):
        one, other = one - one.mean(), other - other.mean()
        correlation = (one * other).sum() / (one.norm() * other.norm())
        assert abs(correlation.item()) < bound


@pytest.mark.parametrize("kind", CONTINUOUS)
def test_elements_are_uncorrelated(kind, sample):
    values = sample[kind, torch.float64]
    for lag in (1, 2, 3, 4, 1024):
        assert_uncorrelated(values[:-lag], values[lag:])
    first, second = noise(kind, (MANY,), 1, KEY, dtype=torch.float64).view(-1, 2).unbind(-1)
    assert_uncorrelated(first, second)  # a Box–Muller pair
    assert_uncorrelated(first[::2], first[1::2])  # the two pairs of a block


@pytest.mark.parametrize("kind", CONTINUOUS)
@pytest.mark.parametrize(
    "changed",
    [
        {"step": 42},
        {"parameter": 6},
        {"stream": 4},
        {"draw": 1},
        {"seed": KEY.seed + 1},
        {"seed": KEY.seed + 2**32},
    ],
    ids=["step", "parameter", "stream", "draw", "seed", "seed-high-word"],
)
def test_addresses_are_uncorrelated(kind, changed):
    here, there = (noise(kind, (2**17,), 1, key, dtype=torch.float64)[0] for key in (KEY, KEY.at(**changed)))
    assert (here == there).float().mean() < 1e-3
    assert_uncorrelated(here, there)
    assert_uncorrelated(here[1:], there[:-1])


def test_one_element_is_uncorrelated_along_steps_and_parameters():
    """What one weight sees over time, and what neighbouring parameters see: few elements, many addresses."""
    by_step = torch.cat([noise("normal", (16,), 1, NoiseKey(1, step=step)) for step in range(800)])
    by_parameter = torch.cat([noise("normal", (16,), 1, NoiseKey(1, parameter=index)) for index in range(800)])
    by_draw = noise("normal", (16,), 800, NoiseKey(1))
    for values in (by_step, by_parameter, by_draw):
        assert_uncorrelated(values[:-1].flatten(), values[1:].flatten())
    assert_uncorrelated(by_step[1:].flatten(), by_parameter[1:].flatten())
    assert_uncorrelated(by_step[1:].flatten(), by_draw[1:].flatten())


# ---- precision --------------------------------------------------------------------------------------------


def test_float32_and_float64_noise_agree_up_to_rounding(sample):
    def difference(kind):
        return (sample[kind, torch.float32].double() - sample[kind, torch.float64]).abs()

    # √(−2 log u) loses digits where u rounds to 1, that is near 0: there the error is at most √2**−24.
    assert difference("normal").max() < 2.5e-4 and difference("normal").square().mean().sqrt() < 1e-6
    large = sample["normal", torch.float64].abs() > 1
    assert difference("normal")[large].max() < 5e-6
    assert (difference("logistic") < 3e-7 + 1e-6 * sample["logistic", torch.float64].abs()).all()
    assert difference("uniform").max() <= 2**-24 + 2**-33
    assert difference("rademacher").max() == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_float32_rounded(dtype):
    for kind in ("normal", "logistic", "rademacher"):
        assert torch.equal(noise(kind, (1000,), 1, KEY, dtype=dtype), noise(kind, (1000,), 1, KEY).to(dtype))
    cell = torch.finfo(dtype).eps
    coarse = noise("uniform", (1000,), 1, KEY, dtype=dtype)
    assert coarse.dtype == dtype
    assert (coarse.double() - noise("uniform", (1000,), 1, KEY, dtype=torch.float64)).abs().max() <= cell / 2
    assert torch.equal(reflect("uniform", reflect("uniform", coarse)), coarse)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("word", [0, 1, 2**31 - 1, 2**31, MASK - 1, MASK])
def test_extreme_words(word, dtype, monkeypatch):
    same_words(monkeypatch, word)
    made = {kind: noise(kind, (4,), 1, KEY, dtype=dtype) for kind in KINDS}
    uniform = made["uniform"]
    assert (uniform > 0).all() and (uniform < 1).all()
    assert (reflect("uniform", uniform) > 0).all() and (reflect("uniform", uniform) < 1).all()
    expected = 0.5 * (math.log(word + 0.5) - math.log(2**32 - word - 0.5))
    tolerance = max(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps if dtype != torch.float64 else 0)
    exact = torch.full((1, 4), expected, dtype=torch.float64)
    torch.testing.assert_close(made["logistic"].double(), exact, rtol=4 * tolerance, atol=2 * tolerance)
    assert made["normal"].isfinite().all() and made["normal"].abs().max() < 6.8
    assert (made["rademacher"] == (1 if word >= 2**31 else -1)).all()


def test_normal_is_box_muller():
    lanes = words((512,), 1, KEY).view(2, 4, 64).double()
    made = noise("normal", (512,), 1, KEY, dtype=torch.float64).view(2, 4, 64)
    for first in (0, 2):
        u, v = ((lanes[:, lane] + 0.5) / 2**32 for lane in (first, first + 1))
        radius, angle = torch.sqrt(-2 * torch.log(u)), 2 * math.pi * v
        torch.testing.assert_close(made[:, first], radius * torch.cos(angle), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(made[:, first + 1], radius * torch.sin(angle), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_traced_noise_is_the_same_noise(kind, dtype):
    tolerance = 2 * torch.finfo(dtype).eps
    for size, offset in ((1, 0), (255, 256), (1000, 2**34 - 1024)):
        key = KEY.at(offset=offset, draw=5)
        made = traced(kind, size, address_of(key), dtype)
        assert made.dtype == dtype
        torch.testing.assert_close(made, noise(kind, (size,), 1, key, dtype=dtype)[0], rtol=tolerance, atol=tolerance)


def test_traced_noise_begins_with_a_tile():
    with pytest.raises(ValueError, match=r"offset=100.*multiple of 256"):
        address_of(KEY.at(offset=100))


# ---- reflection and quantiles -----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_reflection_is_an_involution_about_the_median(kind):
    made = noise(kind, (1000,), 2, KEY)
    partner = reflect(kind, made)
    assert torch.equal(partner, 1 - made if kind == "uniform" else -made)
    assert torch.equal(reflect(kind, partner), made)
    u = torch.linspace(0.01, 0.49, 25, dtype=torch.float64)
    torch.testing.assert_close(quantile(kind, 1 - u), reflect(kind, quantile(kind, u)))


@pytest.mark.parametrize("kind", CONTINUOUS)
def test_quantiles_are_exact(kind):
    u = torch.tensor([1e-9, 1e-3, 0.1, 0.4, 0.5, 0.75, 0.999], dtype=torch.float64)
    expected = torch.from_numpy(CONTINUOUS[kind].ppf(u.numpy()))
    torch.testing.assert_close(quantile(kind, u), expected, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("kind", ["logistic", "uniform", "rademacher"])
def test_noise_is_the_quantile_of_its_word(kind):
    """All but Box–Muller invert the distribution function, so noise grows with its word."""
    u = (words((500,), 2, KEY).double() + 0.5) / 2**32
    made = noise(kind, (500,), 2, KEY, dtype=torch.float64)
    torch.testing.assert_close(quantile(kind, u), made, rtol=1e-9, atol=1e-12)


def test_the_rademacher_quantile_is_a_sign():
    u = torch.tensor([0.1, 0.4999, 0.5, 0.9], dtype=torch.float64)
    assert quantile("rademacher", u).tolist() == [-1, -1, 1, 1]
    assert quantile("rademacher", u).dtype == torch.float64


# ---- the key ----------------------------------------------------------------------------------------------


def test_at_replaces_the_named_counters():
    key = NoiseKey(1).at(step=2, stream=3, parameter=4, offset=5)
    assert key == NoiseKey(seed=1, stream=3, step=2, parameter=4, offset=5)
    assert key.at(step=0) == NoiseKey(seed=1, stream=3, step=0, parameter=4, offset=5)


LIMITS = {"seed": 2**64, "stream": 2**8, "step": 2**32, "parameter": 2**32, "offset": 2**34, "draw": 2**24}


@pytest.mark.parametrize("name", LIMITS)
def test_counters_are_checked(name):
    counters = {"seed": 1, name: LIMITS[name] - 1}
    NoiseKey(**counters)
    for wrong in (-1, LIMITS[name], 1.5, None):
        with pytest.raises(ValueError, match=rf"^{name} must be an int from 0 to 2\*\*\d+ - 1, got {wrong}: .*\.$"):
            NoiseKey(**{**counters, name: wrong})


def test_arguments_are_checked():
    for call in (
        lambda kind: noise(kind, (1,), 1, KEY),
        lambda kind: reflect(kind, torch.zeros(1)),
        lambda kind: quantile(kind, torch.zeros(1)),
    ):
        with pytest.raises(ValueError, match=r"'gaussian'.*normal, logistic, uniform, rademacher"):
            call("gaussian")
    for wrong in (0, -1, 2.0, 2**24 + 1):
        with pytest.raises(ValueError, match=rf"draws must be an int from 1 to .*got {wrong}:"):
            noise("normal", (1,), wrong, KEY)
    with pytest.raises(ValueError, match="draws must be"):
        noise("normal", (1,), 2, KEY.at(draw=2**24 - 1))
    with pytest.raises(ValueError, match=r"2\*\*34 elements.*split"):
        noise("normal", (2,), 1, KEY.at(offset=2**34 - 1))
    with pytest.raises(ValueError, match=r"torch.int64 cannot hold noise: choose one of .*torch.float32"):
        noise("rademacher", (1,), 1, KEY, dtype=torch.int64)
