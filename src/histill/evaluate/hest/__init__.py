"""The HEST benchmark: gene expression from patches by a linear model (Jaume et al. 2024, arXiv 2406.16192)."""

from histill.evaluate.hest.regression import exact_ridge_pearson, ridge_pearson

__all__ = ["exact_ridge_pearson", "ridge_pearson"]
