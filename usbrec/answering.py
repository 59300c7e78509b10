"""The recommender's answers as JSON rows: plain or searched replies, and catalogue rankings."""

import time
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

from usbrec.chat import Row, Sampling
from usbrec.crs.agents import Roles
from usbrec.crs.dialogue import Dialogue, Example, Examples, format_dialogue
from usbrec.crs.evaluation import titles_in
from usbrec.crs.ses import SearchOptions, search
from usbrec.llm.engine import Usage
from usbrec.llm.ranking import TOKENS
from usbrec.loading import costs, usage_of
from usbrec.options import Options, option, seed_for, tell


@dataclass(frozen=True)
class ReplyOptions(Options):
    """Options of replies: search, seed, chunks and ranking."""

    ses: bool = option(False, "search for the reply (SES) and show the search")
    seed: int = option(0, "decides every draw, and which rows of a dataset are taken", low=0)
    chunk_size: int = option(32, "dialogues asked together; results come a chunk at a time", low=1)
    rank: int = option(0, "also rank the catalogue and give so many titles, best first", low=0)
    rank_tokens: int = option(TOKENS, "most tokens of a ranking; 0: until it is exact", low=0)


@dataclass
class Recommender:
    """The roles, engines and options that answer dialogues."""

    roles: Roles
    engines: list[Any]  # the recommender's engine or endpoint, then those of other models
    options: ReplyOptions
    sampling: Sampling  # of plain replies
    searching: SearchOptions
    verbose: bool
    told: Usage = field(default_factory=Usage)  # the usage at the last `spent`

    def spent(self) -> dict[str, int]:
        """Return the token counts since the last call, as `Usage.since`; --verbose prints them."""
        now = usage_of(self.engines)
        spent, self.told = now.since(self.told), now
        if self.verbose:
            tell(costs(spent))
        return spent

    def answer_one(self, dialogue: Dialogue, profile: str = "") -> Row:
        """Return the row of a dialogue outside a dataset, which ends with the seeker."""
        return self.answer([Example("", 0, dialogue, "", ())], profile)[0]

    def answer(self, asked: Examples, profile: str = "") -> list[Row]:
        """Return one row per example: `reply`, `items` (its titles), `seconds` and `tokens`.

        The row of a dataset's example also has `dialog_id`, `turn_id` and `gold` (its titles). An
        example without items is a dialogue outside a dataset. --ses adds `search`, None before the
        search's `start_turn`; --rank adds `ranked`, titles with the log-probability of their
        announcement, and `proven`, the number of leading titles that are certainly the best.
        `seconds` and `tokens` are equal shares of the call's time and of its `spent`. A `profile`
        takes the place of the search's summaries.
        """
        start, o, roles = time.perf_counter(), self.options, self.roles
        dialogues = [x.history for x in asked]
        seeds = [seed_for(o.seed, "reply", format_dialogue(dialogue)) for dialogue in dialogues]
        turns = [sum(x.speaker == "recommender" for x in dialogue) + 1 for dialogue in dialogues]
        searched = [o.ses and turn >= self.searching.start_turn for turn in turns]

        def calls(kind: bool) -> tuple[list[Dialogue], list[int]]:
            places = [i for i, is_searched in enumerate(searched) if is_searched == kind]
            return [dialogues[i] for i in places], [seeds[i] for i in places]

        results = iter(search(roles, *calls(True), self.searching, profile))
        awaited, drawn = calls(False)
        said = iter(roles.recommend(awaited, self.sampling, drawn))
        ranked = roles.rank(dialogues, o.rank, o.rank_tokens) if o.rank else []
        items = roles.catalogue.items
        seconds = round((time.perf_counter() - start) / max(len(asked), 1), 3)
        tokens = {name: round(n / max(len(asked), 1)) for name, n in self.spent().items()}
        rows = []
        for i, x in enumerate(asked):
            named = {"dialog_id": x.dialog_id, "turn_id": x.turn_id, "gold": x.items}
            row: Row = named if x.items else {}
            found = next(results) if searched[i] else None
            row["reply"] = reply = found.reply if found else next(said)
            row["items"] = titles_in(roles.catalogue, reply)
            if o.rank:
                best, row["proven"] = ranked[i].texts, ranked[i].proven
                row["ranked"] = [{"title": items[j].title, "logprob": x} for j, x in best]
            row["seconds"], row["tokens"] = seconds, tokens
            if o.ses:
                row["search"] = found.record() if found else None
            rows.append(row)
        return rows

    def unread(self, given: Collection[str], judging: bool) -> list[str]:
        """Return a sentence per option of `given` that has no effect beside the others."""
        o, searching, shapes = self.options, self.searching, set(Sampling.__dataclass_fields__)
        search = {x for x in given if x.startswith("ses_")}
        every = {"ses", "rank", "rank_tokens"} | shapes | search
        deeper = {"ses_mode", "ses_rollout_temperature", "ses_scored"}
        cases = (  # options, what they need, and whether that is missing
            (every, "a reply, which --validate-simulator does not ask for", judging),
            ({"judge"}, "--validate-simulator", not judging),
            (search | {"simulator"}, "--ses, or /ses on in a chat", not (o.ses or judging)),
            (shapes, "--ses-start-turn above 1", o.ses and searching.start_turn == 1),
            ({"top_k", "top_p", "min_p"}, "--temperature above 0", self.sampling.temperature == 0),
            ({"rank_tokens"}, "--rank, or /top in a chat", o.rank == 0),
            ({"ses_prior"}, "--ses-candidates ranked", searching.candidates != "ranked"),
            ({"ses_draws"}, "--ses-candidates distinct", searching.candidates != "distinct"),
            ({"ses_veto"}, "--ses-cards", not searching.cards),
            ({"ses_memory"}, "--no-ses-cards", searching.cards),
            (deeper, "--ses-turns above 1", searching.turns == 1),
        )
        needs = {x: y for names, y, idle in reversed(cases) if idle for x in names & set(given)}
        return [f"--{x.replace('_', '-')} has no effect without {needs[x]}" for x in sorted(needs)]
