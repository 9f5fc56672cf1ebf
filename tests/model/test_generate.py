"""Generation: greedy is transformers', a batch is its prompts one by one, nothing starts that cannot end."""

import dataclasses
import json
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest
import tokenizers
import torch
from repository import ROOT
from tiny_models import KINDS, hf_directory, prompts, word_tokenizer

from model.adapter import LlamaAdapter
from model.adapter_files import load_adapter, save_adapter
from model.choice import _first, _nucleus, choose
from model.config import AdapterConfig
from model.errors import UserError, run_program
from model.generate import Watcher, main
from model.kept_layers import KeptLayers
from model.llama import Llama
from model.loading import load_base
from model.sampling import generate
from model.tokenizer import Tokenizer, load_tokenizer

LENGTHS = (7, 1, 19, 5)
PROMPTS = [prompt.tolist() for prompt in prompts(LENGTHS)]


def hf_greedy(hf, prompt, max_new_tokens, eos_id=None):
    output = hf.generate(
        torch.tensor([prompt]),
        max_new_tokens=max_new_tokens,
        do_sample=False,
        eos_token_id=eos_id,
        pad_token_id=0,
    )
    return output[0, len(prompt) :].tolist()


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_is_that_of_transformers(tmp_path, kind):
    hf = hf_directory(tmp_path, kind)
    outputs = generate(load_base(tmp_path), PROMPTS, max_new_tokens=30, temperature=0, eos_ids=[])
    assert outputs == [hf_greedy(hf, prompt, 30) for prompt in PROMPTS]
    assert len({token for output in outputs for token in output}) > 10


@pytest.mark.parametrize("kind", ["llama", "llama3", "mistral"])
def test_greedy_is_that_of_peft(tmp_path, kind):
    import peft

    base_model = hf_directory(tmp_path, kind)
    config = peft.AdaptionPromptConfig(adapter_len=4, adapter_layers=2, task_type="CAUSAL_LM")
    theirs = peft.get_peft_model(base_model, config).eval()
    model = load_base(tmp_path)
    ours = LlamaAdapter(model.config, AdapterConfig(4, 2, "identity"))
    parameters = dict(theirs.named_parameters())
    with torch.no_grad():
        for row, layer in enumerate(ours.layers):
            prefix = f"base_model.model.model.layers.{layer}.self_attn"
            parameters[f"{prefix}.adaption_gate"].fill_(0.7 - row)
            ours.gates[row] = parameters[f"{prefix}.adaption_gate"]
            ours.prompts[row] = parameters[f"{prefix}.adaption_prompt"][0]
    outputs = generate(model, PROMPTS, ours, max_new_tokens=20, temperature=0, eos_ids=[])
    plain = generate(model, PROMPTS, max_new_tokens=20, temperature=0, eos_ids=[])
    for prompt, output, without in zip(PROMPTS, outputs, plain, strict=True):
        given = {
            "input_ids": torch.tensor([prompt]),
            "max_new_tokens": 20,
            "do_sample": False,
            "eos_token_id": None,
        }
        assert theirs.generate(**given, pad_token_id=0)[0, len(prompt) :].tolist() == output
        assert output != without


@pytest.fixture
def model(tmp_path):
    hf_directory(tmp_path / "base")
    word_tokenizer(tmp_path / "base")
    return load_base(tmp_path / "base")


@pytest.fixture
def adapter(model):
    torch.manual_seed(5)
    return LlamaAdapter(model.config, AdapterConfig(gate_init="random"))


@pytest.mark.parametrize("temperature", [0, 0.9])
def test_a_ragged_batch_is_its_prompts_one_by_one(model, adapter, temperature):
    """With ends: finished sequences leave the batch, the others go on undisturbed."""
    asked = {"max_new_tokens": 40, "temperature": temperature, "top_p": 0.9, "eos_ids": list(range(3, 12))}
    batch = generate(model, PROMPTS, adapter, seed=7, **asked)
    alone = [generate(model, [p], adapter, seed=7 + i, **asked)[0] for i, p in enumerate(PROMPTS)]
    assert batch == alone
    assert len({len(output) for output in batch}) > 1 and min(map(len, batch)) < 40


def test_seed_and_temperature(model, adapter):
    def draw(seed):
        return generate(
            model, PROMPTS, adapter, max_new_tokens=12, temperature=1.0, top_p=1.0, seed=seed, eos_ids=[]
        )

    assert draw(0) == draw(0) != draw(1)


