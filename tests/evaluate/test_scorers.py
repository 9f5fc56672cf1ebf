"""The benchmarks' scoring rules, on the answers that scorers are known to misread."""

import math
import random

import pytest

from evaluate.scorers import (
    base_to_novel,
    cider,
    cvqa,
    judge,
    lvlm_ehub,
    mmbench,
    mme,
    pope,
    scienceqa,
    spans,
    squad,
    vqa,
    vtab,
)
from evaluate.scorers.choices import read_choice

# What the published answers of LaVIN amount to: task -> images with both questions right, images with one right, images
# with none. MME's own scoring tool gives these answers 963.61 for perception and 249.64 for cognition.
LAVIN = {
    "existence": (27, 3, 0), "count": (8, 21, 1), "position": (3, 26, 1), "color": (5, 25, 0),
    "posters": (30, 114, 3), "celebrity": (16, 97, 57), "scene": (116, 83, 1), "landmark": (59, 138, 3),
    "artwork": (56, 125, 19), "OCR": (8, 11, 1), "commonsense_reasoning": (20, 42, 8),
    "numerical_calculation": (2, 18, 0), "text_translation": (0, 19, 1), "code_reasoning": (0, 20, 0),
}  # fmt: skip


def mme_rows(counts):
    forms = {
        True: ["Yes.", "yes", " Yes, it is", "YES\n"],
        False: ["no, there is not", "No", "\nNo.", "no"],
    }
    for task, (both, one, none) in counts.items():
        for image, wrong in enumerate([0] * both + [1] * one + [2] * none):
            for question, truth in enumerate(("Yes", "No")):
                said = (truth == "Yes") != (question < wrong)
                yield mme.Row(task, f"{image}.jpg", truth, forms[said][image % 4])


def test_mme_gives_the_published_scores_of_lavin():
    found = mme.score(mme_rows(LAVIN))
    assert round(found.perception, 2) == 963.61 and round(found.cognition, 2) == 249.64
    assert list(found.tasks) == list(mme.TASKS)


@pytest.mark.parametrize(
    "answer, read",
    [
        ("Yes.", "yes"), ("YES", "yes"), ("no, there is not", "no"), ("No", "no"), ("", "other"), ("\n Yes", "yes"),
        ("It is yes", "other"), ("maybe", "other"), ("know", "no"), ("A: no", "other"), ("nay. yes", "other"),
    ],
)  # fmt: skip
def test_mme_reads_an_answer_by_its_first_four_characters(answer, read):
    assert mme.reading(answer) == read


def test_mme_refuses_what_is_no_mme():
    row = mme.Row("count", "1.jpg", "Yes", "yes")
    for rows, said in [
        ([row], "two questions an image, got 1"),
        ([row._replace(task="counting")] * 2, "no task 'counting'"),
        ([row._replace(truth="maybe")] * 2, "'maybe'"),
    ]:
        with pytest.raises(ValueError, match=said):
            mme.score(rows)


@pytest.mark.parametrize(
    "answer, read",
    [
        ("Yes.", "yes"), ("yes", "yes"), ("no, there is not", "no"), ("No.", "no"), ("There is not a dog.", "no"),
        ("Yes. There is no cat.", "yes"), ("Yes, there is no doubt.", "no"), ("NO", "yes"), ("", "yes"),
        ("Nothing", "yes"), ("No\n", "no"), ("I see no,body", "yes"),
    ],
)  # fmt: skip
def test_pope_reads_the_first_sentence(answer, read):
    assert pope.reading(answer) == read


