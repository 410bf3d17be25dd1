"""The NumPy twin: every layer and model as plain functions of flat parameters, to check the MLX side against.

It runs in the dtype of its inputs: float64 gives the truth, float32 the tolerance. The parameters are one
flat dict of arrays under the names and in the layouts of the MLX modules.
"""
