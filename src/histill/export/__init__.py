"""Bundle -> ONNX, OpenVINO, int8, the hub; verified. And what a model costs to run: ``histill bench``."""