def test_pope_figures():
    truths = ["yes", "yes", "yes", "no", "no"]
    found = pope.score(truths, ["Yes.", "no", "", "Yes, a dog", "no, there is not"])
    assert found.accuracy == 3 / 5 and found.precision == 2 / 3 and found.recall == 2 / 3
    assert math.isclose(found.f1, 2 / 3)
    assert found.yes_ratio == 3 / 5
    assert found.empty == 1 / 5
    never = pope.score(truths, ["no"] * 5)
    assert never == pope.Score(2 / 5, 0, 0, 0, 0, 0), "no yes at all divides by nothing"
    assert pope.score(truths, ["yes"] * 5).yes_ratio == 1, "of the predictions, not of the truth"
    with pytest.raises(ValueError, match="got 1 for 5"):
        pope.score(truths, ["yes"])
    with pytest.raises(ValueError, match="'Yes'"):
        pope.score(["Yes"], ["yes"])


PETS = {"A": "cat", "B": "cat and dog", "C": "a bird", "D": "category"}


@pytest.mark.parametrize(
    "answer, read",
    [
        ("B", "B"), ("b.", "B"), ("(C)", "C"), ("The answer is B.", "B"), ("A", "A"), ("Option A", "A"),
        ("A or B", None), ("B, not C", None), ("A cat is here", "A"), ("It is a cat", "A"), ("cat and dog", "B"),
        ("I see a cat and dog.", "B"), ("category", "D"), ("a cat, and a cat and dog", None), ("", None), ("Z", None),
        ("E", None), ("a bird or category", None), ("A bird flies over there", "C"), ("A nice answer would be D", "D"),
        ("**B**", "B"), ("nothing of these", None), ("The answer is A.", "A"), ("I think it is (A).", "A"),
        ("A is what I would choose", None), ("The answer is A, not B.", None),
    ],
)  # fmt: skip
def test_a_choice_is_read_or_not_guessed(answer, read):
    assert read_choice(answer, PETS) == read


def circular(answers):
    options = {"A": "red", "B": "green", "C": "blue"}
    for k, (rotated, truth) in enumerate(mmbench.rotations(options, "B")):
        yield mmbench.Row(
            7 + k * mmbench.ROTATION, rotated, truth, "coarse_perception", answers(rotated, truth)
        )


def test_mmbench_counts_a_question_whose_every_rotation_is_right():
    assert mmbench.score(circular(lambda options, truth: truth)).overall == 100
    assert mmbench.score(circular(lambda options, truth: f"It is {options[truth]}.")).overall == 100
    always_b = mmbench.score(circular(lambda options, truth: "B"))
    assert always_b == mmbench.Score(0, {"CP": 0}, 0)
    shy = mmbench.score(circular(lambda options, truth: "A or B"))
    assert shy.unread == 1 and shy.overall == 0
    rows = list(circular(lambda options, truth: truth))
    assert {row.options[row.truth] for row in rows} == {"green"} and len({row.truth for row in rows}) == 3
    with pytest.raises(ValueError, match="question 7 has 3 options and 2 rotations"):
        mmbench.score(rows[:2])
    with pytest.raises(ValueError, match="index 1000007 is there twice"):
        mmbench.score([*rows, rows[1]])
    with pytest.raises(ValueError, match="no ability 'taste'"):
        mmbench.score([rows[0]._replace(ability="taste")])


@pytest.mark.parametrize(
    "answer, number",
    [
        ("3", "3"), ("There would be four plates.", "4"), ("None", "0"), ("no plates", "0"),
        ("If 2 more were added, there would be 5.", "5"), ("5 if 2 more were added", "5"), ("if two", None),
        ("", None), ("many", None), ("07", "7"), ("twelve", None), ("2, if 3", "2"),
    ],
)  # fmt: skip
def test_cvqa_reads_numbers_outside_the_condition(answer, number):
    assert cvqa.read_number(answer) == number


def test_cvqa_reads_yes_and_no_and_the_letters_of_the_synthetic_part():
    read = {
        "Yes.": "yes",
        "It is.": "yes",
        "no": "no",
        "It is not": "no",
        "True": "yes",
        "": None,
        "maybe": None,
    }
    assert {answer: cvqa.read_boolean(answer) for answer in read} == read
    query = "How many flowers are outside? Select the correct answer:A:16  B:17  C:12  D:13"
    assert cvqa.options_of(query) == {"A": "16", "B": "17", "C": "12", "D": "13"}
    assert cvqa.read("abs_counting_1", query, "B", "17") == "B"
    assert cvqa.read("abs_counting_1", query, "B", "C") == "C"


