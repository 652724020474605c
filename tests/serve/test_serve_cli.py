"""The verbs chat and serve: in this process where possible, in a terminal and under signals where it matters."""

import io
import json
import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import openai
import pytest

from pensar.cli import main
from pensar.cli.chat import printable

QUESTION = "What is 2+3?"
THOUGHT = "Two and three: 2, then 3, 4, 5. So the sum is 5."
ANSWER = "The sum is 5."
GUESS = "Maybe 6, maybe 5, I guess."
PATIENCE_SECONDS = 60.0


def chat(folder: Path, *arguments: str) -> int:
    return main(["chat", str(folder), "--temperature", "0", *arguments])


def test_one_question_shows_thinking_and_answer_apart(
    model_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert chat(model_folder, "--prompt", QUESTION) == 0
    out, err = capsys.readouterr()
    assert out == f"[thinking]\n{THOUGHT}\n[answer]\n{ANSWER}\n"
    assert err == ""


def test_thinking_off_shows_the_answer_alone(model_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert chat(model_folder, "--prompt", QUESTION, "--thinking", "off") == 0
    assert capsys.readouterr().out == f"{GUESS}\n"


def test_json_is_one_document_with_the_counts(model_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert chat(model_folder, "--prompt", QUESTION, "--thinking-budget", "4", "--json") == 0
    reply = json.loads(capsys.readouterr().out)
    assert reply["content"] == ANSWER
    assert reply["reasoning_content"].startswith("Two and three\n\nConsidering the limited time")
    assert reply["usage"]["reasoning_tokens"] == 4
    assert reply["finish_reason"] == "stop"


def test_json_takes_the_question_from_a_pipe(
    model_folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(QUESTION))
    assert chat(model_folder, "--json") == 0
    assert json.loads(capsys.readouterr().out)["content"] == ANSWER


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["--thinking-budget", "-1"], "--thinking-budget -1 is negative"),
        (["--thinking-budget", "some"], "thinking-budget"),
        (["--thinking", "maybe"], "maybe"),
        (["--temperature", "-1"], "--temperature -1.0"),
        (["--max-tokens", "0"], "--max-tokens 0"),
        (["--seed", "-3"], "--seed -3"),
        (["--prompt", " "], "empty"),
    ],
)
def test_wrong_use_is_exit_code_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], part: str
) -> None:
    # The folder does not exist: options are checked before anything is opened.
    if "--prompt" not in arguments:
        arguments = ["--prompt", "a", *arguments]
    assert main(["chat", str(tmp_path / "none"), *arguments, "--json"]) == 2
    out, err = capsys.readouterr()
    assert part in err
    assert "Traceback" not in err
    assert part in json.loads(out)["error"]["message"]


def test_a_folder_that_is_no_model_is_exit_code_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert chat(tmp_path / "none", "--prompt", "a") == 1
    assert "none" in capsys.readouterr().err


def test_lines_of_a_pipe_are_turns_and_commands(
    model_folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = [
        "/no_think",
        QUESTION,
        "/reset",
        "/think",
        "/budget 4",
        QUESTION,
        "/budget -3",
        "/reset",
        "/budget off",
        QUESTION,
        "/nonsense",
        "/quit",
        QUESTION,
    ]
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines)))
    assert chat(model_folder) == 0
    out, err = capsys.readouterr()
    first, short, whole = out.split("[thinking]\n")
    assert first == f"{GUESS}\n"
    assert short.startswith("Two and three\n\nConsidering")
    assert short.endswith(f"[answer]\n{ANSWER}\n")
    assert whole == f"{THOUGHT}\n[answer]\n{ANSWER}\n"
    assert "-3" in err
    assert "no command /nonsense" in err
    assert "\x1b" not in out + err


def test_a_conversation_that_outgrows_the_context_says_so_and_goes_on(
    model_folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("0 1 2 3 4 5 6 7 8 9 " * 200 + "\n" + QUESTION))
    assert chat(model_folder) == 0
    out, err = capsys.readouterr()
    assert "2,048" in err
    assert ANSWER in out


def test_a_reply_cannot_steer_the_terminal() -> None:
    assert printable("a\x1b[31mb\x07\r\x9b\tc\nd") == "a[31mb\tc\nd"


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-c", "import sys; from pensar.cli import main; sys.exit(main())", *arguments]


def environment() -> dict[str, str]:
    plain = {name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "FORCE_COLOR")}
    return plain | {"OMP_NUM_THREADS": "1", "TERM": "xterm", "COLUMNS": "80"}


