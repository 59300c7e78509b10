"""Drawing against transformers' logits processors: the same tokens are left, the same shares."""

import pytest
import torch
from transformers.generation import logits_process as theirs

from usbrec.chat import Sampling
from usbrec.llm.sampler import Sampler, truncate


@pytest.mark.parametrize(
    ("top_k", "top_p", "min_p"), [(0, 0.8, 0.0), (7, 0.8, 0.0), (0, 1.0, 0.1), (20, 0.9, 0.05)]
)
def test_what_is_left_of_a_distribution_is_what_transformers_leaves(top_k, top_p, min_p):
    logits = torch.randn(5, 64, generator=torch.Generator().manual_seed(0)) * 2
    expected = theirs.TemperatureLogitsWarper(0.7)(None, logits)
    if top_k:
        expected = theirs.TopKLogitsWarper(top_k)(None, expected)
    expected = theirs.TopPLogitsWarper(top_p)(None, expected)
    if min_p:
        expected = theirs.MinPLogitsWarper(min_p)(None, expected)
    how = Sampling(temperature=0.7, top_k=top_k, top_p=top_p, min_p=min_p)
    limits = Sampler([how] * 5, torch.zeros(5, 1)).limits
    found = truncate((logits / 0.7).softmax(-1), limits)
    torch.testing.assert_close(found / found.sum(-1, keepdim=True), expected.softmax(-1))


def test_the_coldest_draw_is_the_greedy_one():
    logits = torch.randn(4, 64, generator=torch.Generator().manual_seed(2)) * 50
    uniforms = torch.tensor([0.0, 0.3, 0.7, 0.999])

    def draw(how: Sampling) -> torch.Tensor:
        return Sampler([how] * 4, uniforms[:, None]).draw(logits)

    greedy = draw(Sampling(temperature=0))
    for temperature in (1e-3, 1e-12, 1e-15):
        cold = draw(Sampling(temperature=temperature))
        assert cold.tolist() == greedy.tolist() == logits.argmax(-1).tolist()


def test_a_draw_is_the_token_at_its_share_of_the_summed_probabilities() -> None:
    """Shares .2, 0, .3, .5, 0 end at .2, .2, .5, 1, 1; a number just below 1 is no token beyond."""
    logits = torch.tensor([[0.2, 0.0, 0.3, 0.5, 0.0]]).log()
    for number, token in ((0.0, 0), (0.19, 0), (0.21, 2), (0.49, 2), (0.51, 3), (1 - 1e-12, 3)):
        uniforms = torch.tensor([[number]], dtype=torch.float64)
        assert Sampler([Sampling()], uniforms).draw(logits).tolist() == [token]
    first = Sampler([Sampling()], torch.zeros(1, 1)).draw(logits.flip(-1))
    assert first.tolist() == [1]  # token 0 has no probability


HOWS = (
    *(Sampling(temperature=0), Sampling(temperature=1.5), Sampling(temperature=0.7, top_k=3)),
    *(Sampling(top_p=0.6), Sampling(min_p=0.3), Sampling(temperature=2.0, top_k=9, top_p=0.9)),
)


@pytest.mark.parametrize("hows", [HOWS, HOWS[-2:], HOWS[:1]])
def test_a_row_draws_what_it_draws_alone(hows: tuple[Sampling, ...]) -> None:
    """20 rows, more than are drawn at once, in three steps."""
    generator = torch.Generator().manual_seed(0)
    rows = [hows[i % len(hows)] for i in range(20)]
    uniforms = torch.rand(20, 3, generator=generator, dtype=torch.float64)
    together, alone = (
        Sampler(rows, uniforms),
        [Sampler([x], y[None]) for x, y in zip(rows, uniforms, strict=True)],
    )
    for _ in range(3):
        logits = torch.randn(20, 64, generator=generator)
        expected = [one.draw(row[None]).item() for one, row in zip(alone, logits, strict=True)]
        assert together.draw(logits).tolist() == expected


@pytest.mark.parametrize("how", HOWS[2:5])
def test_only_the_tokens_that_are_left_are_drawn(how: Sampling) -> None:
    logits = torch.randn(1, 64, generator=torch.Generator().manual_seed(0))
    sampler = Sampler([how], torch.linspace(0, 0.9999, 500)[None])
    drawn = {sampler.draw(logits).item() for _ in range(500)}
    left = truncate((logits / how.temperature).softmax(-1), sampler.limits)[0]
    assert drawn == set(left.nonzero()[:, 0].tolist()) and len(drawn) < 64


@pytest.mark.parametrize(
    "wrong",
    [{"min_p": 1.5}, {"min_p": -0.1}, {"top_p": 0.0}, {"top_k": -1}, {"stop": ("",)}],
)
def test_wrong_samplings_are_named(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Sampling(**wrong)
