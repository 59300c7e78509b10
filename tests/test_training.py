"""The training loop: what is learned, what a step means, and going on after a kill."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from test_packing import plain_layout

from usbrec.chat import Message
from usbrec.llm import training
from usbrec.llm.fast import accelerate
from usbrec.llm.lora import AdapterSpan, LoraConfig, adapter_parameters, add_adapter
from usbrec.llm.loss import (
    Sft,
    Simpo,
    SimpoOptions,
    TokenLogps,
    repetition,
    response_logps,
)
from usbrec.llm.packing import Branch, Tree, pack, pack_rows, pair_tree
from usbrec.llm.tokenizer import ChatTokenizer
from usbrec.llm.training import (
    TrainingJob,
    TrainingOptions,
    measure,
    step_items,
    train,
    trainable,
    usable,
)
from usbrec.options import UserError

QUICK = TrainingOptions(
    learning_rate=1e-2, epochs=2, batch_size=4, tokens_per_pass=40, save_every=2
)


def draw(generator, length):
    return torch.randint(3, 128, (length,), generator=generator).tolist()


def lessons(count=10, seed=0):
    """Conversations of 6 to 14 tokens; the last 3 carry loss, one of them with weight 0.5."""
    generator = torch.Generator().manual_seed(seed)
    lengths = [6 + i % 9 for i in range(count)]
    return [Tree([Branch(draw(generator, n), [0] * (n - 3) + [1, 0.5, 1])]) for n in lengths]


def pairs(count=10, seed=0):
    """Pairs with unequal responses of 2 to 6 tokens."""
    generator = torch.Generator().manual_seed(seed)
    return [
        pair_tree(draw(generator, 5), draw(generator, 2 + i % 5), draw(generator, 6 - i % 5))
        for i in range(count)
    ]


def random_trees(count=8, seed=0):
    """Trees of random shape; a beginning's first token has no weight, as nothing predicts it."""
    generator = torch.Generator().manual_seed(seed)
    trees = []
    for _ in range(count):
        branches = []
        for number in range(1 + int(torch.randint(6, (1,), generator=generator))):
            ids = draw(generator, 1 + int(torch.randint(8, (1,), generator=generator)))
            weights = torch.randint(3, (len(ids),), generator=generator).tolist()
            parent = int(torch.randint(number, (1,), generator=generator)) if number else None
            branches.append(Branch(ids, weights if number else [0, *weights[1:]], parent))
        trees.append(Tree(branches))
    return trees


@pytest.fixture
def model(tiny_model):
    """A tiny model with the adapter `one`, whose B is not zero, so that A learns at once."""
    add_adapter(tiny_model, "one", LoraConfig(r=2), seed=1)
    generator = torch.Generator().manual_seed(5)
    for name, parameter in adapter_parameters(tiny_model, "one").items():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.05, generator=generator)
    return tiny_model


def weights(model):
    return {name: p.detach().clone() for name, p in adapter_parameters(model, "one").items()}


def put(model, tensors):
    for name, parameter in adapter_parameters(model, "one").items():
        parameter.data.copy_(tensors[name])


