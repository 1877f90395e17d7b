"""Financial news that never happened: free to ship, endless, and the same on every machine.

Companies, people and events are invented. What a reader can check holds: percentages match their
figures, per-share amounts match totals, weekdays match dates, and a company keeps its ticker, city,
business and chief executive from item to item, so that a language model has facts to learn.
"""

import datetime
import random
from collections.abc import Callable, Iterator
from typing import Literal, NamedTuple, get_args

Sentiment = Literal["negative", "neutral", "positive"]
SENTIMENTS: tuple[Sentiment, ...] = get_args(Sentiment)

MIN_WORDS = 40
MAX_WORDS = 120


class NewsItem(NamedTuple):
    """One story and the sentiment that it holds for the company's shareholders."""

    text: str
    label: Sentiment


def synthetic_news(num_items: int, seed: int) -> Iterator[NewsItem]:
    """Yields stories of 40 to 120 words; item i depends on ``seed`` and i alone.

    Raises:
        ValueError: ``num_items`` is negative.

    >>> [item.label for item in synthetic_news(3, seed=1)]
    ['positive', 'neutral', 'positive']
    """
    if num_items < 0:
        raise ValueError(f"num_items {num_items} is negative")
    return (_write_item(index, seed) for index in range(num_items))


class _Sector(NamedTuple):
    suffixes: tuple[str, ...]
    products: str
    tailwinds: tuple[str, ...]
    headwinds: tuple[str, ...]
    sites: str


class _Company(NamedTuple):
    name: str
    ticker: str
    city: str
    chief: str
    sector: _Sector


class _Change(NamedTuple):
    """Two amounts as printed, the relative change between them and the later one as a number."""

    before: str
    after: str
    percent: str
    value: float


class _Scene(NamedTuple):
    """What all sentences of one story share, so that they agree with each other."""

    rng: random.Random
    label: Sentiment
    company: _Company
    day: datetime.date
    price: _Change
    num_shares_millions: int
    quarterly_revenue_millions: float

    @property
    def up(self) -> bool:
        return self.label == "positive"

    @property
    def listed(self) -> str:
        return f"{self.company.name} ({self.company.ticker})"

    @property
    def date(self) -> str:
        return f"{self.day:%A}, {self.day:%B} {self.day.day}, {self.day.year}"

    @property
    def verb(self) -> str:
        up, down = ("rose", "climbed", "grew"), ("fell", "dropped", "declined")
        return self.rng.choice(up if self.up else down)

    @property
    def driver(self) -> str:
        sector = self.company.sector
        return self.rng.choice(sector.tailwinds if self.up else sector.headwinds)

    def growth(self, least: float, most: float) -> float:
        """A relative change with the sign of the label; below one percent when neutral."""
        if self.label == "neutral":
            return self.rng.choice((-1, 1)) * self.rng.uniform(0.002, 0.009)
        return self.rng.uniform(least, most) * (1 if self.up else -1)

    def millions(self, least: float, most: float) -> int:
        """Between two shares of a year's revenue."""
        return max(1, round(self.rng.uniform(least, most) * 4 * self.quarterly_revenue_millions))


