"""Claim: on a GPU too we are several times as quick as transformers and peft, near what it can do.

    python benchmarks/gpu.py --minutes 8 --json gpu.jsonl      # one H100 or H200, 4 min
    python benchmarks/gpu.py --tiny                            # the rehearsal on a CPU, 20 s

Random weights in Llama-3.1-8B's shape, bf16, made on the device; transformers computes on the same
memory. Needs torch, transformers and peft, no network. A row stands as soon as it is
measured, with its peer from the same run. What fails or runs out of memory is told, and the rest
goes on. Whole calls are timed, prefill included.

    decode, siblings    tokens/s against `generate`; batch1_share: bytes of weights read a second
                        over those of a copy (read and written); _adapter: rank 8, against peft
    ses, trees          a searched turn over a plain reply of ours, an adapter for either side
    simpo               pairs/s against a plain step over peft (padded rows, autocast to bf16),
                        FLOP/s over those of a large product, peak memory of all tensors
    training            an SFT step on the sample set's lessons, against two threads of the CPU
    agreement           logits' distance from the CPU's in fp32, against that of the CPU in bf16;
                        greedy fp32 replies equal the CPU's; equal seeds, equal replies
    greedy              fp32 replies of the default model, if its file is here, equal transformers'
"""

import argparse
import copy
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from contest import (
    LEARNING_RATE,
    best_step,
    in_our_order,
    learn,
    options_for,
    random_ids,
    show,
    wait,
)
from race import Endless, finish, medians, ours, request_of, theirs
from ses import dialogue, turn
from shapes import (
    ADAPTERS,
    REHEARSAL,
    TINY,
    WHOLE,
    Bench,
    beside,
    free,
    random_model,
    reason,
    write_folder,
)
from simpo import BETA, RATIO, make_pairs
from torch.nn.utils.rnn import pad_sequence

from usbrec.chat import Request, Sampling
from usbrec.crs import agents
from usbrec.crs.agents import Roles, Side
from usbrec.crs.catalogue import Catalogue
from usbrec.crs.datasets import load_catalogue, load_split
from usbrec.crs.lessons import recommender_lessons
from usbrec.extras.default_model import DEFAULT, MODELS, is_whole
from usbrec.llm.cache import PrefixCache
from usbrec.llm.checkpoint import load_model
from usbrec.llm.decoding import prefill
from usbrec.llm.engine import Engine
from usbrec.llm.fast import accelerate
from usbrec.llm.lora import LoraConfig, LoraLinear, add_adapter, remove_adapter
from usbrec.llm.loss import Sft, Simpo, SimpoOptions
from usbrec.llm.model import Decoder
from usbrec.llm.packing import Tree, lesson_tree
from usbrec.llm.tokenizer import ChatTokenizer
from usbrec.llm.training import peak_memory
from usbrec.loading import pick_dtype

REACH = {
    **{"batch1_share": 0.70, "batch1_adapter_share": 0.60, "batch32": 4.0, "siblings32": 5.0},
    **{"ses_chain": 4.0, "ses_tree": 4.0, "trees32_seconds": 5.0},  # at most
    **{"simpo16_share": 0.50, "simpo1500_share": 0.55},
    **{"simpo1500_memory": 60.0, "simpo1500_checkpointing_memory": 40.0},  # GB, at most
    **{"training": 30.0, "greedy": 1.0, "same_greedy": 1.0, "same_replies": 1.0},
    "logits_error": 2.0,  # at most
}


class Row(NamedTuple):
    """A figure of ours, what stands beside it (a text: why it is missing), and the claim's ratio.

    The ratio is ours over the peer's, or ours alone.
    """

    name: str
    unit: str
    ours: float
    peer: float | str | None
    ratio: float | None


Rows = Iterator[Row]


def against(name: str, unit: str, own: float, peer: float | str) -> Row:
    """Return the row of a ratio."""
    return Row(name, unit, own, peer, None if isinstance(peer, str) else own / peer)


def figure(name: str, unit: str, own: float, peer: float | str | None = None) -> Row:
    """Return the row of a figure that counts by itself."""
    return Row(name, unit, own, peer, own)


# --- decoding ---------------------------------------------------------------------------------


