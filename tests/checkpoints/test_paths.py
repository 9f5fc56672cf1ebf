"""Sources and destinations that are no plain file: one sentence that names them, nothing hangs, nothing is replaced."""

import errno
import os
import stat
from pathlib import Path

import pytest
from adapter_files import HEADS, ours, put
from full_disk import fill_at
from repository import run_python

from zinit_kernels import convert, inspect
from zinit_kernels.checkpoints import CheckpointError, load_adapter, save_adapter, write_atomically, writing


def told(capsys, main, *arguments):
    """The one line of an error."""
    assert main([str(argument) for argument in arguments]) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.startswith("error: ") and printed.err.count("\n") == 1
    return printed.err


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    done = run_python("-m", "zinit_kernels.inspect", tmp_path / "pipe", timeout=60)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"error: {tmp_path / 'pipe'} is neither a file nor a folder.\n"


def test_sources_that_are_no_adapter(tmp_path, capsys):
    (tmp_path / "folder").mkdir()
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for source, message in {
        tmp_path / "folder": "is a folder without adapter_model.safetensors",
        tmp_path / "absent": "No such file or directory",
        tmp_path / "loop": "symbolic links",
        tmp_path / ("x" * 300): "File name too long",
        "/dev/null": "/dev/null is neither a file nor a folder",
    }.items():
        assert message in told(capsys, inspect.main, source)


@pytest.mark.parametrize("what", ["pipe", "folder", "/dev/null", ".", "no folder"])
def test_destinations_that_are_no_file_stay_what_they_are(tmp_path, monkeypatch, capsys, what):
    """/dev/null too, which root could replace by a file."""
    monkeypatch.chdir(tmp_path)
    source = put(tmp_path / "v1.pth", "official-v1")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    destination = "absent/out" if what == "no folder" else what
    if what == "/dev/null":  # a device of this test's own, or none: the real one is not put at risk
        destination = tmp_path / "device"
        try:
            os.mknod(destination, stat.S_IFCHR | 0o666, os.makedev(1, 3))
        except PermissionError:
            pytest.skip("devices are made by root alone")
    before = sorted(os.listdir(tmp_path))
    error = told(capsys, convert.main, source, destination)
    expected = {"no folder": "No such file", "folder": "Is a directory", ".": "Is a directory"}
    assert error.startswith(
        f"error: {destination}: {expected.get(what, 'File exists and is no regular one')}"
    )
    assert sorted(os.listdir(tmp_path)) == before
    assert what != "pipe" or stat.S_ISFIFO(os.stat("pipe").st_mode)
    assert what != "/dev/null" or stat.S_ISCHR(os.stat(destination).st_mode)


def test_a_file_in_the_place_of_pefts_folder(tmp_path, capsys):
    source = put(tmp_path / "v1.pth", "official-v1")
    (tmp_path / "file").write_bytes(b"before")
    error = told(capsys, convert.main, source, tmp_path / "file", "--to", "peft", "--allow-loss")
    assert "File exists" in error and (tmp_path / "file").read_bytes() == b"before"


def test_a_read_only_folder(tmp_path, capsys):
    source, folder = put(tmp_path / "v1.pth", "official-v1"), tmp_path / "folder"
    folder.mkdir(mode=0o555)
    if os.geteuid() == 0:  # who writes everywhere but there
        folder = Path("/sys")
    error = told(capsys, convert.main, source, folder / "adapter")
    assert error == f"error: {folder / 'adapter'}: Permission denied.\n"


