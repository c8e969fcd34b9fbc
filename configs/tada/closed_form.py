"""Solvers of diffusion side by side on a Gaussian with the spectrum of images, whose denoiser is exact: no training, seconds.

    zoo eval configs/tada/closed_form.py
    zoo eval configs/tada/closed_form.py:rough out=rough      # another spectrum, 1 / f of 8x8 pixels

Each solver stands on its best grid of noise levels. On a Gaussian all is linear, so the distances are exact, and say
nothing of what happens where a network errs.
"""

from dataclasses import replace

from zoo.papers.tada import Solvers

config = Solvers()
rough = replace(config, side=8, power=1.0, variance=0.5, out="solvers-rough")
