# SPDX-License-Identifier: Apache-2.0
"""The server over a real socket, by OpenAI's own client and by clients that misbehave."""

import concurrent.futures
import http.client
import json
import socket
import threading
import time

import pytest

from awq_jax.serving import Engine, Request
from awq_jax.serving.template import ChatTemplate
from awq_jax.serving.worker import Worker
from awq_jax_convert.tokenizer import Tokenizer
from tests.serving.conftest import TINY_LM

pytest.importorskip("starlette", reason="the server needs the extra [serve]")
uvicorn = pytest.importorskip("uvicorn", reason="the server needs the extra [serve]")

MAX_LEN, NEW = 96, 12
TEXTS = [f"{start} {i}" for i in range(16) for start in ("The list", "Return the", "A file of", "If")]


class Running:
    """A server in a thread, and the means to talk to it."""

    def __init__(self, served):
        from awq_jax.serving.server import application

        self.served = served
        self.socket = socket.socket()
        self.socket.bind(("127.0.0.1", 0))
        self.port = self.socket.getsockname()[1]
        config = uvicorn.Config(application(served), log_level="critical", timeout_graceful_shutdown=20)
        self.server = uvicorn.Server(config)
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [self.socket]})
        self.thread.start()
        while not self.server.started:
            time.sleep(0.01)

    def stop(self):
        self.server.should_exit = True
        self.thread.join(60)
        self.socket.close()
        assert not self.thread.is_alive()

    def connect(self, timeout=120):
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout)

    def post(self, body, path="/v1/completions", **headers):
        """(status, parsed body)."""
        connection = self.connect()
        raw = body if isinstance(body, bytes) else json.dumps(body).encode()
        connection.request("POST", path, raw, {"content-type": "application/json", **headers})
        response = connection.getresponse()
        read = response.read()
        connection.close()
        return response.status, json.loads(read) if read.startswith(b"{") else read

    def get(self, path):
        connection = self.connect()
        connection.request("GET", path)
        response = connection.getresponse()
        read = response.read().decode()
        connection.close()
        return response.status, read

    def wait_until_idle(self, seconds=60):
        engine = self.served.worker.engine
        end = time.monotonic() + seconds
        while (engine.running or engine.waiting) and time.monotonic() < end:
            time.sleep(0.02)
        assert engine.running == engine.waiting == 0


@pytest.fixture(scope="module")
def engine(shipped):
    return lambda: Engine(shipped.config, shipped.packed, slots=4, max_len=MAX_LEN, steps=4, queue=64)


@pytest.fixture(scope="module")
def served(engine, native):
    from awq_jax.serving.server import Limits, Served

    return Served(
        name="tiny",
        worker=Worker(engine()),
        tokenizer=Tokenizer.from_file(TINY_LM / "tokenizer.json"),
        template=ChatTemplate.of_checkpoint(native),
        limits=Limits(body_bytes=20_000, body_seconds=1.0),
    )


@pytest.fixture(scope="module")
def running(served):
    running = Running(served)
    yield running
    running.stop()


@pytest.fixture(scope="module")
def offline(engine, served):
    """What each text is continued with, by an engine without a server."""
    encode = served.tokenizer.encode
    requests = [Request(prompt=tuple(encode(text, special=True)), max_new_tokens=NEW) for text in TEXTS]
    return dict(zip(TEXTS, map(served.tokenizer.decode, engine().generate(requests)), strict=True))


@pytest.fixture
def client(running):
    openai = pytest.importorskip("openai", reason="pip install openai to try its client against the server")
    with openai.OpenAI(base_url=f"http://127.0.0.1:{running.port}/v1", api_key="none", max_retries=0) as client:
        yield client


def ask(text, **more):
    return {"model": "tiny", "prompt": text, "max_tokens": NEW, "temperature": 0, **more}


def test_openai_s_client_completes(client, offline):
    made = client.completions.create(**ask(TEXTS[0]))
    assert made.choices[0].text == offline[TEXTS[0]] and made.choices[0].finish_reason == "length"
    assert made.usage.completion_tokens == NEW
    assert [model.id for model in client.models.list()] == ["tiny"]


