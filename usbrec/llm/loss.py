"""The two losses, SFT and SimPO, and the token log-probabilities that both are made of.

Departures from the paper (arXiv 2509.20381) and from SimPO (arXiv 2405.14734), or choices of ours
where neither says anything:

1. The end-of-turn token counts in a response's log-probability and in its length.
2. `beta` is 2 and `gamma` is given as `gamma_beta_ratio` (gamma = ratio * beta), as SimPO's authors
   do. The paper's "beta 0.5" is known at second hand only and may mean gamma.
3. An NLL term on the chosen response may be added, a mean over pairs of its mean over tokens.
   Its weight is 0 by default, which is exactly SimPO.
4. The SFT loss is a mean over the weights of all tokens of a step. It is no mean of means, so that
   a step of N conversations costs the same cut into any number of passes.
5. The head is frozen, so the gradient of a log-probability is known in the forward pass already.
   It is kept as one vector a token; no logits outlive their chunk.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from usbrec.options import check, option

USUAL_RATIO = 0.5  # of gamma to beta
CHUNK_ROWS = 128  # (128, 49152) fp32 logits are 25 MB; on two cores 64 rows and 512 were slower


class TokenLogps(NamedTuple):
    """For each of M tokens its log-probability (fp32) and the token that was likeliest instead."""

    logps: Tensor
    predictions: Tensor


class _FrozenHeadLogps(torch.autograd.Function):
    """log softmax(hidden @ head_weight.T)[targets], with no gradient for the head.

    d logps[m] / d hidden[m] = head_weight[targets[m]] - softmax(logits[m]) @ head_weight: it is
    computed beside the log-probability, while the chunk's logits exist, and is all that is saved.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head_weight: Tensor, targets: Tensor) -> Any:
        logps = hidden.new_empty(len(targets), dtype=torch.float32)
        predictions = torch.empty_like(targets)
        needs_slope = ctx.needs_input_grad[0]
        slopes = torch.empty_like(hidden) if needs_slope else None
        for start in range(0, len(targets), CHUNK_ROWS):
            rows = slice(start, start + CHUNK_ROWS)
            logits = F.linear(hidden[rows], head_weight).float()  # (rows, V)
            top, predictions[rows] = logits.max(-1)
            picked = logits.gather(1, targets[rows, None])[:, 0]
            exps = logits.sub_(top[:, None]).exp_()
            total = exps.sum(-1)
            logps[rows] = picked - top - total.log()
            if slopes is not None:
                # Dividing by the total after the product spares a pass over (rows, V).
                mean = (exps.to(hidden.dtype) @ head_weight).float() / total[:, None]
                slopes[rows] = (head_weight[targets[rows]].float() - mean).to(hidden.dtype)
        ctx.save_for_backward(slopes)
        ctx.mark_non_differentiable(predictions)
        return logps, predictions

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, None, None]:
        (slopes,) = ctx.saved_tensors
        return (grads[0][:, None] * slopes).to(slopes.dtype), None, None


def token_logps(hidden: Tensor, head_weight: Tensor, targets: Tensor) -> TokenLogps:
    """Return the fp32 log-probabilities of `targets` (M,), given the `hidden` (M, D) before them.

    `head_weight` (V, D) gets no gradient. Logits are made in the model's dtype and normalised in
    fp32, `CHUNK_ROWS` at a time; without gradients the second product is left out.
    """
    return TokenLogps(*_FrozenHeadLogps.apply(hidden, head_weight.detach(), targets))


def sft_loss(logps: Tensor, weights: Tensor, total_weight: float) -> Tensor:
    """Return -sum(weights * logps) / total_weight for tokens (M,); the total is the step's."""
    return -(weights * logps).sum() / total_weight


class ResponseLogps(NamedTuple):
    """For each of B responses the sum of its tokens' log-probabilities and their number, fp32."""

    logps: Tensor
    lengths: Tensor


def response_logps(logps: Tensor, owners: Tensor, responses: Tensor) -> ResponseLogps:
    """Sum token log-probabilities (M,) by response: `owners` (M,) names each token's, (B,) all.

    A masked sum rather than `index_add`, whose order of addition on a GPU differs from run to run.
    """
    member = owners[None, :] == responses[:, None]  # (B, M)
    return ResponseLogps(torch.where(member, logps, 0.0).sum(-1), member.sum(-1).float())


@dataclass(frozen=True)
class SimpoOptions:
    """The constants of SimPO's equation (6); its margin gamma is given itself or by a ratio."""

    beta: float = option(2.0, "reward of one nat of a response's mean log-probability", above=0)
    gamma_beta_ratio: float | None = option(
        None, f"the margin that chosen shall win by, over beta ({USUAL_RATIO} without gamma)"
    )
    gamma: float | None = option(None, "the margin itself, in place of the ratio")
    nll_weight: float = option(0.0, "weight of the chosen response's NLL; 0: exactly SimPO", low=0)

    def __post_init__(self) -> None:
        check(self)
        if self.gamma is not None and self.gamma_beta_ratio is not None:
            raise ValueError(
                f"gamma ({self.gamma}) and gamma_beta_ratio ({self.gamma_beta_ratio}) both set the "
                "margin: give one of them"
            )

    @property
    def margin(self) -> float:
        """Gamma, by which the chosen response's reward shall exceed the rejected one's."""
        if self.gamma is not None:
            return self.gamma
        ratio = USUAL_RATIO if self.gamma_beta_ratio is None else self.gamma_beta_ratio
        return ratio * self.beta


class SimpoLosses(NamedTuple):
    """For each of B pairs its loss and the two rewards; the rewards carry no gradient."""

    losses: Tensor
    chosen_rewards: Tensor
    rejected_rewards: Tensor


def simpo_loss(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    chosen_lengths: Tensor,
    rejected_lengths: Tensor,
    options: SimpoOptions,
) -> SimpoLosses:
    """Return SimPO's losses for B pairs, from summed log-probabilities and lengths in tokens.

    L = -log sigmoid(beta/|y_w| log p(y_w|x) - beta/|y_l| log p(y_l|x) - gamma)   equation (6)
    """
    chosen_means = policy_chosen_logps / chosen_lengths
    chosen_rewards = options.beta * chosen_means
    rejected_rewards = options.beta * policy_rejected_logps / rejected_lengths
    losses = -F.logsigmoid(chosen_rewards - rejected_rewards - options.margin)
    if options.nll_weight:
        losses = losses - options.nll_weight * chosen_means
    return SimpoLosses(losses, chosen_rewards.detach(), rejected_rewards.detach())
