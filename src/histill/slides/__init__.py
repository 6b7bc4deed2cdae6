"""Open a slide, its scale, its tissue, its grid."""
