"""The roles of a conversation: their prompts, the models that answer, and the judges' scores.

Every `*_prompt` is a pure function from a dialogue to messages, used both to ask a model and to
build its training dialogues. `Roles` holds the language model and the adapter of each side. Left
out: the order of turns (podcs.py, ses.py, evaluation.py).
"""

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from unicodedata import normalize

from usbrec.chat import LanguageModel, Message, Messages, Ranked, Ranks, Request, Sampling
from usbrec.crs.catalogue import Catalogue, Item
from usbrec.crs.dialogue import Dialogue, Dialogues, add_turn, format_dialogue, from_viewpoint
from usbrec.options import Options, UserError, option, seed_for

SCORES = ("0", "1", "2")
STAND_INS = 20  # sampled votes where closed form cannot be read
VOTE_TOKENS = 16  # a sampled vote may be a short sentence around its number

Seeds = Sequence[int]
Titles = Sequence[Sequence[str]]  # one or more titles per dialogue
Told = str | Sequence[str]  # what a seeker knows: a profile, or the target titles


@dataclass(frozen=True)
class Side:
    """One side of the conversation: a language model and its adapter (None: the base)."""

    llm: LanguageModel
    adapter: str | None = None

    def requests(self, prompts: Iterable[Messages], sampling: Sampling, seeds: Seeds) -> "Asked":
        """Return one request per prompt, each beside this side: the input of `Roles.complete`."""
        rows = zip(prompts, seeds, strict=True)
        return [(self, Request(x, sampling, seed, self.adapter)) for x, seed in rows]


Asked = list[tuple[Side, Request]]  # who is asked, and what


@dataclass(frozen=True)
class Votes(Options):
    """The reading of a judge's score, which the options of all that ask a judge include."""

    votes: int = option(0, "sampled votes a score; 0: read in closed form", low=0)
    vote_temperature: float = option(0.7, "temperature of the judge's votes", low=0)


@dataclass(frozen=True)
class JudgeScore:
    """A judge's score of one prompt; `score` and `label` are None if nothing could be read.

    `score` is the mean vote, in [0, 2]. `label` is the most probable of 0, 1, 2, ties to the lower.
    `digit_probability` is the three digits' probability among all replies (closed form only).
    `parse_rate` is the share of the sampled votes that could be read (votes only).
    """

    score: float | None = None
    label: int | None = None
    digit_probability: float | None = None
    parse_rate: float | None = None


