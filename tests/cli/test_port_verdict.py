"""`uhl port` says in one sentence whether the port is good enough, or why it cannot say; R^2 of many depths fits."""

from __future__ import annotations

import json
import re
import shlex

import numpy as np
import pytest
from command_runs import ROOT, call, port_arguments, pretrain_arguments

from uhl_cli.cli.output import Output
from uhl_cli.cli.port import VERDICTS, _depths, _verdict
from uhl_cli.commands import agreement
from uhl_cli.commands.options import HostOptions, PredictOptions, TuneOptions
from uhl_cli.metrics import Score
from uhl_cli.reports import AgreementReport, DepthQuality, ExpectedScore, PortReport

REVIEWS = ROOT / "adapters" / "reviews-builtin-base.safetensors"


def judgement(out: str) -> list[str]:
    """The lines that hold a verdict, or the reason why there is none."""
    openings = tuple(said for said, _ in VERDICTS.values())
    return [line for line in out.splitlines() if line.startswith((*openings, "not judged"))]


@pytest.mark.integration
def test_the_sentence_names_the_agreement_and_what_to_run():
    given = ["port", REVIEWS, "--target", "builtin:tiny", "--no-score", "--device", "cpu", "--offline"]
    called = call(*given)
    (line,) = judgement(called.out)
    assert line.startswith("tune it first: it agrees with the teacher on 0.7")
    assert "of the answers to 100 held-out texts, so expect" in line
    assert line.endswith(f"run uhl tune {REVIEWS} --target builtin:tiny --parameters lora")
    assert re.search(r"expect an accuracy of 0\.6\d \[0\.\d\d, 0\.\d\d\]; the teacher has 0\.73, .* 0\.50;", line)
    control = call(*given, "--align", "size")  # knows nothing of the target
    (line,) = judgement(control.out)
    assert line.startswith("unusable as it is: ")


def test_a_token_task_has_an_agreement_and_no_expected_accuracy(place, here, monkeypatch):
    monkeypatch.setattr(agreement, "LEAST_JUDGED", 1)
    arguments = port_arguments(place.tagger, place.target, place.conll)
    called = call(*arguments)
    assert called.code == 0, called.err
    (line,) = judgement(called.out)
    assert "by an entity_f1 of" in line
    assert "expect an accuracy" not in line
    report = json.loads(call(*arguments, "--json").out)
    assert (report["not_judged"], report["agreement"]["expected"]) == (None, None)
    assert report["seconds"]["judge"] > 0


def test_a_port_that_cannot_be_judged_says_why(place, here):
    bare = pretrain_arguments(place.host, place.data, "bare.safetensors")
    assert call(*bare, "--transfer-set", "0", "--quiet").code == 0
    tuned = ["tune", str(place.adapter), "--target", str(place.target), "--steps", "1", "--max-flops", "1000"]
    assert call(*tuned, "--device", "cpu", "--offline", "--output", "task.safetensors", "--quiet").code == 0
    task = ["--task-file", "task.safetensors"]
    reasons = {
        "the file has no transfer set": port_arguments("bare.safetensors", place.target, place.data),
        "are held out, and 10 are needed": port_arguments(place.adapter, place.target, place.data),
        "it was tuned on the target": [*port_arguments(place.adapter, place.target, place.data), *task],
    }
    for reason, arguments in reasons.items():
        called = call(*arguments)
        (line,) = judgement(called.out)
        assert line.startswith("not judged without labels, because ")
        assert reason in line
        report = json.loads(call(*arguments, "--json").out)
        assert report["agreement"] is None
        assert reason in report["not_judged"]
        assert report["scores"]["ported"]["examples"] == 12, "it is scored all the same"
        assert "add --data" not in line, "data was given"
    unscored = call("port", "bare.safetensors", "--target", place.target, "--max-flops", "1000", "--no-score")
    (line,) = judgement(unscored.out)
    assert line.endswith("the file has no transfer set; to score it on yours, add --data FILE")