_SECTORS = (
    _Sector(
        ("Semiconductors", "Microdevices"),
        "power chips for cars and factories",
        ("strong orders from electric-vehicle makers", "a faster ramp of its newest wafer line"),
        ("customers working through excess inventory", "lower yields on its newest wafer line"),
        "fabrication plants",
    ),
    _Sector(
        ("Freight", "Logistics"),
        "container shipping and trucking services",
        ("higher spot rates on Pacific routes", "fuller trucks on its domestic network"),
        ("falling spot rates on Pacific routes", "rising diesel costs and a driver shortage"),
        "terminals",
    ),
    _Sector(
        ("Foods", "Provisions"),
        "frozen meals and bakery goods",
        ("price increases that shoppers accepted", "new listings at two supermarket chains"),
        ("shoppers switching to store brands", "record prices for butter and wheat"),
        "kitchens",
    ),
    _Sector(
        ("Energy", "Petroleum"),
        "crude oil and natural gas",
        ("higher realised gas prices", "record output from its offshore wells"),
        ("weaker realised gas prices", "an unplanned shutdown of its offshore wells"),
        "fields",
    ),
    _Sector(
        ("Pharma", "Therapeutics"),
        "medicines for heart disease and diabetes",
        ("rapid uptake of its cholesterol drug", "broader insurance cover for its insulin"),
        ("generic competition to its cholesterol drug", "rebates that cut into insulin prices"),
        "laboratories",
    ),
    _Sector(
        ("Bancorp", "Financial Group"),
        "loans and accounts for small businesses",
        ("wider lending margins", "a drop in provisions for bad loans"),
        ("narrower lending margins", "a jump in provisions for bad loans"),
        "branches",
    ),
    _Sector(
        ("Software", "Systems"),
        "accounting software for mid-sized companies",
        ("a faster shift of customers to subscriptions", "renewals at their highest rate in years"),
        ("customers delaying large contracts", "a rise in cancelled subscriptions"),
        "offices",
    ),
    _Sector(
        ("Retail Group", "Stores"),
        "clothing and household goods",
        ("busier stores during the holidays", "fewer discounts at its outlet chain"),
        ("thinner traffic at its stores", "heavy discounts to clear winter stock"),
        "stores",
    ),
    _Sector(
        ("Mining", "Metals"),
        "copper and nickel ore",
        ("firmer copper prices", "better ore grades at its largest mine"),
        ("softer copper prices", "flooding at its largest mine"),
        "mines",
    ),
    _Sector(
        ("Utilities", "Power"),
        "electricity and gas for households",
        ("a cold winter that lifted demand", "lower costs for purchased power"),
        ("a mild winter that cut demand", "storm damage to its network"),
        "power stations",
    ),
)
# The first three letters differ, so that tickers do.
_NAMES = (
    *(
        "Aldermoor",
        "Ashgrove",
        "Bexley",
        "Brightwater",
        "Calderon",
        "Corvane",
        "Dunmore",
        "Eastlake",
    ),
    *("Elmstead", "Fairholm", "Galeston", "Granby", "Harlow", "Ironbridge", "Juniper", "Kestrel"),
    *(
        "Kingsport",
        "Lakemont",
        "Lorimer",
        "Marchetti",
        "Norwick",
        "Oakhurst",
        "Orinda",
        "Pemberton",
    ),
    *("Quarrystone", "Redfern", "Rosedale", "Saltmarsh", "Sterling", "Tamarack", "Thornbury"),
    *("Umberland", "Vantage", "Westmark", "Whitcombe", "Yarrow", "Zephyr", "Hollis", "Meridian"),
)
_CITIES = (
    *("Denver", "Leeds", "Toronto", "Rotterdam", "Austin", "Milan", "Osaka", "Gothenburg"),
    *("Melbourne", "Chicago", "Lyon", "Hamburg", "Dublin"),
)
_FIRST_NAMES = (
    *("Anna", "Daniel", "Grace", "Hiroshi", "Ingrid", "James", "Lena", "Marcus", "Nadia", "Omar"),
    *("Priya", "Rafael", "Sofia", "Thomas", "Wei", "Yusuf", "Claire"),
)
_LAST_NAMES = (
    *("Abbott", "Becker", "Castillo", "Drummond", "Eriksen", "Fontaine", "Grant", "Hayashi"),
    *("Ivanova", "Kowalski", "Lindqvist", "Mensah", "Novak", "Okafor", "Patel", "Quinn", "Rossi"),
    *("Sullivan", "Tanaka"),
)
_BROKERS = (
    "Halden Securities",
    "Northgate Capital",
    "Bluefin Research",
    "Cardew & Co",
    "Lyne Bros",
)
_AGENCIES = ("Atlas Ratings", "Sentry Credit", "Benchmark Ratings")
_BUYERS = ("Calloway Partners", "Grand Union Holdings", "Solent Industries", "Arbor Equity")
_CUSTOMERS = (
    *("the Nordic transport authority", "a consortium of three hospitals", "the city of Lisbon"),
    *("one of Europe's largest carmakers", "the Canadian government", "a major American airline"),
)
_QUOTES: dict[Sentiment, tuple[str, ...]] = {
    "positive": (
        "We are winning customers faster than we had planned",
        "This is the strongest position we have been in for a decade",
        "The work of the past two years is paying off, and there is more to come",
        "Demand has been better than even our optimistic case",
    ),
    "negative": (
        "These results are not good enough, and we are acting on costs",
        "The market turned against us faster than we had expected",
        "We underestimated how long the weakness would last",
        "This is a disappointing outcome for our shareholders and our staff",
    ),
    "neutral": (
        "The business is performing in line with the plan we set out in January",
        "There is no change to our strategy or to our priorities",
        "We see neither reason for alarm nor reason to celebrate",
        "We will give more detail when we report in the usual way",
    ),
}


