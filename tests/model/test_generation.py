import pytest
import torch

from model import IceConfig, IceModel
from model.attention import Cache
from model.generation import Sampling, sample
from model.parameters import cache_bytes_per_token

CONFIGS = {
    "gqa": IceConfig(recurrent_layers=2, qk_norm=True).scaled_down(),
    "mla": IceConfig(attn_type="mla", recurrent_layers=2).scaled_down(),
    "mla_low_rank_query": IceConfig(attn_type="mla", q_lora_rank=64).scaled_down(),
    "act": IceConfig(act=True).scaled_down(),
    "random_state": IceConfig(initial_state="random").scaled_down(),
}


@pytest.fixture(params=CONFIGS)
def model(request: pytest.FixtureRequest) -> IceModel:
    return lively(CONFIGS[request.param])


def lively(config: IceConfig) -> IceModel:
    """Updates and logits large enough that a wrong cache changes the chosen tokens."""
    torch.manual_seed(3)
    model = IceModel(config).eval()
    for name, parameter in model.named_parameters():
        if name.endswith(("o_proj.weight", "down_proj", "down_proj.weight", "head.weight")):
            parameter.data.mul_(5)
    return model


def prompt(model: IceModel, batch: int = 2, length: int = 9) -> torch.Tensor:
    return torch.randint(0, model.config.vocab_size, (batch, length))


@pytest.mark.parametrize("n_loops", [1, 3, 7])
def test_prefill_and_decode_equal_the_full_forward(model: IceModel, n_loops: int) -> None:
    ids = prompt(model, length=14)
    with torch.no_grad():
        expected = model(ids, n_loops)
        for sizes in ([9, 1, 1, 1, 1, 1], [4, 6, 1, 3], [14]):
            cache, pieces, start = Cache(), [], 0
            for size in sizes:
                pieces.append(model(ids[:, start : start + size], n_loops, cache=cache))
                start += size
            torch.testing.assert_close(torch.cat(pieces, dim=1), expected, atol=3e-5, rtol=1e-4)
            assert cache.length == 14


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("attn_type", ["gqa", "mla"])
def test_decoding_in_half_precision_stays_near_the_full_forward(attn_type: str, dtype: torch.dtype) -> None:
    config = IceConfig(attn_type=attn_type, n_experts=0).scaled_down()  # a flipped route is a different function
    model = IceModel(config).eval().to(dtype)
    ids, cache = prompt(model, length=12), Cache()
    with torch.no_grad():
        expected = model(ids)
        pieces = [model(part, cache=cache) for part in ids.split([6, 1, 1, 4], dim=1)]
    assert (torch.cat(pieces, dim=1) - expected).float().norm() < 0.02 * expected.float().norm()


@pytest.mark.parametrize("n_loops", [1, 4])
def test_generation_with_the_cache_equals_generation_without(model: IceModel, n_loops: int) -> None:
    ids = prompt(model)
    with_cache = model.generate(ids, 20, n_loops, temperature=0.0)
    without = ids
    with torch.no_grad():
        for _ in range(20):
            without = torch.cat((without, model(without, n_loops)[:, -1].argmax(-1, keepdim=True)), dim=1)
    assert torch.equal(with_cache, without)


def test_generation_reads_each_token_once() -> None:
    model = lively(CONFIGS["gqa"])
    lengths: list[int] = []
    model.embed.register_forward_pre_hook(lambda module, args: lengths.append(args[0].shape[1]))
    model.generate(prompt(model, length=9), 5)
    assert lengths == [9, 1, 1, 1, 1]


def test_cache_size_is_what_the_configuration_says() -> None:
    for config in CONFIGS.values():
        cache = Cache()
        with torch.no_grad():
            IceModel(config)(torch.zeros(3, 5, dtype=torch.int64), 3, cache=cache)
        assert cache.bytes_per_token() == cache_bytes_per_token(config, 3, bytes_per_number=4)


def test_same_seed_same_text_and_other_seed_other_text() -> None:
    model = lively(CONFIGS["gqa"])
    ids = prompt(model)
    first = model.generate(ids, 16, seed=1)
    torch.manual_seed(99)
    assert torch.equal(first, model.generate(ids, 16, seed=1))
    assert not torch.equal(first, model.generate(ids, 16, seed=2))


