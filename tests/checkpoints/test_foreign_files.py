"""Files that nobody should have written: each is one sentence, at once, whatever it holds."""

import argparse
import json
import os
import pickle
import pickletools
import re
import struct
import warnings
import zipfile
from dataclasses import replace

import pytest
import torch
from adapter_files import TOLD, litgpt, official, official_v1, official_v2, ours, peft, put, write_peft
from safetensors.torch import load_file, save_file

from zinit_kernels import convert, inspect
from zinit_kernels.checkpoints import CheckpointError, load_adapter, save_adapter
from zinit_kernels.checkpoints.json_files import parse_json, read_json


def refusal(path, **options):
    with pytest.raises(CheckpointError) as raised:
        load_adapter(path, **options)
    message = str(raised.value)
    assert message.isprintable() and len(message) < 1500 and str(path) in message
    return message


# Tensors

UNUSUAL = {
    "sparse": (lambda t: t.to_sparse(), "holds a sparse tensor"),
    "csr": (lambda t: t.flatten(1).to_sparse_csr() if t.dim() > 1 else t, "holds a sparse tensor"),
    "meta": (lambda t: t.to("meta"), "without values, on the meta device"),
    "quantised": (
        lambda t: torch.quantize_per_tensor(t.float(), 0.1, 0, torch.qint8),
        "holds a quantised tensor",
    ),
    "nested": (lambda t: torch.nested.nested_tensor([t, t]), "holds a nested tensor"),
    "expanded": (lambda t: torch.ones(1).expand(10**12), "a tensor whose shape repeats fewer numbers"),
    "float8": (lambda t: t.to(torch.float8_e4m3fn), "floating-point numbers .*got float8_e4m3fn"),
    "complex": (lambda t: t.to(torch.complex64), "got complex64"),
    "bool": (lambda t: t > 0, "got bool"),
    "int64": (lambda t: t.to(torch.int64), "got int64"),
    "beyond float32": (lambda t: t.double() * 1e300, "finite numbers in float32"),
    "empty": (lambda t: t[..., :0, :] if t.dim() == 2 else t, "whole number of at most"),
}


NOT_BEFORE_1_6 = ("nested", "meta")  # torch.save cannot write these in its old format


@pytest.mark.parametrize(
    ("case", "legacy"),
    [(case, False) for case in UNUSUAL] + [(case, True) for case in UNUSUAL if case not in NOT_BEFORE_1_6],
)
def test_unusual_tensors(tmp_path, case, legacy):
    change, message = UNUSUAL[case]
    state = official()
    state = {name: change(tensor) for name, tensor in state.items()}
    torch.save(state, tmp_path / "adapter", _use_new_zipfile_serialization=not legacy)
    if legacy and case == "float8":
        message = "newer dtypes in the format before torch 1.6"
    assert re.search(message, refusal(tmp_path / "adapter"))


def test_float8_in_every_format(tmp_path):
    """One layer of them too: torch cannot stack it with others."""
    for name, state in {"peft": peft(), "litgpt": litgpt()["model"]}.items():
        first = next(iter(state))
        state[first] = state[first].to(torch.float8_e4m3fn)
        save_file(state, tmp_path / name)
        assert "got float8_e4m3fn" in refusal(tmp_path / name, layout="blocked")


def test_a_view_that_is_negated_keeps_its_sign(tmp_path):
    """Such a tensor stores the numbers without their sign, which a copy of its memory would lose."""
    state = official()
    query = state["adapter_query.weight"]
    state["adapter_query.weight"] = torch.complex(torch.zeros_like(query), -query).conj().imag
    torch.save(state, tmp_path / "adapter")
    save_adapter(tmp_path / "ours", load_adapter(tmp_path / "adapter"))
    assert torch.equal(load_adapter(tmp_path / "ours").prompts.flatten(0, 1), query)


def test_many_names_for_one_tensor_take_no_memory(tmp_path):
    row = torch.ones(1000, 1000)
    state = {f"transformer.h.{n}.attn.adapter_wte.weight": row for n in range(20)}
    torch.save(
        state | {f"transformer.h.{n}.attn.gating_factor": torch.ones(1) for n in range(20)}, tmp_path / "a"
    )
    assert "would take more than twice as many" in refusal(tmp_path / "a")


