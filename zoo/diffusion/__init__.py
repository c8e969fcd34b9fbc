"""What papers on diffusion share: noise levels, preconditioning, guidance, solvers. It knows no paper and no network."""
