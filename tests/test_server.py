"""The server as OpenAI's own client sees it, over a small random model."""

import asyncio
import json
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

openai = pytest.importorskip("openai")
uvicorn = pytest.importorskip("uvicorn")
pytest.importorskip("starlette")

from scripted import talk  # noqa: E402
from small_run import write_small_model  # noqa: E402
from stand_in import completion, refusal, serving  # noqa: E402

import infer  # noqa: E402
from usbrec.answering import Recommender, ReplyOptions  # noqa: E402
from usbrec.chat import Reply, Request, Sampling  # noqa: E402
from usbrec.crs.agents import Roles, Side  # noqa: E402
from usbrec.crs.datasets import ROOT, load_catalogue  # noqa: E402
from usbrec.crs.dialogue import from_viewpoint  # noqa: E402
from usbrec.crs.ses import SearchOptions  # noqa: E402
from usbrec.extras import server  # noqa: E402
from usbrec.llm.endpoint import Endpoint  # noqa: E402
from usbrec.loading import ModelOptions, load_engine  # noqa: E402

HELLO = [{"role": "user", "content": "A comedy, please."}]
LATER = [
    *HELLO, {"role": "assistant", "content": "Old?"}, {"role": "user", "content": "No, a new one."}
]  # fmt: skip
WARM = {"temperature": 1.0, "max_tokens": 12}
SHORT = [
    "--max-new-tokens", "12", "--temperature", "1", "--ses-samples", "2", "--ses-turns", "2",
    "--ses-max-new-tokens", "6", "--ses-summary-tokens", "6", "--ses-temperature", "1",
]  # fmt: skip
SEARCHING = SearchOptions(
    samples=2, turns=2, max_new_tokens=6, summary_tokens=6, temperature=1.0
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_small_model(tmp_path_factory.mktemp("place") / "model")


@pytest.fixture
def recommender(folder: Path) -> Recommender:
    """What infer.py assembles with the flags SHORT."""
    engine = load_engine(ModelOptions(model=str(folder), dtype="float32", device="cpu"), Path)
    roles = Roles(Side(engine), Side(engine), load_catalogue("sample"))
    return Recommender(roles, [engine], ReplyOptions(), Sampling(12, 1.0), SEARCHING, False)


@dataclass
class Running:
    """A server in this process, a client of it, and what its engine was asked."""

    api: server.Api
    client: Any
    calls: list[list[Request]] = field(default_factory=list)
    entered: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    arrived: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    gate: threading.Event = field(default_factory=threading.Event)

    def ask(self, model: str = "recommender", messages: Any = HELLO, **more: Any) -> Any:
        return self.client.chat.completions.create(model=model, messages=messages, **more)

    def text(self, *args: Any, **more: Any) -> str:
        return self.ask(*args, **more).choices[0].message.content

    def pieces(self, *args: Any, **more: Any) -> list[str]:
        chunks = list(self.ask(*args, **more, stream=True))
        return [chunk.choices[0].delta.content or "" for chunk in chunks]


@contextmanager
def served(recommender: Recommender) -> Iterator[Running]:
    """Serve on a free port until the block ends."""
    api = server.Api(recommender)
    door = socket.create_server(("127.0.0.1", 0))
    url = f"http://127.0.0.1:{door.getsockname()[1]}/v1"
    client = openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=60)
    web = uvicorn.Server(uvicorn.Config(api.app, log_level="critical"))
    thread = threading.Thread(target=web.run, args=([door],))
    thread.start()
    try:
        yield Running(api, client)
    finally:  # a test that fails must not leave the thread
        client.close()
        web.should_exit = True
        thread.join()
        api.thread.shutdown()


@pytest.fixture
def running(recommender: Recommender, monkeypatch: pytest.MonkeyPatch) -> Iterator[Running]:
    """A server whose engine waits at `gate`, which is open at first."""
    engine = recommender.engines[0]
    plain = engine.generate

    def generate(requests: Sequence[Request]) -> list[Reply]:
        found.calls.append(list(requests))
        found.entered.release()
        assert found.gate.wait(60)
        return plain(requests)

    class Counted(list[server.Job]):
        """The jobs that wait, and a count of those that arrived."""

        def append(self, job: server.Job) -> None:
            super().append(job)
            found.arrived.release()

    with served(recommender) as found:
        found.gate.set()
        monkeypatch.setattr(engine, "generate", generate)
        monkeypatch.setattr(found.api, "waiting", Counted())
        yield found
        found.gate.set()


