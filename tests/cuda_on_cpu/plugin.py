"""Pytest plugin: in this process the native kernels are those of the CUDA sources, compiled for the CPU."""

import os

import torch

from fastewc import _extension
from fastewc.ops.sum_grad_power import native

torch.ops.load_library(os.environ["FASTEWC_CUDA_ON_CPU"])
_extension.load = lambda device_type="cpu": None
native._SCALES = ()  # as on a GPU
native._has_matrix_unit = lambda: True  # so that one position does not go to the BLAS
