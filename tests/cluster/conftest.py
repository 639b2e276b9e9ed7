"""The cluster that several files of tests share, and where the rest of their tools are."""
import pathlib
import sys

import pytest
from running import Cluster

sys.path.append(str(pathlib.Path(__file__).parents[1] / "envoy"))


@pytest.fixture(scope="session")
def mesh():
    """A node, and Istio's control plane."""
    cluster = Cluster("mesh")
    cluster.up("istio")
    yield cluster
    cluster.down()