def said_by_infer(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], messages: Any, *flags: str
) -> str:
    """Return the reply of `infer.py --dialogue` with the flags SHORT."""
    path = tmp_path / "dialogue.json"
    path.write_text(json.dumps({"messages": messages}), "utf-8")
    model = ["--model", str(folder), "--dtype", "float32", "--device", "cpu"]
    assert infer.main([*model, *SHORT, "--dialogue", str(path), "--json", *flags]) == 0
    return json.loads(capsys.readouterr().out)["reply"]


# --- replies ----------------------------------------------------------------------------------


def test_both_models_are_listed(running: Running) -> None:
    assert [model.id for model in running.client.models.list()] == [
        "recommender", "recommender-ses"
    ]  # fmt: skip


@pytest.mark.parametrize("messages", [HELLO, LATER])
def test_both_models_say_what_infer_says(
    running: Running,
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    messages: Any,
) -> None:
    """A plain reply and a searched one, with infer.py's seed and with another."""

    def infers(*flags: str) -> str:
        return said_by_infer(folder, tmp_path, capsys, messages, *flags)

    assert running.text(messages=messages) == infers()
    assert running.text(messages=messages, seed=3) == infers("--seed", "3") != infers()
    assert running.text("recommender-ses", messages) == infers("--ses")
    assert running.text("recommender-ses", messages, seed=3) == infers("--ses", "--seed", "3")


def test_a_reply_has_openais_form(running: Running, recommender: Recommender) -> None:
    found = running.ask()
    assert (found.object, found.model) == ("chat.completion", "recommender")
    [choice] = found.choices
    assert (choice.index, choice.message.role) == (0, "assistant")
    [[request]] = running.calls
    engine = recommender.engines[0]
    [reply] = engine.generate([request])
    assert choice.finish_reason == ("stop" if reply.finished else "length")
    assert found.usage.prompt_tokens == len(engine.tokenizer.prompt(request.messages))
    assert found.usage.completion_tokens == len(reply.token_ids)
    assert found.usage.total_tokens == found.usage.prompt_tokens + len(reply.token_ids)
    assert running.ask(max_tokens=1).choices[0].finish_reason == "length"
    assert running.ask(max_tokens=1).id != found.id


@pytest.mark.parametrize("model", server.SERVED)
def test_the_pieces_of_a_stream_join_to_the_plain_reply(running: Running, model: str) -> None:
    """A plain reply comes in several."""
    text = running.text(model, LATER)
    pieces = running.pieces(model, LATER)
    assert "".join(pieces) == text and len(text) > 1
    assert model == server.SEARCHED or len([x for x in pieces if x]) > 2
    chunks = list(running.ask(model, LATER, stream=True))
    *others, last = chunks
    assert [x.choices[0].delta.role for x in chunks] == ["assistant", *[None] * len(others)]
    assert {(x.id, x.object) for x in chunks} == {(last.id, "chat.completion.chunk")}
    assert all(x.choices[0].finish_reason is None for x in others)
    whole = running.ask(model, LATER)
    assert last.choices[0].finish_reason == whole.choices[0].finish_reason
    assert last.usage == whole.usage


def test_openais_helper_puts_the_chunks_together(running: Running) -> None:
    text = running.text(seed=1)
    how: Any = {"model": "recommender", "messages": HELLO, "seed": 1, "stop": text[3:5]}
    with running.client.chat.completions.stream(**how) as stream:
        [choice] = stream.get_final_completion().choices
    assert choice.message.content == running.text(seed=1, stop=text[3:5])
    assert (choice.message.role, choice.finish_reason) == ("assistant", "stop")


def test_an_empty_reply_has_its_tokens_counted(
    running: Running, recommender: Recommender, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recommender.engines[0], "generate", lambda x: [Reply("", (), True, 5)])
    usage = running.ask().usage
    assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (5, 0, 5)


def test_the_fields_of_a_request_shape_its_reply(running: Running) -> None:
    """They are the sampling of the engine's request; what is left out is as the flags say."""
    text = running.text(seed=1)
    assert running.text(seed=1, stop=text[3:5]) == text[: text.index(text[3:5])].strip()
    assert "".join(running.pieces(seed=1, stop=[text[3:5]])) == running.text(seed=1, stop=text[3:5])
    running.calls.clear()
    running.ask(temperature=0.5, top_p=0.25, max_tokens=3, stop=["a", "b"])
    running.ask(
        max_completion_tokens=4, n=1, logprobs=False, frequency_penalty=0, user="me", tools=[]
    )
    running.ask(extra_body={"top_k": 7, "min_p": 0.1, "tools": None})
    running.ask()
    assert [call[0].sampling for call in running.calls] == [
        Sampling(3, 0.5, top_p=0.25, stop=("a", "b")), Sampling(4, 1.0),
        Sampling(12, 1.0, top_k=7, min_p=0.1), Sampling(12, 1.0),
    ]  # fmt: skip
    running.calls.clear()
    running.ask("recommender-ses", temperature=0, max_tokens=3, top_p=1)
    first = [x.sampling for x in running.calls[0][1:]]
    assert first == [Sampling(3, 0)] * SEARCHING.samples


