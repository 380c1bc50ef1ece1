"""nightshift: one command for everything.

Each subcommand is a function of a module, loaded when asked for.
"""

import importlib
import os
import sys

COMMANDS = {
    "study": (
        "agent.loop",
        "run a study: baseline, then trials; keep what is better (resumes by name)",
    ),
    "promote": (
        "agent.promote",
        "a study's champion at a larger scale: ablation, test once, registry",
    ),
    "agent": (
        "agent.shell",
        "an outside agent's tools on a study, JSON in and out: propose, status",
    ),
    "mcp": ("agent.mcp_server", "the same tools as an MCP server on stdin and stdout"),
    "tell": ("agent.notes", "leave a note for the model that proposes in a study"),
    "report": ("agent.report", "chart, table and summary of a study"),
    "replay": ("agent.replay", "make a trial again, or all of a study: first/3, --all first"),
    "pretrain": (
        "nightshift.pretrain",
        "train one model; -m sweeps: -m optim.matrix_lr=0.01,0.02,0.04",
    ),
    "evaluate": ("nightshift.fixed.evaluate", "score a run again: run=outputs/pretrain/<run>"),
    "sft": ("nightshift.sft", "teach a base checkpoint to chat: base=outputs/pretrain/<run>"),
    "chat-evaluate": (
        "nightshift.chat_evaluate",
        "score a chat checkpoint again: run=outputs/sft/<run>",
    ),
    "chat": ("nightshift.chat", "talk to a checkpoint in the terminal"),
    "serve": ("nightshift.serve", "OpenAI-compatible API and a web page to chat and compare"),
    "export": ("nightshift.export", "a checkpoint -> a folder for the Hugging Face libraries"),
    "lm-eval": ("nightshift.harness", "EleutherAI's harness on a checkpoint"),
    "doctor": ("nightshift.fixed.doctor", "which protections hold on this machine, by attack"),
    "ui": ("nightshift.ui", "open the MLflow UI on the right store"),
}

USAGE = f"""usage: nightshift <command> [key=value ...]

{chr(10).join(f"  {name:<14} {what}" for name, (_, what) in COMMANDS.items())}

Every knob is a file in conf/:  nightshift pretrain model.depth=6 optim.matrix_lr=0.03 budget=5min
  nightshift pretrain --help        groups, choices and keys
  nightshift pretrain --cfg job     the composed configuration
  nightshift study study.name=first study.trials=8"""


def main() -> int:
    arguments = sys.argv[1:]
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(USAGE)
        return 0
    name, rest = arguments[0], arguments[1:]
    if name not in COMMANDS:
        import difflib

        close = difflib.get_close_matches(name, COMMANDS, 1)
        hint = f" Nearest: {close[0]}." if close else ""
        print(
            f"{name}: there is no such command. Commands: {', '.join(COMMANDS)}.{hint}",
            file=sys.stderr,
        )
        return 2
    refuse_other_checkout()
    try:
        return importlib.import_module(COMMANDS[name][0]).main(rest)
    except KeyboardInterrupt:
        return 130


def refuse_other_checkout() -> None:
    """An installed command runs the code of its own checkout, even from inside another one."""
    from nightshift.fixed.config import ROOT

    here = os.getcwd()
    if os.path.isfile("src/nightshift/cli.py") and not os.path.samefile(here, ROOT):
        sys.exit(
            f"this nightshift belongs to {ROOT}, you stand in {here}. "
            "Use that checkout's own environment: make setup && .venv/bin/nightshift ..."
        )


if __name__ == "__main__":
    sys.exit(main())
