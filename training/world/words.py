"""The strings that get printed: words, made-up words, codes, numbers, prices and dates."""

from __future__ import annotations

import random
import string

_LEXICON_TEXT = """
able acid acorn actor air album alarm alpha amber angle animal ankle apple apron arch arm army arrow atlas
autumn award axe baby badge bag baker ball bamboo banana band bank barn base basket bath beach bean bear bed
beef bell belt bench berry bike bird biscuit black blade blanket block blue board boat bold bone book boot
bottle bowl box brave bread brick bridge bright broom brown brush bubble bucket bus butter button cabin
cable cafe cake call camel camera camp candle candy canoe cap captain car card carpet carrot castle cat cave
chain chair chalk cheese cherry chess chicken circle city class clay clean clock cloud clover club coach
coal coast coat cocoa coffee coin cold comet cookie copper coral cord corn cotton cow crab cream crown cube
cup curtain daisy dance dark dawn deer delta desert desk diamond dinner dog dolphin donkey door dragon dream
drum duck eagle early earth east echo egg elbow elm ember empty engine enter exit fabric falcon farm fast
feather fence fern field fig film fire fish flag flame flash flint flour flower flute fog forest fork fossil
fox free fresh frog fruit galaxy garden garlic gate giant ginger glass globe glove goat gold goose grape
grass green guitar gull hammer hand harbor harp hat hawk hazel heart help herb hill honey hook horse hotel
house ice ink iris iron island ivory jacket jade jam jar jelly jewel jolly juice jungle kettle key king
kitchen kite kiwi knee knife ladder lake lamp laser lemon leaf lens letter light lily lime lion liquid
lobster lock lotus lucky lunch magic magnet mango maple marble market mask meadow melon metal milk mill mint
mirror monkey moon morning moss motor mountain mouse muffin museum music napkin nature needle nest night
noble noodle north nut oak oasis ocean olive onion open opera orange orbit orchid otter oval oven owl oyster
paddle paint palace palm panda paper park parrot pasta pasture path peach peanut pear pearl pencil pepper
piano picnic pilot pine pink pizza planet plate plum pocket pond pony poppy potato prince pull pump purple
push puzzle quartz queen quick quiet quilt rabbit radio rain ranch raven ribbon rice river road robin rocket
roof rose royal ruby sail salad salmon salt sand sauce scarf school seed shadow sheep shell ship shoe silk
silver singer sky sleep slow smile smoke snow soap sofa soup south spice spoon spring star station steak
steam stone stop storm sugar summer sun swan table taxi tea temple tiger toast tomato tower toy train tree
truck tulip tuna turtle umbrella uncle valley vanilla velvet video villa violet violin wagon walnut warm
water wave west whale wheat wheel white wind window winter wolf wood wool yard yellow yogurt young zebra
zero zone
"""
LEXICON: tuple[str, ...] = tuple(word for word in _LEXICON_TEXT.split() if 2 < len(word) < 9)
_GOODS_TEXT = """
APPLE BREAD MILK EGGS TEA COFFEE RICE SOUP CAKE JUICE WATER SALT SUGAR FISH BEEF CORN PASTA PIZZA SALAD
TOAST CHEESE BUTTER HONEY LEMON MANGO PEACH GRAPES ONION POTATO TOMATO COOKIE CANDY SOAP PEN BOOK CARD MUG
BAG HAT LAMP BELT CUP FORK PLUM KIWI BEANS HAM NUTS OIL MELON SALMON MUFFIN NOODLE YOGURT TUNA STEAK DONUT
"""
GOODS = tuple(_GOODS_TEXT.split())
SHOP_SUFFIXES = ("SHOP", "CAFE", "MART", "STORE", "MARKET", "BAKERY", "BAR", "DELI", "FOODS", "HOUSE")
_LABELS_TEXT = """
MON TUE WED THU FRI SAT SUN JAN FEB MAR APR MAY JUN JUL AUG SEP OCT NOV DEC Q1 Q2 Q3 Q4 2019 2020 2021 2022
2023 2024 2025 2026 NORTH SOUTH EAST WEST A B C D E F G H K M P R S T X Y Z
"""
LABELS = tuple(_LABELS_TEXT.split())
TITLES = (
    "SALES",
    "SCORE",
    "VISITS",
    "POINTS",
    "ORDERS",
    "RESULTS",
    "VOTES",
    "RAIN",
    "PROFIT",
    "USERS",
    "GOALS",
    "STOCK",
)

