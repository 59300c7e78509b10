"""Claim: every family's logits equal transformers' (fp32, 1e-4), and so do greedy replies.

    python benchmarks/families.py          # needs requirements-dev.txt

Each row is a tiny random checkpoint in the family's real layout, written by transformers (ChatGLM3:
by tests/test_chatglm3.py, under its own names) and read by our loader; the last row is the default
model itself.
"""

import json
import sys
import tempfile
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
from test_checkpoint import FAMILIES, logits_of, random_ids  # noqa: E402
from test_greedy import CHATGLM_ROPE_RATIOS, NumberTokenizer, family, greedy  # noqa: E402

from usbrec.chat import Message, Request, Sampling  # noqa: E402
from usbrec.extras.default_model import find_model  # noqa: E402
from usbrec.llm.checkpoint import load_model  # noqa: E402
from usbrec.llm.engine import Engine  # noqa: E402

PROMPTS, NEW_TOKENS, LENGTH = 20, 32, 200
TITLES = {
    "llama-2": "Llama 2 (no grouped heads, untied)",
    "llama-3": "Llama 3, TinyLlama (grouped heads, untied)",
    "llama-3.1": "Llama 3.1 (`llama3` RoPE scaling, untied)",
    "llama-3.2": "Llama 3.2 (`llama3` RoPE scaling, tied)",
    "llama-tied": "SmolLM2 (tied)",
    "llama-wide-head": "Llama with a `head_dim` of its own",
    "mistral": "Mistral without sliding window",
    "qwen2.5": "Qwen2, Qwen2.5 (q/k/v bias, untied)",
    "qwen2.5-tied": "Qwen2, Qwen2.5 (q/k/v bias, tied)",
    "chatglm3": "ChatGLM3 (against Glm)",
    "chatglm3-32k": "ChatGLM3, `rope_ratio` 50 (against Glm)",
    "chatglm3-128k": "ChatGLM3, `rope_ratio` 500 (against Glm)",
    "default": "SmolLM2-135M-Instruct itself",
}


def compare(folder: Path, oracle: torch.nn.Module) -> dict[str, float]:
    """Return parameters, the largest difference of logits, and how many replies are identical."""
    model = load_model(folder)
    vocab_size = model.config.vocab_size
    ids = random_ids(LENGTH, vocab_size)
    with torch.no_grad():
        expected = oracle(torch.tensor([ids])).logits[0]
    difference = (logits_of(model, ids) - expected).abs().max().item()
    prompts = [ids[start : start + 5 + 3 * start] for start in range(PROMPTS)]
    messages = [(Message("user", " ".join(map(str, prompt))),) for prompt in prompts]
    requests = [Request(each, Sampling(NEW_TOKENS, 0)) for each in messages]
    replies = Engine(model, NumberTokenizer()).generate(requests)
    same = 0
    for prompt, reply in zip(prompts, replies, strict=True):
        theirs = greedy(oracle, prompt, NEW_TOKENS, eos_token_id=2)
        same += list(reply.token_ids) == [i for i in theirs if i != 2]
    parameters = sum(p.numel() for p in model.parameters())
    return {"parameters": parameters, "difference": difference, "identical": same}


def main() -> None:
    """Print the table and one line of JSON."""
    from transformers import AutoModelForCausalLM

    rows = {}
    with tempfile.TemporaryDirectory() as work:
        for name in [*FAMILIES, *CHATGLM_ROPE_RATIOS]:
            folder = Path(work) / name
            folder.mkdir()
            oracle = family(name, folder)
            rows[name] = compare(folder, oracle)
    folder = find_model()
    oracle = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    rows["default"] = compare(folder, oracle)
    print(
        "| family | parameters loaded | largest difference of logits | identical greedy replies |"
    )
    print("|---|---|---|---|")
    for name, row in rows.items():
        print(
            f"| {TITLES[name]} | {row['parameters']:,} | {row['difference']:.1e} "
            f"| {row['identical']} of {PROMPTS} |"
        )
    holds = all(r["difference"] <= 1e-4 and r["identical"] == PROMPTS for r in rows.values())
    print(json.dumps({"claim": "logits within 1e-4, greedy identical", "holds": holds, **rows}))


if __name__ == "__main__":
    main()
