"""WVD: World-consistent video diffusion with explicit 3D modeling (arXiv:2412.01821)."""

from zoo.papers.wvd.task import Mixture, Wvd, WvdSampling

__all__ = ["Mixture", "Wvd", "WvdSampling"]