# Files of torch.save


def test_the_format_before_torch_1_6_is_read(tmp_path):
    torch.save(official_v1(), tmp_path / "old", _use_new_zipfile_serialization=False)
    torch.save(official_v1(), tmp_path / "new")
    old, new = load_adapter(tmp_path / "old"), load_adapter(tmp_path / "new")
    assert torch.equal(old.prompts, new.prompts) and torch.equal(old.gates, new.gates)


def zipped(path, pickle):
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("a/data.pkl", pickle)
        file.writestr("a/version", "3\n")


def nested_tuples(count):
    return b")" + b"\x85" * count


PICKLES = {
    "a program": (b"\x80\x02cos\nsystem\nX\x04\x00\x00\x00true\x85R.", "it asks for os.system"),
    "a large array": (
        b"\x80\x02c__builtin__\nbytearray\nJ\xff\xff\xff\x7f\x85R.",
        "it asks for __builtin__.bytearray",
    ),
    "deep": (b"\x80\x02" + nested_tuples(200_000) + b".", "nests its content deeper"),
    "a deep key": (b"\x80\x02}" + nested_tuples(200_000) + b"K\x01s.", "nests its content deeper"),
    "a wide key": (
        b"\x80\x02}q\x01)q\x00" + b"h\x00h\x00\x86q\x00" * 90 + b"0h\x01h\x00K\x01s.",
        "nests its content deeper or more often",
    ),
    "protocol 4": (b"\x80\x04}.", "pickle protocol 4"),
    "a long text": (b"\x80\x02X\xff\xff\xff\x7f.", "is truncated, or neither"),
    "nothing": (b"", "is truncated, or neither"),
    "itself": (b"\x80\x02]q\x00h\x00a.", "does not hold a dictionary"),
}


@pytest.mark.parametrize("case", PICKLES)
def test_pickles_are_looked_through_before_they_are_loaded(tmp_path, case):
    pickle, message = PICKLES[case]
    zipped(tmp_path / "a", pickle)
    assert message in refusal(tmp_path / "a")


def test_every_instruction_that_torch_writes_passes(tmp_path):
    """What the look through the pickle does not know would be refused in files that are right."""
    state = {
        "a": torch.ones(2, 3),
        "b": torch.nn.Parameter(torch.ones(1)),
        "c": torch.ones(2).to(torch.uint16),
    }
    optimizer = torch.optim.AdamW([state["b"]])
    state["b"].sum().backward()
    optimizer.step()
    arguments = argparse.Namespace(lr=1e-3, blr=None, names=["a", "b"], flag=True, adapter_len=10)
    whole = {"model": official_v1(), "optimizer": optimizer.state_dict(), "epoch": 3, "args": arguments}
    for legacy in (False, True):
        torch.save(whole, tmp_path / "whole", _use_new_zipfile_serialization=not legacy)
        assert load_adapter(tmp_path / "whole").prompts.shape == (4, 10, 32)


def test_a_compressed_archive_is_refused(tmp_path):
    """Mapped, its bytes were taken for numbers: a file that is right but zipped again gave random prompts."""
    torch.save(official_v1(), tmp_path / "a")
    with (
        zipfile.ZipFile(tmp_path / "a") as file,
        zipfile.ZipFile(tmp_path / "b", "w", zipfile.ZIP_DEFLATED) as out,
    ):
        for record in file.infolist():
            out.writestr(record, file.read(record), zipfile.ZIP_DEFLATED)
    assert "is a compressed archive" in refusal(tmp_path / "b")


@pytest.mark.parametrize("name", ["data.pkl", "data/0", "DATA/0"])
def test_an_archive_with_two_records_of_one_name_is_refused(tmp_path, name):
    """torch took one of them, the checks another."""
    torch.save(official_v1(), tmp_path / "a")
    with warnings.catch_warnings(), zipfile.ZipFile(tmp_path / "a", "a") as file:
        warnings.simplefilter("ignore")  # zipfile's own, of the name
        file.writestr(f"a/{name}", file.read("a/data/0") if "0" in name else file.read("a/data.pkl"))
    assert "holds two records of one name" in refusal(tmp_path / "a")


