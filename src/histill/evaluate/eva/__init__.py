"""The EVA protocol (kaiko eva 0.4.5): probes on patches, attention MIL on slides, segmentation on patch tokens."""
