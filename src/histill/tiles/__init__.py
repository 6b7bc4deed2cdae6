"""The training set: where tiles come from and in which order."""
