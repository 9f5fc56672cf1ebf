"""All layers in one call over a cache of pages: the bits of a contiguous cache, and what it refuses."""

import copy

import pytest
import torch
from tiny_models import KINDS, hf_directory, prompts

from model import decoding
from model.decoding import Decoder
from model.kept_layers import keep
from model.llama import KVCache, PagedCache, PagedRows, Prompt
from model.loading import load_base
from model.sampling import _prefill

pytestmark = pytest.mark.native
PROMPTS = [prompt.tolist() for prompt in prompts((7, 1, 19, 5))]
ROWS = torch.tensor([2, 0, -1, 1], dtype=torch.int32)  # of the prompt table
OPERATORS = torch.ops.zinit


def table_of(config, dtype=torch.float32, rows=3, length=5):
    """Keys, values and gates far from 0 for each layer but the first."""
    generator = torch.Generator().manual_seed(3)
    shape = (config.num_layers, 2, rows, length, config.num_heads_kv, config.head_dim)
    keys_values = torch.randn(shape, generator=generator).to(dtype)
    gates = torch.randn(config.num_layers, rows, config.num_heads_q, generator=generator)

    class Table:
        keeps_prompts = True

        def __init__(self, index):
            self.index = index

        def __call__(self, attention):
            place = attention.layer_index
            return Prompt(*keys_values[place], gates[place], "tanh", self.index) if place else None

        def in_double(self):
            exact = copy.copy(self)
            exact.__class__ = type(
                "Exact", (Table,), {"__call__": lambda self, attention: self._double(attention)}
            )
            return exact

        def _double(self, attention):
            prompt = Table.__call__(self, attention)
            return prompt and prompt._replace(key=prompt.key.double(), value=prompt.value.double())

    return Table


def cache_behind(model, adapter, start=PROMPTS):
    cache = KVCache(model.config, len(start), 60, model.dtype)
    _prefill(model, start, adapter, cache)
    return cache


