"""Every command and every line of Python that README shows runs, on tiny models of the names that it says."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from command_runs import ROOT, call, without_the_hubs_settings
from tiny_classifiers import save, tiny_classifier
from tiny_hosts import SENTENCES, tiny_model, tiny_tokenizer

README = (ROOT / "README.md").read_text(encoding="utf-8")
# What makes a call short, by command; tiny models pass the FLOP limit.
SHORT = {
    "pretrain": "--max-steps 2 --batch-size 8 --num-anchors 32 --feature-words 0 --transfer-set 40 --max-flops 1000",
    "port": "--max-flops 1000",
    "tune": "--steps 2 --batch-size 8 --max-flops 1000",
    "export": "--steps 2 --batch-size 8 --max-flops 1000",
}
# Run by `.ci/run` as they stand, or by the tests of what they start.
ELSEWHERE = ("git clone", "pip install", "uhl demo", "python -m pytest")


def blocks(language: str) -> list[str]:
    """README's code blocks in this language."""
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder in which the names of README mean tiny models and small data."""
    folder = tmp_path_factory.mktemp("readme")
    for name, family in (("distilbert-base-uncased", "distilbert"), ("bert-base-uncased", "bert")):
        tiny_model(family, hidden_size=192, num_hidden_layers=4).save_pretrained(folder / name)
        tiny_tokenizer(family).save_pretrained(folder / name)
    save(folder / "my-bert-sentiment", "bert", tiny_classifier("bert", ("negative", "positive")))
    (folder / "adapters").symlink_to(ROOT / "adapters")
    texts = [f"{sentence} {number}" for number in range(6) for sentence in SENTENCES]
    (folder / "texts.txt").write_text("\n".join(texts) + "\n")
    rows = [f'"{text}",{("bad", "good")[place % 2]}' for place, text in enumerate(texts)]
    for name, part in (("films.csv", rows), ("dev.csv", rows[:20])):
        (folder / name).write_text("\n".join(["text,label", *part]) + "\n")
    (folder / "new.csv").write_text("\n".join(["text", *(row.rsplit(",", 1)[0] for row in rows[:20])]) + "\n")
    return folder


SCRIPTS = [block for block in blocks("bash") if not any(words in block for words in ELSEWHERE)]


@pytest.mark.integration
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.split()[1])
def test_commands(place, script, monkeypatch):
    """In this process: the imports of one of its own take longer than what it does."""
    monkeypatch.chdir(place)
    for line in script.splitlines():
        program, command, *more = shlex.split(line, comments=True)
        assert program == "uhl"
        called = call(command, *more, *SHORT.get(command, "").split(), env={"UHL_CACHE": str(place / "cache")})
        assert called.code == 0, (line, called.err)
        assert called.out.strip()


@pytest.mark.integration
def test_python(place):
    (script,) = blocks("python")
    kept = without_the_hubs_settings()
    kept |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT), "UHL_CACHE": str(place / "cache")}
    command = [sys.executable, "-"]
    done = subprocess.run(command, cwd=place, env=kept, input=script, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    said = done.stdout.splitlines()
    assert len(said) == 2
    assert all(line.split()[0] in ("negative", "positive") for line in said)


def test_no_command_is_left_out_and_it_stays_short():
    """What is run elsewhere holds no command of uhl but the demo, which has tests of its own."""
    rest = [block for block in blocks("bash") if block not in SCRIPTS]
    assert len(SCRIPTS) >= 2
    assert [line.split()[1] for block in rest for line in block.splitlines() if line.startswith("uhl ")] == ["demo"]
    assert len(README.splitlines()) <= 200