def rows(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def learn(model, items, objective, options, folder, validation=()):
    return train(model, "one", items, TrainingJob(options, objective, folder, "x", validation))


def measured(objective, tokens_per_pass):
    """Return a job of passes of so many tokens, whose files are never written."""
    options = TrainingOptions(tokens_per_pass=tokens_per_pass)
    return TrainingJob(options, objective, Path(), "")


def gradient_of(model, objective, items, tokens_per_pass, checkpointing=False):
    """Return loss and metrics of the items, and the gradient of all adapter tensors in a row."""
    model.checkpointing = checkpointing
    parameters = trainable(model, "one")
    found = measure(model, "one", items, measured(objective, tokens_per_pass))
    return found, torch.cat([p.grad.flatten() for p in parameters.values()])


def saved_step(folder):
    """Return the step of the saved state."""
    with safe_open(folder / "state.safetensors", "pt") as file:
        return json.loads(file.metadata()["facts"])["step"]


@pytest.fixture(params=["plain", "accelerated"])
def either_model(model, request):
    """The model with the formulas as they stand, or with their quicker equals."""
    if request.param == "accelerated":
        accelerate(model)
    return model


@pytest.mark.parametrize(("objective", "make"), [(Sft(), lessons), (Simpo(), pairs)])
def test_a_step_is_the_same_in_one_pass_and_in_many(either_model, objective, make):
    """N batches of 1 equal one batch of N, weights by token and lengths being unequal."""
    items = make()
    whole, whole_gradient = gradient_of(either_model, objective, items, 10_000)
    single, single_gradient = gradient_of(either_model, objective, items, 1)
    assert single == pytest.approx(whole, abs=1e-5)
    torch.testing.assert_close(single_gradient, whole_gradient, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("objective", "make"), [(Sft(), random_trees), (Simpo(), pairs)])
def test_packed_and_plain_layout_give_the_same_loss_and_gradient(either_model, objective, make):
    """One copy of every beginning, against a copy for each branch that is learned from."""
    packed, packed_gradient = gradient_of(either_model, objective, make(), 60)
    copied = [plain_layout(tree) for tree in make()]
    plain, plain_gradient = gradient_of(either_model, objective, copied, 60)
    assert packed["loss"] == pytest.approx(plain["loss"], abs=1e-5)
    torch.testing.assert_close(packed_gradient, plain_gradient, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("objective", "make"), [(Sft(), random_trees), (Simpo(), pairs)])
def test_quicker_equals_learn_what_the_formulas_learn(model, objective, make, dtype):
    """To rounding: in fp32 of single numbers, in bf16 of the whole gradient's direction."""
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data if "lora" in name else parameter.data.to(dtype)
    plain, plain_gradient = gradient_of(model, objective, make(), 60)
    accelerate(model)
    quick, quick_gradient = gradient_of(model, objective, make(), 60)
    if dtype == torch.float32:
        assert quick == pytest.approx(plain, abs=1e-5)
        torch.testing.assert_close(quick_gradient, plain_gradient, atol=1e-5, rtol=1e-4)
    assert quick["loss"] == pytest.approx(plain["loss"], rel=0.02)
    assert torch.cosine_similarity(quick_gradient, plain_gradient, 0) > 0.99


def test_recomputed_activations_give_every_tensor_the_same_gradient(either_model):
    model = either_model
    kept = gradient_of(model, Sft(), lessons(), 60)[1]
    recomputed = gradient_of(model, Sft(), lessons(), 60, checkpointing=True)[1]
    torch.testing.assert_close(recomputed, kept, atol=1e-6, rtol=1e-5)
    sizes = [p.numel() for p in adapter_parameters(model, "one").values()]
    assert all(piece.abs().sum() > 0 for piece in recomputed.split(sizes))


def test_recomputing_keeps_less(either_model):
    """Counted in the bytes that autograd saves for the backward pass."""

    def saved(checkpointing):
        either_model.checkpointing = checkpointing
        sizes = []
        trainable(either_model, "one")
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t: (sizes.append(t.nbytes), t)[1], lambda t: t
        ):
            training.run_pass(either_model, "one", pack(lessons(), either_model))
        return sum(sizes)

    assert saved(True) < 0.5 * saved(False)


PROCESS = """
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist

sys.path[:0] = sys.argv[4:]
import test_training as t
from conftest import TINY, random_decoder
from usbrec import parallel

torch.set_num_threads(1)
rank, world, folder = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
dist.init_process_group("gloo", f"file://{folder}/meeting", rank=rank, world_size=world)
model = random_decoder(TINY)
t.add_adapter(model, "one", t.LoraConfig(r=2), seed=1)
t.learn(model, t.pairs(), t.Simpo(), t.QUICK, folder / "run", t.pairs(3, 9))
torch.save(t.weights(model), folder / f"adapter{rank}")
parallel.meet()  # as run_together does
os._exit(0)  # all is written; gloo's threads have aborted while the interpreter was taken down
"""