def test_openai_s_client_streams(client, offline):
    pieces = list(client.completions.create(**ask(TEXTS[1]), stream=True, stream_options={"include_usage": True}))
    assert len(pieces) > 3, "it comes in pieces"
    assert "".join(choice.text for piece in pieces for choice in piece.choices) == offline[TEXTS[1]]
    assert pieces[-1].usage.completion_tokens == NEW


def test_openai_s_client_chats(client, served, engine):
    messages = [{"role": "user", "content": "What is a list?"}]
    prompt = tuple(served.tokenizer.encode(served.template.render(messages)))
    (wanted,) = engine().generate([Request(prompt=prompt, max_new_tokens=NEW)])
    whole = client.chat.completions.create(model="tiny", messages=messages, max_tokens=NEW, temperature=0)
    stream = client.chat.completions.create(model="tiny", messages=messages, max_tokens=NEW, temperature=0, stream=True)
    streamed = "".join(choice.delta.content or "" for piece in stream for choice in piece.choices)
    assert whole.choices[0].message.content == streamed == served.tokenizer.decode(wanted)


def test_openai_s_client_reads_our_errors(client):
    openai = pytest.importorskip("openai", reason="pip install openai to try its client against the server")
    with pytest.raises(openai.BadRequestError, match="positions"):
        client.completions.create(**{**ask("a"), "max_tokens": 5000})


def test_64_clients_get_what_they_would_get_alone(running, offline):
    def one(text):
        status, body = running.post(ask(text))
        return status, body["choices"][0]["text"]

    with concurrent.futures.ThreadPoolExecutor(len(TEXTS)) as pool:
        answers = dict(zip(TEXTS, pool.map(one, TEXTS), strict=True))
    assert answers == {text: (200, made) for text, made in offline.items()}
    running.wait_until_idle()


def test_several_prompts_are_answered_in_order(running, offline):
    status, body = running.post(ask(TEXTS[:5]))
    assert status == 200 and [choice["text"] for choice in body["choices"]] == [offline[text] for text in TEXTS[:5]]


