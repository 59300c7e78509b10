"""The speaking roles: what each is shown, and how its words and its scores are read.

Every `*_prompt` is a pure function from a dialogue to messages, used alike to ask a model and to
build its training lessons. Left out: which weights answer (`Cast` only names adapters), and every
decision about what to say when (podcs.py, ses.py, evaluation.py).
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from usbrec.chat import Chat, LanguageModel, Message, Sampling
from usbrec.crs.catalogue import Catalogue
from usbrec.crs.dialogue import Dialogue, Speaker, Utterance, from_viewpoint
from usbrec.options import seed_for

SCORES = ("0", "1", "2")
SILENCE = "..."  # stands in a dialogue for an empty reply, so that the speakers keep alternating
VOTE_TOKENS = 16  # a sampled vote may be a short sentence around its number

Messages = tuple[Message, ...]


@dataclass(frozen=True)
class Cast:
    """The adapter behind each side, None for the plain base weights.

    The simulator side is the seeker, the internal seeker, the summariser and both judges.
    """

    recommender: str | None = None
    simulator: str | None = None

    def recommends(self, prompt: Messages) -> Chat:
        """Return the chat that the recommender answers."""
        return Chat(prompt, self.recommender)

    def simulates(self, prompt: Messages) -> Chat:
        """Return the chat that the simulator answers."""
        return Chat(prompt, self.simulator)


@cache
def prompt_text(name: str) -> str:
    """Return the wording in prompts/NAME.md."""
    return (Path(__file__).with_name("prompts") / f"{name}.md").read_text("utf-8").strip()


EXPLAIN = prompt_text("explain")


def recommender_prompt(dialogue: Dialogue) -> Messages:
    """Return the dialogue as the recommender sees it."""
    return (Message("system", prompt_text("recommender")), *from_viewpoint(dialogue, "recommender"))


def seeker_prompt(dialogue: Dialogue, targets: Sequence[str]) -> Messages:
    """Return the dialogue as the external seeker, who knows the target titles, sees it."""
    persona = prompt_text("seeker").replace("{targets}", "; ".join(targets))
    return (Message("system", persona), *from_viewpoint(dialogue, "seeker"))


def internal_seeker_prompt(dialogue: Dialogue, profile: str) -> Messages:
    """Return the dialogue as the internal seeker, who knows only the summary, sees it."""
    persona = prompt_text("internal_seeker").replace("{profile}", known(profile))
    return (Message("system", persona), *from_viewpoint(dialogue, "seeker"))


def summary_prompt(dialogue: Dialogue) -> Messages:
    """Return the whole dialogue, its newest line included, as one chat log for the analyst.

    Each line of the log is one utterance: a line break inside one cannot pass for a speaker.
    """
    said = [(line.speaker.capitalize(), " ".join(line.text.split())) for line in dialogue]
    log = "\n".join(f"{speaker}: {text}" for speaker, text in said)
    return (Message("system", prompt_text("summariser")), Message("user", log))


def external_question(targets: Sequence[str]) -> Message:
    """Return the external judge's question: a voice of its own, glued to no speaker's words.

    It repeats the targets: a small model judges by what stands close to the answer.
    """
    question = prompt_text("judge_external").replace("{targets}", "; ".join(targets))
    return Message("system", question)


def internal_question(profile: str) -> Message:
    """Return the internal judge's question, which repeats the profile."""
    question = prompt_text("judge_internal").replace("{profile}", known(profile))
    return Message("system", question)


def known(profile: str) -> str:
    """Return a profile as it stands within a sentence; "unknown" where it is empty."""
    return profile.strip().rstrip(".") or "unknown"


def asked_to_explain(dialogue: Dialogue) -> Dialogue:
    """Return the dialogue with the seeker's request to explain the last recommendation."""
    return say(dialogue, "seeker", EXPLAIN)


def external_judge_prompt(dialogue: Dialogue, explanation: str, targets: Sequence[str]) -> Messages:
    """Return the seeker's chat up to the explanation of the last reply, then the question."""
    explained = say(asked_to_explain(dialogue), "recommender", explanation)
    return (*seeker_prompt(explained, targets), external_question(targets))


def internal_judge_prompt(dialogue: Dialogue, profile: str) -> Messages:
    """Return the internal seeker's chat up to the last reply, then the question."""
    return (*internal_seeker_prompt(dialogue, profile), internal_question(profile))


def say(dialogue: Dialogue, speaker: Speaker, text: str) -> Dialogue:
    """Return the dialogue with one more line; an empty one is written as SILENCE."""
    return (*dialogue, Utterance(speaker, text.strip() or SILENCE))


def ask(
    llm: LanguageModel,
    chats: Sequence[Chat],
    samplings: Sampling | Sequence[Sampling],
    seeds: Sequence[int],
) -> list[str]:
    """Return the stripped text of one reply a chat; no call is made for no chats."""
    if not chats:
        return []
    return [reply.text.strip() for reply in llm.generate(chats, samplings, seeds)]


def seeker_turn(
    llm: LanguageModel,
    cast: Cast,
    catalogue: Catalogue,
    dialogues: Sequence[Dialogue],
    targets: Sequence[Sequence[str]],
    sampling: Sampling,
    seeds: Sequence[int],
) -> list[Dialogue]:
    """Return each dialogue with the external seeker's next line, cleaned of its target titles."""
    pairs = list(zip(dialogues, targets, strict=True))
    chats = [cast.simulates(seeker_prompt(dialogue, titles)) for dialogue, titles in pairs]
    lines = ask(llm, chats, sampling, seeds)
    return [
        say(dialogue, "seeker", catalogue.hide(line, titles))
        for (dialogue, titles), line in zip(pairs, lines, strict=True)
    ]


