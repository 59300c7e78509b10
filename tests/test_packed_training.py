"""Packed rows against the plain way: padded rows, transformers' attention, peft, autograd."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from conftest import TINY, random_decoder
from peft import PeftModel
from peft.optimizers import create_loraplus_optimizer
from test_training import gradient_of, learn
from transformers import LlamaConfig, LlamaForCausalLM

from usbrec.llm.adapter_files import save_adapter
from usbrec.llm.fast import accelerate
from usbrec.llm.fast.kernels import windows
from usbrec.llm.lora import LoraConfig, adapter_parameters, add_adapter
from usbrec.llm.loss import Sft, Simpo, SimpoOptions
from usbrec.llm.model import Stretch
from usbrec.llm.packing import Branch, Tree, pack, pack_rows, pair_tree, visibility
from usbrec.llm.training import TrainingOptions, run_pass

CONFIG = replace(TINY, hidden_size=48)  # transformers wants a multiple of the heads
SIMPO = SimpoOptions(beta=2.5, gamma_beta_ratio=0.28, nll_weight=0.3)


class Dice:
    """A seeded source of whole numbers and token ids."""

    def __init__(self, seed):
        self.generator = torch.Generator().manual_seed(seed)

    def number(self, low, high):
        return int(torch.randint(low, high, (1,), generator=self.generator))

    def ids(self, low, high):
        return [self.number(3, 128) for _ in range(self.number(low, high))]


def grown_tree(dice):
    """One to seven branches of 1 to 60 tokens; half of the tokens have weights, in quarters.

    Every other branch continues the first half of its parent's path alone.
    """
    branches, lengths = [], []
    for number in range(dice.number(1, 8)):
        ids = dice.ids(1, 61)
        weights = [max(dice.number(-4, 5), 0) / 4 for _ in ids]
        parent = dice.number(0, number) if number else None
        past = lengths[parent] if number else 0
        shared = (past + 1) // 2 if number % 2 else None
        branches.append(Branch(ids, weights, parent, shared))
        lengths.append((shared or past) + len(ids))
    return Tree(branches)


def lessons(seed):
    """Trees of random depth and width, at least one of them with something to learn."""
    dice = Dice(seed)
    return [grown_tree(dice) for _ in range(dice.number(3, 6))]


def pairs(seed):
    """Pairs of unequal lengths."""
    dice = Dice(seed)
    return [
        pair_tree(dice.ids(1, 150), dice.ids(2, 30), dice.ids(2, 30))
        for _ in range(dice.number(3, 6))
    ]


@pytest.fixture(params=["plain", "accelerated"])
def model(request):
    """A random model with an adapter `one` that is far from zero.

    With products of unit gain fp32 rounds a gradient by 3e-6 in either way; with twice it, 1e-5.
    """
    model = random_decoder(CONFIG)
    for parameter in model.parameters():
        parameter.data.mul_(0.5 if parameter.dim() > 1 else 1)
    add_adapter(model, "one", LoraConfig(r=3), seed=1)
    generator = torch.Generator().manual_seed(5)
    for parameter in adapter_parameters(model, "one").values():
        parameter.data.normal_(0, 0.1, generator=generator)
    if request.param == "accelerated":
        accelerate(model)
    return model


def plain_model(model, folder):
    """Return transformers' Llama with the same base weights under peft's copy of the adapter."""
    sizes = {name: value for name, value in vars(CONFIG).items() if name in LlamaConfig().to_dict()}
    plain = LlamaForCausalLM(LlamaConfig(**sizes, attn_implementation="eager"))
    base = {name: p for name, p in model.named_parameters() if "lora" not in name}
    plain.load_state_dict(base)
    save_adapter(model, "one", folder, "base")
    return PeftModel.from_pretrained(plain, folder, is_trainable=True).eval()


def plain_logps(plain, trees):
    """Return for each branch of each tree its weighted tokens as (log-probabilities, weights).

    Every branch is a row of its own from the beginning on, padded to the longest.
    """
    paths = []
    for tree in trees:
        first = len(paths)
        for branch in tree.branches:
            past = [] if branch.parent is None else paths[first + branch.parent][0]
            past = past[: branch.shared]
            paths.append((past + list(branch.ids), len(past), branch.weights))
    width = max(len(ids) for ids, _, _ in paths)
    rows = torch.tensor([ids + [0] * (width - len(ids)) for ids, _, _ in paths])
    mask = torch.tensor([[1] * len(ids) + [0] * (width - len(ids)) for ids, _, _ in paths])
    logps = F.log_softmax(plain(input_ids=rows, attention_mask=mask).logits, -1)
    logps = logps[:, :-1].gather(2, rows[:, 1:, None])[..., 0]  # of token i + 1 at place i
    found = []
    for row, (_, start, weights) in zip(logps, paths, strict=True):
        places = [start + i - 1 for i, w in enumerate(weights) if w and start + i]
        kept = [w for i, w in enumerate(weights) if w and start + i]
        found.append((row[places], torch.tensor(kept)))
    return found


def plain_sft(plain, trees):
    """The weighted mean over all tokens."""
    branches = plain_logps(plain, trees)
    total = sum(weights.sum() for _, weights in branches)
    return -sum((logps * weights).sum() for logps, weights in branches) / total


def plain_simpo(plain, trees):
    """Equation (6), with an NLL term, a mean over pairs."""
    means = [logps.mean() for logps, _ in plain_logps(plain, trees)]
    losses = [
        -F.logsigmoid(SIMPO.beta * (chosen - rejected) - 0.7) - 0.3 * chosen
        for chosen, rejected in zip(means[1::3], means[2::3], strict=True)
    ]
    return sum(losses) / len(losses)


def padding_in_pairs(seed):
    """Pairs in which every second token is 0: the id that the plain rows are padded with."""

    def half(branch):
        return Branch(
            [t * (i % 2) for i, t in enumerate(branch.ids)], branch.weights, branch.parent
        )

    return [Tree([half(branch) for branch in tree.branches]) for tree in pairs(seed)]


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(
    ("objective", "make", "plain_loss"),
    [
        (Sft(), lessons, plain_sft),
        (Simpo(SIMPO), pairs, plain_simpo),
        (Simpo(SIMPO), padding_in_pairs, plain_simpo),
    ],
)
def test_packed_rows_learn_what_plain_autograd_learns_from_padded_ones(
    model, tmp_path, seed, objective, make, plain_loss
):
    """Loss and the gradient of each adapter tensor, to 1e-5 of its norm."""
    trees = make(seed)
    assert any(len(row) > 1 for row in pack_rows(trees, 700))
    found, gradient = gradient_of(model, objective, trees, 700)
    plain = plain_model(model, tmp_path)
    expected = plain_loss(plain, trees)
    expected.backward()
    assert found["loss"] == pytest.approx(expected.item(), rel=1e-5)
    theirs = dict(plain.named_parameters())
    parameters = adapter_parameters(model, "one")
    pieces = gradient.split([p.numel() for p in parameters.values()])
    for (name, parameter), piece in zip(parameters.items(), pieces, strict=True):
        wanted = theirs[f"base_model.model.{name}".replace(".weight", ".default.weight")].grad
        error = (piece.view_as(parameter) - wanted).norm() / wanted.norm()
        assert error < 1e-5, (name, error)


@pytest.mark.parametrize("ratio", [1.0, 8.0])
def test_b_learns_faster_than_a_as_in_peft_s_lora_plus(model, tmp_path, ratio):
    """Three steps of a tree each: the adapter's movement, to 1e-3 of its norm."""
    trees = lessons(2)[:3]
    plain = plain_model(model, tmp_path / "plain")
    start = {x: p.detach().clone() for x, p in adapter_parameters(model, "one").items()}
    options = TrainingOptions(
        learning_rate=1e-3,
        loraplus_lr_ratio=ratio,
        batch_size=1,
        warmup=0.0,
        schedule="constant",
        max_grad_norm=0.0,
        shuffle=False,
    )
    learn(model, trees, Sft(), options, tmp_path / "ours")
    optimizer = create_loraplus_optimizer(
        plain, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=ratio, weight_decay=0.0
    )
    for tree in trees:
        plain_sft(plain, [tree]).backward()
        optimizer.step()
        optimizer.zero_grad()
    theirs, moved = dict(plain.named_parameters()), {}
    for name, parameter in adapter_parameters(model, "one").items():
        wanted = theirs[f"base_model.model.{name}".replace(".weight", ".default.weight")]
        moved[name] = (parameter - start[name]).abs().mean()
        error = (parameter - wanted).norm() / (wanted - start[name]).norm()
        assert error < 1e-3, (name, error)
    means = [sum(x for n, x in moved.items() if part in n) for part in ("lora_A", "lora_B")]
    assert means[1] / means[0] == pytest.approx(ratio, rel=0.3)