@pytest.mark.parametrize("where", ["behind", "two files"])
def test_bytes_behind_a_file_before_torch_1_6_are_refused(tmp_path, where):
    """torch reads what it needs, and not to the file's end."""
    torch.save(official_v1(), tmp_path / "a", _use_new_zipfile_serialization=False)
    content = (tmp_path / "a").read_bytes()
    (tmp_path / "a").write_bytes(content + (b"\0" if where == "behind" else content))
    assert "has more bytes behind what torch.save wrote" in refusal(tmp_path / "a")


@pytest.mark.parametrize("protocol", [3, 4, 5])
def test_another_protocol_before_torch_1_6_is_named(tmp_path, protocol):
    """These were called truncated. A pickle of another program still is none of torch.save's."""
    options = {"_use_new_zipfile_serialization": False, "pickle_protocol": protocol}
    torch.save(official_v1(), tmp_path / "a", **options)
    assert f"was saved with pickle protocol {protocol}" in refusal(tmp_path / "a")
    (tmp_path / "a").write_bytes(pickle.dumps(list(range(100)), protocol))
    assert "neither safetensors nor a file of torch.save" in refusal(tmp_path / "a")


@pytest.mark.parametrize("where", ["behind", "two files", "before"])
def test_bytes_around_an_archive_are_refused(tmp_path, where):
    """A file that something was appended to, or two in one: readers of zip files take the last and do not say so."""
    torch.save(official_v1(), tmp_path / "a")
    content = (tmp_path / "a").read_bytes()
    assert load_adapter(tmp_path / "a")
    joined = {"behind": content + b"\0", "two files": content + content, "before": b"PK\3\4" + content}
    (tmp_path / "a").write_bytes(joined[where])
    with pytest.raises(
        CheckpointError, match=f"more bytes {'behind' if where == 'behind' else 'before'} what torch"
    ):
        load_adapter(tmp_path / "a")


def test_checksums_are_compared(tmp_path):
    """torch compares none: a flipped bit, or bytes moved by one, became prompts."""
    torch.save(official_v1(), tmp_path / "a")
    content = bytearray((tmp_path / "a").read_bytes())
    place = content.index(official_v1()["adapter_query.weight"].numpy().tobytes()[:64])
    content[place] ^= 1
    (tmp_path / "a").write_bytes(content)
    assert "is truncated, or neither" in refusal(tmp_path / "a")
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(official_v1(), tmp_path / "b")
    finally:
        torch.serialization.set_crc32_options(True)
    assert load_adapter(tmp_path / "b").layers == (2, 3, 4, 5)


STRANGERS = {
    b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n": "a Git LFS pointer in place of the file",
    b"<!doctype html><html>": "a web page in place of the file",
    b"GGUF\x03\x00\x00\x00\x00\x00": "a GGUF file",
    b"\x1f\x8b\x08\x00\x00\x00\x00\x00\x00\x00": "compressed by gzip",
    b"": "is truncated, or neither",
    b"PK\x03\x04": "is truncated, or neither",
}


@pytest.mark.parametrize("content", STRANGERS)
def test_what_a_file_often_is_instead(tmp_path, content):
    (tmp_path / "a").write_bytes(content)
    assert STRANGERS[content] in refusal(tmp_path / "a")


def test_a_torchscript_archive_is_called_one(tmp_path):
    torch.jit.script(torch.nn.Linear(1, 1)).save(str(tmp_path / "a"))
    assert "is a TorchScript archive" in refusal(tmp_path / "a")


def test_a_config_that_holds_itself_a_million_times(tmp_path):
    content = official_v2()
    config = [0]
    for _ in range(60):
        config = [config, config]
    for told in ({"a": config}, {"a": {1: 2}}, {1: 2}):
        torch.save(content | {"config": told}, tmp_path / "a")
        refusal(tmp_path / "a")


# Safetensors


def header_of(path):
    content = path.read_bytes()
    (size,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + size]), content[8 + size :]


