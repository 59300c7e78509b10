"""The shared state of train.py's stages: settings, run folder, data, engines and adapters."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from usbrec import parallel
from usbrec.crs.agents import Roles, Side
from usbrec.crs.catalogue import Catalogue
from usbrec.crs.datasets import load_catalogue, load_split, read_pairs
from usbrec.crs.dialogue import Example
from usbrec.llm.adapter_files import load_adapter, save_adapter
from usbrec.llm.engine import Engine
from usbrec.llm.lora import adapter_parameters
from usbrec.llm.loss import Objective
from usbrec.llm.packing import Tree
from usbrec.llm.training import TrainingJob, put_weights, train
from usbrec.loading import Find, Models, pick_rows
from usbrec.options import seed_for
from usbrec.runs import ADAPTERS, MADE, NEEDED, Results, need
from usbrec.settings import Settings


@dataclass
class Work:
    """The shared state of the stages: settings, run folder, data and engines."""

    settings: Settings
    folder: Path
    catalogue: Catalogue
    train: list[Example]
    valid: list[Example]  # none without --max-valid
    test: list[Example]
    notes: list[str]
    models: Models

    @property
    def engine(self) -> Engine:
        """The engine of the run's own weights, loaded at its first use."""
        return self.models.engine("none")

    def prepare(self, stages: Sequence[str]) -> None:
        """Load the models and the results of earlier stages that these stages need.

        Raises UserError for what is missing or does not fit, before a stage begins.
        """
        needed = {x for stage in stages for x in NEEDED.get(stage, ())}.difference(stages)
        if "pairs" in needed:
            list(read_pairs(need(self.folder / "pairs.jsonl", "pairs")))
        if ADAPTERS.keys() & set(stages):
            self.models.engine("none")
        for stage in ADAPTERS:
            if stage in needed:
                self.simulator if stage == "simulator" else self.side(ADAPTERS[stage])

    def rows(self, stage: str) -> list[Example]:
        """Return the training rows of a stage, the same ones in every run of these options.

        The simulator learns to play the user, and to sum up what a user says in several turns, from
        rows with reactions, where the dataset has them.
        """
        data, whole = self.settings.data, stage in ("simulator", "summaries")
        reacting = [x for x in self.train if x.accept is not None] if whole else []
        return pick_rows(reacting or self.train, data.rows(stage), seed_for(data.seed, stage))

    def side(self, adapter: str | None) -> Side:
        """Return the recommender's side with an adapter of the run, None for the base.

        A server that --recommender names has the adapters under their own names.
        """
        if self.settings.data.recommender is not None:
            served = self.models.side(self.settings.data.recommender, "recommender")
            return Side(served.llm, adapter or served.adapter)
        return self.own_side(adapter)

    def own_side(self, adapter: str | None) -> Side:
        """Return a side over the run's own weights, with an adapter of the run or None."""
        if adapter is not None and not adapter_parameters(self.engine.model, adapter):
            self.load(adapter, adapter)
        return Side(self.engine, adapter)

    def load(self, adapter: str, name: str) -> None:
        """Load an adapter of the run into the model as `name`."""
        stage = next(x for x in ADAPTERS if ADAPTERS[x] == adapter)
        need(self.folder / MADE[stage][0], stage)
        load_adapter(self.engine.model, self.folder / adapter, name)
        self.engine.clear_cache()

    @cached_property
    def simulator(self) -> Side:
        """The simulator's side: the run's own adapter, or the one that --simulator names."""
        name = self.settings.data.simulator
        return self.own_side("simulator") if name is None else self.models.side(name, "simulator")

    def roles(self, adapter: str | None, judge: str | None = None) -> Roles:
        """Return the roles, with an adapter of the run, or None, as the recommender's.

        `judge` names the external judge if that is not the simulator.
        """
        external = None if judge is None else self.models.side(judge, "judge")
        return Roles(self.side(adapter), self.simulator, self.catalogue, external)

    def results(self, name: str, label: str) -> Results:
        """Return a results file of the run; its facts are in its stage's note."""
        size, engines = self.settings.data.chunk_size, list(self.models.engines.values())
        return Results(self.folder / name, size, label, {}, engines, not self.models.sharded)

    def learn(
        self, stage: str, trees: Sequence[Tree], validation: Sequence[Tree], objective: Objective
    ) -> None:
        """Train the adapter of a stage, which the model has, and save it.

        With validation the best weights are saved, and the last ones in the subfolder `last`.
        """
        model, adapter = self.engine.model, ADAPTERS[stage]
        folder, seed = self.folder / adapter, seed_for(self.settings.data.seed, stage, "order")
        options = replace(getattr(self.settings, stage), seed=seed)
        job = TrainingJob(options, folder / "training", stage, validation)
        trained = train(model, adapter, trees, objective, job)
        kept = {folder: trained.best}
        if validation:
            kept = {folder / "last": trained.last, **kept}
            print(f"{stage}: its validation loss was lowest after step {trained.best_step}")
        base_name = self.settings.model.model or "HuggingFaceTB/SmolLM2-135M-Instruct"
        for place, weights in kept.items():
            put_weights(model, adapter, weights)
            if parallel.rank() == 0:
                save_adapter(model, adapter, place, base_name)
        self.engine.clear_cache()


def load_work(settings: Settings, folder: Path, find: Find, sharded: bool = False) -> Work:
    """Return the shared state with the data loaded, and print the datasets' notes."""
    o = settings.data
    names = ("train", "valid", "test") if o.max_valid else ("train", "test")
    splits = {name: load_split(o.data, name, o.data_dir) for name in names}
    notes = [note for split in splits.values() for note in split.notes]
    for note in notes:
        print(f"note: {note}")
    rows = {name: split.examples for name, split in splits.items()}
    valid = pick_rows(rows.get("valid", []), o.max_valid, seed_for(o.seed, "valid"))
    catalogue = load_catalogue(o.data, o.data_dir)
    models = Models(settings.model, find, folder / "answers.jsonl", sharded)
    return Work(settings, folder, catalogue, rows["train"], valid, rows["test"], notes, models)
