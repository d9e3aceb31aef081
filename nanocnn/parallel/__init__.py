"""Several processes, one training: ranks by MPI, gradients averaged in buckets while backward runs.

comm = connect()                                     # Alone, or the ranks that mpiexec started
averager = GradientAverager(optimizer.buckets, comm)
broadcast_parameters(optimizer.buckets, model.named_buffers(), comm)
...
averager.zero(); loss.backward(); averager.finish(); optimizer.step()
"""

from .agree import average_buffers, broadcast_parameters
from .average import GradientAverager
from .comm import Alone, Comm
from .connect import ConnectError, connect
from .mpi import MPI
from .stop import StopRequest

__all__ = [
    "MPI",
    "Alone",
    "Comm",
    "ConnectError",
    "GradientAverager",
    "StopRequest",
    "average_buffers",
    "broadcast_parameters",
    "connect",
]
