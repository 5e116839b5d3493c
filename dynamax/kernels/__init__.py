"""Recurrences over positions: causal convolution, Mamba-1's and Mamba-2's scans. They know tensors alone.

Each continues from a live state, over any number of positions, and leaves the state behind the last. On a
CPU, and in float64, plain PyTorch does the work; on a GPU the kernels of ``mamba_ssm`` and ``causal_conv1d``
do where they are installed. ``backend`` tells which.
"""
