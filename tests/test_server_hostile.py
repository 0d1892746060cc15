"""Clients of the example server that say nothing, half of something or too much, that do not read, and its end in order."""

import asyncio
import contextlib
import importlib.util
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

if any(importlib.util.find_spec(name) is None for name in ("fastapi", "uvicorn", "prometheus_client", "httpx")):
    pytest.skip("the server's packages are not installed (pip install kvcache[server,test])", allow_module_level=True)

import httpx
from support.serving import TEXT, body, engine_of, running, server, server_load
from support.t3_models import tiny_t3
from support.waiting import until

from kvcache_chatterbox import SpeechScheduler

import server_options  # isort: skip
from server_errors import LONGEST_MESSAGE  # isort: skip
from server_guard import Gate, Guard, Limits, is_ours  # isort: skip

pytestmark = pytest.mark.one_release

ROOT = Path(__file__).resolve().parent.parent
POST = b"POST /v1/audio/speech HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"


async def hello(scope, receive, send):
    """What connections do not care about: an app."""
    if scope["type"] == "http":
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"5")]})
        await send({"type": "http.response.body", "body": b"hello"})


@contextlib.contextmanager
def greeting(limits):
    """Host and port of a server that says hello, and the server."""
    gate = Gate()
    with running(Guard(hello, gate=gate, limits=limits), gate, limits) as (url, runner):
        yield address_of(url), runner


@pytest.fixture(scope="module")
def patient():
    """A server with little room, and time."""
    with greeting(Limits(connections=8)) as found:
        yield found


@pytest.fixture(scope="module")
def quick():
    """A server that waits for nobody."""
    with greeting(Limits(head_seconds=0.3, body_seconds=0.3)) as found:
        yield found


@contextlib.contextmanager
def speaking(limits, t3=None, **options):
    """Host and port of a server that speaks, and the server; by default its texts end by themselves."""
    engine = engine_of(server_load.tiny() if t3 is None else t3)
    app = server.create_app(SpeechScheduler(engine, **options), engine.voices, limits=limits)
    with running(app, app.state.gate, limits) as (url, runner):
        yield address_of(url), runner


def address_of(url):
    return ("127.0.0.1", int(url.rpartition(":")[2]))


@contextlib.contextmanager
def connected(address, count, sends=b""):
    """So many connections that send this and no more."""
    with contextlib.ExitStack() as opened:
        sockets = [opened.enter_context(socket.create_connection(address, timeout=30)) for _ in range(count)]
        for one in sockets:
            one.sendall(sends)
        yield sockets


def left(one):
    """All that a server sends until it closes."""
    got = b""
    with contextlib.suppress(ConnectionResetError):
        while piece := one.recv(65536):
            got += piece
    return got


