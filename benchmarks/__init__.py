"""The project's own benchmarks of the installed fused_conv_bn: ``python -m benchmarks``."""
