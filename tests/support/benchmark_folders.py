"""A small folder in the format of each benchmark, and the right answer to each of its questions."""

from __future__ import annotations

import base64
import csv
import io
import json
from pathlib import Path

PIXEL = base64.b64encode(b"\x89PNG not decoded by these tests").decode()


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def write_image(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"image")


def mme(folder: Path) -> None:
    from evaluate.scorers.mme import TASKS

    for task in TASKS[::2]:  # as TASK.txt
        write(folder / f"{task}.txt", f"1.jpg\tIs {task} here?\tYes\n1.jpg\tIs it not?\tNo\n")
        write_image(folder / task / "1.jpg")
    for task in TASKS[1::2]:  # as released: a text file beside each image
        write(folder / task / "2.txt", f"Is {task} here?\tYes\nIs it not?\tNo\n")
        write_image(folder / task / "2.png")


def pope(folder: Path) -> None:
    for setting in ("random", "popular", "adversarial"):
        rows = [
            {"question_id": n, "image": f"{n // 2}.jpg", "text": f"Is there a {setting} {n}?", "label": label}
            for n, label in enumerate(["yes", "no", "yes", "no"])
        ]
        write(folder / f"coco_pope_{setting}.json", "\n".join(map(json.dumps, rows)))
    for n in range(2):
        write_image(folder / "val2014" / f"{n}.jpg")


def mmbench(folder: Path) -> None:
    rows = [
        ["1", "What is it?", "", "a cat", "a dog", "a bird", "", "B", "coarse_perception", PIXEL],
        ["2", "Which is left?", "They differ.", "red", "blue", "", "", "A", "relation_reasoning", PIXEL],
    ]
    header = ["index", "question", "hint", "A", "B", "C", "D", "answer", "l2-category", "image"]
    write(folder / "mmbench_dev.tsv", "\n".join("\t".join(row) for row in [header, *rows]) + "\n")


def cvqa(folder: Path) -> None:
    text = io.StringIO()
    table = csv.writer(text)
    table.writerow(["img_path", "query", "answer", "new query", "new answer", "type"])
    table.writerow(["a.jpg", "How many, all in all?", "2", "How many if one left?", "1", "direct"])
    table.writerow(["b.jpg", "Is it on?", "yes", "Would it be on if it broke?", "no", "boolean"])
    write(folder / "C-VQA-Real_questions.csv", text.getvalue())
    for name in "ab":
        write_image(folder / "images" / f"{name}.jpg")


def scienceqa(folder: Path, images: bool = True) -> None:
    problems = {
        str(n): {
            "question": f"Which is {n}?", "choices": ["one", "two", "three"], "answer": n % 3,
            "hint": "Think." * (n % 2),
            "subject": ["natural science", "social science", "language science"][n % 3], "grade": f"grade{n + 4}",
            "image": "image.png" if images and n == 4 else None,
        }
        for n in range(5)
    }  # fmt: skip
    write(folder / "problems.json", json.dumps(problems))
    write(folder / "pid_splits.json", json.dumps({"test": list(problems), "train": []}))
    write_image(folder / "images" / "test" / "4" / "image.png")


def lvlm_ehub(folder: Path) -> None:
    for name, answer in (("CIFAR10", "dog"), ("IC13", "stop"), ("GQA", "red"), ("ImageNetVC_color", "green")):
        rows = [{"image_path": "1.jpg", "gt_answers": answer, "question": f"What is {name}?"}]
        write(folder / name / "dataset.json", json.dumps(rows))
        write_image(folder / name / "1.jpg")


def vqa(folder: Path) -> None:
    questions = [{"question_id": n, "image_id": 7, "question": f"What is {n}?"} for n in range(2)]
    annotations = [
        {"question_id": n, "answer_type": kind, "answers": [{"answer": text}] * 10}
        for n, (kind, text) in enumerate([("yes/no", "yes"), ("other", "a red car")])
    ]
    write(folder / "v2_questions.json", json.dumps({"data_subtype": "val2014", "questions": questions}))
    write(folder / "v2_annotations.json", json.dumps({"annotations": annotations}))
    write_image(folder / "val2014" / "COCO_val2014_000000000007.jpg")


def easy_vqa(folder: Path) -> None:
    rows = [
        ["is it red?", "yes", 0],
        ["is it not?", "no", 0],
        ["what shape?", "circle", 1],
        ["colour?", "teal", 1],
    ]
    write(folder / "questions.json", json.dumps(rows))
    for name in "01":
        write_image(folder / "images" / f"{name}.png")


def vicuna(folder: Path) -> None:
    rows = [
        {"question_id": n, "category": kind, "turns": [f"What is {kind}?"]}
        for n, kind in enumerate(["math", "x"])
    ]
    write(folder / "question.jsonl", "\n".join(map(json.dumps, rows)))


FOLDERS = {
    "mme": mme, "pope": pope, "mmbench": mmbench, "cvqa": cvqa, "scienceqa": scienceqa, "lvlm-ehub": lvlm_ehub,
    "vqa": vqa, "easy-vqa": easy_vqa,
}  # fmt: skip


def right_answer(name: str, item) -> str:
    """What a model that knows everything says."""
    if name == "mme":
        return item.facts.truth
    if name in ("mmbench", "scienceqa"):
        return f"The answer is {item.facts.truth}."
    if name == "cvqa":
        return item.facts.truth if item.id.endswith("/original") else item.facts.new_truth
    if name == "easy-vqa":
        return f"{item.facts.title()}."
    truth = item.facts[1]
    return truth if isinstance(truth, str) else f"It is {truth[0]}" if name == "lvlm-ehub" else truth[0]
