"""How rotary frequencies are stretched, and the ways in which configuration files say it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from zinit_kernels.console import shown

from .errors import UserError
from .fields import number, refuse_unknown

ROPE_KINDS = ("default", "linear", "llama3")
_FIELDS = (
    "rope_type", "type", "rope_theta", "factor", "low_freq_factor", "high_freq_factor",
    "original_max_position_embeddings", "partial_rotary_factor",
)  # fmt: skip


@dataclass(frozen=True)
class RopeScaling:
    """How the rotary frequencies are stretched beyond the length that the model was first trained on.

    linear: every frequency is divided by `factor`. llama3: wavelengths above original_max_seq_len / low_freq_factor are
    divided by it, those below original_max_seq_len / high_freq_factor are kept, and the band between is interpolated.
    """

    kind: str
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_seq_len: int = 8192

    def to_hf(self) -> dict[str, Any]:
        """config.json's rope_scaling."""
        if self.kind == "linear":
            return {"rope_type": self.kind, "factor": self.factor}
        return {
            "rope_type": self.kind,
            "factor": self.factor,
            "low_freq_factor": self.low_freq_factor,
            "high_freq_factor": self.high_freq_factor,
            "original_max_position_embeddings": self.original_max_seq_len,
        }


def rope_of_hf(config: Mapping[str, Any], max_seq_len: int) -> tuple[float, RopeScaling | None]:
    """(rope_theta, scaling) of a config.json.

    transformers 5 writes both into rope_parameters; earlier versions write rope_theta and rope_scaling.
    """
    said = [config[name] for name in ("rope_scaling", "rope_parameters") if config.get(name)]
    for rope in said:
        if not isinstance(rope, dict):
            raise UserError(
                f"config.json must describe the rotary embedding by an object, it has {shown(rope)}."
            )
    rope = dict(said[-1]) if said else {}
    if len(said) > 1 and _with_defaults(said[0], config) != _with_defaults(said[1], config):
        raise UserError(
            "config.json describes the rotary embedding twice, and rope_scaling is not rope_parameters."
        )
    # These two may stand beside the object. As in transformers, the first counts only if the object lacks it, and the
    # second counts in any case
    if config.get("partial_rotary_factor") is not None:
        rope.setdefault("partial_rotary_factor", config["partial_rotary_factor"])
    if config.get("original_max_position_embeddings") is not None:
        rope["original_max_position_embeddings"] = config["original_max_position_embeddings"]
    refuse_unknown(rope, "config.json's rotary embedding", _FIELDS)
    read = partial(number, rope, "config.json")
    theta = read("rope_theta", float, number(config, "config.json", "rope_theta", float, 1e4))
    kind = rope.get("rope_type", rope.get("type"))
    if None not in (kind, rope.get("type")) and rope["type"] != kind:
        raise UserError(
            f"config.json says rope_type {shown(kind)} and type {shown(rope['type'])} of one rotary embedding."
        )
    if kind is None and rope.get("factor") is not None:
        raise UserError("config.json has a factor of the rotary embedding and no rope_type.")
    kind = "default" if kind is None else kind
    if kind not in ROPE_KINDS:
        raise UserError(
            f"config.json asks for rotary scaling of type {shown(kind)}, supported are {', '.join(ROPE_KINDS)}."
        )
    if read("partial_rotary_factor", float, 1.0) != 1.0:
        raise UserError(
            "config.json rotates only a part of each head (partial_rotary_factor), which is not supported."
        )
    if kind == "default":
        return theta, None
    if kind == "linear":
        return theta, RopeScaling(kind, read("factor", float))
    scaling = RopeScaling(
        kind,
        read("factor", float),
        read("low_freq_factor", float),
        read("high_freq_factor", float),
        read("original_max_position_embeddings", int, max_seq_len),
    )
    if scaling.high_freq_factor <= scaling.low_freq_factor:
        raise UserError("config.json must have a high_freq_factor above its low_freq_factor.")
    return theta, scaling


def _with_defaults(rope: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    """What an object says, with rope_theta and the type in one place."""
    kept = {name: value for name, value in rope.items() if name not in ("type", "rope_type")}
    kind = rope.get("rope_type", rope.get("type", "default"))
    return {"rope_theta": config.get("rope_theta")} | kept | {"rope_type": kind}