def with_metadata(path, **changes):
    save_adapter(path, ours())
    header, body = header_of(path)
    header["__metadata__"] |= changes
    header["__metadata__"] = {name: text for name, text in header["__metadata__"].items() if text is not None}
    encoded = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(encoded)) + encoded + body)
    return path


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_layers": str(10**12)}, "the metadata is damaged ('num_layers')"),
        ({"num_layers": "999999999"}, "a base has 1 to 9999 layers, num_layers says 999999999"),
        ({"num_layers": "0"}, "a base has 1 to 9999 layers"),
        ({"num_layers": None}, "('num_layers'): it is missing"),
        ({"num_layers": "6,6"}, "the metadata is damaged"),
        ({"layers": "9" * 5000}, "the metadata is damaged"),
        ({"layers": "٢,٣,٤,٥"}, "the metadata is damaged"),
        ({"layers": "2,3,4,1000000"}, "are not layers of 6, in order"),
        ({"num_heads": str(10**12)}, "the metadata is damaged ('num_heads')"),
        ({"num_heads": "999999999"}, "gates must have shape (4, 1 or 999999999)"),
        ({"gate_activation": "\x1b[31m"}, "gate_activation must be tanh or identity"),
        ({"layout": "{"}, "layout must be blocked or interleaved"),
        ({"version": None}, "is of version ,"),
        ({"x": "\ud800"}, "truncated or damaged"),
    ],
)
def test_metadata_that_say_nonsense_end_at_once(tmp_path, capsys, changes, message):
    path = with_metadata(tmp_path / "a", **changes)
    assert message in refusal(path)
    assert convert.main([str(path), str(tmp_path / "b"), "--to", "official-v1"]) == 2
    assert not (tmp_path / "b").exists() and capsys.readouterr().err.count("\n") == 1


def test_one_gate_and_a_billion_heads(tmp_path):
    one_gate = replace(ours(), gates=torch.ones(4, 1), num_heads=10**9)
    with pytest.raises(CheckpointError, match="num_heads must be 1 to the hidden size, 32"):
        save_adapter(tmp_path / "a", one_gate, "official-v1")


def test_a_header_that_names_something_twice(tmp_path):
    """The library takes the last, another one the first."""
    save_adapter(tmp_path / "a", ours())
    header, body = header_of(tmp_path / "a")
    again = dict(header["__metadata__"], gate_activation="identity")
    encoded = f'{{"__metadata__": {json.dumps(again)}, {json.dumps(header)[1:]}'.encode()
    (tmp_path / "a").write_bytes(struct.pack("<Q", len(encoded)) + encoded + body)
    assert "is truncated or damaged: its header is not valid JSON: it says '__metadata__' twice" in refusal(
        tmp_path / "a"
    )


@pytest.mark.parametrize("config", ["{", "[1]", "null", "{" * 100_000])
def test_a_config_in_the_metadata_is_read_like_any_json(tmp_path, capsys, config):
    """It came from a V2 file and goes back into one."""
    save_adapter(
        tmp_path / "a",
        replace(load_adapter(put(tmp_path / "v2", "official-v2")), metadata={"config": config}),
    )
    assert convert.main([str(tmp_path / "a"), str(tmp_path / "b"), "--to", "official-v2"]) == 2
    assert "official-v2: the adapter's config" in capsys.readouterr().err
    assert inspect.main([str(tmp_path / "a")]) == 0


def test_extras_may_not_replace_prompts_and_gates(tmp_path):
    """On the way back into V2 a tensor `extra.adapter_query.weight` took the place of the prompts, silently."""
    loaded = load_adapter(put(tmp_path / "v2", "official-v2"))
    forged = replace(loaded, extras=dict(loaded.extras) | {"adapter_query.weight": torch.zeros(40, 32)})
    save_adapter(tmp_path / "forged", forged)
    with pytest.raises(CheckpointError, match="official-v2 has no room for"):
        save_adapter(tmp_path / "back", load_adapter(tmp_path / "forged"), "official-v2")
    lora = load_adapter(put(tmp_path / "lora", "official-v2-lora"))
    for change in (
        lambda extras: {k: t for k, t in extras.items() if "5.attention.new_gate" not in k},
        lambda extras: {k: t for k, t in extras.items() if "5.attention.gate" not in k},
        lambda extras: extras | {"llama.layers.5.attention.gate": torch.ones(3)},
    ):
        with pytest.raises(CheckpointError, match="official-v2"):
            save_adapter(tmp_path / "back", replace(lora, extras=change(dict(lora.extras))), "official-v2")


