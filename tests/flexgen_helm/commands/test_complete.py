"""Protects: `flexgen-helm complete` answers every prompt once, as the engine does, and continues where it stopped."""

from __future__ import annotations

import fcntl
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import models
import pytest
from safetensors.torch import load_file, save_file
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer
from transformers import __version__ as transformers_version

from engine import Engine, Job, Policy, Sampling
from engine.checkpoint.identity.result import result_identity
from flexgen_helm.commands.completion.answers import Answers
from flexgen_helm.commands.completion.own_format import unescaped
from flexgen_helm.run import main

TEMPLATE = "{% for message in messages %}<{{ message.role }}>{{ message.content }}{% endfor %}<assistant>"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory: Path = models.save_model(tmp_path_factory.mktemp("llama"), "llama")
    tokenizer = AutoTokenizer.from_pretrained(directory)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(directory)
    return directory


Complete = Callable[..., tuple[int, list[dict[str, Any]], str]]


@pytest.fixture
def complete(model: Path, capsys: pytest.CaptureFixture[str]) -> Complete:
    """Run the command: its exit code, the JSON lines on standard output, standard error."""

    def run(*arguments: str) -> tuple[int, list[dict[str, Any]], str]:
        code = main(["complete", "--model", str(model), *arguments])
        out, err = capsys.readouterr()
        return code, [json.loads(line) for line in out.split("\n")[:-1]], err

    return run


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]


def expected(model: Path, prompts: list[str], **settings: Any) -> list[str]:
    """What the engine answers."""
    with Engine.from_pretrained(str(model)) as engine:
        jobs = [Job(prompt=engine.tokenizer(text)["input_ids"], **settings) for text in prompts]
        return [done.text for done in engine.run(jobs)]


def test_arguments(complete: Complete, model: Path) -> None:
    code, lines, _ = complete("hello world", "another text", "--max-new-tokens", "6")
    assert code == 0
    lines.sort(key=lambda line: line["index"])
    assert [line["completion"] for line in lines] == expected(model, ["hello world", "another text"], max_new_tokens=6)
    assert [line["prompt"] for line in lines] == ["hello world", "another text"]
    assert all(line["num_tokens"] == 6 and line["finish_reason"] == "length" and line["logprob"] < 0 for line in lines)


