"""Checkpoints: tensors read one at a time, messages about damaged files, and the identity that heads are bound to.

The fingerprint covers what a checkpoint *is*, not how it is run. Of every tensor: its name, its shape and 4096 values,
64 evenly spaced runs of 64, rounded to bfloat16. Of the configuration: every entry, except those that are known to have
no effect on results; an entry that nobody thought of is therefore covered. One checkpoint has one fingerprint, whether
it runs in float64, float32 or bfloat16, on whatever device. (A cast to float16 rounds on its own terms, and
transformers may rename tensors as it loads them: whoever loads from files hashes the files.)

Whether the output matrix is the embedding is decided by the tensors, not by the configuration, as transformers does: a
matrix that repeats the embedding is left out, as files may leave it out; any other counts.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, final

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import GenerationConfig, PretrainedConfig
from transformers.utils import logging

from dynamax.backbones.families import family
from dynamax.errors import UserError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
KINDS = {type(None): "null", bool: "a truth value", int: "a number", float: "a number", str: "a text", list: "a list"}
"""What JSON may hold in place of an object."""


@final
class Checkpoint(Mapping[str, Tensor]):
    """Tensors by the names they have on disk; only what is asked for is read.

    Which files count is transformers' rule: the single file if there is one, else all tensors of all files that the
    index names; of two tensors of one name, that of the later file.

    Args:
        folder: A folder in transformers' layout.

    Raises:
        UserError: If it has no safetensors, a file that its index names is missing, or there is an adapter.
    """

    def __init__(self, folder: Path) -> None:
        if (folder / "adapter_config.json").is_file():
            raise UserError(
                f"{folder} holds an adapter (adapter_config.json), which is not applied here. Merge it into the model "
                f"with PEFT's merge_and_unload, and save that with save_pretrained."
            )
        if (folder / SINGLE).is_file():
            files = [SINGLE]
        elif (folder / INDEX).is_file():
            files = sorted(set(json.loads((folder / INDEX).read_text())["weight_map"].values()))
        else:
            raise UserError(
                f"{folder} has neither {SINGLE} nor {INDEX}. Give a folder with safetensors; older weights become "
                f"some when transformers loads them and save_pretrained writes them again."
            )
        self._files: dict[str, Any] = {}  # the open file of each tensor
        for file in files:
            if not (folder / file).is_file():
                raise UserError(f"{folder / file} is missing, but the index names it. Fetch the folder again.")
            opened: Any = safe_open(folder / file, framework="pt")
            self._files |= dict.fromkeys(opened.keys(), opened)

    def __getitem__(self, name: str) -> Tensor:
        return self._files[name].get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)

    def slices(self) -> dict[str, Any]:
        """All tensors, unread, as transformers takes them: ``slices()[name][...]`` reads one."""
        return {name: file.get_slice(name) for name, file in self._files.items()}


@contextmanager
def reading(folder: Path, *patterns: str) -> Iterator[None]:
    """Around libraries that read files of a folder: whatever they raise becomes a message about the damaged file.

    transformers' own reports are silenced: what matters of them is in the message.

    Args:
        folder: The folder.
        patterns: Names of the files that are read, as ``Path.glob`` takes them.

    Raises:
        UserError: Naming the file, what is wrong with it, and the remedy.
    """
    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        check_are_files(folder, patterns)
        yield
    except (UserError, MemoryError, torch.OutOfMemoryError):
        raise
    except ImportError as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"{folder} needs a package that is not installed: {reason:.300} Install it.") from error
    except Exception as error:
        fault = fault_in(folder, patterns)
        if fault is None:
            files = [path.name for pattern in patterns for path in sorted(folder.glob(pattern))]
            reason = re.sub(r"<class '([\w.]+)'>", r"\1", str(error).strip() or type(error).__name__).splitlines()[0]
            fault = f"{folder} cannot be read ({', '.join(files[:4]) or patterns[0]}): {reason:.300}"
        raise UserError(f"{fault.rstrip('.')}. Fetch the file again, or write the folder anew.") from error
    finally:
        logging.set_verbosity(level)


def check_are_files(folder: Path, patterns: Collection[str]) -> None:
    """Refuse (UserError) what has a file's name and is none: libraries take it for a file that is left out."""
    for path in sorted(folder.iterdir()):
        if path.suffix and any(fnmatch(path.name, pattern) for pattern in patterns) and not path.is_file():
            what = "a link to nowhere" if path.is_symlink() and not path.exists() else "no file"
            raise UserError(f"{path} is {what}. Fetch the file again, or remove it.")