def test_cvqa_scores_the_second_question_and_the_loss():
    row = cvqa.Row("direct", "How many?", "1", "one", "How many if two more came?", "3", "3")
    rows = [row, row._replace(new_answer="one"), row._replace(kind="boolean", truth="no", new_truth="yes")]
    found = cvqa.score(rows)
    assert found["direct"] == cvqa.GroupScore(100, 50, 0) and found["direct"].loss == 50
    assert found["boolean"] == cvqa.GroupScore(0, 0, 1), "a number is no yes and no no"


@pytest.mark.parametrize(
    "answer, read",
    [
        ("The answer is B.", "B"), ("The answer is C", "C"), ("So the answer is (A).", "A"), ("B", "B"), ("(b)", "B"),
        ("The answer is B. BECAUSE: it is", "B"), ("The answer is E.", None), ("The answer is A or B.", None),
        ("The answer is A. No. The answer is B.", None), ("", None), ("A cat", None), ("The answer is Amber.", None),
    ],
)  # fmt: skip
def test_scienceqa_reads_a_letter_or_reports_that_it_cannot(answer, read):
    assert scienceqa.reading(answer, options=3) == read


def test_scienceqa_categories():
    row = scienceqa.Row("natural science", 6, True, True, 2, "A", "The answer is A.")
    rows = [
        row,
        row._replace(subject="language science", grade=7, has_hint=False, has_image=False, answer="eh"),
    ]
    found = scienceqa.score(rows)
    assert found.average == 50 and found.unread == 0.5
    assert found.categories == {
        "NAT": 100,
        "LAN": 0,
        "TXT": 100,
        "IMG": 100,
        "NO": 0,
        "G1-6": 100,
        "G7-12": 0,
    }
    with pytest.raises(ValueError, match="no subject 'art'"):
        scienceqa.categories_of(row._replace(subject="art"))


@pytest.mark.parametrize(
    "text, normal",
    [
        ("The two dogs.", "2 dogs"), ("dont", "don't"), ("couldntve", "couldntve"), ("couldn'tve", "couldn't've"),
        ("A/B", "b"), ("3,000", "3000"), ("4.5", "4.5"), ("yes.", "yes"), ("none", "0"), ("à la carte", "à la carte"),
        ("", ""), ("red-brown", "red brown"), ("red - brown", "red brown"),
    ],
)  # fmt: skip
def test_vqa_normalises(text, normal):
    assert vqa.normalised(text) == normal


def test_vqa_accuracy_leaves_each_person_out():
    people = ["red"] * 3 + ["dark red"] * 7
    assert vqa.accuracy("Red.", people) == pytest.approx((3 * 2 / 3 + 7 * 1) / 10)
    assert vqa.accuracy("dark red", people) == 1 and vqa.accuracy("", people) == 0
    assert vqa.accuracy("2", ["2"]) == 0, "nobody is left to agree with"
    assert vqa.contains("It is the red car.", ["a car"]) and not vqa.contains("It is a carpet", ["car"])


def test_lvlm_ehub_rules_and_dimensions():
    assert lvlm_ehub.holds_letters("It says: 'STOP!'", ["stop"]) and not lvlm_ehub.holds_letters(
        "stopped", ["stop"]
    )
    assert lvlm_ehub.word_f1(["a b b", ""], ["b c", "d"]) == pytest.approx(2 * 1 / (3 + 3))
    assert lvlm_ehub.reciprocal_rank("yes it is", ["no", "yes"]) == 0.5
    found = lvlm_ehub.score({"CIFAR10": (["a dog", "cat"], [["dog"], ["frog"]]), "IC13": (["x"], [["x"]])})
    assert found.datasets == {"CIFAR10": 0.5, "IC13": 1.0} and found.overall is None
    assert found.dimensions == {"visual perception": 0.5, "visual knowledge acquisition": 1.0}
    everything = lvlm_ehub.score(
        {name: (["x"], [["x"]]) for name in ("CIFAR10", "IC13", "GQA", "ImageNetVC_color")}
    )
    assert everything.overall == 1
    with pytest.raises(ValueError, match="no data set 'Flickr8k'"):
        lvlm_ehub.score({"Flickr8k": ([], [])})


