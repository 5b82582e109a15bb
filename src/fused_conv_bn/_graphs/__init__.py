"""What :mod:`fused_conv_bn.graphs` is made of."""
