"""TCSM: Target Concrete Score Matching: A Holistic Framework for Discrete Diffusion (arXiv:2504.16431).

A denoiser of hidden tokens is matched to the conditionals of a target that only has to score clean texts: data, a language model,
a reward, people's choices. `targets` makes what it is matched to, `objectives` compares, `model` has the networks, `task` trains
and samples. MDLM (arXiv:2406.07524) and SEDD (arXiv:2310.16834) are settings of `Tcsm`.
The paper itself could not be read in full: its abstract says what it does, and equations here are derived and tested where
solutions are known. B texts, T tokens, V vocabulary, K candidates for a position, W width.
"""

from zoo.papers.tcsm.posttrain import TcsmDistill as TcsmDistill
from zoo.papers.tcsm.posttrain import TcsmPreference as TcsmPreference
from zoo.papers.tcsm.posttrain import TcsmReward as TcsmReward
from zoo.papers.tcsm.posttrain import TcsmRewardModel as TcsmRewardModel
from zoo.papers.tcsm.task import Tcsm as Tcsm
from zoo.papers.tcsm.task import TcsmRatio as TcsmRatio
from zoo.papers.tcsm.task import TcsmRatioSampling as TcsmRatioSampling
from zoo.papers.tcsm.task import TcsmSampling as TcsmSampling
