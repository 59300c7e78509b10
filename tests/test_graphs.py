"""Recorded passes, without a GPU: a stand-in records what is computed, and computes it again."""

import warnings
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from conftest import random_decoder
from test_engine import CHATS, TINY, chat, drawing, engine
from test_packing import stretch
from test_training import lessons, pairs
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from usbrec.chat import Sampling
from usbrec.llm.engine import Engine
from usbrec.llm.fast import accelerate, graphs, kernels, record_on_gpu
from usbrec.llm.fast.graphs import RecordedDecoding, RecordedLearning, rounded
from usbrec.llm.lora import LoraConfig, adapter_parameters, add_adapter
from usbrec.llm.loss import Sft
from usbrec.llm.model import Decoder, Stretch, attend_all
from usbrec.llm.packing import Branch, Tree, pack
from usbrec.llm.training import run_pass
from usbrec.options import UserError


class StandInGraph:
    """A CUDA graph's stand-in: the operations of a step, with the tensors that they read and wrote.

    As in a graph, a replay computes from the same memory into the same memory, and nothing that
    Python decided is decided anew.
    """

    def __init__(self) -> None:
        self.calls: list[tuple[Any, Any, Any, list[torch.Tensor]]] = []

    def replay(self) -> None:
        """Compute everything again."""
        with torch.inference_mode():
            for func, args, kwargs, outs in self.calls:
                again = [x for x in tree_leaves(func(*args, **kwargs)) if torch.is_tensor(x)]
                for old, new in zip(outs, again, strict=True):
                    if old.data_ptr() != new.data_ptr():  # neither a view nor changed in place
                        old.copy_(new)


class Recording(TorchDispatchMode):
    """Notes each operation of a step for its graph."""

    def __init__(self, graph: StandInGraph) -> None:
        super().__init__()
        self.graph = graph

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        outs = [x for x in tree_leaves(out) if torch.is_tensor(x)]
        self.graph.calls.append((func, args, kwargs or {}, outs))
        return out