def logps_by_branch(model, trees):
    """Return each supervised token's log-probability, branch by branch over the row."""
    packed = pack(trees, model)
    with torch.no_grad():
        tokens = run_pass(model, "one", packed)
    return [tokens.logps[packed.segment_ids == i] for i in range(packed.num_segments)]


@pytest.mark.parametrize("seed", range(10))
def test_no_branch_sees_another(model, seed):
    """One branch gets other tokens, more or fewer; all but it and those that continue it stay.

    In the other trees of the row, too.
    """
    dice = Dice(seed)
    trees = [
        Tree([Branch(b.ids, [1.0] * len(b.ids), b.parent) for b in grown_tree(dice).branches])
        for _ in range(3)
    ]
    at = dice.number(0, 3)
    branches = list(trees[at].branches)
    number = dice.number(0, len(branches))
    ids = dice.ids(1, 61)
    branches[number] = Branch(ids, [1.0] * len(ids), branches[number].parent)
    before = logps_by_branch(model, trees)
    after = logps_by_branch(model, [*trees[:at], Tree(branches), *trees[at + 1 :]])
    first = sum(len(tree.branches) for tree in trees[:at])
    touched = {number}
    for i, branch in enumerate(branches):
        touched |= {i} if branch.parent in touched else set()
    for i, (old, new) in enumerate(zip(before, after, strict=True)):
        if i - first in touched:
            assert not len(old) or len(old) != len(new) or not torch.allclose(old, new, atol=1e-3)
        else:
            torch.testing.assert_close(new, old, atol=1e-5, rtol=1e-5)


def test_the_trees_of_these_tests_are_cut_into_several_windows():
    trees = [tree for seed in range(6) for tree in lessons(seed)]
    assert (
        max(len(windows([Stretch(torch.arange(len(tree)), visibility(tree))])) for tree in trees)
        > 2
    )
