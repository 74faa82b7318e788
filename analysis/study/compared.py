"""What the reference run compares: by which methods, at which retention ratios."""

RETENTIONS = (0.5, 0.25, 0.1)
METHODS = (
    "FastV", "RandomPrune", "Oracle", "UniformPool", "FastVRerank", "LinearAnneal", "PyramidDrop", "SparseVLM", "VisionZip",
    "PruMerge", "DivPrune", "DART", "VisPruner", "CDPruner",
)  # fmt: skip
