"""A server in place of our own engine: what it is asked, what is kept, what its faults cost."""

import hashlib
import json
import math
import os
import signal
import subprocess
import sys
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from threading import Barrier, Event, Lock
from typing import Any

import pytest
import torch
from scripted import talk
from small_run import STAGE_FLAGS, flags, write_small_data, write_small_model
from stand_in import FAULTS, LAST, Body, StandIn, completion, refusal, serving

import infer
import train
from usbrec.chat import LanguageModel, Message, Ranks, Request, Sampling
from usbrec.crs.agents import (
    JudgeScore,
    Roles,
    Side,
    Votes,
    closed_form,
    internal_judge_prompt,
    prompt_text,
)
from usbrec.crs.catalogue import Catalogue
from usbrec.crs.dialogue import add_turn
from usbrec.crs.ses import SearchOptions, search
from usbrec.extras.default_model import find_model
from usbrec.llm.endpoint import Endpoint, read_answers, split_address, sum_choices
from usbrec.llm.engine import Engine
from usbrec.loading import ModelOptions, Models, load_engine, usage_of, weights_digest
from usbrec.options import UserError, seed_for
from usbrec.runs import read_json, read_rows

ROOT = Path(train.__file__).parent
KEY = "sk-very-secret-0123456789"
DIGITS = ("0", "1", "2")
SURE = [("2", math.log(0.6)), (" 2", math.log(0.1)), ("1", math.log(0.2)), ("0", math.log(0.1))]


@pytest.fixture(autouse=True)
def quick_client(monkeypatch: pytest.MonkeyPatch) -> None:
    """No wait before another try, no proxy, and a key."""
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.0)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("OPENAI_API_KEY", KEY)


def echo(body: Body) -> Body:
    return completion(f"{body['messages'][-1]['content']}, {body['model']}", SURE)


@pytest.fixture
def server() -> Iterator[StandIn]:
    with serving(echo) as server:
        yield server


def ask(text: str, model: str = "m", **sampling: Any) -> Request:
    return Request((Message("user", text),), Sampling(**sampling), adapter=model)


def texts(llm: Endpoint, *names: str) -> list[str]:
    return [reply.text for reply in llm.generate([ask(name) for name in names])]


# --- replies ----------------------------------------------------------------------------------


def test_an_endpoint_is_a_language_model_that_does_not_rank(tmp_path: Path) -> None:
    llm: LanguageModel = Endpoint("http://localhost:1/v1", tmp_path / "answers.jsonl", 1)
    assert not isinstance(llm, Ranks)
    roles = Roles(Side(llm, "m"), Side(llm, "m"), Catalogue([]))
    with pytest.raises(UserError, match="cannot rank titles"):
        roles.rank([talk("Hi")], 3, 9)


def test_replies_are_in_order_however_late_each_answer_comes(tmp_path: Path) -> None:
    """Each request waits for the one after it, so they are answered from the last to the first."""
    told = [Event() for _ in range(9)]
    told[8].set()

    def late(body: Body) -> Body:
        number = int(body["messages"][-1]["content"])
        assert told[number + 1].wait(60)
        told[number].set()
        return echo(body)

    with serving(late) as server:
        llm = Endpoint(server.url, tmp_path / "answers.jsonl", 8)
        assert texts(llm, *map(str, range(8))) == [f"{i}, m" for i in range(8)]


