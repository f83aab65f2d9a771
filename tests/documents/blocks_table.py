"""What of the documents' code is run otherwise than it stands, why, and what is checked in its place.

A test holds every table to what the documents need: an entry that no block uses is an error.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tests.documents.reading import ROOT
from tests.documents.test_documents import MAKEFILE, check_command

if TYPE_CHECKING:
    from tests.documents.blocks import Block
    from tests.documents.blocks_desk import Desk

HUB = {"llava-hf/llava-1.5-7b-hf": "14 GB from a hub; a LLaVA with one layer of width 16 stands in"}
"""Names of models, and why something else is loaded; it is of the same family."""

STAND_INS: dict[str, tuple[Any, str]] = {
    "max_steps": (2, "a run of thousands of steps is two"),
    "use_cpu": (True, "the tests have no accelerator"),
    "disable_tqdm": (True, "nobody watches the bars"),
    "save_strategy": ("no", "checkpoints in between are for the tests of resuming"),
}
"""Settings of run files, what they become, and why."""

SHORTER: dict[tuple[str, ...], tuple[list[str], str]] = {
    ("trimtab", "check"): (["--seconds", "1"], "a timing of 40 seconds is one of 1"),
    ("trimtab", "bench", "--config"): (["--steps", "1"], "one timed step for twenty"),
    ("python", "examples/scene_rows.py"): (["16", "4"], "16 and 4 rows for thousands"),
}
"""Commands that get more words, and why."""


WHOLE_SHORTER: dict[tuple[str, ...], tuple[list[str], str]] = {
    ("trimtab", "train"): (["--max_steps", "20"], "300 steps of each run are 20"),
    ("python", "examples/scene_rows.py"): (["400", "100"], "400 and 100 rows for thousands"),
}
"""What is shorter in the slow test of the tutorial, which has no other stand-ins, and why."""


@dataclass(frozen=True)
class Instead:
    """What is done with a command or block that is not run as it stands.

    Attributes:
        reason: Why not.
        check: What is checked in its place, called with the desk and the words of the command, or the block.
    """

    reason: str
    check: Callable[[Desk, Any], None]


def exists(desk: Desk, words: list[str]) -> None:
    """Command, target, script and options exist."""
    check_command(words)


def script_takes(desk: Desk, words: list[str]) -> None:
    """The script exists and knows the options."""
    text = (ROOT / words[1]).read_text(encoding="utf-8")
    for word in words[2:]:
        assert not word.startswith("--") or f'"{word.partition("=")[0]}"' in text, f"{words[1]} has no option {word}"


def make_target(desk: Desk, words: list[str]) -> None:
    """The Makefile has the target, and its rule runs what the name says."""
    check_command(words)
    wanted = {"quickstart": "-m trimtab quickstart", "test": "-m 'not slow'"}.get(words[1], "")
    rule = MAKEFILE.partition(f"\n{words[1]}:")[2].partition("\n\n")[0]
    assert wanted in rule


def environment(desk: Desk, words: list[str]) -> None:
    """The Makefile makes the environment that is switched on."""
    assert words[1:] == [".venv/bin/activate"]
    assert "-m venv .venv" in MAKEFILE


def make_quickstart(desk: Desk, words: list[str]) -> None:
    """The target is there. The slow test runs its command; else a tiny model is laid where that leaves its own."""
    make_target(desk, words)
    if desk.whole:
        desk.trimtab(["quickstart", "--steps", "4"])
    else:
        desk.lay_quickstart()


def in_one_process(desk: Desk, words: list[str]) -> None:
    """Accelerate can read its configuration; what it would start runs here, in one process."""
    if "--config_file" in words:
        assert (ROOT / words[words.index("--config_file") + 1]).is_file()
    if "trimtab" in words:
        desk.trimtab(words[words.index("trimtab") + 1 :])
    else:
        assert (ROOT / words[-1]).is_file()


def plugin_is_there(desk: Desk, words: list[str]) -> None:
    """The files that are named on the command line were written by blocks before."""
    plugin = words[words.index("--external_plugins") + 1]
    assert (desk.folder / plugin).is_file()


def lmms_eval_class(desk: Desk, words: list[str]) -> None:
    """The name is the one of the entry point, and the arguments are those of the class."""
    from importlib.metadata import entry_points

    from trimtab.integrations import lmms_eval

    (entry,) = entry_points(group="lmms_eval.models", name="trimtab")
    assert entry.load() is not None
    assert words[words.index("--model") + 1] in str(vars(lmms_eval))


COMMANDS: dict[tuple[str, ...], Instead] = {
    ("make", "quickstart"): Instead("makes an environment, then runs `trimtab quickstart`", make_quickstart),
    ("make", "test"): Instead("runs what is running here", make_target),
    ("pip", "install"): Instead("needs a package index; the extras are looked up", exists),
    ("source",): Instead("changes a shell that the tests do not have", environment),
    ("trimtab", "view"): Instead("serves until it is stopped; tests/view starts it", exists),
    ("trimtab", "bench", "training"): Instead("takes minutes or a GPU; tests/run has it at toy size", exists),
    ("accelerate", "launch"): Instead("starts processes; tests/dualspeed/test_launch.py does", in_one_process),
    ("swift",): Instead("is another framework; tests/integrations/test_ms_swift.py has the plug-in", plugin_is_there),
    ("lmms-eval",): Instead("is another framework; tests/integrations/test_lmms_eval.py has it", lmms_eval_class),
    ("python", "experiments/dualspeed/run.py"): Instead(
        "trains for hours; tests/quickstart has its arms", script_takes
    ),
    ("python", "experiments/dualspeed/page.py"): Instead(
        "writes into the repository; tests/documents/test_results.py", script_takes
    ),
    ("python", "docs/make_results.py"): Instead("writes into the repository", script_takes),
    ("python", "bench/training.py"): Instead("needs a GPU; tests/bench runs its parts", script_takes),
    ("python", "bench/launchers.py"): Instead("needs several GPUs; tests/bench runs its parts", script_takes),
}
"""First words of commands that are not run as they stand; the longest that fits counts."""


def rows_of_check(desk: Desk, block: Block) -> None:
    """Every row of the shown table is a row of the table that `trimtab check` printed before the block."""
    names = {line.split("│")[1].strip() for line in block.text.splitlines() if line.startswith("│")} - {""}
    lines = [line.strip(" │") for line in desk.output.splitlines()]
    printed = {name for name in names if any(line.startswith(f"{name} ") for line in lines)}
    timed = {"timed", "shares of a plain step", "shares of a fast step", "measured steps", "expected gain"}
    assert names - printed <= timed, names - printed  # where the machine is busy no step is timed
    assert len(printed) > 12


def axolotl_plugin(desk: Desk, block: Block) -> None:
    """The plug-in is where the file says, and the settings are accepted."""
    import yaml

    from trimtab import DualSpeedConfig
    from trimtab.integrations import axolotl

    settings = yaml.safe_load(block.text)
    assert settings["plugins"] == [f"{axolotl.__name__}.{axolotl.PLUGIN}"]
    DualSpeedConfig.from_dict(settings["dualspeed"])


def swift_plugin(desk: Desk, block: Block) -> None:
    """The file is written, and what it registers are settings that are accepted."""
    import ast

    from trimtab import DualSpeedConfig

    assert block.file_name is not None
    (desk.folder / block.file_name).write_text(block.text, encoding="utf-8")
    (call,) = (node for node in ast.walk(ast.parse(block.text)) if isinstance(node, ast.Call))
    DualSpeedConfig.from_dict(ast.literal_eval(call.args[0]))


BLOCKS: dict[tuple[str, str], Instead] = {
    ("docs/guides/check.md", "┏━"): Instead("shows a run of another machine", rows_of_check),
    ("docs/guides/migration.md", "plugins:"): Instead("is a file of axolotl, which is not installed", axolotl_plugin),
    ("docs/guides/migration.md", "# dualspeed_plugin.py"): Instead(
        "is a plug-in of ms-swift, which is not installed", swift_plugin
    ),
}
"""Blocks that are not run as they stand, by their page and how they begin."""

AFTER_A_RUN = {
    "docs/guides/pruned_inference.md": "speaks of a run that has ended",
}
"""Pages that begin where a run has ended in `out`, and why."""

LAYERS = {
    "docs/methods/dualspeed.md": (32, "names a layer of a model that has 32"),
    "docs/methods/vtw.md": (32, "names layers of a model that has 32"),
}
"""Pages whose stand-in for a model of a hub needs more than one layer, how many, and why."""

ALTERNATIVES = {
    "README.md": "shows three ways; each starts in an empty folder",
}
"""Pages on which every heading starts anew, and why."""

WARNINGS = {
    "ignore:.*gradient_checkpointing.*:FutureWarning": "TRL and PEFT use this name, which transformers 5 still takes",
    "ignore:.*pin_memory.*:UserWarning": "torch says so wherever there is no accelerator; readers have one",
}
"""Warnings of other libraries that a page may raise."""
