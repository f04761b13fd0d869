"""Our bare names mean OWNER/NAME where they are read from the Hub, and nothing else changes its meaning."""

import asyncio
import json
import logging
import subprocess
import sys
from pathlib import Path

import httpx2
import pytest
from hub_server import READ, TOKENS, WRITE, Hub, connected, hub_environment
from huggingface_hub import (
    HfApi,
    constants,
    get_async_session,
    get_session,
    hf_hub_download,
    set_client_factory,
    snapshot_download,
)
from huggingface_hub.errors import RepositoryNotFoundError
from tiny_encoder import pictures, save_tiny_encoder, tiny_model, tiny_processor

from ldae_hf import LDAEForImageClassification, LDAEModel, hub_names
from ldae_hf.hub_names import MODELS, full_name, owner


FILES = {"config.json": b"{}", "vit/config.json": b"{ }", "model.safetensors": b"tensors"}


@pytest.fixture
def hub(tmp_path, monkeypatch):
    for name in ("LDAE_HUB_OWNER", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(hub_names, "_announced", set())
    with Hub(tokens=TOKENS) as hub, connected(hub, tmp_path / "cache"):
        hub.add("ldae-hf/ldae-vit-l", FILES)
        hub.add("me/ldae-vit-l", {"config.json": b"mine"}, private=True)
        hub.add("ldae-hf/ldae-vit-xxl", FILES)
        yield hub


def asked(hub: Hub) -> list[str]:
    """The paths that were asked for, but for what the client asks once for itself."""
    paths = [request.split()[1].partition("?")[0] for request in hub.requests]
    return [path for path in paths if path != "/api/agent-harnesses"]


# ---- one process, and the client itself


def test_each_way_to_read_a_bare_name_reads_the_owners_repository(hub, caplog):
    caplog.set_level(logging.INFO, "ldae_hf")
    sha = HfApi().model_info("ldae-vit-l").sha
    assert Path(hf_hub_download("ldae-vit-l", "config.json")).read_bytes() == b"{}"
    assert Path(hf_hub_download("ldae-vit-l", "config.json", revision=sha, subfolder="vit")).read_bytes() == b"{ }"
    assert {path.name for path in Path(snapshot_download("ldae-vit-l")).iterdir()} == {
        name.split("/")[0] for name in FILES
    }
    assert set(HfApi().list_repo_files("ldae-vit-l")) == set(FILES)
    assert [info.path for info in HfApi().get_paths_info("ldae-vit-l", ["config.json"])] == ["config.json"]
    assert [branch.name for branch in HfApi().list_repo_refs("ldae-vit-l").branches] == ["main"]
    assert len(HfApi().list_repo_commits("ldae-vit-l")) == 1 and HfApi().repo_exists("ldae-vit-l")
    assert asked(hub) and all("ldae-hf/ldae-vit-l" in path for path in asked(hub))
    assert [record.getMessage() for record in caplog.records if record.name == "ldae_hf.hub_names"] == [
        f"ldae-vit-l is read from {hub.url}/ldae-hf/ldae-vit-l; LDAE_HUB_OWNER names another owner, and "
        "LDAE_NO_ALIASES=1 leaves names alone."
    ]


def test_what_was_read_by_its_bare_name_is_there_without_a_network(hub, monkeypatch):
    snapshot_download("ldae-vit-l")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub.requests.clear()
    assert Path(hf_hub_download("ldae-vit-l", "config.json")).read_bytes() == b"{}" and hub.requests == []


def test_the_owner_is_a_setting_and_may_be_one_whose_repository_is_private(hub, monkeypatch):
    monkeypatch.setenv("LDAE_HUB_OWNER", "me")
    assert Path(hf_hub_download("ldae-vit-l", "config.json", token=READ)).read_bytes() == b"mine"
    with pytest.raises(RepositoryNotFoundError, match="/api/models/me/ldae-vit-l"):
        HfApi().model_info("ldae-vit-l", token=False)


@pytest.mark.parametrize(
    "name", ["..", "a/b", "/", "a?b=c", "a#b", "a\r\nX-Evil: 1", "a%2fb", "@evil.example", " ", "é"]
)
def test_an_owner_that_is_none_is_refused_before_anything_is_asked(hub, monkeypatch, name):
    monkeypatch.setenv("LDAE_HUB_OWNER", name)
    for attempt in (owner, lambda: full_name("ldae-vit-l"), lambda: HfApi().model_info("ldae-vit-l")):
        with pytest.raises(ValueError, match="LDAE_HUB_OWNER is '.*', which names no user or organisation of the Hub"):
            attempt()
    assert hub.requests == []


@pytest.mark.parametrize(
    "name", ["ldae-vit-xxl", "ldae-vit", "ldae-vit-l2", "LDAE-ViT-L", "ldae-hf/ldae-vit-l", "l", "gpt2"]
)
def test_no_other_name_changes_its_meaning(hub, name):
    assert full_name(name) == name
    HfApi().repo_exists(name)
    assert asked(hub) == [f"/api/models/{name}"]


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/api/datasets/ldae-vit-l"),
        ("GET", "/datasets/ldae-vit-l/resolve/main/a"),
        ("GET", "/api/models/ldae-vit-l/xet-write-token/main"),
        ("GET", "/api/models/ldae-vit-l/settings"),
        ("GET", "/api/models/ldae-vit-l%2f..%2fme"),
        ("GET", "/x/api/models/ldae-vit-l"),
        ("GET", "/ldae-vit-l"),
        ("POST", "/api/models/ldae-vit-l/commit/main"),
        ("POST", "/api/models/ldae-vit-l/preupload/main"),
        ("POST", "/api/models/ldae-vit-l/tag/paths-info"),
        ("PUT", "/api/models/ldae-vit-l"),
        ("DELETE", "/api/models/ldae-vit-l/branch/main"),
        ("POST", "/ldae-vit-l.git/info/lfs/objects/batch"),
    ],
)
def test_an_address_that_does_not_read_a_model_is_left_as_it_is(hub, method, path):
    get_session().request(method, hub.url + path)
    assert not any("ldae-hf" in path for path in asked(hub))