def decode(bench: Bench, adapter: str | None = None) -> Rows:
    """Yield tokens/s at batch 1, 8 and 32, and the share of the copy's bandwidth at batch 1."""
    engine, tokens = bench.engine(), bench.size.new_tokens
    request = replace(request_of(engine, bench.size.prompt), adapter=adapter)
    ids = engine.tokenizer.prompt(request.messages)
    end = "_adapter" if adapter else ""

    def their_rate(batch: int) -> float:
        peer = bench.peer(adapter is not None)
        return batch * tokens / bench.seconds(lambda: theirs(peer, [ids] * batch, tokens))

    for batch in (1, 8, 32):
        taken = bench.seconds(partial(ours, engine, [request] * batch, tokens))
        peer = beside(partial(their_rate, batch))
        yield against(f"batch{batch}{end}", "tokens/s", batch * tokens / taken, peer)
        if batch == 1:
            layers = [x for x in bench.model.modules() if isinstance(x, LoraLinear)]
            read = sum(layer.weight.nbytes for layer in layers) * tokens / taken
            yield figure(f"batch1{end}_share", "of a copy's bytes/s", read / bench.copy)


def siblings(bench: Bench) -> Rows:
    """Yield tokens/s of 32 samples of one long prompt."""
    engine, tokens = bench.engine(), bench.size.new_tokens
    request = request_of(engine, bench.size.long_prompt)
    ids = engine.tokenizer.prompt(request.messages)
    taken = bench.seconds(lambda: ours(engine, [request] * 32, tokens))

    def their_rate() -> float:
        peer = bench.peer(adapted=False)
        return 32 * tokens / bench.seconds(lambda: theirs(peer, [ids], tokens, 32))

    yield against("siblings32", "tokens/s", 32 * tokens / taken, beside(their_rate))


def ses(bench: Bench, together: bool = False) -> Rows:
    """Yield seconds of a searched turn beside those of a plain reply; or of many trees together."""
    engine, tokens, (speaker, seeker) = bench.engine(), bench.size.reply, ADAPTERS
    roles = Roles(Side(engine, speaker), Side(engine, seeker), Catalogue([]))
    roots = [dialogue(number) for number in range(bench.size.dialogues if together else 1)]

    def searched(mode: str) -> None:
        engine.cache.clear()
        turn(roles, roots, mode, 0, tokens)

    if together:
        yield figure("trees32_seconds", "s", medians({"": partial(searched, "tree")}, 1)[""])
        return
    plain = Request(agents.recommender_prompt(roots[0]), adapter=speaker)
    reply = bench.seconds(lambda: ours(engine, [plain], tokens))
    for mode in ("chain", "tree"):
        yield against(f"ses_{mode}", "s", bench.seconds(partial(searched, mode)), reply)


# --- training ---------------------------------------------------------------------------------


def simpo(bench: Bench, name: str, batch: int, long: bool = False, recompute: bool = False) -> Rows:
    """Yield pairs/s, the share of the product's FLOP/s, and the peak memory of a SimPO step."""
    steps = bench.size.steps
    pairs = make_pairs(steps * batch, *(bench.size.long_pair if long else bench.size.pair))
    objective = Simpo(SimpoOptions(beta=BETA, gamma_beta_ratio=RATIO))
    add_adapter(bench.model, "a", LoraConfig(r=8), seed=0)
    try:
        found = learn(bench.model, pairs, objective, options_for(steps, batch, recompute))
    finally:
        remove_adapter(bench.model, "a")
        free()
    order = in_our_order(pairs, steps, batch)
    parts = [order[i : i + batch] for i in range(0, len(order), batch)]
    peer = beside(lambda: their_simpo(bench, parts, recompute))
    missing = isinstance(peer, str)
    rate = peer if missing else batch / best_step(peer)
    yield against(f"{name}_pairs", "pairs/s", batch / best_step(found), rate)
    yield figure(f"{name}_share", "of a product's FLOP/s", found["share"])
    memory = peer if missing else peer["memory"] / 1e9
    yield figure(f"{name}_memory", "GB", found["memory"] / 1e9, memory)


def their_simpo(bench: Bench, steps: list[list[Tree]], recompute: bool) -> dict[str, Any]:
    """Return seconds and losses by step and the peak memory of a plain SimPO step over peft."""
    model = bench.peer(adapted=True).train()
    if recompute:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=0.0, fused=True)
    found: dict[str, Any] = {"seconds": [], "losses": []}
    for pairs in steps:
        wait()
        start = time.perf_counter()
        loss = their_loss(model, pairs)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        found["losses"].append(loss.item())
        wait()
        found["seconds"].append(time.perf_counter() - start)
    return found | {"memory": peak_memory(model.device)}


