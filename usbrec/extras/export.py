"""Export of pairs.jsonl to other trainers.

trl takes the file as it is: a conversational preference dataset (`prompt`, `chosen`, `rejected`).
LLaMA-Factory takes the folder that this command writes as its `dataset_dir` (dataset `pairs`):

    python -m usbrec.extras.export --pairs runs/.../pairs.jsonl --llama-factory FOLDER

Its `sharegpt` format needs a separate system prompt and alternating turns, the human's first. So a
conversation that the recommender opened begins with an empty human turn, as in ReDial's own rows,
and successive messages of one speaker are joined by a newline.
"""

import json
import sys
from itertools import groupby
from pathlib import Path
from typing import Any

from usbrec.crs.datasets import read_pairs
from usbrec.options import Parser, UserError
from usbrec.parallel import run_together
from usbrec.runs import write_whole

SPEAKERS = {"user": "human", "assistant": "gpt"}
DATASET_INFO = Path(__file__).with_name("dataset_info.json")  # of pairs.json


def llama_factory_row(pair: dict[str, Any], place: str) -> dict[str, Any]:
    """Return a pair in LLaMA-Factory's `sharegpt` preference format."""
    messages = pair["prompt"]
    system = messages.pop(0)["content"] if messages[0]["role"] == "system" else ""
    turns: list[dict[str, str]] = []
    for role, same in groupby(messages, key=lambda message: message["role"]):
        if role == "system":
            raise UserError(f"{place}: LLaMA-Factory takes a system message in the beginning only")
        if not turns and role == "assistant":
            turns.append({"from": "human", "value": ""})
        text = "\n".join(message["content"] for message in same)
        turns.append({"from": SPEAKERS[role], "value": text})
    if not turns or turns[-1]["from"] != "human":
        raise UserError(f"{place}: the prompt must end with a user's message")
    sides = {x: {"from": "gpt", "value": pair[x][-1]["content"]} for x in ("chosen", "rejected")}
    return {"conversations": turns, "system": system, **sides}


def export_llama_factory(pairs: Path, folder: Path) -> int:
    """Write pairs.json and dataset_info.json to `folder`; return the number of pairs."""
    rows = [llama_factory_row(pair, place) for place, pair in read_pairs(pairs)]
    if not rows:
        raise UserError(f"{pairs} holds no pair")
    text = json.dumps(rows, ensure_ascii=False, indent=1) + "\n"
    write_whole(folder / "pairs.json", text.encode(errors="backslashreplace"))
    write_whole(folder / "dataset_info.json", DATASET_INFO.read_bytes())
    return len(rows)


def main(arguments: list[str] | None = None) -> int:
    """Convert as the flags say; a user's fault is printed as one sentence and ends with 2."""
    parser = Parser(prog="export", description="Convert pairs.jsonl for another trainer.")
    parser.add_argument("--pairs", type=Path, required=True, help="a run's pairs.jsonl")
    parser.add_argument("--llama-factory", type=Path, required=True, help="dataset_dir to write")

    def job() -> None:
        options = parser.parse_args(arguments)
        count = export_llama_factory(options.pairs, options.llama_factory)
        print(f"{count} pairs in {options.llama_factory}")

    return run_together("export", job)


if __name__ == "__main__":
    sys.exit(main())
