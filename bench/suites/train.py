"""Fine-tuning: the cost of a step by each method (suite train), and PEFT's adaption prompts accelerated (dropins).

`train` is Table 11 of the paper as a benchmark. A step is forward, backward and AdamW on B sequences of T tokens, none
of them padding. `dropins` compares PEFT's model, the same model accelerated by this package, and the frozen base by CPU
time on one thread, training and decoding.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch

from model.config import LlamaConfig
from model.llama import Llama

from ..ledger import Row
from ..machine import why_failed, why_missing
from ..measure import Clock, in_fresh_process, in_use, measure, peak_of
from ..methods import (
    ACCELERATED,
    ADAPTER,
    EIGHTH,
    LITGPT,
    METHODS,
    ONE_BILLION_SLICE,
    PEFT,
    SEVEN_BILLION,
    THREE_BILLION,
    TINY,
    Method,
    random_base,
    why_wrong,
)
from ..problem import PROMPTS, name_of
from ..products import products_of
from ..runner import (
    Chart,
    Comparison,
    Figure,
    Job,
    Note,
    Options,
    Select,
    Suite,
    Target,
    rows_of,
    speed_of,
    speed_over,
)

# Alpaca as the paper trained on it: 52,002 samples, 5 epochs. The official script pads every sample to 512 tokens; they
# hold about 130 on average.
SAMPLES, EPOCHS, PADDED, MEAN_LENGTH = 52002, 5, 512, 130
STEP = "training step"
SPEED, PEAK_GB = "tokens/s", "peak GB"
LORA, LORA_8 = "LoRA r = 32", "LoRA r = 8"
PRODUCTS = "its matrix products alone"  # of a step of this project's adapter


class Base(NamedTuple):
    name: str
    config: LlamaConfig
    batch: int
    seqlen: int
    methods: tuple[str, ...]
    dtypes: tuple[torch.dtype, ...] = (torch.float32,)  # on a CPU


TABLE_11 = tuple(method.name for method in METHODS if method.name != LORA)
BASES = {
    "cpu": [
        Base("LLaMA-7B's shape at 1/8 width", EIGHTH, 1, 256, TABLE_11),
        Base(
            "3 layers of Llama-3.2-1B",
            ONE_BILLION_SLICE,
            8,
            256,
            (ADAPTER, PEFT, LITGPT, LORA_8),
            (torch.float32, torch.bfloat16),
        ),
    ],
    "cuda": [
        # the targets' base comes first: gpu-check may stop the ones after it
        Base("Llama-3.2-3B", THREE_BILLION, 4, 512, (ADAPTER, ACCELERATED, PEFT, LORA)),
        Base("LLaMA-7B", SEVEN_BILLION, 4, 512, TABLE_11),
    ],
}
SMOKE = Base("tiny LLaMA", TINY, 2, 32, TABLE_11)


def train_jobs(options: Options) -> list[Job]:
    """One per base and dtype, with all methods in turns; on a CPU in the base's own dtypes."""
    bases = [SMOKE] if options.smoke else BASES[options.device.type]
    on_gpu = options.device.type == "cuda"
    return [
        Job(f"train, {base.name}, {name_of(dtype)}", partial(train_rows, options, base, dtype))
        for base in bases
        if options.wants_shape(base.name)
        for dtype in (options.dtypes if on_gpu else base.dtypes)
    ]


def training_step(method: Method, model: Llama, base: Base) -> tuple[int, Callable[[], object]]:
    """(trainable parameters, a call that does one step)"""
    parameters, loss_of = method.build(model)
    optimizer = torch.optim.AdamW(parameters, lr=1e-6)
    random = torch.Generator().manual_seed(0)
    tokens = torch.randint(3, base.config.vocab_size, (base.batch, base.seqlen), generator=random)
    tokens = tokens.to(model.device)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        loss_of(tokens).backward()
        optimizer.step()

    return sum(p.numel() for p in parameters), step


def profiled(options: Options) -> tuple[str, Callable[[], object], int]:
    """A step of this project's adapter; forward and backward each read every frozen weight once."""
    base = SMOKE if options.smoke else BASES[options.device.type][0]
    model = random_base(base.config, options.dtypes[0], options.device)
    method = next(m for m in METHODS if m.name == ADAPTER)
    _, step = training_step(method, model, base)
    weights = sum(w.nbytes for w in model.state_dict().values())
    return f"{ADAPTER}, {base.name}, {base.batch} x {base.seqlen} tokens", step, 2 * weights


def usable(options: Options, base: Base, dtype: torch.dtype, note: Note) -> Iterator[Method]:
    """Those that can run here, are right on a tiny base and fit into memory; the user is told about the others."""
    device = options.device
    for method in METHODS:
        if method.name not in base.methods or not options.wants_provider(method.name):
            continue
        if reason := method.why_not(device) or why_no_memory(method, base, dtype, device):
            note(f"{method.name} left out: {reason}")
        elif wrong := why_wrong(method, dtype, device):
            note(f"{method.name}, {name_of(dtype)}: no figure, {wrong}")
        else:
            yield method


