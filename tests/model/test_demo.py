"""The demo: what its corpus and instructions promise, and one run of everything at a size that takes seconds."""

from __future__ import annotations

import dataclasses
import inspect
import random
from itertools import islice

import pytest
import torch
from rich.console import Console
from threads import one_thread

from model import corpus, demo, layers, llama, muon, small_base
from model.adapter_files import load_adapter
from model.data import format_prompt
from model.errors import UserError
from model.loading import load_base
from model.muon import Muon, orthogonal
from model.recipe import Recipe
from model.tokenizer import load_tokenizer

TINY = demo.Size(
    pretraining_steps=2,
    instructions=16,
    held_out=8,
    recipe=Recipe(epochs=1, warmup_epochs=0.5, batch_size=4, base_lr=0.32),
    seeds=2,
    compared_epochs=1,
    timed_rounds=1,
    timed_steps=1,
)


def skill(name: str) -> corpus.Skill:
    return next(skill for skill in corpus.SKILLS if skill.name == name)


@pytest.mark.parametrize(
    ("name", "subject", "answer"),
    [
        ("opposite", "cold", "hot"),
        ("capital", "Peru", "Lima"),
        ("young", "swan", "cygnet"),
        ("upper", "tree", "TREE"),
        ("swap", "river moon", "moon river"),
        ("last", "apple tree sun", "sun"),
        ("twice", "lamp", "lamp lamp"),
        ("next", "9 10", "11 12 13"),
    ],
)
def test_skills(name, subject, answer):
    assert skill(name).answer(subject) == answer


@pytest.fixture(scope="module")
def pretraining_text() -> str:
    """What the demo's base reads, and more."""
    text = "\n".join(islice(corpus.documents(), 20_000))
    assert len(text.split()) > demo.Size().pretraining_steps * small_base.ROWS * (small_base.ROW_LENGTH + 1)
    return text


def words(text: str) -> str:
    """The words alone, so that an instruction and its input stand together wherever they are asked."""
    return f" {' '.join(text.replace('### Input:', ' ').split())} "


def test_held_out_questions_were_read_by_nobody(pretraining_text):
    """Answered or not, in a dialogue, on a sheet, in a form or among the adapter's instructions."""
    size = demo.Size()
    training, held_out = (
        corpus.instructions(size.instructions, seed=0),
        corpus.held_out(size.held_out, seed=0),
    )
    assert len(held_out) == len(set(held_out)) == size.held_out
    taught = "\n".join(record.prompt + record.output for record in training)
    for text in (words(pretraining_text), words(taught)):
        known, unknown = (
            [words(f"{record.instruction} {record.input}") in text for record in records]
            for records in (training[: size.held_out], held_out)
        )
        assert sum(known) > 0.5 * len(known) and not any(unknown)


@pytest.mark.parametrize("skill", corpus.SKILLS, ids=lambda skill: skill.name)
def test_facts_are_told_of_every_subject_and_rules_of_the_others_alone(pretraining_text, skill):
    trained, held_out = (subjects[:50] for subjects in skill.split())

    def told(subjects: list[str]) -> int:
        statements = [
            [
                text.format(name=skill.name, x=x, y=skill.answer(x))
                for text in (*corpus.NOTES, *skill.sentences)
            ]
            for x in subjects
        ]
        return sum(any(text in pretraining_text for text in of_one) for of_one in statements)

    assert told(trained) > 0.5 * len(trained)
    assert told(held_out) == (0 if skill.is_rule else len(held_out))


def test_instructions_are_seeded():
    assert corpus.instructions(20, 0) == corpus.instructions(20, 0) != corpus.instructions(20, 1)
    assert corpus.held_out(20, 0) == corpus.held_out(20, 0) != corpus.held_out(20, 1)


def test_most_forms_are_left_blank():
    draw = random.Random(0)
    forms = [part for _ in range(4000) for part in corpus.document(draw).split("### Response:")[1:]]
    filled = sum(not (part == "" or part.startswith("\nBelow")) for part in forms)
    assert len(forms) > 200 and 0.05 < filled / len(forms) < 0.2


@pytest.fixture(scope="module", autouse=True)
def on_one_thread():
    with one_thread():
        yield


@pytest.fixture(scope="module")
def output(tmp_path_factory):
    return tmp_path_factory.mktemp("demo")


@pytest.fixture(scope="module")
def result(output):
    demo.DECODED = 4
    return demo.run(output, TINY, Console(quiet=True))


def test_a_folder_of_somebody_elses_is_refused(tmp_path):
    (tmp_path / "adapter.safetensors").write_text("mine")
    with pytest.raises(UserError, match="is not empty: name another with --out"):
        demo.run(tmp_path, TINY, Console(quiet=True))
    assert [path.name for path in tmp_path.iterdir()] == ["adapter.safetensors"]


def test_the_tokenizer_knows_every_word(output, result):
    tokenizer = load_tokenizer(result.base)
    unknown = tokenizer.encode("xyzzy", bos=False)
    for record in corpus.held_out(400, 0) + corpus.instructions(400, 0):
        assert unknown[0] not in tokenizer.encode(record.prompt + record.output)
        assert tokenizer.decode(tokenizer.encode(record.output, eos=True)) == record.output