@contextmanager
def recording(graph: StandInGraph, pool: object) -> Iterator[None]:
    """Record what is computed inside."""
    with Recording(graph):
        yield


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let steps be recorded here."""
    monkeypatch.setattr(torch.cuda, "CUDAGraph", StandInGraph)
    monkeypatch.setattr(torch.cuda, "graph", recording)


def recorded_engine() -> tuple[Engine, RecordedDecoding]:
    """`engine` with recorded steps, and their owner."""
    e = engine()
    decoding = RecordedDecoding(e.model.ops)
    decoding.works = True
    e.model.ops.decoding = decoding.begin
    return e, decoding


HOWS = {
    "greedy": Sampling(8, temperature=0),
    "warm": Sampling(8, temperature=0.9, top_k=20, top_p=0.9),
}


@pytest.mark.parametrize("how", HOWS)
def test_recorded_steps_give_the_same_replies(cuda: None, how: str) -> None:
    """Unequal prompts, mixed adapters; then other prompts by the same steps, and another shape."""
    plain, (quick, decoding) = engine(), recorded_engine()
    for asked in (
        drawing(CHATS, HOWS[how], range(6)),
        drawing([chat(x.messages[0].content[::-1], x.adapter) for x in CHATS], HOWS[how], range(6)),
        drawing(CHATS[:2], HOWS[how], range(2)),
    ):
        assert quick.generate(asked) == plain.generate(asked)
        assert quick.generate(asked) == plain.generate(asked)
    assert len(decoding.steps) == 2
    rows, columns, *_ = next(iter(decoding.steps))
    assert (rows, columns) == (8, 128)


def test_a_later_turn_reads_what_recorded_steps_have_computed(cuda: None) -> None:
    """All but the newest token of a reply is in the memory of prompts, with the right keys."""
    plain, (quick, _) = engine(), recorded_engine()
    how = Sampling(12, temperature=0)
    plain.tokenizer.stop_ids = quick.tokenizer.stop_ids = frozenset()
    asked = drawing(CHATS[:3], [how, replace(how, max_new_tokens=5), how], range(3))
    begun = [
        replace(x, begin=y.text[:4]) for x, y in zip(asked, plain.generate(asked), strict=True)
    ]
    quick.generate(asked)
    before = quick.usage.reused_tokens
    assert quick.generate(begun) == plain.generate(begun)
    assert quick.usage.reused_tokens == plain.usage.reused_tokens > before


def test_steps_are_forgotten_when_the_rows_need_more_memory(cuda: None) -> None:
    plain, (quick, decoding) = engine(), recorded_engine()
    how = Sampling(6, temperature=0)
    long = drawing([chat("abc" * 60)], how, [0])
    for asked in (drawing(CHATS[:1], how, [0]), long, drawing(CHATS[:1], how, [0])):
        assert quick.generate(asked) == plain.generate(asked)
    assert len(decoding.steps) == 2  # the first was recorded twice, over other memory
    decoding.clear()
    assert not decoding.steps


def test_rows_that_fill_up_keep_nothing_of_an_earlier_batch(cuda: None) -> None:
    """Eight rows of long prompts, then five of short ones, in as many rows of fewer columns."""
    plain, (quick, decoding) = engine(), recorded_engine()
    how = Sampling(6, temperature=0)
    for count, text in ((8, "abc" * 60), (5, "ab")):
        asked = drawing([chat(text + "abcdefgh"[i]) for i in range(count)], how, range(count))
        assert quick.generate(asked) == plain.generate(asked)
    assert [key[:2] for key in decoding.steps] == [(8, 256), (8, 128)]


def test_recorded_steps_outlive_the_keys_of_a_chunk(cuda: None) -> None:
    e, decoding = recorded_engine()
    asked = drawing(CHATS, Sampling(6, temperature=0), range(6))
    replies, steps = e.generate(asked), dict(decoding.steps)
    e.clear_cache()
    assert e.generate(asked) == replies and decoding.steps == steps


def test_a_batch_without_numbers_leaves_none_to_the_next(cuda: None) -> None:
    """No mask hides NaN: it may not stay in columns that a later batch has."""
    plain, (quick, _) = engine(), recorded_engine()
    how = Sampling(6, temperature=0)
    asked, weight = drawing(CHATS, how, range(6)), quick.model.model.layers[0].self_attn.q_proj
    expected, kept = plain.generate(asked), weight.weight.clone()
    assert quick.generate(asked) == expected
    long = drawing([chat("abcabcabc" * 8 + x) for x in "abcdef"], how, range(6))
    with torch.no_grad(), pytest.raises(UserError):
        weight.weight.fill_(torch.nan)
        quick.generate(long)
    weight.weight.data.copy_(kept)
    quick.clear_cache()
    assert quick.generate(asked) == expected


def test_old_memory_goes_before_its_successor_comes(cuda: None) -> None:
    """On a GPU both together may be more than there is."""
    e, decoding = recorded_engine()
    how = Sampling(6, temperature=0)
    e.generate(drawing(CHATS[:1], how, [0]))
    old = weakref.ref(decoding.memory.untyped_storage())
    made = torch.Tensor.new_empty

    def new_empty(own: torch.Tensor, *args: Any) -> torch.Tensor:
        assert old() is None
        return made(own, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "new_empty", new_empty)
        e.generate(drawing([chat("abc" * 60)], how, [0]))
    assert old() is None


def test_a_changed_adapter_is_read_where_it_lies_now(cuda: None) -> None:
    """`Ops.clear` forgets the recorded steps along with the adapters' layout."""
    plain, quick = engine(), engine()
    record_on_gpu(quick.model, quick.model.ops, lambda: None)
    assert quick.model.ops.decoding is not None
    decoding = quick.model.ops.decoding.__self__  # type: ignore[attr-defined]
    decoding.works = True
    asked = drawing([chat("abc", "one")], Sampling(6, temperature=0), [0])
    for scale in (1, -3):
        for e in (plain, quick):
            for parameter in adapter_parameters(e.model, "one").values():
                parameter.data.mul_(scale)
            e.model.ops.clear()
            e.clear_cache()
        assert not decoding.steps
        assert quick.generate(asked) == plain.generate(asked)
        assert len(decoding.steps) == 1