def test_cider_of_the_published_code():
    """Figures of the scorer in LVLM-eHub's repository for the same captions."""
    captions = ["a dog runs on the grass", "two men ride bikes", "a red car parked", "the dog sleeps"]
    references = [
        ["a dog runs in the grass", "dog on grass running"],
        ["two men are riding bikes"],
        ["a red car is parked on the street", "red car"],
        ["a dog is asleep", "the dog sleeps on a bed"],
    ]
    expected = [2.66537329, 2.3656533, 3.20144681, 2.28065574]
    assert cider.scores(captions, references) == pytest.approx(expected, abs=1e-8)
    with pytest.raises(ValueError, match="at least one reference"):
        cider.scores(["a"], [[]])


@pytest.mark.parametrize(
    "answer, truth, exact, overlap",
    [
        ("The Beatles!", "beatles", 1, 1), ("", "", 1, 1), ("", "x", 0, 0), ("the", "", 1, 1),
        ("thé vert", "vert", 0, 2 / 3), ("aïda", "da", 0, 0), ("à Paris", "Paris", 0, 2 / 3), ("b b", "b", 0, 2 / 3),
        ("“x”", "x", 0, 0),
    ],
)  # fmt: skip
def test_squad_answers(answer, truth, exact, overlap):
    assert squad.exact_match(answer, truth) == exact and squad.f1(answer, truth) == pytest.approx(overlap)


def test_squad_scores_answerable_and_unanswerable_questions():
    first = squad.score({"1": "a big dog"}, {"1": ["dog", "big dog"]})
    assert first == squad.Score(100, 100)
    second = squad.score({"1": "dog", "2": "", "3": "cat"}, {"1": ["big dog"], "2": [], "3": []})
    assert second.exact == pytest.approx(100 / 3) and second.f1 == pytest.approx(500 / 9)
    assert (second.has_answer_exact, second.no_answer) == (0, 50) and second.has_answer_f1 == pytest.approx(
        200 / 3
    )
    assert squad.score({"1": "", "2": ""}, {"1": [], "2": ["the"]}).exact == 100, (
        "an empty truth is no answer"
    )
    with pytest.raises(ValueError, match="1 questions have no answer, the first is '2'"):
        squad.score({"1": ""}, {"1": [], "2": []})


@pytest.mark.parametrize(
    "tags, expected",
    [
        ("O I-PER I-PER O", [("PER", 1, 2)]), ("B-PER I-LOC", [("PER", 0, 0), ("LOC", 1, 1)]),
        ("B-PER B-PER", [("PER", 0, 0), ("PER", 1, 1)]), ("I-PER", [("PER", 0, 0)]), ("", []), ("O O", []),
        ("B-C-A1 I-C-A1 B-A1", [("C-A1", 0, 1), ("A1", 2, 2)]), ("S-PER S-PER", [("PER", 0, 0), ("PER", 1, 1)]),
        ("B-PER E-PER I-PER", [("PER", 0, 1), ("PER", 2, 2)]), ("B-PER O I-PER", [("PER", 0, 0), ("PER", 2, 2)]),
    ],
)  # fmt: skip
def test_spans(tags, expected):
    assert spans.spans(tags.split()) == expected