def test_end_of_sequence_ends_and_is_left_out(model):
    plain = generate(model, PROMPTS[:1], max_new_tokens=20, temperature=0, eos_ids=[])[0]
    end = plain[9]
    ended = generate(model, PROMPTS[:1], max_new_tokens=20, temperature=0, eos_ids=[end])[0]
    assert ended == plain[: plain.index(end)]
    seen = []
    watched = generate(
        model, PROMPTS, max_new_tokens=20, temperature=0, eos_ids=[],
        watch=lambda index, tokens: seen.append((index, len(tokens))) or (index == 2 and len(tokens) == 3),
    )  # fmt: skip
    assert [len(output) for output in watched] == [20, 20, 3, 20]
    assert seen[:4] == [(0, 1), (1, 1), (2, 1), (3, 1)]


def test_top_p_keeps_the_smallest_sufficient_set():
    probabilities = torch.tensor([0.1, 0.4, 0.3, 0.2]).expand(4000, 4)
    generators = [torch.Generator().manual_seed(seed) for seed in range(4000)]
    drawn = choose(probabilities.log(), 1.0, 0.6, generators).bincount(minlength=4) / 4000
    torch.testing.assert_close(drawn, torch.tensor([0, 4 / 7, 3 / 7, 0]), rtol=0, atol=0.03)
    generators = [torch.Generator().manual_seed(seed) for seed in range(4000)]
    drawn = choose(probabilities.log(), 1.0, 1.0, generators).bincount(minlength=4) / 4000
    torch.testing.assert_close(drawn, probabilities[0], rtol=0, atol=0.03)
    assert choose(probabilities.log(), 1.0, 0.05, generators).eq(1).all()
    for temperature in (1e-40, 1e-300):
        assert choose(probabilities.log(), temperature, 1.0, generators).eq(1).all()


@pytest.mark.parametrize("top_p", [1e-3, 0.5, 0.75, 0.999, 1.0])
def test_a_nucleus_does_not_depend_on_the_other_rows(top_p):
    """Rows with a nucleus of one token and of thousands, together and alone."""
    generator = torch.Generator().manual_seed(0)
    spread = torch.tensor([[0.01], [0.3], [1.0], [3.0], [10.0]])
    probabilities = (spread * torch.randn(5, 5000, generator=generator)).softmax(-1)
    found = _nucleus(probabilities, top_p)
    assert ((found == 0) | (found == probabilities)).all()
    for row, own in zip(probabilities, found, strict=True):
        assert torch.equal(_nucleus(row[None], top_p)[0], own)
        kept = own[own > 0].double()
        assert float(kept.sum()) >= top_p - 1e-6 and float(kept.sum() - kept.min()) <= top_p + 1e-6
        assert own.max() == row.max() and (row[own == 0] <= kept.min()).all()


def test_rounding_changes_few_draws():
    """Probabilities that differ by 0.3 % change about as many draws: by one number looked up in the cumulative
    probabilities, one in 18 changed."""
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(1, 2000, generator=generator).expand(400, -1)
    rounded = logits + 0.01 * torch.randn(logits.shape, generator=generator)
    draws = [
        choose(given, 1.0, 1.0, [torch.Generator().manual_seed(seed) for seed in range(400)])
        for given in (logits, rounded)
    ]
    assert (draws[0] != draws[1]).float().mean() < 0.02
    assert len(set(draws[0].tolist())) > 100


def test_a_token_outside_the_nucleus_never_wins():
    """Also where torch draws a time of 0, which it may on a GPU."""
    nucleus = torch.tensor([[0.0, 0.4, 0.3, 0.0]])
    assert _first(nucleus, torch.zeros(1, 4)).item() in (1, 2)


@pytest.mark.parametrize("temperature", [0, 0.1])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_logits_that_are_no_numbers_end_it(model, monkeypatch, value, temperature):
    weight = model.norm.weight.detach().clone()
    weight[3] = value
    monkeypatch.setattr(model.norm, "weight", torch.nn.Parameter(weight))
    with pytest.raises(UserError, match="the model's logits are not numbers: damaged weights, or a dtype"):
        generate(model, PROMPTS, max_new_tokens=2, temperature=temperature)


def test_a_cache_beyond_memory_is_refused(model, monkeypatch):
    monkeypatch.setattr(model, "config", dataclasses.replace(model.config, max_seq_len=(1 << 31) - 1))
    with pytest.raises(UserError, match="no memory for a cache of 4 sequences of 1073741843 tokens"):
        generate(model, PROMPTS, max_new_tokens=1 << 30)


