"""A Hub that refuses, stumbles or hangs up: a sentence that says how to get access, or the same rows after a wait.

One fresh process sees it all, against a server on the loopback, since Hugging Face's libraries read the Hub's address
when they are imported. It does not sleep, but lists how long it would have.
"""

import io
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image


NUM_ROWS = 48
SCRIPT = """
import json, logging, os, sys, time
from pathlib import Path
from hub_server import Hub

folder = Path(sys.argv[1])
hubs = {kind: Hub({file.name: file.read_bytes() for file in (folder / kind).iterdir()}) for kind in ("parquet", "tar")}
os.environ["HF_ENDPOINT"] = hubs["parquet"].__enter__().url
waits, sleep = [], time.sleep
time.sleep = lambda seconds: (waits.append(seconds), sleep(0.001))

from ldae_hf.training.data import eval_loader, load_images

lines = []
handler = logging.Handler()
handler.emit = lambda record: lines.append(record.getMessage())
logging.getLogger("ldae_hf").addHandler(handler)
HUB = hubs["parquet"]


def read(name, answer, *, where="", times=10**9, after=0, streaming, token=None, kind="parquet"):
    met = []

    def fault(method, path, count):
        if where in path and "agent-harnesses" not in path:
            met.append(path)
            return answer if after < len(met) <= after + times else None

    HUB.files, HUB.fault, HUB.requests = hubs[kind].files, fault, []
    waits.clear(), lines.clear()
    os.environ.pop("HF_TOKEN", None)
    if token:
        os.environ["HF_TOKEN"] = token
    name += " stream" if streaming else " map"
    try:
        source = load_images(f"someone/{name.replace(' ', '-')}", streaming=streaming)
        batches = list(eval_loader(source, 16, 8))
        labels = [label for batch in batches for label in batch["labels"].tolist()]
        pixels = [int(image.long().sum()) for batch in batches for image in batch["pixel_values"]]
        result = {"labels": labels, "pixels": pixels, "bad": sum(len(batch["bad_images"]) for batch in batches)}
    except Exception as error:
        result = {"error": type(error).__name__, "message": str(error)}
    result |= {"waits": list(waits), "lines": list(lines), "met": len(met)}
    print(json.dumps([name, result]), flush=True)


gated = {"X-Error-Code": "GatedRepo"}
for streaming in (False, True):
    read("sound", None, streaming=streaming)
    read("gated", (401, gated), streaming=streaming)
    read("no-access", (403, gated), streaming=streaming, token="hf_abc")
    read("open-card", (403, gated), where="/resolve/0", streaming=streaming, token="hf_abc")
    read("gated-files", (401, gated), where=".parquet", streaming=streaming)
    read("absent", (401, {"X-Error-Code": "RepoNotFound"}), streaming=streaming)
    for answer in (408, 500, 503, "drop"):
        read(f"opening-{answer}", answer, times=6 if answer == "drop" else 20, streaming=streaming)
        read(f"reading-{answer}", answer, where="00001-of", times=20, streaming=streaming)
    read("opening-429", (429, {"Retry-After": "300"}), times=14, streaming=streaming)
    read("reading-429", (429, {"Retry-After": "300"}), where="00001-of", times=14, streaming=streaming)
    read("down", 503, streaming=streaming)
for times in (0, 1, 2, 3, 9):
    read(f"tar-{times}", "drop", where=".tar", after=1, times=times, streaming=True, kind="tar")
read("tar-503", 503, where=".tar", after=2, times=20, streaming=True, kind="tar")
"""


def picture(number: int) -> bytes:
    noise = np.random.default_rng(number).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(noise).save(stream, "PNG")
    return stream.getvalue()


