"""The two softmaxes of a query: the online one over tiles of keys, and the one over the prompts.

s: the scores of a tile. Exponents are in base 2 (`scale_log2 = scale * log2(e)`), because exp2 is one instruction.
m, l: of a row, the largest exponent so far and the sum of its weights.
p: the weights of a tile, 2^(exponent - m).
acc: of a row, the sum of its weights times the values; divided by l at the end.
alpha: what earlier sums are multiplied by when m grows.
"""

import triton
import triton.language as tl

from .primitives import LN2, LOG2E, cap_scores, dot, is_visible, load_gate, load_prompts, prompt_row

COARSE = tl.constexpr(2.0**28)


@triton.jit
def turn(q, SCALE_SIGN: tl.constexpr):
    """q times the sign of the scale. `online_softmax` scales after it takes the maximum, so it needs a scale > 0."""
    if SCALE_SIGN == 1:
        return q
    else:
        return (q * SCALE_SIGN).to(q.dtype)


@triton.jit
def _coarse_scale(scale_log2):
    """The smallest power of two >= scale_log2."""
    bits = tl.cast(tl.cast(scale_log2, tl.float32), tl.int32, bitcast=True)
    return tl.cast((bits + 0x7FFFFF) & 0x7F800000, tl.float32, bitcast=True)


@triton.jit
def weights(s, m, scale_log2):
    """2^(s scale_log2 - m), where m is a row's largest product as `online_softmax` rounded it.

    A row that has seen no key has m = -inf. Its pivot is 0, because -inf - -inf would be NaN.
    """
    scale = tl.where(tl.abs(m) > COARSE, _coarse_scale(scale_log2), scale_log2)
    pivot = tl.where(m == float("-inf"), 0.0, m)
    return tl.math.exp2(s * scale[:, None] - pivot[:, None])


@triton.jit
def online_softmax(s, m, l, scale_log2):
    """(p, new m, new l, alpha) of one more tile of raw scores s, which count scale_log2 > 0 times.

    The scale goes into the exponent's multiply-add, p = 2^(s scale_log2 - m), which saves a multiplication an element.
    m is then the rounded product: p is off by the same factor in the whole row, which cancels in acc / l, and is at
    most 2^8 as long as |m| <= 2^28. Above, the scale is a power of two, whose products are exact. Its other value does
    not matter there: two different float32 scores of that size are 16 or more apart, and the smaller one has no weight.
    """
    tile_m = tl.max(s, 1)
    scaled = tile_m * scale_log2
    scaled = tl.where(tl.abs(scaled) > COARSE, tile_m * _coarse_scale(scale_log2), scaled)
    new_m = tl.maximum(m, scaled)
    p = weights(s, new_m, scale_log2)
    alpha = tl.math.exp2(m - tl.where(new_m == float("-inf"), 0.0, new_m))
    return p, new_m, l * alpha + tl.sum(p, 1), alpha


@triton.jit
def finish_scores(s, bias, scale_log2, cap, HAS_BIAS: tl.constexpr):
    """Of s = q k^T: s; with a bias scale * s + bias; with a soft cap cap(scale * s) + bias.

    `exponent_scale` is what makes exponents in base 2 of them.
    """
    if cap.size is not None:
        s = cap_scores(s, cap)
        if HAS_BIAS:
            s += bias[None, :]
    elif HAS_BIAS:
        s = s * (scale_log2 * LN2) + bias[None, :]
    return s


@triton.jit
def exponent_scale(scale_log2, cap, HAS_BIAS: tl.constexpr):
    if HAS_BIAS or cap.size is not None:
        return LOG2E
    else:
        return scale_log2


@triton.jit
def finite_part(v):
    """v with zeros in the place of NaN and infinities."""
    return tl.where(v.to(tl.float32) * 0.0 == 0.0, v, 0.0).to(v.dtype)