def test_span_f1_keeps_sentences_apart_and_knows_nothing_to_find():
    truths, predictions = [["B-PER"], ["I-PER", "O"]], [["B-PER"], ["O", "O"]]
    found = spans.score(truths, predictions)
    assert (found.right, found.predicted, found.true) == (1, 1, 2), (
        "a span does not run into the next sentence"
    )
    assert spans.score([["O"]], [["O"]]) == spans.Score(0, 0, 0, 0, 0, 0)
    assert spans.score_by_label(truths, predictions)["PER"].f1 == pytest.approx(2 / 3)
    for tags, said in [(["PER"], "got 'PER'"), (["B-"], "got 'B-'"), ([], "1 tokens and 0 predicted")]:
        with pytest.raises(ValueError, match=said):
            spans.score([["O"]], [tags])


def test_spans_are_those_of_seqeval():
    entities = pytest.importorskip("seqeval.metrics.sequence_labeling").get_entities
    rng = random.Random(0)
    tags = ["O", *(f"{mark}-{label}" for mark in "BIES" for label in ("PER", "C-A1"))]
    for _ in range(2000):
        sentence = rng.choices(tags, k=rng.randint(0, 8))
        assert spans.spans(sentence) == entities(sentence), sentence


def test_vtab_is_a_mean_of_means():
    tasks = {name: [50.0] for group in vtab.GROUPS.values() for name in group}
    assert len(tasks) == 19 and vtab.score(tasks).overall == 50
    found = vtab.score({"patch_camelyon": [80, 90], "eurosat": [95], "resisc45": [60], "retinopathy": [70]})
    assert (
        found.tasks["patch_camelyon"] == 85
        and found.groups == {"specialized": 77.5}
        and found.overall is None
    )
    with pytest.raises(ValueError, match="eurosat"):
        vtab.score({"eurosat": [101]})


def test_vtab_knows_the_names_of_folders():
    names = {"cifar", "oxford_flowers102", "oxford_iiit_pet", "caltech101", "dtd", "svhn", "sun397"}
    assert vtab.score({name: [60] for name in names}).groups == {"natural": 60}
    assert set(vtab.ALIASES.values()) <= {name for group in vtab.GROUPS.values() for name in group}
    with pytest.raises(ValueError, match="cifar100 is there under two names"):
        vtab.score({"cifar": [60], "cifar100": [60]})


def test_base_to_novel_splits_sorted_labels():
    assert base_to_novel.split([4, 0, 2, 2, 9, 7]) == ([0, 2, 4], [7, 9])
    assert base_to_novel.validation_shots(16) == 4 and base_to_novel.validation_shots(2) == 2
    found = base_to_novel.score([(80, 60), (90, 70)])
    assert found == base_to_novel.Score(85, 65, pytest.approx(2 * 85 * 65 / 150))
    assert base_to_novel.harmonic_mean(0, 0) == 0
    with pytest.raises(ValueError, match="at least 2 classes"):
        base_to_novel.split([3, 3])


@pytest.mark.parametrize(
    "verdict, read",
    [
        ("8 9\nAssistant 2 is better.", judge.SECOND), ("8.5, 7", judge.FIRST), ("\n 7 7\n", judge.TIE),
        ("Assistant 1: 8 Assistant 2: 9", judge.SECOND), ("10 9.", judge.FIRST), ("[[A]]", judge.FIRST),
        ("B is fine, but [[C]]", judge.TIE), ("[[A]] ... no: [[B]]", judge.SECOND), ("", None), ("80 90", None),
        ("First, 8 9", None), ("8", None), ("A", None),
    ],
)  # fmt: skip
def test_verdicts_are_read_or_counted_as_unread(verdict, read):
    assert judge.read_verdict(verdict) == read


def test_a_pair_is_won_only_in_both_orders():
    always_first = judge.Verdict("generic", "9 8", "9 8")
    found = judge.score(
        [
            always_first,
            always_first._replace(theirs_first="8 9"),
            always_first._replace(ours_first="[[B]]", theirs_first="[[A]]"),
            always_first._replace(category="math", ours_first="First, I solve it"),
        ]
    )
    assert found.categories["generic"] == {"win": 1, "tie": 1, "loss": 1}
    assert found.total == {"win": 1, "tie": 1, "loss": 1} and found.unread == 1