_CONSONANTS = "bcdfghjklmnprstvwz"
_VOWELS = "aeiou"
# Letters whose capital looks the same: a word of nothing else could be read in either case.
_SAME_IN_BOTH_CASES = frozenset("ckopsuvwxz")
# No O or I beside digits: they could be read as 0 and 1.
_CODE_LETTERS = "ABCDEFGHJKLMNPQRSTUVWXYZ"


def word(rng: random.Random) -> str:
    """A lower-case word whose letters cannot all be guessed: a third are made up."""
    if rng.random() < 0.65:
        return rng.choice(LEXICON)
    return made_up(rng, rng.randint(2, 3))


def made_up(rng: random.Random, syllables: int) -> str:
    parts = [rng.choice(_CONSONANTS) + rng.choice(_VOWELS) for _ in range(syllables)]
    return "".join(parts) + (rng.choice("nrstlmk") if rng.random() < 0.5 else "")


def letters(rng: random.Random, length: int) -> str:
    return "".join(rng.choices(string.ascii_uppercase, k=length))


def code(rng: random.Random, shortest: int = 3, longest: int = 8) -> str:
    """Capital letters and digits, at least one of each."""
    length = rng.randint(shortest, longest)
    if length >= 5 and rng.random() < 0.2:
        head = rng.randint(2, length - 3)
        return "".join(rng.choices(_CODE_LETTERS, k=head)) + "-" + number(rng, length - head - 1)
    characters = rng.choices(_CODE_LETTERS + string.digits, k=length)
    characters[rng.randrange(length)] = rng.choice(string.digits)
    if all(character in string.digits for character in characters):
        characters[0] = rng.choice(_CODE_LETTERS)
    return "".join(characters)


def number(rng: random.Random, length: int) -> str:
    """Digits that do not start with 0."""
    return rng.choice("123456789") + "".join(rng.choices(string.digits, k=length - 1))


def price(rng: random.Random) -> str:
    return f"{rng.randint(1, 99)}.{rng.choice((rng.randint(0, 9) * 10, 99, 95, 50, rng.randint(0, 99))):02d}"


def date(rng: random.Random) -> str:
    year, month, day = rng.randint(1990, 2039), rng.randint(1, 12), rng.randint(1, 28)
    return rng.choice((f"{year}-{month:02d}-{day:02d}", f"{day:02d}/{month:02d}/{year}", f"{day:02d}.{month:02d}."))


def printed(rng: random.Random, longest: int = 10) -> str:
    """One string for a sign, at most ``longest`` characters (at least 6)."""
    while True:
        text = _printed(rng)
        if len(text) <= longest and not _SAME_IN_BOTH_CASES.issuperset(text):
            return text


def _printed(rng: random.Random) -> str:
    draw = rng.random()
    if draw < 0.16:
        return word(rng).upper()
    if draw < 0.28:
        return letters(rng, rng.randint(3, 7))
    if draw < 0.40:
        return number(rng, rng.randint(2, 6))
    if draw < 0.58:
        return code(rng)
    if draw < 0.72:
        return word(rng).capitalize()
    if draw < 0.84:
        return word(rng)
    if draw < 0.88:
        return rng.choice(("", "$")) + price(rng)
    if draw < 0.92:
        return date(rng)
    if draw < 0.95:
        return f"{word(rng).upper()} {number(rng, rng.randint(1, 3))}"
    if draw < 0.98:
        both = f"{word(rng)} {word(rng)}"
        return both.upper() if rng.random() < 0.6 else both.title()
    return rng.choice((f"{rng.randint(0, 23)}:{rng.randint(0, 59):02d}", f"{rng.randint(1, 99)}%"))


def unguessable(rng: random.Random) -> str:
    """A short string for tiny print: nothing in it follows from the rest."""
    draw = rng.random()
    if draw < 0.4:
        return code(rng, 3, 6)
    if draw < 0.65:
        return number(rng, rng.randint(3, 5))
    if draw < 0.85:
        return letters(rng, rng.randint(3, 5))
    return word(rng).upper()


def is_number(text: str) -> bool:
    return text.isdecimal()