def test_prefill_is_one_pass(model, monkeypatch):
    calls = []

    def count(kind, name):
        forward = getattr(kind, name)

        def counted(self, tokens, *arguments, **options):
            calls.append(tuple(tokens.shape))
            return forward(self, tokens, *arguments, **options)

        monkeypatch.setattr(kind, name, counted)

    count(Llama, "hidden_states")
    count(KeptLayers, "read")
    generate(model, PROMPTS, max_new_tokens=3, eos_ids=[])
    assert calls == [(sum(LENGTHS),), (4, 1), (4, 1)]


@pytest.mark.parametrize(
    "asked, message",
    [
        (
            {"max_new_tokens": 78},
            "prompt 2 has 19 tokens; with 78 new ones .* context of 96: ask for at most 77",
        ),
        ({"max_new_tokens": -1}, "must be finite, not negative"),
        ({"top_p": 0.0}, "top_p must lie in"),
        ({"temperature": -1.0}, "must be finite, not negative"),
        ({"temperature": float("nan")}, "must be finite, not negative"),
        ({"seed": 1 << 64}, "seed must lie in"),
        ({"prompts": [[5], []], "max_new_tokens": 4}, "prompt 1 has no tokens"),
        ({"prompts": [[160]], "max_new_tokens": 4}, "outside the model's vocabulary of 160"),
    ],
)
def test_refused_before_work_starts(model, monkeypatch, asked, message):
    monkeypatch.setattr(Llama, "hidden_states", lambda *a, **k: pytest.fail("work started"))
    with pytest.raises(UserError, match=message):
        generate(model, asked.pop("prompts", PROMPTS), **asked)


def run(capsys, *arguments):
    """Exit code, stdout, stderr of the program."""
    code = 0
    try:
        run_program(lambda: main([str(argument) for argument in arguments]))
    except SystemExit as exit:
        code = exit.code
    return code, *capsys.readouterr()


def test_program(tmp_path, capsys, model, adapter):
    base, file = tmp_path / "base", tmp_path / "adapter.safetensors"
    save_adapter(file, adapter, model.config)
    greedy = ["--base", base, "--temperature", 0, "--max-new-tokens", 12]
    code, plain, told = run(capsys, *greedy, "--prompt", "the quick")
    assert code == 0 and "tokens/s" in told
    code, adapted, _ = run(capsys, *greedy, "--prompt", "the quick", "--adapter", file)
    assert code == 0 and adapted != plain
    assert run(capsys, *greedy, "--prompt", "the quick", "--adapter", tmp_path)[1] == adapted  # its folder
    stop = adapted[2:4]
    code, stopped, _ = run(capsys, *greedy, "--prompt", "the quick", "--adapter", file, "--stop", stop)
    assert code == 0 and stopped == adapted[: adapted.index(stop)] + "\n"

    (tmp_path / "prompts.txt").write_text("the quick\nlazy dog\n\nfox\n")
    many = [*greedy, "--adapter", file, "--batch-size", 2, "--prompts-file"]
    code, lines, _ = run(capsys, *many, tmp_path / "prompts.txt")
    answers = [json.loads(line) for line in lines.splitlines()]
    assert code == 0 and [answer["prompt"] for answer in answers] == ["the quick", "lazy dog", "fox"]
    assert answers[0]["output"] + "\n" == adapted
    (tmp_path / "marked.jsonl").write_text('\ufeff{"prompt": "the quick"}\n', encoding="utf-8")
    assert json.loads(run(capsys, *many, tmp_path / "marked.jsonl")[1]) == answers[0]
    records = [{"instruction": "jump", "input": None}, {"prompt": "fox"}]
    (tmp_path / "prompts.jsonl").write_text("\n".join(map(json.dumps, records)))
    short = ["--base", base, "--max-new-tokens", 1, "--prompts-file", tmp_path / "prompts.jsonl"]
    code, _, told = run(capsys, *short)
    assert code == 2 and "context of 96" in told  # the template alone is longer than this model's context


