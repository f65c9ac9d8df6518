"""Which library makes a transfer set's texts smallest, and which of them bear a damaged stream.

    pip install brotli zstandard pyppmd
    python tests/benchmarks/text_compression.py --shared SHARED --output tests/benchmarks/results/text_compression.json

Texts are those that a file would hold, in random order, joined by newlines.  zstandard is also given a dictionary:
the package's own texts, which every reader has.  A damaged stream must end in an exception: a process of its own
decodes streams with flipped bits, cut ends and random bytes for some seconds, by the lengths that a hostile record may
claim, and its exit status is kept (-11 is a crash).
"""

from __future__ import annotations

import argparse
import bz2
import importlib.util
import json
import lzma
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
from label_free import Bench

from uhl_cli.data import TaskData
from uhl_cli.files import write_text
from uhl_cli.transfer.general import record_of, transfer_texts
from uhl_cli.transfer.texts import single_lines, without_contained

_ORDER, _MEMORY = 6, 16 << 20
_FUZZ = """
import random, sys, time
raw = open(sys.argv[2], "rb").read()
if sys.argv[1] == "ppmd":
    import pyppmd
    coder = pyppmd.Ppmd7Encoder({order}, {memory})
    packed = coder.encode(raw) + coder.flush()
    decode = lambda data, length: pyppmd.Ppmd7Decoder({order}, {memory}).decode(data, length)
elif sys.argv[1] == "brotli":
    import brotli
    packed, decode = brotli.compress(raw), lambda data, length: brotli.decompress(data)
elif sys.argv[1] == "zstandard":
    import zstandard
    packed = zstandard.ZstdCompressor().compress(raw)
    decode = lambda data, length: zstandard.ZstdDecompressor().decompress(data, max_output_size=length)
else:
    import bz2
    packed, decode = bz2.compress(raw), lambda data, length: bz2.BZ2Decompressor().decompress(data, length)
drawn, end = random.Random(0), time.monotonic() + 20
while time.monotonic() < end:
    data = bytearray(packed)
    kind = drawn.random()
    if kind < 0.4:
        for _ in range(drawn.randint(1, 5)):
            data[drawn.randrange(len(data))] ^= 1 << drawn.randrange(8)
    elif kind < 0.7:
        data = data[: drawn.randrange(len(data))]
    else:
        data = bytearray(drawn.randbytes(drawn.randrange(1, 5000)))
    try:
        decode(bytes(data), len(raw) + drawn.choice([0, -5, 100, 2_000_000]))
    except Exception:
        pass
"""


def sizes(raw: bytes, dictionary: bytes) -> dict[str, int]:
    """Bytes by every library that is installed."""
    found: dict[str, Callable[[], bytes]] = {
        "zlib": lambda: zlib.compress(raw, 9),
        "bz2": lambda: bz2.compress(raw, 9),
        "lzma": lambda: lzma.compress(raw, preset=9 | lzma.PRESET_EXTREME),
    }
    if importlib.util.find_spec("brotli"):
        import brotli  # type: ignore[import-not-found, unused-ignore]

        found["brotli"] = lambda: brotli.compress(raw, quality=11, lgwin=24, mode=brotli.MODE_TEXT)
    if importlib.util.find_spec("zstandard"):
        import zstandard  # type: ignore[import-not-found, unused-ignore]

        known = zstandard.ZstdCompressionDict(dictionary, dict_type=zstandard.DICT_TYPE_RAWCONTENT)
        found["zstandard"] = lambda: zstandard.ZstdCompressor(level=22).compress(raw)
        found["zstandard, dictionary"] = lambda: zstandard.ZstdCompressor(level=22, dict_data=known).compress(raw)
    if importlib.util.find_spec("pyppmd"):
        import pyppmd  # type: ignore[import-not-found, unused-ignore]

        def ppmd() -> bytes:
            coder = pyppmd.Ppmd7Encoder(_ORDER, _MEMORY)
            return bytes(coder.encode(raw) + coder.flush())

        found["ppmd"] = ppmd
    return {name: len(compress()) for name, compress in found.items()}


def texts_of(data: TaskData) -> list[str]:
    """What a file would hold of a task's training texts."""
    assert data.train is not None
    texts = single_lines([*data.train.texts, *(data.train.pairs or ())])
    texts = [texts[index] for index in np.random.default_rng(0).permutation(len(texts))]
    return list(dict.fromkeys(texts)) if data.train.words else [texts[index] for index in without_contained(texts)]


def main() -> None:
    """Measure everything."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    bench = Bench(arguments.shared, arguments.output.parent, {})
    report: dict[str, object] = {}
    for task in ("sst2", "conll2003", "amazon"):
        data = bench.data(task)
        assert data.train is not None
        raw = "\n".join(texts_of(data)).encode()
        dictionary = "\n".join(transfer_texts(record_of(data.train.texts))).encode()
        report[task] = {"raw": len(raw), **sizes(raw, dictionary)}
        print(task, report[task], flush=True)
    sample = arguments.output.with_suffix(".sample")
    sample.write_bytes("\n".join(transfer_texts(record_of([])))[:60_000].encode())
    code = _FUZZ.format(order=_ORDER, memory=_MEMORY)
    found = {}
    for name in ("bz2", "brotli", "zstandard", "ppmd"):
        if name == "bz2" or importlib.util.find_spec("pyppmd" if name == "ppmd" else name):
            done = subprocess.run([sys.executable, "-c", code, name, str(sample)], check=False, capture_output=True)
            found[name] = done.returncode
    sample.unlink()
    report["exit_status_on_damaged_streams"] = found
    print(found, flush=True)
    write_text(arguments.output, json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
