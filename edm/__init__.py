"""The paper "Elucidating the Design Space of Diffusion-Based Generative Models" (Karras et al., 2022, arXiv 2206.00364)."""
