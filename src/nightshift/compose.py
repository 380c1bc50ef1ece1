"""Write params.yaml: the composed and checked conf/, for DVC's stages and for people to diff.

The first line carries a digest of the rest. A params.yaml that was edited (by hand, or by
`dvc exp run -S optim.matrix_lr=...`, which edits it) is refused, not overwritten: the edit would
be lost.

    dvc repro compose
"""

import hashlib
import sys
from pathlib import Path
from typing import Any

import yaml

from nightshift import command
from nightshift.fixed.config import ROOT, ConfigError, check, flatten

HEADER = (
    "# Written by `dvc repro compose` from conf/; change conf/trial/champion.yaml instead. "
    "sha256 {digest}\n"
)


def params_text(values: dict[str, Any]) -> str:
    body = yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
    return HEADER.format(digest=hashlib.sha256(body.encode()).hexdigest()[:16]) + body


def refuse_edited(path: Path, fresh: dict[str, Any]) -> None:
    if not path.is_file():
        return
    header, _, body = path.read_text(encoding="utf-8").partition("\n")
    if header + "\n" == HEADER.format(digest=hashlib.sha256(body.encode()).hexdigest()[:16]):
        return
    found, composed = flatten(yaml.safe_load(body) or {}), flatten(fresh)
    edits = [
        f"{key}={found[key]}" for key in found if key in composed and found[key] != composed[key]
    ]
    if not edits:
        return
    advice = " ".join(f"-S 'conf/trial/champion.yaml:++{edit}'" for edit in edits)
    raise ConfigError(
        f"params.yaml was edited ({', '.join(edits)}), and compose would undo it: "
        f"it is written from conf/. Use: dvc exp run {advice}   "
        "(to drop the edit: rm params.yaml && dvc repro compose)"
    )


def main() -> int:
    path = ROOT / "params.yaml"
    try:
        values = command.compose()
        check(values)
        refuse_edited(path, values)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    path.write_text(params_text(values), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
