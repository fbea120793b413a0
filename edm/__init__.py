"""EDM, after "Elucidating the Design Space of Diffusion-Based Generative Models" (Karras et al., 2022)."""
