"""What llama.cpp is given is this project's base, and what it makes of it is compared with that base."""

import copy
from dataclasses import replace

import pytest
import torch

from bench import llama_cpp, machine, methods
from bench.suites import generate
from model import gguf_weights
from model.meta_weights import to_half_split
from model.quantised import quantise

pytest.importorskip("gguf")
CPU = torch.device("cpu")
CONFIG = replace(methods.TINY, intermediate_size=192, num_heads_q=4, num_heads_kv=2, head_dim=16)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_file_holds_the_weights(tmp_path, dtype, tied):
    base = methods.random_base(replace(CONFIG, tie_embeddings=tied), dtype, CPU)
    llama_cpp.write_gguf(base, tmp_path / "base.gguf")
    config, weights = gguf_weights.read(tmp_path / "base.gguf")
    same = ("hidden_size", "num_layers", "num_heads_q", "num_heads_kv", "head_dim", "rope_theta")
    assert [getattr(config, name) for name in same] == [getattr(CONFIG, name) for name in same]
    assert config.norm_eps == pytest.approx(CONFIG.norm_eps, rel=1e-6)  # the file has it in float32
    expected = base.state_dict()
    assert weights.keys() == expected.keys()
    for name, weight in weights.items():
        assert weight.dim() == 1 or weight.dtype == dtype
        assert torch.equal(weight.to(dtype), expected[name]), name


@pytest.mark.parametrize("format", ["int8", "int4"])
def test_packed_weights_become_blocks_of_their_bits(tmp_path, format):
    """A number is off by half a step at most, and by what a float16 scale adds for code 127. A Q4_0 block has no code
    for 8 steps above its middle: there it is a whole step."""
    base = quantise(methods.random_base(CONFIG, torch.bfloat16, CPU), format)
    llama_cpp.write_gguf(base, tmp_path / "base.gguf")
    _, plain, packed = gguf_weights.read_packed(tmp_path / "base.gguf")
    assert {weight.scheme.bits for name, weight in packed.items() if "proj" in name} == {int(format[3:])}
    assert {weight.scheme.bits for name, weight in packed.items() if "proj" not in name} == {8}
    assert all("norm" in name for name in plain)
    for name, weight in packed.items():
        expected = base.get_submodule(name.removesuffix(".weight")).packed.unpack(torch.float32)
        groups = expected.unflatten(1, (-1, 32))
        step = groups.abs().amax(-1, keepdim=True) / (127 if weight.scheme.bits == 8 else 8)
        off = (weight.unpack(torch.float32).unflatten(1, (-1, 32)) - groups).abs() / step
        assert off.max() < (1.01 if weight.scheme.bits == 4 else 0.5 + 127 * 2**-11), name


def test_rotary_pairs_go_there_and_back():
    weight = torch.randn(4 * 16, 8)
    assert torch.equal(to_half_split(llama_cpp.to_interleaved(weight, 16), 16), weight)


def test_a_base_that_the_file_cannot_describe_is_refused(tmp_path):
    base = methods.random_base(replace(CONFIG, sliding_window=8), torch.float32, CPU)
    with pytest.raises(ValueError, match="sliding window"):
        llama_cpp.write_gguf(base, tmp_path / "base.gguf")


@pytest.mark.skipif(bool(machine.why_missing("llama_cpp")), reason="llama-cpp-python is not installed")
def test_it_makes_the_likeliest_tokens_of_every_sequence():
    base = methods.random_base(CONFIG, torch.float32, CPU)
    engine = llama_cpp.LlamaCpp(copy.deepcopy(base))
    prompts = torch.randint(3, 256, (3, 11), generator=torch.Generator().manual_seed(1))
    made = engine.generate(prompts, 6)
    ours, _ = generate.by_this_project(base, None)
    assert torch.equal(made, ours(prompts, 6))
    assert torch.equal(engine.generate(prompts[:1], 9)[:, :6], made[:1])  # more room, in the same process
