"""Rotations change nothing but what is quantised: folding, merging, attaching and their gradients, in fp64."""

import pytest
import torch
import transformers
from tiny import SHAPES, write_model
from transformers import AutoModelForCausalLM

from dist_spin.model.architecture import Shape
from dist_spin.model.learning import LearningModel, parameter_source
from dist_spin.model.loading import open_model
from dist_spin.model.rotation import Rotations, Sites, folded_rows, initial
from dist_spin.numerics.hadamard import kronecker_factors
from dist_spin.numerics.quantizer import QuantSpec


def test_placeholder_import():
    assert transformers.__version__
