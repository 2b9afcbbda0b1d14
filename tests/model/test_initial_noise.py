"""The noise a loop begins from: SplitMix64's published outputs, a normal distribution, and one sample's alone."""

from __future__ import annotations

import math

import torch

from model import IceConfig, IceModel
from model.initial_noise import hash_64, normal_noise

GAMMA = 0x9E3779B97F4A7C15 - 2**64


def test_the_hash_is_splitmix64() -> None:
    """The first outputs of the generator seeded with 0, from its reference implementation."""
    expected = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    hashes = hash_64(torch.arange(1, 4) * GAMMA).tolist()
    assert [value % 2**64 for value in hashes] == expected


def test_the_noise_is_standard_normal_and_free_of_correlation() -> None:
    noise_BSD = normal_noise(torch.arange(64), 64, 64).double()
    samples = noise_BSD.numel()
    assert noise_BSD.mean().abs() < 5 / math.sqrt(samples)
    assert (noise_BSD.var() - 1).abs() < 5 * math.sqrt(2 / samples)
    for quantile in (0.001, 0.1, 0.5, 0.9, 0.999):
        threshold = math.sqrt(2) * torch.erfinv(torch.tensor(2 * quantile - 1, dtype=torch.float64))
        below = (noise_BSD < threshold).double().mean()
        assert (below - quantile).abs() < 5 * math.sqrt(quantile * (1 - quantile) / samples), quantile
    for one, other in (
        (noise_BSD[1:], noise_BSD[:-1]),  # samples whose numbers follow each other
        (noise_BSD[:, 1:], noise_BSD[:, :-1]),
        (noise_BSD[..., 1:], noise_BSD[..., :-1]),
    ):
        assert (one * other).mean().abs() < 5 / math.sqrt(samples)


def test_a_sequence_has_its_noise_in_any_batch_and_at_any_length() -> None:
    keys = torch.tensor([5, -1, 2**62, 5])
    noise = normal_noise(keys, 8, 4)
    torch.testing.assert_close(noise[0], noise[3], rtol=0, atol=0)
    torch.testing.assert_close(normal_noise(keys[2:3], 8, 4)[0], noise[2], rtol=0, atol=0)
    torch.testing.assert_close(normal_noise(keys, 3, 4), noise[:, :3], rtol=0, atol=0)
    assert not torch.equal(noise[0], noise[1])


def test_a_model_begins_with_the_noise_of_its_keys_in_training_only() -> None:
    torch.manual_seed(0)
    model = IceModel(IceConfig(initial_state="random").scaled_down())
    ids = torch.randint(0, model.config.vocab_size, (2, 6))
    keys = torch.tensor([3, 4])
    one = model(ids, 2, noise_keys=keys)
    torch.testing.assert_close(model(ids.flip(0), 2, noise_keys=keys.flip(0)).flip(0), one)
    assert not torch.equal(model(ids, 2, noise_keys=keys + 1), one)
    model.eval()
    torch.testing.assert_close(model(ids, 2, noise_keys=keys), model(ids, 2), rtol=0, atol=0)
