import hashlib
import io
import os
import pickle
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

import ldae_hf
from ldae_hf import weights
from ldae_hf.cli import app
from ldae_hf.weights import convert


class RunsACommand:
    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return (os.system, (self.command,))


def save(folder, content, name="theirs.pth", **options):
    file = folder / name
    torch.save(content, file, **options)
    return file


def tensors():
    generator = torch.Generator().manual_seed(0)
    return {
        "conv.weight": torch.randn(4, 3, 3, 3, generator=generator).to(memory_format=torch.channels_last),
        "conv.bias": torch.nn.Parameter(torch.randn(4, generator=generator)),
        "half": torch.randn(2, 2, generator=generator).to(torch.bfloat16),
        "steps": torch.tensor(7),
    }


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype and torch.equal(found[name], value)


def test_no_other_file_of_the_package_reads_a_pickle():
    package = Path(ldae_hf.__file__).parent
    users = {
        file.name
        for file in package.rglob("*.py")
        if any(word in file.read_text(encoding="utf-8") for word in ("torch.load(", "import pickle", "from pickle"))
    }
    assert users == {"weights.py"}


@pytest.mark.parametrize("zipped", [True, False])
def test_a_checkpoint_comes_out_tensor_by_tensor(tmp_path, zipped):
    file = save(tmp_path, tensors(), _use_new_zipfile_serialization=zipped)
    report = convert(file)
    output = tmp_path / "theirs.safetensors"
    assert_same(load_file(output), tensors())
    *lines, last = report.splitlines()
    assert "conv.weight  F32  (4, 3, 3, 3)" in lines and "steps  I64  ()" in lines
    digest = hashlib.sha256(output.read_bytes()).hexdigest()
    assert last == f"{output}: 4 tensors, {output.stat().st_size:,} bytes, sha256 {digest}"
    assert sorted(tmp_path.iterdir()) == [file, output]


@pytest.mark.parametrize("key", ["state_dict", "model"])
def test_a_nested_state_dict_is_found_and_what_lies_beside_it_is_left_out(tmp_path, key):
    convert(save(tmp_path, {key: tensors(), "epoch": 3, "note": "theirs"}), tmp_path / "new" / "ours.safetensors")
    assert_same(load_file(tmp_path / "new" / "ours.safetensors"), tensors())


def test_tensors_that_share_memory_are_taken_apart(tmp_path):
    base = torch.arange(12.0)
    shared = {"tied": base, "also": base, "part": base[3:7], "view": base.view(3, 4).T, "wide": base[:1].expand(5)}
    convert(save(tmp_path, shared))
    assert_same(load_file(tmp_path / "theirs.safetensors"), shared)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("hidden", [False, True])
def test_a_pickle_that_asks_for_code_is_refused_by_name_and_does_not_run(tmp_path, zipped, hidden):
    proof = tmp_path / "it_ran"
    bad = RunsACommand(f"touch {proof}")
    content = {"state_dict": tensors(), "hyper_parameters": {"x": [bad]}} if hidden else bad
    file = save(tmp_path, content, _use_new_zipfile_serialization=zipped)
    with pytest.raises(
        ValueError, match=rf"its pickle asks for {os.system.__module__}\.system, which is code"
    ) as error:
        convert(file)
    assert "\n" not in str(error.value)
    assert not proof.exists()
    assert list(tmp_path.iterdir()) == [file]


def test_a_whole_module_is_refused_by_the_name_of_its_class(tmp_path):
    with pytest.raises(ValueError, match="its pickle asks for torch.nn.modules.linear.Linear"):
        convert(save(tmp_path, torch.nn.Linear(2, 2)))


