"""JointDiT: joint RGB-and-depth diffusion transformer."""
