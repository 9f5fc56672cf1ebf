"""What a type checker is told about the public functions is what they really take. `make lint` runs mypy on the
documentation's examples."""

import inspect
import sys
import typing

import pytest
import typing_extensions
from torch import Tensor

import zinit_kernels
from zinit_kernels import api, ported

# the names that api.py imports for type checkers alone
NAMES = {**vars(api), "Unpack": typing_extensions.Unpack}
OPTIONS = {
    "zero_init_attention": "SdpaOptions",
    "zero_init_attention_varlen": "VarlenOptions",
    "zero_init_attention_with_kvcache": "CacheOptions",
}


def hints(described) -> dict:
    return typing_extensions.get_type_hints(described, NAMES)


@pytest.mark.parametrize("name", OPTIONS)
def test_the_typed_options_are_the_keywords_of_the_signature(name):
    function, options = getattr(zinit_kernels, name), getattr(api, OPTIONS[name])
    keywords = [
        parameter
        for parameter in inspect.signature(function).parameters.values()
        if parameter.kind is parameter.KEYWORD_ONLY and parameter.name != "return_lse"
    ]
    types = hints(function)
    required = {parameter.name for parameter in keywords if parameter.default is parameter.empty}
    if name == "zero_init_attention_with_kvcache":  # None is refused, with more words than Python's
        required.add("causal")
        assert types.pop("causal") == bool | None
        types["causal"] = bool
    own = {parameter.name: types[parameter.name] for parameter in keywords}
    typed = hints(options)
    assert {option: typed[option] for option in own} == own
    assert typed.keys() - own.keys() <= ported.KEYWORDS[name].keys()
    assert options.__required_keys__ == required


@pytest.mark.skipif(sys.version_info < (3, 11), reason="typing.get_overloads is Python 3.11's")
@pytest.mark.parametrize("name", OPTIONS)
def test_return_lse_decides_the_return_type(name):
    function = getattr(zinit_kernels, name)
    returned = {}
    for overload in typing.get_overloads(function):
        types, given = hints(overload), inspect.signature(overload).parameters
        returned[types["return_lse"]] = types["return"]
        positional = [p.name for p in given.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
        assert positional == [
            p.name
            for p in inspect.signature(function).parameters.values()
            if p.kind is p.POSITIONAL_OR_KEYWORD
        ]
    assert returned == {
        typing.Literal[False]: Tensor,
        typing.Literal[True]: tuple[Tensor, Tensor],
        bool: Tensor | tuple[Tensor, Tensor],
    }
