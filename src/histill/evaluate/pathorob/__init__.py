"""PathoROB: is an embedding ordered by biology or by the hospital (Koemen et al. 2025, arXiv 2507.17845)."""

from histill.evaluate.pathorob.drop import average_performance_drop
from histill.evaluate.pathorob.index import robustness_index

__all__ = ["average_performance_drop", "robustness_index"]
