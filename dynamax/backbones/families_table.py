"""The family table for readers, as Markdown: ``python -m dynamax.backbones.families_table > docs/families.md``."""

from __future__ import annotations

from typing import Any

from dynamax.backbones import attention_functions as attention
from dynamax.backbones.families import FAMILIES, REFUSED
from dynamax.backbones.family_spec import FamilySpec

EXAMPLES = {
    "apertus": "Apertus 8B, 70B",
    "arcee": "AFM-4.5B",
    "bamba": "Bamba-9B",
    "bloom": "BLOOM, BLOOMZ",
    "cohere": "Command R, Aya 23",
    "cohere2": "Command R7B, Command A",
    "deepseek_v2": "DeepSeek-V2, V2-Lite, Coder-V2",
    "deepseek_v3": "DeepSeek-V3, R1, Moonlight",
    "exaone4": "EXAONE 4.0",
    "falcon": "Falcon 7B, 40B, 180B, Falcon 2",
    "falcon_h1": "Falcon-H1",
    "falcon_mamba": "Falcon-Mamba-7B",
    "gemma": "Gemma 2B, 7B, CodeGemma",
    "gemma2": "Gemma 2",
    "gemma3_text": "Gemma 3 270M, 1B",
    "glm": "GLM-4-9B, GLM-Edge",
    "glm4": "GLM-4-0414, GLM-Z1",
    "gpt2": "GPT-2, DistilGPT-2",
    "gpt_bigcode": "StarCoder, SantaCoder",
    "gpt_neox": "Pythia, GPT-NeoX-20B",
    "gpt_oss": "gpt-oss-20b, 120b",
    "gptj": "GPT-J-6B",
    "granite": "Granite 3",
    "granitemoe": "Granite 3 1B-A400M, 3B-A800M",
    "granitemoehybrid": "Granite 4",
    "helium": "Helium-1",
    "jamba": "Jamba 1.5, Jamba Reasoning",
    "lfm2": "LFM2 350M to 2.6B",
    "lfm2_moe": "LFM2-8B-A1B",
    "llama": "Llama 1 to 3, SmolLM2, TinyLlama, Yi",
    "mamba": "Mamba 130M to 2.8B",
    "mamba2": "Mamba-2, Mamba-Codestral",
    "ministral": "Ministral-8B-2410",
    "ministral3": "Ministral 3",
    "mistral": "Mistral 7B, Nemo, Small",
    "mixtral": "Mixtral 8x7B, 8x22B",
    "nanochat": "nanochat",
    "nemotron": "Nemotron-4, Minitron",
    "nemotron_h": "Nemotron-H, Nemotron Nano 2",
    "olmo": "OLMo 1B, 7B",
    "olmo2": "OLMo 2",
    "olmo3": "OLMo 3",
    "olmoe": "OLMoE-1B-7B",
    "opt": "OPT 125M to 66B, without 350M",
    "phi": "Phi-1, 1.5, 2",
    "phi3": "Phi-3, Phi-3.5-mini, Phi-4",
    "qwen2": "Qwen2, Qwen2.5, QwQ",
    "qwen2_moe": "Qwen1.5-MoE-A2.7B, Qwen2-57B-A14B",
    "qwen3": "Qwen3 0.6B to 32B",
    "qwen3_moe": "Qwen3-30B-A3B, 235B-A22B",
    "qwen3_next": "Qwen3-Next-80B-A3B",
    "seed_oss": "Seed-OSS-36B",
    "smollm3": "SmolLM3-3B",
    "stablelm": "StableLM 2, StableLM 3B",
    "starcoder2": "StarCoder2",
    "zamba2": "Zamba2",
}
"""Models by name, for each type."""

FIELDS = {
    "windows": "sliding windows",
    "expert_share": "experts",
    "rotary_types": "rotary angles by type of block",
    "slopes": "ALiBi",
    "scale_logits": "logits scaled or capped",
    "after_embedding": "embeddings changed before block 0",
    "refuse": "models of another layout are refused",
}
"""What a field says that is not Llama's."""

TURNS: dict[Any, str] = {
    attention.turned_in_part: "rotary in part",
    attention.turned_in_pairs: "rotary in part, by neighbouring channels",
    attention.turned_where_used: "blocks without positions",
}


def kind(row: FamilySpec) -> str:
    """Transformer, recurrent, or both."""
    plain: Any = FamilySpec()
    if row.mixer is plain.mixer:
        return "Transformer"
    return "recurrent" if row.cache_argument == "cache_params" else "both"


def special(row: FamilySpec) -> str:
    """What is not as in Llama."""
    plain = FamilySpec()
    told = [text for name, text in FIELDS.items() if getattr(row, name) is not getattr(plain, name)]
    if row.turned == "values":
        told.append("latent keys and values")
    if row.turn in TURNS:
        told.append(TURNS[row.turn])
    return ", ".join(told) or "-"


def table() -> str:
    """The page."""
    rows = [f"| `{name}` | {kind(row)} | {special(row)} | {EXAMPLES[name]} |" for name, row in sorted(FAMILIES.items())]
    refused = [f"| `{name}` | {reason} |" for name, reason in sorted(REFUSED.items())]
    lines = [
        "# Model families",
        "",
        "Written by `python -m dynamax.backbones.families_table`; a test compares it with the code.",
        "",
        f"{len(FAMILIES)} model types of transformers can be run block by block. Of each, tiny random models keep the",
        "laws of `tests/laws` in float64, against transformers' own forward; whatever is loaded is first compared with",
        "transformers' own logits. Another type is a row of your own (`CONTRIBUTING.md`, *Where things go*).",
        "",
        "| model type | kind | special, beside Llama's ways | models |",
        "|---|---|---|---|",
        *rows,
        "",
        "## Refused",
        "",
        "These cannot be driven yet, and an error says so.",
        "",
        "| model type | why |",
        "|---|---|",
        *refused,
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(table(), end="")