def test_two_processes_give_the_curve_and_the_adapter_of_one(tiny_model, tmp_path):
    """Data parallel over gloo, five steps with validation; equal to rounding."""
    root = Path(__file__).parents[1]
    command = [sys.executable, "-c", PROCESS]
    rest = ["2", str(tmp_path), str(root / "tests"), str(root)]
    children = [subprocess.Popen([*command, str(rank), *rest]) for rank in range(2)]
    assert [child.wait(timeout=600) for child in children] == [0, 0]

    add_adapter(tiny_model, "one", LoraConfig(r=2), seed=1)
    learn(tiny_model, pairs(), Simpo(), QUICK, tmp_path / "alone", pairs(3, 9))
    both, alone = rows(tmp_path / "run"), rows(tmp_path / "alone")
    assert len(both) == len(alone)
    for got, expected in zip(both, alone, strict=True):
        assert got == pytest.approx(expected, abs=1e-4, rel=1e-4)
    first, second = (torch.load(tmp_path / f"adapter{rank}") for rank in range(2))
    for name, expected in weights(tiny_model).items():
        assert torch.equal(first[name], second[name]), name
        torch.testing.assert_close(first[name], expected, atol=1e-4, rtol=1e-3)


def test_every_adapter_tensor_moves_and_the_base_does_not(model, tmp_path):
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    learn(model, lessons(), Sft(), QUICK, tmp_path)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) == ("lora" not in name), name
    assert not any(p.requires_grad for p in model.parameters())


def test_another_adapter_is_left_alone(model, tmp_path):
    add_adapter(model, "two", LoraConfig(r=2), seed=2)
    before = {name: p.detach().clone() for name, p in adapter_parameters(model, "two").items()}
    learn(model, lessons(), Sft(), QUICK, tmp_path)
    assert all(torch.equal(p, before[n]) for n, p in adapter_parameters(model, "two").items())


def test_a_step_at_a_tiny_rate_changes_the_weights_of_a_bf16_model(model, tmp_path):
    model.to(torch.bfloat16)
    for name, parameter in adapter_parameters(model, "one").items():
        parameter.data = parameter.data.float()
        assert parameter.dtype == torch.float32, name
    before = weights(model)
    options = TrainingOptions(learning_rate=5e-7, steps=1, warmup=0)
    learn(model, lessons(), Sft(), options, tmp_path)
    assert all(not torch.equal(after, before[n]) for n, after in weights(model).items())


def test_sft_learns_its_lessons_by_heart(model, tmp_path):
    options = replace(QUICK, epochs=40, learning_rate=3e-2)
    learn(model, lessons(4), Sft(), options, tmp_path)
    assert rows(tmp_path)[-1]["loss"] < 0.3 * rows(tmp_path)[0]["loss"]
    assert rows(tmp_path)[-1]["accuracy"] > rows(tmp_path)[0]["accuracy"]


def test_simpo_learns_to_prefer_the_chosen_responses(model, tmp_path):
    options = replace(QUICK, epochs=30)
    learn(model, pairs(6), Simpo(SimpoOptions(beta=2.0)), options, tmp_path)
    assert rows(tmp_path)[-1]["rewards/accuracies"] == 1.0
    assert rows(tmp_path)[-1]["rewards/margins"] > rows(tmp_path)[0]["rewards/margins"]


def test_metrics_of_pairs_are_what_their_names_say(model, tmp_path):
    """Margins are the difference of rewards, rewards are beta times average log-probabilities."""
    objective = Simpo(SimpoOptions(beta=2.5))
    learn(model, pairs(), objective, replace(QUICK, batch_size=10), tmp_path)
    row = rows(tmp_path)[0]
    assert row["rewards/margins"] == pytest.approx(
        row["rewards/chosen"] - row["rewards/rejected"], abs=1e-5
    )
    assert row["rewards/chosen"] == pytest.approx(2.5 * row["logps/chosen"])
    assert row["lengths/chosen"] == row["lengths/rejected"] == 4.0
    sides = ("rewards", "logps", "lengths")
    metrics = {f"{name}/{side}" for name in sides for side in ("chosen", "rejected")}
    metrics |= {"rewards/margins", "rewards/accuracies", "repetition"}
    assert set(row) == {"step", "loss", "learning_rate", "grad_norm"} | metrics


