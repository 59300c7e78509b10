"""The two losses, SFT and SimPO, with their metrics, and the token log-probabilities below both.

Departures from the paper (arXiv 2509.20381) and from SimPO (arXiv 2405.14734), or choices of ours
where neither says anything:

1. The end-of-turn token counts in a response's log-probability and in its length.
2. `beta` is 2 and `gamma` is given as `gamma_beta_ratio` (gamma = ratio * beta), as SimPO's authors
   do. The paper's "beta 0.5" is known at second hand only and may mean gamma.
3. An NLL term on the chosen response may be added, a mean over pairs of its mean over tokens.
   Its weight is 0 by default, which is exactly SimPO.
4. The SFT loss is a weighted mean over all tokens of a step. It is not a mean of means, so a step
   of N conversations has the same loss however it is cut into passes.
5. The head is frozen, so the gradient of a log-probability is already known in the forward pass.
   It is kept as one vector per token; no logits outlive their chunk.
"""

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from usbrec.llm.packing import Packed, Tree
from usbrec.options import Options, option

# rows of logits: (128, 49152) in fp32 are 25 MB; 64 and 512 were slower on two cores. A GPU takes
# 8 times as many.
CHUNK_ROWS = 128
REPETITION_WINDOW = 32  # supervised tokens of the same response that a prediction may repeat


class TokenLogps(NamedTuple):
    """Per target: the log-probability (M,) in fp32, and the likeliest token (M,) in its place."""

    logps: Tensor
    predictions: Tensor


class _FrozenHeadLogps(torch.autograd.Function):
    """log softmax(hidden @ head_weight.T)[targets], with no gradient for the head.

    d logps[m] / d hidden[m] = head_weight[targets[m]] - softmax(logits[m]) @ head_weight. This
    slope is computed beside the log-probability, while the chunk's logits exist, and alone is
    saved.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head_weight: Tensor, targets: Tensor) -> Any:
        logps = hidden.new_empty(len(targets), dtype=torch.float32)
        predictions = torch.empty_like(targets)
        slopes = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        size = CHUNK_ROWS * (1 if hidden.device.type == "cpu" else 8)
        for start in range(0, len(targets), size):
            rows = slice(start, start + size)
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


class ResponseLogps(NamedTuple):
    """Per response: the sum of token log-probabilities (B,) and the token count (B,), fp32."""

    logps: Tensor
    lengths: Tensor


def response_logps(logps: Tensor, segment_ids: Tensor, responses: Tensor) -> ResponseLogps:
    """Return the sum of log-probabilities (M,) per response (B,), and the responses' lengths.

    `segment_ids` (M,) holds each token's response. The sum is masked rather than by `index_add`,
    whose order of addition on a GPU differs from run to run.
    """
    member = segment_ids[None, :] == responses[:, None]  # (B, M)
    return ResponseLogps(torch.where(member, logps, 0.0).sum(-1), member.sum(-1).float())


@dataclass(frozen=True)
class SimpoOptions(Options):
    """Constants of SimPO's equation (6); its margin gamma is gamma_beta_ratio * beta."""

    beta: float = option(2.0, "reward of one nat of a response's mean log-probability", above=0)
    gamma_beta_ratio: float = option(0.5, "margin that chosen shall win by, over beta")
    nll_weight: float = option(0.0, "weight of the chosen response's NLL; 0: exactly SimPO", low=0)