def test_program_refuses_in_one_sentence(tmp_path, capsys, model, adapter):
    base, file = tmp_path / "base", tmp_path / "adapter.safetensors"
    save_adapter(file, adapter, model.config)
    ask = ["--prompt", "fox", "--max-new-tokens", 4]
    (tmp_path / "broken.jsonl").write_text('{"prompt": "fox"}\n{"prompt": \n')
    (tmp_path / "empty.txt").write_text("\n")
    other = tmp_path / "other"
    hf_directory(other, num_hidden_layers=2)
    word_tokenizer(other)
    wrong = tmp_path / "wrong"
    hf_directory(wrong, vocab_size=64)
    word_tokenizer(wrong)
    bare = tmp_path / "bare"
    hf_directory(bare)
    cases = [
        (["--base", tmp_path / "absent", *ask], "absent is not a directory"),
        (["--base", bare, *ask], "neither tokenizer.json nor tokenizer.model"),
        (["--base", wrong, *ask], "and the model a vocabulary of 64"),
        (
            ["--base", other, "--adapter", file, *ask],
            "hidden size 64, 4 layers and 8 heads; this base has hidden size 64, 2",
        ),
        (["--base", base, "--adapter", tmp_path / "none.pth", *ask], "none.pth: No such file"),
        (
            ["--base", base, "--prompts-file", tmp_path / "broken.jsonl"],
            "broken.jsonl, line 2: not JSON at column",
        ),
        (["--base", base, "--prompts-file", tmp_path / "empty.txt"], "holds no prompts"),
        (["--base", base, "--prompt", "fox", "--max-new-tokens", 96], "context of 96: ask for at most"),
        (["--base", base, "--device", "nowhere", *ask], "nowhere"),
        (["--base", base, "--backend", "foo", *ask], "--backend foo: backend must be 'auto' or one of"),
        (["--base", base, "--stop", "", *ask], "--stop must not be empty"),
        (["--base", base, "--input", "x", *ask], "--input belongs to --instruction"),
        (["--base", base, "--prompt-length", 5, *ask], "--prompt-length belongs to --adapter"),
        (["--base", base, "--gate-activation", "tanh", *ask], "--gate-activation belongs to --adapter"),
        (["--base", base, "--prompt", "\ud800"], "holds \\ud800, half a character"),
        (["--base", base, "--device", "meta", *ask], "--device meta: "),
    ]
    for arguments, message in cases:
        code, out, told = run(capsys, *arguments)
        assert (code, out) == (2, ""), (arguments, told)
        assert told.startswith("error: ") and told.count("\n") == 1 and message in told, told


@pytest.mark.parametrize("terminal", [False, True])
def test_a_terminal_does_not_obey_an_answer(capsys, monkeypatch, terminal):
    """A pipe gets the text as it is."""
    answer = "a\x1b]0;title\x07\n\tb\rc\u202e\N{ZERO WIDTH JOINER}\x9b2J"
    tokenizer = SimpleNamespace(decode=lambda tokens: "".join(map(chr, tokens)))
    monkeypatch.setattr(type(sys.stdout), "isatty", lambda self: terminal, raising=False)
    watcher = Watcher(tokenizer, [], stream=True)
    tokens = list(map(ord, answer))
    for length in range(1, len(answer) + 1):
        watcher(0, tokens[:length])
    watcher.finish()
    said = "a\\x1b]0;title\\x07\n\tb\\rc\\u202e\N{ZERO WIDTH JOINER}\\x9b2J"
    assert capsys.readouterr().out == (said if terminal else answer)


def test_streaming_prints_settled_text_only(capsys):
    """Half a character waits for its other half, the beginning of a stop string for what decides it."""
    tokenizer = Tokenizer(256, None, None, list, lambda ids: bytes(ids).decode(errors="replace"))
    watcher, shown = Watcher(tokenizer, ["END"], stream=True), []
    text = "naïve ENDED".encode()
    for count in range(1, len(text) + 1):
        if watcher(0, list(text[:count])):
            break
        shown.append(capsys.readouterr().out)
    assert shown == ["n", "a", "", "ï", "v", "e", " ", "", ""]
    assert watcher.count == 10 and capsys.readouterr().out == ""
    watcher = Watcher(tokenizer, ["END"], stream=True)
    text = b"aEN!EN"
    for count in range(1, len(text) + 1):
        watcher(0, list(text[:count]))
    watcher.finish()
    assert capsys.readouterr().out == "aEN!EN"