def test_the_peak_memory_is_bytes_on_every_system_that_tells_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """getrusage counts KiB on Linux, and bytes on macOS; Windows has no such module."""
    told = SimpleNamespace(RUSAGE_SELF=0, getrusage=lambda who: SimpleNamespace(ru_maxrss=5000))
    monkeypatch.setitem(sys.modules, "resource", told)
    for system, size in (("linux", 5_120_000), ("darwin", 5000)):
        monkeypatch.setattr(sys, "platform", system)
        assert training.peak_memory(torch.device("cpu")) == size
    monkeypatch.setitem(sys.modules, "resource", None)
    assert training.peak_memory(torch.device("cpu")) == 0


@pytest.mark.parametrize("stop", ["before_save", "after_metrics", "in_pass"])
@pytest.mark.parametrize("at", [1, 2, 3, 4])
def test_a_run_that_was_cut_off_ends_with_the_same_bytes(model, tmp_path, monkeypatch, at, stop):
    """Five steps, a state every two; the cut falls at step `at`, in one of three places."""
    start = weights(model)
    check = lessons(3, seed=9)
    options = replace(QUICK, eval_every=1)
    learn(model, lessons(), Sft(), options, tmp_path / "whole", check)
    expected = weights(model)

    put(model, start)
    owner, place = {
        "before_save": (training.State, "save"),
        "after_metrics": (training.State, "validated"),
        "in_pass": (training, "run_pass"),
    }[stop]
    original = getattr(owner, place)

    def interrupted(*args):
        done = sum("loss" in row for row in rows(tmp_path / "cut"))
        if done >= at and torch.is_grad_enabled():  # a validation is without
            raise KeyboardInterrupt
        return original(*args)

    with monkeypatch.context() as patch:
        patch.setattr(owner, place, interrupted)
        with pytest.raises(KeyboardInterrupt):
            learn(model, lessons(), Sft(), options, tmp_path / "cut", check)
    put(model, start)
    learn(model, lessons(), Sft(), options, tmp_path / "cut", check)
    assert all(torch.equal(after, expected[name]) for name, after in weights(model).items())
    for name in ("metrics.jsonl", "state.safetensors"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_a_finished_run_is_not_trained_again(model, tmp_path, monkeypatch):
    start = weights(model)
    learn(model, lessons(), Sft(), QUICK, tmp_path)
    learned = weights(model)
    put(model, start)
    monkeypatch.setattr(training, "measure", None)
    learn(model, lessons(), Sft(), QUICK, tmp_path)
    assert all(torch.equal(learned[name], weights(model)[name]) for name in learned)
    assert not all(torch.equal(learned[name], start[name]) for name in learned)


def test_the_adapter_with_the_lowest_validation_loss_is_kept(either_model, tmp_path):
    """Validation and training items are at odds, so the best step is not the last."""
    model = either_model
    options = replace(QUICK, epochs=12, eval_every=1, learning_rate=5e-2, schedule="constant")
    check = lessons(3, seed=9)
    step = learn(model, lessons(3), Sft(), options, tmp_path, check)
    losses = {row["step"]: row["eval/loss"] for row in rows(tmp_path) if "eval/loss" in row}
    assert step == min(losses, key=losses.get) != max(losses)
    with torch.no_grad():
        found = measure(model, "one", check, measured(Sft(), options.tokens_per_pass))
    assert found["loss"] == pytest.approx(losses[step])


def test_other_options_data_or_weights_are_refused(model, tmp_path):
    start = weights(model)
    learn(model, lessons(), Sft(), QUICK, tmp_path)
    for wrong, items, options in (
        ("items", lessons(seed=3), QUICK),
        ("seed 0, got 1", lessons(), replace(QUICK, seed=1)),
    ):
        put(model, start)
        told = rf"state\.safetensors was made with {wrong}.*; delete {tmp_path} to start over"
        with pytest.raises(UserError, match=told):
            learn(model, items, Sft(), options, tmp_path)
    with pytest.raises(UserError, match=r"state\.safetensors was made with objective"):
        put(model, start)
        learn(model, lessons(), Simpo(), QUICK, tmp_path)
    with pytest.raises(UserError, match=r"state\.safetensors was made with weights"):
        put(model, {name: tensor + 1 for name, tensor in start.items()})
        learn(model, lessons(), Sft(), QUICK, tmp_path)
    with pytest.raises(UserError, match=r"state\.safetensors was made with validation"):
        put(model, start)
        learn(model, lessons(), Sft(), QUICK, tmp_path, lessons(1))


def test_a_broken_state_is_named_and_left_alone(model, tmp_path):
    start = weights(model)
    learn(model, lessons(), Sft(), QUICK, tmp_path)
    path = tmp_path / "state.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    put(model, start)
    with pytest.raises(UserError, match=r"state\.safetensors is no whole training state"):
        learn(model, lessons(), Sft(), QUICK, tmp_path)
    assert path.stat().st_size == 1000


def test_a_full_disk_keeps_the_last_good_state(model, tmp_path, monkeypatch):
    def full(descriptor):
        if (tmp_path / "state.safetensors.part").exists() and len(rows(tmp_path)) > 3:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr("usbrec.runs.os.fsync", full)
    with pytest.raises(
        UserError,
        match=r"state.* be written: No space left on device.* is kept",
    ):
        learn(model, lessons(), Sft(), QUICK, tmp_path)
    assert not (tmp_path / "state.safetensors.part").exists()
    assert saved_step(tmp_path) == 2


def test_metrics_shorter_than_the_state_counts_are_refused(model, tmp_path):
    start = weights(model)
    learn(model, lessons(), Sft(), QUICK, tmp_path)
    (tmp_path / "metrics.jsonl").write_text("")
    put(model, start)
    with pytest.raises(UserError, match="metrics.jsonl holds 0 bytes"):
        learn(model, lessons(), Sft(), QUICK, tmp_path)


def test_a_loss_that_is_not_finite_ends_the_run(model, tmp_path):
    for parameter in adapter_parameters(model, "one").values():
        parameter.data.fill_(float("nan"))
    with pytest.raises(UserError, match="lower the learning rate"):
        learn(model, lessons(), Sft(), QUICK, tmp_path)


def test_a_validation_that_is_not_finite_ends_the_run_and_keeps_the_last_state(model, tmp_path):
    """Token 1, whose embedding is no number at first, stands in the validation items alone."""
    start, embedding = weights(model), model.model.embed_tokens.weight.data
    check = [Tree([Branch([5, 1, 6], [0, 0, 1])])]
    arguments = lessons(), Sft(), replace(QUICK, eval_every=5), tmp_path, check
    whole = embedding[1].clone()
    embedding[1] = torch.nan
    told = "the validation after step 5 has eval/loss nan; the last state is kept"
    with pytest.raises(UserError, match=told):
        learn(model, *arguments)
    assert saved_step(tmp_path) == 4
    embedding[1] = whole
    put(model, start)
    assert learn(model, *arguments) == 5
    assert [row["step"] for row in rows(tmp_path)] == [1, 2, 3, 4, 5, 5]


def test_validation_comes_ten_times_a_run_unless_it_is_said_how_often(model, tmp_path):
    start = weights(model)
    for eval_every, expected in ((0, [*range(2, 25, 2), 25]), (10, [10, 20, 25])):
        put(model, start)
        folder = tmp_path / str(eval_every)
        options = replace(QUICK, steps=25, eval_every=eval_every)
        learn(model, lessons(), Sft(), options, folder, lessons(2, seed=9))
        assert [row["step"] for row in rows(folder) if "eval/loss" in row] == expected


def test_no_items_are_a_user_s_fault(model, tmp_path):
    with pytest.raises(UserError, match="nothing to train on"):
        learn(model, [], Sft(), QUICK, tmp_path)


def test_each_epoch_takes_every_item_once_in_an_order_of_its_own():
    options = TrainingOptions(epochs=2, batch_size=4, seed=3)
    steps = step_items(options, 10)
    taken = [item for step in steps for item in step]
    assert [len(step) for step in steps] == [4] * 5
    assert sorted(taken[:10]) == sorted(taken[10:]) == list(range(10))
    assert taken[:10] != taken[10:]
    assert step_items(options, 10) == steps


def test_a_count_of_steps_goes_beyond_the_epochs_or_stops_before():
    for options, sizes in (
        (TrainingOptions(steps=7, batch_size=4), [4] * 7),
        (TrainingOptions(steps=1, batch_size=4), [4]),
        (TrainingOptions(epochs=0.5, batch_size=4), [4, 1]),
    ):
        assert [len(step) for step in step_items(options, 10)] == sizes


def test_the_rate_warms_up_and_falls_as_half_a_cosine():
    """10 steps, 2 of warm-up: 0.5, 1, then (1 + cos(pi k / 8)) / 2 for k = 0..7."""
    options = TrainingOptions(learning_rate=1.0, warmup=0.2)
    got = [training.learning_rate(options, step, 10) for step in range(10)]
    assert got[:3] == [0.5, 1.0, 1.0]
    assert got[6] == pytest.approx(0.5)
    flat = replace(options, schedule="constant")
    assert [training.learning_rate(flat, step, 10) for step in (0, 5, 9)] == [0.5, 1.0, 1.0]
    begun = replace(flat, warmup=0.1)  # 2.5 steps: the third is the first at the full rate
    assert [training.learning_rate(begun, step, 25) for step in range(4)] == [1 / 3, 2 / 3, 1, 1]


def test_a_step_takes_its_rate_norm_and_decay_from_the_options(model, tmp_path):
    """A norm of 0 never clips, and one that no gradient reaches changes nothing."""
    start = weights(model)

    def learned(**changed):
        put(model, start)
        folder = tmp_path / str(changed)
        learn(model, lessons(), Sft(), replace(QUICK, **changed), folder)
        return torch.cat([x.flatten() for x in weights(model).values()])

    plain = learned(max_grad_norm=0.0)
    assert torch.equal(plain, learned(max_grad_norm=1e9))
    assert not torch.allclose(plain, learned(max_grad_norm=1e-3))
    assert learned(max_grad_norm=0.0, weight_decay=9.0).norm() < 0.9 * plain.norm()
    found = [row["learning_rate"] for row in rows(tmp_path / str({"max_grad_norm": 0.0}))]
    assert found == [training.learning_rate(QUICK, step, 5) for step in range(5)]


def test_a_metric_is_the_mean_over_its_tokens_in_any_number_of_passes(model):
    """Weights of 0.5 count in the loss alone."""
    packed = pack(lessons(), model)
    with torch.no_grad():
        hits = training.run_pass(model, "one", packed).predictions == packed.targets
        for size in (30, 10_000):
            found = measure(model, "one", lessons(), measured(Sft(), size))
            assert found["accuracy"] == pytest.approx(hits.double().mean().item())
    assert len(hits) == 30


def test_rows_hold_every_tree_once_and_no_more_tokens_than_allowed():
    trees = lessons(20)
    laid = pack_rows(trees, 30)
    assert sorted(id(t) for row in laid for t in row) == sorted(map(id, trees))
    assert all(sum(map(len, row)) <= 30 for row in laid)
    assert len(laid) <= 1 + sum(map(len, trees)) // 25
    assert [len(row) for row in pack_rows(trees, 1)] == [1] * 20


def test_lessons_that_teach_nothing_or_are_too_long_are_counted_out():
    good = lessons(1)[0]
    mute = Tree([Branch([5, 6], [0, 0])])
    only_first = Tree([Branch([5, 6], [1, 0])])
    long_path = Tree([Branch([5] * 6, [1] * 6), Branch([6] * 6, [1] * 6, 0)])
    kept, dropped = usable([good, mute, only_first, long_path], 11, Sft())
    assert kept == [good]
    assert dropped == {"dropped as too long": 1, "dropped with nothing to learn": 2}


def test_pairs_that_are_empty_equal_or_too_long_are_counted_out():
    """A response of its end-of-turn token alone is empty; the limit holds for each side."""
    good = pair_tree([3] * 8, [4, 5, 2], [5, 2])
    trees = [
        good,
        pair_tree([3] * 8, [2], [5, 2]),
        pair_tree([3] * 8, [4, 2], []),
        pair_tree([3] * 8, [4, 2], [2]),
        pair_tree([3] * 8, [4, 2], [4, 2]),
        pair_tree([3] * 9, [4, 5, 2], [5, 2]),
        pair_tree([], [4, 5, 2], [5, 2]),
    ]
    kept, dropped = usable(trees, 11, Simpo())
    assert kept == [good]
    assert list(dropped.values()) == [1, 4, 1]  # too long, empty, equal


def test_the_end_of_turn_token_counts_in_a_response_s_sum_and_length(
    default_model_folder, tiny_model
):
    """With a log-probability of -1 for each token the sum is the length, the end token in both."""
    ours = ChatTokenizer.from_folder(default_model_folder)
    texts = "Heat (1995).", "No idea."
    prompt = ours.prompt([Message("user", "Hi")])
    row = pack([pair_tree(prompt, *(ours.reply(text) for text in texts))], tiny_model)
    logps = -torch.ones(len(row.targets))
    found = response_logps(logps, row.segment_ids, torch.tensor([1, 2]))
    expected = [len(ours.encode(text)) + 1 for text in texts]
    assert found.lengths.tolist() == expected == (-found.logps).tolist()
    assert [int(row.targets[row.segment_ids == i][-1]) for i in (1, 2)] == [2, 2]  # <|im_end|>


def test_repetition_counts_predictions_that_stand_in_the_same_response_already(tiny_model):
    """Response 1 is 7 8 9, response 2 is 7 7. Of five predictions two repeat.

    7 (nothing stands before), 7 (yes: 7 does), 5 (no) | 8 (it stands in response 1 only), 7 (yes).
    """
    row = pack([pair_tree([3], [7, 8, 9], [7, 7])], tiny_model)
    predictions = torch.tensor([7, 7, 5, 8, 7])
    found = repetition(TokenLogps(torch.zeros(5), predictions), row)
    assert (found.sum().item(), len(found)) == (2, 5)
    row = pack([pair_tree([3], [7] + [9] * 40, [7])], tiny_model)
    found = repetition(TokenLogps(torch.zeros(42), torch.full((42,), 7)), row)
    assert found.nonzero()[:, 0].tolist() == [*range(1, 33)]  # 32 tokens are recent


def test_a_falling_chosen_log_probability_and_growing_repetition_are_said():
    steady = [{"logps/chosen": -2.0, "repetition": 0.2}] * 10
    worse = [{"logps/chosen": -2.0 - 0.1 * i, "repetition": 0.2 + 0.05 * i} for i in range(10)]
    assert training.collapse_warnings(steady) == []
    assert len(training.collapse_warnings(worse)) == 2


def test_a_collapsing_run_warns(model, tmp_path, monkeypatch):
    monkeypatch.setattr(training, "FALL_OF_CHOSEN", -1e9)
    with pytest.warns(UserWarning, match="log-probability a token fell"):
        learn(model, pairs(), Simpo(), QUICK, tmp_path)


@pytest.mark.parametrize(
    "wrong",
    [{"schedule": "linear"}, {"batch_size": 0}, {"warmup": 2.0}, {"learning_rate": float("nan")}],
)
def test_an_option_out_of_range_is_refused_by_name(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        TrainingOptions(**wrong)


def test_training_drops_what_was_laid_out_of_its_adapter(model, tmp_path):
    """Else a validation, which is without gradients, would read the weights of before."""
    accelerate(model)
    row = pack(lessons(1), model)

    @torch.no_grad()
    def hidden():
        span = AdapterSpan("one", 0, len(row.input_ids))
        return model(row.input_ids, row.position_ids, row.attention, [span])

    before = hidden()  # lays the adapter out
    options = replace(QUICK, eval_every=1)
    learn(model, lessons(), Sft(), options, tmp_path, lessons(3, seed=1))
    assert not torch.allclose(hidden(), before, atol=1e-3)
    checks = {x["step"]: x["eval/loss"] for x in rows(tmp_path) if "eval/loss" in x}
    assert len(set(checks.values())) == len(checks) == 5
    state = load_file(tmp_path / "state.safetensors")
    put(model, {name: state[f"last.{name}"] for name in weights(model)})
    model.ops.clear()
    with torch.no_grad():
        found = measure(model, "one", lessons(3, seed=1), measured(Sft(), QUICK.tokens_per_pass))
    assert found["loss"] == pytest.approx(checks[5], abs=1e-6)
