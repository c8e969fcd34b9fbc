"""TypeScore results of several models: ranking, paired differences, win rates, and how many pairs are told apart.

zoo eval configs/typescore/compare.py results=a-typescore,b-typescore out=FOLDER
"""

from zoo.papers.typescore.compare import Compare

config = Compare()
