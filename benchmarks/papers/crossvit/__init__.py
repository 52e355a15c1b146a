"""CrossViT on the op beside timm's: the fusion stage, whole models, and small trainings."""