def test_as_many_requests_are_in_flight_as_allowed_and_no_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The barrier opens when four have come; a fifth one that is under way would be counted."""
    barrier, lock, flying, most = Barrier(4), Lock(), 0, 0

    def slow(body: Body) -> Body:
        barrier.wait(60)
        return echo(body)

    with serving(slow) as server:
        llm = Endpoint(server.url, tmp_path / "answers.jsonl", 4)
        pay = llm.pay

        def counted(key: str, body: Body) -> None:
            nonlocal flying, most
            with lock:
                flying += 1
                most = max(most, flying)
            pay(key, body)
            with lock:
                flying -= 1

        monkeypatch.setattr(llm, "pay", counted)
        texts(llm, *"abcdefghijkl")
    assert most == 4 and len(server.asked) == 12


def test_equal_requests_are_asked_once_and_answered_ones_never_again(
    server: StandIn, tmp_path: Path
) -> None:
    path = tmp_path / "run" / "answers.jsonl"
    llm = Endpoint(server.url, path, 4)
    assert texts(llm, "a", "b", "a") == ["a, m", "b, m", "a, m"]
    assert texts(llm, "b", "c") == ["b, m", "c, m"]
    assert len(server.asked) == 3 and len(read_rows(path)) == 3
    again = Endpoint(server.url, path, 4)
    assert texts(again, "c", "b", "a") == ["c, m", "b, m", "a, m"]
    assert len(server.asked) == 3
    again.generate([ask("a", "other"), replace(ask("a"), seed=1), ask("a", temperature=0.5)])
    assert len(server.asked) == 6, "another model, seed or sampling is another request"
    with serving(lambda body: completion("another")) as other:
        assert texts(Endpoint(other.url, path, 4), "a") == ["another"]


def test_a_torn_last_line_is_asked_again_and_spoils_no_other(
    server: StandIn, tmp_path: Path
) -> None:
    path = tmp_path / "answers.jsonl"
    texts(Endpoint(server.url, path, 1), "a", "b")
    path.write_bytes(path.read_bytes()[:-9])
    assert texts(Endpoint(server.url, path, 1), "a", "b") == ["a, m", "b, m"]
    assert Counter(x["messages"][0]["content"] for x in server.asked) == {"a": 1, "b": 2}
    assert texts(Endpoint(server.url, path, 1), "a", "b") == ["a, m", "b, m"]
    assert len(server.asked) == 3 and len(read_answers(path)) == 2
    path.write_text(path.read_text("utf-8") + '{"text": "x"}\n[1]\n2\n', "utf-8")
    assert len(read_answers(path)) == 2, "lines that are no answers are passed over"


def test_the_tokens_of_new_answers_are_counted(server: StandIn, tmp_path: Path) -> None:
    llm = Endpoint(server.url, tmp_path / "answers.jsonl", 4)
    texts(llm, "a", "b", "a")
    assert (llm.usage.calls, llm.usage.prompt_tokens, llm.usage.decoded_tokens) == (1, 14, 6)
    texts(llm, "a")
    assert usage_of([llm]).decoded_tokens == 6 and llm.usage.reused_tokens == 0


def test_a_body_has_what_the_sampling_sets(server: StandIn, tmp_path: Path) -> None:
    llm = Endpoint(server.url, tmp_path / "answers.jsonl", 1)
    chat = (Message("system", "Be brief."), Message("user", "Hi"))
    llm.generate([Request(chat, Sampling(9, 0.5, top_p=0.8), 2**62 + 5, "sft")])
    assert server.asked[0] == {
        "model": "sft",
        "messages": [{"role": x.role, "content": x.content} for x in chat],
        "max_tokens": 9,
        "temperature": 0.5,
        "top_p": 0.8,
        "seed": 5,
    }
    llm.generate([ask("Hi", top_k=4, min_p=0.1, stop=("END",))])
    assert [server.asked[1][name] for name in ("top_k", "min_p", "stop")] == [4, 0.1, ["END"]]
    llm.generate([replace(ask("Hi", temperature=0.0), seed=3)])
    assert "seed" not in server.asked[2]
    with pytest.raises(AssertionError, match="cannot rank"):  # only ranked candidates begin so
        llm.generate([replace(ask("Hi"), begin="I recommend")])
    assert len(server.asked) == 3


def test_a_reply_cut_by_its_limit_is_not_finished_and_what_is_not_told_is_empty(
    tmp_path: Path,
) -> None:
    def answer(body: Body) -> Body:
        made = completion("Hi")
        if body["messages"][-1]["content"] == "cut":
            silent = {"role": "assistant", "content": None}
            made["choices"][0] |= {"finish_reason": "length", "message": silent}
            made["usage"] = None
        return made

    with serving(answer) as server:
        llm = Endpoint(server.url, tmp_path / "answers.jsonl", 1)
        replies = llm.generate([ask("whole"), ask("cut")])
    assert [(reply.text, reply.finished) for reply in replies] == [("Hi", True), ("", False)]
    assert (llm.usage.prompt_tokens, llm.usage.decoded_tokens) == (7, 3)


def test_a_listener_hears_a_single_reply(server: StandIn, tmp_path: Path) -> None:
    llm, heard = Endpoint(server.url, tmp_path / "answers.jsonl", 1), []
    llm.listeners = {0: heard.append}
    texts(llm, "a")
    texts(llm, "b", "c")
    assert heard == ["a, m"]


def test_a_listener_of_a_call_that_failed_hears_no_later_one(
    server: StandIn, tmp_path: Path
) -> None:
    llm, heard = Endpoint(server.url, tmp_path / "answers.jsonl", 1), []
    llm.listeners = {0: heard.append}
    server.faults.append(refusal(401, "bad key"))
    with pytest.raises(UserError, match="bad key"):
        texts(llm, "a")
    assert texts(llm, "b") == ["b, m"] and heard == []


# --- faults -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAULTS)
def test_a_passing_fault_costs_another_try_and_nothing_else(
    name: str, server: StandIn, tmp_path: Path
) -> None:
    server.faults.append(FAULTS[name])
    assert texts(Endpoint(server.url, tmp_path / "answers.jsonl", 1), "a", "b") == ["a, m", "b, m"]
    assert Counter(x["messages"][0]["content"] for x in server.asked) == {"a": 2, "b": 1}


@pytest.mark.parametrize("name", LAST)
def test_a_refusal_ends_in_one_sentence_and_keeps_what_was_answered(
    name: str, server: StandIn, tmp_path: Path
) -> None:
    path = tmp_path / "answers.jsonl"
    llm = Endpoint(server.url, path, 1)
    texts(llm, "a", "b")
    fault, words = LAST[name]
    server.faults.append(fault)
    with pytest.raises(UserError) as caught:
        texts(llm, "c", "d", "e")
    assert server.url in str(caught.value) and words in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(server.asked) <= 4, "requests that wait are withdrawn; one may have begun"
    assert {"a, m", "b, m"} <= {row["text"] for row in read_rows(path)}


def test_a_server_that_keeps_failing_is_given_up_with_its_words(
    server: StandIn, tmp_path: Path
) -> None:
    server.faults += [FAULTS["failed"]] * 99
    with pytest.raises(UserError, match="out of memory"):
        texts(Endpoint(server.url, tmp_path / "answers.jsonl", 1), "a")
    assert len(server.asked) == 3


def test_no_server_is_told(server: StandIn, tmp_path: Path) -> None:
    url = "http://127.0.0.1:1/v1"
    with pytest.raises(UserError, match=f"{url} does not answer as m: Connection error"):
        texts(Endpoint(url, tmp_path / "answers.jsonl", 1), "a")


def test_the_key_goes_to_the_server_and_nowhere_else(server: StandIn, tmp_path: Path) -> None:
    llm = Endpoint(server.url, tmp_path / "answers.jsonl", 1)
    texts(llm, "a")
    server.faults.append(refusal(401, f"the key {KEY} is wrong"))
    with pytest.raises(UserError, match="the key KEY is wrong"):
        texts(llm, "b")
    assert server.keys == {f"Bearer {KEY}"}
    assert KEY not in (tmp_path / "answers.jsonl").read_text("utf-8")


@pytest.mark.parametrize("key", [f"{KEY}\r", f"{KEY}\n", f" {KEY[:9]}\r\n{KEY[9:]}"])
def test_line_ends_are_no_part_of_the_key(
    key: str, server: StandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The client refuses to send them, with words that repeat the key."""
    monkeypatch.setenv("OPENAI_API_KEY", key)
    texts(Endpoint(server.url, tmp_path / "answers.jsonl", 1), "a")
    assert server.keys == {f"Bearer {KEY}"}


