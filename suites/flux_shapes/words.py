"""The caption language: its words, and the description of one scene that a caption stands for.

A caption names one to three things and may name a background::

    a small red circle at the top on a soft blue background
    a red circle above a blue square
    a green star to the left of an orange ring to the left of a large pink cross
"""

from __future__ import annotations

from dataclasses import dataclass

SHAPES = ("circle", "square", "triangle", "star", "ring", "cross")
COLOURS = {
    "red": (0.86, 0.15, 0.15),
    "green": (0.15, 0.62, 0.25),
    "blue": (0.15, 0.30, 0.85),
    "yellow": (0.97, 0.85, 0.15),
    "orange": (0.96, 0.52, 0.10),
    "purple": (0.52, 0.20, 0.70),
    "cyan": (0.20, 0.78, 0.85),
    "pink": (0.97, 0.55, 0.75),
}
"""Colours of things, sRGB in [0, 1], far enough apart to be told apart in a picture."""
UNNAMED_BACKGROUND = (0.85, 0.85, 0.85)
BACKGROUNDS = {**COLOURS, "white": (0.98, 0.98, 0.98), "black": (0.05, 0.05, 0.05), "gray": (0.5, 0.5, 0.5)}
"""Colours of a named background; without a name it is `UNNAMED_BACKGROUND`."""
SIZES = ("small", "medium", "large")
"""Sizes of a thing; medium goes unsaid."""
RELATIONS = ("above", "below", "left of", "right of")
PLACES = {"left": "on the left", "right": "on the right", "top": "at the top", "bottom": "at the bottom"}
"""Where a lone thing may be; in the center goes unsaid."""

FILLERS = (
    "a",
    "an",
    "to",
    "the",
    "of",
    "on",
    "at",
    "soft",
    "background",
    "above",
    "below",
    "left",
    "right",
    "top",
    "bottom",
)
WORDS = ("", *FILLERS, "small", "large", *SHAPES, *BACKGROUNDS)
"""Every caption word; index 0 means no word."""
WORD_INDEX = {word: index for index, word in enumerate(WORDS)}


def article(next_word: str) -> str:
    """The indefinite article in front of a word of this language."""
    return "an" if next_word == "orange" else "a"


@dataclass(frozen=True)
class Thing:
    """One thing in a scene: its size, colour and shape, as words."""

    size: str
    colour: str
    shape: str

    def caption(self) -> str:
        """The thing in words, with its article."""
        words = [self.colour, self.shape] if self.size == "medium" else [self.size, self.colour, self.shape]
        return " ".join([article(words[0]), *words])


@dataclass(frozen=True)
class Description:
    """What a caption says.

    Two or three `things` stand in one `relation`, each to the next; a lone thing may have a `place`.
    `background` None means unnamed; `soft` is a vertical gradient, lighter at the top.
    """

    things: tuple[Thing, ...]
    relation: str | None = None
    place: str | None = None
    background: str | None = None
    soft: bool = False
    to_the: bool = False

    def caption(self) -> str:
        """The caption that says this."""
        relation = self.relation or ""
        if self.to_the and relation.endswith("of"):
            relation = "to the " + relation
        text = f" {relation} ".join(thing.caption() for thing in self.things)
        if self.place:
            text += " " + PLACES[self.place]
        if self.background:
            words = ["soft", self.background] if self.soft else [self.background]
            text += " " + " ".join(["on", article(words[0]), *words, "background"])
        return text


def parse(caption: str) -> Description:
    """The description that a caption stands for; the inverse of `Description.caption`.

    Raises ValueError naming the caption when it is outside this language.
    """
    words = caption.split()
    background, soft = None, False
    if words and words[-1] == "background":
        start = len(words) - 1 - words[::-1].index("on")
        soft = "soft" in words[start:]
        background = words[-2]
        words = words[:start]
    things: list[Thing] = []
    size, colour = "medium", ""
    rest: list[str] = []
    for word in words:
        if word in SIZES:
            size = word
        elif word in COLOURS:
            colour = word
        elif word in SHAPES:
            things.append(Thing(size, colour, word))
            size, colour = "medium", ""
        else:
            rest.append(word)
    relation = next((r for r in RELATIONS if r.split()[0] in rest), None) if len(things) > 1 else None
    place = next((p for p in PLACES if p in rest), None) if len(things) == 1 else None
    found = Description(tuple(things), relation, place, background, soft, "to" in rest)
    if not things or found.caption() != caption:
        raise ValueError(
            f"caption: expected the flux-shapes language, e.g. 'a red circle above a blue square', "
            f"got {caption!r}"
        )
    return found