@pytest.mark.skipif(not hasattr(os, "openpty"), reason="needs a pseudo-terminal")
def test_in_a_terminal_thinking_is_dim_and_the_answer_plain(model_folder: Path) -> None:
    ours, theirs = os.openpty()
    process = subprocess.Popen(
        command("chat", str(model_folder), "--temperature", "0"),
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env=environment(),
    )
    os.close(theirs)
    seen = b""

    def read_until(mark: bytes) -> None:
        nonlocal seen
        deadline = time.monotonic() + PATIENCE_SECONDS
        while mark not in seen:
            assert time.monotonic() < deadline, seen
            if select.select([ours], [], [], 0.1)[0]:
                seen += os.read(ours, 65536)

    try:
        read_until(b"> ")
        os.write(ours, QUESTION.encode() + b"\n")
        read_until(b"tokens/s")
        os.write(ours, b"/quit\n")
        assert process.wait(PATIENCE_SECONDS) == 0
    finally:
        process.kill()
        process.wait()
        os.close(ours)
    text = seen.decode().replace("\r\n", "\n")
    assert "\x1b[2;3m[thinking]" in text
    assert "\x1b[2;3mTwo" in text
    assert f"\n{ANSWER}\n" in text


def test_serve_prints_its_address_and_leaves_on_sigterm(model_folder: Path) -> None:
    process = subprocess.Popen(
        command("serve", str(model_folder), "--port", "0", "--model-name", "tiny", "--api-key", "secret"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
    )
    try:
        assert process.stdout is not None
        first = process.stdout.readline()
        url = first.split()[4]
        assert first.startswith(f"tiny is served at {url} ")
        assert "curl" in process.stdout.readline()
        with openai.OpenAI(base_url=url, api_key="secret", max_retries=5) as client:
            stream = client.chat.completions.create(
                model="tiny", messages=[{"role": "user", "content": QUESTION}], temperature=0, stream=True
            )
            next(iter(stream))
            process.send_signal(signal.SIGTERM)
            said = [chunk.choices[0].delta.content or "" for chunk in stream]
        assert "".join(said) == ANSWER
        assert process.wait(PATIENCE_SECONDS) == 0
    finally:
        process.kill()
        _, err = process.communicate()
    assert "Traceback" not in err


def test_a_taken_port_is_said_before_the_model_is_loaded(
    model_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from pensar.serve.server import bind

    with bind("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        assert main(["serve", str(model_folder), "--port", str(port)]) == 1
    assert f"port {port}" in capsys.readouterr().err
    assert main(["serve", str(model_folder), "--port", "70000"]) == 2
    assert main(["serve", str(model_folder), "--port", "0", "--max-waiting", "-1"]) == 2


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["--spill-folder", "x"], "--spill-gib 0.0 with --spill-folder x"),
        (["--spill-gib", "-1"], "--spill-gib -1.0"),
        (["--tensor-parallel", "2", "--weights", "int8"], "--weights int8"),
        (["--tensor-parallel", "0"], "0 ranks"),
    ],
)
def test_options_of_serve_that_do_not_fit_are_exit_code_2(
    model_folder: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], part: str
) -> None:
    assert main(["serve", str(model_folder), "--port", "0", *arguments]) == 2
    assert part in capsys.readouterr().err


@pytest.mark.parametrize("launcher", ["own ranks", pytest.param("torchrun", marks=pytest.mark.slow)])
def test_a_model_on_two_ranks_with_a_spill_is_served_alike(
    model_folder: Path, tmp_path: Path, launcher: str
) -> None:
    verb = ["serve", str(model_folder), "--port", "0", "--spill-gib", "0.01", "--spill-folder", str(tmp_path)]
    if launcher == "torchrun":
        run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        verb = [*run, "-m", "pensar", *verb]
    else:
        verb = command(*verb, "--tensor-parallel", "2")
    process = subprocess.Popen(
        verb, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment()
    )
    try:
        assert process.stdout is not None
        url = process.stdout.readline().split()[4]
        with openai.OpenAI(base_url=url, api_key="any", max_retries=5) as client:
            said = client.chat.completions.create(
                model=model_folder.name, messages=[{"role": "user", "content": QUESTION}], temperature=0
            )
        assert said.choices[0].message.content == ANSWER
        process.send_signal(signal.SIGTERM)
        code = process.wait(PATIENCE_SECONDS)
        assert launcher == "torchrun" or code == 0
    finally:
        process.kill()
        _, err = process.communicate()
    assert launcher == "torchrun" or "Traceback" not in err
