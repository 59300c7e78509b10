"""The options of train.py: flags, defaults, and those that decide each stage's result."""

import json
import os
from argparse import Namespace
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_type_hints

from usbrec.crs import evaluation, lessons, podcs
from usbrec.crs.datasets import DATASETS
from usbrec.crs.ses import SearchOptions
from usbrec.llm.endpoint import is_server
from usbrec.llm.lora import LoraConfig
from usbrec.llm.loss import SimpoOptions
from usbrec.llm.training import TrainingOptions
from usbrec.loading import ModelOptions
from usbrec.options import Options, Parser, UserError, add_flags, from_flags, option, place

TABLES = json.loads(Path(__file__).with_name("scripts.json").read_text("utf-8"))
# group -> flag -> argparse's keywords: train.py's job, and what infer.py answers with whom
FLAGS: dict[str, dict[str, Any]] = TABLES["flags"]
# script -> the flags in its --help; --help-all lists every flag
SHOWN: dict[str, str] = {script: " ".join(words) for script, words in TABLES["shown"].items()}
# name -> `options` (option groups and row limits that decide the result), further options of the
# group `data` that do, `sides` (flags of other models that decide it too), the earlier stages that
# it `needs`, the files that it `makes`, first the one that it ends with, and its `adapter`, if it
# trains one
STAGES: dict[str, dict[str, Any]] = TABLES["stages"]
ADAPTERS: dict[str, str] = {x: STAGES[x]["adapter"] for x in STAGES if "adapter" in STAGES[x]}
# what a search with cards, and one from memory, has in place of the search's defaults
PRESETS: dict[str, dict[str, Any]] = TABLES["searches"]
# what --full has in place of the defaults; both and PRESETS were found on the sample set's
# validation dialogues; the simulator's lessons are not shuffled: their order is a curriculum
DEFAULTS, FULL = {**TABLES["defaults"], **PRESETS}, TABLES["full"]
# method -> the stage whose adapter recommends (None: none), and the options of its search; in the
# order of the paper's table, which lacks the last two
COMPARED: dict[str, list[str | None]] = TABLES["methods"]
FULL["data"]["methods"] = tuple(COMPARED)
METHODS = ("B/L", "SFT", "RL", "RL+SES", "RL+SES+cards")
# of flags; a group's own name elsewhere
PREFIXES = {"data": "", "model": "", **dict.fromkeys(PRESETS, "ses")}


@dataclass(frozen=True)
class DataOptions(Options):
    """The dataset, the rows that each stage takes (0: all, -1: none), and the simulated user."""

    data: str = option("sample", "sample, redial, opendialkg, a folder of rows, a file of chats")
    data_dir: str | None = place("the folder of a downloaded dataset")
    seed: int = option(0, "decides every draw of the run", low=0)
    recommender: str | None = option(None, "server that recommends in pairs, report: URL#MODEL")
    simulator: str | None = place("plays the user, untrained: adapter, model, URL#MODEL")
    judge: str | None = place("the same, as the report's external judge")
    max_train: int = option(0, "at most so many training rows in every stage", low=0)
    max_simulator: int = option(60, "training rows that teach to play the user and judge", low=-1)
    max_summaries: int = option(800, "training rows that teach to summarise", low=-1)
    max_cards: int = option(1200, "training rows whose profiles are judged with cards", low=-1)
    max_sft: int = option(420, "training rows that sft learns whole", low=-1)
    max_profiles: int = option(2400, "training rows whose profile and title sft learns", low=-1)
    max_pairs: int = option(48, "training rows that PODCS tries", low=0)
    rounds: int = option(1, "times that PODCS tries so many, and SimPO learns from them", low=1)
    max_valid: int = option(0, "validation rows, to keep an adapter's best state; 0: none", low=0)
    max_eval: int = option(64, "test dialogues of every method", low=0)
    methods: tuple[str, ...] = option(METHODS, "the methods that the report compares")
    max_agreement: int = option(64, "test dialogues on which the judges are checked", low=0)
    chunk_size: int = option(32, "dialogues asked together; results come a chunk at a time", low=1)
    full: bool = option(False, "the larger preset: hours on two cores")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.data not in DATASETS:  # one's own folder or file, the same from any folder
            object.__setattr__(self, "data", os.path.abspath(self.data))
        if self.recommender is not None and not is_server(self.recommender):
            raise ValueError(f"recommender must be a server's URL#MODEL, got {self.recommender!r}")
        if self.recommender is not None and self.rounds > 1:  # it does not learn between them
            raise ValueError("rounds above 1 need the run's own weights, not those of recommender")
        if unknown := ", ".join(sorted(set(self.methods) - COMPARED.keys())):
            raise ValueError(f"methods must be of {', '.join(COMPARED)}, got {unknown}")

    def rows(self, stage: str) -> int:
        """Return the number of rows that a stage takes, 0 for all, -1 for none."""
        most = 0 if stage in ("eval", "agreement") else self.max_train
        return min(filter(None, [getattr(self, f"max_{stage}"), most]), default=0)


@dataclass(frozen=True)
class Settings:
    """All options of a run, by the prefix of their flags."""

    data: DataOptions
    model: ModelOptions
    lora: LoraConfig
    lesson: lessons.LessonOptions
    simulator: TrainingOptions
    sft: TrainingOptions
    pairs: podcs.PairOptions
    simpo: TrainingOptions
    simpo_loss: SimpoOptions
    eval: evaluation.EvaluationOptions
    ses: SearchOptions
    ses_memory: SearchOptions  # the same flags over another search's defaults
    ses_cards: SearchOptions


def add_settings(parser: Parser) -> None:
    """Add the flags of all options to the parser.

    The training options have one set of flags for all stages that train (`--epochs`). Each of these
    stages also has a set of its own, which no help lists: `--sft-epochs` overrides `--epochs`.
    """
    for name, options in get_type_hints(Settings).items():
        learns, prefix = name in ADAPTERS, PREFIXES.get(name, name)
        own, fixed = DEFAULTS.get(name, {}), ["seed"] * learns
        if name not in PRESETS:  # they are set by the flags of ses
            add_flags(parser, options, prefix, own, fixed, hidden=learns)
    told = {}
    for name, default in asdict(TrainingOptions()).items():
        if any(name in DEFAULTS[x] for x in ADAPTERS):
            told[name] = ", ".join(f"{x} {DEFAULTS[x].get(name, default)}" for x in ADAPTERS)
    add_flags(parser, TrainingOptions, defaults=told, skip=["seed"])


def read_settings(flags: Namespace) -> Settings:
    """Return the settings: a stage's flag, else the shared flag, else the default of the stage.

    --full changes some of the defaults. Raises UserError for a search that never begins.
    """
    groups: dict[str, Any] = {}
    preset = FULL if getattr(flags, "full", False) else {}
    for name, options in get_type_hints(Settings).items():
        prefixes = ("", name) if name in ADAPTERS else (PREFIXES.get(name, name),)
        defaults = {**DEFAULTS.get(name, {}), **preset.get(name, {})}
        groups[name] = from_flags(options, flags, *prefixes, defaults=defaults)
    if groups["ses"].start_turn > groups["eval"].turns:
        raise UserError("--ses-start-turn is above --eval-turns: no turn would be searched")
    return Settings(**groups)
