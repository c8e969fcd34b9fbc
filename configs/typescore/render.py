"""Pictures of a list of instructions with known faults, drawn by zoo's own renderer: something to try TypeScore on.

zoo eval configs/typescore/render.py out=good
zoo eval configs/typescore/render.py out=worse corruption.p_char=0.1 style_skill=0.5 seed=1
"""

from zoo.papers.typescore.render import Render

config = Render()