def their_loss(model: Any, pairs: list[Tree]) -> torch.Tensor:
    """Return SimPO's loss of padded rows, chosen before rejected, as common trainers compute it."""
    sides = [(p.branches[0].ids, p.branches[side].ids) for side in (1, 2) for p in pairs]
    rows = [torch.tensor([*prompt, *said]) for prompt, said in sides]
    ids = pad_sequence(rows, batch_first=True).to(model.device)  # (2 pairs, T)
    begins = torch.tensor([[len(prompt)] for prompt, _ in sides], device=model.device)
    ends = torch.tensor([[len(row)] for row in rows], device=model.device)
    places = torch.arange(ids.shape[1], device=model.device)
    with torch.autocast(model.device.type, torch.bfloat16):
        logits = model(ids, (places < ends).long(), use_cache=False).logits
    logps = logits[:, :-1].float().log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0]
    counted = ((places >= begins) & (places < ends))[:, 1:]
    chosen, rejected = ((logps * counted).sum(1) / counted.sum(1)).chunk(2)
    return -F.logsigmoid(BETA * (chosen - rejected) - RATIO * BETA).mean()


def training(bench: Bench) -> Rows:
    """Yield tokens/s of SFT steps of the default model, here and on two threads of the CPU."""
    size, folder = bench.size, MODELS / DEFAULT["folder"]
    stored = size is WHOLE and is_whole(folder)
    if not stored:
        folder = write_folder(bench.work / "small", size.small)
    tokenizer = ChatTokenizer.from_folder(folder)
    examples = load_split("sample", "train").examples[: size.rows]
    taught = recommender_lessons(examples, [], load_catalogue("sample"), size.lessons)
    trees = [lesson_tree(tokenizer, lesson) for lesson in taught]

    def rate(device: torch.device, steps: int) -> float:
        dtype = pick_dtype("auto", device)
        model = (load_model if stored else random_model)(folder, dtype, device)
        accelerate(model)
        add_adapter(model, "a", LoraConfig(r=32, lora_alpha=32), seed=0)  # as train.py does
        found = learn(model, trees, Sft(), options_for(steps, 1))
        pairs = zip(found["tokens"][1:], found["seconds"][1:], strict=True)
        return statistics.median(tokens / seconds for tokens, seconds in pairs)

    fast, threads = rate(bench.device, 10 * size.steps), torch.get_num_threads()
    torch.set_num_threads(2)
    slow = beside(lambda: rate(torch.device("cpu"), size.steps))
    torch.set_num_threads(threads)
    yield against("training", "tokens/s", fast, slow)


# --- results ----------------------------------------------------------------------------------


@torch.inference_mode()
def logits_of(model: Decoder, ids: list[int]) -> torch.Tensor:
    """Return the logits (T, V) of a prompt in fp32, on the CPU."""
    cache = PrefixCache(model.config, model.dtype, model.device, 1 << 22)
    _, (states,), _ = prefill(model, cache, [(None, ids)], [0])
    return model.logits(states).float().cpu()


def agreement(bench: Bench) -> Rows:
    """Yield how far a tiny model's logits and greedy replies are the CPU's; then equal draws."""
    folder, cpu = write_folder(bench.work / "tiny", TINY), torch.device("cpu")
    near = random_model(folder, torch.bfloat16, cpu, std=0.3).float()  # bf16 holds its weights

    def moved(device: torch.device, dtype: torch.dtype) -> Decoder:
        model = copy.deepcopy(near).to(device, dtype)
        accelerate(model)
        return model

    ids = random_ids(torch.Generator().manual_seed(0), 200)
    expected = logits_of(near, ids)
    errors = [logits_of(moved(x, torch.bfloat16), ids) - expected for x in (bench.device, cpu)]
    far, beside_it = (float(error.abs().max() / expected.abs().max()) for error in errors)
    yield against("logits_error", "of the largest logit", far, beside_it)
    tokenizer: Any = Endless(ChatTokenizer.from_folder(folder))
    engines = [Engine(moved(x, torch.float32), tokenizer, 1 << 24) for x in (bench.device, cpu)]
    greedy = Sampling(16, temperature=0)
    asked = [replace(request_of(engines[0], 40 + i, i), sampling=greedy) for i in range(8)]
    yield figure("same_greedy", "of 8 replies", same(*(x.generate(asked) for x in engines)))
    engine, how = bench.engine(), Sampling(bench.size.reply)
    prompts = [request_of(engine, 40 + i, i) for i in range(8)]
    asked = [replace(x, sampling=how, seed=i, adapter=(None, *ADAPTERS)[i % 3])
             for i, x in enumerate(prompts)]  # fmt: skip
    first = engine.generate(asked)
    engine.clear_cache()
    yield figure("same_replies", "of 8 replies", same(first, engine.generate(asked)))