def test_a_seed_decides_a_draw(running):
    drawn = [running.post(ask(TEXTS[0], temperature=1.0, seed=seed))[1]["choices"][0]["text"] for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_a_stop_string_ends_the_text(running, offline):
    whole = offline[TEXTS[0]]
    stop = whole[len(whole) // 2 :][:3]
    _, body = running.post(ask(TEXTS[0], stop=stop))
    assert body["choices"][0] | {"text": whole[: whole.index(stop)], "finish_reason": "stop"} == body["choices"][0]


def begin_stream(running, text="The", tokens=80):
    """A connection on which an answer has begun."""
    connection = running.connect()
    body = json.dumps({"prompt": text, "max_tokens": tokens, "temperature": 0, "stream": True})
    connection.request("POST", "/v1/completions", body, {"content-type": "application/json"})
    response = connection.getresponse()
    assert response.status == 200 and response.readline().startswith(b"data: ")
    return connection, response


def test_clients_that_leave_give_their_slots_back(running, offline):
    before = running.served.worker.engine.counts["cancelled"]
    for _ in range(12):  # three times as many as there are slots
        connection, response = begin_stream(running)
        response.close()
        connection.close()
    running.wait_until_idle()
    assert running.served.worker.engine.counts["cancelled"] > before
    assert running.post(ask(TEXTS[3]))[1]["choices"][0]["text"] == offline[TEXTS[3]]


def test_readers_that_do_not_read_hold_no_slot(running, offline):
    held = [begin_stream(running) for _ in range(8)]
    assert running.post(ask(TEXTS[4]))[1]["choices"][0]["text"] == offline[TEXTS[4]]
    running.wait_until_idle()
    for connection, response in held:
        assert response.read().endswith(b"data: [DONE]\n\n")
        connection.close()


def test_large_bodies_are_refused_unread(running):
    assert running.post(ask("a" * 30_000))[0] == 413
    connection = running.connect()
    connection.putrequest("POST", "/v1/completions")
    for name, value in (("content-type", "application/json"), ("content-length", str(10**12))):
        connection.putheader(name, value)
    connection.endheaders()
    assert connection.getresponse().status == 413
    connection.close()


def test_slow_bodies_are_given_up(running):
    connection = running.connect(timeout=20)
    connection.putrequest("POST", "/v1/completions")
    for name, value in (("content-type", "application/json"), ("content-length", "100")):
        connection.putheader(name, value)
    connection.endheaders(b'{"prompt"')
    assert connection.getresponse().status == 408
    connection.close()


def test_browsers_of_other_sites_are_refused(running):
    assert running.post(ask("a"), **{"content-type": "text/plain"})[0] == 415
    assert running.post(ask("a"), host="evil.example")[0] == 400


@pytest.mark.parametrize(
    ("path", "change", "said"),
    [
        ("completions", {"temperature": float("nan")}, "temperature is nan"),
        ("completions", {"temperature": float("inf")}, "temperature is inf"),
        ("completions", {"top_p": float("nan")}, "top_p is nan"),
        ("completions", {"max_tokens": -3}, "max_tokens is -3"),
        ("completions", {"\ud800": 1}, r"\ud800=1 is not implemented here"),
        ("chat/completions", {"messages": [{"role": "wizard", "content": "a"}]}, 'role "wizard" is none of'),
    ],
)
def test_what_makes_no_sense_is_answered_and_the_next_is_served(running, offline, path, change, said):
    body = {name: value for name, value in ask(TEXTS[6]).items() if path == "completions" or name != "prompt"}
    status, answer = running.post({**body, **change}, f"/v1/{path}")
    assert status == 400 and said in answer["error"]["message"]
    assert answer["error"]["type"] == "invalid_request_error"
    assert running.get("/health")[0] == 200
    assert running.post(ask(TEXTS[6]))[1]["choices"][0]["text"] == offline[TEXTS[6]]


def test_only_this_machine_reaches_it(native, monkeypatch, capsys):
    from awq_jax.cli import main

    heard = []
    look = lambda server, sockets: heard.extend((one.family, one.getsockname()) for one in sockets)
    monkeypatch.setattr(uvicorn.Server, "run", look)
    monkeypatch.setattr(Engine, "compile", lambda engine: None)
    assert main(["serve", str(native), "--port", "0"]) == 0
    ((family, (host, port)),) = heard
    assert (family, host) == (socket.AF_INET, "127.0.0.1")
    assert f"http://127.0.0.1:{port}/v1" in capsys.readouterr().out


def test_a_taken_port_is_named_before_anything_is_read(native, capsys):
    from awq_jax.cli import main

    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        assert main(["serve", str(native), "--port", str(port)]) == 1
    said = capsys.readouterr().err
    assert f"port {port}: Address already in use; take another (--port), or 0" in said and "reading" not in said


def test_a_full_queue_says_so(running):
    held = [begin_stream(running, tokens=90) for _ in range(4)]
    engine = running.served.worker.engine
    engine.queue, queue = 0, engine.queue
    try:
        status, body = running.post(ask("a"))
    finally:
        engine.queue = queue
        for connection, response in held:
            response.close()
            connection.close()
    assert status == 429 and "try again later" in body["error"]["message"]
    running.wait_until_idle()


def test_health_and_metrics(running):
    running.wait_until_idle()
    assert running.get("/health") == (200, '{"status":"ok"}')
    status, text = running.get("/metrics")
    assert status == 200 and "awq_jax_running 0\n" in text and "# TYPE awq_jax_tokens_total counter" in text


def test_a_failing_step_ends_its_requests_and_no_others(running, offline):
    engine = running.served.worker.engine
    whole, engine._decode = engine._decode, lambda *_, **__: 1 / 0
    try:
        assert running.post(ask(TEXTS[5]))[0] == 500
    finally:
        engine._decode = whole
    assert running.post(ask(TEXTS[5]))[1]["choices"][0]["text"] == offline[TEXTS[5]]


def test_nothing_is_compiled_once_all_is(engine, prompts):
    ready = engine()
    ready.compile()
    programs = ready._prefill, ready._decode
    before = [program._cache_size() for program in programs]
    requests = [Request(prompt=prompt, max_new_tokens=n) for prompt, n in zip(prompts, (1, 40, 7, 20), strict=True)]
    assert all(ready.generate(requests)) and [program._cache_size() for program in programs] == before


def test_shutting_down_finishes_what_is_under_way(engine, served):
    import dataclasses

    again = Running(dataclasses.replace(served, worker=Worker(engine())))
    connection, response = begin_stream(again, tokens=60)
    again.server.should_exit = True
    assert response.read().endswith(b"data: [DONE]\n\n")
    connection.close()
    again.stop()
    assert not again.served.worker.alive