@pytest.mark.parametrize("kept", range(1, 14))
def test_the_stream_is_the_answer_wherever_it_is_cut(tmp_path, capsys, kept):
    """Under byte fallback, inside and between characters: whole ones before the cut are never lost."""
    vocabulary = {f"<0x{byte:02X}>": byte for byte in range(256)} | {"▁": 256, "h": 257, "i": 258}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, [], byte_fallback=True))
    steps = [
        tokenizers.decoders.Replace("▁", " "),
        tokenizers.decoders.ByteFallback(),
        tokenizers.decoders.Fuse(),
    ]
    tokenizer.decoder = tokenizers.decoders.Sequence(steps)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    loaded = load_tokenizer(tmp_path)
    ids = [257, 258, 256, *"😀é".encode(), 257, *"😀".encode()][:kept]
    watcher = Watcher(loaded, [], stream=True)
    for count in range(1, kept + 1):
        watcher(0, ids[:count])
    watcher.finish()
    expected = ("hi 😀éh😀".encode()[:kept]).decode(errors="replace")
    assert capsys.readouterr().out == loaded.decode(ids) == expected


def test_the_highest_seed_serves_every_prompt(tmp_path, model, capsys):
    """A prompt's seed is the next one, and after 2**63 - 1 comes 0."""
    asked = {"max_new_tokens": 6, "temperature": 1.0, "top_p": 1.0, "eos_ids": []}
    first, second, third = generate(model, [PROMPTS[0]] * 3, seed=(1 << 63) - 2, **asked)
    assert [second] == generate(model, PROMPTS[:1], seed=(1 << 63) - 1, **asked)
    assert [third] == generate(model, PROMPTS[:1], seed=0, **asked)
    (tmp_path / "prompts.txt").write_text("fox\n" * 5)
    words = ["--base", tmp_path / "base", "--prompts-file", tmp_path / "prompts.txt", "--batch-size", 2]
    code, out, told = run(capsys, *words, "--max-new-tokens", 3, "--seed", (1 << 63) - 2)
    assert code == 0 and out.count("\n") == 5, told
    code, out, told = run(capsys, *words, "--seed", 1 << 63)
    assert (code, out) == (2, "") and "seed must lie in 0 .. 2**63 - 1" in told


def test_a_prompt_longer_than_the_context_is_refused_unread(tmp_path, model, capsys):
    words = ["--base", tmp_path / "base", "--max-new-tokens", 1, "--prompt", "the fox " * 100_000]
    code, _, told = run(capsys, *words)
    assert code == 2 and "prompt 0 is longer than the model's context of 96 tokens." in told


def test_the_backend_is_the_one_that_was_asked_for(tmp_path, model, capsys):
    answers = []
    for backend in ("auto", "reference"):
        code, out, told = run(
            capsys, "--base", tmp_path / "base", "--prompt", "the fox", "--max-new-tokens", 5, "--device", "cpu",
            "--temperature", 0, "--backend", backend,
        )  # fmt: skip
        assert code in (0, None), told
        answers.append(out)
    assert answers[0] == answers[1]


def test_a_reader_that_goes_away_ends_it_quietly(tmp_path, model):
    """As `generate | head -1`: what is written to nobody is no error of the user's."""
    (tmp_path / "prompts.txt").write_text("the fox\n" * 40)
    command = [sys.executable, "-m", "model.generate", "--base", tmp_path / "base", "--batch-size", "1"]
    command += ["--prompts-file", tmp_path / "prompts.txt", "--max-new-tokens", "2", "--device", "cpu"]
    program = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT)
    with program:
        program.stdout.readline()
        program.stdout.close()
        told = program.stderr.read().decode()
        assert program.wait() == 128 + signal.SIGPIPE
    assert told.strip() == ""


def test_module_runs_from_a_checkout(tmp_path, model):
    command = [sys.executable, "-m", "model.generate", "--base", tmp_path / "base", "--prompt", "the fox"]
    result = subprocess.run([*command, "--max-new-tokens", "3"], capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    assert "tokens in" in result.stderr and "tokens/s" in result.stderr


def test_adapter_files_reach_the_model_whole(tmp_path, model, adapter):
    for format in ("zinit", "official-v1"):
        save_adapter(
            tmp_path / "adapter", adapter, model.config, format, {} if format != "zinit" else {"step": "3"}
        )
        state = torch.get_rng_state()
        loaded = load_adapter(tmp_path / "adapter", model.config)
        assert torch.equal(torch.get_rng_state(), state)
        assert torch.equal(loaded.prompts, adapter.prompts) and torch.equal(loaded.gates, adapter.gates)
        assert loaded.layers == adapter.layers and loaded.config.gate_activation == "tanh"
    with pytest.raises(UserError, match="cannot|no tanh gives"):
        strong = LlamaAdapter(model.config, AdapterConfig(gate_activation="identity"))
        torch.nn.init.constant_(strong.gates, 2.0)
        save_adapter(tmp_path / "adapter", strong, model.config, "official-v1")
