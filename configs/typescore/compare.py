"""TypeScore results of several models: ranking, paired differences, win rates, and how many pairs are told apart.

zoo eval configs/typescore/compare.py results=a-typescore,b-typescore out=FOLDER
    human=FILE.csv           agreement with people; then one result is enough
    truth=a,b                the models, best first, where that is known
    other=FILE.csv           another metric's scores, to compare what it tells apart
"""

from zoo.papers.typescore.compare import Compare

config = Compare()