def test_text_file_and_standard_input(
    complete: Complete, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One prompt a line, spaces kept, empty lines none."""
    text = " first\r\n\nsecond line \n   \nthird"
    (tmp_path / "in.txt").write_text(text)
    out = tmp_path / "out.jsonl"
    assert complete("--input", str(tmp_path / "in.txt"), "-o", str(out), "--max-new-tokens", "4")[0] == 0
    lines = read(out)
    assert [line["prompt"] for line in lines] == [" first", "second line ", "third"]
    assert [line["completion"] for line in lines] == expected(
        model, [" first", "second line ", "third"], max_new_tokens=4
    )
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
    _, again, _ = complete("-i", "-", "--max-new-tokens", "4")
    assert sorted(again, key=lambda line: line["index"]) == lines


def test_jsonl_lines_have_settings_of_their_own(complete: Complete, model: Path, tmp_path: Path) -> None:
    lines = [
        {"prompt": "one", "id": "a", "metadata": {"gold": [1]}, "max_new_tokens": 2},
        {"prompt": "two", "temperature": 1.5, "top_k": 9, "top_p": 0.9, "seed": 4, "num_completions": 3},
        {"messages": [{"role": "user", "content": "hi"}], "stop": ["zzz", "q"]},
    ]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    out = tmp_path / "out.jsonl"
    assert complete("-i", str(tmp_path / "in.jsonl"), "-o", str(out), "--max-new-tokens", "5")[0] == 0
    done = read(out)
    assert [(line["index"], line["sample"]) for line in done] == [(0, 0), (1, 0), (1, 1), (1, 2), (2, 0)]
    assert (done[0]["id"], done[0]["metadata"], done[0]["num_tokens"]) == ("a", {"gold": [1]}, 2)
    for sample in range(3):
        sampling = Sampling(temperature=1.5, top_k=9, top_p=0.9, seed=4 + sample)
        assert [done[1 + sample]["completion"]] == expected(model, ["two"], max_new_tokens=5, sampling=sampling)
    assert done[4]["messages"] == lines[2]["messages"]
    assert [done[4]["completion"]] == expected(model, ["<user>hi<assistant>"], max_new_tokens=5, stop=["zzz", "q"])


def test_chat_puts_prompts_into_the_template(complete: Complete, model: Path) -> None:
    _, lines, _ = complete("hi", "--chat", "--max-new-tokens", "5")
    assert [line["completion"] for line in lines] == expected(model, ["<user>hi<assistant>"], max_new_tokens=5)


def test_special_tokens_stand_once_before_a_prompt_and_never_behind(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of a tokenizer that puts a beginning before each text and an end behind; a template gets neither."""
    directory = tmp_path / "model"
    shutil.copytree(model, directory)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    plain = {text: tokenizer(text)["input_ids"] for text in ("hello", "\n", "<user>hi<assistant>")}
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", tokenizer.bos_token_id), ("</s>", tokenizer.eos_token_id)]
    )
    tokenizer.save_pretrained(directory)
    begin = [tokenizer.bos_token_id]
    asked = {
        "hello": [*begin, *plain["hello"]],
        "<s>hello": [*begin, *plain["hello"]],
        "\n<s>hello": [*plain["\n"], *begin, *plain["hello"]],
        "hello</s>": [*begin, *plain["hello"], tokenizer.eos_token_id],
        "hi": plain["<user>hi<assistant>"],
    }
    found = []
    for arguments in ([*list(asked)[:-1]], ["hi", "--chat"]):
        assert main(["complete", "--model", str(directory), *arguments, "--max-new-tokens", "8"]) == 0
        lines = [json.loads(line) for line in capsys.readouterr().out.split("\n")[:-1]]
        found += sorted(lines, key=lambda line: line["index"])
    with Engine.from_pretrained(str(directory)) as engine:
        done = engine.run([Job(prompt=ids, max_new_tokens=8) for ids in asked.values()])
    assert [line["completion"] for line in found] == [each.text for each in done]
    assert [line["logprob"] for line in found] == pytest.approx([sum(each.logprobs) for each in done], abs=1e-4)


def test_stops_fire(complete: Complete, model: Path) -> None:
    (free,) = expected(model, ["stop here"], max_new_tokens=20)
    stop = free[3:5]
    _, lines, _ = complete("stop here", "--max-new-tokens", "20", "--stop", r"\n", "--stop", stop)
    (line,) = lines
    assert line["completion"] == free[: min(at for at in (free.find("\n"), free.find(stop)) if at >= 0)]
    assert line["finish_reason"] == "stop"


def test_stops_are_meant_as_typed_in_a_shell() -> None:
    assert unescaped(r"a\n\t\\n") == "a\n\t\\n"


def test_text_of_any_characters_comes_back(complete: Complete, tmp_path: Path) -> None:
    """Line ends of Unicode are no line ends of JSON, in prompts and where a run goes on."""
    prompts = ["a\u2028b", "c\x85d", "e\u2029\x0c\x1cf", "\x00", "h\u00e9llo \U0001f600"]
    lines = [{"prompt": text, "id": text, "metadata": text} for text in prompts]
    for ascii_only in (True, False):
        text = "".join(json.dumps(line, ensure_ascii=ascii_only) + "\n" for line in lines)
        (tmp_path / "in.jsonl").write_text(text, encoding="utf-8")
        out = tmp_path / "out.jsonl"
        for _ in range(2):
            assert complete("-i", str(tmp_path / "in.jsonl"), "-o", str(out), "--max-new-tokens", "2")[0] == 0
            assert [(line["prompt"], line["id"], line["metadata"]) for line in read(out)] == [(p,) * 3 for p in prompts]


