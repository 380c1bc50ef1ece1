"""The command line's side of the configuration: Hydra composes, mistakes become one clear line.

Everything is composed and checked before Hydra runs a job, so that a typo costs nothing and leaves
nothing behind.
"""

import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nightshift.fixed.config import CONF, Config, ConfigError, check, nearest, schema_keys

SHOWS_ONLY = (
    "--help",
    "-h",
    "--hydra-help",
    "--version",
    "--cfg",
    "-c",
    "--info",
    "-i",
    "--shell-completion",
    "-sc",
)


def compose(
    config_name: str = "config", overrides: list[str] | None = None, conf: Path = CONF
) -> dict[str, Any]:
    """Plain values. Raises ConfigError with one line for what Hydra would say in twenty."""
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(conf.resolve()), version_base="1.3"):
            return OmegaConf.to_container(
                hydra_compose(config_name, overrides=overrides or []), resolve=True
            )
    except (HydraException, OmegaConfBaseException, YAMLError) as error:
        raise ConfigError(explain(error, overrides or [])) from None


def explain(error: Exception, overrides: list[str]) -> str:
    """Hydra's exception as one line: key, value, rule, nearest valid choice."""
    text = str(error)
    if match := re.search(r"Could not find '([^']+)/([^'/]+)'", text):
        group, choice = match.groups()
        options = _options(group)
        if options:
            return (
                f"{group}={choice}: there is no such choice. Choices: {', '.join(options)}."
                f"{nearest(choice, options)}"
            )
    if match := re.search(
        r"Could not (?:override|append|delete)[^']*'([^']+)'|Key '([^']+)' is not in struct", text
    ):
        key = (match.group(1) or match.group(2)).split("@")[0]
        given = next((o for o in overrides if o.lstrip("+~").startswith(key)), key)
        return f"{given}: there is no such key.{nearest(key, schema_keys(Config))}"
    if "Ambiguous value for argument" in text:
        wrong = next((o for o in overrides if o in text), overrides[0])
        return f"{wrong}: several values need a multirun: add -m. A list is written key=[a,b]."
    if (
        "mismatched input" in text
        or "no viable alternative" in text
        or "extraneous input" in text
        or "missing EQUAL" in text
    ):
        wrong = next((o for o in overrides if o in text or "=" not in o), " ".join(overrides))
        return (
            f"{wrong}: cannot be read. Write key=value, e.g. model.depth=6; "
            "quote values with spaces or commas."
        )
    if type(error).__name__.endswith("YAMLError") or hasattr(error, "problem_mark"):
        mark = error.problem_mark
        return f"{mark.name}, line {mark.line + 1}: not valid YAML ({error.problem})."
    lines = [
        line.strip()
        for line in text.splitlines()
        if line.strip() and "HYDRA_FULL_ERROR" not in line
    ]
    return " ".join(lines[:3])


def _options(group: str) -> list[str]:
    folder = CONF / group
    return sorted(file.stem for file in folder.glob("*.yaml")) if folder.is_dir() else []


def first_of_sweep(override: str) -> str:
    """`a=1,2` -> `a=1`: enough to see whether the key and the choice exist."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    try:
        parsed = OverridesParser.create().parse_override(override)
    except HydraException as error:
        raise ConfigError(explain(error, [override])) from None
    if not parsed.is_sweep_override():
        return override
    return f"{override.split('=', 1)[0]}={next(iter(parsed.sweep_string_iterator()))}"


def check_champion(overrides: list[str], conf: Path = CONF) -> None:
    """A group chosen on the command line must not lose silently to conf/trial/champion.yaml."""
    import yaml

    champion = yaml.safe_load((conf / "trial" / "champion.yaml").read_text(encoding="utf-8")) or {}
    if "trial=none" in overrides:
        return
    for override in overrides:
        group = override.split("=", 1)[0]
        if "/" not in group and "." not in group and isinstance(champion.get(group), dict):
            accepted = ", ".join(f"{group}.{key}" for key in champion[group])
            raise ConfigError(
                f"{override}: conf/trial/champion.yaml sets {accepted} and would win over it. "
                "Add trial=none to leave the accepted changes out"
            )


def run(
    job: Callable[[dict[str, Any]], int],
    ready: Callable[[Config], None],
    arguments: list[str] | None = None,
) -> int:
    """Runs `job(values)` once, or once for each job of a multirun; returns the exit status.

    `ready(config)` looks for mistakes that need a look at the machine, before anything is written.
    In a multirun the values of each job are left for the job to check: one bad job must not hide
    the others.
    """
    import hydra
    from hydra._internal.utils import get_args_parser
    from omegaconf import OmegaConf

    if arguments is not None:
        sys.argv = [sys.argv[0], *arguments]
    options_first()
    given, unknown = get_args_parser().parse_known_args()
    if unknown:
        print(
            f"{unknown[0]}: there is no such option. Options: --multirun (-m), --cfg job, --help. "
            "Knobs are written key=value",
            file=sys.stderr,
        )
        return 2
    shows_only = any(argument.split("=")[0] in SHOWS_ONLY for argument in sys.argv[1:])
    try:
        if not any(a in ("--help", "-h", "--hydra-help", "--version") for a in sys.argv[1:]):
            conf, name = _config_place(given, "config")
            values = compose(
                name, [first_of_sweep(o) if given.multirun else o for o in given.overrides], conf
            )
            if conf == CONF:
                check_champion(given.overrides)
            if not given.multirun:
                config = check(_pipeline(values))
                if not shows_only:
                    ready(config)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    codes: list[int] = []

    def task(config) -> int:
        codes.append(job(_pipeline(OmegaConf.to_container(config, resolve=True))))
        return codes[-1]

    hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")(task)()
    return 0 if shows_only else max(codes, default=1)


def options_first() -> None:
    """argparse takes key=value arguments only in one row: `a=1 -m b=2` -> `-m a=1 b=2`."""
    from hydra._internal.utils import get_args_parser

    given, unknown = get_args_parser().parse_known_args()
    overrides = given.overrides + [argument for argument in unknown if not argument.startswith("-")]
    sys.argv = [sys.argv[0], *(a for a in sys.argv[1:] if a not in overrides), *overrides]


def _config_place(given, config_name: str) -> tuple[Path, str]:
    conf = Path(given.config_path) if given.config_path else CONF
    return (
        conf if conf.is_absolute() else Path.cwd() / conf
    ).resolve(), given.config_name or config_name


def _pipeline(values: dict[str, Any]) -> dict[str, Any]:
    """The part of the values that the schema of a run describes."""
    return {key: value for key, value in values.items() if key not in ("study", "space")}