def why_no_memory(method: Method, base: Base, dtype: torch.dtype, device: torch.device) -> str:
    """Full fine-tuning holds its weights, their gradients and AdamW's state (3 x) beside the frozen base."""
    if device.type == "cpu" or not method.copies:
        return ""
    with torch.device("meta"):
        needed = 7 * dtype.itemsize * sum(p.numel() for p in Llama(base.config).parameters())
    free = torch.cuda.mem_get_info(device)[0]
    return "" if needed < free else f"it takes {needed / 1e9:.0f} GB and {free / 1e9:.0f} GB are free"


def train_rows(options: Options, base: Base, dtype: torch.dtype, note: Note) -> Iterator[Row]:
    chosen = list(usable(options, base, dtype, note))
    # before any model is made here: each in a fresh process, or on a GPU one after another
    peaks = {} if options.smoke else {m.name: peak(m, base, dtype, options.device, note) for m in chosen}
    model = random_base(base.config, dtype, options.device)
    counts: dict[str, int] = {}
    steps: dict[str, Callable[[], object]] = {}
    for method in chosen:
        try:
            count, step = training_step(method, model, base)
            step()
        except Exception as error:  # any: out of memory, or a kernel that does not compile here
            note(f"{method.name}: no figure, {why_failed(error)}")
            continue
        counts[method.name], steps[method.name] = count, step
    if not steps:
        return
    calls = dict(steps)
    if ADAPTER in steps:
        calls[PRODUCTS] = products_of(steps[ADAPTER], model)
    seconds = options.seconds if options.smoke else 4 * options.seconds
    times = measure(calls, seconds, Clock(options.device))
    compared = (ADAPTER, PEFT, *((PRODUCTS,) if PRODUCTS in calls else ()))
    if PRODUCTS in calls:
        yield Row(
            "train", base.name, {"batch": base.batch, "seqlen": base.seqlen}, STEP, name_of(dtype), PRODUCTS,
            ratios={ADAPTER: times.ratio(PRODUCTS, ADAPTER)}, **times.in_ms(PRODUCTS),
        )  # fmt: skip
    for name in steps:
        rate = base.batch * base.seqlen / times.median(name)
        figures = {"trainable parameters": counts[name], SPEED: rate}
        if bytes_at_peak := peaks.get(name):
            figures[PEAK_GB] = bytes_at_peak / 1e9
        figures["Alpaca x 5 padded, h"] = SAMPLES * EPOCHS * PADDED / rate / 3600
        figures["Alpaca x 5 packed, h"] = SAMPLES * EPOCHS * MEAN_LENGTH / rate / 3600
        yield Row(
            "train", base.name, {"batch": base.batch, "seqlen": base.seqlen}, STEP, name_of(dtype), name,
            ratios={o: times.ratio(name, o) for o in compared if o != name and o in calls},
            figures=figures, **times.in_ms(name),
        )  # fmt: skip


def peak(method: Method, base: Base, dtype: torch.dtype, device: torch.device, note: Note) -> int | None:
    """Bytes at the peak of a step, with weights and optimizer; None where they cannot be had."""
    arguments = (method.name, base, dtype, device, torch.get_num_threads())
    try:
        return in_fresh_process(peak_alone, *arguments) if device.type == "cpu" else peak_alone(*arguments)
    except Exception as error:  # any: a process that is killed for its memory raises BrokenProcessPool
        note(f"{method.name}: no peak, {why_failed(error)}")
        return None
    finally:
        torch.cuda.empty_cache()


def peak_alone(name: str, base: Base, dtype: torch.dtype, device: torch.device, threads: int) -> int:
    torch.set_num_threads(threads)
    before = in_use(device)
    method = next(m for m in METHODS if m.name == name)
    model = random_base(base.config, dtype, device)
    _, step = training_step(method, model, base)
    del model  # a method with a copy of it does not need it any more
    step()  # the optimizer makes its state
    return in_use(device) - before + peak_of(step, device)


# the drop-ins: 4 layers of Llama's shape in float32, gates away from 0
LAYERS, HEADS, SEQLEN, CONTEXT, TOKENS, VOCABULARY = 4, 8, 512, 64, 8, 1000
WIDTH = {STEP: 512, "decode": 1024}
FROZEN = "frozen base"
DROPIN_GATE, TOLERANCE = 0.3, 1e-5  # of the logits, against PEFT's