@pytest.fixture
def spoiled(tmp_path: Path) -> Path:
    file = tmp_path / "in.jsonl"
    file.write_text(
        '{"prompt": "good"}\n{"prompt": 3}\n\n{oops}\n"text"\n{"prompt": "x", "max_new_token": 1}\n{"id": 1}\n'
        '{"prompt": "x", "seed": "1"}\n{"prompt": "x", "stop": [1]}\n{"prompt": "x", "top_p": 7}\n'
        + json.dumps({"prompt": "long " * 300})
        + '\n{"messages": []}\n{"prompt": "", "max_new_tokens": 0}\n{"prompt": "fine"}\n{"messages": null}\n'
        + '{"prompt": "a\\ud800b"}\n{"prompt": "x", "id": NaN}\n{"prompt": "x", "metadata": '
        + "[" * 100_000
        + "]" * 100_000
        + '}\n{"prompt": "x", "temperature": 1'
        + "0" * 400
        + "}\n"
    )
    return file


MESSAGES = {
    2: "'prompt' is a int, not a text",
    4: "the line cannot be read",
    5: 'a str instead of an object such as {"prompt": "..."}',
    6: "unknown key 'max_new_token'; did you mean 'max_new_tokens'?",
    7: "give either 'prompt' or 'messages'",
    8: "'seed' is a str, not int or null",
    9: "'stop' is neither a text nor a list of texts",
    10: "top_p 7 is outside (0, 1]",
    11: "exceed the model's window of 128",
    12: "'messages' is no list",
    13: "max_new_tokens 0 is below 1",
    15: "'messages' is no list",
    16: "half of a surrogate pair",
    17: "NaN or an infinite number",
    18: "nested more than 100 levels deep",
    19: "a number of 401 digits",
}


def test_bad_lines_are_named_before_anything_runs(complete: Complete, spoiled: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    code, lines, err = complete("-i", str(spoiled), "-o", str(out))
    assert code == 2
    assert lines == []
    assert not out.exists()
    for number, message in MESSAGES.items():
        assert any(line.startswith(f"{spoiled}, line {number}: ") and message in line for line in err.splitlines())
    assert f"16 of 18 prompts cannot be asked, the first: {spoiled}, line 2" in err.splitlines()[-1]


def test_skip_bad_asks_the_others_and_counts_every_line(complete: Complete, spoiled: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    arguments = ("-i", str(spoiled), "-o", str(out), "--skip-bad", "--max-new-tokens", "3")
    assert complete(*arguments)[0] == 0
    lines = read(out)
    assert [line["index"] for line in lines] == list(range(18))
    assert [line["prompt"] for line in lines if "completion" in line] == ["good", "fine"]
    for line in lines:
        if "error" in line:
            assert MESSAGES[int(line["where"].rsplit(" ", 1)[1])] in line["error"]
    text = out.read_text()
    assert complete(*arguments)[0] == 0
    assert out.read_text() == text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "give prompts either as arguments or by --input"),
        (("a", "-i", "-"), "give prompts either as arguments or by --input"),
        (("-i", "/nowhere.txt"), "--input /nowhere.txt cannot be read: No such file or directory"),
        (("a", "-o", "/dev/zero"), "/dev/zero is no file; leave --output out"),
        (("a", "-o", "/nowhere/out.jsonl"), "/nowhere/out.jsonl cannot be written: No such file or directory"),
        (("a", "--policy", "nosuch"), "nosuch"),
        (("a", "--temperature", "-1"), "temperature -1.0 is not a number >= 0"),
        (("a", "-n", "0"), "num_completions 0 is not a number from 1"),
    ],
)
def test_bad_command_lines(complete: Complete, arguments: tuple[str, ...], message: str) -> None:
    code, lines, err = complete(*arguments)
    assert (code, lines) == (2, [])
    assert message in err.splitlines()[-1]


