"""The operators' arguments, described once in `call.py`: who reads them agrees with the description."""

import ast
import re
import subprocess
import sys

import pytest
import torch
from repository import ROOT

from zinit_kernels import operators
from zinit_kernels.call import CACHE_CALL, CALL, CacheCall, Call, from_backward_arguments

CPP_TYPES = {
    "Tensor": "Tensor",
    "OptionalTensor": "Tensor?",
    "int64_t": "int",
    "double": "float",
    "bool": "bool",
}
OPERATORS = [(stage, backend) for backend, stages in operators.STAGES.items() for stage in stages]


IN_PYTHON = ("triton", "hybrid")


def schema_of(stage, backend):
    """(type, name) of each argument of a registered operator; sizes are ints to C++."""
    arguments = operators.operator(stage, backend)._schema.arguments
    types = {"Tensor": "Tensor", "Optional[Tensor]": "Tensor?", "number": "float"}
    return [(types.get(str(a.type), str(a.type).replace("SymInt", "int")), a.name) for a in arguments]


def binding_of(stage, backend):
    """(type, name) of each parameter of the C++ function that is registered for an operator."""
    source = "\n".join(path.read_text() for path in sorted((ROOT / "csrc" / backend).glob("*.cpp")))
    source = re.sub(r"//.*", "", source)
    function = re.search(rf'"{stage}_{backend}", TORCH_BOX\(&(?:\w+::)*(\w+)\)', source)[1]
    parameters = re.search(rf"^[\w:<>, ]+[ >]\n? *{function}\(([^)]*)\)\s*{{", source, re.MULTILINE)[1]
    found = []
    for parameter in parameters.split(","):
        kind, name = re.fullmatch(r"\s*(?:const )?(\w+)&?\s+(\w+)\s*", parameter).groups()
        found.append((CPP_TYPES[kind], name))
    return found


@pytest.mark.parametrize(("stage", "backend"), [pair for pair in OPERATORS if pair[1] not in IN_PYTHON])
def test_the_bindings_take_the_fields_in_their_order(stage, backend):
    """The stable ABI passes arguments by position and checks neither names nor types."""
    assert binding_of(stage, backend) == schema_of(stage, backend)


@pytest.mark.parametrize(
    ("stage", "file"),
    [
        *((stage, "triton/launch.py") for stage in operators.STAGES["triton"]),
        *((stage, "hybrid/run.py") for stage in operators.STAGES["hybrid"]),
    ],
)
def test_the_launchers_take_the_fields_in_their_order(stage, file):
    source = (ROOT / "zinit_kernels" / "backends" / file).read_text()
    (function,) = [f for f in ast.parse(source).body if isinstance(f, ast.FunctionDef) and f.name == stage]
    names = tuple(parameter.arg for parameter in function.args.args)
    assert names == operators.NAMES[stage] or (not names and function.args.vararg)  # then they build the call


@pytest.mark.parametrize(("stage", "backend"), OPERATORS)
def test_the_schema_has_the_fields_in_their_order(stage, backend):
    assert tuple(name for _, name in schema_of(stage, backend)) == operators.NAMES[stage]
    written = {a.name for a in operators.operator(stage, backend)._schema.arguments if a.is_write}
    assert written == {"decode": {"key_cache", "value_cache"}, "prompt": {"out"}}.get(stage, set())


def test_a_call_of_an_operators_arguments_is_the_call():
    call = Call(*map(torch.full, [(1, 1, 1, 1)] * 3, range(3)), scale=0.5, dense_mask=torch.ones(1))
    arguments = CALL.arguments(call)
    assert Call(*arguments) == call._replace(dense_mask=None)
    tensors, numbers = CALL.split(arguments)
    assert tensors + numbers == arguments and tensors[:3] == call[:3] and 0.5 in numbers
    saved, rebuilt, needs = from_backward_arguments((*"abcd", *arguments, 5))
    assert saved == tuple("abcd") and rebuilt == Call(*arguments) and needs == 5
    assert CALL.differentiable == ("query", "key", "value", "prompt_key", "prompt_value", "gate", "sinks")


def test_head_major_turns_tensors_of_four_dimensions_and_nothing_else():
    fields = {name: torch.empty(*range(2, 2 + spec.dims)) for name, spec in CACHE_CALL.specs.items()}
    call = CacheCall(**fields, **{name: 1 for name in CACHE_CALL.numbers})._replace(new_key=None)
    for name, ours, turned in zip(CacheCall._fields, call, call.head_major(), strict=True):
        if torch.is_tensor(ours) and ours.dim() == 4:
            assert turned.shape == (2, 4, 3, 5) and turned.data_ptr() == ours.data_ptr(), name
        else:
            assert turned is ours, name


IMPORT_TWICE = """
import gc, sys, torch
{counter}
import zinit_kernels as first

x = torch.randn(1, 2, 3, 8, requires_grad=True)
expected = first.zero_init_attention(x, x, x)
{forget}
for name in [name for name in sys.modules if name.split(".")[0] == "zinit_kernels"]:
    del sys.modules[name]
gc.collect()
import zinit_kernels as second
gc.collect()

assert second is not {other}
out = second.zero_init_attention(x, x, x)
assert torch.equal(out, expected)
out.sum().backward()
with torch._subclasses.fake_tensor.FakeTensorMode():
    y = torch.empty(1, 2, 3, 8)
    assert second.zero_init_attention(y, y, y).shape == y.shape
"""


@pytest.mark.parametrize("forget", [False, True])
def test_imports_again_after_sys_modules_was_cleared(forget):
    program = IMPORT_TWICE.format(
        forget="del first" if forget else "",
        other="None" if forget else "first",
        counter="" if forget else "import torch.utils.flop_counter",  # takes each formula once, too
    )
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr


def test_another_version_in_the_same_process_is_refused(monkeypatch):
    monkeypatch.setattr(operators, "SCHEMAS", operators.SCHEMAS | {"forward": "()"})
    with pytest.raises(ImportError, match="another version of zinit_kernels"):
        operators._define()


def test_fakes_take_tensors_of_one_device():
    """One meta tensor makes torch call the fake for all of them: its output would be memory that nobody wrote."""
    x = torch.zeros(1, 1, 2, 8)
    arguments = CALL.arguments(Call(x, x.to("meta"), x, max_seqlen_q=2, max_seqlen_k=2))
    with pytest.raises(RuntimeError, match="key must be on the device of query, cpu, got meta"):
        torch.ops.zinit.forward_cpu(*arguments)