@dataclass(frozen=True)
class Roles:
    """The two sides of the conversation, and the catalogue.

    The simulator plays the seeker, the internal seeker, the summariser and both judges. Its
    language model may differ from the recommender's. `external` is the external judge's side where
    that is not the simulator.
    """

    recommender: Side
    simulator: Side
    catalogue: Catalogue
    external: Side | None = None

    def adapters(self) -> dict[str, str | None]:
        """Return the adapter that speaks for each side, None where it is the base model."""
        return {"recommender": self.recommender.adapter, "seeker": self.simulator.adapter}

    def complete(self, asked: Asked) -> list[str]:
        """Return the stripped text of one reply per request, in order.

        Each language model gets all of its requests in one `generate` call. So there is one call in
        all if both sides share a model, and none without requests.
        """
        texts = [""] * len(asked)
        for llm in {id(side.llm): side.llm for side, _ in asked}.values():
            own = [i for i, (side, _) in enumerate(asked) if side.llm is llm]
            for i, reply in zip(own, llm.generate([asked[i][1] for i in own]), strict=True):
                texts[i] = reply.text.strip()
        return texts

    def rank(self, dialogues: Dialogues, count: int, tokens: int) -> list[Ranked]:
        """Return the items' announcements that the recommender is likeliest to make, per dialogue.

        `tokens` is that of `best_texts`. Raises UserError for a language model that cannot rank
        texts, if there is a dialogue.
        """
        side = self.recommender
        if not dialogues:
            return []
        if not isinstance(side.llm, Ranks):
            raise UserError("a server cannot rank titles: no --rank, /top, ranked candidates")
        texts = [announce(item.title) for item in self.catalogue]
        requests = [Request(recommender_prompt(x), adapter=side.adapter) for x in dialogues]
        return side.llm.best_texts(requests, texts, min(count, len(texts)), tokens)

    def likeliest(self, dialogues: Dialogues, k: int) -> list[list[tuple[Item, float]]]:
        """Return the k items that the recommender is likeliest to name, best first, by `rank`.

        Beside each stands its announcement's log-probability.
        """
        ranked = self.rank(dialogues, k, ranking_tokens(k, len(self.catalogue.items)))
        return [[(self.catalogue.items[i], x) for i, x in row.texts] for row in ranked]

    def summaries(self, dialogues: Dialogues, tokens: int, seeds: Seeds) -> Asked:
        """Return the requests for the dialogues' summaries, of so many tokens at most."""
        prompts = map(summary_prompt, dialogues)
        return self.simulator.requests(prompts, Sampling(tokens, temperature=0.0), seeds)

    def remember(self, replies: Sequence[str], tokens: int) -> list[str]:
        """Return what the simulator knows of the title in each reply, in so many tokens at most.

        Equal replies are asked for once.
        """
        unique, sampling = list(dict.fromkeys(replies)), Sampling(tokens, temperature=0.0)
        asked = self.simulator.requests(map(memory_prompt, unique), sampling, [0] * len(unique))
        known = dict(zip(unique, self.complete(asked), strict=True))
        return [known[reply] for reply in replies]

    def recommend(self, dialogues: Dialogues, sampling: Sampling, seeds: Seeds) -> list[str]:
        """Return the recommender's next line per dialogue."""
        prompts = map(recommender_prompt, dialogues)
        return self.complete(self.recommender.requests(prompts, sampling, seeds))

    def seek(
        self, dialogues: Dialogues, told: Sequence[Told], sampling: Sampling, seeds: Seeds
    ) -> list[Dialogue]:
        """Return the dialogues plus the seeker's next lines, in which target titles are hidden."""
        prompts = map(seeker_prompt, dialogues, told)
        lines = self.complete(self.simulator.requests(prompts, sampling, seeds))
        hidden = map(self.catalogue.hide, lines, (() if isinstance(x, str) else x for x in told))
        return [add_turn(d, "seeker", x) for d, x in zip(dialogues, hidden, strict=True)]

    def judge(
        self, prompts: Sequence[Messages], votes: Votes, seeds: Seeds, by: Side | None = None
    ) -> list[JudgeScore]:
        """Return a side's score per prompt, the simulator's if None; all prompts share one call.

        In closed form, votes are sampled only for the prompts whose log-probabilities the language
        model does not tell.
        """
        side, n = by or self.simulator, votes.votes or STAND_INS
        asked = [Request(prompt, adapter=side.adapter) for prompt in prompts]
        closed = asked and not votes.votes
        table = side.llm.choice_logprobs(asked, SCORES) if closed else [[]] * len(asked)
        untold = [i for i, row in enumerate(table) if not row]
        ballots = [prompts[i] for i in untold for _ in range(n)]
        keys = [seed_for(seeds[i], vote) for i in untold for vote in range(n)]
        sampling = Sampling(VOTE_TOKENS, votes.vote_temperature)
        marks = list(map(parse_score, self.complete(side.requests(ballots, sampling, keys))))
        voted = (count_votes(marks[i : i + n]) for i in range(0, len(marks), n))
        return [closed_form(row, votes.vote_temperature) if row else next(voted) for row in table]

    def explain_and_judge(
        self, dialogues: Dialogues, targets: Titles, keys: Seeds, sampling: Sampling, votes: Votes
    ) -> list[tuple[str, JudgeScore]]:
        """Return per dialogue the explanation of its last reply, and the external judge's score.

        The recommender explains. The seeds of explanations and votes are derived from `keys`.
        """
        asked = [add_turn(dialogue, "seeker", EXPLAIN) for dialogue in dialogues]
        told = self.recommend(asked, sampling, [seed_for(key, "explain") for key in keys])
        prompts = list(map(external_judge_prompt, dialogues, told, targets))
        seeds = [seed_for(key, "judge") for key in keys]
        return list(zip(told, self.judge(prompts, votes, seeds, self.external), strict=True))


@cache
def prompt_text(name: str) -> str:
    """Return the text of prompts/NAME.md."""
    return (Path(__file__).with_name("prompts") / f"{name}.md").read_text("utf-8").strip()


EXPLAIN = prompt_text("explain")


def recommender_prompt(dialogue: Dialogue) -> Messages:
    """Return the recommender's prompt: its instructions, then the dialogue from its viewpoint."""
    return (Message("system", prompt_text("recommender")), *from_viewpoint(dialogue, "recommender"))


def seeker_prompt(dialogue: Dialogue, told: Told) -> Messages:
    """Return the prompt of the seeker, told the target titles, or the inner one, told a profile."""
    if isinstance(told, str):
        persona = prompt_text("internal_seeker").replace("{profile}", known(told))
    else:
        persona = prompt_text("seeker").replace("{targets}", "; ".join(told))
    return (Message("system", persona), *from_viewpoint(dialogue, "seeker"))


def announce(title: str) -> str:
    """Return the beginning of a reply that recommends the title, one phrase for all films.

    Films are ranked by the phrase's probability, and judged by it. Its full stop tells "Heat" from
    "Heat (1995)".
    """
    return f"I recommend {title}."


def ranking_tokens(count: int, titles: int) -> int:
    """Return the tokens within which a ranking finds its `count` best announcements.

    Of 288 titles the first takes most of 450, and the ten best hardly more. Of the best eight of
    ReDial's 6,576 titles 16% are missing after 450 tokens, and 2% after 900.
    """
    return max(480 if titles <= 500 else 900, 60 * count)


def summary_prompt(dialogue: Dialogue) -> Messages:
    """Return the summariser's prompt: the whole dialogue, its newest line included, as a chat log.

    Each utterance is one line of the log, so that a line break in it cannot pass for a speaker.
    """
    return Message("system", prompt_text("summariser")), Message("user", format_dialogue(dialogue))


