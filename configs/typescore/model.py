"""TypeScore of a model of zoo's that draws images of captions, by RapidOCR: a metric for `zoo eval`, and for the evals of a run.

    zoo eval RUN configs/typescore/model.py options.guidance=2.5 scorer.limit=32

In a config: `evals=(Prompted(TypeScore(limit=32), options={"guidance": 2.5}, every=10_000),)`, as `starflow/t2i_256:typescore` has it.
"""

from zoo.metrics.prompted import Prompted
from zoo.papers.typescore import TypeScore

config = Prompted(TypeScore())
