"""PLISM: how little an encoder's features change with the scanner and the staining.

``layout`` reads the data set and its feature folders, ``engine`` compares two slides exactly, ``fp16`` as the original
does, ``groups`` makes medians, score and intervals, and ``run`` does it all, pair by pair.
"""
