"""What an encoder is worth: agreement with a teacher, probes, scanner retrieval, retention.

Imports nothing by itself, so that a command loads only the measures that it uses.
"""
