"""flux-shapes: a small FLUX model that draws captioned scenes of coloured shapes, and how it is made.

The scenes are drawn procedurally (`scenes`, `drawing`), so captions, pictures and the test of whether a
picture follows its caption (`checker`) all come from one description. `train` makes the model, `assemble`
installs it.
"""
