"""The options of train.py: flags, defaults, and the options that decide each stage's result."""

import json
import os
import shutil
from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_type_hints

from usbrec.crs import evaluation, lessons, podcs
from usbrec.crs.datasets import placed
from usbrec.crs.ses import CARDS, SearchOptions
from usbrec.llm.endpoint import is_server
from usbrec.llm.lora import LoraConfig
from usbrec.llm.loss import SimpoOptions
from usbrec.llm.training import TrainingOptions
from usbrec.loading import ModelOptions
from usbrec.options import Options, Parser, add_flags, from_flags, option
from usbrec.runs import ADAPTERS, MADE, claim

STAGES = {  # stage -> the option groups and row limits that decide its result
    "simulator": ("lesson", "simulator", "summaries", "cards"),
    "sft": ("lesson", "sft"),
    "pairs": ("pairs",),
    "simpo": ("simpo", "simpo_loss"),
    "report": ("eval", "agreement", "ses", "ses_cards"),
}
BOTH = ("recommender", "simulator")
SIDES = {"pairs": BOTH, "simpo": BOTH, "report": (*BOTH, "judge")}  # stage -> who decides it too
METHODS = tuple(name for name in evaluation.METHOD_NAMES if name not in ("SES", "SFT+SES"))
# what --full has in place of the defaults, which were found on the sample set's validation
# dialogues; the simulator's lessons are not shuffled, because their order is a curriculum
DEFAULTS, FULL = json.loads(Path(__file__).with_name("presets.json").read_text("utf-8")).values()
FULL["data"]["methods"] = evaluation.METHOD_NAMES


@dataclass(frozen=True)
class DataOptions(Options):
    """The dataset, the rows that each stage takes (0: all), and the simulated user."""

    data: str = option("sample", "sample, redial, opendialkg, or a folder of one's own rows")
    data_dir: str | None = option(None, "the folder of a downloaded dataset")
    seed: int = option(0, "decides every draw of the run", low=0)
    recommender: str | None = option(None, "server that recommends in pairs, report: URL#MODEL")
    simulator: str | None = option(None, "plays the user, untrained: adapter, model, URL#MODEL")
    judge: str | None = option(None, "the same, as the report's external judge")
    max_train: int = option(0, "at most so many training rows in every stage", low=0)
    max_simulator: int = option(60, "training rows that teach to play the user and judge", low=0)
    max_summaries: int = option(560, "training rows that teach to summarise", low=0)
    max_cards: int = option(1200, "training rows whose profiles are judged with cards", low=0)
    max_sft: int = option(2000, "training rows of the stage sft", low=0)
    max_pairs: int = option(64, "training rows that PODCS tries", low=0)
    max_valid: int = option(0, "validation rows, to keep an adapter's best state; 0: none", low=0)
    max_eval: int = option(128, "test dialogues of every method", low=0)
    methods: tuple[str, ...] = option(METHODS, "columns of the report")
    max_agreement: int = option(64, "test dialogues on which the judges are checked", low=0)
    chunk_size: int = option(32, "dialogues asked together; results come a chunk at a time", low=1)
    full: bool = option(False, "the larger preset: hours on two cores")

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "data", placed(self.data))  # the same from any folder
        if self.data_dir is not None:
            object.__setattr__(self, "data_dir", os.path.abspath(self.data_dir))
        if self.recommender is not None and not is_server(self.recommender):
            raise ValueError(f"recommender must be a server's URL#MODEL, got {self.recommender!r}")
        if unknown := set(self.methods) - set(evaluation.METHOD_NAMES):
            expected = ", ".join(evaluation.METHOD_NAMES)
            raise ValueError(f"methods must be of {expected}, got {', '.join(sorted(unknown))}")

    def rows(self, stage: str) -> int:
        """Return the number of rows that a stage takes, 0 for all."""
        learns = stage not in ("eval", "agreement")
        limits = [getattr(self, f"max_{stage}"), self.max_train if learns else 0]
        return min(filter(None, limits), default=0)


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
    ses_cards: SearchOptions  # the same flags over the defaults of a search with cards

    def facts(self, stage: str, digests: Mapping[str, Any]) -> dict[str, Any]:
        """Return all that decides a stage's result, the options of earlier stages included.

        `digests` are of the contents of the dataset (test decides the report alone); those of the
        models that the flags of `SIDES` name have the path beside the digest.
        """
        o, groups = self.data, asdict(self)
        facts: dict[str, Any] = {"data": o.data, "data-dir": o.data_dir, "seed": o.seed}
        facts |= {"max-valid": o.max_valid, "model": self.model.facts(), "lora": groups["lora"]}
        for name in ["sft"] if stage == "sft" else [*STAGES][: [*STAGES].index(stage) + 1]:
            if name == "simulator" and o.simulator is not None:
                continue
            facts |= {f"max-{x}": o.rows(x) for x in STAGES[name] if hasattr(o, f"max_{x}")}
            facts |= {"chunk-size": o.chunk_size} if name == "pairs" else {}
            facts |= {"methods": o.methods} if name == "report" else {}
            facts |= {x: groups[x] for x in STAGES[name] if x in groups}
        facts |= {f"other-{x}": digests[x] for x in SIDES.get(stage, ()) if x in digests}
        names = ("train", "valid", "items", "test")[: 4 if stage == "report" else 3]
        return {**facts, "data-contents": {name: digests[name] for name in names}}

    def claim(
        self, stages: Sequence[str], folder: Path, digests: Mapping[str, Any], fresh: bool
    ) -> list[str]:
        """Return the stages that are not yet done; note the facts of all in the run folder.

        Raises UserError for a stage that was made with other facts. With `fresh` the stages' files
        are deleted first.
        """
        for stage in stages:
            made = [folder / name for name in MADE[stage]]
            for path in made if fresh else ():
                shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
            note = folder / "options" / f"{stage}.json"
            remedy = f"add --fresh to start the stage {stage} over, or give another --run-dir"
            claim(note, self.facts(stage, digests), made, remedy)
        return [stage for stage in stages if not (folder / MADE[stage][0]).exists()]


