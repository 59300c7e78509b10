"""The losses against numbers derived by hand, plain autograd, and trl."""

import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from usbrec.llm import loss
from usbrec.llm.loss import (
    ResponseLogps,
    Sft,
    Simpo,
    SimpoOptions,
    TokenLogps,
    response_logps,
    simpo_loss,
    token_logps,
)

torch.set_num_threads(1)


def random_case(rows: int = 7, dtype: torch.dtype = torch.float32):
    """Hidden states (rows, 12), a head (33, 12) and targets (rows,)."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(rows, 12, generator=generator).to(dtype).requires_grad_()
    head = torch.randn(33, 12, generator=generator).to(dtype)
    return hidden, head, torch.randint(33, (rows,), generator=generator)


@pytest.mark.parametrize("chunk_rows", [1, 3, 128])
def test_token_logps_and_their_gradients_equal_plain_autograd(monkeypatch, chunk_rows):
    monkeypatch.setattr(loss, "CHUNK_ROWS", chunk_rows)
    hidden, head, targets = random_case()
    pull = torch.linspace(-1, 2, len(targets))
    plain = F.log_softmax(hidden @ head.T, -1)[torch.arange(len(targets)), targets]
    (expected,) = torch.autograd.grad((pull * plain).sum(), hidden)
    ours = token_logps(hidden, head, targets)
    (got,) = torch.autograd.grad((pull * ours.logps).sum(), hidden)
    torch.testing.assert_close(ours.logps, plain, rtol=0, atol=1e-5)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)
    assert torch.equal(ours.predictions, (hidden @ head.T).argmax(-1))


def test_bf16_logps_and_gradients_are_as_near_to_fp32_as_plain_autograd_s():
    hidden, head, targets = random_case(200, torch.bfloat16)
    exact = hidden.detach().float().requires_grad_()
    index = torch.arange(len(targets))
    plain = F.log_softmax((hidden @ head.T).float(), -1)[index, targets]
    truth = F.log_softmax(exact @ head.float().T, -1)[index, targets]
    ours = token_logps(hidden, head, targets)
    assert ours.logps.dtype == torch.float32
    (true_grad,) = torch.autograd.grad(truth.sum(), exact)
    (plain_grad,) = torch.autograd.grad(plain.sum(), hidden)
    (our_grad,) = torch.autograd.grad(ours.logps.sum(), hidden)
    assert (ours.logps - truth).norm() <= 1.05 * (plain - truth).norm()
    assert (our_grad.float() - true_grad).norm() <= 1.05 * (plain_grad.float() - true_grad).norm()


def test_without_gradients_nothing_is_saved_and_the_logps_are_the_same():
    hidden, head, targets = random_case()
    with_gradient = token_logps(hidden, head, targets).logps
    with torch.no_grad():
        without = token_logps(hidden, head, targets).logps
    assert torch.equal(with_gradient, without)
    assert not without.requires_grad


def test_what_is_kept_for_the_backward_pass_has_no_vocabulary_in_its_shape():
    hidden, head, targets = random_case()
    shapes = []

    def note(tensor):
        shapes.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        token_logps(hidden, head, targets)
    assert shapes == [tuple(hidden.shape)]


def test_the_head_gets_no_gradient_even_if_it_asks_for_one():
    hidden, head, targets = random_case()
    head.requires_grad_()
    token_logps(hidden, head, targets).logps.sum().backward()
    assert head.grad is None and hidden.grad is not None


def test_logits_far_out_of_range_give_no_nan():
    hidden, head, targets = random_case()
    ours = token_logps(1e4 * hidden, head, targets)
    assert ours.logps.isfinite().all()
    assert torch.autograd.grad(ours.logps.sum(), hidden)[0].isfinite().all()


def sft_loss(logps, weights):
    """The loss of tokens of one response, none of them predicted."""
    same = torch.zeros(len(logps))
    row = SimpleNamespace(weights=weights, targets=same, segment_ids=same)
    return Sft()(TokenLogps(logps, same - 1), row)[0]


def test_sft_loss_is_the_mean_over_weights():
    """(1 * 2.0 + 0.5 * 4.0) / 1.5 = 8/3 when -logps are 2 and 4 and the weights 1 and 0.5."""
    got = sft_loss(torch.tensor([-2.0, -4.0]), torch.tensor([1.0, 0.5]))
    assert got.item() / 1.5 == pytest.approx(8 / 3)


def test_sft_losses_of_parts_add_up_to_the_loss_of_the_whole():
    logps, weights = torch.tensor([-1.0, -2.0, -5.0]), torch.tensor([1.0, 1.0, 0.25])
    parts = [sft_loss(logps[i : i + 1], weights[i : i + 1]) for i in range(3)]
    assert sum(part.item() for part in parts) == pytest.approx(sft_loss(logps, weights).item())


def test_response_logps_sum_and_count_tokens_in_any_order():
    """Response 5 owns -1 and -4, response 2 owns -2; token of branch 9 belongs to neither."""
    sums = response_logps(
        torch.tensor([-1.0, -2.0, -4.0, -8.0]), torch.tensor([5, 2, 5, 9]), torch.tensor([2, 5])
    )
    assert sums.logps.tolist() == [-2.0, -5.0]
    assert sums.lengths.tolist() == [1.0, 2.0]


def simpo(chosen, rejected, lengths=(2, 4), **options):
    sides = [
        ResponseLogps(torch.tensor([float(logp)]), torch.tensor([float(length)]))
        for logp, length in zip((chosen, rejected), lengths, strict=True)
    ]
    return simpo_loss(*sides, SimpoOptions(**options))


def test_simpo_loss_equals_the_number_derived_by_hand():
    """Chosen: sum -2 over 2 tokens, mean -1; rejected: sum -12 over 4 tokens, mean -3.

    beta 2: rewards -2 and -6; gamma = 0.5 * 2 = 1; argument -2 + 6 - 1 = 3;
    loss = log(1 + e^-3) = 0.0485874.
    """
    losses, chosen_rewards, rejected_rewards = simpo(-2, -12, beta=2.0, gamma_beta_ratio=0.5)
    assert chosen_rewards.item() == -2.0 and rejected_rewards.item() == -6.0
    assert losses.item() == pytest.approx(0.0485874, abs=1e-6)
    assert losses.item() == pytest.approx(math.log1p(math.exp(-3)))


def test_the_rewards_of_both_sides_have_no_gradient_and_the_loss_has_one() -> None:
    logps = torch.tensor([-2.0, -3.0], requires_grad=True)
    lengths = torch.tensor([2.0])
    sides = ResponseLogps(logps[:1], lengths), ResponseLogps(logps[1:], lengths)
    losses, *rewards = simpo_loss(*sides, SimpoOptions())
    assert losses.requires_grad and not any(x.requires_grad for x in rewards)


def test_metrics_of_pairs_are_derived_by_hand():
    """Pair 1: -1 and -2 over 2 tokens, -3, -4 and -5 over 3: means -1.5 and -4. Pair 2 is a tie."""
    logps = -torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 1.0, 1.0])
    segments = torch.tensor([1, 1, 2, 2, 2, 4, 5])
    none = torch.zeros(7, dtype=torch.long)
    row = SimpleNamespace(segment_ids=segments, num_segments=6, targets=none)
    options = SimpoOptions(beta=2.0, gamma_beta_ratio=3.5)
    _, metrics = Simpo(options)(TokenLogps(logps.requires_grad_(), none - 1), row)
    expected = {
        "rewards/chosen": [-3, -2], "rewards/rejected": [-8, -2], "rewards/margins": [5, 0],
        "rewards/accuracies": [1, 0], "logps/chosen": [-1.5, -1], "logps/rejected": [-4, -1],
        "lengths/chosen": [2, 1], "lengths/rejected": [3, 1], "repetition": [0] * 7,
    }  # fmt: skip
    assert {name: values.tolist() for name, values in metrics.items()} == expected
    assert not any(values.requires_grad for values in metrics.values())


def test_gamma_is_its_ratio_times_beta():
    """Only the product counts where the rewards are equal: log(1 + e^gamma)."""
    for beta, ratio in ((4.0, 0.25), (1.0, 1.0), (2.0, 0.0)):
        loss = simpo(-2, -4, beta=beta, gamma_beta_ratio=ratio)[0].item()
        assert loss == pytest.approx(math.log1p(math.exp(beta * ratio)))


def test_nll_weight_zero_is_exactly_simpo_and_one_adds_the_chosen_mean():
    """The chosen response's mean negative log-probability is 1, so weight 0.5 adds 0.5."""
    plain = simpo(-2, -12)
    assert simpo(-2, -12, nll_weight=0.0)[0] == plain[0]
    added = simpo(-2, -12, nll_weight=0.5)[0] - plain[0]
    assert added.item() == pytest.approx(0.5)