@pytest.mark.parametrize("key", [None, "", " "])
def test_without_a_key_a_placeholder_is_sent(
    key: str | None, server: StandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OPENAI_API_KEY")
    if key is not None:
        monkeypatch.setenv("OPENAI_API_KEY", key)
    texts(Endpoint(server.url, tmp_path / "answers.jsonl", 1), "a")
    assert server.keys == {"Bearer no-key-given"}


def test_quotes_around_a_key_are_not_part_of_it(
    server: StandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Typographic ones, as a text editor sets them: no header can hold them."""
    monkeypatch.setenv("OPENAI_API_KEY", f"\u201c{KEY}\u201d")
    texts(Endpoint(server.url, tmp_path / "answers.jsonl", 1), "a")
    assert server.keys == {f"Bearer {KEY}"}


def test_a_missing_client_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(UserError, match="pip install openai"):
        Endpoint("http://localhost:1/v1", tmp_path / "answers.jsonl", 1)


def test_an_address_that_the_client_cannot_use_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = tmp_path / "answers.jsonl"
    with pytest.raises(UserError, match=r"http://\[::g]:80/v1 is asked by openai .*: "):
        Endpoint("http://[::g]:80/v1", answers, 1)
    monkeypatch.setenv("ALL_PROXY", "no-scheme://127.0.0.1:1080")
    with pytest.raises(UserError, match="http://localhost:1/v1 is asked by openai .*no-scheme"):
        Endpoint("http://localhost:1/v1", answers, 1)


# --- the judge --------------------------------------------------------------------------------


def test_the_tokens_of_a_choice_add_up(server: StandIn, tmp_path: Path) -> None:
    llm = Endpoint(server.url, tmp_path / "answers.jsonl", 1)
    [row] = llm.choice_logprobs([ask("a", temperature=1.0)], DIGITS)
    assert [math.exp(x) for x in row] == pytest.approx([0.1, 0.2, 0.7])
    body = server.asked[0]
    asked = ("max_tokens", "temperature", "logprobs", "top_logprobs")
    assert [body[name] for name in asked] == [1, 0.0, True, 20]
    assert sum_choices(SURE[:3], DIGITS) == [] == sum_choices([], DIGITS)


@pytest.mark.parametrize("top", [None, SURE[:3]], ids=["no logprobs", "a digit missing"])
def test_votes_stand_in_for_what_a_server_does_not_tell(
    top: list[tuple[str, float]] | None, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    """Every third vote is 2, every third 1, the others cannot be read: the mean of the read is 1.5.

    The prompt "told" comes with all digits and is read in closed form.
    """
    count = iter(range(10**6))
    warnings.simplefilter("always")  # else Python itself would say it once

    def answer(body: Body) -> Body:
        if body["messages"][-1]["content"] == "told":
            return completion("2", SURE)
        if body.get("logprobs"):
            return completion("2", top)
        return completion(("2", "I give 1.", "no idea")[next(count) % 3])

    with serving(answer) as server:
        llm = Endpoint(server.url, tmp_path / "answers.jsonl", 1)
        roles = Roles(Side(llm, "m"), Side(llm, "judge"), Catalogue([]))
        prompts = [(Message("user", name),) for name in ("a", "told", "b")]
        first, told, last = roles.judge(prompts, Votes(0, 0.7), [1, 2, 3])
        assert told == closed_form([math.log(x) for x in (0.1, 0.2, 0.7)], 0.7)
        roles.judge([(Message("user", "c"),)], Votes(0, 0.7), [4])
    for score in (first, last):
        assert score.digit_probability is None and score.parse_rate in (0.65, 0.7)
        assert score.score == pytest.approx(1.5, abs=0.04) and score.label in (1, 2)
    votes = [x for x in server.asked if not x.get("logprobs")]
    assert len(votes) == 60 and len({x["seed"] for x in votes}) == 60
    assert {x["model"] for x in server.asked} == {"judge"}
    said = [str(x.message) for x in recwarn if "log-probabilities" in str(x.message)]
    assert len(said) == 1 and server.url in said[0]


@pytest.mark.parametrize("code", [400, 403, 422])
def test_votes_stand_in_for_what_a_server_refuses_to_tell_but_not_for_another_refusal(
    code: int, tmp_path: Path
) -> None:
    path = tmp_path / "answers.jsonl"
    with serving(lambda body: completion("2")) as server:
        llm = Endpoint(server.url, path, 1)
        roles = Roles(Side(llm, "m"), Side(llm, "m"), Catalogue([]))
        server.faults.append(refusal(code, "logprobs are not supported"))
        with pytest.warns(UserWarning, match="votes are sampled"):
            [score] = roles.judge([(Message("user", "a"),)], Votes(), [1])
        assert score.score == 2 and score.parse_rate == 1
        assert len(read_rows(path)) == len(server.asked) - 1, "the refusal is not kept"
        server.faults += [refusal(code, "too long")] * 2
        with pytest.raises(UserError, match="too long"):
            roles.judge([(Message("user", "b"),)], Votes(), [1])
        server.faults.append(refusal(401, "bad key"))
        with pytest.raises(UserError, match="bad key"):
            roles.judge([(Message("user", "c"),)], Votes(), [1])


def test_half_a_letter_of_a_cut_answer_breaks_nothing_later(tmp_path: Path) -> None:
    """A lone surrogate cannot be encoded: it would end the run again at each start."""
    with serving(lambda body: completion("Try Heat \ud83d")) as server:
        llm = Endpoint(server.url, tmp_path / "answers.jsonl", 1)
        (said,) = texts(llm, "a")
        assert said == "Try Heat ?" and seed_for(said)
        assert texts(llm, said) == [said]


@pytest.mark.parametrize("told", [{}, {"top_logprobs": None}, {"top_logprobs": []}])
def test_what_a_server_leaves_out_of_an_answer_is_empty_or_0(
    told: dict[str, Any], tmp_path: Path
) -> None:
    """A list of likeliest tokens that is missing, or none; counts that are none."""

    def answer(body: Body) -> Body:
        found = completion("2", SURE)
        found["choices"][0]["logprobs"]["content"] = [{"token": "2", "logprob": 0.0, **told}]
        return {**found, "usage": dict.fromkeys(found["usage"])}

    with serving(answer) as server:
        llm = Endpoint(server.url, tmp_path / "answers.jsonl", 1)
        with pytest.warns(UserWarning, match="votes are sampled"):
            assert llm.choice_logprobs([ask("a")], DIGITS) == [[]]
    assert (llm.usage.prompt_tokens, llm.usage.decoded_tokens) == (0, 0)


@pytest.mark.parametrize("odd", [None, -math.inf, math.nan])
def test_a_log_probability_that_is_no_number_is_not_told(odd: Any, tmp_path: Path) -> None:
    path, top = tmp_path / "answers.jsonl", [("0", -1.0), ("1", odd), ("2", -0.7)]
    with serving(lambda body: completion("2", top)) as server:
        with pytest.warns(UserWarning, match="votes are sampled"):
            assert Endpoint(server.url, path, 1).choice_logprobs([ask("a")], DIGITS) == [[]]
        assert read_rows(path)[0]["top"] == [["0", -1.0], ["2", -0.7]]


def test_votes_that_cannot_be_read_are_no_score(tmp_path: Path) -> None:
    with serving(lambda body: completion("I'm here to help")) as server:
        llm = Endpoint(server.url, tmp_path / "answers.jsonl", 8)
        roles = Roles(Side(llm, "m"), Side(llm, "m"), Catalogue([]))
        with pytest.warns(UserWarning, match="votes are sampled"):
            [score] = roles.judge([(Message("user", "a"),)], Votes(), [1])
    assert score == JudgeScore(parse_rate=0.0)


# --- names ------------------------------------------------------------------------------------


def test_a_servers_url_and_model_are_split_and_identify_it() -> None:
    assert split_address("http://h:8000/v1#org/name") == ("http://h:8000/v1", "org/name")
    assert split_address("https://[::1]:80#m#2") == ("https://[::1]:80", "m#2")
    names = ["http://h/v1#a", "http://h/v1#b", "http://h/v2#a", "none"]
    assert len({weights_digest(name, find_model) for name in names}) == 4


@pytest.mark.parametrize(
    "name",
    [
        "http://h/v1", "http://#m", "http://h/v1#", "http://h:PORT/v1#m", f"http://u:{KEY}@h/v1#m",
        f"https://h/v1?k={KEY}#m",
    ],
)  # fmt: skip
def test_a_malformed_address_is_refused_without_being_shown(name: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="expected URL#MODEL") as caught:
        weights_digest(name, find_model)
    assert KEY not in str(caught.value)


def test_sides_of_one_server_share_an_endpoint_and_load_nothing(tmp_path: Path) -> None:
    models = Models(ModelOptions("/no/such/model", in_flight=3), find_model, tmp_path / "a.jsonl")
    one = models.side("http://localhost:1/v1#base", "recommender")
    two = models.side("http://localhost:1/v1#user", "simulator")
    assert one.llm is two.llm and (one.adapter, two.adapter) == ("base", "user")
    assert one.llm.in_flight == 3 and list(models.engines) == ["http://localhost:1/v1"]
    with pytest.raises(UserError, match="--shard"):
        replace(models, sharded=True).side("http://localhost:1/v1#base", "recommender")


# --- the same weights, here and behind a server -----------------------------------------------


def by_engines(engines: dict[str, Engine]) -> Any:
    """Return the answers of our engines, by model name, as a server would give them."""
    lock = Lock()

    @torch.inference_mode()
    def answer(body: Body) -> Body:
        engine = engines[body["model"]]
        messages = tuple(Message(**x) for x in body["messages"])
        asked = Request(messages, Sampling(body["max_tokens"], body["temperature"]))
        with lock:
            if not body.get("logprobs"):
                return completion(engine.generate([asked])[0].text)
            ids = engine.prompt(asked, 1)
            _, [states] = engine.prefill([(None, ids)], [len(ids) - 1])
            best = engine.model.logits(states).float().log_softmax(-1)[-1].topk(20)
        decoded = [engine.tokenizer.decode([token]) for token in best.indices.tolist()]
        return completion("", list(zip(decoded, best.values.tolist(), strict=True)))

    return answer


def favour_digits(engine: Engine, prompts: list[tuple[Message, ...]]) -> None:
    """Move the digits' output weights so that they are likely after these prompts."""
    ids = [engine.prompt(Request(prompt), 1) for prompt in prompts]
    with torch.inference_mode():
        _, states = engine.prefill([(None, row) for row in ids], [len(row) - 1 for row in ids])
    mean = torch.cat(states).mean(0)
    for digit in DIGITS:
        [token, *_] = engine.variants(digit)[0]
        with torch.no_grad():
            engine.model.lm_head.weight[token] += 8 * mean / mean.dot(mean)


def test_a_search_is_the_same_here_and_behind_a_server(tmp_path: Path) -> None:
    engines = {}
    for name in ("rl", "user"):
        folder = write_small_model(tmp_path / name)
        options = ModelOptions(str(folder), dtype="float32", device="cpu")
        engines[name] = load_engine(options, find_model)
    dialogues = [talk("A comedy, please."), talk("Hi", "Old?", "Not too old."), talk("Dark films!")]
    said = [add_turn(x, "recommender", "Try Heat (1995).") for x in dialogues]
    favour_digits(engines["user"], [internal_judge_prompt(x, "Likes: dark.") for x in said])
    options = SearchOptions(
        samples=2,
        turns=2,
        temperature=0.0,
        rollout_temperature=0.0,
        max_new_tokens=8,
        summary_tokens=8,
    )
    here = Roles(Side(engines["rl"]), Side(engines["user"]), Catalogue([]))
    own = search(here, dialogues, [1, 2, 3], options)
    with serving(by_engines(engines)) as server:
        llm = Endpoint(server.url, tmp_path / "answers.jsonl", 4)
        there = Roles(Side(llm, "rl"), Side(llm, "user"), Catalogue([]))
        served = search(there, dialogues, [1, 2, 3], options)
    values = []
    for one, other in zip(own, served, strict=True):
        assert one.reply and (one.reply, one.profile) == (other.reply, other.profile)
        assert [x.reply for x in one.candidates] == [x.reply for x in other.candidates]
        values += [
            (x.value, y.value) for x, y in zip(one.candidates, other.candidates, strict=True)
        ]
        assert all(leaf.score.parse_rate is None for x in other.candidates for leaf in x.leaves)
    assert [x for x, _ in values] == pytest.approx([y for _, y in values], abs=1e-3)
    assert len({round(x, 2) for x, _ in values}) > 1


# --- the commands -----------------------------------------------------------------------------


def by_rule(body: Body) -> Body:
    """Return a reply, or a judge's opinion, that the request alone decides."""
    number = int.from_bytes(hashlib.blake2b(json.dumps(body).encode(), digest_size=4).digest())
    if body.get("logprobs"):
        shares = [(number >> 8 * i) % 9 + 1 for i in range(3)]
        return completion("", [(d, math.log(x / 30)) for d, x in zip(DIGITS, shares, strict=True)])
    return completion(f"I recommend {('Heat', 'Up', 'Alien')[number % 3]}.")


@pytest.fixture
def inputs(tmp_path: Path) -> dict[str, Any]:
    """Flags of a handful of rows, and of a local model that does not exist."""
    data = write_small_data(tmp_path / "data")
    return {"--model": "/no/such/model", "--data": data, "--dtype": "float32", **STAGE_FLAGS}


def wire(bodies: list[Body]) -> set[str]:
    return {json.dumps(body, sort_keys=True) for body in bodies}


def test_a_killed_stage_goes_on_and_pays_for_no_answer_again(
    inputs: dict[str, Any], tmp_path: Path
) -> None:
    """SIGKILL at the ninth request, when at most one other is in flight."""
    started, process = Event(), None

    def deadly(body: Body) -> Body:
        if len(server.asked) >= 9 and process.returncode is None:
            started.wait(60)
            os.kill(process.pid, signal.SIGKILL)
        return by_rule(body)

    with serving(deadly) as server:
        sides = ["--recommender", f"{server.url}#base", "--simulator", f"{server.url}#user"]
        command = ["--stages", "pairs", "--in-flight", "2", *sides, *flags(inputs)]
        here, whole = ["--run-dir", str(tmp_path / "run")], ["--run-dir", str(tmp_path / "whole")]
        process = subprocess.Popen([sys.executable, "train.py", *command, *here], cwd=ROOT)
        started.set()
        assert process.wait() == -signal.SIGKILL
        kept = len(read_answers(tmp_path / "run" / "answers.jsonl"))
        before = len(server.asked)
        assert kept >= 7 and not (tmp_path / "run" / "pairs.jsonl").exists()
        assert train.main([*command, *here]) == 0
        again = server.asked[before:]
        assert len(again) == len(wire(again)) == len(wire(server.asked)) - kept
        known = len(server.asked)
        assert train.main([*command, *here]) == 0 and len(server.asked) == known
        assert train.main([*command, *whole]) == 0
    for name in ("samples.jsonl", "pairs.jsonl"):
        content = [(tmp_path / run / name).read_bytes() for run in ("run", "whole")]
        assert content[0] == content[1] and content[0]
    for path in (tmp_path / "run").rglob("*"):
        assert path.is_dir() or KEY.encode() not in path.read_bytes(), path


def test_servers_alone_serve_pairs_and_report_without_a_local_model(
    inputs: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, methods = tmp_path / "run", ["--methods", "B/L", "SFT", "RL", "RL+SES"]
    with serving(by_rule) as server:
        sides = ["--recommender", f"{server.url}#base", "--simulator", f"{server.url}#user"]
        judge = ["--judge", f"{server.url}#outer"]
        command = ["--run-dir", str(run), *flags(inputs), *sides, *judge, "--stages"]
        assert train.main([*command, "pairs", *methods]) == 0
        before = len(server.asked)
        assert train.main([*command, "report", "--verbose", *methods]) == 0
        said = capsys.readouterr()
        assert {x["model"] for x in server.asked} == {"base", "sft", "rl", "user", "outer"}
        question = prompt_text("judge_external").split("{")[0]
        judged = [x["messages"][-1]["content"].startswith(question) for x in server.asked]
        judges = [(x["model"], y) for x, y in zip(server.asked, judged, strict=True)]
        assert ("user", True) in judges[:before] and ("user", True) not in judges[before:]
        assert ("outer", True) in judges[before:] and ("outer", False) not in judges
        facts = [read_json(run / "options" / f"{x}.json") for x in ("pairs", "report")]
        assert facts[0]["other-recommender"]["path"] == f"{server.url}#base"
        assert "other-judge" not in facts[0] and "other-judge" in facts[1]
        spent = {row["stage"]: row for row in read_rows(run / "timings.jsonl")}
        assert spent["report"]["decoded_tokens"] > 0 and "tokens decoded" in said.err
        assert said.out.endswith(f"{run} is ready\n"), "no adapter is there for infer.py"
        assert list(json.loads((run / "report.json").read_text())["methods"]) == methods[1:]
        other = [x.replace("#outer", "#base") for x in command]
        assert train.main([*other, "report", *methods]) == 2
        assert "was made with other-judge-path" in capsys.readouterr().err
        (run / "report.json").unlink()
        (run / "rows.jsonl").unlink()
        asked = len(server.asked)
        assert train.main([*command, "report", *methods]) == 0 and len(server.asked) == asked


def test_train_takes_a_server_alone_as_another_recommender(
    inputs: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["--run-dir", str(tmp_path / "run"), *flags(inputs), "--recommender", "rl"]
    assert train.main(command) == 2
    assert "recommender must be a server's URL#MODEL, got 'rl'" in capsys.readouterr().err


def test_infer_answers_through_a_server_without_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def load_engine(*options: object) -> None:
        raise AssertionError("a server needs no model here")

    monkeypatch.setattr(infer, "RUNS", tmp_path / "runs")
    monkeypatch.setattr(infer.loading, "load_engine", load_engine)
    with serving(by_rule) as server:
        command = ["--recommender", f"{server.url}#m", "--json", "--limit", "3"]
        assert infer.main(command) == 0
        rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        assert len(rows) == 3 and all(x["reply"].startswith("I recommend") for x in rows)
        assert infer.main([*command, "--ses", "--ses-turns", "1", "--limit", "1"]) == 0
        [row] = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        assert len(row["search"]["candidates"]) == 3
        assert {x["model"] for x in server.asked} == {"m"}
        judge = ["--judge", f"{server.url}#outer"]
        assert infer.main([*command, *judge, "--validate-simulator", "--limit", "2"]) == 0
        assert {x["model"] for x in server.asked} == {"m", "outer"}
        capsys.readouterr()
        assert infer.main([*command, *judge]) == 0
        assert "--judge has no effect without --validate-simulator" in capsys.readouterr().err
        assert infer.main([*command, "--rank", "3", "--limit", "1"]) == 2
        assert "cannot rank titles" in capsys.readouterr().err