def _write_item(index: int, seed: int) -> NewsItem:
    rng = random.Random(f"synthetic news {seed} {index}")
    scene = _set_scene(rng, rng.choice(SENTIMENTS))
    story, closings = rng.choice(_STORIES)
    sentences = story(scene)
    num_words = _num_words(sentences)
    target = rng.randint(MIN_WORDS + 10, MAX_WORDS - 35)
    for closing in rng.sample(closings, len(closings)):
        if num_words < target:
            sentences.append(closing(scene))
            num_words = _num_words(sentences)
    return NewsItem(" ".join(sentences), scene.label)


def _num_words(sentences: list[str]) -> int:
    return sum(len(sentence.split()) for sentence in sentences)


def _set_scene(rng: random.Random, label: Sentiment) -> _Scene:
    num_shares_millions = rng.randint(20, 160)
    price = rng.uniform(12, 190)
    scene = _Scene(
        rng=rng,
        label=label,
        company=_pick_company(rng),
        day=_business_day(datetime.date(2012, 1, 3) + datetime.timedelta(rng.randrange(12 * 365))),
        price=_change(price, price, 2),
        num_shares_millions=num_shares_millions,
        quarterly_revenue_millions=price * num_shares_millions / rng.uniform(4, 10),
    )
    return scene._replace(price=_change(price, price * (1 + scene.growth(0.015, 0.14)), 2))


def _pick_company(rng: random.Random) -> _Company:
    """A company is the tuple (name, sector), from which all its facts follow."""
    name, sector = rng.choice(_NAMES), rng.choice(_SECTORS)
    facts = random.Random(f"company {name} {sector.products}")
    suffix = facts.choice(sector.suffixes)
    return _Company(
        name=f"{name} {suffix}",
        ticker=f"{name[:3]}{suffix[0]}".upper(),
        city=facts.choice(_CITIES),
        chief=f"{facts.choice(_FIRST_NAMES)} {facts.choice(_LAST_NAMES)}",
        sector=sector,
    )


def _business_day(day: datetime.date) -> datetime.date:
    """The last day up to ``day`` that is neither on a weekend nor a fixed holiday."""
    while day.weekday() > 4 or (day.month, day.day) in ((1, 1), (12, 25)):
        day -= datetime.timedelta(1)
    return day


def _person(rng: random.Random) -> str:
    return f"{rng.choice(_FIRST_NAMES)} {rng.choice(_LAST_NAMES)}"


def _count(number: int) -> str:
    words = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
    return words[number] if number < len(words) else str(number)


def _change(before: float, after: float, digits: int, unit: str = "") -> _Change:
    before, after = round(before, digits), round(after, digits)
    return _Change(
        before=f"${before:,.{digits}f}{unit}",
        after=f"${after:,.{digits}f}{unit}",
        percent=f"{abs(after / before - 1) * 100:.1f}%",
        value=after,
    )


def _change_to(after_millions: float, growth: float) -> _Change:
    before_millions = after_millions / (1 + growth)
    if min(before_millions, after_millions) < 1000:
        return _change(before_millions, after_millions, 1, " million")
    return _change(before_millions / 1000, after_millions / 1000, 3, " billion")


