"""Files that count by weight or by number: what an epoch has."""

from collections import Counter
from pathlib import Path

import pytest

from model.data import epoch_order
from model.errors import UserError
from model.mixture import Mixture, Share, read_share


def test_without_weights_an_epoch_is_what_it_was():
    mixture = Mixture.of([7, 5])
    assert mixture.size == 12
    assert [mixture.order(3, epoch) for epoch in range(2)] == [
        epoch_order(12, 3, epoch) for epoch in range(2)
    ]


def test_weights_and_numbers():
    mixture = Mixture.of(
        [10, 8, 6, 1, 0], [Share(0.5), Share(2.0), Share(count=4), Share(0.01), Share(count=3)]
    )
    assert mixture.counts == (5, 16, 4, 1, 0)
    epochs = [mixture.order(0, epoch) for epoch in range(6)]
    assert all(len(epoch) == mixture.size == 26 for epoch in epochs)
    of_file = [
        [[i for i in epoch if first <= i < last] for epoch in epochs]
        for first, last in ((0, 10), (10, 18), (18, 24))
    ]
    half, twice, four = of_file
    assert sorted(half[0] + half[1]) == sorted(half[2] + half[3]) == list(range(10))
    assert half[:2] != half[2:4]
    assert all(set(Counter(epoch).values()) == {2} and len(epoch) == 16 for epoch in twice)
    assert Counter(i for epoch in four[:3] for i in epoch) == Counter(2 * list(range(18, 24)))


def test_an_epoch_is_a_function_of_seed_and_number():
    mixture = Mixture.of([10, 8], [Share(0.3), Share(1.7)])
    assert mixture.order(1, 4) == mixture.order(1, 4) != mixture.order(2, 4) != mixture.order(1, 5)


def test_arguments(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("odd:2").write_text("")
    assert read_share("a.json") == (Path("a.json"), Share())
    assert read_share("a.json:0.5") == (Path("a.json"), Share(0.5))
    assert read_share("b:c.json:2") == (Path("b:c.json"), Share(2.0))
    assert read_share("a.json:n=5000") == (Path("a.json"), Share(count=5000))
    for plain in ("odd:2", "a:b.json", "a.json:", "a.json:n=", "a.json:-", "a.json:."):
        assert read_share(plain) == (Path(plain), Share())


@pytest.mark.parametrize(
    "argument",
    ["a.json:0", "a.json:0.0", "a.json:n=0", "a.json:-1", "a.json:n=-3", "a.json:nan", "a.json:1e999"],
)
def test_a_file_that_would_not_count(argument):
    with pytest.raises(UserError, match="weight above 0"):
        read_share(argument)
