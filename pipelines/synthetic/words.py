"""What drawn text says: words, names, numbers and codes, all made up here."""

from __future__ import annotations

import string

import numpy as np

# Some of each; the words of a sentence need not make sense together.
_WORDS = """
    harbour garden window silver river bridge market morning paper copper island winter letter engine velvet mountain
    signal orange candle forest station kitchen library quiet bright narrow open early green little north south east
    west under after before between above where when every other second third small large common clear water stone
    light glass field road house table music story colour number village summer evening thunder pocket travel carry
    gather follow answer remember build draw keep turn learn wait and the of to in with from for by at
"""
_PLACES = ("Alder", "Birch", "Castle", "Dover", "Elm", "Foxglove", "Granite", "Heron", "Juniper", "Linden", "Rowan")
_WAYS = ("Street", "Road", "Lane", "Square", "Avenue", "Bridge", "Gate", "Park", "Hill", "Court")
_DAYS = ("Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun")
_NOTICES = (
    "EXIT",
    "OPEN",
    "CLOSED",
    "NO PARKING",
    "PUSH",
    "PULL",
    "PLATFORM",
    "TICKETS",
    "CAFE",
    "BAKERY",
    "LIBRARY",
    "PLEASE WAIT",
    "KEEP CLEAR",
    "MIND THE STEP",
    "WET PAINT",
    "FRESH FISH",
    "TO THE TRAINS",
    "STAFF ONLY",
    "WELCOME",
    "FERRY",
    "MUSEUM",
    "ONE WAY",
    "SLOW",
    "SALE",
)


def words(rng: np.random.Generator, num: int) -> list[str]:
    return [str(word) for word in rng.choice(_WORDS.split(), num)]


def sentence(rng: np.random.Generator) -> str:
    """A sentence without much sense; some hold a number."""
    said = words(rng, int(rng.integers(4, 11)))
    if rng.random() < 0.3:
        said.insert(int(rng.integers(1, len(said))), str(rng.integers(2, 2000)))
    text = " ".join(said)
    return text[0].upper() + text[1:] + str(rng.choice([".", ".", ".", "?", "!"]))


def notice(rng: np.random.Generator) -> str:
    return str(rng.choice(_NOTICES))


def place(rng: np.random.Generator) -> str:
    return f"{rng.choice(_PLACES)} {rng.choice(_WAYS)}"


def code(rng: np.random.Generator) -> str:
    """Letters and digits in groups, as on number plates and parcels."""
    letters = "".join(rng.choice(list(string.ascii_uppercase), rng.integers(2, 4)))
    digits = "".join(rng.choice(list(string.digits), rng.integers(3, 6)))
    tail = "".join(rng.choice(list(string.ascii_uppercase), rng.integers(0, 3)))
    return str(rng.choice([" ", "-"])).join(part for part in (letters, digits, tail) if part)


def price(rng: np.random.Generator) -> str:
    return f"{rng.integers(1, 200)}.{rng.integers(0, 100):02d}"


def date(rng: np.random.Generator) -> str:
    return f"{rng.choice(_DAYS)} {rng.integers(1, 29):02d}/{rng.integers(1, 13):02d}/{rng.integers(1990, 2040)}"


def time_of_day(rng: np.random.Generator) -> str:
    return f"{rng.integers(0, 24):02d}:{rng.integers(0, 60):02d}"


def phone(rng: np.random.Generator) -> str:
    return f"0{rng.integers(100, 999)} {rng.integers(100, 999)} {rng.integers(1000, 9999)}"
