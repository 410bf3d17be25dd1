"""What tests of several modules share."""

import mlx.core as mx
import pytest

from mlx_xformer.backend import dispatch


@pytest.fixture(params=["built-in", "rational"])
def form(request, monkeypatch):
    """Both forms of the chains, whatever this machine would choose."""
    monkeypatch.setattr(dispatch, "vectorizes", lambda x: request.param == "rational" and x.dtype == mx.float32)
    return request.param