def healthy(address):
    with connected(address, 1, b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n") as (one,):
        return left(one).startswith(b"HTTP/1.1 200")


def error_of(answer):
    """Status and message of an error object that came over a socket."""
    head, _, said = answer.partition(b"\r\n\r\n")
    return int(head.split()[1]), json.loads(said)["error"], head.decode().lower()


# ---------------------------------------------------------------------- S6: who says nothing


@pytest.mark.parametrize(
    "sends",
    [b"", b"GET / HT", POST, POST + b"Content-Length: 50\r\n\r\n{", POST + b"Transfer-Encoding: chunked\r\n\r\n5\r\n"],
    ids=["silent", "half a line", "half a head", "half a body", "half a chunk"],
)
def test_s6_silence_keeps_nobody_out(sends, patient):
    address, runner = patient
    with connected(address, 40, sends) as sockets:
        until(lambda: len(runner.server_state.connections) == 8)
        assert healthy(address)  # though each of them has its time before it
        assert left(sockets[0]) == b""  # the first have made room
        assert len(runner.server_state.connections) <= 8


@pytest.mark.parametrize("sends", [b"", b"GET / HT", POST], ids=["silent", "half a line", "half a head"])
def test_s6_who_owes_a_head_is_closed_in_time(sends, quick):
    address, runner = quick
    with connected(address, 4, sends) as sockets:
        assert [left(one) for one in sockets] == [b""] * 4
        until(lambda: not runner.server_state.connections)


def test_s6_who_owes_a_body_is_told_so(quick):
    with connected(quick[0], 1, POST + b"Content-Length: 50\r\n\r\n{") as (one,):
        status, error, head = error_of(left(one))
        assert (status, error["code"]) == (408, "slow") and "0.3 s" in error["message"]
        assert "connection: close" in head


def test_s6_a_trickle_is_not_a_request(quick):
    """Each byte in time, the whole never."""
    address, runner = quick
    with connected(address, 2) as (head, body):
        body.sendall(POST + b"Content-Length: 50000\r\n\r\n")

        def gone():
            for one in (head, body):
                with contextlib.suppress(OSError):
                    one.sendall(b"x" if one is body else b"G")
            return not runner.server_state.connections

        until(gone, 10)


def test_s6_who_was_answered_has_to_ask_again_in_time(quick):
    with connected(quick[0], 1, b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\nG") as (one,):
        assert left(one).startswith(b"HTTP/1.1 200")


def test_s6_who_does_not_read_is_cut():
    """More than the system's buffers hold, into a connection that nobody reads; what ends the stream is as if it were gone."""
    ended = threading.Event()

    async def endless(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})
        while (await receive())["type"] == "http.request":
            for _ in range(64):
                await send({"type": "http.response.body", "body": bytes(2**20), "more_body": True})
        ended.set()

    limits = Limits(unread_seconds=0.3)
    with running(endless, Gate(), limits) as (url, runner):
        address = ("127.0.0.1", int(url.rpartition(":")[2]))
        with connected(address, 1, b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"):
            assert ended.wait(20)
            until(lambda: not runner.server_state.connections)


@pytest.mark.parametrize(
    "sends",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n",  # TLS
        b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + b"x" * 60_000 + b"\r\n\r\n",
        b"GET /" + b"x" * 60_000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: localhost\r\n" + b"X: x\r\n" * 10_000 + b"\r\n",
        b"GET / HTTP/1.1\r\n\r\n",
        POST + b"Content-Length: no\r\n\r\n",
        POST + b"Content-Length: " + b"9" * 5000 + b"\r\n\r\n",
        POST + b"Transfer-Encoding: chunked\r\n\r\nZZZ\r\n",
    ],
    ids=["tls", "a header", "a path", "headers", "no host", "a length", "digits", "a chunk"],
)
def test_s6_what_is_no_http_is_told_so(sends, patient, caplog):
    address, _ = patient
    with connected(address, 1, sends) as (one,):
        status, error, head = error_of(left(one))
        assert status in (400, 431) and error["type"] == "invalid_request_error"
        assert "connection: close" in head
        assert healthy(address)
    assert sum(len(record.getMessage()) for record in caplog.records if record.name.startswith("uvicorn")) < 1000
    assert not [record for record in caplog.records if record.exc_info]


def test_s6_room_is_below_the_limit_of_open_files(monkeypatch):
    import resource

    assert Limits().descriptors <= 1024  # what a system allows at first
    monkeypatch.setattr(resource, "getrlimit", lambda which: (100, 900))
    asked = []
    monkeypatch.setattr(resource, "setrlimit", lambda which, limits: asked.append(limits))
    assert server_options.allow_files(500) == 500 and asked == [(500, 900)]
    assert server_options.allow_files(2000) == 900 and asked[1:] == [(900, 900)]
    monkeypatch.setattr(resource, "getrlimit", lambda which: (1000, 1000))
    assert server_options.allow_files(2000) == 1000 and len(asked) == 2
    monkeypatch.setitem(sys.modules, "resource", None)  # Windows has none
    assert server_options.allow_files(2000) == 2000


# ---------------------------------------------------------------------- S7: the end


def test_s7_who_has_heard_nothing_is_told_at_once_and_streams_end_in_the_grace():
    """One that is heard, one that waits for its row, one within its body; then the end, of which SIGTERM sets the flag."""
    limits = Limits(grace_seconds=2)
    with speaking(limits, tiny_t3("english"), max_rows=1) as (address, runner):
        asked = json.dumps(body(" ".join([TEXT] * 40))).encode()
        whole = POST + b"Content-Length: %d\r\n\r\n" % len(asked) + asked
        with connected(address, 3) as (heard, waits, writes):
            heard.sendall(whole)
            begun = heard.recv(100_000)
            assert begun.startswith(b"HTTP/1.1 200")
            waits.sendall(whole)
            until(lambda: int(figures_now(address)["kvcache_waiting"]) == 1)
            writes.sendall(whole[:-5])
            until(lambda: len(runner.server_state.tasks) == 3)
            begin = time.perf_counter()
            runner.should_exit = True
            for one in (waits, writes):
                status, error, head = error_of(left(one))
                assert (status, error["code"], error["type"]) == (503, "closing", "server_error")
                assert re.search("retry-after: [0-9]+", head) and "connection: close" in head
            assert len(runner.server_state.connections) == 1  # that one's, which is heard on
            assert len(rest := left(heard)) > 0 and not rest.endswith(b"0\r\n\r\n")  # cut short, which a client notices
            assert time.perf_counter() - begin >= limits.grace_seconds
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(address, timeout=5)


def test_s7_a_stream_that_ends_in_the_grace_is_whole():
    with speaking(Limits(grace_seconds=30), max_rows=1) as (address, runner), connected(address, 1) as (heard,):
        asked = json.dumps(body()).encode()
        heard.sendall(POST + b"Content-Length: %d\r\n\r\n" % len(asked) + asked)
        begun = heard.recv(100)
        runner.should_exit = True
        assert (begun + left(heard)).endswith(b"0\r\n\r\n")


def figures_now(address):
    async def ask():
        async with httpx.AsyncClient(base_url=f"http://{address[0]}:{address[1]}") as http:
            return await server_load.gauges(http)

    return asyncio.run(ask())


# ---------------------------------------------------------------------- S8: hosts


def test_s8_a_strangers_name_is_not_ours():
    ours = [
        "localhost",
        "localhost:8000",
        "127.0.0.1:8000",
        "192.168.1.7",
        "[::1]:8000",
        "[fe80::1%25eth0]",
        "speech:8000",
        "LOCALHOST.",
        "",
    ]
    for host in ours:
        assert is_ours(host, ()), host
    for host in (
        "evil.example",
        "evil.example:8000",
        "localhost.evil.example",
        "127.0.0.1.evil.example",
        "a:b:c",
        "1.2.3",
        "evil.example.",
    ):
        assert not is_ours(host, ()) and is_ours(host, {"*"}), host
    assert is_ours("speech.example.org:443", {"speech.example.org"})
    assert not is_ours("evil.speech.example.org", {"speech.example.org"})


@pytest.mark.parametrize(
    "request_line", [b"GET / HTTP/1.1", b"POST /v1/audio/speech HTTP/1.1", b"GET /metrics HTTP/1.0"]
)
def test_s8_a_request_in_a_strangers_name_is_refused(request_line, patient):
    with connected(patient[0], 1, request_line + b"\r\nHost: evil.example" + b"x" * 5000 + b"\r\n\r\n") as (one,):
        one.shutdown(socket.SHUT_WR)
        status, error, _ = error_of(left(one))
        assert status == 400 and error["code"] == "wrong_host" and "--allow-host" in error["message"]
        assert len(error["message"]) <= LONGEST_MESSAGE


# ---------------------------------------------------------------------- the command itself


@contextlib.contextmanager
def command(tmp_path, *options, files=1024):
    """The server as a process of its own that may open so many files: its port, itself, and its log."""

    def allowed():
        import resource

        resource.setrlimit(resource.RLIMIT_NOFILE, (files, files))

    with open(tmp_path / "log", "w+") as log:
        process = subprocess.Popen(
            [sys.executable, str(ROOT / "examples/server.py"), "--port", "0", "--device", "cpu", *options],
            stdout=log, stderr=subprocess.STDOUT, preexec_fn=allowed,
            env=os.environ | {"PYTHONUNBUFFERED": "1", "COLUMNS": "200"},
        )  # fmt: skip
        try:
            found = until(
                lambda: re.search(r"Listening on http://127.0.0.1:(\d+)", (tmp_path / "log").read_text()), 120
            )
            address = ("127.0.0.1", int(found[1]))
            until(lambda: answers(address), 60)
            yield address, process, tmp_path / "log"
        finally:
            process.kill()
            process.wait()


def answers(address):
    with contextlib.suppress(OSError):
        return healthy(address)
    return False


@pytest.mark.slow
def test_s6_fifteen_hundred_silent_connections(tmp_path):
    """As many files as a system allows at first; the server answers all the while, and writes next to nothing."""
    with command(tmp_path, "--max-rows", "2") as (address, _, log):
        before, times = log.stat().st_size, []
        with connected(address, 1500):
            for _ in range(20):
                begin = time.perf_counter()
                assert healthy(address)
                times.append(time.perf_counter() - begin)
            url = f"http://{address[0]}:{address[1]}/v1/audio/speech"
            with httpx.stream("POST", url, json=body(), timeout=60) as heard:
                assert heard.status_code == 200 and len(next(heard.iter_raw())) > 44
        assert log.stat().st_size - before < 5_000
        with connected(address, 300, POST + b"Content-Length: 9\r\n\r\n{") as half:
            assert healthy(address)
            assert [error_of(left(one))[0] for one in half] == [408] * 300
        assert healthy(address)
        assert log.stat().st_size - before < 5_000 + 300 * 120  # a line for each that asked
        print(f"answers under 1,500 silent connections: {max(times):.3f} s at most")


@pytest.mark.slow
def test_s7_sigterm_of_the_command(tmp_path):
    with command(tmp_path, "--max-rows", "1", "--grace", "2") as (address, process, log):
        url = f"http://{address[0]}:{address[1]}/v1/audio/speech"
        long, found = body(" ".join([TEXT] * 40)), {}
        with httpx.stream("POST", url, json=long, timeout=60) as heard:
            assert heard.status_code == 200
            pieces = heard.iter_raw()
            next(pieces)

            def wait():
                found["answer"], found["at"] = httpx.post(url, json=long, timeout=60), time.perf_counter()

            waits = threading.Thread(target=wait)
            waits.start()
            until(lambda: figures_now(address)["kvcache_waiting"] == 1)
            begin = time.perf_counter()
            process.send_signal(signal.SIGTERM)
            with pytest.raises(httpx.RemoteProtocolError):
                for _ in pieces:
                    pass
            waits.join()
        assert found["answer"].status_code == 503 and int(found["answer"].headers["retry-after"]) > 0
        assert found["at"] - begin < 1
        assert process.wait(20) == -signal.SIGTERM
        assert time.perf_counter() - begin < 10
        assert "Traceback" not in log.read_text()