def test_an_address_on_another_host_is_left_as_it_is(hub):
    with Hub() as other:
        get_session().get(f"{other.url}/api/models/ldae-vit-l")
        get_session().get(f"{other.url}/ldae-vit-l/resolve/main/config.json")
        HfApi(endpoint=other.url).repo_exists("ldae-vit-l")
        assert asked(other) == [
            "/api/models/ldae-vit-l",
            "/ldae-vit-l/resolve/main/config.json",
            "/api/models/ldae-vit-l",
        ]
    assert hub.requests == []


def test_a_mirror_in_a_folder_of_its_host_is_the_hub(hub, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", f"{hub.url}/mirror")
    for path in ("/mirror/api/models/ldae-vit-l", "/mirror/ldae-vit-l/resolve/main/a?b=c", "/api/models/ldae-vit-l"):
        get_session().get(hub.url + path)
    assert [request.split()[1] for request in hub.requests] == [
        "/mirror/api/models/ldae-hf/ldae-vit-l",
        "/mirror/ldae-hf/ldae-vit-l/resolve/main/a?b=c",
        "/api/models/ldae-vit-l",
    ]


def test_the_client_for_asyncio_reads_bare_names_too(hub):
    async def status() -> int:
        async with get_async_session() as client:
            return (await client.get(f"{hub.url}/api/models/ldae-vit-l")).status_code

    assert asyncio.run(status()) == 200 and asked(hub) == ["/api/models/ldae-hf/ldae-vit-l"]


def test_push_to_hub_of_a_bare_name_stays_in_the_users_namespace(hub, tmp_path):
    tiny_processor().push_to_hub("ldae-vit-b", token=WRITE)
    assert "preprocessor_config.json" in hub.repositories["models", "me/ldae-vit-b"].files
    assert ("models", "ldae-hf/ldae-vit-b") not in hub.repositories


def test_whoever_has_made_clients_of_their_own_keeps_them(hub):
    before = hub_names._http._GLOBAL_CLIENT_FACTORY
    assert before is hub_names._client  # if not, huggingface_hub keeps it elsewhere now
    assert hub_names._http._GLOBAL_ASYNC_CLIENT_FACTORY is hub_names._async_client
    try:
        set_client_factory(httpx2.Client)
        hub_names.install()
        get_session().get(f"{hub.url}/api/models/ldae-vit-l")
        assert asked(hub) == ["/api/models/ldae-vit-l"]
    finally:
        set_client_factory(before)


# ---- fresh processes, and transformers

SCRIPT = """
import json, os, sys
from transformers import AutoBackbone, AutoConfig, AutoImageProcessor, AutoModel, pipeline
from transformers import AutoModelForImageClassification as AutoClassifier
if sys.argv[1] == "own-clients":
    import httpx2, huggingface_hub
    huggingface_hub.set_client_factory(httpx2.Client)
import ldae_hf
from tiny_encoder import pictures

seen = {}


def attempt(name, do):
    try:
        seen[name] = do()
    except Exception as error:
        seen[name] = f"{type(error).__name__}: {error}"


def features(model):
    pixels = AutoImageProcessor.from_pretrained("ldae-vit-b")(pictures(2), return_tensors="pt")
    return model(**pixels).last_hidden_state.double().sum().item()


attempt("config", lambda: AutoConfig.from_pretrained("ldae-vit-b").hidden_size)
if sys.argv[1] in ("online", "offline"):
    attempt("model", lambda: features(AutoModel.from_pretrained("ldae-vit-b")))
    attempt("revision", lambda: features(AutoModel.from_pretrained("ldae-vit-b", revision="v1")))
    attempt("full name", lambda: features(AutoModel.from_pretrained("team/ldae-vit-b")))
    attempt("processor", lambda: type(AutoImageProcessor.from_pretrained("ldae-vit-b")).__name__)
    attempt("classifier", lambda: AutoClassifier.from_pretrained("ldae-vit-half-l").config.num_labels)
    task = "image-feature-extraction"
    attempt("pipeline", lambda: len(pipeline(task, model="ldae-vit-b", device="cpu")(pictures(1))[0][0]))
    attempt("backbone", lambda: type(AutoBackbone.from_pretrained("ldae-vit-b")).__name__)
    attempt("private", lambda: AutoConfig.from_pretrained("ldae-vit-l").hidden_size)
    os.chdir(sys.argv[2])
    attempt("local folder", lambda: AutoConfig.from_pretrained("ldae-vit-b").hidden_size)
print(json.dumps(seen))
"""


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    """What fresh processes saw, each with the paths that it asked for; the first one begins with an empty cache."""
    folder = tmp_path_factory.mktemp("names")
    processor = tiny_processor()
    encoder = tiny_model(processor).ldae
    save_tiny_encoder(folder / "encoder")
    LDAEForImageClassification(LDAEModel.from_pretrained(folder / "encoder").config).save_pretrained(folder / "head")
    (folder / "here" / "ldae-vit-b").mkdir(parents=True)
    config = json.loads((folder / "encoder" / "config.json").read_text()) | {"hidden_size": 64}
    (folder / "here" / "ldae-vit-b" / "config.json").write_text(json.dumps(config))

    def files(name: str) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in (folder / name).iterdir()}

    seen = {"expected": encoder(**processor(pictures(2), return_tensors="pt")).last_hidden_state.double().sum().item()}
    with Hub(tokens=TOKENS) as hub:
        repository = hub.add("team/ldae-vit-b", files("encoder"))
        repository.tags["v1"] = repository.branches["main"]
        hub.add("team/ldae-vit-half-l", files("head"))
        hub.add("team/ldae-vit-l", files("encoder"), private=True)

        def run(way: str, **environment: str) -> None:
            hub.requests.clear()
            variables = hub_environment(hub, folder / "home", LDAE_HUB_OWNER="team", **environment)
            command = [sys.executable, "-c", SCRIPT, way, str(folder / "here")]
            done = subprocess.run(command, capture_output=True, text=True, timeout=170, env=variables)
            assert done.returncode == 0, done.stderr[-3000:]
            seen[way] = json.loads(done.stdout.splitlines()[-1]) | {"asked": asked(hub)}

        run("online")
        run("offline", HF_HUB_OFFLINE="1")
        run("no-aliases", LDAE_NO_ALIASES="1", HF_HOME=str(folder / "other"))
        run("own-clients", HF_HOME=str(folder / "another"))
    return seen


