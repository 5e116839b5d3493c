"""Kinds of cases: each makes a command line, and does harm to a folder first, by a seeded generator."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from random import Random

from tests.commands.conftest import EXIT, FIT, TEST, TRAINING
from tests.folders import model_folder
from tests.fuzz.junk import OBSTACLES, harmed, junk_at_a_line, mutated, text, value
from tests.fuzz.outcome import outcome

Case = Callable[[Random, Path], list[str]]
SHORT = ["--max_new_tokens=2"]
GENERATE = ["generate", "Hi", "--heads=heads", *SHORT]
UNTRAINED = ["--exits={2: {}}", "--policy=MaxProb", "--policy.threshold=0.5", *SHORT]
TASKS = {
    "rows.jsonl": '{"question": "Who?", "answer": "me", "id": 1}\n{"question": "What?", "answer": "it", "id": 2}\n',
    "rows.json": '[{"text": "one two three four"}, {"text": "five six seven"}]',
    "rows.csv": "text,other\none two three four,1\nfive six seven,2\n",
    "rows.txt": "one two three four\n\nfive six seven eight\n",
}


def make(place: Path) -> None:
    """A folder with a model, heads, a store, a report, both parts of a split model and files of all kinds."""
    (place / "parts").mkdir(parents=True)
    for name, seed in (("tiny", 0), ("other", 5)):
        model_folder(place / name, seed=seed)
    (place / "parts" / "backbone.yaml").write_text("class_path: Folder\ninit_args: {path: ../tiny}\n")
    (place / "parts" / "exit.yaml").write_text(EXIT)
    for name, content in {"fit": FIT.replace("LOGS", "logs"), "test": TEST, "training": TRAINING}.items():
        (place / f"{name}.yaml").write_text(content)
    (place / "sums.txt").write_text("\n".join(f"{n} and {n} make {2 * n} by adding." for n in range(100)))
    (place / "text.txt").write_text("\n\n".join(f"Line {n} is about {n * n}." for n in range(16)))
    (place / "afile").write_text("mine")
    for name, content in TASKS.items():
        (place / name).write_text(content)
    for line in (["fit", "-c", "fit.yaml"], ["test", "-c", "test.yaml"], ["split", "heads", "--out=parted"]):
        found = outcome(line)
        assert found.code == 0, found
    shutil.rmtree(place / "logs")


def prompt(rng: Random, place: Path) -> list[str]:
    """Any text is a prompt, and is printed as it was given."""
    said = text(rng) or "x"
    behind = said.startswith("-") or rng.random() < 0.3
    return ["generate", "--print_config", "--", said] if behind else ["generate", said, "--print_config"]


def answer(rng: Random, place: Path) -> list[str]:
    """Any text is answered."""
    return [*GENERATE[:1], *GENERATE[2:], "--", text(rng) or "x"]


def yaml(rng: Random, place: Path) -> list[str]:
    """A configuration that somebody edited in haste."""
    name = rng.choice(("fit", "test", "training", "parts/exit", "parts/backbone"))
    file = place / f"{name}.yaml"
    change = mutated if rng.random() < 0.6 else junk_at_a_line
    file.write_bytes(
        change(rng, file.read_text()).encode(rng.choice(("utf-8",) * 9 + ("utf-16", "latin-1")), "replace")
    )
    if name == "training":
        return ["train", "-c", "training.yaml", "--model=PretrainingModule", "--model.exits=[1]", "--print_config"]
    return ["test" if name == "test" else "fit", "-c", "test.yaml" if name == "test" else "fit.yaml"]


OPTIONS = {
    "generate": "policy policy.threshold policy.gate backbone heads exits decoder max_new_tokens do_sample temperature "
    "top_k top_p seed stop_strings chat dtype precision device promise edge edge.folder edge.mode threshold",
    "fit": "model model.backbone model.exits model.exits.2 model.exits.2.lens model.exits.2.gates model.phases "
    "model.phases.lenses model.phases.gates.objective model.phases.lenses.epochs model.phases.lenses.learning_rate "
    "model.alternate model.heads model.ridge model.weight_decay model.warmup data data.text data.text.path "
    "data.text.length data.folder data.validation data.k data.batch_size data.dtype data.compute trainer.max_steps "
    "trainer.gradient_clip_val trainer.accumulate_grad_batches trainer.val_check_interval trainer.callbacks "
    "trainer.logger trainer.limit_train_batches trainer.limit_val_batches trainer.precision trainer.devices "
    "trainer.accelerator trainer.strategy trainer.max_time trainer.check_val_every_n_epoch trainer.log_every_n_steps "
    "trainer.num_sanity_val_steps trainer.min_epochs trainer.overfit_batches seed_everything ckpt_path config",
    "test": "model.backbone model.policies model.heads model.exits model.decoder model.sampler model.chat model.dtype "
    "model.precision model.timed data.task data.task.limit data.task.offset data.task.max_new_tokens "
    "trainer.limit_test_batches trainer.precision trainer.callbacks seed_everything ckpt_path",
    "split": "heads exits at cloud_from out",
    "suitability": "text documents keep every share dtype precision out",
    "calibrate": "policy text text.path task epsilon delta method level chat share heads exits dtype out",
    "serve edge": "edge backbone heads exits policy decoder precision address waiting token_file certificate key",
    "serve cloud": "part address replicas precision sessions positions idle expire rate token_file certificate metrics",
    "import-heads": "backbone out",
}
BASES = {
    "generate": GENERATE,
    "fit": ["fit", "-c", "fit.yaml"],
    "test": ["test", "-c", "test.yaml"],
    "split": ["split", "tiny", "--exits={2: {}}", "--out=fresh"],
    "suitability": ["suitability", "tiny", "--text=LocalText", "--text.path=text.txt"],
    "calibrate": ["calibrate", "heads", "--policy=MaxProb", "--policy.threshold=0.5", "--epsilon=0.9"]
    + ["--text=LocalText", "--text.path=text.txt", "--text.length=24"],
    "serve edge": ["serve", "edge", "--backbone=tiny", "--address=256.1.1.1:1"],
    "serve cloud": ["serve", "cloud", "--part=tiny", "--log=false"],
    "import-heads": ["import-heads", "parts", "--backbone=tiny"],
}


def option(rng: Random, place: Path) -> list[str]:
    """A value that an option does not take, or takes."""
    command = rng.choice(sorted(OPTIONS))
    return [*BASES[command], f"--{rng.choice(OPTIONS[command].split())}={value(rng)}"]


def printed(rng: Random, place: Path) -> list[str]:
    """The same, and the configuration alone is wanted."""
    return [*option(rng, place), "--print_config"]


WORDS = "fit test generate serve edge cloud list heads info report split bench -c --config --help help all --debugg "
FIRST = "fit validate predict cache list info report split generate serve import-heads nope"
WORDS += "fit.yaml Hi --heads heads --policy MaxProb --exits {2: {}} --print_config --policy.help --nope -x --version"


def words(rng: Random, place: Path) -> list[str]:
    """Words of command lines in any order."""
    first = rng.choice(FIRST.split())
    found = [first, *(rng.choice(WORDS.split()) for _ in range(rng.randint(0, 5)))]
    return found if found[:2] not in (["serve", "edge"], ["serve", "cloud"]) else [*found, "--nope"]


def model(rng: Random, place: Path) -> list[str]:
    """A file of a model that is not as it was written."""
    harmed(rng, place / "tiny")
    return ["generate", "Hi", "--backbone=tiny", *UNTRAINED]


def setting(rng: Random, place: Path) -> list[str]:
    """An entry of a model's JSON files that has another value."""
    file = place / "tiny" / rng.choice(("config.json", "generation_config.json", "tokenizer_config.json"))
    content = json.loads(file.read_text())
    content[rng.choice(sorted(content))] = rng.choice((None, -1, 0, 1, 3, 1e30, "words", [], {}, True, [1, 2], "x.y"))
    file.write_text(json.dumps(content))
    return ["generate", "Hi", "--backbone=tiny", *UNTRAINED]


