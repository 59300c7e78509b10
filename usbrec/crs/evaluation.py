"""iEval: a method talks with the seeker for some turns, explains its reply and is judged.

All methods get the same dialogues, options and draws: a row's seed does not depend on its method,
so that differences are paired. Three figures besides the judge's score come from rules alone:
Recall@1 (the first catalogue title of the first reply), hit (any gold title in any reply), and the
grade of the last reply's first title. Left out: trivial baselines (extras/baselines.py), tables
(extras/report.py) and intervals (extras/intervals.py).

There are three protocols:

    targets      the seeker and the judge know the target titles (USB-Rec, arXiv 2509.20381)
    until-hit    the same, but a talk ends with a reply that names a target (iEvaLM, arXiv
                 2305.13112, with five turns)
    profile      both know a profile in place of the titles; the reply is judged without an
                 explanation
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Literal

from usbrec.chat import Row, Sampling
from usbrec.crs.agents import JudgeScore, Roles, Told, Votes, internal_judge_prompt
from usbrec.crs.catalogue import Catalogue, Item
from usbrec.crs.dialogue import Dialogue, Example, Examples, add_turn
from usbrec.crs.lessons import profile_of
from usbrec.crs.ses import SearchOptions, search
from usbrec.crs.wishes import fit, read_profile
from usbrec.options import option, seed_for

# best first; a guess has several items if its title leaves the year open
Guesses = Sequence[tuple[Item, ...]]
# one per gold title: {"title", "repeated", "found"}; `found` is a probability for a random guess
Labels = list[Row]


@dataclass(frozen=True)
class EvaluationOptions(Votes):
    """The turns of a talk, the temperatures, and the measures beside the talks."""

    protocol: Literal["targets", "until-hit", "profile"] = option(
        "targets", "what the seeker and the judge know, and when a talk ends"
    )
    turns: int = option(1, "most recommender turns of a talk, judged after the last", low=1)
    temperature: float = option(0.0, "temperature of plain replies and explanations", low=0)
    seeker_temperature: float = option(0.1, "temperature of the seeker's replies", low=0)
    max_new_tokens: int = option(48, "longest reply, in tokens", low=1)
    ranked_dialogues: int = option(12, "dialogues whose best films are judged; 0: none", low=0)
    ranked_titles: int = option(20, "films that are judged in each of them", low=2)
    seen: int = option(128, "first dialogues of the seed's order; the rest: a table apart", low=0)


@dataclass
class Talk:
    """A talk in progress: its example and seed, its lines, and the recommender's part in them.

    `told` is what the seeker and the judge know.
    """

    example: Example
    key: int
    told: Told
    dialogue: Dialogue
    replies: list[str] = field(default_factory=list)
    searches: list[Row] = field(default_factory=list)

    def is_hit(self, catalogue: Catalogue) -> bool:
        """Return whether any reply names a gold title."""
        return any(catalogue.mentions(reply, self.example.items) for reply in self.replies)


def evaluate_method(
    roles: Roles,
    examples: Examples,
    seed: int,
    options: EvaluationOptions,
    searching: SearchOptions | None = None,
) -> list[Row]:
    """Return the `row_of` each example; `searching` turns SES on from its `start_turn`."""
    catalogue, talks = roles.catalogue, []
    for x in examples:
        told = profile_of(x, catalogue) if options.protocol == "profile" else x.items
        talks.append(Talk(x, seed_for(seed, "ieval", x.dialog_id, x.turn_id), told, x.history))
    plain = Sampling(options.max_new_tokens, options.temperature)
    seeking = Sampling(options.max_new_tokens, options.seeker_temperature)
    for turn in range(1, options.turns + 1):
        going = [x for x in talks if options.protocol != "until-hit" or not x.is_hit(catalogue)]
        dialogues = [x.dialogue for x in going]
        if turn > 1:
            seeds = [seed_for(x.key, "seeker", turn) for x in going]
            dialogues = roles.seek(dialogues, [x.told for x in going], seeking, seeds)
        seeds = [seed_for(x.key, "recommender", turn) for x in going]
        if searching is not None and turn >= searching.start_turn:
            results = search(roles, dialogues, seeds, searching)
            said = [result.reply for result in results]
            for talk, y in zip(going, results, strict=True):
                talk.searches.append({"turn": turn, **checked(catalogue, talk.example, y.record())})
        else:
            said = roles.recommend(dialogues, plain, seeds)
        for talk, dialogue, reply in zip(going, dialogues, said, strict=True):
            talk.dialogue = add_turn(dialogue, "recommender", reply)
            talk.replies.append(reply)
    keys = [x.key for x in talks]
    dialogues, known = [x.dialogue for x in talks], [x.told for x in talks]
    if options.protocol == "profile":  # unexplained
        prompts = list(map(internal_judge_prompt, dialogues, map(str, known)))
        judged = [("", score) for score in roles.judge(prompts, options, keys, roles.external)]
    else:
        judged = roles.explain_and_judge(dialogues, known, keys, plain, options)
    stop = options.protocol == "until-hit"
    return [row_of(talk, roles, stop, *each) for talk, each in zip(talks, judged, strict=True)]


def row_of(talk: Talk, roles: Roles, stop: bool, explanation: str, score: JudgeScore) -> Row:
    """Return the row of a talk that has been judged, in JSON's own types.

    It has the fields of its `JudgeScore`, its ids, and these. `replies` are the recommender's,
    `items` the catalogue titles of each, `labels` those of the first. `hit` tells whether any reply
    names a gold title. `grade` is the rules' 0, 1 or 2 for the last reply's first title (0 if it
    names none). `explanation` is of the last reply, and so is the score. `transcript` holds all
    lines, and `adapters` tells who spoke for each side. `end` tells why the talk ended: "hit", a
    target named where that is to `stop` it, or "turns", as many as it may have. `searches` are the
    records of the searched turns, each as `checked` returns it.
    """
    x, replies, catalogue = talk.example, talk.replies, roles.catalogue
    row = {**asdict(score), "dialog_id": x.dialog_id, "turn_id": x.turn_id, "replies": replies}
    row["items"] = [titles_in(catalogue, reply) for reply in replies]
    row["labels"] = gold_labels(catalogue, x, [catalogue.first(replies[0])])
    row["hit"], row["grade"] = talk.is_hit(catalogue), catalogue.grade_of(replies[-1], x.items)
    row["end"], row["adapters"] = "hit" if stop and row["hit"] else "turns", roles.adapters()
    lines = [[line.speaker, line.text] for line in talk.dialogue]
    return row | {"explanation": explanation, "transcript": lines, "searches": talk.searches}


def checked(catalogue: Catalogue, example: Example, record: Row) -> Row:
    """Return a search's record, checked against the targets and the gold profile.

    Each candidate gets the first title of its reply (`title`, None without one), whether that is a
    target (`found`), and its `fit` with the true wishes. The record gets `facts`: how many facts
    the summary tells (`told`), how many of these are `right`, and how many are `true`. Without a
    gold profile `fit` and `facts` are None. The wishes are those before the talk: what its seeker
    adds counts as wrong. A title that leaves the year open fits as the worst of its readings, no
    title as 0.
    """
    facts, true, candidates = None, None, []
    if example.profile is not None:
        told, true = (read_profile(x, catalogue) for x in (record["profile"], example.profile))
        facts = {"right": len(told & true), "told": len(told), "true": len(true)}
    for candidate in record["candidates"]:
        named = catalogue.first(candidate["reply"])
        title = " or ".join(item.title for item in named) or None
        found = is_target(catalogue, named, example.items)
        fits = None if true is None else min((fit(item, true) for item in named), default=0)
        candidates.append({**candidate, "title": title, "found": found, "fit": fits})
    return {**record, "candidates": candidates, "facts": facts}


def gold_labels(catalogue: Catalogue, example: Example, guesses: Guesses) -> Labels:
    """Return one label per gold title: `repeated` if the context names it, `found` if guessed."""
    lines, labels = [line.text for line in example.history], []
    for title in example.items:
        repeated = any(catalogue.mentions(line, [title]) for line in lines)
        found = any(is_target(catalogue, guess, [title]) for guess in guesses)
        labels.append({"title": title, "repeated": repeated, "found": found})
    return labels


def is_target(catalogue: Catalogue, guess: tuple[Item, ...], titles: Sequence[str]) -> bool:
    """Return whether a guess is one of the titles.

    A guess whose year is left open counts only if every film that it may mean is that title.
    """
    return any(guess and set(guess) <= set(catalogue.named(title)) for title in titles)


def titles_in(catalogue: Catalogue, text: str) -> list[str]:
    """Return the catalogue titles in a text, in order, once each.

    A title without a year stands for every film that it may mean.
    """
    return list(dict.fromkeys(x.title for found in catalogue.find(text) for x in found.items))
