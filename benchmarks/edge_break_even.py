"""When a split pays: seconds an answer foretold from round trip, bandwidth and block times, beside the measured ones.

    python -m benchmarks.edge_break_even [FILE]

Reads what ``benchmarks.edge_cloud`` wrote. An answer of T tokens, of which the cloud is asked for A, takes

    collaborative   edge + cloud + A (rtt + call) + 8 bytes / rate
    cloud only      all blocks + rtt

where ``edge`` and ``cloud`` are the seconds of their blocks, ``bytes`` what goes up, and ``call`` what a request costs
beside the round trip. Blocks and ``call`` are taken from the fastest network that was measured; all others are
foretold. Both take equally long where the cloud is asked for the share

    (all blocks - edge) / (T (rtt + call + cloud / A))

of the tokens: below it the split is faster. A share of 0 or less: the edge's blocks alone take longer.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

FILE = Path("benchmarks/results/edge-cloud.json")

Row = dict[str, float]


class Network(NamedTuple):
    """A network that was measured.

    Attributes:
        rtt: Seconds there and back.
        rate: Bits a second.
    """

    rtt: float
    rate: float


def network(name: str) -> Network:
    """What ``20 ms, 100 Mbit/s`` says."""
    rtt, mbit = re.findall(r"[\d.]+", name)
    return Network(float(rtt) / 1000, 1e6 * float(mbit))


def call_seconds(row: Row, net: Network) -> float:
    """What a request costs beside round trip and bytes."""
    asks = row["asked"] * row["tokens"]
    return (row["communication"] - bits(row) / net.rate) / asks - net.rtt


def bits(row: Row) -> float:
    """What goes up with an answer."""
    return 8 * row["bytes a token"] * row["tokens"]


def foretold(row: Row, net: Network, call: float) -> float:
    """Seconds an answer on a network, from a row of another."""
    return row["edge"] + row["cloud"] + row["asked"] * row["tokens"] * (net.rtt + call) + bits(row) / net.rate


def break_even(row: Row, alone: float, net: Network, call: float) -> float:
    """The share asked for at which the split takes as long as the cloud alone, whose blocks take ``alone`` seconds."""
    each = row["cloud"] / (row["asked"] * row["tokens"])
    return (alone - row["edge"]) / (row["tokens"] * (net.rtt + call + each))


def lines(networks: dict[str, dict[str, Row]]) -> Iterator[str]:
    """A line for each way and network: foretold and measured seconds, the cloud alone, the shares."""
    fastest = min(networks, key=lambda name: (network(name).rtt, -network(name).rate))
    alone = networks[fastest]["cloud only"]["seconds"] - network(fastest).rtt
    for way, row in networks[fastest].items():
        if not row.get("communication"):
            continue
        call = call_seconds(row, network(fastest))
        for name, rows in networks.items():
            net, measured = network(name), rows[way]["seconds"]
            said = foretold(row, net, call)
            shares = f"{row['asked']:>7.0%} {break_even(row, alone, net, call):>11.0%}"
            cells = f"{said:>9.2f} {measured:>9.2f} {said / measured - 1:>+7.0%}"
            yield f"  {way:28}{name:20}{cells} {alone + net.rtt:>11.2f} {rows['cloud only']['seconds']:>9.2f} {shares}"


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, nargs="?", default=FILE)
    found: dict[str, Any] = json.loads(parser.parse_args().file.read_text())["models"]
    names = (("foretold", 9), ("measured", 9), ("off", 7), ("cloud only", 11), ("measured", 9), ("asked", 7))
    head = " ".join(f"{name:>{width}}" for name, width in (*names, ("break-even", 11)))
    for name, model in found.items():
        print(f"{name}\n  {'':48}{head}")
        print("\n".join(lines(model["networks"])))


if __name__ == "__main__":
    main()
