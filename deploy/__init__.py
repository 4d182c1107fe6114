"""What ships a trained model: one fused operator, ONNX and other files, latency, predictions."""

from utils import torchvision_ops

torchvision_ops.ensure_loadable()