def test_a_plain_pickle_is_not_a_checkpoint_and_does_not_run(tmp_path):
    proof, file = tmp_path / "it_ran", tmp_path / "theirs.pth"
    file.write_bytes(pickle.dumps({"a": RunsACommand(f"touch {proof}")}))
    with pytest.raises(ValueError, match="theirs.pth cannot be converted: it is not a checkpoint that torch.save"):
        convert(file)
    assert not proof.exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"a": torch.ones(1), "b": "text"}, "its entry 'b' is a str, not a tensor"),
        ({"a": torch.ones(1), "b": {"c": torch.ones(1)}}, "its entry 'b' is a dict, not a tensor"),
        ({"state_dict": {"a": 3}}, "its entry 'a' is a int, not a tensor"),
        ({3: torch.ones(1)}, "its entry 3 is a Tensor, not a tensor under a name"),
        ({"a": torch.eye(3).to_sparse()}, "its tensor 'a' is sparse"),
        ({}, "it holds no tensors"),
        ({"state_dict": {}}, "it holds no tensors"),
        ([torch.ones(1)], "it holds a list, not a dictionary of tensors"),
        (torch.ones(1), "it holds a Tensor, not a dictionary of tensors"),
        ({"a": torch.ones(1).expand(2**17, 2**17)}, "its tensors are 64.0 GiB, more than the 8 GiB allowed"),
    ],
)
def test_what_is_not_a_dictionary_of_tensors_is_refused_in_one_sentence(content, message):
    buffer = io.BytesIO()
    torch.save(content, buffer)
    buffer.seek(0)
    with pytest.raises(ValueError) as error:
        weights._tensors(torch.load(buffer, weights_only=True))
    assert str(error.value).startswith(message)


def test_the_sentence_reaches_the_caller_from_the_other_process(tmp_path):
    file = save(tmp_path, {"a": torch.ones(1), "b": "text"})
    with pytest.raises(ValueError) as error:
        convert(file)
    assert str(error.value) == f"{file} cannot be converted: its entry 'b' is a str, not a tensor under a name."


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("kept", [0.0, 0.1, 0.5, 0.99])
def test_a_truncated_file_is_called_damaged_and_leaves_nothing(tmp_path, zipped, kept):
    file = save(tmp_path, {"a": torch.ones(1000)}, _use_new_zipfile_serialization=zipped)
    data = file.read_bytes()
    file.write_bytes(data[: int(kept * len(data))])
    with pytest.raises(ValueError, match="damaged|is not a checkpoint"):
        convert(file)
    assert list(tmp_path.iterdir()) == [file]


def test_a_file_that_is_too_large_is_not_read(tmp_path, monkeypatch):
    file = save(tmp_path, {"a": torch.ones(1000)})
    packed = tmp_path / "packed.pth"
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data/0", bytes(100_000))
    assert packed.stat().st_size < 3000
    monkeypatch.setattr(weights, "MAX_BYTES", 3000)
    for name in (file, packed):
        with pytest.raises(ValueError, match=f"{name.name} holds .* GiB, more than"):
            convert(name)


def test_reading_has_a_time_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(weights, "TIMEOUT", 0.01)
    with pytest.raises(ValueError, match="took more than 0.01 seconds"):
        convert(save(tmp_path, tensors()))
    assert [file.name for file in tmp_path.iterdir()] == ["theirs.pth"]


def test_nothing_is_overwritten_without_force(tmp_path):
    file, output = save(tmp_path, tensors()), tmp_path / "theirs.safetensors"
    output.write_text("mine")
    with pytest.raises(ValueError, match="is there already; name another --output, or replace it with --force"):
        convert(file)
    assert output.read_text() == "mine"
    with pytest.raises(ValueError, match="is the checkpoint itself"):
        convert(file, file, force=True)
    convert(file, force=True)
    assert_same(load_file(output), tensors())


def test_a_failed_conversion_leaves_an_earlier_output_as_it_was(tmp_path):
    file, output = save(tmp_path, {"a": "text"}), tmp_path / "theirs.safetensors"
    output.write_text("mine")
    with pytest.raises(ValueError, match="its entry 'a'"):
        convert(file, force=True)
    assert output.read_text() == "mine"


def ldae(*arguments):
    return CliRunner().invoke(app, ["weights", *map(str, arguments)])


def test_the_command_prints_the_report(tmp_path):
    file, output = save(tmp_path, tensors()), tmp_path / "ours.safetensors"
    result = ldae("convert", file, "--output", output)
    assert result.exit_code == 0
    assert "conv.bias  F32  (4,)" in result.stdout and "4 tensors" in result.stdout
    result = ldae("convert", file, "--output", output)
    assert result.exit_code == 2 and "is there already" in result.stderr
    assert ldae("convert", file, "--output", output, "--force").exit_code == 0


def test_the_commands_error_is_one_line(tmp_path):
    result = ldae("convert", tmp_path / "nowhere.pth")
    assert result.exit_code == 2
    assert result.stderr == f"Error: There is no file {tmp_path / 'nowhere.pth'} to convert.\n"


@pytest.mark.parametrize("command", [[], ["convert"]])
def test_the_command_explains_itself(command):
    result = ldae(*command, "--help")
    assert result.exit_code == 0 and "Usage:" in result.stdout
