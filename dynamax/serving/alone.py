"""What Ray must be told before it is imported: nothing is reported to anybody, and nobody outside joins in.

Unless the environment's ``RAY_ADDRESS`` names a cluster, Ray is started for this machine alone. Then it takes addresses
of this machine (a switch that it has for systems where such is the rule), and whoever calls it must show a token that
this process and its children alone know.
"""

from __future__ import annotations

import os
import secrets
import sys

ADDRESS = os.environ.get("RAY_ADDRESS") or "local"
"""Where Ray runs already; ``local`` if it is to be started here."""

_SWITCH = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
if ADDRESS == "local" and "ray" not in sys.modules:  # in a replica it is, and has read all this
    os.environ |= {_SWITCH: "0", "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}

TOLD = ADDRESS != "local" or os.environ.get(_SWITCH) == "0"
"""Whether Ray knows; not so if something else has imported it before."""
