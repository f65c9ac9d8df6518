import errno, json, os, shutil
import pytest
from conftest import call, pretrain_arguments as P, port_arguments as Q, write_data
from tiny_hosts import *
import tiny_hosts


def show(name, c):
    print("=====", name, c.code)
    print("OUT", c.out)
    print("ERR", c.err)


def test_x(place, here, monkeypatch):
    show("pre", call(*P(place.host, place.data, "a.st")))
    show("port", call(*Q(place.adapter, place.target, place.data)))
    show("json", call(*Q(place.adapter, place.target, place.data), "--json"))
    show("quiet", call(*Q(place.adapter, place.target, place.data), "-q"))
    show("tag", call(*Q(place.tagger, place.target, place.conll)))
    show("missing", call(*Q("no.st", place.target, place.data)))
    (here / "t.st").write_bytes(place.adapter.read_bytes()[:5000])
    show("trunc", call(*Q("t.st", place.target, place.data)))
    (here / "x.st").write_text("hello there")
    show("text", call(*Q("x.st", place.target, place.data)))
    show("notours", call(*Q(place.target / "model.safetensors", place.target, place.data)))
    show("nohost", call(*Q(place.adapter, here / "nope", place.data)))
    show("hub", call(*Q(place.adapter, "org/nope", place.data)))
    h = save_tiny_host(here / "h", "bert")
    (h / "tokenizer.json").unlink()
    show("notok", call(*Q(place.adapter, h, place.data)))
    h = save_tiny_host(here / "h5", "bert")
    c = json.loads((h / "config.json").read_text())
    c["model_type"] = "t5"
    (h / "config.json").write_text(json.dumps(c))
    show("t5", call(*Q(place.adapter, h, place.data)))
    d = write_data(here / "d")
    (d / "dev.tsv").write_text("sentence\tlabel\na b\tx\nb c\ty\nd\tz\n")
    show("labels", call(*Q(place.adapter, place.target, d)))
    (d / "dev.tsv").write_text("sentence\tlabel\n")
    show("emptydev", call(*Q(place.adapter, place.target, d)))
    (d / "dev.tsv").write_text("")
    show("emptydev0", call(*Q(place.adapter, place.target, d)))
    show("nodata", call(*Q(place.adapter, place.target, "/no/data")))
    (d / "dev.tsv").write_text("sentence\tlabel\n" + "word and " * 300 + "\t1\nshort\t0\n")
    show("long", call(*Q(place.adapter, place.target, d)))
    monkeypatch.setattr(tiny_hosts, "MAX_POSITIONS", 8)
    h = save_tiny_host(here / "h8", "bert")
    monkeypatch.undo()
    monkeypatch.chdir(here)
    show("small", call(*Q(place.adapter, h, place.data)))
    show("smallpre", call(*P(h, place.data, "b.st")))
    (here / "file").write_text("x")
    show("unwr port", call(*Q(place.adapter, place.target, place.data), "--output", "file/x"))
    show("unwr pre", call(*P(place.host, place.data, "file/x.st")))
    show("out is folder", call(*P(place.host, place.data, "h8"), "--overwrite"))
    for extra in (
        ["--dtype", "bfloat16"],
        ["--batch-size", "0"],
        ["--noise", "-1"],
        ["--views", "100"],
        ["--views", "-1"],
        ["--max-flops", "0"],
        ["--max-flops", "nan"],
        ["--epochs", "-1"],
        ["--seed", "-1"],
        ["--num-anchors", "3"],
        ["--max-length", "2"],
        ["--learning-rate", "0"],
        ["--save-every", "0"],
        ["--max-bytes", "1000"],
        ["--max-bytes", "150000"],
        ["--max-flops", "1"],
        ["--device", "toaster"],
        ["--anchors", "no.txt"],
        ["--licence", "x" * 600],
        ["--align", "foo"],
        ["--max-length", "5000"],
        ["--max-steps", "0"],
        ["--mixed-precision", "fp16"],
        ["--mixed-precision", "bf16"],
        ["--label-column", "foo"],
        ["--train-split", "foo"],
    ):
        from accelerate.state import AcceleratorState, PartialState

        AcceleratorState._reset_state(True)
        try:
            show(extra, call(*P(place.host, place.data, "n.st"), *extra))
        except Exception as e:
            print("RAISED", extra, repr(e)[:300])
        (here / "n.st").unlink(missing_ok=True)
        shutil.rmtree(here / "n.st.uhl-run", ignore_errors=True)
    show("port batch", call(*Q(place.adapter, place.target, place.data), "--batch-size", "0"))
    show("port flops", call(*Q(place.adapter, place.target, place.data), "--max-flops", "1"))
    show("port noarg", call("port"))
    show("none", call())
    show("bad cmd", call("prot"))
    show("tok w seq", call(*Q(place.tagger, place.target, place.data)))
    show("tok w seq task", call(*Q(place.tagger, place.target, place.data), "--task", "sst2"))
    show("seq w tok", call(*Q(place.adapter, place.target, place.conll)))
    show("seq w tok task", call(*Q(place.adapter, place.target, place.conll), "--task", "conll2003"))
    real = os.fsync

    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("uhl_cli.files.os.fsync", full)
    show("full", call(*P(place.host, place.data, "n.st")))
    show("fullport", call(*Q(place.adapter, place.target, place.data), "--output", "np"))
    print(sorted(str(p) for p in here.rglob("*")))
    monkeypatch.undo()
    monkeypatch.chdir(here)
    c = call(*Q(place.adapter, place.target, place.data), env={"FORCE_COLOR": "1"})
    print(repr(c.out[:600]))
    c = call(*Q(place.adapter, place.target, place.data), env={"FORCE_COLOR": "1", "NO_COLOR": "1"})
    print(repr(c.out[:600]))
    print(repr(c.err))
    c = call(*Q("no", place.target, place.data), env={"FORCE_COLOR": "1", "NO_COLOR": "1"})
    print(repr(c.err))
    show("unfin", call(*P(place.host, place.data, "a.st")))
