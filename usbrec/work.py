"""The shared state of train.py's stages: settings, run folder, data, models, and facts."""

import shutil
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from usbrec import parallel, runs
from usbrec.crs.agents import Roles, Side
from usbrec.crs.datasets import load_catalogue, load_split, read_pairs
from usbrec.crs.dialogue import Example
from usbrec.llm.adapter_files import save_adapter
from usbrec.llm.engine import Engine
from usbrec.llm.loss import Objective
from usbrec.llm.packing import Trees
from usbrec.llm.training import TrainingJob, digest, train
from usbrec.loading import Find, Models, pick_rows, weights_digest
from usbrec.options import seed_for
from usbrec.settings import ADAPTERS, STAGES, Settings


class Work:
    """The shared state of the stages: settings, run folder, data and models.

    `train`, `valid` (none without --max-valid), `test` and `catalogue` are the dataset, `notes` the
    notes of its readers, `contents` its digests. `others` holds the path and the digest of each
    model that --recommender, --simulator or --judge names.
    """

    def __init__(self, settings: Settings, folder: Path, find: Find, sharded: bool = False) -> None:
        """Load the data and print its notes; a model is loaded when a stage needs it."""
        self.settings, self.folder, o = settings, folder, settings.data
        names = ("train", "valid", "test") if o.max_valid else ("train", "test")
        splits = {name: load_split(o.data, name, o.data_dir) for name in names}
        self.notes = list(dict.fromkeys(note for x in splits.values() for note in x.notes))
        for note in self.notes:
            print(f"note: {note}")
        self.train, self.test = splits["train"].examples, splits["test"].examples
        valid = splits["valid"].examples if o.max_valid else []
        self.valid = pick_rows(valid, o.max_valid, seed_for(o.seed, "valid"))
        self.catalogue = load_catalogue(o.data, o.data_dir)
        self.models = Models(settings.model, find, folder / "answers.jsonl", sharded)
        read = {"train": self.train, "valid": self.valid, "items": self.catalogue}
        self.contents = {name: digest(x) for name, x in {**read, "test": self.test}.items()}
        named = {x: getattr(o, x) for x in STAGES["report"]["sides"] if getattr(o, x) is not None}
        self.weights = weights_digest(settings.model.place(), find)
        self.others = {x: {"path": y, "digest": weights_digest(y, find)} for x, y in named.items()}

    @property
    def engine(self) -> Engine:
        """The engine of the run's own weights, loaded at its first use."""
        return self.models.engine("none")

    def facts(self, stage: str) -> dict[str, Any]:
        """Return all that decides a stage's result, the options of earlier stages included.

        Of the dataset's contents, test decides the report alone.
        """
        settings, o, groups = self.settings, self.settings.data, asdict(self.settings)
        facts: dict[str, Any] = {"data": o.data, "data-dir": o.data_dir, "seed": o.seed}
        facts |= {"max-valid": o.max_valid, "model": settings.model.facts(), "lora": groups["lora"]}
        for name in [*STAGES][: [*STAGES].index(stage) + 1]:
            own = [] if name in self.others else STAGES[name]["options"]  # not of --simulator's
            facts |= {f"max-{x}": o.rows(x) for x in own if hasattr(o, f"max_{x}")}
            facts |= {x.replace("_", "-"): getattr(o, x) for x in STAGES[name].get("data", ())}
            facts |= {x: groups[x] for x in own if x in groups}
        facts |= {f"other-{x}": y for x, y in self.others.items() if x in STAGES[stage]["sides"]}
        read = {x: y for x, y in self.contents.items() if x != "test" or stage == "report"}
        return {**facts, "data-contents": read, "weights": self.weights}

    def claim(self, stages: Sequence[str], fresh: bool) -> list[str]:
        """Return the stages that are not yet done; note the facts of all in the run folder.

        Raises UserError for a stage that was made with other facts. With `fresh` the stages' files
        are deleted first.
        """
        for stage in stages:
            made = [self.folder / name for name in STAGES[stage]["makes"]]
            for path in made if fresh else ():
                shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
            self.compare(stage, self.facts(stage), made)
        return [x for x in stages if not (self.folder / STAGES[x]["makes"][0]).exists()]

    def compare(self, stage: str, facts: dict[str, Any], made: Sequence[Path]) -> None:
        """Note a stage's facts, or compare them with its note: see `runs.claim`."""
        later = " ".join([*STAGES][[*STAGES].index(stage) :])
        remedy = f"add --stages {later} --fresh to start over from there, or give another --run-dir"
        runs.claim(self.folder / "options" / f"{stage}.json", facts, made, remedy)

    def prepare(self, stages: Sequence[str]) -> None:
        """Load the models and the results of earlier stages that these stages need.

        Raises UserError for what is missing or does not fit, before a stage begins.
        """
        # later rounds of SimPO make their own pairs
        again = ["pairs"] if "simpo" in stages and self.settings.data.rounds > 1 else []
        needed = {x for y in (*stages, *again) for x in STAGES[y]["needs"]}.difference(stages)
        if "pairs" in needed:
            list(read_pairs(self.need("pairs")))
        if ADAPTERS.keys() & set(stages):
            self.models.engine("none")
        for stage in (x for x in ADAPTERS if x in needed):
            self.side(stage)

    def need(self, stage: str) -> Path:
        """Return the result of an earlier stage.

        Raises UserError if it is missing, or was made with other facts. Sides and chunk size may be
        others, and a result from elsewhere has no note.
        """
        path = runs.need(self.folder / STAGES[stage]["makes"][0], stage)
        note = self.folder / "options" / f"{stage}.json"
        if note.exists():
            told, now = runs.read_json(note), self.facts(stage)
            both = now.keys() & told.keys() - {"chunk-size", "other-recommender", "other-simulator"}
            self.compare(stage, told | {x: now[x] for x in both}, [path])
        return path

    def rows(self, stage: str, part: int = 0) -> list[Example]:
        """Return the training rows of a stage, the same ones in every run of these options.

        Of a limited stage they are the first ones in its own order; `part` 1 has the next, as many,
        and after the last row comes the first again. The simulator learns to play the user, and to
        sum up what a user says in several turns, from rows with reactions, where the dataset has
        them. PODCS takes rows that `sft` has not learned while there are any: of the others the
        recommender knows the gold title by heart.
        """
        data, order = self.settings.data, stage.replace("profiles", "sft")  # parts of one stage
        reacting = [x for x in self.train if x.accept and stage in ("simulator", "summaries")]
        learned = {id(x) for y in ("sft", "profiles") if stage == "pairs" for x in self.rows(y)}
        rows = pick_rows(reacting or self.train, 0, seed_for(data.seed, order))
        rows.sort(key=lambda x: id(x) in learned)
        most = min(data.rows(stage) or len(rows), len(rows))
        return [rows[i % len(rows)] for i in range(part * most, (part + 1) * most)]

    def side(self, stage: str | None) -> Side:
        """Return the side that speaks with the adapter of a stage, None: the recommender's base.

        --simulator takes the place of the stage `simulator`. A server that --recommender names has
        the recommender's adapters under their own names.
        """
        o = self.settings.data
        if stage == "simulator" and o.simulator is not None:
            return self.models.side(o.simulator, "simulator")
        if stage != "simulator" and o.recommender is not None:
            served = self.models.side(o.recommender, "recommender")
            return Side(served.llm, ADAPTERS[stage] if stage else served.adapter)
        return self.adapted(stage, ADAPTERS[stage]) if stage else Side(self.engine)

    def adapted(self, stage: str, name: str) -> Side:
        """Return the base's side with the adapter of a stage, which the model has as `name`."""
        return self.models.side(str(self.need(stage).parent), name)

    def roles(self, stage: str | None, judge: str | None = None) -> Roles:
        """Return the roles, the recommender with the adapter of a stage, or None.

        `judge` names the external judge if that is not the simulator.
        """
        external = None if judge is None else self.models.side(judge, "judge")
        return Roles(self.side(stage), self.side("simulator"), self.catalogue, external)

    def results(self, name: str, label: str) -> runs.Results:
        """Return a results file of the run; its facts are in its stage's note."""
        size, engines = self.settings.data.chunk_size, list(self.models.engines.values())
        return runs.Results(self.folder / name, size, label, {}, engines, not self.models.sharded)

    def learn(
        self, stage: str, objective: Objective, trees: Trees, validation: Trees = (), at: str = ""
    ) -> None:
        """Train the adapter of a stage, which the model has; save it `at` a place of its folder."""
        model, adapter, seed = self.engine.model, ADAPTERS[stage], self.settings.data.seed
        folder, seed = self.folder / adapter / at, seed_for(seed, stage, "order")
        options = replace(getattr(self.settings, stage), seed=seed)
        job = TrainingJob(options, objective, folder / "training", stage, validation)
        step = train(model, adapter, trees, job)
        if validation:
            print(f"{stage}: its validation loss was lowest after step {step}")
        if parallel.rank() == 0:
            base_name = self.settings.model.model or "HuggingFaceTB/SmolLM2-135M-Instruct"
            save_adapter(model, adapter, folder, base_name)
        self.engine.clear_cache()