def _earnings(scene: _Scene) -> list[str]:
    rng, company, up = scene.rng, scene.company, scene.up
    revenue = _change_to(scene.quarterly_revenue_millions, scene.growth(0.03, 0.24))
    quarter = rng.choice(("first", "second", "third", "fourth"))
    if scene.label == "neutral":
        leads = [
            f"{scene.listed} reported on {scene.date} that {quarter}-quarter revenue was little "
            f"changed at {revenue.after}, compared with {revenue.before} a year earlier.",
            f"Revenue at {scene.listed} was {revenue.after} in the {quarter} quarter, in line with "
            f"forecasts and within {revenue.percent} of the {revenue.before} booked a year "
            f"earlier, the company said on {scene.day:%A}.",
        ]
    else:
        helped, driver = "helped by" if up else "hurt by", scene.driver
        leads = [
            f"{scene.listed} said on {scene.date} that {quarter}-quarter revenue {scene.verb} "
            f"{revenue.percent} to {revenue.after} from {revenue.before} a year earlier, {helped} "
            f"{driver}.",
            f"Revenue at {scene.listed} {scene.verb} {revenue.percent} to {revenue.after} in the "
            f"{quarter} quarter from {revenue.before} a year earlier, the {company.city}-based "
            f"company said on {scene.day:%A}. It pointed to {driver}.",
            f"{helped.capitalize()} {driver}, {scene.listed} posted {quarter}-quarter revenue of "
            f"{revenue.after}, {'up' if up else 'down'} {revenue.percent} from {revenue.before} a "
            "year earlier.",
        ]
    net_margin = rng.uniform(0.05, 0.11)
    details = [_profit(scene, net_margin), _operating_margin(scene, net_margin)]
    return [rng.choice(leads), *details[: rng.randint(1, 2)]]


def _profit(scene: _Scene, net_margin: float) -> str:
    after_millions = scene.quarterly_revenue_millions * net_margin
    profit = _change_to(after_millions, scene.growth(0.04, 0.28))
    per_share = round(after_millions, 1) / scene.num_shares_millions
    share = f"${per_share:.2f} a share on {scene.num_shares_millions} million shares outstanding"
    if scene.label == "neutral":
        return f"Net income came to {profit.after}, or {share}, against {profit.before} a year ago."
    return (
        f"Net income {scene.verb} {profit.percent} to {profit.after} from {profit.before}, or "
        f"{share}."
    )


def _operating_margin(scene: _Scene, net_margin: float) -> str:
    after = round(1000 * net_margin) + scene.rng.randint(25, 60)
    if scene.label == "neutral":
        return f"The operating margin was unchanged at {after / 10:.1f}%."
    step = scene.rng.randint(6, 24)
    before = after - step if scene.up else after + step
    return (
        f"The operating margin {'widened' if scene.up else 'narrowed'} by {step * 10} basis points "
        f"to {after / 10:.1f}% from {before / 10:.1f}%."
    )


def _analyst(scene: _Scene) -> list[str]:
    rng, up = scene.rng, scene.up
    broker = rng.choice(_BROKERS)
    analyst = _person(rng)
    if scene.label == "neutral":
        return [
            f"{broker} repeated its hold rating on {scene.listed} on {scene.date} and left its "
            f"price target at ${scene.price.value * rng.uniform(1, 1.05):.0f}.",
            f"Analyst {analyst} wrote that the shares looked fairly valued after a year of steady "
            "results.",
        ]
    growth = scene.growth(0.1, 0.3)
    after = scene.price.value * (1 + growth)
    target = _change(after / (1 + growth), after, 0)
    reasons = (
        f"Analyst {analyst} cited {scene.driver} and said consensus estimates for next year were "
        f"too {'low' if up else 'high'}.",
        f"In a note to clients, analyst {analyst} said that {scene.driver} would "
        f"{'lift' if up else 'weigh on'} earnings for at least {_count(rng.randint(2, 4))} "
        "quarters.",
    )
    return [
        f"{broker} {'upgraded' if up else 'downgraded'} {scene.listed} to "
        f"{'buy' if up else 'sell'} from hold on {scene.date} and {'raised' if up else 'cut'} its "
        f"price target by {target.percent} to {target.after} from {target.before}.",
        rng.choice(reasons),
    ]