def external_question(targets: Sequence[str]) -> Message:
    """Return the external judge's question, a system message apart from both speakers' lines.

    The question repeats the targets, since a small model judges by the text closest to the answer.
    """
    return Message("system", prompt_text("judge_external").replace("{targets}", "; ".join(targets)))


def internal_question(profile: str) -> Message:
    """Return the internal judge's question, which repeats the profile."""
    return Message("system", prompt_text("judge_internal").replace("{profile}", known(profile)))


def known(profile: str) -> str:
    """Return a profile without its final full stop, for use in a sentence; or "unknown"."""
    return profile.strip().rstrip(".") or "unknown"


def external_judge_prompt(dialogue: Dialogue, explanation: str, targets: Sequence[str]) -> Messages:
    """Return the external judge's prompt: the seeker's chat, the explanation, the question."""
    explained = add_turn(add_turn(dialogue, "seeker", EXPLAIN), "recommender", explanation)
    return (*seeker_prompt(explained, targets), external_question(targets))


def internal_judge_prompt(dialogue: Dialogue, profile: str) -> Messages:
    """Return the internal judge's prompt: the internal seeker's chat, then the question."""
    return (*seeker_prompt(dialogue, profile), internal_question(profile))


def memory_prompt(reply: str) -> Messages:
    """Return the internal judge's prompt for what it knows of the title in a reply."""
    return Message("system", prompt_text("judge_cards")), Message("user", reply)


def card_prompt(reply: str, card: str, profile: str) -> Messages:
    """Return the internal judge's prompt with cards: the reply, its card, then the profile.

    The card stands where the judge writes what it knows, whether it has written it or not. The
    dialogue is left out: what counts of it is in the profile, which stands next to the answer,
    since a small model judges by the text closest to it.
    """
    return (*memory_prompt(reply), Message("assistant", card), Message("system", profile))


def closed_form(logprobs: Sequence[float], temperature: float) -> JudgeScore:
    """Return the expected vote as a score, from the log-probabilities of the three digits.

    Votes at temperature t have p_i ~ exp(l_i / t) over the digits alone: 0.7 of [.2, .3, .5] is
    [.15, .28, .57], expectation 1.42. Temperature 0 puts all on the most probable digit.
    """
    top = max(logprobs)
    if not math.isfinite(top):
        return JudgeScore(digit_probability=0.0)
    label = list(logprobs).index(top)
    probability = min(1.0, sum(math.exp(value) for value in logprobs))
    if temperature == 0:
        return JudgeScore(float(label), label, probability)
    weights = [math.exp((value - top) / temperature) for value in logprobs]
    mean = sum(digit * weight for digit, weight in enumerate(weights)) / sum(weights)
    return JudgeScore(mean, label, probability)


def count_votes(marks: Sequence[int | None]) -> JudgeScore:
    """Return the mean and the majority (ties to the lower) of the votes that could be read."""
    read = [mark for mark in marks if mark is not None]
    if not read:
        return JudgeScore(parse_rate=0.0)
    majority = max(range(3), key=read.count)  # the first of equals
    return JudgeScore(sum(read) / len(read), majority, parse_rate=len(read) / len(marks))


# --- a sampled vote ------------------------------------------------------------------------------

MARKUP = re.compile(r"</?\w+>|\\[a-z]+|[*_`\"'{}\[\]|$\\【】「」“”]")  # JSON, tags, LaTeX, Markdown
# "from 0 to 2", "0, 1 or 2", "0-2" name the scale; "1/2", "1 out of 2" are a score over the scale.
SCALE = re.compile(r"(?i)\b[012](?:\s*(?:,|-|–|/|\bto\b|\bor\b|\band\b)+\s*[012])+\b(?!/)")
OVER_SCALE = re.compile(r"(?i)\b([012])(?:\.0+)?\s*(?:/|out of)\s*2(?:\.0+)?\b")
# A score stands alone after a sentence's start or a word that announces it, and ends its phrase.
SCORE = re.compile(
    r"(?i)(?:^|[.!?…]\s+|[:=>\n(]\s*"
    r"|\b(?:(?:give|rate|score)(?: it| this| that)?|say|is|be|a|rating|vote|answer|number)\s+)"
    r"([012])(?:\.0+)?"
    r"(?=\s*(?:$|\.(?!\d)|[,;:!?()\n…]|[-–—]\s|\b(?:because|since|as|for|points?)\b))"
)


def parse_score(text: str) -> int | None:
    """Return the score that a sampled reply states, or None where it states none or several.

    "0 to 2 ... I give 2" is 2, "Toy Story 2 ... 0" is 0, "Toy Story 2" is None. Markup
    is left out, and characters of other widths are read as the plain ones: "{"score": ２}" is 2.
    """
    plain = MARKUP.sub(" ", normalize("NFKC", text)).strip()
    found = {int(x) for x in SCORE.findall(SCALE.sub("", OVER_SCALE.sub(r"\1", plain)))}
    return found.pop() if len(found) == 1 else None
