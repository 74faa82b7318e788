"""What the reference run compares: by which methods, at which retention ratios."""

RETENTIONS = (0.5, 0.25, 0.1)
METHODS = (
    "FastV", "RandomPrune", "Oracle", "UniformPool", "FastVRerank", "LinearAnneal", "PyramidDrop", "SparseVLM", "VisionZip",
    "PruMerge", "DivPrune", "DART", "VisPruner", "CDPruner",
)  # fmt: skip
LATE_METHODS = ("FastV", "RandomPrune", "FastVRerank", "LinearAnneal", "PyramidDrop", "VisionZip", "UniformPool", "Oracle")
QUESTIONS = ("qa_reading", "qa_long_word", "qa_count", "qa_total", "qa_two_step")  # short answers that need details
LATE = ("look_late", "backwards")  # long answers whose details are needed at the end, or in a prescribed order


def scanned_layers(n_layers: int) -> list[int]:
    """First pruned layers that are compared in a decoder of so many layers."""
    return sorted({k for k in (1, 2, 3, 4, 6, 8, 11, 14, 18, 22) if k < 0.8 * n_layers})
