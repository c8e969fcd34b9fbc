"""WVD: World-consistent video diffusion with explicit 3D modeling (arXiv:2412.01821)."""