@pytest.fixture(scope="module")
def seen(tmp_path_factory) -> dict[str, dict]:
    """What the process saw of each data set, by its name and way of reading."""
    folder = tmp_path_factory.mktemp("hub")
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    for kind in ("parquet", "tar"):
        (folder / kind).mkdir()
    for shard in range(2):
        numbers = range(shard * NUM_ROWS // 2, (shard + 1) * NUM_ROWS // 2)
        rows = {"image": [{"bytes": picture(i), "path": None} for i in numbers], "label": list(numbers)}
        datasets.Dataset.from_dict(rows, features).to_parquet(folder / f"parquet/train-0000{shard}-of-00002.parquet")
        with tarfile.open(folder / f"tar/train-{shard}.tar", "w") as tar:
            for i in numbers:
                for extension, content in (("png", picture(i)), ("cls", str(i).encode())):
                    member = tarfile.TarInfo(f"{i:03d}.{extension}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path]),
        "HF_HOME": str(folder / "home"),
        "HF_HUB_OFFLINE": "0",
    }
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(folder)], capture_output=True, text=True, timeout=170, env=environment
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return dict(json.loads(line) for line in done.stdout.splitlines())


ROWS = {"labels": list(range(NUM_ROWS)), "bad": 0}


@pytest.mark.parametrize("way", ["map", "stream"])
@pytest.mark.parametrize("name", ["gated", "no-access", "open-card", "gated-files"])
def test_a_gated_data_set_is_an_error_that_says_how_to_get_access(seen, name, way):
    outcome = seen[f"{name} {way}"]
    assert outcome["error"] == "ValueError" and outcome["waits"] == []
    message = outcome["message"]
    assert message.startswith(f"someone/{name}-{way} is gated: accept its terms on http://127.0.0.1")
    assert f"/datasets/someone/{name}-{way}, then log in with `hf auth login` or set HF_TOKEN" in message
    assert ("the token that was found has no access" if "no-" in name or "open" in name else "no token") in message
    assert message.endswith("or give a folder of images or local Parquet files instead.")


@pytest.mark.parametrize("way", ["map", "stream"])
def test_a_data_set_that_is_not_there_is_an_error_that_says_so(seen, way):
    outcome = seen[f"absent {way}"]
    assert outcome["error"] == "ValueError" and outcome["waits"] == []
    assert f"no data set someone/absent-{way}" in outcome["message"]


@pytest.mark.parametrize("way", ["map", "stream"])
@pytest.mark.parametrize("answer", ["408", "500", "503", "drop"])
@pytest.mark.parametrize("what", ["opening", "reading"])
def test_after_an_outage_the_rows_are_those_of_an_undisturbed_read(seen, what, answer, way):
    outcome, sound = seen[f"{what}-{answer} {way}"], seen[f"sound {way}"]
    assert outcome | ROWS == outcome and outcome["pixels"] == sound["pixels"]
    assert outcome["met"] > sound["met"] or what == "reading"
    if what == "opening":  # a stream is read in another process, whose waits are not seen here
        own = [line for line in outcome["lines"] if line.startswith(f"Opening someone/opening-{answer}-{way} failed (")]
        assert len(own) >= 2 and own[0].endswith("; try 2 of 10 in 1 s.") and own[1].endswith("; try 3 of 10 in 2 s.")


@pytest.mark.parametrize("way", ["map", "stream"])
def test_a_server_that_says_how_long_to_wait_is_obeyed(seen, way):
    outcome = seen[f"opening-429 {way}"]
    assert outcome | ROWS == outcome and min(outcome["waits"]) >= 300
    outcome = seen[f"reading-429 {way}"]
    assert outcome | ROWS == outcome


@pytest.mark.parametrize("way", ["map", "stream"])
def test_a_hub_that_stays_away_is_given_up_with_an_error_that_counts_the_tries(seen, way):
    outcome = seen[f"down {way}"]
    assert outcome["error"] == "ConnectionError"
    assert outcome["message"].startswith(
        f"Opening someone/down-{way} failed 10 times, the last time with: Server error"
    )
    assert len(outcome["lines"]) == 9


@pytest.mark.parametrize("fault", ["0", "1", "2", "3", "9", "503"])
def test_a_stream_that_breaks_off_in_the_middle_of_a_tar_loses_and_repeats_no_row(seen, fault):
    outcome = seen[f"tar-{fault} stream"]
    assert outcome | ROWS == outcome and outcome["pixels"] == seen["sound stream"]["pixels"]
