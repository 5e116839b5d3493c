"""``dynamax split MODEL``: a model in two folders, one for an edge device and one for a cloud."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from dynamax.backbones.sources import FolderSource
from dynamax.commands.parsing import Parser, prepare
from dynamax.engine import find_source, load
from dynamax.errors import UserError
from dynamax.files import check_folder
from dynamax.heads.bank import Exit
from dynamax.paths import InputPath
from dynamax.serving.split import places
from dynamax.serving.split import split as write_folders


def main(arguments: Sequence[str]) -> None:
    """Parse, split, say what is where."""
    prepare()
    parser = Parser(prog="dynamax split", description="Write a model in two folders, for an edge and a cloud.")
    parser.add_argument("-c", "--config", action="config", help="Options from a YAML file.")
    parser.add_argument("model", type=str, help="Which model, as dynamax.load takes it; a folder of heads brings both.")
    parser.add_function_arguments(split, skip={"model"}, sub_configs=True)
    built = parser.instantiate(parser.read_arguments(list(arguments[1:]))).as_dict()
    built.pop("config")
    split(**built)


def split(
    model: str,
    *,
    heads: InputPath | None = None,
    exits: dict[int, Exit] | None = None,
    at: int | None = None,
    cloud_from: int | None = None,
    out: str = "runs/split",
) -> None:
    """Write both folders, and say what they hold.

    Args:
        model: Which model, as dynamax.load takes it; a folder of heads brings its model.
        heads: Folder of heads for the model.
        exits: Untrained exits in place of heads, such as '{2: {}, 4: {}}'.
        at: Depth of the edge's last exit, in blocks; the edge has the blocks below. Left out, the last exit's below
            the top.
        cloud_from: Depth at which the edge sends hidden states up, that of an exit; the cloud has the blocks above.
            Left out, the same as at. A lower one lets states travel while the edge goes on; blocks between are on both
            sides.
        out: Folder to make, with edge and cloud in it.
    """
    check_folder(out, "What is split", "--out")
    source, own = find_source(model)
    if not isinstance(source, FolderSource):
        raise UserError(
            f"{model} is no model in a folder of its own but a {type(source).__name__}. Save it with save_pretrained, "
            f"and split that folder."
        )
    given = None if heads is None else str(heads)
    engine = load(source, heads=given or (own if exits is None else None), exits=exits, device="cpu")
    if engine.exits is None:
        raise UserError(f"{model} was given without exits. Give --heads FOLDER, or --exits '{{DEPTH: {{}}}}'.")
    cut = places(engine.exits, engine.backbone.spec.depth, at, cloud_from)
    for folder, span in zip(
        write_folders(source.folder(), engine.exits, cut, Path(out)), (cut.edge, cut.cloud), strict=True
    ):
        print(f"Wrote blocks {span.start} to {span.stop} to {folder}, {_megabytes(folder):.0f} MB")
    if left := [depth for depth in engine.exits.depths if depth > cut.edge.stop]:
        print(f"Left out: the exits at {', '.join(map(str, left))}, which the edge does not reach")
    print(f"Next: dynamax serve cloud --part {out}/cloud --address HOST:PORT")
    print(
        f"and, on the device: dynamax generate '...' --edge.folder {out}/edge --edge.cloud HOST:PORT "
        f"--policy MaxProb --threshold 0.8"
    )


def _megabytes(folder: Path) -> float:
    return sum(file.stat().st_size for file in folder.rglob("*.safetensors")) / 1e6