def test_a_file_becomes_another_format_of_itself(tmp_path):
    """SRC and DST may be one: it is read whole before anything is written."""
    expected = load_adapter(put(tmp_path / "file", "official-v1"))
    for target in ("zinit", "official-v2", "litgpt", "official-v1"):
        options = ["--layout", "blocked"] if target == "official-v1" else []
        assert convert.main([str(tmp_path / "file"), str(tmp_path / "file"), "--to", target, *options]) == 0
    found = load_adapter(tmp_path / "file")
    assert (found.prompts == expected.prompts).all() and os.listdir(tmp_path) == ["file"]
    assert (found.gates.tanh() - expected.gates.tanh()).abs().max() <= 1e-6
    folder = str(put(tmp_path / "peft", "peft"))
    assert convert.main([folder, folder, "--to", "peft"]) == 0
    assert load_adapter(folder).layers == found.layers


def test_a_link_stays_a_link(tmp_path):
    write_atomically(tmp_path / "file", b"before")
    (tmp_path / "link").symlink_to("file")
    save_adapter(tmp_path / "link", ours())
    assert (tmp_path / "link").is_symlink() and load_adapter(tmp_path / "file").num_heads == HEADS
    assert sorted(os.listdir(tmp_path)) == ["file", "link"]


@pytest.mark.parametrize("fails", ["open", "fsync"])
def test_an_error_names_the_file_and_not_the_temporary_one(tmp_path, capsys, monkeypatch, fails):
    """Also where the temporary file cannot be removed, as on a read-only file system."""
    write_atomically(tmp_path / "file", b"before")

    def refuse(*_, **__):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), "hidden")

    with monkeypatch.context() as patched:
        patched.setattr(Path, "unlink", refuse)
        patched.setattr(*((writing, "open") if fails == "open" else (os, "fsync")), refuse, raising=False)
        said = told(capsys, convert.main, put(tmp_path / "v1.pth", "official-v1"), tmp_path / "file")
    assert said == f"error: {tmp_path / 'file'}: Read-only file system.\n"
    assert (tmp_path / "file").read_bytes() == b"before"


def test_a_folder_is_written_whole_or_not_at_all(tmp_path, capsys, monkeypatch):
    """The disk is full when the second file comes: the first one stays what it was."""
    source, folder = put(tmp_path / "other", "peft"), put(tmp_path / "peft", "peft")
    for path in folder.iterdir():
        path.write_bytes(b"old")
    with monkeypatch.context() as patched:
        fill_at(patched, 2)
        assert "No space left on device" in told(capsys, convert.main, source, folder, "--to", "peft")
    assert [path.read_bytes() for path in folder.iterdir()] == [b"old", b"old"]
    assert convert.main([str(source), str(folder), "--to", "peft"]) == 0
    assert load_adapter(folder).layers == load_adapter(source).layers


def test_what_the_caller_says_may_not_contradict_the_file(tmp_path):
    v1, peft = put(tmp_path / "v1.pth", "official-v1"), put(tmp_path / "peft", "peft")
    save_adapter(tmp_path / "ours", ours())
    for path, options, message in (
        (v1, {"num_heads": HEADS + 1}, "v1.pth is for 4 heads, num_heads says 5"),
        (peft, {"num_heads": 0}, "num_heads must be 1 to the hidden size, 32, got 0"),
        (peft, {"num_heads": 10**8}, "num_heads must be 1 to the hidden size, 32, got 100000000"),
        (tmp_path / "ours", {"prompt_length": 8}, "ours has 10 prompts in each layer, prompt_length says 8"),
        (peft, {"prompt_length": 8}, "has 10 prompts in each layer, prompt_length says 8"),
        (v1, {"prompt_length": 0}, "must be a positive whole number, got 0"),
    ):
        with pytest.raises(CheckpointError, match=message):
            load_adapter(path, **options)
    assert load_adapter(v1, num_heads=HEADS, prompt_length=10).num_heads == HEADS


def test_a_file_that_is_replaced_keeps_its_permissions(tmp_path):
    """A private adapter would become one that everybody reads."""
    for mode in (0o600, 0o640):
        write_atomically(tmp_path / "file", b"before")
        (tmp_path / "file").chmod(mode)
        save_adapter(tmp_path / "file", ours())
        assert (tmp_path / "file").stat().st_mode & 0o777 == mode