def fault_in(folder: Path, patterns: Collection[str]) -> str | None:
    """What is wrong with the first damaged file of a folder, of those that ``patterns`` match; None if none is."""
    for path in [path for pattern in patterns for path in sorted(folder.glob(pattern)) if path.is_file()]:
        with path.open("rb") as file:
            head = file.read(64)
        if not head:
            return f"{path} is empty"
        if head.startswith(b"version https://git-lfs"):
            return f"{path} is a pointer of Git LFS, not the file itself; run `git lfs pull` where it was cloned"
        try:
            if path.suffix == ".safetensors":
                safe_open(path, framework="pt")
            elif path.suffix == ".json":
                content = json.loads(path.read_bytes())
                if not isinstance(content, dict):
                    return f"{path} holds {KINDS[type(content)]}; an object of names and values is wanted"
                if path.name == "config.json" and not isinstance(content.get("model_type"), str):
                    return f"{path} names no model_type, so it is no model's configuration"
        except SafetensorError as error:
            return f"{path} is damaged or was not fetched to its end ({error})"
        except RecursionError:
            return f"{path} has lists or mappings that lie too deep in one another"
        except ValueError as error:
            return f"{path} is not valid JSON ({error})"
    return None


# -- identity ----------------------------------------------------------------------------------------------

RUNS = 64
RUN = 64

NO_EFFECT = frozenset(
    (
        *("architectures", "auto_map", "transformers_version", "problem_type", "id2label", "label2id"),  # names
        *("dtype", "torch_dtype", "mamba_ssm_cache_dtype"),  # the type to compute in is chosen when loading
        "tie_word_embeddings",  # the tensors decide
        *("return_dict", "output_router_logits", "num_logits_to_keep"),  # what a call returns
        *("chunk_size", "mamba_chunk_size", "chunk_size_feed_forward", "pretraining_tp"),  # how a product is cut
        *("use_mamba_kernels", "use_mambapy", "use_associative_scan", "use_mem_eff_path"),  # by which code
        *("router_aux_loss_coef", "router_jitter_noise", "z_loss_coefficient"),  # training
        *("rescale_prenorm_residual", "time_step_init_scheme"),  # how weights begin
        *GenerationConfig().to_dict(),  # sampling, token ids, use_cache: no part of the model
    )
)
NO_EFFECT_PATTERN = re.compile(r"^_|^initializer_|^summary_|dropout|_pdrop$|_token_id$")
"""Entries of a configuration that change no logits: bookkeeping, initialisation, dropout (models are in eval mode),
classification heads, ids of special tokens (embeddings of padding are weights like others)."""


def fingerprint_of(config: PretrainedConfig, tensors: Mapping[str, Tensor]) -> str:
    """16 hexadecimal digits over a configuration and its weights by name: a state dict, or a ``Checkpoint``."""
    digest = hashlib.sha256(json.dumps(facts(config), sort_keys=True).encode())
    row = family(config.model_type)
    ending = re.compile(rf"(^|\.){row.embedding}\.weight$")
    embedding = next((sampled(tensors[name]) for name in sorted(tensors) if ending.search(name)), None)
    for name in sorted(tensors):
        values = sampled(tensors[name])
        inside = re.search(rf"(^|\.){row.blocks}\.\d+\.", name) or ending.search(name)
        if inside or values != embedding:
            digest.update(name.encode() + values)
    return digest.hexdigest()[:16]


def facts(config: PretrainedConfig) -> dict[str, str]:
    """The entries of a configuration that may change results, as JSON, where they differ from its class's defaults.

    So a later version of transformers that adds an entry, whose default does what was done before, changes no
    fingerprint.
    """
    try:
        defaults: dict[str, Any] = type(config)().to_dict()
    except TypeError:  # a class that cannot be made without arguments has no defaults: all entries count
        defaults = {}
    known: dict[str, Any] = config.to_dict()
    rope = known.get("rope_parameters") or {}
    kinds = {entry.get("rope_type", "default") for entry in (rope, *rope.values()) if isinstance(entry, dict)}
    plain_rotary = kinds <= {"default"}  # other angles may depend on the longest position
    found = {"model_type": json.dumps(config.model_type)}
    for name, value in known.items():
        if name in NO_EFFECT or NO_EFFECT_PATTERN.search(name) or (name == "max_position_embeddings" and plain_rotary):
            continue
        given, default = (json.dumps(each, sort_keys=True, default=str) for each in (value, defaults.get(name)))
        if given != default:
            found[name] = given
    return found


def sampled(tensor: Tensor) -> bytes:
    """Shape, and up to 4096 values in bfloat16; runs, so that few pages of a file are read."""
    flat = tensor.detach().flatten()
    if flat.numel() > RUNS * RUN:
        starts = torch.linspace(0, flat.numel() - RUN, RUNS, dtype=torch.float64, device=flat.device).long()
        flat = flat[(starts[:, None] + torch.arange(RUN, device=flat.device)).flatten()]
    return f"{list(tensor.shape)}".encode() + flat.to(torch.bfloat16).view(torch.int16).cpu().numpy().tobytes()
