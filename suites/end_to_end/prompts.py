"""The fixed prompts: a record of all eight compares with any other record of all eight.

They speak the caption language of the shipped flux-shapes model (a test checks it) and cover one to three
things, every relation, a place, sizes and backgrounds; a full-size model understands them too. Those with
more to draw come first: fidelity suffers there first, so a policy search ends a poor trial after one picture.
"""

from __future__ import annotations

PROMPTS = (
    "a purple star to the left of a cyan square to the left of a red circle",
    "a red triangle above a yellow circle above a blue ring",
    "a green triangle to the left of an orange star on a black background",
    "a small yellow ring below a large purple cross",
    "a large cyan star on a soft pink background",
    "a red circle above a blue square",
    "a small orange cross at the top on a soft blue background",
    "a pink square right of a small green circle on a white background",
)