def dropin_jobs(options: Options) -> list[Job]:
    """Training and decoding, with as many key heads as query heads and with fewer; on a CPU only."""
    if options.device.type != "cpu":
        return []
    return [
        Job(f"dropins, {mode}, {HEADS}/{heads_kv} heads", partial(dropin_rows, options, mode, heads_kv))
        for heads_kv in (8, 2)
        for mode in WIDTH
    ]


def cpu_seconds(function: Callable[[], object]) -> float:
    """CPU time of the second call: the first is charged for the caches that another function left behind."""
    function()
    start = time.process_time()
    function()
    return time.process_time() - start


def dropin_models(hidden_size: int, heads_kv: int) -> dict[str, Any]:
    """PEFT's model accelerated, PEFT's model, and its frozen base."""
    from peft import AdaptionPromptConfig, get_peft_model
    from transformers import LlamaConfig as TransformersConfig
    from transformers import LlamaForCausalLM

    from zinit_kernels.integrations.peft import accelerate

    torch.manual_seed(0)
    config = TransformersConfig(
        hidden_size=hidden_size, intermediate_size=3 * hidden_size, num_hidden_layers=LAYERS, vocab_size=VOCABULARY,
        num_attention_heads=HEADS, num_key_value_heads=heads_kv,
    )  # fmt: skip
    base = LlamaForCausalLM(config).requires_grad_(False)
    adapter = AdaptionPromptConfig(adapter_len=PROMPTS, adapter_layers=LAYERS, task_type="CAUSAL_LM")
    theirs = get_peft_model(copy.deepcopy(base), adapter)
    for name, parameter in theirs.named_parameters():
        if name.endswith("adaption_gate"):
            parameter.data.fill_(DROPIN_GATE)
    return {ACCELERATED: accelerate(copy.deepcopy(theirs)), PEFT: theirs, FROZEN: base}


@torch.no_grad()
def difference(models: dict[str, Any]) -> float:
    """The greatest difference between the accelerated model's logits and PEFT's."""
    tokens = torch.randint(VOCABULARY, (2, 40))
    ours, theirs = (models[name](input_ids=tokens).logits for name in (ACCELERATED, PEFT))
    return float((ours - theirs).abs().max())


def dropin_step(model: Any, seqlen: int) -> Callable[[], object]:
    """Forward, and backward to the embeddings in every model: the frozen base has nothing else to differentiate."""
    ids = torch.randint(VOCABULARY, (1, seqlen))
    embeddings = model.train().get_input_embeddings()(ids).detach()

    def step() -> None:
        model.zero_grad()
        model(inputs_embeds=embeddings.clone().requires_grad_(), labels=ids, use_cache=False).loss.backward()

    return step


def dropin_decode(model: Any, seqlen: int) -> Callable[[], object]:
    """TOKENS tokens after `seqlen` tokens in the cache."""
    from transformers import DynamicCache

    ids = torch.randint(VOCABULARY, (1, seqlen))
    cache = DynamicCache()
    with torch.no_grad():
        model.eval()(input_ids=ids, past_key_values=cache)

    @torch.no_grad()
    def run() -> None:
        for _ in range(TOKENS):
            model(input_ids=ids[:, :1], past_key_values=cache)
        cache.crop(-TOKENS)

    return run


