"""What JointDiT adds to the backbone: LoRA on the depth modality and the joint connection."""
