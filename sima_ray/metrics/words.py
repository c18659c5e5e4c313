"""English words as the metrics read them: tokens, and nouns in the singular."""

import re

_TOKEN = re.compile(r"[^\W_]+(?:-[^\W_]+)*|[^\w\s]")

_IRREGULAR = {
    "people": "person",
    "children": "child",
    "grandchildren": "grandchild",
    "schoolchildren": "schoolchild",
    "oxen": "ox",
    "geese": "goose",
    "mice": "mouse",
    "lice": "louse",
    "dice": "die",
    "teeth": "tooth",
    "feet": "foot",
    "buses": "bus",
    "busses": "bus",
    "minibuses": "minibus",
    "trolleybuses": "trolleybus",
    "autobuses": "autobus",
    "gases": "gas",
    "lenses": "lens",
    "skis": "ski",
    "taxis": "taxi",
    "safaris": "safari",
    "corgis": "corgi",
    "paninis": "panini",
    "broccolis": "broccoli",
    "bonsais": "bonsai",
    "ibises": "ibis",
    "emus": "emu",
    "gateaus": "gateau",
    "gateaux": "gateau",
    "tvs": "tv",
    "pcs": "pc",
    "shoes": "shoe",
    "horseshoes": "horseshoe",
    "toes": "toe",
    "canoes": "canoe",
    "hoes": "hoe",
    "quiches": "quiche",
    "caches": "cache",
    "axes": "axe",
    "calves": "calf",
    "halves": "half",
    "shelves": "shelf",
    "bookshelves": "bookshelf",
    "loaves": "loaf",
    "leaves": "leaf",
    "wolves": "wolf",
    "scarves": "scarf",
    "elves": "elf",
    "thieves": "thief",
    "knives": "knife",
    "pocketknives": "pocketknife",
    "penknives": "penknife",
    "wives": "wife",
    "housewives": "housewife",
    "midwives": "midwife",
    "lives": "life",
}

# Nouns in -ie, whose plural looks like that of a noun in -y.
_ENDS_IN_IE = frozenset(
    f"{stem}ie"
    for stem in (
        *("t", "neckt", "bowt", "p", "d", "l", "cook", "brown", "smooth", "vegg", "self", "hood"),
        *(
            "hoag",
            "mov",
            "zomb",
            "bird",
            "dogg",
            "budg",
            "coll",
            "rook",
            "hipp",
            "gen",
            "magp",
            "goal",
        ),
    )
)
_NOT_PLURAL_OF_MAN = frozenset(["omen", "specimen", "abdomen", "stamen", "ramen", "regimen"])


def tokenize(text: str) -> list[str]:
    """Lower-case words, hyphenated ones whole, and punctuation marks one by one.

    The marks stay so that words on both sides of one do not become neighbours.
    """
    return _TOKEN.findall(text.lower())


def singular(word: str) -> str:
    """The singular of a lower-case noun, each part of a hyphenated one apart."""
    return "-".join(_singular(part) for part in word.split("-"))


def _singular(word: str) -> str:
    if word in _IRREGULAR:
        return _IRREGULAR[word]
    if word.endswith("men") and len(word) > 2 and word not in _NOT_PLURAL_OF_MAN:
        return word[:-2] + "an"
    if len(word) <= 3 or not word.endswith("s") or word.endswith(("ss", "us", "is")):
        return word
    if word.endswith("ies"):
        return word[:-1] if word[:-1] in _ENDS_IN_IE else word[:-3] + "y"
    if word.endswith(("sses", "ches", "shes", "xes", "oes")):
        return word[:-2]
    return word[:-1]