def test_stream_yields_what_generate_returns_and_calls_back() -> None:
    model = lively(CONFIGS["gqa"])
    ids = prompt(model)
    heard: list[torch.Tensor] = []
    whole = model.generate(ids, 8, seed=5, on_token=heard.append)
    streamed = torch.stack(list(model.stream(ids, 8, seed=5)), dim=1)
    assert torch.equal(whole[:, 9:], streamed)
    assert torch.equal(torch.stack(heard, dim=1), streamed)


def test_stop_token_ends_a_sequence_and_then_the_batch() -> None:
    model = lively(CONFIGS["gqa"])
    ids = prompt(model)
    free = model.generate(ids, 12, temperature=0.0)[:, 9:]
    stops = {int(free[0, 2]), int(free[1, 5])}
    stopped = model.generate(ids, 12, temperature=0.0, stop_token_ids=stops)[:, 9:]
    firsts = [next(i for i, token in enumerate(row.tolist()) if token in stops) for row in free]
    assert stopped.shape[1] == max(firsts) + 1
    for row, first in enumerate(firsts):
        assert torch.equal(stopped[row, : first + 1], free[row, : first + 1])
        assert (stopped[row, first:] == free[row, first]).all()


def test_generation_leaves_the_mode_and_the_load_alone() -> None:
    model = lively(CONFIGS["gqa"]).train()
    model.generate(prompt(model), 3)
    assert model.training
    assert model.core.blocks[0].ffn.router.training
    assert model.core.expert_load.take().numel() == 0


@pytest.mark.parametrize(
    ("length", "kwargs", "message"),
    [
        (9, {"max_new_tokens": 60}, "max_new_tokens = 60: with 9 prompt tokens passes max_seq_len = 64"),
        (9, {"max_new_tokens": 65}, "max_new_tokens = 65: must be at most max_output_tokens = 64"),
        (9, {"max_new_tokens": 0}, "max_new_tokens = 0: must be at least 1"),
        (0, {"max_new_tokens": 4}, "the prompt is empty"),
        (9, {"max_new_tokens": 4, "temperature": -1.0}, "temperature = -1.0: must be at least 0"),
        (9, {"max_new_tokens": 4, "top_k": 0}, "top_k = 0: must be at least 1"),
        (9, {"max_new_tokens": 4, "top_p": 0.0}, "top_p = 0.0: must be above 0"),
        (9, {"max_new_tokens": 4, "n_loops": 0}, "n_loops = 0: must be at least 1"),
    ],
)
def test_limits_are_refused_with_a_reason(length: int, kwargs: dict[str, float], message: str) -> None:
    model = lively(CONFIGS["gqa"])
    with pytest.raises(ValueError, match=message):
        model.generate(prompt(model, length=length), **kwargs)


def test_a_cache_serves_one_depth_and_no_gradients() -> None:
    model = lively(CONFIGS["gqa"])
    ids, cache = prompt(model), Cache()
    with pytest.raises(ValueError, match="no_grad"):
        model(ids, cache=cache)
    with torch.no_grad():
        model(ids, 2, cache=cache)
        with pytest.raises(ValueError, match="n_loops = 3: this cache was filled with n_loops = 2"):
            model(ids, 3, cache=cache)


def frequencies(sampling: Sampling, probabilities: list[float], draws: int = 20000) -> torch.Tensor:
    logits = torch.tensor(probabilities).log().expand(draws, -1)
    ids = sample(logits, sampling, torch.Generator().manual_seed(0))
    return torch.bincount(ids, minlength=len(probabilities)) / draws


def test_sampling_follows_the_distribution_it_names() -> None:
    p = [0.5, 0.3, 0.15, 0.05]

    def close(actual: torch.Tensor, expected: list[float]) -> None:
        torch.testing.assert_close(actual, torch.tensor(expected) / sum(expected), atol=0.02, rtol=0)

    close(frequencies(Sampling(), p), p)
    close(frequencies(Sampling(temperature=0.5), p), [x**2 for x in p])
    close(frequencies(Sampling(top_k=2), p), [0.5, 0.3, 0, 0])
    close(frequencies(Sampling(top_p=0.75), p), [0.5, 0.3, 0, 0])
    close(frequencies(Sampling(top_p=0.81), p), [0.5, 0.3, 0.15, 0])
    close(frequencies(Sampling(top_p=0.01), p), [1, 0, 0, 0])
    close(frequencies(Sampling(temperature=0), p), [1, 0, 0, 0])
    close(frequencies(Sampling(top_k=99), p), p)
