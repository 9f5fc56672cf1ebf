"""Named cases, their inputs, and the one rule that judges a kernel's results: for tests, benchmarks and `proof`."""

from .cases import (
    CACHE_CASES,
    CASES,
    GRADIENTS,
    SINK_CACHE_CASES,
    SINK_CASES,
    CacheCase,
    Case,
    Inputs,
    cumulative,
    make_cache_arguments,
    make_inputs,
)
from .check import check_cache_case, check_case, check_function, gradients
from .tolerance import assert_within_eager_error

__all__ = [
    "CACHE_CASES",
    "CASES",
    "GRADIENTS",
    "SINK_CACHE_CASES",
    "SINK_CASES",
    "CacheCase",
    "Case",
    "Inputs",
    "assert_within_eager_error",
    "check_cache_case",
    "check_case",
    "check_function",
    "cumulative",
    "gradients",
    "make_cache_arguments",
    "make_inputs",
]
