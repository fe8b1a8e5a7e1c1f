"""The words of the town, and which names and places are held out of training.

A name has two syllables, and a place is an adjective and a noun. A model thus sees every piece in
training, but never the held-out pairs. No letter pair at the seam of a name occurs inside a
syllable, so that a byte-level BPE splits every name at the seam, including names that it never saw.
"""

from typing import Literal

Split = Literal["train", "held_out"]


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


# Capital, vowel, consonant.
NAME_STARTS = _words("""
    Bas Ben Bos Cal Cor Cut Dal Den Dor Fal Fen Fis Gal Ges Gun Hal Hed Hom Jan Jen Jos Kat
    Kel Kor Lan Les Lud Mat Mil Mon Nal Ned Nor Pal Pen Pim Ral Ros Run Sal Sim Sud Tam Tel
    Tor Val Vin Wil Wes Yor Zan Zem
""")
# A vowel, then no vowel.
NAME_ENDS = _words("""
    a o an ald ast ek el eth ent erd ik in is ith isk olf ond or os ulf und ur yn ys
""")
ADJECTIVES = _words("""
    Amber Ancient Ashen Blue Brass Broad Broken Bronze Cedar Chalk Clay Cold Copper Coral
    Crooked Damp Dark Distant Drowned Dusty Empty Far Fern Flint Foggy Frozen Golden Grand
    Gray Green Hidden High Hollow Icy Iron Ivory Jade Lonely Long Lower Marble Mossy Narrow
    North Oaken Old Pale Pine Plain Quiet Red Rocky Rusty Salty Sandy Shady Silent Silver
    Small Smoky Snowy Steep Stone Stormy Sunny Tall Thorny Tiny Tin Upper Velvet Warm West
    White Wide Willow Windy Wooden Yellow Young
""")
NOUNS = _words("""
    Arch Bakery Barn Beach Bridge Cave Chapel Cliff Dairy Dock Farm Ferry Field Forge Fort
    Garden Gate Hall Harbor Hill Inn Library Market Meadow Mill Orchard Pier Pond School Shed
    Shop Stable Tower Tunnel Well Yard
""")
TIMES = ("dawn", "breakfast", "noon", "supper", "dusk", "midnight")
TRADES = _words("""
    baker carpenter clerk cook doctor farmer fisher gardener miller nurse painter potter
    sailor smith tailor teacher
""")
MOODS = _words("""
    angry brave calm cheerful curious glad hopeful hungry lucky proud sad shy sleepy tired
""")
OBJECTS = _words("""
    basket book boot bottle button candle clock coin comb crown cup drum flute hammer hat
    kettle key kite knife lamp letter map mirror needle pearl pipe ring rope scarf shell spoon
    whistle
""")
# Past tense, and the form that questions use.
VERBS = {"hid": "hide", "lost": "lose", "found": "find", "left": "leave"}


def in_split(start: int, end: int, split: Split) -> bool:
    """Whether a pair of numbered pieces belongs to a split. One pair in eight is held out."""
    return ((3 * start + 5 * end) % 8 == 0) == (split == "held_out")


def names(split: Split) -> tuple[str, ...]:
    """All names of a split."""
    return _pairs(NAME_STARTS, NAME_ENDS, "", split)


def places(split: Split) -> tuple[str, ...]:
    """All places of a split, without their article."""
    return _pairs(ADJECTIVES, NOUNS, " ", split)


def _pairs(
    starts: tuple[str, ...], ends: tuple[str, ...], seam: str, split: Split
) -> tuple[str, ...]:
    return tuple(
        start + seam + end
        for i, start in enumerate(starts)
        for j, end in enumerate(ends)
        if in_split(i, j, split)
    )