def judged(verdict: str, expected: ExpectedScore | None) -> PortReport:
    found = Score(metric="accuracy", value=0.8, low=0.7, high=0.9, examples=100)
    report = AgreementReport(score=found, texts=100, kappa=0.6, expected=expected, verdict=verdict)
    return PortReport.model_construct(adapter="my file", agreement=report, not_judged=None, scores={})


@pytest.mark.parametrize("verdict", [verdict for verdict in VERDICTS if verdict != "pretrain"])
def test_every_verdict_is_one_sentence_with_a_command_that_exists(verdict):
    expected = ExpectedScore(value=0.75, low=0.7, high=0.8, chance=0.5, constant=0.5, teacher=0.9)
    target = HostOptions(name="some/model")
    line = _verdict(judged(verdict, expected), target)
    assert "on 0.800 [0.700, 0.900] of the answers to 100 held-out texts, so expect" in line
    assert "an accuracy of 0.75 [0.70, 0.80]; the teacher has 0.90, a constant answer 0.50;" in line
    scored = judged(verdict, expected).model_copy(update={"scores": {"ported": expected}})
    assert "held-out texts, from which alone one would expect an accuracy of 0.75" in _verdict(scored, target)
    assert "expect" not in _verdict(judged(verdict, None), target)
    command, *words = shlex.split(re.search(r"uhl (\w+ 'my file' --target some/model[^,]*)", line)[1])
    assert command in ("tune", "predict")
    if command == "tune":
        assert words[-2:] == ["--parameters", "lora"]
        assert "lora" in TuneOptions.model_fields["parameters"].annotation.__args__


@pytest.mark.parametrize("verdict", [verdict for verdict in VERDICTS if verdict != "pretrain"])
def test_the_next_command_names_the_same_model(verdict):
    given = {"revision": "v1", "dtype": "bfloat16", "trust_remote_code": True, "tokenizer": "class"}
    target = HostOptions(name="some/model", device="cpu", offline=True, **given)
    assert set(type(target).model_fields) == {"name", "device", "offline", *given}, "a new option may have to be named"
    line = _verdict(judged(verdict, None), target)
    wanted = "--target some/model --revision v1 --dtype bfloat16 --trust-remote-code --tokenizer class"
    command = re.search(r"uhl (tune|predict) 'my file' (--target [^,]*)", line)
    assert command[2].removesuffix(" --parameters lora") == wanted
    options = {f"--{flag.name}" for flag in (TuneOptions if command[1] == "tune" else PredictOptions).flags()}
    assert {word for word in shlex.split(wanted) if word.startswith("--")} <= options


def test_a_weak_teacher_is_no_reason_to_tune():
    expected = ExpectedScore(value=0.52, low=0.46, high=0.57, chance=0.5, constant=0.5, teacher=0.52)
    line = _verdict(judged("pretrain", expected), HostOptions(name="some/model"))
    assert line.startswith("its teacher is too weak: it agrees with the teacher on 0.800")
    assert line.endswith("a constant answer 0.50; make another file with uhl pretrain, by more steps or more examples")


@pytest.mark.parametrize(("layers", "rows"), [(2, 1), (9, 1), (10, 2), (30, 4)])
def test_many_depths_fit_eighty_columns_in_rows_of_ten(layers, rows, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    values = [0.9 - 0.03 * depth for depth in range(layers + 1)]
    quality = tuple(
        DepthQuality(depth=depth, normalised_depth=depth / layers, r2=r2) for depth, r2 in enumerate(values)
    )
    report = PortReport.model_construct(quality=quality, readout_quality=(0.8, 0.7, 0.6))
    output = Output()
    output.table(_depths(report))
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    title, *others = lines
    assert f"median {np.median(values):.2f}, lowest {values[-1]:.2f} at depth {layers}" in title
    found = [line for line in others if re.match(r"\s*\d+ to \d+", line)]
    assert len(found) == rows
    shown = [float(value) for line in found for value in re.findall(r"-?\d\.\d\d", line)]
    assert shown == [round(value, 2) for value in values]
    assert found[-1].split()[:3] == [str(10 * (rows - 1)), "to", str(layers)]