def heads(rng: Random, place: Path) -> list[str]:
    """Heads, a store or a part of a model that are not as they were written."""
    folder = rng.choice(("heads", "store", "parted/edge", "report"))
    harmed(rng, place / folder)
    return {
        "heads": rng.choice(
            (GENERATE, ["test", "-c", "test.yaml"], ["validate", "-c", "fit.yaml", "--model.heads=heads"])
        ),
        "store": ["fit", "-c", "fit.yaml"],
        "parted/edge": ["generate", "Hi", "--edge.folder=parted/edge", "--edge.mode=standalone", "--policy=MaxProb"]
        + ["--policy.threshold=0.5", *SHORT],
        "report": ["report", "report", "--out=page.html"],
    }[folder]


def texts(rng: Random, place: Path) -> list[str]:
    """Texts and tasks in files of any kind."""
    name = rng.choice((*sorted(TASKS), "text.txt"))
    kept = (place / name).read_text()
    if rng.random() < 0.5:
        (place / name).write_bytes(
            mutated(rng, kept).encode(rng.choice(("utf-8", "utf-8", "utf-16", "latin-1")), "replace")
        )
    else:
        (place / "only").mkdir()
        shutil.move(place / name, place / "only" / name)
        harmed(rng, place / "only")
        if (place / "only" / name).exists() or (place / "only" / name).is_symlink():
            shutil.move(place / "only" / name, place / name)
    if rng.random() < 0.4:
        task = rng.choice(("TriviaQA", "CoQA", "TruthfulQA", "TruthfulQAMC", "Perplexity"))
        return ["test", "-c", "test.yaml", f"--data.task={task}", f"--data.task.path={name}"]
    return ["cache", "-c", "fit.yaml", f"--data.text.path={name}"]


def obstacle(rng: Random, place: Path) -> list[str]:
    """Something in the way of what is written."""
    name, line = rng.choice(
        (
            ("store", ["fit", "-c", "fit.yaml"]),
            ("heads", ["fit", "-c", "fit.yaml"]),
            ("logs", ["fit", "-c", "fit.yaml"]),
            ("report", ["test", "-c", "test.yaml", "--model.heads=null", "--model.exits={2: {gates: [MambaGate]}}"]),
            ("fresh", ["split", "tiny", "--exits={2: {}}", "--out=fresh"]),
            ("page.html", ["report", "parted/../report", "--out=page.html"]),
            ("calibrated.yaml", BASES["calibrate"]),
            ("found.json", [*BASES["suitability"], "--out=found.json"]),
            ("found.png", [*BASES["suitability"], "--plot=found.png"]),
        )
    )
    if (place / name).is_dir():
        shutil.rmtree(place / name)
    OBSTACLES[rng.choice(sorted(OBSTACLES))](place / name)
    return line


CASES: dict[str, Case] = {
    each.__name__: each
    for each in (prompt, answer, yaml, option, printed, words, model, setting, heads, texts, obstacle)
}