# JSON


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"{", "is not valid JSON"),
        (b"\xff", "is not valid JSON"),
        (b"", "is not valid JSON"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"a":' * 70 + b"1" + b"}" * 70, "nested too deeply"),
        (b'{"a": "\\ud800"}', "half a surrogate pair"),
        (b'{"\\udc00": 1}', "half a surrogate pair"),
        (b'{"a": ' + b"9" * 5000 + b"}", "a whole number of 5000 digits"),
        (b'{"a": 1, "a": 2}', "says 'a' twice, 1 and 2"),
        (b'{"a": 1, "a": true}', "says 'a' twice"),
    ],
)
def test_json_that_programs_read_in_different_ways(text, message):
    with pytest.raises(CheckpointError) as raised:
        parse_json(text, "x.json")
    assert str(raised.value).startswith("x.json is not valid JSON") and message in str(raised.value)


def test_json_that_is_right(tmp_path):
    assert parse_json(b'\xef\xbb\xbf{"a": 1, "a": 1, "\\u00e9": [1e999, "\\ud83d\\ude00"]}', "x") == {
        "a": 1,
        "é": [float("inf"), "😀"],
    }
    (tmp_path / "x").write_text("[1]")
    with pytest.raises(CheckpointError, match=r"must hold a JSON object, it holds \[1\]"):
        read_json(tmp_path / "x")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(CheckpointError, match="is not a file"):
        read_json(tmp_path / "pipe")


@pytest.mark.parametrize("text", ["[" * 100_000, "[]", "{", '{"peft_type": "\\ud800"}'])
def test_a_damaged_adapter_config(tmp_path, text):
    write_peft(tmp_path / "a", peft())
    (tmp_path / "a" / "adapter_config.json").write_text(text)
    with pytest.raises(CheckpointError, match="adapter_config.json"):
        load_adapter(tmp_path / "a")


# Names that collide with others


def test_names_that_are_no_text(tmp_path):
    torch.save(official_v1() | {"\ud800": torch.ones(1)}, tmp_path / "a")
    assert "which is no text" in refusal(tmp_path / "a")
    torch.save(official_v1() | {"x" * 10**6: torch.ones(1)}, tmp_path / "b")
    assert "holds unknown xxx" in refusal(tmp_path / "b")


def test_the_instructions_of_pickles_are_all_known():
    """The extents follow every instruction of this Python's pickles by its description."""
    from zinit_kernels.checkpoints.pickles import _Extents

    for opcode in pickletools.opcodes:
        extents = _Extents()
        extents.memo = {0: extents.follow(pickletools.code2op["]"], None)}
        extents.stack = [extents.memo[0]] * 3 + [None, extents.memo[0], extents.memo[0]]
        extents.follow(opcode, 0)


def test_first_gates_of_lit_llama(tmp_path):
    """One gate for all heads, and the tensors without {"model": ...} around them."""
    state = litgpt(gate_shape=(1,))["model"]
    torch.save(state, tmp_path / "lit-llama-adapter-finetuned.pth")
    loaded = load_adapter(tmp_path / "lit-llama-adapter-finetuned.pth", layout="blocked")
    assert (loaded.gates.shape, loaded.num_heads, loaded.gate_activation) == ((4, 1), None, "identity")
    assert loaded.gates[0, 0] == state["transformer.h.2.attn.gating_factor"][0]
    told = load_adapter(tmp_path / "lit-llama-adapter-finetuned.pth", **TOLD)
    save_adapter(tmp_path / "litgpt", told, "litgpt")
    again = load_adapter(tmp_path / "litgpt", layout="blocked")
    assert torch.equal(again.gates, loaded.gates.expand(-1, 4)) and torch.equal(again.prompts, loaded.prompts)


def test_load_file_is_what_a_safetensors_library_reads(tmp_path):
    save_adapter(tmp_path / "a", ours())
    assert load_file(tmp_path / "a").keys() == {"prompts", "gates"}