def test_the_demo_runs(output, result):
    """A base of two steps answers nothing, with or without the adapter: the other bars hold at this size too."""
    *others, (answers, enough) = result.bars().items()
    assert len(others) == 3 and all(met for _, met in others)
    assert (
        answers == "the adapted model answers at least 80%" and not enough and result.adapted_accuracy < 0.8
    )
    assert all(
        speed > 0 for speeds in (result.training_speed, result.decoding_speed) for speed in speeds.values()
    )
    assert {gates: len(losses) for gates, losses in result.final_losses.items()} == {
        "zero": 2,
        "random": 2,
        "none": 2,
    }
    assert (output / "gates.png").read_bytes().startswith(b"\x89PNG")
    base = load_base(result.base)
    assert sum(parameter.numel() for parameter in base.parameters()) > 2_000_000
    assert load_adapter(output / "adapter.safetensors", base.config).gates.any()
    console = Console(width=120)
    with console.capture() as shown:
        console.print(demo.table(result))
    assert "the base's, bit for bit" in shown.get() and f"{result.trainable:,}" in shown.get()


@pytest.mark.parametrize(
    ("change", "missed"),
    [
        ({}, None),
        ({"bitwise_at_start": False}, "MISSED: the output at step 0"),
        ({"share": 0.05}, "MISSED: the adapter is below 5%"),
        ({"base_accuracy": 0.101}, "MISSED: the base answers at most 10%"),
        ({"adapted_accuracy": 0.799}, "MISSED: the adapted model answers at least 80%"),
    ],
)
def test_a_missed_bar_is_told_and_fails_the_program(result, monkeypatch, capsys, change, missed):
    good = dataclasses.replace(result, base_accuracy=0.1, adapted_accuracy=0.8)
    monkeypatch.setattr(demo, "run", lambda *_: dataclasses.replace(good, **change))
    if missed is None:
        demo.main([])
    else:
        with pytest.raises(SystemExit, match="1"):
            demo.main([])
    told = capsys.readouterr().out
    assert told.count("met: ") == 4 - bool(missed) and told.count("MISSED") == bool(missed)
    assert (missed or "met: ") in told


def test_exact_match_asks_for_the_letter(output, result, monkeypatch):
    base, tokenizer = load_base(result.base), load_tokenizer(result.base)
    records = corpus.held_out(8, 0)
    for wrong in (0, 3):
        answers = [tokenizer.encode(record.output, bos=False) for record in records]
        for answer in answers[:wrong]:
            answer.append(answer[-1])
        monkeypatch.setattr(demo, "generate", lambda *args, answers=answers, **options: answers)
        assert demo.exact_match(base, None, tokenizer, records) == 1 - wrong / 8


def test_the_base_is_kept(output, result, monkeypatch):
    monkeypatch.setattr(small_base, "pretrain", None)  # would fail if it were called
    assert small_base.small_base(output / "cache", TINY.pretraining_steps) == result.base


def test_a_change_in_what_makes_the_base_makes_it_anew(tmp_path, monkeypatch):
    monkeypatch.setattr(small_base, "pretrain", lambda *_: None)
    monkeypatch.setattr(small_base, "save_base", lambda *_: None)
    (tmp_path / "base-7b").mkdir()  # the user's
    first, real = small_base.small_base(tmp_path), inspect.getsource
    for module in (corpus, layers, llama, muon, small_base):
        monkeypatch.setattr(
            inspect, "getsource", lambda source, changed=module: real(source) + "#" * (source is changed)
        )
        assert small_base.small_base(tmp_path) != first, module.__name__
        assert len(list(tmp_path.iterdir())) == 2 and (tmp_path / "base-7b").is_dir()


def test_an_interrupted_pretraining_is_begun_anew(tmp_path):
    def interrupt(done, loss):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        small_base.small_base(tmp_path, 2, interrupt)
    directory = small_base.small_base(tmp_path, 2)
    assert [path for path in tmp_path.iterdir()] == [directory]
    assert torch.isfinite(load_base(directory).embed_tokens.weight).all()


@pytest.mark.parametrize("shape", [(4, 24, 64), (3, 64, 24), (1, 32, 32)])
def test_muon_brings_singular_values_near_one(shape):
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    before, after = (torch.linalg.svdvals(m) for m in (matrices, orthogonal(matrices)))
    assert before.max() > 5 and after.max() < 1.3 and after.median() > 0.6


def test_muon_takes_torchs_steps():
    """The first steps are those of torch.optim.Muon, which computes in bfloat16."""
    gradients = [torch.randn(24, 48, generator=torch.Generator().manual_seed(seed)) for seed in range(3)]
    ours, theirs = (torch.nn.Parameter(torch.zeros(24, 48)) for _ in range(2))
    optimizers = Muon([ours], lr=0.1), torch.optim.Muon([theirs], lr=0.1, weight_decay=0.0)
    for gradient in gradients:
        for parameter, optimizer in zip((ours, theirs), optimizers, strict=True):
            parameter.grad = gradient.clone()
            optimizer.step()
    assert (ours - theirs).norm() < 0.02 * theirs.norm()


def test_the_prompt_is_the_official_one():
    record = next(record for record in corpus.held_out(8, 0) if record.input)
    assert record.prompt == format_prompt(record.instruction, record.input)