def test_a_server_can_recommend_for_this_server(tmp_path: Path) -> None:
    """Its reply is passed on, and its seed of 31 bits comes from ours; tokens are not counted."""
    with serving(lambda body: completion(f"{body['model']}: {body['seed'] < 2**31}")) as other:
        side = Side(Endpoint(other.url, tmp_path / "answers.jsonl", 4), "sft")
        roles, how = Roles(side, side, load_catalogue("sample")), Sampling(12, 1.0)
        with served(Recommender(roles, [side.llm], ReplyOptions(), how, SEARCHING, False)) as found:
            reply = found.ask()
            assert reply.choices[0].message.content == "sft: True" and reply.usage is None
            assert "".join(found.pieces()) == "sft: True"
            other.faults += [refusal(404, "no such model")] * 9
            with pytest.raises(openai.InternalServerError, match="no such model") as fault:
                found.ask(messages=LATER)
            assert fault.value.status_code == 502
    assert other.asked[0]["messages"][1:] == HELLO


# --- many clients -----------------------------------------------------------------------------


def together(running: Running, asks: Sequence[Callable[[], Any]]) -> list[Any]:
    """Return what the calls return, all made while the engine is busy with another reply."""
    running.gate.clear()
    running.entered, running.arrived = threading.Semaphore(0), threading.Semaphore(0)
    with ThreadPoolExecutor(len(asks) + 1) as clients:
        first = clients.submit(running.ask, messages=talk_messages("Hello?"))
        assert running.entered.acquire(timeout=60) and running.arrived.acquire(timeout=60)
        running.calls.clear()
        found = []
        for ask in asks:
            found.append(clients.submit(ask))
            assert running.arrived.acquire(timeout=60)
        running.gate.set()
        assert first.result()
        return [each.result() for each in found]


def talk_messages(*lines: str) -> list[dict[str, str]]:
    said = from_viewpoint(talk(*lines), "recommender")
    return [{"role": x.role, "content": x.content} for x in said]


def test_clients_that_wait_share_a_batch_and_no_reply_depends_on_it(running: Running) -> None:
    """Plain and streamed replies of several samplings are one call of the engine."""
    asks = [
        lambda: [running.text(seed=1)],
        lambda: running.pieces(messages=LATER),
        lambda: [running.text(messages=LATER, temperature=0.5, max_tokens=4)],
        lambda: running.pieces(seed=2, stop="never"),
    ]
    found = together(running, asks)
    assert [len(call) for call in running.calls] == [4]
    texts = ["".join(pieces) for pieces in found]
    assert texts == ["".join(ask()) for ask in asks] and len(set(texts)) == 4
    assert all(len([x for x in found[i] if x]) > 2 for i in (1, 3))


def test_searches_of_equal_options_share_their_calls(running: Running) -> None:
    def ask(**more: Any) -> Callable[[], str]:
        return lambda: running.text("recommender-ses", **more)

    ask(seed=1)()
    alone, running.calls[:] = len(running.calls), []
    asks = [ask(seed=1), ask(messages=LATER), ask(seed=1, max_tokens=3)]
    found = together(running, asks)
    assert len(running.calls) == 2 * alone
    assert found == [ask() for ask in asks]


def test_a_chunk_is_the_most_that_is_asked_together(
    running: Running, recommender: Recommender
) -> None:
    recommender.options = replace(recommender.options, chunk_size=2)
    found = together(running, [lambda i=i: running.text(seed=i) for i in range(5)])
    assert [len(call) for call in running.calls] == [2, 2, 1]
    assert len(set(found)) == 5


def test_a_fault_costs_the_neighbours_nothing(running: Running, recommender: Recommender) -> None:
    """A reply that the model has no room for shares a call with two others."""

    def too_long() -> str:
        with pytest.raises(openai.BadRequestError, match="exceed the limit of 2048"):
            running.ask(max_tokens=2048)
        return "refused"

    asks = [lambda: running.text(seed=1), too_long, lambda: running.text(messages=LATER)]
    found = together(running, asks)
    assert [len(call) for call in running.calls] == [3, 1, 1, 1]
    assert found == [ask() for ask in asks]
    with pytest.raises(openai.BadRequestError, match="exceed the limit of 2048"):
        running.ask(max_tokens=2048, stream=True)


