"""Estimate: what drafting tokens from the dialogue's own words (prompt lookup) could save.

    python benchmarks/speculation.py RUN [--dialogues 24] [--quick]

RUN is a run of train.py with a report; its searched dialogues are read back. A draft of k tokens
follows the latest earlier place in prompt and reply at which the last two tokens stand; as many of
it as equal the reply are accepted, and a step then gives one token more. That counts a drawn reply
as if it were given: exact at temperature 0, and so in expectation where rejection sampling accepts
a drafted token with its probability. The cost is a pass of rows x (k + 1) tokens over one of rows x
1, products and head alone. Rows wait for no other row, so a batch gains tokens/step over cost. On a
busy machine the costs mean nothing (a cost below 1 shows it): read tokens/step alone.
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from contest import show
from seeds import finished_rows

sys.path.insert(0, str(Path(__file__).parents[1]))
from usbrec.crs.agents import recommender_prompt  # noqa: E402
from usbrec.crs.dialogue import Utterance  # noqa: E402
from usbrec.extras.default_model import find_model  # noqa: E402
from usbrec.llm.engine import Engine  # noqa: E402
from usbrec.llm.tokenizer import ChatTokenizer  # noqa: E402
from usbrec.loading import ModelOptions, load_engine  # noqa: E402
from usbrec.parallel import run_together  # noqa: E402
from usbrec.runs import Row  # noqa: E402

DRAFTS, ROWS, NGRAM = (2, 4, 8), (1, 8, 32), 2
PAYS = 1.15


def steps_of(prompt: Sequence[int], reply: Sequence[int], k: int) -> int:
    """Return the decode steps of a reply with drafts of k tokens; each step gives at least one."""
    ids = [*prompt, *reply]
    at, steps = len(prompt), 0
    while at < len(ids):
        draft = draft_of(ids[:at], k)
        hits = 0
        while hits < len(draft) and ids[at + hits : at + hits + 1] == [draft[hits]]:
            hits += 1
        at, steps = at + hits + 1, steps + 1
    return steps


def draft_of(ids: Sequence[int], k: int) -> list[int]:
    """Return up to k tokens that followed the last NGRAM tokens where they stood before."""
    last = list(ids[-NGRAM:])
    for start in range(len(ids) - NGRAM - 1, -1, -1):
        if list(ids[start : start + NGRAM]) == last:
            return list(ids[start + NGRAM : start + NGRAM + k])
    return []


def searched_replies(
    talks: Sequence[Row], tokenizer: ChatTokenizer
) -> list[tuple[list[int], list[int]]]:
    """Return (prompt, reply) ids of the recommender's candidates in searched talks."""
    found = []
    for talk in talks:
        for search in talk["searches"][-1:]:
            since = 2 * (len(talk["replies"]) - search["turn"]) + 1  # lines from its reply on
            history = tuple(Utterance(*line) for line in talk["transcript"][:-since])
            prompt = tokenizer.prompt(recommender_prompt(history))
            for candidate in search["candidates"]:
                found.append((prompt, tokenizer.reply(candidate["reply"])))
    return found


@torch.no_grad()
def cost_of(engine: Engine, rows: int, k: int, rounds: int) -> float:
    """Return the time of a pass of k + 1 tokens a row over that of one, run by turns."""
    best = {1: float("inf"), k + 1: float("inf")}
    for _ in range(rounds):
        for width in best:
            x = torch.randint(20, 49000, (rows * width,))
            start = time.perf_counter()
            hidden = engine.model(x, torch.zeros_like(x), lambda layer, q, k, v: q)
            engine.model.logits(hidden)
            best[width] = min(best[width], time.perf_counter() - start)
    return best[k + 1] / best[1]


def main() -> None:
    """Print the table and one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, help="the run's folder")
    parser.add_argument("--dialogues", type=int, default=24, help="searched dialogues to read")
    parser.add_argument("--quick", action="store_true", help="five rounds of timing")
    options = parser.parse_args()
    rows = [row["RL+SES"] for row in finished_rows(options.run) if "RL+SES" in row]
    engine = load_engine(ModelOptions(), find_model)
    replies = searched_replies(rows[: options.dialogues], engine.tokenizer)
    tokens = sum(len(reply) for _, reply in replies)
    table, speedups = [], {}
    for k in DRAFTS:
        gain = tokens / sum(steps_of(prompt, reply, k) for prompt, reply in replies)
        costs = [cost_of(engine, rows, k, 5 if options.quick else 25) for rows in ROWS]
        for rows, cost in zip(ROWS, costs, strict=True):
            speedups[f"k{k}_rows{rows}"] = round(gain / cost, 3)
        cells = [f"{c:.2f} -> {gain / c:.2f}" for c in costs]
        table.append([k, f"{gain:.2f}", *cells])
    show(table, ["k", "tokens/step", *(f"{rows} rows: cost -> speedup" for rows in ROWS)])
    print(f"{len(replies)} replies, {tokens} tokens; it pays from {PAYS} at 8 rows or more")
    pays = any(v >= PAYS for name, v in speedups.items() if not name.endswith("rows1"))
    print(json.dumps({"benchmark": "speculation", "pays": pays, "speedups": speedups}))


if __name__ == "__main__":
    sys.exit(run_together("speculation.py", main))
