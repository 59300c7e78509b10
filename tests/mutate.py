"""Hand-picked faults, each put into a copy of the code; its tests must notice every one.

    python tests/mutate.py            # some 4 minutes; prints a line per fault
    python tests/mutate.py podcs      # only faults in files whose path holds the word

test_mutate.py says that each fault's place is still there, once.
"""

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]


class Mutation(NamedTuple):
    """A fault: the text of one place in a file, the text put there, and the tests to notice it."""

    what: str
    file: str
    code: str
    fault: str
    tests: str


MUTATIONS = (
    Mutation("the loss prefers the rejected response", "usbrec/llm/loss.py",
             "F.logsigmoid(chosen_rewards - rejected_rewards",
             "F.logsigmoid(rejected_rewards - chosen_rewards", "test_loss"),
    Mutation("the margin has the other sign", "usbrec/llm/loss.py",
             "rejected_rewards - gamma", "rejected_rewards + gamma", "test_loss"),
    Mutation("the chosen response's sum is not averaged", "usbrec/llm/loss.py",
             "chosen_means = chosen.logps / chosen.lengths", "chosen_means = chosen.logps",
             "test_loss"),
    Mutation("packed tokens see what follows them", "usbrec/llm/packing.py",
             "return on_path.tril()", "return on_path.triu()", "test_packing test_model"),
    Mutation("the norm sums in place of averaging", "usbrec/llm/model.py",
             "wide.square().mean(-1, keepdim=True)", "wide.square().sum(-1, keepdim=True)",
             "test_model"),
    Mutation("positions turn the other way", "usbrec/llm/model.py",
             "torch.stack([-angles, angles]", "torch.stack([angles, -angles]", "test_model"),
    Mutation("attention reads what is hidden", "usbrec/llm/model.py",
             "masked_fill(~visible[:, None, None]", "masked_fill(visible[:, None, None]",
             "test_model"),
    Mutation("an adapter is not scaled", "usbrec/llm/lora.py",
             "out[start:stop] += self.configs[name].scaling * F.linear(low, B)",
             "out[start:stop] += F.linear(low, B)", "test_fast test_adapter_files"),
    Mutation("adapters are laid out once and for all", "usbrec/llm/fast/__init__.py",
             "clear=adapters.cache_clear)", "clear=lambda: None)", "test_fast"),
    Mutation("adapters share one cache", "usbrec/llm/cache.py",
             "self.roots.setdefault(adapter,", "self.roots.setdefault(None,", "test_engine"),
    Mutation("a cached prompt keeps its last hidden state", "usbrec/llm/decoding.py",
             "min(num_cached, first_hidden[i])", "num_cached", "test_engine"),
    Mutation("short prompts read beyond their ends", "usbrec/llm/decoding.py",
             ">= lengths[:, None]", "> lengths[:, None]", "test_engine"),
    Mutation("a draw takes the token before its share", "usbrec/llm/sampler.py",
             "target, right=True)[:, 0]", "1 - target, right=True)[:, 0]", "test_engine"),
    Mutation("a pass weighs as much as a step", "usbrec/llm/training.py",
             "(loss * (weight / size)).backward()", "(loss * weight).backward()",
             "test_training test_packed_training"),
    Mutation("a resumed run begins a step late", "usbrec/llm/training.py",
             'self.step, length = told["step"],', 'self.step, length = told["step"] + 1,',
             "test_training"),
    Mutation("every epoch has the same order", "usbrec/llm/training.py",
             'seed_for("order", options.seed, epoch)', 'seed_for("order", options.seed, 0)',
             "test_training"),
    Mutation("the end of turn is not learned", "usbrec/llm/tokenizer.py",
             "[message.weight] * len(said)", "[message.weight] * (len(said) - 1) + [0.0]",
             "test_tokenizer"),
    Mutation("speakers take each other's role", "usbrec/crs/dialogue.py",
             '"assistant" if x.speaker == speaker else "user"',
             '"user" if x.speaker == speaker else "assistant"', "test_agents"),
    Mutation("equal samples: the last is the best", "usbrec/crs/podcs.py",
             "max(read, key=rank)", "max(read[::-1], key=rank)", "test_podcs"),
    Mutation("the paper's rule and the release's are exchanged", "usbrec/crs/podcs.py",
             '0 if options.worst == "zero" else 1', '1 if options.worst == "zero" else 0',
             "test_podcs"),
    Mutation("a leaf weighs 1, however often it was drawn", "usbrec/crs/ses.py",
             "path[-1].draws) for path in paths", "1) for path in paths", "test_ses"),
    Mutation("equal candidates: the last is chosen", "usbrec/crs/ses.py",
             "return ranks.index(max(ranks))",
             "return len(ranks) - 1 - ranks[::-1].index(max(ranks))", "test_ses"),
    Mutation("equal votes go to the higher digit", "usbrec/crs/agents.py",
             "max(range(3), key=read.count)", "max(reversed(range(3)), key=read.count)",
             "test_agents"),
    Mutation("an open year counts for any of its films", "usbrec/crs/evaluation.py",
             "guess and set(guess) <= set(", "guess and set(guess) & set(", "test_evaluation"),
    Mutation("the seeker says its target", "usbrec/crs/catalogue.py",
             "text = text[:start] + NEUTRAL + text[end:]", "text = text", "test_catalogue"),
)  # fmt: skip


def noticed(mutation: Mutation, copy: Path) -> bool:
    """Return whether the tests fail with the fault in the copy, which is whole again after it."""
    place = copy / mutation.file
    source = place.read_text("utf-8")
    assert source.count(mutation.code) == 1, f"{mutation.file}: {mutation.code!r} is not there once"
    place.write_text(source.replace(mutation.code, mutation.fault), "utf-8")
    tests = [f"tests/{name}.py" for name in mutation.tests.split()]
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *tests]
    try:
        return subprocess.run(command, cwd=copy, capture_output=True).returncode == 1
    finally:
        place.write_text(source, "utf-8")


def main(words: list[str]) -> int:
    """Try the faults; return how many were not noticed."""
    missed = 0
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "copy"
        shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".*", "runs", "models"))
        if (ROOT / "models").exists():
            (copy / "models").symlink_to((ROOT / "models").resolve())
        for mutation in MUTATIONS:
            if all(word in mutation.file for word in words):
                found = noticed(mutation, copy)
                missed += not found
                told = "noticed" if found else "MISSED"
                print(f"{told}  {mutation.file}: {mutation.what}", flush=True)
    return missed


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