def test_too_many_clients_are_turned_away(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "WAITING", 2)

    def turned_away() -> str:
        with pytest.raises(openai.InternalServerError, match="2 requests wait") as fault:
            running.ask(stream=True)
        running.arrived.release()
        assert fault.value.status_code == 503
        assert int(fault.value.response.headers["retry-after"]) > 0
        return "503"

    running.gate.clear()
    with ThreadPoolExecutor(3) as clients:
        first = clients.submit(running.text)
        assert running.entered.acquire(timeout=60) and running.arrived.acquire(timeout=60)
        waiting = []
        for seed in (1, 2):
            waiting.append(clients.submit(running.text, seed=seed))
            assert running.arrived.acquire(timeout=60)
        assert turned_away() == "503"
        running.gate.set()
        assert first.result() and all(each.result() for each in waiting)
    assert running.text()


# --- faults -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "told"),
    [
        ({"model": "recommender"}, "list of messages"),
        ({"messages": []}, "end with a line of the seeker's"),
        ({"messages": [HELLO[0], {"role": "assistant", "content": "Hi."}]}, "end with a line"),
        ({"messages": [{"role": "system", "content": "Be brief."}, *HELLO]}, "'system'"),
        ({"messages": [{"role": "user", "content": None}]}, "content"),
        ({"messages": "Hello"}, "list of messages"),
        ({"messages": {"messages": HELLO}}, "list of messages"),
        ({"messages": HELLO, "temperature": -1}, "temperature must be at least 0, got -1"),
        ({"messages": HELLO, "temperature": "hot"}, "temperature must be"),
        ({"messages": HELLO, "top_p": 0}, "top_p must be"),
        ({"messages": HELLO, "max_tokens": 0}, "must be at least 1, got 0"),
        ({"messages": HELLO, "stop": ""}, "stop must be"),
        ({"messages": HELLO, "stop": [5]}, "stop must be"),
        ({"messages": HELLO, "stop": 5}, "stop must be"),
        ({"messages": HELLO, "seed": -1}, "seed must be at least 0, got -1"),
        ({"messages": HELLO, "seed": "one"}, "seed must be"),
        ({"messages": HELLO, "top_k": -1}, "top_k must be at least 0, got -1"),
        ({"messages": HELLO, "n": 2}, "n has no effect"),
        ({"messages": HELLO, "max_new_tokens": 2}, "max_new_tokens has no effect"),
        ({"messages": HELLO, "stop_ids": [2]}, "stop_ids has no effect"),
        ({"messages": HELLO, "logprobs": True}, "logprobs has no effect"),
        ({"messages": HELLO, "top_logprobs": 3}, "top_logprobs has no effect"),
        ({"messages": HELLO, "tools": [{}]}, "tools has no effect"),
        ({"messages": HELLO, "model": "recommender-ses", "stop": "x"}, "stop has no effect on"),
        ({"messages": HELLO, "model": "recommender-ses", "top_p": 0.5}, "top_p has no effect on"),
    ],
)
def test_a_bad_body_is_an_error_of_openais_form(
    running: Running, body: dict[str, Any], told: str
) -> None:
    with pytest.raises(openai.BadRequestError) as fault:
        running.client.post(
            "/chat/completions", body={"model": "recommender", **body}, cast_to=object
        )
    assert told in fault.value.body["message"]
    assert fault.value.body["type"] == "invalid_request_error"
    assert running.calls == []


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\xff", b"[" * 100_000, b'"\\ud800"'])
def test_a_body_that_is_no_json_object_is_refused(running: Running, content: bytes) -> None:
    with pytest.raises(openai.BadRequestError):
        running.client.post("/chat/completions", content=content, cast_to=object)


@pytest.mark.parametrize("model", ["gpt-5", "", 5, ["recommender"]])
def test_an_unknown_model_is_not_found(running: Running, model: Any) -> None:
    with pytest.raises(openai.NotFoundError, match="only recommender and recommender-ses"):
        running.ask(model)


def test_an_unknown_page_is_an_error_of_openais_form(running: Running) -> None:
    with pytest.raises(openai.NotFoundError) as fault:
        running.client.embeddings.create(model="recommender", input="x")
    assert fault.value.body["type"] == "invalid_request_error"


def test_a_fault_of_ours_is_an_error_and_the_server_goes_on(
    running: Running, recommender: Recommender, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The prefix cache holds tokens that were not computed: none of them is used."""
    engine = recommender.engines[0]
    text, later = running.text(), running.text(messages=LATER)
    engine.clear_cache()

    def broken(*args: Any) -> Any:
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(engine.model, "forward", broken)
        with pytest.raises(openai.InternalServerError, match="out of memory") as fault:
            running.ask(messages=LATER)
    assert fault.value.status_code == 500
    assert running.text(messages=LATER) == later
    assert running.text() == text


def test_a_client_that_leaves_in_the_middle_of_its_request_is_no_fault_of_ours(
    recommender: Recommender,
) -> None:
    """A fault of ours would be raised, for the log."""

    async def receive() -> dict[str, str]:
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        assert message["type"].startswith("http.response")

    scope = {"type": "http", "method": "POST", "path": "/v1/chat/completions", "headers": []}
    asyncio.run(server.Api(recommender).app(scope, receive, send))


# --- the command ------------------------------------------------------------------------------


def test_without_its_packages_the_server_says_how_to_get_them(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    monkeypatch.delitem(sys.modules, "usbrec.extras.server")
    assert infer.main(["--serve", "--model", str(folder)]) == 2
    assert "pip install starlette uvicorn" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--serve", "--port", "70000"], "--port must be"),
        (["--serve", "--limit", "0"], "--limit chooses rows: not with"),
        (["--serve", "--ses"], "--ses has no effect with --serve"),
        (["--serve", "--ses-start-turn", "2"], "--ses-start-turn has no effect with --serve"),
        (["--serve", "--json"], "--json has no effect with --serve"),
        (["--serve", "--chat"], "not allowed with"),
        (["--serve", "--out", "x.jsonl"], "--out has no effect with --serve"),
        (["--serve", "--trace", "x.html"], "--trace has no effect with --serve"),
        (["--serve", "--judge", "none"], "--judge has no effect with --serve"),
        (["--port", "8000"], "--port has no effect without --serve"),
    ],
)
def test_a_wrong_flag_is_one_sentence(
    folder: Path, capsys: pytest.CaptureFixture[str], flags: list[str], told: str
) -> None:
    model = ["--model", str(folder), "--dtype", "float32", "--device", "cpu"]
    assert infer.main([*model, *flags]) == 2
    assert told in capsys.readouterr().err.splitlines()[-1]


def test_a_port_that_is_taken_is_one_sentence(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as door:
        port = str(door.getsockname()[1])
        model = ["--model", str(folder), "--dtype", "float32", "--device", "cpu"]
        assert infer.main([*model, "--serve", "--port", port]) == 2
    assert port in capsys.readouterr().err.splitlines()[-1]


@contextmanager
def started(folder: Path) -> Iterator[tuple[subprocess.Popen[str], Any]]:
    """Start the command on a free port; give it and a client of it."""
    command = [sys.executable, str(ROOT.parent / "infer.py"), "--serve", "--port", "0"]
    model = ["--model", str(folder), "--dtype", "float32", "--device", "cpu", "--kv-memory", "0.1"]
    with subprocess.Popen([*command, *model], stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        try:
            told = next(line for line in process.stderr if "http://" in line)
            url = next(word for word in told.split() if word.startswith("http://"))
            with openai.OpenAI(base_url=url, api_key="none", max_retries=0) as client:
                yield process, client
        finally:
            process.kill()


def end_of(process: subprocess.Popen[str]) -> str:
    """Return what the command says on stderr up to its end, which is Ctrl-C's."""
    assert process.stderr is not None
    told = process.stderr.read()
    assert process.wait() == 130 and "Traceback" not in told
    return told


def test_the_command_serves_until_ctrl_c(folder: Path) -> None:
    with started(folder) as (process, client):
        found = client.chat.completions.create(model="recommender", messages=HELLO)
        assert found.choices[0].message.content is not None
        process.send_signal(signal.SIGINT)
        assert "stopped" in end_of(process)


def test_a_reply_that_has_begun_is_ended_after_ctrl_c(folder: Path) -> None:
    """Its 600 greedy tokens have hardly begun when the signal comes; no later client is heard."""
    with started(folder) as (process, client):
        how: Any = {"model": "recommender", "messages": HELLO, "max_tokens": 600}
        with client.chat.completions.create(**how, stream=True) as chunks:
            first = next(chunks)
            process.send_signal(signal.SIGINT)
            *_, last = chunks
        assert first.choices[0].finish_reason is None
        assert last.choices[0].finish_reason == "length" and last.usage.completion_tokens == 600
        with pytest.raises(openai.APIConnectionError):
            client.models.list()
        end_of(process)
