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


@pytest.mark.parametrize(
    "wrong",
    [{"min_p": 1.5}, {"min_p": -0.1}, {"top_p": 0.0}, {"top_k": -1}, {"stop": ("",)}],
)
def test_wrong_samplings_are_named(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Sampling(**wrong)