def _contract(scene: _Scene) -> list[str]:
    rng = scene.rng
    customer = rng.choice(_CUSTOMERS)
    years = rng.randint(3, 8)
    yearly = scene.millions(0.01, 0.06)
    worth = f"${yearly * years:,} million over {_count(years)} years, or ${yearly} million a year"
    jobs = rng.randint(8, 40) * 10
    if scene.label == "neutral":
        return [
            f"{scene.listed} has renewed its contract with {customer} on unchanged terms, it said "
            f"on {scene.date}.",
            f"The agreement is worth {worth}, the same as before, and was already part of the "
            "company's plans.",
        ]
    if scene.up:
        return [
            f"{scene.listed} won a contract with {customer} worth {worth}, it said on "
            f"{scene.date}.",
            f"The {scene.company.city}-based group beat {_count(rng.randint(2, 5))} rival bidders "
            f"and expects to add about {jobs} jobs to carry out the work.",
        ]
    return [
        f"{scene.listed} said on {scene.date} that {customer} had cancelled a contract worth "
        f"{worth}.",
        f"The group will book a charge of ${scene.millions(0.01, 0.03)} million and warned that up "
        f"to {jobs} jobs were at risk.",
    ]


def _dividend(scene: _Scene) -> list[str]:
    rng, up = scene.rng, scene.up
    before = max(12, round(scene.price.value * rng.uniform(0.4, 0.9)))
    step = 0 if scene.label == "neutral" else max(1, round(before * rng.uniform(0.04, 0.2)))
    after = before + step if up else before - step
    total = f"${after * 4 / 100:.2f} a share a year"
    buyback = f"${max(1, scene.millions(0.01, 0.04) // 10) * 10} million"
    payable = _business_day(scene.day + datetime.timedelta(rng.randint(28, 60)))
    due = f"It is due on {payable:%B} {payable.day} to holders on record two weeks before."
    if scene.label == "neutral":
        return [
            f"The board of {scene.listed} declared an unchanged quarterly dividend of {after} "
            f"cents a share on {scene.date}, which amounts to {total}.",
            due,
            f"The company has paid the same amount for {_count(rng.randint(3, 12))} quarters in a "
            "row.",
        ]
    return [
        f"The board of {scene.listed} {'raised' if up else 'cut'} the quarterly dividend by "
        f"{step / before * 100:.1f}% to {after} cents a share from {before} cents on {scene.date}, "
        f"which amounts to {total}.",
        due,
        f"The board also approved the repurchase of {buyback} of stock, citing cash flow well "
        "above its forecast."
        if up
        else f"The board also suspended share repurchases to save {buyback}, citing pressure from "
        "its lenders.",
    ]


def _takeover(scene: _Scene) -> list[str]:
    rng = scene.rng
    buyer = rng.choice(_BUYERS)
    offer = _change(scene.price.value, round(scene.price.value * rng.uniform(1.18, 1.45), 0), 2)
    shares = f"{scene.num_shares_millions} million shares"
    total = f"${offer.value * scene.num_shares_millions / 1000:.2f} billion"
    if scene.label == "neutral":
        vote = _business_day(scene.day + datetime.timedelta(rng.randint(20, 45)))
        return [
            f"Shareholders of {scene.listed} will vote on {vote:%B} {vote.day} on its merger with "
            f"{buyer}, according to a filing published on {scene.date}.",
            f"The terms, announced earlier, are unchanged at {offer.after} for each of the "
            f"{shares}, or {total} in all.",
        ]
    if scene.up:
        return [
            f"{buyer} agreed on {scene.date} to buy {scene.listed} for {offer.after} a share in "
            f"cash, a premium of {offer.percent} to the last closing price of {offer.before}.",
            f"The offer values the company's {shares} at {total}, and its directors recommended it "
            "unanimously.",
        ]
    return [
        f"{buyer} walked away from its {total} takeover of {scene.listed} on {scene.date} after an "
        "audit found errors in the company's accounts.",
        f"The offer had valued each of the {shares} at {offer.after}. No break-up fee will be "
        "paid.",
    ]


def _credit(scene: _Scene) -> list[str]:
    rng, up = scene.rng, scene.up
    agency = rng.choice(_AGENCIES)
    grades = ("A", "A-", "BBB+", "BBB", "BBB-", "BB+", "BB")
    at = rng.randrange(1, len(grades) - 1)
    before = rng.randint(21, 45)
    if scene.label == "neutral":
        return [
            f"{agency} affirmed the {grades[at]} credit rating of {scene.listed} with a stable "
            f"outlook on {scene.date}.",
            f"The agency expects net debt to remain near {before / 10:.1f} times operating profit "
            "over the next two years.",
        ]
    after = before + rng.randint(3, 9) * (-1 if up else 1)
    return [
        f"{agency} {'raised' if up else 'lowered'} its credit rating of {scene.listed} to "
        f"{grades[at - 1] if up else grades[at + 1]} from {grades[at]} on {scene.date}.",
        f"Net debt has {'fallen' if up else 'risen'} to {after / 10:.1f} times operating profit "
        f"from {before / 10:.1f} times a year ago, the agency said.",
        f"It {'sees' if up else 'fears'} a further {'improvement' if up else 'deterioration'} "
        f"because of {scene.driver}.",
    ]