def test_adapters_have_steps_of_their_own_and_the_steps_do_not_grow_without_end(
    cuda: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same chat by the base and by two adapters, when two steps are kept at most."""
    monkeypatch.setattr(graphs, "MOST_STEPS", 2)
    plain, (quick, decoding) = engine(), recorded_engine()
    for adapter in (None, "one", "two", "one"):
        asked = drawing([chat("abc", adapter)], Sampling(6, temperature=0), [0])
        assert quick.generate(asked) == plain.generate(asked)
        assert 1 <= len(decoding.steps) <= 2


def test_logits_that_are_no_numbers_are_told_although_the_next_step_has_begun(cuda: None) -> None:
    quick, _ = recorded_engine()
    quick.model.model.norm.weight.fill_(torch.nan)
    with pytest.raises(UserError, match="not finite"):
        quick.generate(drawing(CHATS, Sampling(6, temperature=0), range(6)))


def test_no_step_begins_after_the_last_token(cuda: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Replies of 6 tokens, the first from the prompt: 5 steps."""
    quick, _ = recorded_engine()
    quick.tokenizer.stop_ids = frozenset()
    steps, plain = [], RecordedDecoding.step
    monkeypatch.setattr(RecordedDecoding, "step", lambda *x: steps.append(1) or plain(*x))
    quick.generate(drawing(CHATS, Sampling(6), range(6)))
    assert len(steps) == 5


def test_short_replies_are_not_recorded(cuda: None) -> None:
    quick, decoding = recorded_engine()
    quick.generate(drawing(CHATS, Sampling(2), range(6)))
    assert not decoding.steps


def test_where_recording_fails_replies_go_on_and_one_warning_says_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def broken() -> None:
        raise RuntimeError("no graphs here")

    monkeypatch.setattr(torch.cuda, "CUDAGraph", broken)
    plain, (quick, decoding) = engine(), recorded_engine()
    asked = drawing(CHATS, Sampling(8, temperature=0), range(6))
    with pytest.warns(UserWarning, match="without CUDA graphs: no graphs here"):
        assert quick.generate(asked) == plain.generate(asked)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert quick.generate(asked) == plain.generate(asked)
    assert not decoding.steps


# --- attention in rectangles ------------------------------------------------------------------


def trees(*lengths: int) -> list[Tree]:
    """Trees of a prompt and two branches, of about these lengths."""
    parts = [(n - 2 * (n // 3), n // 3, n // 3) for n in lengths]
    return [
        Tree([Branch([1] * k, [0] * k, None if i == 0 else 0) for i, k in enumerate(part) if k])
        for part in parts
    ]


@pytest.mark.parametrize(
    ("lengths", "count"), [((70,), 1), ((40, 40), 1), ((70, 90, 66), 1), ((200, 9, 12), 3)]
)
def test_rectangles_equal_the_definition(lengths: tuple[int, ...], count: int) -> None:
    """One for stretches of about the same size, else one for each."""
    generator = torch.Generator().manual_seed(0)
    stretches, first = [], 0
    for tree in trees(*lengths):
        own = stretch(tree)
        stretches.append(Stretch(own.places + first, own.visible))
        first += len(tree)
    q, k, v = (torch.randn(first, heads, 8, generator=generator) for heads in (4, 2, 2))
    arranged = kernels.rectangles(stretches, 2, torch.float32, torch.device("cpu"))
    assert len(arranged) == count
    for rectangle in arranged:  # a row that sees nothing would be no number on a GPU
        assert (rectangle.bias == 0).any(-1).all()
    results = []
    for attend, how in ((attend_all, stretches), (kernels.attend_in_rectangles, arranged)):
        inputs = [x.clone().requires_grad_() for x in (q, k, v)]
        out = attend(inputs[0], inputs[1].transpose(0, 1), inputs[2].transpose(0, 1), how)  # type: ignore[arg-type]
        results.append([out, *torch.autograd.grad(out.square().sum(), inputs)])
    for expected, got in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("sizes", [(5, 9), (300, 40)])
def test_slots_that_nobody_sees_may_hold_anything(sizes: tuple[int, int]) -> None:
    """As in a cache whose first slots are free: no number of theirs reaches a result."""
    places = [torch.arange(3, 3 + sizes[0]), torch.arange(3 + sizes[0], 3 + sum(sizes))]
    stretches = [Stretch(x, torch.ones(len(x), len(x)).tril().bool()) for x in places]
    q, k = torch.ones(sum(sizes), 4, 8), torch.ones(2, 3 + sum(sizes), 8)
    k[:, :3] = torch.nan
    assert kernels.WindowAttention.apply(q, k, k, kernels.windows(stretches)).isfinite().all()
    arranged = kernels.rectangles(stretches, 2, torch.float32, torch.device("cpu"))
    assert kernels.attend_in_rectangles(q, k, k, arranged).isfinite().all()


# --- recorded training passes -----------------------------------------------------------------


def learner() -> tuple[Decoder, RecordedLearning]:
    """A model whose training passes a GPU would record, with an adapter that learns."""
    model = random_decoder(TINY)
    accelerate(model)
    record_on_gpu(model, model.ops, lambda: None)
    for name in ("new", "other"):
        add_adapter(model, name, LoraConfig(r=2), seed=1)
    learning = model.ops.learn
    assert isinstance(learning, RecordedLearning)
    learning.works = True
    return model, learning


def gradients(model: Decoder, adapter: str, rows: list[list[Tree]]) -> list[torch.Tensor]:
    """Learn from packed rows as a step does; return the losses and the summed gradients."""
    model.requires_grad_(False)
    own = list(adapter_parameters(model, adapter).values())
    for parameter in own:
        parameter.requires_grad_()
        parameter.grad = None
    losses = []
    for row in rows:
        packed = pack(row, model)
        loss, _ = Sft()(run_pass(model, adapter, packed), packed)
        loss.backward()
        losses.append(loss.detach())
    return [*losses, *(x.grad for x in own if x.grad is not None)]


def test_recorded_passes_give_the_same_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    """Passes of two lengths, one twice; another step; another adapter."""
    made = []

    def record(body: torch.nn.Module, inputs: Any, **how: Any) -> torch.nn.Module:
        made.append(len(inputs[0]))
        assert [x.shape[-1] for x in inputs] == [made[-1]] * 3 and made[-1] % 128 == 0
        assert (inputs[2] == 0).any(-1).all()  # every token sees one
        return body

    monkeypatch.setattr(torch.cuda, "make_graphed_callables", record)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    model, learning = learner()
    short, long = lessons()[:3], [*lessons(), *pairs()] * 3
    assert rounded(sum(map(len, short)), 128) != rounded(sum(map(len, long)), 128)
    for adapter, rows in (("new", [short, long, short]), ("new", [long]), ("other", [short])):
        learning.works = False
        expected = gradients(model, adapter, rows)
        learning.works = True
        got = gradients(model, adapter, rows)
        assert len(got) == len(expected)
        for one, other in zip(got, expected, strict=True):
            torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)
    assert len(made) == 3 and made[0] == made[2] != made[1]


def test_where_recording_fails_passes_are_learned_as_they_are(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def broken(*args: Any, **how: Any) -> None:
        raise RuntimeError("no graphs here")

    monkeypatch.setattr(torch.cuda, "make_graphed_callables", broken)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    model, learning = learner()
    with pytest.warns(UserWarning, match="without CUDA graphs: no graphs here"):
        got = gradients(model, "new", [lessons()])
    assert not learning.works
    for one, other in zip(got, gradients(model, "new", [lessons()]), strict=True):
        assert torch.equal(one, other)


def test_long_passes_and_recomputed_ones_are_not_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("usbrec.llm.fast.graphs.LARGE", 200)
    model, _ = learner()  # recording would fail: there is no GPU
    gradients(model, "new", [lessons()])
    monkeypatch.setattr("usbrec.llm.fast.graphs.LARGE", 10**6)
    model.checkpointing = True
    gradients(model, "new", [lessons()])
    with torch.no_grad():
        packed = pack(lessons(), model)
        run_pass(model, "new", packed)