@triton.jit
def sum_of_others(sees, v):
    """What NaN and infinities in v add to the rows that see them: they themselves, or 0. sees: 1 or 0.

    One product counts all three: digits of base 64, since a tile has at most 63 values in a column.
    """
    kind = tl.where(v == float("inf"), 1.0, tl.where(v == float("-inf"), 64.0, tl.where(v == v, 0.0, 4096.0)))
    count = dot(sees, kind.to(v.dtype)).to(tl.int32)
    total = tl.where(count % 64 > 0, float("inf"), 0.0)
    total = tl.where(count // 64 > 0, tl.where(total > 0, float("nan"), float("-inf")), total)
    return tl.where(count >= 4096, float("nan"), total)


@triton.jit
def attend(
    acc,
    m,
    l,
    q,
    k,
    v,
    bias,
    start,
    scoring,
    MASKED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    EXACT: tl.constexpr = False,
):
    """acc, m and l after one more tile of keys, from key `start` on.

    Without MASKED every query sees every key of the tile.

    EXACT: a value that is not finite adds nothing to the queries that do not see it, where the product adds 0 * NaN.
    At most 63 keys then.
    """
    tl.static_assert(not EXACT or k.shape[0] < 64)
    s = finish_scores(dot(q, tl.trans(k)), bias, scoring.scale_log2, scoring.cap, HAS_BIAS)
    if MASKED:
        s = tl.where(is_visible(start, k.shape[0], scoring.limits, scoring.window), s, float("-inf"))
    p, m, l, alpha = online_softmax(s, m, l, exponent_scale(scoring.scale_log2, scoring.cap, HAS_BIAS))
    if EXACT:
        visible = is_visible(start, k.shape[0], scoring.limits, scoring.window)
        sees = tl.where(visible, 1.0, 0.0).to(v.dtype)
        acc = dot(p.to(v.dtype), finite_part(v), acc * alpha[:, None])
        acc += sum_of_others(sees, v)
    else:
        acc = dot(p.to(v.dtype), v, acc * alpha[:, None])
    return acc, m, l


@triton.jit
def attend_visible(acc, m, q, k, v, bias, start, scoring, HAS_BIAS: tl.constexpr):
    """acc after the value of one more key, added to the queries that see it and to no other; m: the final one.

    `attend` multiplies a hidden value by the weight 0, which gives NaN if the value is NaN. This is the slow way out.
    """
    s = tl.sum(q.to(tl.float32) * k.to(tl.float32), 1)[:, None]
    s = finish_scores(s, bias, scoring.scale_log2, scoring.cap, HAS_BIAS)
    p = weights(s, m, exponent_scale(scoring.scale_log2, scoring.cap, HAS_BIAS))
    visible = is_visible(start, 1, scoring.limits, scoring.window)
    return tl.where(visible, acc + p * v.to(tl.float32), acc)


@triton.jit
def _sink_log2(sink):
    """The exponent in base 2 of a sink, finite where the sink is."""
    return tl.minimum(sink * LOG2E, 3.0e38, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def normalise(acc, m, l, scale_log2, sink):
    """(acc / l, log-sum-exp in base 2); zeros and -inf for a row that has seen no key.

    sink: one more score, natural, whose value is 0: a number, or one for each row; None for none.
    """
    m = tl.where(tl.abs(m) > COARSE, m * (scale_log2 / _coarse_scale(scale_log2)), m)
    if sink is not None:
        sink = _sink_log2(sink)
        largest = tl.maximum(m, sink)
        pivot = tl.where(largest == float("-inf"), 0.0, largest)
        alpha = tl.math.exp2(m - pivot)
        l = l * alpha + tl.math.exp2(sink - pivot)
        acc = acc * alpha[:, None]
        m = largest
    safe_l = tl.where(l == 0, 1.0, l)
    return acc * (1.0 / safe_l)[:, None], m + tl.math.log2(safe_l)


@triton.jit
def natural_lse(lse_log2, sink):
    """The natural log-sum-exp of `normalise`'s. Where the sink alone counts it is the sink, to the last bit."""
    lse = lse_log2 * LN2
    if sink is not None:
        lse = tl.where(lse_log2 == _sink_log2(sink), sink, lse)
    return lse


@triton.jit
def prompt_softmax(q, prompt_k, prompt_length, scale_log2, cap, BLOCK_P: tl.constexpr):
    """(p, s), [BLOCK_M, BLOCK_P] in float32: softmax(cap(scale q pk^T)), 0 behind the last prompt; capped scores."""
    s = dot(q, tl.trans(prompt_k))
    if cap.size is not None:
        s = cap_scores(s, cap)
    else:
        s = s * scale_log2
    present = tl.where((tl.arange(0, BLOCK_P) < prompt_length)[None, :], s, float("-inf"))
    x = present - tl.max(present, 1)[:, None]
    if cap.size is not None:
        x *= LOG2E
    p = tl.math.exp2(x)
    return p / tl.sum(p, 1)[:, None], s


@triton.jit
def add_prompt_branch(
    acc,
    q,
    prompts,
    sequence,
    head,
    kv_head,
    scale_log2,
    cap,
    BLOCK_P: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    TANH: tl.constexpr,
    exists=None,
):
    """acc + act(gate) * softmax(scale q pk^T) pv; acc where the sequence has no prompts.

    head: one, or [BLOCK_M], of which `exists` says which rows are there. The gate multiplies the weights in float32,
    before they are rounded.
    """
    if prompts.key.ptr is not None:
        row = prompt_row(prompts, sequence)
        if row >= 0:
            gate = load_gate(prompts, row, head, TANH, exists)
            prompt_k = load_prompts(prompts.key, row, kv_head, prompts.length, q.dtype, BLOCK_P, HEAD_DIM)
            p, _ = prompt_softmax(q, prompt_k, prompts.length, scale_log2, cap, BLOCK_P)
            if len(head.shape) == 1:
                p *= gate[:, None]
            else:
                p *= gate
            prompt_v = load_prompts(prompts.value, row, kv_head, prompts.length, q.dtype, BLOCK_P, HEAD_DIM)
            acc = dot(p.to(q.dtype), prompt_v, acc)
    return acc