@pytest.mark.parametrize("way", ["online", "offline"])
def test_every_auto_class_and_pipeline_reads_a_bare_name_from_the_hub_and_then_from_the_cache(seen, way):
    outcome = seen[way]
    assert outcome["config"] == 32 and outcome["classifier"] == 2 and outcome["processor"] == "LDAEImageProcessor"
    assert [outcome[name] for name in ("model", "revision", "full name")] == pytest.approx(
        [seen["expected"]] * 3, rel=1e-5
    )
    assert outcome["pipeline"] == 16
    assert ("team/ldae-vit-b" in str(outcome["asked"])) == (way == "online")
    if way == "online":
        assert outcome["backbone"] == "LDAEBackbone"  # offline transformers asks the Hub all the same


@pytest.mark.parametrize("way", ["online", "offline"])
def test_a_local_folder_of_that_name_comes_first(seen, way):
    assert seen[way]["local folder"] == 64


def test_a_private_repository_is_not_read_without_its_token(seen):
    assert seen["online"]["private"].startswith("OSError: ldae-vit-l is not a local folder and is not a valid model")


@pytest.mark.parametrize("way", ["no-aliases", "own-clients"])
def test_aliases_can_be_switched_off_and_leave_other_peoples_clients_alone(seen, way):
    assert seen[way]["config"].startswith("OSError: ldae-vit-b is not a local folder and is not a valid model")
    assert not any("team" in path for path in seen[way]["asked"])


def test_the_names_are_those_of_the_published_sizes():
    assert MODELS == ("ldae-vit-b", "ldae-vit-half-l", "ldae-vit-l")