def pages_of(model, cache, page_size, room=12):
    """The same tokens in scattered pages, with room for some more; NaN in all other places. And the block table."""
    lengths = cache.lengths.tolist()
    columns = [-(-(length + room) // page_size) for length in lengths]
    order = torch.randperm(
        sum(columns) + 3, generator=torch.Generator().manual_seed(1)
    ).tolist()  # 3 dead ones
    pages = PagedCache(model.config, len(order), page_size, 60, model.dtype)
    pages.keys.fill_(torch.nan), pages.values.fill_(torch.nan)
    table = torch.full(
        (len(lengths), max(columns)), 1 << 30, dtype=torch.int32
    )  # read nowhere behind a sequence
    for row, length in enumerate(lengths):
        own = [order.pop() for _ in range(columns[row])]
        table[row, : len(own)] = torch.tensor(own)
        for place in range(length):
            where = own[place // page_size], place % page_size
            pages.keys[:, where[0], where[1]] = cache.keys[:, row, place]
            pages.values[:, where[0], where[1]] = cache.values[:, row, place]
    return pages, table


def assert_pages_hold(pages, table, cache):
    """What the contiguous cache holds, and NaN everywhere else."""
    page_size = pages.keys.shape[2]
    rest = pages.keys.clone(), pages.values.clone()
    for row, length in enumerate(cache.lengths.tolist()):
        for place in range(length):
            where = int(table[row, place // page_size]), place % page_size
            for ours, theirs, left in zip(
                (pages.keys, pages.values), (cache.keys, cache.values), rest, strict=True
            ):
                assert torch.equal(ours[:, where[0], where[1]], theirs[:, row, place])
                left[:, where[0], where[1]] = torch.nan
    assert all(left.isnan().all() for left in rest)


@torch.no_grad()
@pytest.mark.parametrize("page_size", [1, 3, 16, 50])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_pages_have_the_bits_of_a_contiguous_cache(tmp_path, monkeypatch, kind, dtype, page_size):
    """Of several sequences and of one, whose tokens attend each as if it were alone; kept and handed over."""
    hf_directory(tmp_path, kind)
    model = load_base(tmp_path, dtype, quantise="int8" if page_size == 3 else None).freeze()
    table = table_of(model.config)
    calls = []
    run = Decoder.run
    monkeypatch.setattr(Decoder, "run", lambda *given: calls.append(1) or run(*given))
    for start, adapter in ((PROMPTS, None), (PROMPTS, table(ROWS)), (PROMPTS[2:3], table(ROWS[:1]))):
        cache = cache_behind(model, adapter, start)
        pages, blocks = pages_of(model, cache, page_size)
        kept = keep(model, adapter, pages)
        for count in (1, 3, 1, 6):
            tokens = torch.randint(3, 160, (len(start), count))
            rows = PagedRows(pages, cache.lengths.clone(), blocks)
            calls.clear()
            if count == 3:
                found = model.logits(model.hidden_states(tokens, adapter, cache=rows).flatten(0, 1))
            else:
                found, likeliest = kept.read(tokens, rows, None if adapter is None else adapter.index)
                assert torch.equal(likeliest, found.max(-1).indices)
            expected = model.logits(model.hidden_states(tokens, adapter, cache=cache).flatten(0, 1))
            assert len(calls) == 1 + (count == 3)
            assert torch.equal(found, expected) and found.isfinite().all()
            assert torch.equal(rows.lengths, cache.lengths)
        assert_pages_hold(pages, blocks, cache)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["linear", "mistral"])
def test_pages_are_near_the_exact_result(tmp_path, monkeypatch, kind, dtype):
    """Whole sequences in float64. PyTorch's own layers in the same dtype say how near is near enough."""
    hf_directory(tmp_path, kind)
    model = load_base(tmp_path, dtype).freeze()
    exact = copy.deepcopy(model).double().set_backend("reference")
    adapter = table_of(model.config, dtype)(ROWS)
    tokens = torch.randint(3, 160, (4, 4), generator=torch.Generator().manual_seed(2))
    pages, blocks = pages_of(model, (cache := cache_behind(model, adapter)), 5)
    found = model.hidden_states(tokens, adapter, cache=PagedRows(pages, cache.lengths.clone(), blocks))
    model.set_backend("composed")
    eager = model.hidden_states(tokens, adapter, cache=cache)
    for row, prompt in enumerate(PROMPTS):
        whole = torch.tensor([*prompt, *tokens[row].tolist()])[None]
        of_row = adapter.in_double()
        of_row.index = ROWS[row : row + 1]
        expected = exact.hidden_states(whole, of_row)[0, -4:]
        assert (exact.hidden_states(whole)[0, -4:] - expected).abs().max() > 0.1 or ROWS[row] < 0
        error, allowed = ((states[row] - expected).abs().max() for states in (found, eager))
        assert error <= 2 * allowed + torch.finfo(dtype).eps * expected.abs().max()


@torch.no_grad()
@pytest.mark.parametrize("page_size", [1, 4, 16])
def test_a_sequence_may_have_several_rows(tmp_path, page_size):
    """Each sees the tokens of the rows before it, as a step of the engine has them when a prompt is computed beside
    sequences that decode."""
    hf_directory(tmp_path, "llama3")
    model = load_base(tmp_path).freeze()
    table = table_of(model.config)
    owners = [0, 2, 2, 2, 3, 2, 2]  # the sequence of each row
    chosen = table(ROWS[owners])
    cache = cache_behind(model, table(ROWS))
    pages, blocks = pages_of(model, cache, page_size)
    before = cache.lengths.clone()
    tokens = torch.randint(3, 160, (len(owners), 1))
    lengths = [int(before[owner]) + owners[:row].count(owner) for row, owner in enumerate(owners)]
    found = model.hidden_states(
        tokens, chosen, cache=PagedRows(pages, torch.tensor(lengths, dtype=torch.int32), blocks[owners])
    )
    for row, owner in enumerate(owners):
        one = cache.select([owner])
        expected = model.hidden_states(tokens[row : row + 1], table(ROWS[owner : owner + 1]), cache=one)
        cache.keys[:, owner], cache.values[:, owner] = one.keys[:, 0], one.values[:, 0]
        cache.lengths[owner] += 1
        torch.testing.assert_close(found[row], expected[0], rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_the_operators_refuse_pages(tmp_path):
    """Before anything is written."""
    hf_directory(tmp_path)
    model = load_base(tmp_path).freeze()
    adapter = table_of(model.config)(ROWS)
    cache = cache_behind(model, adapter)
    pages, blocks = pages_of(model, cache, 4)
    number, bare = (keep(model, of, pages) for of in (adapter, None))
    contiguous = keep(model, adapter, cache)
    tokens, lengths = torch.tensor([[5], [6], [7], [8]]), cache.lengths
    count = len(pages.keys[0])

    def changed(tensor, row, value, column=0):
        other = tensor.clone()
        (other[row] if other.dim() == 2 else other)[column if other.dim() == 2 else row] = value
        return other

    good = {"layers": number, "cache_seqlens": lengths, "block_table": blocks, "prompt_index": ROWS}
    cases = [
        ({"block_table": changed(blocks, 2, count)}, rf"block_table\[2, 0\] must lie in 0 .. {count - 1}"),
        ({"block_table": changed(blocks, 1, -1)}, r"block_table\[1, 0\] must lie in 0"),
        ({"block_table": changed(blocks, 2, 1 << 30, 4)}, r"block_table\[2, 4\] must lie in 0"),  # of the new token
        ({"block_table": blocks[:, :4].contiguous()}, r"cache_seqlens\[2\] = 19 plus 1 new tokens must lie in 0 .. 16"),
        ({"block_table": blocks[:, :0].contiguous()}, "plus 1 new tokens must lie in 0 .. 0"),
        ({"block_table": blocks.long()}, "block_table must be Int"),
        ({"block_table": blocks[:3]}, r"block_table must have shape \(4, \*\)"),
        ({"block_table": blocks[0]}, "block_table must have"),
        ({"block_table": blocks.T.contiguous().T}, "block_table must be contiguous"),
        ({"block_table": None}, f"key_cache is made for {count} sequences, got 4: give a block_table"),
        ({"cache_seqlens": changed(lengths, 0, -1)}, r"cache_seqlens\[0\] = -1"),
        ({"cache_seqlens": changed(lengths, 0, 2**31 - 1)}, "the capacity of the cache"),
        ({"cache_seqlens": lengths[:3]}, "cache_seqlens must have shape"),
        ({"prompt_index": changed(ROWS, 3, 3)}, "prompt_index must be -1 or below 3, got 3 for sequence 3"),
        ({"prompt_index": changed(ROWS, 3, -2)}, "prompt_index must be -1 or below 3, got -2"),
        ({"prompt_index": ROWS.long()}, "prompt_index must be Int"),
        ({"prompt_index": ROWS[:3]}, "prompt_index must have shape"),
        ({"prompt_index": None}, "prompt_key must have 1 row or one per sequence"),
        ({"layers": bare}, "prompt_index needs prompts"),
        ({"layers": contiguous, "block_table": None, "cache_seqlens": lengths[:3]}, "cache_seqlens must have shape"),
    ]  # fmt: skip
    held = [tensor.clone() for tensor in (pages.keys, pages.values, cache.keys, cache.values, lengths)]
    for change, message in cases:
        given = good | change
        with pytest.raises(RuntimeError, match=message):
            OPERATORS.decode_kept_cpu(given.pop("layers")._number, tokens, *given.values())
        now = (pages.keys, pages.values, cache.keys, cache.values, lengths)
        assert all(torch.equal(a.nan_to_num(7), b.nan_to_num(7)) for a, b in zip(now, held, strict=True)), (
            change
        )
    assert number.read(tokens, PagedRows(pages, lengths, blocks), ROWS)[0].isfinite().all()


@torch.no_grad()
def test_pages_without_kernels_go_layer_by_layer(tmp_path, monkeypatch):
    hf_directory(tmp_path)
    model = load_base(tmp_path).freeze()
    adapter = table_of(model.config)(ROWS)
    cache = cache_behind(model, adapter)
    tokens = torch.randint(3, 160, (4, 2))
    found = []
    for native in (True, False):
        monkeypatch.setattr(decoding, "NATIVE", native)
        pages, blocks = pages_of(model, cache, 16)
        rows = PagedRows(pages, cache.lengths.clone(), blocks)
        found.append(model.hidden_states(tokens, adapter, cache=rows))
    torch.testing.assert_close(*found, rtol=2e-5, atol=2e-5)