def greedy(bench: Bench) -> Rows:
    """Yield how many greedy replies in fp32 are transformers' on the same device.

    The default model's, or a tiny random one's where its file is not at hand.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    folder = MODELS / DEFAULT["folder"]
    if bench.size is not WHOLE or not is_whole(folder):
        folder = write_folder(bench.work / "greedy", TINY)
        AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder)).save_pretrained(folder)
    model = load_model(folder, torch.float32, bench.device)
    accelerate(model)
    engine = Engine(model, ChatTokenizer.from_folder(folder), 1 << 28)
    peer: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    peer.to(bench.device)
    length, sampling = bench.size.reply, Sampling(bench.size.reply, temperature=0)
    asked = [replace(request_of(engine, 40 + i, i), sampling=sampling) for i in range(8)]
    said = []
    for request in asked:
        ids = torch.tensor([engine.tokenizer.prompt(request.messages)], device=bench.device)
        how = {"attention_mask": torch.ones_like(ids), "do_sample": False, "pad_token_id": 0}
        out = peer.generate(ids, max_new_tokens=length, **how)[0, ids.shape[1] :].tolist()
        said.append([token for token in out if token not in engine.tokenizer.stop_ids])
    own = [list(reply.token_ids) for reply in engine.generate(asked)]
    yield figure("greedy", "of 8 replies", same(own, said))


def same(some: list[Any], others: list[Any]) -> float:
    """Return the share of equal replies."""
    return sum(a == b for a, b in zip(some, others, strict=True)) / len(some)


MEASURES: dict[str, Callable[[Bench], Rows]] = {
    "agreement": agreement,
    "greedy": greedy,
    "decode": decode,
    "decode_adapter": partial(decode, adapter=ADAPTERS[0]),
    "siblings": siblings,
    "ses": ses,
    "trees": partial(ses, together=True),
    "simpo16": partial(simpo, name="simpo16", batch=16),
    "simpo4": partial(simpo, name="simpo4", batch=4),
    "simpo1500": partial(simpo, name="simpo1500", batch=8, long=True),
    "simpo1500_checkpointing": partial(
        simpo, name="simpo1500_checkpointing", batch=8, long=True, recompute=True
    ),
    "training": training,
}


def line(row: Row) -> str:
    """Return a row as a line of the table."""
    peer = f"{row.peer:.4g}" if isinstance(row.peer, float) else row.peer or ""
    ratio = "" if row.ratio is None else f"{row.ratio:.3f}"
    cells = [row.name, row.unit, f"{row.ours:.4g}", peer, ratio, str(REACH.get(row.name, ""))]
    return f"| {' | '.join(cells)} |"


def main(arguments: list[str] | None = None) -> int:
    """Print the rows and the claim; return 1 if a measurement failed."""
    start = time.perf_counter()
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tiny", action="store_true", help="tiny models, on the CPU")
    parser.add_argument(
        "--only", nargs="+", choices=MEASURES, metavar="NAME", help=str([*MEASURES])
    )
    parser.add_argument("--minutes", type=float, default=8.0, help="start nothing after (8)")
    parser.add_argument("--json", type=Path, default=Path(os.devnull), help="also as JSON lines")
    flags = parser.parse_args(arguments)
    if not (flags.tiny or torch.cuda.is_available()):
        parser.error("there is no GPU here: --tiny rehearses on the CPU")
    device = torch.device("cpu" if flags.tiny else "cuda")
    ratios: dict[str, float] = {}
    failed, left_out = [], []
    with tempfile.TemporaryDirectory() as work, flags.json.open("w", encoding="utf-8") as file:

        def tell(facts: dict[str, Any], text: str) -> None:
            file.write(json.dumps(facts) + "\n")
            file.flush()
            print(text, flush=True)

        bench = Bench(REHEARSAL if flags.tiny else WHOLE, device, Path(work))
        facts = bench.facts()
        tell(facts, ", ".join(f"{name} {value}" for name, value in facts.items()) + "\n")
        show([], ["name", "unit", "ours", "beside it", "ratio", "aim"])
        for name in flags.only or MEASURES:
            if time.perf_counter() - start > 60 * flags.minutes:
                left_out.append(name)
                continue
            free()
            try:
                for row in MEASURES[name](bench):
                    tell(row._asdict(), line(row))
                    if row.ratio is not None:
                        ratios[row.name] = row.ratio
            except Exception as error:
                failed.append(name)
                tell({"name": name, "failed": reason(error)}, f"| {name} | {reason(error)} |")
        seconds = round(time.perf_counter() - start, 1)
        counts = {"seconds": seconds, "failed": failed, "left_out": left_out}
        names = [", ".join(words) or "none" for words in (failed, left_out)]
        tell(counts, f"{seconds} s, failed: {names[0]}, left out: {names[1]}")
    finish("gpu", ratios, REACH)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
