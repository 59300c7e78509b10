"""The stages of train.py: what each is told, what it leaves, and which options decide about it."""

from dataclasses import dataclass
from typing import Any

from usbrec.crs.evaluation import EvaluationOptions
from usbrec.crs.lessons import LessonOptions
from usbrec.crs.podcs import PairOptions
from usbrec.crs.ses import SearchOptions
from usbrec.llm.lora import LoraConfig
from usbrec.llm.loss import SimpoOptions
from usbrec.llm.training import TrainingOptions
from usbrec.options import check, option
from usbrec.run import ModelOptions, as_json

STAGES = ("simulator", "sft", "pairs", "simpo", "report")
LEARNING = ("simulator", "sft", "simpo")  # the stages that change an adapter
MADE = {  # what each stage leaves in the run folder
    "simulator": ("simulator", "tensorboard/simulator"),
    "sft": ("sft", "tensorboard/sft"),
    "pairs": ("samples.jsonl", "samples.options.json", "pairs.jsonl"),
    "simpo": ("rl", "tensorboard/simpo"),
    "report": ("rows.jsonl", "rows.options.json", "report.json", "report.txt"),
}
DONE = {  # the file that a finished stage has left
    "simulator": "simulator/adapter_model.safetensors",
    "sft": "sft/adapter_model.safetensors",
    "pairs": "pairs.jsonl",
    "simpo": "rl/adapter_model.safetensors",
    "report": "report.json",
}
DEFAULTS = {  # found on the sample set's validation dialogues
    "lora": {"r": 32, "lora_alpha": 32.0},
    "simulator": {
        "learning_rate": 1e-3,
        "batch_size": 1,
        "warmup": 0.03,
        "shuffle": False,  # the lessons' order is a curriculum
        "save_every": 50,
    },
    "sft": {"learning_rate": 1.5e-3, "batch_size": 1, "save_every": 50},
    "simpo": {"learning_rate": 1e-4, "batch_size": 4, "epochs": 2.0},
}
GROUPS: dict[str, type] = {
    "lora": LoraConfig,
    "lesson": LessonOptions,
    "simulator": TrainingOptions,
    "sft": TrainingOptions,
    "pairs": PairOptions,
    "simpo": TrainingOptions,
    "simpo_loss": SimpoOptions,
    "eval": EvaluationOptions,
    "ses": SearchOptions,
}


@dataclass(frozen=True)
class DataOptions:
    """Which dialogues, and how many of them each stage takes (0: all)."""

    data: str = option("sample", "sample, redial, opendialkg, or a folder of one's own rows")
    data_dir: str | None = option(None, "the folder of a downloaded dataset")
    seed: int = option(0, "decides every draw of the run")
    max_train: int = option(0, "at most so many training rows in every stage", low=0)
    max_simulator: int = option(100, "training rows of the stage simulator", low=0)
    max_sft: int = option(480, "training rows of the stage sft", low=0)
    max_pairs: int = option(72, "training rows that PODCS tries", low=0)
    max_valid: int = option(
        0,
        "validation rows by which an adapter's best state is kept, not its last; 0: none, for they "
        "take time",
        low=0,
    )
    max_eval: int = option(128, "test dialogues of every method", low=0)
    max_agreement: int = option(100, "test dialogues on which the judges are checked", low=0)
    chunk_size: int = option(32, "dialogues asked together; results come a chunk at a time", low=1)
    full: bool = option(False, "take all rows, pairs and dialogues")

    def __post_init__(self) -> None:
        check(self)

    def rows(self, stage: str) -> int:
        """Return how many rows a stage takes, 0 for all."""
        if self.full:
            return 0
        limits = [getattr(self, f"max_{stage}")]
        if stage in STAGES:
            limits.append(self.max_train)
        return min((limit for limit in limits if limit), default=0)


@dataclass(frozen=True)
class Settings:
    """All options of a run."""

    data: DataOptions
    model: ModelOptions
    lora: LoraConfig
    lesson: LessonOptions
    simulator: TrainingOptions
    sft: TrainingOptions
    pairs: PairOptions
    simpo: TrainingOptions
    simpo_loss: SimpoOptions
    eval: EvaluationOptions
    ses: SearchOptions

    def deciding(self, stage: str) -> dict[str, Any]:
        """Return the options that decide what a stage makes, those of earlier stages included."""
        d = self.data
        common: dict[str, Any] = {"data": d.data, "data-dir": d.data_dir, "seed": d.seed}
        common |= {"max-valid": d.max_valid} | as_json(model=self.model, lora=self.lora)
        rows = {"max-" + name: d.rows(name) for name in ("simulator", "sft", "pairs")}
        own: dict[str, dict[str, Any]] = {
            "simulator": {"max-simulator": rows["max-simulator"]}
            | as_json(lesson=self.lesson, simulator=self.simulator),
            "sft": {"max-sft": rows["max-sft"]} | as_json(lesson=self.lesson, sft=self.sft),
            "pairs": {"max-pairs": rows["max-pairs"], "chunk-size": d.chunk_size}
            | as_json(pairs=self.pairs),
            "simpo": as_json(simpo=self.simpo, simpo_loss=self.simpo_loss),
            "report": {"max-eval": d.rows("eval"), "max-agreement": d.rows("agreement")}
            | as_json(eval=self.eval, ses=self.ses),
        }
        before = STAGES[: STAGES.index(stage)] if stage != "sft" else ()
        for name in (*before, stage):
            common |= own[name]
        return common
