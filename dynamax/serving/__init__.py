"""One model on two machines: an edge with the lower blocks and the exits, a cloud with the rest. Knows no trainer."""

import os

os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # what gRPC notes on stderr is in our messages