def add_settings(parser: Parser) -> None:
    """Add the flags of all options to the parser.

    The training options have one set of flags for all stages that train (`--epochs`). Each of these
    stages also has a set of its own, which no help lists: `--sft-epochs` overrides `--epochs`.
    """
    for name, options in get_type_hints(Settings).items():
        if name == "ses_cards":
            continue
        learns, defaults = name in ADAPTERS, DEFAULTS.get(name, {})
        add_flags(parser, options, _prefix(name), defaults, ["seed"] * learns, hidden=learns)
    told = {}
    for name, default in asdict(TrainingOptions()).items():
        if any(name in DEFAULTS[x] for x in ADAPTERS):
            told[name] = ", ".join(f"{x} {DEFAULTS[x].get(name, default)}" for x in ADAPTERS)
    add_flags(parser, TrainingOptions, defaults=told, skip=["seed"])


def read_settings(flags: Namespace) -> Settings:
    """Return the settings: a stage's flag, else the shared flag, else the default of the stage.

    --full changes some of the defaults.
    """
    groups: dict[str, Any] = {}
    preset = FULL if getattr(flags, "full", False) else {}
    for name, options in get_type_hints(Settings).items():
        prefixes = ("", name) if name in ADAPTERS else (_prefix(name),)
        defaults = {**DEFAULTS.get(name, {}), **preset.get(name, {})}
        groups[name] = from_flags(options, flags, *prefixes, defaults=defaults)
    groups["ses_cards"] = from_flags(SearchOptions, flags, "ses", defaults=CARDS)
    return Settings(**groups)


def _prefix(name: str) -> str:
    return "" if name in ("data", "model") else name