def test_empty_and_unreadable_input(complete: Complete, tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("\n \n")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9\n")
    assert "empty.jsonl holds no prompt" in complete("-i", str(tmp_path / "empty.jsonl"))[2]
    assert "is not UTF-8 (byte 3)" in complete("-i", str(tmp_path / "latin.txt"))[2]


def test_goes_on_where_it_was(complete: Complete, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole answers are kept, a line that was cut off and failures are asked again; nothing is asked twice."""
    prompts = [f"prompt number {i}" for i in range(7)]
    (tmp_path / "in.txt").write_text("\n".join(prompts))
    out = tmp_path / "out.jsonl"
    arguments = ("-i", str(tmp_path / "in.txt"), "-o", str(out), "--max-new-tokens", "3")
    assert complete(*arguments)[0] == 0
    whole = out.read_text()
    lines = whole.splitlines(keepends=True)
    failed = json.dumps({"index": 4, "sample": 0, "prompt": prompts[4], "error": "it broke"}) + "\n"
    out.write_text(lines[5] + failed + lines[0] + lines[2][:-9])
    asked: list[int] = []
    stream = Engine.stream

    def counting(engine: Engine, jobs: Any) -> Any:
        jobs = list(jobs)
        asked.append(len(jobs))
        return stream(engine, jobs)

    monkeypatch.setattr(Engine, "stream", counting)
    code, _, err = complete(*arguments, "--percent", "0", "100", "0", "100", "0", "100")
    assert code == 0
    assert asked == [5]
    assert "2 answers were there already" in err

    def rounded(text: str) -> list[dict[str, Any]]:
        return [{**line, "logprob": round(line["logprob"], 4)} for line in map(json.loads, text.splitlines())]

    assert rounded(out.read_text()) == rounded(whole)
    complete(*arguments)
    assert asked == [5]


def test_does_not_mix_answers_of_other_questions(complete: Complete, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    assert complete("one", "-o", str(out), "--max-new-tokens", "2")[0] == 0
    before = out.read_text()
    for other in (("two", "--max-new-tokens", "2"), ("one", "--max-new-tokens", "3"), ("one", "--temperature", "1")):
        code, _, err = complete(*other, "-o", str(out))
        assert code == 2
        assert f"{out}, line 1 answers something else" in err
    for other in ('{"index": Infinity}\n', "notes without a line end", '{"index": 0, "key": "' + "[" * 100_000 + "\n"):
        out.write_text(before + other)
        code, _, err = complete("one", "-o", str(out), "--max-new-tokens", "2")
        assert code == 2
        assert "of `complete`; name another --output" in err
        assert out.read_text() == before + other
    out.write_text(before + "something else\n")
    assert f"{out}, line 2 is no answer of `complete`" in complete("one", "-o", str(out), "--max-new-tokens", "2")[2]
    assert out.read_text() == before + "something else\n"


def test_two_processes_do_not_share_an_output(complete: Complete, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    with out.open("a") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        code, _, err = complete("one", "-o", str(out))
    assert code == 2
    assert f"another process writes {out}" in err


def test_links_and_permissions_of_an_output_stay(complete: Complete, tmp_path: Path) -> None:
    """What a link points to is written, also anew, and a private file stays private."""
    (tmp_path / "real").mkdir()
    target, link = tmp_path / "real" / "out.jsonl", tmp_path / "out.jsonl"
    target.touch(mode=0o600)
    link.symlink_to(target)
    assert complete("one", "two", "-o", str(link), "--max-new-tokens", "2")[0] == 0
    target.write_text("".join(reversed(target.read_text().splitlines(keepends=True))) + '{"index": 5, "cut')
    assert complete("one", "two", "-o", str(link), "--max-new-tokens", "2")[0] == 0
    assert [line["prompt"] for line in read(target)] == ["one", "two"]
    assert link.is_symlink()
    assert target.stat().st_mode & 0o777 == 0o600
    assert sorted(path.name for path in target.parent.iterdir()) == ["out.jsonl", "out.jsonl.record.json"]


def test_the_record_says_what_answers_were_made_with(
    complete: Complete, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a file that is gone on with, by other software, it keeps both."""
    from flexgen_helm.commands.completion import record as written
    from flexgen_helm.planning.environment import environment

    output, file = tmp_path / "out.jsonl", tmp_path / "out.jsonl.record.json"
    asked = ("-o", str(output), "--max-new-tokens", "2", "--temperature", "1", "--seed", "7", "--gpu-batch-size", "3")
    assert complete("one", *asked)[0] == 0
    first = json.loads(file.read_text())
    assert (first["settings"]["seed"], first["settings"]["temperature"]) == (7, 1.0)
    assert first["policy"] == {"gpu-batch-size": 3}
    assert len(first["identity"]["weights"]) == 64
    (made,) = first["environments"]
    assert made["versions"]["transformers"] == transformers_version
    assert made["hardware"]["cores"] >= 1
    later = replace(environment(), versions={"torch": "99"})
    monkeypatch.setattr(written, "environment", lambda: later)
    for _ in range(2):  # nothing is left to ask the second time
        assert complete("one", "two", *asked)[0] == 0
        assert json.loads(file.read_text())["environments"] == [made, later.as_mapping()]
    file.write_text("{}")
    assert complete("one", "two", "three", *asked)[0] == 2
    assert len(read(output)) == 2
    assert complete("one", *asked[2:])[0] == 0  # to standard output


def test_answers_of_another_checkpoint_are_refused_with_both_digests(
    complete: Complete, model: Path, tmp_path: Path
) -> None:
    out, own, asked = tmp_path / "out.jsonl", tmp_path / "own", ("--max-new-tokens", "2")
    shutil.copytree(model, own)
    command = [*asked, "-o", str(out), "--model", str(own)]
    assert complete("one", *command)[0] == 0
    before, record = out.read_text(), tmp_path / "out.jsonl.record.json"
    then = json.loads(record.read_text())["identity"]["weights"]
    assert "line 1 answers something else: prompt or settings differ" in complete("two", *command)[2]
    content = bytearray((own / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (own / "model.safetensors").write_bytes(content)
    now = result_identity(str(own), Policy())["weights"]
    code, _, err = complete("one", *command)
    assert code == 2
    told = f"other weights (sha256 {then[:12]} then, {str(now)[:12]} now); name another --output"
    assert f"{out}, line 1 answers something else: {told}" in err
    record.unlink()
    assert "line 1 answers something else: prompt, settings or model differ" in complete("one", *command)[2]
    assert out.read_text() == before


def test_the_record_is_of_the_weights_that_the_engine_read(complete: Complete, model: Path, tmp_path: Path) -> None:
    """They are read once: for the engine, whose digest it is."""
    out, own = tmp_path / "out.jsonl", tmp_path / "own"
    shutil.copytree(model, own)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("engine.checkpoint.identity.result.weights_digest", None)
        assert complete("one", "--max-new-tokens", "2", "-o", str(out), "--model", str(own))[0] == 0
    found = json.loads((tmp_path / "out.jsonl.record.json").read_text())["identity"]
    assert found == result_identity(str(own), Policy())


def test_answers_with_another_id_are_others(complete: Complete, tmp_path: Path) -> None:
    """Else they would be joined wrongly."""
    out, source = tmp_path / "out.jsonl", tmp_path / "in.jsonl"
    source.write_text('{"prompt": "one", "id": 1}\n')
    assert complete("-i", str(source), "-o", str(out), "--max-new-tokens", "2")[0] == 0
    source.write_text('{"prompt": "one", "id": 2}\n')
    assert "line 1 answers something else" in complete("-i", str(source), "-o", str(out), "--max-new-tokens", "2")[2]


def test_a_lock_on_what_was_replaced_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that another process puts in place between opening and locking is opened again."""
    out = tmp_path / "out.jsonl"
    out.write_text("")
    flock, replaced = fcntl.flock, []

    def late(file: Any, how: int) -> None:
        if not replaced:
            replaced.append(out.with_suffix(".new"))
            replaced[0].write_text("")
            replaced[0].replace(out)
        flock(file, how)

    monkeypatch.setattr(fcntl, "flock", late)
    with Answers(out) as answers:
        answers.add({"index": 0})
    assert read(out) == [{"index": 0}]


def test_failures_are_written_and_change_the_exit_code(
    complete: Complete, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A job that the engine fails: its error in its line, the others answered."""
    check = Engine._check

    def refuse(engine: Engine, job: Job) -> None:
        check(engine, job)
        if len(job.prompt) > 6:
            from engine.errors import JobError

            raise JobError("too much for it")

    out = tmp_path / "out.jsonl"
    prompts = ("a", "a much longer prompt than the others are", "b")
    with monkeypatch.context() as patch:
        patch.setattr(Engine, "_check", refuse)
        code, _, err = complete(*prompts, "-o", str(out), "--max-new-tokens", "2")
    assert code == 1
    assert "1 of 3 requests failed, the first: argument 2: too much for it; the same command asks them again" in err
    assert [line.get("error") for line in read(out)] == [None, "too much for it", None]
    assert complete(*prompts, "-o", str(out), "--max-new-tokens", "2")[0] == 0
    assert all("completion" in line for line in read(out))


@pytest.mark.usefixtures("warm_processes")
def test_a_full_disk_ends_the_run_in_one_line(model: Path, tmp_path: Path) -> None:
    """Whole lines stay, and the same command goes on when there is room again."""
    out = tmp_path / "out.jsonl"
    flags = ["complete", "--model", str(model), *"abcdefghijklmnopqrstuvwxyz", "--max-new-tokens", "2", "-o", str(out)]
    limit = 3000  # the record of what made them, but not all answers
    limited = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))"
    program = f"{limited}; import runpy; runpy.run_module('flexgen_helm', run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", program, *flags], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert f"{out}, which keeps the answers so far, cannot be written: File too large" in done.stderr.splitlines()[-1]
    kept = out.read_text().splitlines()[:-1]
    assert len(kept) > 2
    assert all("completion" in json.loads(line) for line in kept)
    subprocess.run([sys.executable, "-m", "flexgen_helm", *flags], check=True, capture_output=True)
    assert set(kept) < set(out.read_text().splitlines())


def test_a_model_that_cannot_be_opened_is_one_line(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = Path(shutil.copytree(model, tmp_path / "broken"))
    tensors = load_file(broken / "model.safetensors")
    tensors.pop("model.norm.weight")
    save_file(tensors, broken / "model.safetensors")
    assert main(["complete", "--model", str(broken), "a", "-o", str(tmp_path / "out.jsonl")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "lack 1 of" in line
    assert [each.name for each in tmp_path.iterdir()] == ["broken"]


@pytest.mark.usefixtures("warm_processes")
def test_killed_and_started_again(model: Path, tmp_path: Path) -> None:
    """SIGKILL while answers come: what is there stays, and the end is that of an undisturbed run."""
    (tmp_path / "in.txt").write_text("\n".join(f"prompt {i}" for i in range(16)))
    out = tmp_path / "out.jsonl"
    command = [sys.executable, "-m", "flexgen_helm", "complete", "--model", str(model), "-i", str(tmp_path / "in.txt")]
    command += ["--gpu-batch-size", "2", "--num-gpu-batches", "1", "--max-new-tokens", "8"]
    process = subprocess.Popen([*command, "-o", str(out)], stderr=subprocess.DEVNULL)
    end = time.monotonic() + 120
    while not out.exists() or out.read_text().count("\n") < 4:
        assert time.monotonic() < end
        assert process.poll() is None
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    killed = out.read_text()
    kept = killed[: killed.rfind("\n") + 1].splitlines()
    assert len(kept) < 16
    subprocess.run([*command, "-o", str(out)], check=True, stderr=subprocess.DEVNULL)
    assert set(kept) <= set(out.read_text().splitlines())
    whole = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    undisturbed = sorted(map(json.loads, whole.splitlines()), key=lambda line: line["index"])
    assert [line["completion"] for line in read(out)] == [line["completion"] for line in undisturbed]
