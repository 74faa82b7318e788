"""What the reference run compares: by which methods, at which retention ratios."""

RETENTIONS = (0.5, 0.25, 0.1)
METHODS = (
    "FastV", "RandomPrune", "Oracle", "UniformPool", "FastVRerank", "LinearAnneal", "PyramidDrop", "SparseVLM", "VisionZip",
    "PruMerge", "DivPrune", "DART", "VisPruner", "CDPruner",
)  # fmt: skip


def scanned_layers(n_layers: int) -> list[int]:
    """First pruned layers that are compared in a decoder of so many layers."""
    return sorted({k for k in (1, 2, 3, 4, 6, 8, 11, 14, 18, 22) if k < 0.8 * n_layers})