def _sites(scene: _Scene) -> list[str]:
    rng, sites = scene.rng, scene.company.sector.sites
    before, step = rng.randint(24, 60), rng.randint(3, 12)
    cost = scene.millions(0.01, 0.05)
    if scene.label == "neutral":
        head = _person(rng)
        return [
            f"{scene.listed} named {head} as head of its {before} {sites} on {scene.date}, as part "
            "of a handover announced last year.",
            f"{head.split()[-1]} has been with the company for {_count(rng.randint(6, 22))} years "
            "and will report to the chief executive.",
        ]
    if scene.up:
        return [
            f"{scene.listed} will expand to {before + step} {sites} from {before}, it said on "
            f"{scene.date}, to meet demand that exceeds what it can supply.",
            f"The {_count(step)} new sites cost ${cost} million and should pay for themselves "
            f"within {_count(rng.randint(2, 4))} years.",
        ]
    return [
        f"{scene.listed} will close {_count(step)} of its {before} {sites}, leaving "
        f"{before - step}, it said on {scene.date}, because of {scene.driver}.",
        f"The closures will lead to a charge of ${cost} million and the loss of "
        f"{rng.randint(12, 90) * 10} jobs.",
    ]


def _quote(scene: _Scene) -> str:
    words = scene.rng.choice(_QUOTES[scene.label])
    chief = scene.company.chief
    endings = (
        f"said chief executive {chief}.",
        f"{chief}, the chief executive, told reporters.",
        f"chief executive {chief} told analysts on a call.",
    )
    return f'"{words}," {scene.rng.choice(endings)}'


def _share_price(scene: _Scene) -> str:
    price = scene.price
    eve = _business_day(scene.day - datetime.timedelta(1))
    if scene.label == "neutral":
        return f"The shares were little changed at {price.after}, after {price.before} on {eve:%A}."
    verbs = ("gained", "jumped", "advanced") if scene.up else ("lost", "slid", "shed")
    return (
        f"The shares {scene.rng.choice(verbs)} {price.percent} to {price.after} from "
        f"{price.before} on {eve:%A}."
    )


def _outlook(scene: _Scene) -> str:
    low = scene.rng.randint(1, 4)
    now, was = f"{low + 3}% to {low + 5}%", f"{low}% to {low + 2}%"
    if scene.label == "neutral":
        return f"The company kept its forecast that revenue will grow by {was} this year."
    if scene.up:
        return f"The company now expects revenue to grow by {now} this year, up from {was} before."
    return f"The company now expects revenue to shrink by {now} this year, not by {was} as before."


def _background(scene: _Scene) -> str:
    company = scene.company
    facts = (
        f"{company.name}, based in {company.city}, sells {company.sector.products}.",
        f"Led by {company.chief}, the {company.city}-based company supplies "
        f"{company.sector.products}.",
    )
    return scene.rng.choice(facts)


_Sentence = Callable[[_Scene], str]
_Story = Callable[[_Scene], list[str]]
_CLOSINGS: tuple[_Sentence, ...] = (_quote, _share_price, _outlook, _background)
# The price of a company that is being bought is fixed, and its outlook no longer matters.
_TAKEOVER_CLOSINGS: tuple[_Sentence, ...] = (_quote, _background)
_STORIES: tuple[tuple[_Story, tuple[_Sentence, ...]], ...] = (
    *((_earnings, _CLOSINGS),) * 3,
    (_analyst, (_share_price, _outlook, _background)),
    (_contract, _CLOSINGS),
    (_dividend, _CLOSINGS),
    (_takeover, _TAKEOVER_CLOSINGS),
    (_credit, _CLOSINGS),
    (_sites, _CLOSINGS),
)