def test_only_the_average_counts_not_the_sum():
    """Ten times the tokens at the same average cost the same."""
    assert simpo(-20, -120, (20, 40))[0].item() == pytest.approx(simpo(-2, -12)[0].item())


@pytest.mark.parametrize("wrong", [{"beta": 0.0}, {"nll_weight": -1.0}])
def test_a_constant_out_of_range_is_refused_by_name(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        SimpoOptions(**wrong)


def test_simpo_equals_trl_on_the_same_ids_and_labels():
    """trl's own forward over a tiny random Llama; two pairs of unequal lengths, padded for trl."""
    transformers = pytest.importorskip("transformers")
    cpo = pytest.importorskip("trl.experimental.cpo")
    torch.manual_seed(3)
    config = transformers.LlamaConfig(
        vocab_size=60, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    prompts = [[1, 5, 9, 11], [1, 6]]
    chosen, rejected = [[20, 21, 2], [30, 31, 32, 33, 2]], [[40, 41, 42, 43, 44, 2], [50, 2]]
    trainer = SimpleNamespace(
        loss_type="simpo", beta=2.5, simpo_gamma=1.3, alpha=0.0, label_smoothing=0.0, cpo_alpha=0.0,
        accelerator=SimpleNamespace(device=torch.device("cpu")), is_encoder_decoder=False,
        aux_loss_enabled=False, pad_token_id=0,
        concatenated_inputs=cpo.CPOTrainer.concatenated_inputs,
        get_batch_logps=cpo.CPOTrainer.get_batch_logps,
    )  # fmt: skip
    batch = padded("chosen", prompts, chosen) | padded("rejected", prompts, rejected)
    theirs_logps = cpo.CPOTrainer.concatenated_forward(trainer, model, batch)[:2]
    theirs = cpo.CPOTrainer.cpo_loss(trainer, *theirs_logps)

    options = SimpoOptions(beta=2.5, gamma_beta_ratio=1.3 / 2.5)
    ours_chosen, ours_rejected = ours_of(model, prompts, chosen), ours_of(model, prompts, rejected)
    ours = simpo_loss(ours_chosen, ours_rejected, options)
    for got, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)
    grads = [
        torch.autograd.grad(losses.mean(), model.model.layers[0].mlp.up_proj.weight)[0]
        for losses in (ours[0], theirs[0])
    ]
    torch.testing.assert_close(*grads, rtol=0, atol=1e-6)


def padded(side, prompts, responses):
    """trl's batch: ids right-padded with 0, labels -100 on the prompt and the padding."""
    rows = [prompt + response for prompt, response in zip(prompts, responses, strict=True)]
    width = max(map(len, rows))
    labels = [[-100] * len(p) + r for p, r in zip(prompts, responses, strict=True)]
    return {
        f"{side}_input_ids": torch.tensor([row + [0] * (width - len(row)) for row in rows]),
        f"{side}_labels": torch.tensor([row + [-100] * (width - len(row)) for row in labels]),
        f"{side}_attention_mask": torch.tensor(
            [[1] * len(row) + [0] * (width - len(row)) for row in rows]
        ),
    }


def ours_of(model, prompts, responses):
    """Each response's log-probability from its own unpadded row."""
    logps, owners = [], []
    for index, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        hidden = model.model(torch.tensor([prompt + response])).last_hidden_state[0]
        sources = slice(len(prompt) - 1, -1)
        logps.append(
            token_logps(hidden[sources], model.lm_head.weight, torch.tensor(response)).logps
        )
        owners += [index] * len(response)
    return response_logps(torch.cat(logps), torch.tensor(owners), torch.arange(len(prompts)))