def dropin_rows(options: Options, mode: str, heads_kv: int, note: Note) -> Iterator[Row]:
    if reason := why_missing("transformers", "peft"):
        note(f"dropins left out: {reason}")
        return
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        models = dropin_models(WIDTH[mode] // (4 if options.smoke else 1), heads_kv)
        found = difference(models)
        if not found <= TOLERANCE:
            note(f"dropins, {mode}: no figure, the accelerated logits differ from PEFT's by {found:.2g}")
            return
        make, seqlen = (dropin_decode, CONTEXT) if mode == "decode" else (dropin_step, SEQLEN)
        functions = {
            name: make(model, seqlen // (4 if options.smoke else 1)) for name, model in models.items()
        }
        times = measure(functions, options.seconds if options.smoke else 4 * options.seconds, cpu_seconds)
    finally:
        torch.set_num_threads(threads)
    for name in models:
        yield Row(
            "dropins", f"{LAYERS} layers of {WIDTH[mode]}, {HEADS}/{heads_kv} heads",
            {"seqlen": seqlen, "hidden_size": WIDTH[mode], "heads_q": HEADS, "heads_kv": heads_kv},
            mode, "float32", name,
            ratios={other: times.ratio(name, other) for other in (PEFT, FROZEN) if other != name},
            **times.in_ms(name, per=TOKENS if mode == "decode" else 1),
        )  # fmt: skip


def rate_over(other: str) -> Figure:
    """Tokens per second over another method's on the same base."""

    def figure(row: Row, rows: Sequence[Row]) -> float | None:
        theirs = [r.figures[SPEED] for r in rows if (r.setting, r.provider) == (row.setting, other)]
        return row.figures[SPEED] / theirs[-1] if theirs else None

    return figure


def peak_over(*others: str) -> Figure:
    """Peak memory over the least of the others'."""

    def figure(row: Row, rows: Sequence[Row]) -> float | None:
        theirs = [r.figures.get(PEAK_GB) for r in rows if r.setting == row.setting and r.provider in others]
        known = [peak for peak in theirs if peak]
        return row.figures[PEAK_GB] / min(known) if known and PEAK_GB in row.figures else None

    return figure


def dropin_target(what: str, mode: str, other: str, ratio: float) -> Target:
    select = rows_of(ACCELERATED, "dropins", mode, "heads", dtype="float32")
    name = f"PEFT accelerated, CPU time of a {what}: times as fast as {other}"
    return Target(name, select, speed_over(other), 1 / ratio)


def time_over(other: str) -> Figure:
    """The time of a step over another's, in the same rounds."""
    return lambda row, rows: row.ratios.get(other)


def share_of_products(dtype: str, most: float) -> Target:
    select = rows_of(ADAPTER, "train", STEP, "3 layers of Llama-3.2-1B", dtype=dtype)
    return Target(f"{ADAPTER}, {dtype}: step / {PRODUCTS}", select, time_over(PRODUCTS), most, at_most=True)


def step_over(other: str, most: float) -> Target:
    def figure(row: Row, rows: Sequence[Row]) -> float | None:
        speed = rate_over(other)(row, rows)
        return 1 / speed if speed else None

    return Target(f"{ADAPTER}, bfloat16: step / that of {other}", ON_1B, figure, most, at_most=True)


ON_1B = rows_of(ADAPTER, "train", STEP, "3 layers of Llama-3.2-1B")
CPU_TARGETS = (
    share_of_products("bfloat16", 1.08),
    share_of_products("float32", 1.05),
    step_over(LITGPT, 0.86),
    step_over(PEFT, 0.75),
    step_over(LORA_8, 0.84),
    *(
        Target(
            f"{ADAPTER}, bfloat16: peak memory / that of {other}", ON_1B, peak_over(other), 1.0, at_most=True
        )
        for other in (LITGPT, PEFT, LORA_8)
    ),
)
ON_3B = rows_of(ACCELERATED, "train", STEP, "Llama-3.2-3B")
TRAIN_TARGETS = (
    Target("PEFT accelerated, Llama-3.2-3B: times as fast as PEFT", ON_3B, speed_over(PEFT), 1.35),
    Target(f"PEFT accelerated, Llama-3.2-3B: times as fast as {LORA}", ON_3B, rate_over(LORA), 1.15),
    Target(f"PEFT accelerated, Llama-3.2-3B: peak memory / that of PEFT or {LORA}", ON_3B, peak_over(PEFT, LORA),
           1.0, at_most=True),
)  # fmt: skip


def rows_by(provider: str) -> Select:
    return lambda row: (row.suite, row.provider) == ("train", provider)


FULL = "full fine-tuning"
COMPARISONS = (
    Comparison(STEP, "PEFT's adaption prompt", rows_by(ADAPTER), speed_over(PEFT), 4),
    *(
        Comparison(STEP, name, rows_by(other), speed_of(ADAPTER))
        for name, other in (("litgpt's adapter", LITGPT), (LORA_8, LORA_8), (FULL, FULL))
    ),
    Comparison(f"PEFT accelerated, {STEP}", "PEFT", rows_by(ACCELERATED), speed_over(PEFT)),
)
DROPIN_TARGETS = (
    dropin_target(STEP, STEP, PEFT, 0.92),
    dropin_target(STEP, STEP, FROZEN, 1.05),
    dropin_target("decoded token", "decode", PEFT, 0.70),
    dropin_target("decoded token", "decode", FROZEN, 1.05),
)
SUITES = (
    Suite(
        "train",
        "Table 11 of the paper: one training step (forward, backward, AdamW) on B x T tokens without padding. The "
        "hours are for 52,002 Alpaca samples and 5 epochs at the measured rate: every sample padded to 512 tokens, as "
        "the official script does, and packed (130 tokens on average).",
        train_jobs,
        targets={"cpu": CPU_TARGETS, "cuda": TRAIN_TARGETS},
        comparisons={"cpu": COMPARISONS, "cuda": COMPARISONS},
        charts=(
            Chart(SPEED, "A training step is {} times as fast as PEFT's", ADAPTER, PEFT),
            Chart(
                PEAK_GB, "A training step takes {} times PEFT's memory", ADAPTER, PEFT, higher_is_better=False
            ),
        ),
        profiled=profiled,
    ),
    Suite(
        "dropins",
        "PEFT's adaption prompts as they are, accelerated by this package, and the frozen base: CPU time of one "
        "thread, ms per training step and per decoded token.",
        dropin_jobs,
        targets={"cpu": DROPIN_TARGETS},
    ),
)