def simpo_loss(
    chosen: ResponseLogps, rejected: ResponseLogps, options: SimpoOptions
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the losses (B,) of B pairs, and the rewards (B,) of both sides without gradient.

    `chosen` and `rejected` are the policy's log-probabilities of the responses:

    L = -log sigmoid(beta/|y_w| log p(y_w|x) - beta/|y_l| log p(y_l|x) - gamma)   equation (6)
    """
    chosen_means = chosen.logps / chosen.lengths
    chosen_rewards = options.beta * chosen_means
    rejected_rewards = options.beta * rejected.logps / rejected.lengths
    gamma = options.gamma_beta_ratio * options.beta
    losses = -F.logsigmoid(chosen_rewards - rejected_rewards - gamma)
    losses = losses - options.nll_weight * chosen_means
    return losses, chosen_rewards.detach(), rejected_rewards.detach()


def repetition(tokens: TokenLogps, packed: Packed) -> Tensor:
    """Return whether each likeliest token is a recent label of its response, (M,) bool.

    This is rep/l of arXiv 1908.04319 on the training pass. It grows when a policy degenerates.
    """
    place = torch.arange(len(packed.targets), device=packed.targets.device)
    gap = place[:, None] - place[None, :]  # (M, M)
    near = (gap > 0) & (gap <= REPETITION_WINDOW)
    near &= packed.segment_ids[:, None] == packed.segment_ids[None, :]
    return (near & (tokens.predictions[:, None] == packed.targets[None, :])).any(1)


@dataclass(frozen=True)
class Sft:
    """The weighted mean negative log-probability of the supervised tokens."""

    def size(self, tree: Tree) -> float:
        """Return the summed weight of the predicted tokens: all but the first of a root branch."""
        unpredicted = (b.weights[0] for b in tree.branches if b.parent is None and b.weights)
        return sum(sum(branch.weights) for branch in tree.branches) - sum(unpredicted)

    def fault(self, tree: Tree) -> str:
        """Return why a dialogue cannot be learned from, or ""."""
        return "" if self.size(tree) > 0 else "dropped with nothing to learn"

    def __call__(self, tokens: TokenLogps, packed: Packed) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the summed loss of a packed row, -sum(weights * logps), and metrics per token.

        The mean is over the step.
        """
        hits = tokens.predictions == packed.targets
        metrics = {"accuracy": hits, "repetition": repetition(tokens, packed)}
        return -(packed.weights * tokens.logps).sum(), metrics


@dataclass(frozen=True)
class Simpo:
    """SimPO's mean loss over trees of three branches: prompt, chosen, rejected."""

    options: SimpoOptions = field(default_factory=SimpoOptions)

    def size(self, tree: Tree) -> float:
        """Return 1: the loss is a mean over pairs."""
        return 1.0

    def fault(self, tree: Tree) -> str:
        """Return why a pair cannot be learned from, or "".

        A response of fewer than two tokens is empty: it has nothing before its end-of-turn token.
        """
        prompt, chosen, rejected = tree.branches
        if not prompt.ids or len(chosen.ids) < 2 or len(rejected.ids) < 2:
            return "dropped for an empty response"
        return "dropped for equal responses" if chosen == rejected else ""

    def __call__(self, tokens: TokenLogps, packed: Packed) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the summed loss of a packed row of pairs, and metrics with a value per pair.

        `logps` are means over a response's tokens. `repetition` has a value per token.
        """
        prompts = torch.arange(0, packed.num_segments, 3, device=packed.segment_ids.device)
        chosen = response_logps(tokens.logps, packed.segment_ids, prompts + 1)
        rejected = response_logps(tokens.logps, packed.segment_ids, prompts + 2)
        losses, chosen_rewards, rejected_rewards = simpo_loss(chosen, rejected, self.options)
        metrics = {
            "rewards/chosen": chosen_rewards,
            "rewards/rejected": rejected_rewards,
            "rewards/margins": chosen_rewards - rejected_rewards,
            "rewards/accuracies": chosen_rewards > rejected_rewards,
            "logps/chosen": chosen.logps.detach() / chosen.lengths,
            "logps/rejected": rejected.logps.detach() / rejected.lengths,
            "lengths/chosen": chosen.lengths,
            "lengths/rejected": rejected.lengths,
            "repetition": repetition(tokens, packed),
        }
        return losses.sum(), metrics


Objective = Sft | Simpo  # another objective needs the same three methods
