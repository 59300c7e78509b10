"""Shared fixtures: tiny random models; one thread, so that no result depends on the machine."""

from pathlib import Path

import pytest
import torch

from usbrec.extras.default_model import find_model
from usbrec.llm.model import Decoder, ModelConfig

TINY = ModelConfig(
    vocab_size=128,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=8,
    rms_norm_eps=1e-5,
    rope_theta=10000.0,
)


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--soak 500` makes the soak of the engine longer."""
    parser.addoption("--soak", type=int, default=50, help="random calls of the engine's soak")


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    """Tests share the machine with one another; their results must not depend on thread counts.

    It holds for the fixtures of whole modules too, which come before those of a test.
    """
    torch.set_num_threads(1)


def random_decoder(config: ModelConfig, seed: int = 0) -> Decoder:
    """A decoder with random weights of a size at which logits and attention are not degenerate."""
    model = Decoder(config)
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.normal_(0, 0.3, generator=generator)
    return model


@pytest.fixture
def tiny_model() -> Decoder:
    """A random three-layer Llama with grouped heads over 128 tokens, fp32."""
    return random_decoder(TINY)


@pytest.fixture(scope="session")
def default_model_folder() -> Path:
    """The default model's folder, fetched once."""
    return find_model()
