import datetime
import re
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fingpt_lightning.data import synthetic_news as module
from fingpt_lightning.data.synthetic_news import (
    MAX_WORDS,
    MIN_WORDS,
    SENTIMENTS,
    NewsItem,
    synthetic_news,
)

_AMOUNT = r"\$([\d,]+(?:\.\d+)?)( million| billion|)"
_UP = r"rose|climbed|grew|gained|jumped|advanced|raised|up|premium"


@pytest.fixture(scope="module")
def items() -> list[NewsItem]:
    return list(synthetic_news(2000, seed=3))


def _value(number: str, unit: str) -> float:
    return float(number.replace(",", "")) * {" billion": 1e9, " million": 1e6, "": 1}[unit]


@given(seed=st.integers(0, 2**32 - 1), index=st.integers(0, 20), surplus=st.integers(1, 5))
def test_an_item_depends_on_the_seed_and_its_index_alone(
    seed: int, index: int, surplus: int
) -> None:
    short = list(synthetic_news(index + 1, seed))
    assert list(synthetic_news(index + surplus, seed))[: index + 1] == short
    assert short[index] != list(synthetic_news(index + 1, seed + 1))[index]


def test_items_have_between_40_and_120_words(items: list[NewsItem]) -> None:
    assert {MIN_WORDS <= len(item.text.split()) <= MAX_WORDS for item in items} == {True}


def test_labels_are_balanced(items: list[NewsItem]) -> None:
    counts = Counter(item.label for item in items)
    assert set(counts) == set(SENTIMENTS)
    assert min(counts.values()) > 0.3 * len(items)


def test_items_differ(items: list[NewsItem]) -> None:
    assert len({item.text for item in items}) == len(items)


def test_percentages_are_those_of_the_printed_amounts(items: list[NewsItem]) -> None:
    pattern = re.compile(
        rf"(\w+) (?:its price target )?(?:by )?([\d.]+)% to {_AMOUNT}[^.$]*? from {_AMOUNT}"
    )
    num_checked = 0
    for item in items:
        for verb, percent, after, after_unit, before, before_unit in pattern.findall(item.text):
            growth = _value(after, after_unit) / _value(before, before_unit) - 1
            assert abs(growth) * 100 == pytest.approx(float(percent), abs=0.051), item.text
            assert (growth > 0) == bool(re.fullmatch(_UP, verb)), item.text
            num_checked += 1
    assert num_checked > 500


def test_amounts_a_share_and_a_year_are_those_of_the_totals(items: list[NewsItem]) -> None:
    share = re.compile(
        rf"(?:to|came to) {_AMOUNT}(?: from {_AMOUNT})?, or \$([\d.]+) a share on (\d+) million"
    )
    year = re.compile(r"worth \$([\d,]+) million over (\w+) years, or \$(\d+) million a year")
    words = ("three", "four", "five", "six", "seven", "eight")
    num_checked = 0
    for item in items:
        for total, unit, _, _, per_share, num_shares in share.findall(item.text):
            profit = _value(total, unit) / (float(num_shares) * 1e6)
            assert profit == pytest.approx(float(per_share), abs=0.02), item.text
            num_checked += 1
        for total, years, yearly in year.findall(item.text):
            assert _value(total, "") == (words.index(years) + 3) * int(yearly), item.text
            num_checked += 1
    assert num_checked > 200


def test_weekdays_are_those_of_the_dates(items: list[NewsItem]) -> None:
    pattern = re.compile(r"(\w+day), (\w+ \d+, \d{4})")
    dates = [match for item in items for match in pattern.findall(item.text)]
    assert len(dates) > 1000
    for weekday, date in dates:
        day = datetime.datetime.strptime(date, "%B %d, %Y")
        assert f"{day:%A}" == weekday
        assert day.weekday() < 5


def test_the_sentiment_follows_the_words(items: list[NewsItem]) -> None:
    good = re.compile(r"shares (gained|jumped|advanced)|margin widened|now expects.* grow|upgraded")
    bad = re.compile(r"shares (lost|slid|shed)|margin narrowed|to shrink|downgraded|cancelled a")
    assert {item.label for item in items if good.search(item.text)} == {"positive"}
    assert {item.label for item in items if bad.search(item.text)} == {"negative"}


def test_a_company_keeps_its_facts(items: list[NewsItem]) -> None:
    tickers: dict[str, set[str]] = {}
    chiefs: dict[str, set[str]] = {}
    for item in items:
        for name, ticker in re.findall(r"([A-Z]\w+ [A-Z]\w+(?: Group)?) \(([A-Z]{4})\)", item.text):
            tickers.setdefault(name, set()).add(ticker)
            for chief in re.findall(r"chief executive (\w+ \w+)[. ]", item.text):
                chiefs.setdefault(name, set()).add(chief.removesuffix(" told"))
    assert len(tickers) > 200
    assert all(len(known) == 1 for known in tickers.values())
    assert all(len(known) == 1 for known in chiefs.values())
    prefixes = [name[:3] for name in module._NAMES]
    assert len(prefixes) == len(set(prefixes))


def test_a_negative_number_of_items_is_refused() -> None:
    with pytest.raises(ValueError, match="num_items -1 is negative"):
        synthetic_news(-1, seed=0)