def recommender_turn(
    llm: LanguageModel,
    cast: Cast,
    dialogues: Sequence[Dialogue],
    sampling: Sampling,
    seeds: Sequence[int],
) -> list[str]:
    """Return the recommender's next line of each dialogue."""
    chats = [cast.recommends(recommender_prompt(dialogue)) for dialogue in dialogues]
    return ask(llm, chats, sampling, seeds)


@dataclass(frozen=True)
class Verdict:
    """A judge's score of one chat; `expectation` and `label` are None when nothing could be read.

    `expectation` lies in [0, 2]; `label` is the most probable of 0, 1, 2, ties to the lower.
    `mass` is the probability of the digits among all replies, or the share of votes that parsed.
    """

    expectation: float | None
    label: int | None
    mass: float


def judge(
    llm: LanguageModel, chats: Sequence[Chat], votes: int, temperature: float, seeds: Sequence[int]
) -> list[Verdict]:
    """Return each chat's score: in closed form when `votes` is 0, else from sampled votes."""
    if not chats:
        return []
    if votes == 0:
        table = llm.choice_logprobs(chats, SCORES)
        return [closed_form(logprobs, temperature) for logprobs in table]
    ballots = [chat for chat in chats for _ in range(votes)]
    keys = [seed_for(seed, i) for seed in seeds for i in range(votes)]
    texts = ask(llm, ballots, Sampling(VOTE_TOKENS, temperature), keys)
    marks = [parse_score(text) for text in texts]
    return [count_votes(marks[i : i + votes]) for i in range(0, len(marks), votes)]


def explain_and_judge(
    llm: LanguageModel,
    cast: Cast,
    dialogues: Sequence[Dialogue],
    targets: Sequence[Sequence[str]],
    keys: Sequence[int],
    sampling: Sampling,
    votes: int,
    vote_temperature: float,
) -> list[tuple[str, Verdict]]:
    """Return the recommender's explanation of its last reply and the external judge's verdict."""
    asked = [asked_to_explain(dialogue) for dialogue in dialogues]
    seeds = [seed_for(key, "explain") for key in keys]
    explanations = recommender_turn(llm, cast, asked, sampling, seeds)
    chats = [
        cast.simulates(external_judge_prompt(dialogue, explanation, titles))
        for dialogue, explanation, titles in zip(dialogues, explanations, targets, strict=True)
    ]
    seeds = [seed_for(key, "judge") for key in keys]
    verdicts = judge(llm, chats, votes, vote_temperature, seeds)
    return list(zip(explanations, verdicts, strict=True))


def closed_form(logprobs: Sequence[float], temperature: float) -> Verdict:
    """Return the score that ever more votes tend to, from the digits' log-probabilities.

    Votes at temperature t have p_i ~ exp(l_i / t) over the digits alone: 0.7 of [.2, .3, .5] is
    [.16, .28, .57], expectation 1.41. Temperature 0 puts all on the most probable digit.
    """
    top = max(logprobs)
    if not math.isfinite(top):
        return Verdict(None, None, 0.0)
    label = list(logprobs).index(top)
    mass = min(1.0, sum(math.exp(value) for value in logprobs))
    if temperature == 0:
        return Verdict(float(label), label, mass)
    weights = [math.exp((value - top) / temperature) for value in logprobs]
    mean = sum(score * weight for score, weight in enumerate(weights)) / sum(weights)
    return Verdict(mean, label, mass)


def count_votes(marks: Sequence[int | None]) -> Verdict:
    """Return the mean and the majority of the votes that parsed, ties to the lower."""
    read = [mark for mark in marks if mark is not None]
    if not read:
        return Verdict(None, None, 0.0)
    majority = max(range(3), key=read.count)  # the first of equals
    return Verdict(sum(read) / len(read), majority, len(read) / len(marks))


# "from 0 to 2", "0, 1 or 2", "0-2" name the scale; "1/2", "1 out of 2" are a score over the scale.
SCALE = re.compile(r"\b[012](?:\s*(?:,|-|–|/|\bto\b|\bor\b|\band\b)+\s*[012])+\b(?!/)", re.I)
OVER_SCALE = re.compile(r"\b([012])\s*(?:/|out of)\s*2\b", re.I)
# A score stands alone after a sentence's start or a word that announces it, and ends its phrase.
SCORE = re.compile(
    r"(?:^|[.!?…]\s+|[:=\n(]\s*"
    r"|\b(?:(?:give|rate|score)(?: it| this| that)?|say|is|be|a|rating|vote|answer|number)\s+)"
    r"([012])(?=\s*(?:$|\.(?!\d)|[,;!?)\n…]|\b(?:because|since|as|for)\b))",
    re.I,
)


def parse_score(text: str) -> int | None:
    """Return the score that a reply states, or None where it states none or several.

    "0 to 2 ... I give 2" is 2, "Toy Story 2 ... 0" is 0, "Toy Story 2" is None.
    """
    plain = re.sub(r"[*_`\"']", "", text).strip()
    plain = SCALE.sub("", OVER_SCALE.sub(r"\1", plain))
    found = {int(score) for score in SCORE.findall(plain)}
    return found.pop() if len(found) == 1 else None
