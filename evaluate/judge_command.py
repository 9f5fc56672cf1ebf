"""The command judge: two models' answers to the same questions, compared by a third model."""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from zinit_kernels.console import Parser

from .asking import Interrupted, ask
from .chat_server import ChatServer
from .lines import write_result
from .open_questions import LAYOUT, Question, read_answers, read_questions
from .question import Cell, Item, Table
from .scorers import judge
from .shared import UserError, command_name, messages, program
from .tables import as_json, show

VERDICTS = "verdicts.jsonl"
INTERRUPTED = 130
ORDERS = ("ours first", "theirs first")
SYSTEM = "You compare two assistants' answers to a question. You are exact, fair and brief."
CRITERIA = {  # by the categories of Vicuna's questions
    "coding": "Judge whether the code is right, complete and efficient, and whether it is explained.",
    "math": "Solve the problem yourself first. Then judge whether each result is right, and whether its steps are.",
}
GENERAL = "Judge how helpful, relevant, accurate and detailed each answer is."
FORMS = {
    "scores": (
        "Give each answer a score from 1 to 10, higher is better. Your first line must hold the two scores and nothing "
        "else, with a space between, the one of the first answer first. Explain them in the lines below. The order of "
        "the answers must not matter."
    ),
    "marks": (
        "Explain in a few sentences. The order of the answers and their length must not matter. Then end with your "
        "verdict alone: [[A]] if the first answer is better, [[B]] if the second is, [[C]] if they are equally good."
    ),
}


def prompt_of(question: Question, first: str, second: str, form: str) -> str:
    """What the judge reads."""
    return "\n\n".join(
        [
            f"[Question]\n{question.text}",
            f"[The first answer]\n{first}\n[End of the first answer]",
            f"[The second answer]\n{second}\n[End of the second answer]",
            f"{CRITERIA.get(question.category, GENERAL)} {FORMS[form]}",
        ]
    )


def _parser() -> Parser:
    parser = Parser(
        prog=command_name("judge"),
        description="Compares two models' answers by a third one, which sees each pair in both orders.",
    )
    parser.add_argument("--questions", type=Path, required=True, help=LAYOUT)
    parser.add_argument(
        "--ours", type=Path, required=True, help="answers of python -m evaluate vicuna, or FastChat's"
    )
    parser.add_argument("--theirs", type=Path, required=True, help="the other model's")
    parser.add_argument(
        "--endpoint", required=True, help="an OpenAI-compatible server: http://localhost:8000/v1"
    )
    parser.add_argument("--judge", required=True, help="the judge's name there")
    parser.add_argument(
        "--out", type=Path, required=True, help="folder for the verdicts; the same command goes on there"
    )
    parser.add_argument("--form", choices=FORMS, default="scores", help="of a verdict (default: scores)")
    parser.add_argument(
        "--key-variable", default="OPENAI_API_KEY", help="environment variable with the key, if one is needed"
    )
    parser.add_argument("--batch-size", type=int, default=4, help="requests at once (default: 4)")
    parser.add_argument("--max-new-tokens", type=int, default=1024, help="of a verdict (default: 1024)")
    return parser


@program("lower --batch-size")
def main(arguments: Sequence[str]) -> None:
    """The command. After Ctrl-C it exits with status 130."""
    options = _parser().parse_args(list(arguments))
    for name in ("batch_size", "max_new_tokens"):
        if getattr(options, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(options, name)}.")
    questions = read_questions(options.questions)
    ours, theirs = (_answers(questions, path) for path in (options.ours, options.theirs))
    items = []
    for question in questions:
        pair = (ours[question.id], theirs[question.id])
        for order, (first, second) in zip(ORDERS, (pair, pair[::-1]), strict=True):
            items.append(Item(f"{question.id}/{order}", prompt_of(question, first, second, options.form)))
    server = ChatServer(
        options.endpoint,
        options.judge,
        os.environ.get(options.key_variable, ""),
        SYSTEM,
        options.max_new_tokens,
    )
    run = {
        "benchmark": "judge", "judge": dict(server.identity), "form": options.form,
        "max_new_tokens": options.max_new_tokens, "system": hashlib.sha256(SYSTEM.encode()).hexdigest()[:16],
    }  # fmt: skip
    try:
        verdicts = ask(items, options.out, run, lambda: server, options.batch_size, VERDICTS)
    except Interrupted as stopped:
        messages().print(f"interrupted: {stopped}; the same command goes on from there.")
        sys.exit(INTERRUPTED)
    tables = [_table(questions, verdicts)]
    write_result(options.out, as_json(tables, run))
    show(tables)


def _answers(questions: Sequence[Question], path: Path) -> dict[str, str]:
    found = read_answers(path)
    missing = [question.id for question in questions if question.id not in found]
    if missing:
        raise UserError(
            f"{path} has no answer to {len(missing)} of {len(questions)} questions, the first is {missing[0]}."
        )
    return found


def _table(questions: Sequence[Question], verdicts: Mapping[str, str]) -> Table:
    score = judge.score(
        judge.Verdict(question.category, *(verdicts[f"{question.id}/{order}"] for order in ORDERS))
        for question in questions
    )
    rows: list[list[Cell]] = [
        [name, *(counts[outcome] for outcome in judge.OUTCOMES), sum(counts.values())]
        for name, counts in {**score.categories, "all": score.total}.items()
    ]
    note = (
        f"A pair is won only where both orders agree; otherwise it is a tie. {score.unread} of {len(questions)} pairs "
        "have a verdict that no rule reads, and count nowhere."
    )
    return Table("Judged in pairs", ("category", *judge.OUTCOMES, "pairs"), rows, [note])
